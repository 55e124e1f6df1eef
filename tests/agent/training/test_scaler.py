"""Gradient scaling: norms and losses without the scale, skipped steps that are no incident, and one that is."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from optwatch.host.overflow import SMALLEST_SCALE, Overflows
from optwatch.record import StepRecord

GRAD = 'optwatch_grad_norm{stage="at_step"}'
BEFORE = 'optwatch_grad_norm{stage="before_clip"}'
SEARCH = 'optwatch_skipped_steps_total{reason="overflow"}'
IN_VAIN = 'optwatch_skipped_steps_total{reason="nonfinite"}'
INCIDENTS = 'optwatch_events_total{kind="nonfinite",severity="critical"}'
LOSS = "optwatch_loss"
NAN = float("nan")
kinds = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])


def exported(monitor: Any) -> dict[str, float]:
    assert monitor.flush()
    return dict(monitor.snapshot())


def nonfinite(got: dict[str, float]) -> float:
    return sum(value for name, value in got.items() if name.startswith("optwatch_nonfinite_total"))


class Training:
    """Mixed precision as training code writes it: a master in float32, autocast, a scaler."""

    def __init__(self, fused: bool, scale: float = 2.0**12, dtype: torch.dtype = torch.float16) -> None:
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1))
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2, fused=fused)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
        self.dtype = dtype
        self.losses: list[float] = []

    def backward(self, x: torch.Tensor, share: float = 1.0) -> None:
        with torch.autocast("cpu", self.dtype):
            loss = self.net(x).float().square().mean()
        self.losses.append(loss.item())
        self.scaler.scale(loss * share).backward()

    def true_norm(self) -> float:
        """Of the gradients, in float64, by whatever they are scaled with now."""
        scale = self.scaler.get_scale()
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        return math.sqrt(sum((g.double() / scale).square().sum().item() for g in gradients))

    def step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


@kinds
@pytest.mark.parametrize(
    ("clip", "accumulate"),
    [("no clipping", 1), ("no clipping", 4), ("after unscale_", 4), ("of scaled gradients", 1)],
)
def test_norms_and_losses_are_unscaled_exactly(fused: bool, clip: str, accumulate: int, watch: Any) -> None:
    training = Training(fused)
    monitor = watch(training.optimizer, sample_every=1)
    for _ in range(6):  # over which the scale grows
        training.losses.clear()
        for _ in range(accumulate):
            training.backward(torch.randn(4, 8), 1 / accumulate)
        before = at_step = training.true_norm()
        if clip != "no clipping":
            scale = training.scaler.get_scale()
            if clip == "after unscale_":
                training.scaler.unscale_(training.optimizer)
                scale = 1.0
            nn.utils.clip_grad_norm_(training.net.parameters(), before * scale / 2)
            at_step = before / 2
        weights = [p.detach().double().clone() for p in training.net.parameters()]
        training.step()
        moved = sum((p - q).square().sum().item() for p, q in zip(training.net.parameters(), weights, strict=True))
        got = exported(monitor)
        assert got[LOSS] == pytest.approx(sum(training.losses) / accumulate, rel=1e-5)
        assert got[GRAD] == pytest.approx(at_step, rel=1e-5)
        assert (BEFORE in got) == (clip != "no clipping")
        assert got.get(BEFORE, before) == pytest.approx(before, rel=1e-5)
        assert got["optwatch_update_norm"] == pytest.approx(math.sqrt(moved), rel=1e-5)
        assert got["optwatch_accumulation_steps"] == accumulate
    assert got[SEARCH] == 0
    assert training.scaler.get_scale() > 2.0**12
    assert not monitor.faults.counts


@kinds
@pytest.mark.parametrize("unscaled", [False, True], ids=["scaled", "after unscale_"])
def test_a_search_for_the_scale_is_skipped_steps_and_no_incident(fused: bool, unscaled: bool, watch: Any) -> None:
    training = Training(fused, scale=2.0**40)  # float16 overflows at it
    monitor = watch(training.optimizer, sample_every=1, max_skipped_steps=100)
    skipped = 0
    while training.scaler.get_scale() == 2.0 ** (40 - skipped):
        training.backward(torch.randn(4, 8))
        if unscaled:
            training.scaler.unscale_(training.optimizer)
        weights = [p.detach().clone() for p in training.net.parameters()]
        training.step()
        skipped += all(torch.equal(p, q) for p, q in zip(training.net.parameters(), weights, strict=True))
    got = exported(monitor)
    assert skipped > 3
    assert got[SEARCH] == skipped
    assert got["optwatch_steps_total"] >= 1
    assert nonfinite(got) == got[INCIDENTS] == got[IN_VAIN] == 0
    assert math.isfinite(got[GRAD])
    assert got["optwatch_update_norm"] > 0
    assert not monitor.faults.counts


@kinds
def test_a_loss_that_stays_nan_is_an_incident_after_the_steps_allowed_and_names_where_it_is(
    fused: bool, watch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    training = Training(fused)
    monitor = watch(training.optimizer, max_skipped_steps=5)
    training.backward(torch.randn(4, 8))
    training.step()
    good = exported(monitor)[LOSS]
    with caplog.at_level(logging.WARNING, "optwatch"):
        for _ in range(4):
            training.backward(torch.full((4, 8), NAN))
            training.step()
        got = exported(monitor)
        assert (got[SEARCH], got[IN_VAIN], got[INCIDENTS], nonfinite(got)) == (4, 0, 0, 0)
        assert got[LOSS] == good
        for _ in range(3):
            training.backward(torch.full((4, 8), NAN))
            training.step()
        got = exported(monitor)
    assert (got[SEARCH], got[IN_VAIN], got[INCIDENTS]) == (4, 3, 1)
    assert got['optwatch_nonfinite_total{source="loss"}'] == 3
    assert math.isnan(got[LOSS])
    assert got["optwatch_steps_total"] == 1
    (said,) = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert "NaN in the loss at step 1, first in what the model was given" in said
    assert "the gradient scaler has skipped 5 steps in a row" in said


@kinds
def test_a_scale_at_its_floor_is_an_incident_however_few_steps_were_skipped(fused: bool, watch: Any) -> None:
    training = Training(fused, scale=SMALLEST_SCALE * 2)
    monitor = watch(training.optimizer)
    for skipped, incidents in ((1, 0), (2, 1)):
        training.backward(torch.full((4, 8), NAN))
        training.step()
        got = exported(monitor)
        assert (got[SEARCH] + got[IN_VAIN], got[INCIDENTS]) == (skipped, incidents)


@kinds
def test_the_step_is_the_optimizers_own_count_whatever_was_skipped(fused: bool, watch: Any) -> None:
    training = Training(fused)
    monitor = watch(training.optimizer)
    steps: list[int] = []
    monitor.sinks.append(type("Steps", (), {"record": staticmethod(lambda r: steps.append(r.step)), "event": print})())
    for value in (1.0, NAN, 1.0, NAN, NAN, 1.0):
        training.backward(torch.full((4, 8), value))
        training.step()
    assert monitor.flush()
    assert steps == [1, 1, 2, 2, 2, 3]
    training.optimizer.load_state_dict(training.optimizer.state_dict())
    training.backward(torch.randn(4, 8))
    training.step()
    assert monitor.flush()
    assert steps[-1] == 4
    (own,) = {int(entry["step"]) for entry in training.optimizer.state.values()}
    assert own == 4


def test_two_optimizers_under_one_scaler_are_skipped_each_for_its_own_overflow(watch: Any) -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    first, second = torch.optim.SGD([a], lr=0.1), torch.optim.AdamW([b])
    monitor = watch(first, second)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    scaler.scale((a * 2.0**60).sum() + b.sum()).backward()
    scaler.step(first)
    scaler.step(second)
    scaler.update()
    got = exported(monitor)
    assert got['optwatch_skipped_steps_total{reason="overflow",optimizer="SGD"}'] == 1
    assert got['optwatch_skipped_steps_total{reason="overflow",optimizer="AdamW"}'] == 0
    assert got['optwatch_loss{optimizer="AdamW"}'] == 2 * 2.0**60 + 2
    assert got['optwatch_grad_norm{stage="at_step",optimizer="AdamW"}'] == pytest.approx(math.sqrt(2))


def test_a_scaler_with_a_scale_of_its_own_shows_in_no_number(watch: Any) -> None:
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    class Own(ShardedGradScaler):
        """As FSDP's, with nothing to reduce over."""

        def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
            torch.amp.GradScaler.unscale_(self, optimizer)

    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    monitor = watch(optimizer)
    scaler = Own(device="cpu", init_scale=2.0**9, process_group=object())
    scaler.scale((weight * 3).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    got = exported(monitor)
    assert (got[LOSS], got[GRAD]) == (6.0, 3.0)


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_losses_are_the_same_with_and_without(fused: bool, dtype: torch.dtype, watch: Any) -> None:
    def train(attach: Callable[[Any], Any]) -> tuple[list[float], float]:
        training = Training(fused, scale=2.0**30, dtype=dtype)
        attach(training.optimizer)
        for _ in range(25):
            training.backward(torch.randn(4, 8))
            training.step()
        return training.losses, training.scaler.get_scale()

    assert train(lambda _: None) == train(lambda optimizer: watch(optimizer, sample_every=3))


def test_skips_are_counted_for_each_optimizer_and_begin_anew_with_a_step_that_was_taken() -> None:
    overflows = Overflows(limit=2)

    def judged(optimizer: str, skipped: bool, scale: float | None = None) -> str | None:
        record = StepRecord(9, optimizer, 0.0, skipped="overflow" if skipped else None)
        overflows.judge(record, scale, loads=0)
        return record.skipped

    assert judged("a", True) == "overflow"
    assert judged("b", True) == "overflow"
    assert judged("a", False) is None
    assert judged("a", True) == "overflow"
    assert judged("a", True) == "nonfinite"
    assert judged("b", False, SMALLEST_SCALE) is None
    assert judged("b", True, SMALLEST_SCALE * 2) == "overflow"
    assert judged("b", True, SMALLEST_SCALE) == "nonfinite"
