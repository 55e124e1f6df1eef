"""Callbacks for frameworks: what they report, and how they say that training ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from optwatch.integrations import reported


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("integrations_run.py"))],
        env=os.environ | {"OPTWATCH_ADDRESS": "127.0.0.1", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path_factory.mktemp("integrations"),
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout.rpartition("RESULTS ")[2]))


def test_a_tracker_watches_what_was_prepared_and_reports_what_is_logged(results: dict[str, Any]) -> None:
    tracked = results["tracked"]
    assert tracked["values"]["optwatch_steps_total"] == 3
    assert tracked["values"]['optwatch_reported{name="val_loss"}'] == 2.5
    assert not any("train_loss" in series or "text" in series for series in tracked["values"])
    assert (tracked["run"], tracked["left"]) == ("tracked", 0)


def test_a_tracker_without_an_optimizer_says_in_which_order_to_call(results: dict[str, Any]) -> None:
    assert "call accelerator.prepare(optimizer) before accelerator.init_trackers()" in results["tracked"]["early"]


def test_an_exception_in_lightning_s_fit_goes_on_its_way_and_the_run_has_failed(results: dict[str, Any]) -> None:
    assert results["failed"] == {
        "raised": "'no such column'",
        "first": ["failed", "KeyError: 'no such column'"],
        "left": 0,
    }


def test_only_numbers_of_the_asked_names_are_reported() -> None:
    import torch

    values = {"eval_loss": 1.5, "eval/acc": torch.tensor(0.5), "eval_on": True, "eval_name": "x", "loss": 2.0}
    found = reported(values | {"eval_many": torch.ones(3)}, ("eval",))
    assert found == {"eval_loss": 1.5, "eval_acc": torch.tensor(0.5)}
