"""What detectors know outlives the process, and a run that resumes goes on from it; stalls and validation in a run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from optwatch import Target
from optwatch.events import Event
from optwatch.faults import Faults
from optwatch.host.detection import SAVE_SECONDS, Detection
from optwatch.host.remembered import KEPT_SECONDS, Remembered
from optwatch.record import StepRecord


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def make(settings: Callable[..., Any]) -> Callable[..., Detection]:
    def one(run: str = "a", rank: int = 0, resumed_from: str | None = None, **options: Any) -> Detection:
        faults, clock, target = (
            options.pop("faults", Faults()),
            options.pop("clock", Clock()),
            options.pop("target", None),
        )
        return Detection(settings(**options), run, rank, resumed_from, target, faults, clock)

    return one


def steps(detection: Detection, losses: list[float], start: int = 0) -> list[tuple[int, str]]:
    events: list[Event] = []
    for step, loss in enumerate(losses, start):
        events += detection.observe(StepRecord(step=step, optimizer="AdamW", started=0.0, loss=loss))
    return [(event.step, event.kind) for event in events]


def noise(count: int, level: float = 2.0) -> list[float]:
    source = random.Random(3)
    return [level + source.gauss(0, 0.02) for _ in range(count)]


def test_a_resumed_run_needs_no_second_warm_up(make: Any, tmp_path: Path) -> None:
    first = make("a")
    assert steps(first, noise(200)) == []
    first.keep(now=True)
    checkpoint = tmp_path / "step200.pt"
    checkpoint.write_bytes(b"weights")
    first.keep_with(str(checkpoint))
    for run, resumed_from in (("a", None), ("b", "a"), ("b", str(checkpoint))):
        assert steps(make(run, resumed_from=resumed_from), [2.0, 9.0], 200) == [(201, "loss_spike")], resumed_from
    # Without them it is a beginning like any other, and so it is for another rank.
    assert steps(make("b"), [2.0, 9.0], 200) == []
    assert steps(make("a", rank=1), [2.0, 9.0], 200) == []


def test_a_rise_that_was_watched_when_the_process_died_is_told_as_divergence_by_the_next(make: Any) -> None:
    first = make("a")
    assert steps(first, [*noise(200), *noise(100, 6.0)]) == [(200, "loss_spike")]
    first.keep(now=True)
    assert steps(make("a"), noise(150, 6.0), 300) == [(400, "divergence")]


def test_a_checkpoint_that_is_a_folder_carries_it_within(make: Any, tmp_path: Path) -> None:
    first, folder = make("a"), tmp_path / "checkpoint"
    folder.mkdir()
    steps(first, noise(100))
    first.keep_with(str(folder))
    moved = folder.rename(tmp_path / "elsewhere")
    assert steps(make("b", resumed_from=str(moved)), [9.0], 100) == [(100, "loss_spike")]
    first.keep_with("s3://bucket/checkpoint")
    assert {path.name for path in tmp_path.iterdir()} <= {"elsewhere", "spool"}


@pytest.mark.parametrize(
    "text", ["", "{", '{"format": "other/9"}', '{"format": "optwatch-detectors/1", "detectors": 3}']
)
def test_a_file_that_is_no_state_is_counted_and_the_run_begins_anew(make: Any, settings: Any, text: str) -> None:
    first = make("a")
    steps(first, noise(100))
    first.keep(now=True)
    (path,) = (settings().spool_directory / "detectors").glob("*.json")
    path.write_text(text)
    faults = Faults()
    detection = make("a", faults=faults)
    assert faults.counts == {"spool": 1}
    assert steps(detection, [*noise(100), 9.0]) == [(100, "loss_spike")]


def test_a_state_with_another_form_within_is_counted_and_half_of_it_is_not_used(make: Any, settings: Any) -> None:
    first = make("a")
    steps(first, noise(100))
    first.keep(now=True)
    (path,) = (settings().spool_directory / "detectors").glob("*.json")
    body = json.loads(path.read_text())
    del body["detectors"]["optimizers"]["AdamW"]["plateau"]["best"]
    path.write_text(json.dumps(body))
    faults = Faults()
    detection = make("a", faults=faults)
    assert steps(detection, [2.0, 9.0]) == []
    assert faults.counts == {"detector": 1}


def test_it_is_written_every_minute_and_not_at_every_step(make: Any, settings: Any) -> None:
    clock, folder = Clock(), settings().spool_directory / "detectors"
    detection = make("a", clock=clock)
    steps(detection, noise(3))
    clock.now += SAVE_SECONDS - 1
    detection.keep()
    assert not folder.exists()
    clock.now += 1
    detection.keep()
    (path,) = folder.glob("*.json")
    written = path.stat().st_mtime_ns
    detection.keep()
    assert path.stat().st_mtime_ns == written
    assert [p.name for p in folder.iterdir()] == [path.name]


def test_files_of_long_ago_are_deleted_and_newer_ones_kept(tmp_path: Path) -> None:
    for run, age in (("old", KEPT_SECONDS + 60), ("new", KEPT_SECONDS - 60)):
        Remembered(tmp_path, run, 0).save({})
        path = max(tmp_path.glob("*.json"), key=lambda path: path.stat().st_mtime)
        os.utime(path, (time.time() - age,) * 2)
    Remembered(tmp_path, "x", 0).forget_old()
    assert Remembered(tmp_path, "old", 0).find(None) is None
    assert Remembered(tmp_path, "new", 0).find(None) == {}


def test_a_stall_is_told_once_and_not_during_a_checkpoint_or_after_the_end(make: Any) -> None:
    clock = Clock()
    detection = make("a", clock=clock, stall_seconds=60)
    for loss in noise(10):
        steps(detection, [loss])
        clock.now += 1
    detection.announce(True)
    clock.now += 500
    assert detection.idle() == []
    detection.announce(False)
    clock.now += 59
    assert detection.idle() == []
    clock.now += 2
    (event,) = detection.idle()
    assert (event.kind, event.severity, event.runbook) == ("stall", "warning", "TrainingStalled")
    assert "61 s after step 0; the usual interval is 1 s" in event.summary
    assert detection.idle() == []
    steps(detection, [2.0])
    detection.finished()
    clock.now += 10_000
    assert detection.idle() == []


TRAINING = """
import sys, torch
from optwatch import Settings, attach
folder, resume_from = sys.argv[1], sys.argv[2] or None
torch.manual_seed(0)
weight = torch.nn.Parameter(torch.ones(1))
optimizer = torch.optim.SGD([weight], lr=0.0)
settings = Settings(address="127.0.0.1", spool_directory=folder + "/spool")
monitor = attach(optimizer, port=0, settings=settings, resume_from=resume_from)
for step in range(int(sys.argv[3])):
    (weight * (2 + 0.02 * torch.randn(1))).sum().backward()
    optimizer.step(), optimizer.zero_grad()
if resume_from:
    (weight * 30).sum().backward()
    optimizer.step()
    monitor.flush(30)
    print(sum(count for name, count in monitor.snapshot().items() if name.startswith("optwatch_spikes_total")))
else:
    with monitor.checkpoint(folder + "/last.pt") as checkpoint:
        torch.save({"weight": weight}, checkpoint.path)
"""


def test_a_process_that_resumes_from_a_checkpoint_goes_on_with_what_the_last_one_knew(tmp_path: Path) -> None:
    def train(folder: Path, resume_from: str, count: int) -> str:
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-c", TRAINING, str(folder), resume_from, str(count)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip()

    train(tmp_path / "first", "", 120)
    # Another machine, as far as the spool goes: the file beside the checkpoint is all there is.
    assert train(tmp_path / "second", str(tmp_path / "first" / "last.pt"), 2) == "2.0"


def test_a_run_that_stands_still_tells_it_while_it_does(watch: Any, net: Any, step: Any, eventually: Any) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = watch(optimizer, stall_seconds=0.2)
    for _ in range(3):
        step(optimizer)
    key = 'optwatch_events_total{kind="stall",severity="warning"}'
    eventually(lambda: monitor.snapshot()[key] == 1)


def test_validation_that_regresses_is_an_event(watch: Any, net: Any, step: Any) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = watch(optimizer, target=Target("dev_quality", 0.9, 1000, "max"))
    step(optimizer)
    for loss, quality in ((3.0, 0.5), (2.5, 0.6), (2.0, 0.7), (2.6, 0.5), (2.7, 0.5)):
        monitor.log(val_loss=loss, dev_quality=quality)
    assert monitor.flush(30)
    assert monitor.snapshot()['optwatch_events_total{kind="validation_regression",severity="warning"}'] == 2
