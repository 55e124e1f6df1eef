"""Training that stands still, and validation that becomes worse."""

from __future__ import annotations

import json
import math
import random

import pytest

from optwatch.detectors import Stall, StallDetector, ValidationDetector
from optwatch.detectors.validation import direction


def stepped(count: int, interval: float, least: float = 60.0) -> StallDetector:
    detector = StallDetector(least)
    for n in range(count):
        detector.stepped(n * interval)
    return detector


def test_no_step_for_longer_than_the_least_is_a_stall_said_once() -> None:
    detector = stepped(20, 1.0)
    assert detector.check(19 + 60.0) is None
    assert detector.check(19 + 60.1) == Stall(pytest.approx(60.1), 1.0)
    assert detector.check(19 + 600.0) is None
    detector.stepped(700.0)
    assert detector.check(701.0) is None


def test_slow_steps_are_no_stall_before_ten_of_them() -> None:
    detector = stepped(20, 30.0)
    assert detector.check(19 * 30 + 299.0) is None
    assert detector.check(19 * 30 + 301.0) is not None


def test_a_pause_as_long_as_one_before_it_is_no_stall() -> None:
    detector = stepped(20, 1.0)
    detector.stepped(1000.0)  # an evaluation, say: 981 s
    assert detector.check(1000.0 + 1900.0) is None
    assert detector.check(1000.0 + 2000.0) is not None


def test_the_first_step_may_compile_and_before_it_there_is_nothing_to_say() -> None:
    assert StallDetector(60.0).check(1e6) is None
    detector = stepped(1, 1.0)
    assert detector.check(359.0) is None
    assert detector.check(361.0) == Stall(361.0, None)


def test_an_announced_pause_is_no_interval_between_steps() -> None:
    detector = stepped(20, 1.0)
    detector.paused(5000.0)
    assert detector.check(5059.0) is None
    detector.stepped(5001.0)
    assert detector.limit == 60.0


def regressions(values: list[float], name: str = "val_loss", least: float = 0.1) -> list[int]:
    detector = ValidationDetector(least)
    return [step for step, value in enumerate(values) if detector.observe(name, value, step)]


def test_two_evaluations_well_above_the_best_are_a_regression_said_once() -> None:
    good = [3.0, 2.5, 2.2, 2.0]
    assert regressions([*good, 2.21, 2.0]) == []
    assert regressions([*good, 2.19, 2.19, 2.19]) == []
    assert regressions([*good, 2.5, 2.5, 2.6, 2.7]) == [5]


def test_once_it_is_back_the_next_regression_is_told_again() -> None:
    assert regressions([3.0, 2.5, 2.2, 2.0, 2.5, 2.5, 2.0, 2.6, 2.6]) == [5, 8]


def test_an_evaluation_with_much_noise_needs_more() -> None:
    source = random.Random(1)
    noisy = [2 * math.exp(source.gauss(0, 0.15)) for _ in range(300)]
    assert regressions(noisy) == []
    assert regressions([*noisy, 4.5, 4.5]) == [301]


def test_an_accuracy_regresses_by_falling() -> None:
    assert regressions([0.5, 0.7, 0.8, 0.9, 0.7, 0.7], "val_accuracy") == [5]
    assert regressions([0.5, 0.7, 0.8, 0.9, 0.95, 0.96], "val_accuracy") == []


def test_what_is_not_finite_is_left_out() -> None:
    assert regressions([3.0, 2.5, math.nan, 2.2, 2.0, math.inf, 2.5, math.nan, 2.5]) == [8]


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("val_loss", "min"),
        ("validation/perplexity", "min"),
        ("eval_loss", "min"),
        ("test_acc", "max"),
        ("val.f1", "max"),
        ("value_loss", None),
        ("evaluation_seconds", None),
        ("train_loss", None),
        ("tokens_per_second", None),
    ],
)
def test_a_value_is_validation_by_its_name(name: str, better: str | None) -> None:
    assert direction(name) == better


def test_the_metric_of_the_target_is_watched_whatever_its_name() -> None:
    assert direction("dev_quality", ("dev_quality", "max")) == "max"
    detector = ValidationDetector(0.1, ("dev_quality", "max"))
    values = [0.5, 0.7, 0.8, 0.9, 0.7, 0.7]
    assert [s for s, value in enumerate(values) if detector.observe("dev_quality", value, s)] == [5]


def test_validation_goes_on_from_a_state() -> None:
    first, second = ValidationDetector(0.1), ValidationDetector(0.1)
    for step, value in enumerate([3.0, 2.5, 2.2, 2.0, 2.5]):
        assert first.observe("val_loss", value, step) is None
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found = second.observe("val_loss", 2.5, 5)
    assert found is not None
    assert (found.best, found.best_step) == (2.0, 3)
