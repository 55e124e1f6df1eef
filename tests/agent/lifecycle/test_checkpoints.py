"""A checkpoint's success is counted, its failure told, and what it raises goes on its way."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

SUCCEEDED, FAILED = (f'optwatch_checkpoints_total{{result="{result}"}}' for result in ("succeeded", "failed"))


@pytest.fixture
def optimizer() -> torch.optim.Optimizer:
    return torch.optim.AdamW([nn.Parameter(torch.ones(3))])


def test_a_checkpoint_that_is_written_is_counted_with_its_time(
    optimizer: torch.optim.Optimizer, watch: Any, tmp_path: Path
) -> None:
    monitor = watch(optimizer)
    assert monitor.snapshot()[SUCCEEDED] == 0
    before = time.time()
    with monitor.checkpoint(tmp_path / "last.pt") as checkpoint:
        torch.save(optimizer.state_dict(), checkpoint.path)
    snapshot = monitor.snapshot()
    assert snapshot[SUCCEEDED] == 1
    assert before <= snapshot['optwatch_last_checkpoint_timestamp_seconds{result="succeeded"}'] <= time.time()
    assert snapshot[FAILED] == 0


def test_a_checkpoint_that_raises_is_told_and_raises(
    optimizer: torch.optim.Optimizer, watch: Any, tmp_path: Path
) -> None:
    monitor = watch(optimizer)
    path = tmp_path / "missing" / "last.pt"
    with pytest.raises(RuntimeError, match="does not exist"), monitor.checkpoint(path):
        torch.save(optimizer.state_dict(), path)
    monitor.flush()
    assert monitor.snapshot()[FAILED] == 1
    assert monitor.snapshot()['optwatch_events_total{kind="checkpoint_failed",severity="warning"}'] == 1


@pytest.mark.parametrize("empty", [True, False], ids=["an empty file", "no file"])
def test_a_checkpoint_of_which_nothing_stands_afterwards_has_failed(
    empty: bool, optimizer: torch.optim.Optimizer, watch: Any, tmp_path: Path
) -> None:
    monitor = watch(optimizer)
    with monitor.checkpoint(tmp_path / "last.pt") as checkpoint:
        if empty:
            Path(checkpoint.path).touch()
    monitor.flush()
    assert monitor.snapshot()[FAILED] == 1


def test_a_checkpoint_written_over_the_one_before_is_told_once_and_one_renamed_onto_it_is_not(
    optimizer: torch.optim.Optimizer, watch: Any, tmp_path: Path
) -> None:
    monitor = watch(optimizer)
    told = 'optwatch_events_total{kind="audit_finding",severity="warning"}'

    def renamed(path: Path) -> None:
        torch.save(optimizer.state_dict(), path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def in_place(path: Path) -> None:
        torch.save(optimizer.state_dict(), path)

    for write, events in ((in_place, 0), (renamed, 0), (in_place, 1), (in_place, 1)):  # the first is over nothing
        with monitor.checkpoint(tmp_path / "last.pt"):
            write(tmp_path / "last.pt")
        monitor.flush()
        assert monitor.snapshot()[told] == events
    assert monitor.snapshot()[SUCCEEDED] == 4


def test_a_folder_counts_with_its_files_and_a_remote_path_by_its_word(
    optimizer: torch.optim.Optimizer, watch: Any, tmp_path: Path
) -> None:
    monitor = watch(optimizer)
    with monitor.checkpoint(tmp_path / "sharded") as checkpoint:
        Path(checkpoint.path).mkdir()
        torch.save(optimizer.state_dict(), Path(checkpoint.path) / "0.pt")
    with monitor.checkpoint("s3://bucket/last.pt"):
        pass
    assert monitor.snapshot()[SUCCEEDED] == 2


def test_the_server_is_asked_to_wait_while_a_checkpoint_is_written(
    optimizer: torch.optim.Optimizer, watch: Any, stand_in: Any, eventually: Any, tmp_path: Path
) -> None:
    server = stand_in()
    monitor = watch(optimizer, server=server.url, checkpoint_promise_seconds=1234.0)

    def promises() -> list[Any]:
        return [body["beats"][0].get("promise_seconds") for body in server.bodies("/heartbeats")]

    with monitor.checkpoint(tmp_path / "last.pt") as checkpoint:
        eventually(lambda: 1234.0 in promises())
        torch.save(optimizer.state_dict(), checkpoint.path)
    eventually(lambda: promises()[-1] is None)
