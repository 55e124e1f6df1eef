"""`optwatch checkpoint verify` on real checkpoints: sound, cut short, flipped, emptied, poisoned and refused ones."""

from __future__ import annotations

import argparse
import json
import pickle
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tests.agent.resume.resuming import Training, flip_a_bit, rewrite
from torch.optim.lr_scheduler import CosineAnnealingLR

from optwatch import Settings, attach
from optwatch.resume.verify import DAMAGED, SOUND, UNUSABLE, main


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one training saved as a file and as a folder of shards, each with its fingerprint."""
    folder = tmp_path_factory.mktemp("made")
    training = Training(scheduler=lambda optimizer: CosineAnnealingLR(optimizer, 100))
    settings = Settings(address="127.0.0.1", spool_directory=folder / "spool")
    monitor = attach(training.optimizer, model=training.model, port=0, settings=settings)
    training.train()
    training.save(monitor, folder / "last.pt")
    with monitor.checkpoint(folder / "shards"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one process without a group
        dcp.save(training.state(), checkpoint_id=folder / "shards", no_dist=True)
    assert monitor.faults.counts == {}
    monitor.detach()
    return folder


@pytest.fixture
def path(made: Path, tmp_path: Path) -> Path:
    """The file, with its fingerprint beside it, to be broken."""
    for file in made.glob("last.pt*"):
        shutil.copy(file, tmp_path)
    return tmp_path / "last.pt"


@pytest.fixture
def alone(path: Path) -> Path:
    """The file without a fingerprint."""
    for file in path.parent.glob("*.json"):
        file.unlink()
    return path


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> Path:
    """The folder of shards, to be broken."""
    return Path(shutil.copytree(made / "shards", tmp_path / "shards"))


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any]]:
    """Runs the command: its exit status, and its report or the error."""

    def run(path: Path) -> tuple[int, Any]:
        status = main(["verify", str(path), "--json"])
        report = json.loads(capsys.readouterr().out)
        return status, report.get("error", report)

    return run


def only_problem(outcome: tuple[int, Any]) -> str:
    status, report = outcome
    assert status == DAMAGED
    assert len(report["problems"]) == 1
    return str(report["problems"][0])


def test_a_sound_file_is_sound_with_and_without_a_fingerprint(path: Path, verify: Any) -> None:
    status, report = verify(path)
    assert (status, report["problems"], report["notes"]) == (SOUND, [], [])
    assert (report["format"], report["bytes"]) == ("torch.save", path.stat().st_size)
    assert "of step 6" in report["fingerprint"]
    # 8 weights, and two moments of each; the step counts and the generator's state are no part of the comparison.
    assert report["fingerprint"].endswith("24 tensors compared")
    assert report["optimizers"] == ["optimizer: 8 of 8 parameters have state (exp_avg, exp_avg_sq, step), step 6"]
    path.with_name("last.pt.optwatch-rank0.json").unlink()
    status, report = verify(path)
    assert (status, report["problems"]) == (SOUND, [])
    assert report["fingerprint"].startswith("none beside it")


def test_a_sound_folder_of_shards_is_sound(shards: Path, verify: Any) -> None:
    status, report = verify(shards)
    assert (status, report["problems"]) == (SOUND, [])
    assert report["format"] == "torch.distributed.checkpoint"
    assert report["fingerprint"].endswith("24 tensors compared")


def test_the_report_for_a_reader_says_the_same(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(path)]) == SOUND
    assert capsys.readouterr().out.splitlines()[-1] == "sound"
    rewrite(path, lambda saved: saved["optimizer"]["state"].pop(0))
    assert main(["verify", str(path)]) == DAMAGED
    *_, count, problem = capsys.readouterr().out.splitlines()
    assert count == "1 problem:"
    assert problem.startswith("  - moments_missing: ")


@pytest.mark.parametrize("left", [0, 100, 5000, -1], ids=["nothing", "the beginning", "half", "all but a byte"])
def test_a_file_that_is_cut_short_is_told_to_be(left: int, alone: Path, verify: Any) -> None:
    content = alone.read_bytes()
    alone.write_bytes(content[:left])
    problem = only_problem(verify(alone))
    assert ("is empty" if left == 0 else "cut short") in problem


def test_a_flipped_bit_is_told_with_its_tensor_by_the_files_own_sums(alone: Path, verify: Any) -> None:
    flip_a_bit(alone, torch.load(alone, weights_only=True)["optimizer"]["state"][0]["exp_avg"])
    problem = only_problem(verify(alone))
    assert problem.startswith("optimizer.state.0.exp_avg: ")
    assert "CRC-32" in problem


def test_a_tensor_changed_and_written_anew_is_told_by_the_fingerprint_alone(
    path: Path, alone: Path, verify: Any, made: Path
) -> None:
    def change(saved: dict[str, Any]) -> None:
        saved["model"]["3.weight"][0, 0] += 1e-6

    rewrite(path, change)
    assert verify(path)[0] == SOUND  # nothing in the file itself is wrong
    shutil.copy(made / "last.pt.optwatch-rank0.json", path.parent)
    problem = only_problem(verify(path))
    assert problem.startswith("contents_changed: ")
    assert "3.weight" in problem


@pytest.mark.parametrize(("value", "told"), [("nan", "1 NaN and 0 Inf"), ("-inf", "0 NaN and 1 Inf")])
def test_what_is_not_finite_is_told_with_its_place(value: str, told: str, alone: Path, verify: Any) -> None:
    def poison(saved: dict[str, Any]) -> None:
        saved["optimizer"]["state"][1]["exp_avg_sq"][2, 3] = float(value)

    rewrite(alone, poison)
    assert only_problem(verify(alone)) == f"optimizer.state.1.exp_avg_sq holds {told} in 36 elements"


def drop_state_of_one(saved: dict[str, Any]) -> None:
    del saved["optimizer"]["state"][2]["exp_avg"]


def drop_all_state(saved: dict[str, Any]) -> None:
    saved["optimizer"]["state"] = {}


def reset_one_step(saved: dict[str, Any]) -> None:
    saved["optimizer"]["state"][2]["step"].zero_()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (drop_state_of_one, "optimizer: exp_avg is missing for parameters 2 of 8 parameters"),
        (drop_all_state, "optimizer: no parameter has optimizer state"),
        (reset_one_step, "optimizer: step counts differ (0, 6): parameters 2 not at 6"),
    ],
)
def test_state_that_is_missing_or_uneven_is_told_without_a_fingerprint(
    change: Any, told: str, alone: Path, verify: Any
) -> None:
    rewrite(alone, change)
    assert only_problem(verify(alone)) == told


def test_a_schedule_that_was_set_back_is_told_by_the_fingerprint(path: Path, verify: Any) -> None:
    rewrite(path, lambda saved: saved["scheduler"].update(last_epoch=2))
    problem = only_problem(verify(path))
    assert problem.startswith("scheduler_offset: ")
    assert "step 6 was saved, step 2 is there now" in problem


def test_an_optimizer_that_keeps_nothing_lacks_nothing(tmp_path: Path, verify: Any) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    torch.save(optimizer.state_dict(), tmp_path / "sgd.pt")
    status, report = verify(tmp_path / "sgd.pt")
    assert (status, report["optimizers"]) == (SOUND, ["the file itself: 0 of 1 parameters have state (none)"])


def test_a_shard_that_is_gone_or_short_is_told_with_what_was_in_it(shards: Path, verify: Any) -> None:
    shard = shards / "__0_0.distcp"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    status, report = verify(shards)
    assert status == DAMAGED
    assert any("in __0_0.distcp: the file ends 10 bytes too early" in problem for problem in report["problems"])
    shard.unlink()
    problem = only_problem(verify(shards))
    assert problem.startswith("__0_0.distcp: the file is missing, and with it ")
    assert "model.0.weight" in problem or "more" in problem


class Evil:
    """What a pickle may do when it is loaded."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("loaded"),))


def test_what_only_code_could_bring_back_is_refused_by_name_and_not_run(
    tmp_path: Path, shards: Path, verify: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"args": argparse.Namespace(lr=1)}, tmp_path / "namespace.pt")
    status, error = verify(tmp_path / "namespace.pt")
    assert status == UNUSABLE
    assert "holds an object of argparse.Namespace" in error
    assert "vars(args)" in error
    torch.save({"evil": Evil()}, tmp_path / "evil.pt")
    assert verify(tmp_path / "evil.pt")[0] == UNUSABLE
    (shards / ".metadata").write_bytes(pickle.dumps(Evil()))
    status, error = verify(shards)
    assert status == UNUSABLE
    assert "could run any code" in error
    assert not (tmp_path / "loaded").exists()


def test_states_of_random_generators_may_be_in_it(tmp_path: Path, verify: Any) -> None:
    import numpy as np

    saved = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()}
    torch.save(saved, tmp_path / "states.pt")
    assert verify(tmp_path / "states.pt")[0] == SOUND


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: None, "there is nothing at"),
        (lambda path: path.mkdir(), "it has no .metadata, which is written last"),
        (lambda path: path.write_text("step,loss\n"), "is no file of torch.save: it begins with b'step,los'"),
    ],
    ids=["nothing", "a folder of nothing", "a text"],
)
def test_a_path_without_a_checkpoint_is_told_to_be_one(make: Any, told: str, tmp_path: Path, verify: Any) -> None:
    make(tmp_path / "given")
    status, error = verify(tmp_path / "given")
    assert status == UNUSABLE
    assert told in error


def test_a_fingerprint_that_cannot_be_read_is_said_and_the_rest_still_checked(path: Path, verify: Any) -> None:
    beside = path.with_name("last.pt.optwatch-rank0.json")
    body = json.loads(beside.read_text())
    beside.write_text(json.dumps(body | {"format": "optwatch-fingerprint/9"}))
    status, report = verify(path)
    assert status == SOUND
    assert "its format is 'optwatch-fingerprint/9', this version reads 'optwatch-fingerprint/1'" in report["notes"][0]
