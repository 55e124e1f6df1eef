"""Levels of the loss: a slow rise, one that stays, and a loss that no longer falls, as the whole suite tells them."""

from __future__ import annotations

import json
import math
import random

import pytest

from optwatch import Settings
from optwatch.detectors import Detectors, PlateauDetector, replay
from optwatch.detectors.plateau import LEVEL
from optwatch.record import StepRecord


def falling(count: int, spread: float = 0.02, seed: int = 1) -> list[float]:
    source = random.Random(seed)
    return [(2 + 3 * math.exp(-step / 200)) * math.exp(source.gauss(0, spread)) for step in range(count)]


def ramp(losses: list[float], start: int, steps: int, rise: float = 2.0) -> list[float]:
    """The same losses with `rise` added in equal parts over `steps`, and kept."""
    return [loss + rise * min(1, max(0, step - start) / steps) for step, loss in enumerate(losses)]


def kinds(losses: list[float], settings: Settings | None = None) -> list[tuple[int, str]]:
    return [(event.step, event.kind) for event in replay(enumerate(losses), settings)]


@pytest.mark.parametrize("steps", [200, 500, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_a_slow_rise_is_told_within_150_steps_and_as_divergence_when_it_stays(steps: int, seed: int) -> None:
    got = kinds(ramp(falling(2500, seed=seed), 1000, steps))
    assert {kind for _, kind in got} <= {"drift", "loss_spike", "divergence"}
    assert 1000 < got[0][0] <= 1150
    # It is told again where it goes on rising after that.
    assert [kind for _, kind in got].count("divergence") == math.ceil(steps / 250)


def test_a_rise_that_turns_round_is_a_drift_and_no_divergence() -> None:
    losses = falling(2000)
    hill = [loss * (1 + 0.2 * math.exp(-(((step - 1000) / 60) ** 2))) for step, loss in enumerate(losses)]
    assert [kind for _, kind in kinds(hill)] == ["drift"]


@pytest.mark.parametrize("spread", [0.0, 0.005, 0.05, 0.2])
def test_a_falling_loss_and_one_that_stands_still_neither_drift_nor_diverge(spread: float) -> None:
    assert kinds(falling(3000, spread)) == []


def test_a_loss_that_leaves_exactly_zero_costs_no_fault_and_no_other_detector_its_turn() -> None:
    faults: list[Exception] = []
    found = Detectors(Settings(), None, faults.append)
    losses = [0.0] * 300 + [0.1] * 60
    for step, loss in enumerate(losses):
        found.observe(StepRecord(step, "AdamW", 0.0, loss=loss, grad_norm=loss))
    assert faults == []
    assert found.state_dict()["plateau"]["values"] == losses[-LEVEL:]


def test_a_spike_is_told_once_and_its_decay_is_no_drift() -> None:
    losses = falling(1500)
    for step in range(800, 900):
        losses[step] += 6 * math.exp(-(step - 800) / 25)
    assert kinds(losses) == [(800, "loss_spike")]


def test_a_level_that_stays_after_a_divergence_is_the_new_one_to_rise_from() -> None:
    losses = falling(3000)
    higher = [loss * (1 if step < 800 else 2 if step < 2000 else 4) for step, loss in enumerate(losses)]
    assert kinds(higher) == [(800, "loss_spike"), (1000, "divergence"), (2000, "loss_spike"), (2200, "divergence")]


def test_nan_in_between_is_told_and_blinds_nothing() -> None:
    losses = ramp(falling(2000), 1000, 500)
    losses[600] = losses[1020] = math.nan
    got = kinds(losses)
    assert [step for step, kind in got if kind == "nonfinite"] == [600, 1020]
    assert any(1000 < step <= 1150 and kind in ("drift", "loss_spike") for step, kind in got)
    losses = falling(700)
    losses[500:520] = [math.inf] * 20
    losses[521] = 50.0
    assert kinds(losses) == [(500, "nonfinite"), (521, "loss_spike")]


def plateaus(losses: list[float], patience: int = 300, rate: float | None = None) -> list[int]:
    detector = PlateauDetector(patience)
    return [step for step, loss in enumerate(losses) if detector.observe(step, loss, rate)]


def test_a_loss_that_stands_still_is_a_plateau_after_the_patience_once() -> None:
    losses = [2.0] * 1000
    assert plateaus(losses) == [LEVEL - 1 + 300]
    assert plateaus(losses[: LEVEL + 299]) == []


def test_a_loss_that_still_falls_is_none_and_a_new_best_begins_the_wait_anew() -> None:
    assert plateaus([2 - 1e-4 * step for step in range(2000)]) == []
    again = plateaus([2.0] * 600 + [1.5] * 600)
    assert len(again) == 2
    assert again[1] >= 600 + 300


def test_a_loss_that_stands_still_at_the_end_of_its_schedule_is_meant_to() -> None:
    detector = PlateauDetector(300)
    found = [step for step in range(1000) if detector.observe(step, 2.0, 1e-3 if step < 50 else 9e-5)]
    assert found == []
    assert plateaus([2.0] * 1000, rate=1e-3) != []


def test_the_suite_goes_on_from_a_state_as_if_it_had_never_stopped() -> None:
    losses = ramp(falling(2500), 1000, 800)
    losses[400] = 40.0
    settings = Settings(plateau_steps=200)
    expected = kinds(losses, settings)
    assert {kind for _, kind in expected} == {"loss_spike", "drift", "divergence", "plateau"}
    for stop in (20, 402, 1100, 1200):
        got: list[tuple[int, str]] = []
        state: dict[str, object] = {}
        for part in (range(stop), range(stop, len(losses))):
            detectors = Detectors(settings, None, lambda error: pytest.fail(repr(error)))
            detectors.load_state_dict(json.loads(json.dumps(state)))
            for step in part:
                record = StepRecord(step=step, optimizer="", started=0.0, loss=losses[step])
                got += [(event.step, event.kind) for event in detectors.observe(record)]
            state = detectors.state_dict()
        assert got == expected, stop
