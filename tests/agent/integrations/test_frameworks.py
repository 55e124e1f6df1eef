"""Training scripts as people write them, through frameworks and without, each with one line of ours."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[3] / "examples" / "frameworks"
STEPS = {
    "accelerate_loop": 16,
    "fsdp2": 20,
    "hf_trainer": 20,
    "lightning_fit": 24,
    "minimal_gpt": 30,
    "reinforcement": 30,
    "vision": 30,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("frameworks_run.py")), str(SCRIPTS)],
        env=os.environ | {"OPTWATCH_PORT": "0", "OPTWATCH_ADDRESS": "127.0.0.1", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path_factory.mktemp("frameworks"),
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout.rpartition("RESULTS ")[2]))


def test_every_script_is_run(results: dict[str, Any]) -> None:
    assert {path.stem for path in SCRIPTS.glob("*.py")} == set(STEPS) == set(results)


@pytest.mark.parametrize("name", STEPS)
def test_one_line_is_all_and_every_loss_stays_the_same_to_its_last_bit(name: str, results: dict[str, Any]) -> None:
    result = results[name]
    assert result["lines"] == 1
    assert len(result["plain"]) >= STEPS[name]
    assert result["watched"] == result["plain"]


@pytest.mark.parametrize("name", STEPS)
def test_all_steps_are_seen_with_loss_norms_and_moments_and_no_fault(name: str, results: dict[str, Any]) -> None:
    (seen,) = results[name]["seen"]
    assert seen["faults"] == {}
    values = seen["values"]
    for metric in ("optwatch_loss", "optwatch_weight_norm", "optwatch_first_moment_norm", "optwatch_update_ratio"):
        of_optimizers = [value for series, value in values.items() if series.startswith(metric)]
        # RMSprop without momentum has no first moment.
        wanted = 2 if name == "reinforcement" and "moment" not in metric else 1
        assert len(of_optimizers) == wanted, metric
        assert all(math.isfinite(value) and value != 0 for value in of_optimizers), metric
    steps = [value for series, value in values.items() if series.startswith("optwatch_steps_total")]
    assert set(steps) == {STEPS[name]}


def test_the_loss_seen_is_the_one_that_the_script_prints(results: dict[str, Any]) -> None:
    for name in ("minimal_gpt", "vision", "lightning_fit"):
        (seen,) = results[name]["seen"]
        assert seen["values"]["optwatch_loss"] == pytest.approx(float(results[name]["plain"][-1]), rel=1e-6)


def test_callbacks_report_validation_values_and_the_framework_s_run_name(results: dict[str, Any]) -> None:
    (trainer,), (fit,) = results["hf_trainer"]["seen"], results["lightning_fit"]["seen"]
    assert trainer["values"]['optwatch_reported{name="eval_loss"}'] > 0
    assert trainer["run"] == "hf-trainer"
    assert fit["values"]['optwatch_reported{name="val_loss"}'] > 0


def test_gradient_clipping_of_a_framework_is_seen(results: dict[str, Any]) -> None:
    for name in ("hf_trainer", "lightning_fit", "accelerate_loop", "minimal_gpt"):
        (seen,) = results[name]["seen"]
        before, after = (
            seen["values"][f'optwatch_grad_norm{{stage="{stage}"}}'] for stage in ("before_clip", "at_step")
        )
        assert after == pytest.approx(min(before, 1.0), rel=1e-4), name
