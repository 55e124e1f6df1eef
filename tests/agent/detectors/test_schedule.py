"""A learning rate that jumps to where it has never been is told; what schedules do is not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LambdaLR, LRScheduler, OneCycleLR, StepLR

from optwatch.detectors import ScheduleDetector


def jumps(rates: list[float]) -> list[int]:
    detector = ScheduleDetector(warmup=30)
    return [step for step, rate in enumerate(rates) if detector.observe([rate])]


def rates_of(make: object, steps: int = 400) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1e-3)
    scheduler: LRScheduler = make(optimizer)  # type: ignore[operator]
    rates = []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    "make",
    [
        lambda o: CosineAnnealingWarmRestarts(o, 50),
        lambda o: OneCycleLR(o, 1e-2, total_steps=500),
        lambda o: StepLR(o, 40),
        lambda o: LambdaLR(o, lambda step: min(1.0, (step + 1) / 200)),
        lambda o: LambdaLR(o, lambda step: 10.0 ** min(0, step - 8)),
    ],
    ids=["warm restarts", "one cycle", "step", "linear warm-up", "exponential warm-up"],
)
def test_a_schedule_of_torch_is_no_jump(make: object) -> None:
    assert jumps(rates_of(make)) == []


@pytest.mark.parametrize(("factor", "told"), [(9.99, False), (10.0, True), (1e23, True)])
def test_a_tenfold_rise_beyond_all_before_is_a_jump(factor: float, told: bool) -> None:
    assert jumps([1.0] * 100 + [factor] * 10) == ([100] if told else [])


def test_a_rise_back_to_a_rate_of_before_is_none() -> None:
    assert jumps([1.0] * 50 + [1e-6] * 50 + [1.0, 1.9] * 20) == []


def test_nothing_is_told_in_the_warm_up_or_when_groups_are_added() -> None:
    assert jumps([1e-8, 1e-3]) == []
    detector = ScheduleDetector(warmup=30)
    for _ in range(100):
        assert detector.observe([1e-3]) is None
    assert detector.observe([1e-3, 1.0]) is None


def test_zero_and_nan_rates_are_no_jump() -> None:
    assert jumps([0.0] * 50 + [1.0] * 50) == []
    assert jumps([1.0] * 50 + [math.nan] * 5) == []
