"""Losses, clipping and scaling are read off torch's own functions, which are put back afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad, clip_grad_norm_

Snapshot = dict[str, float]
LOSS = "optwatch_loss"


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(torch.tensor([2.0]))


def exported(monitor: Any) -> Snapshot:
    assert monitor.flush()
    return dict(monitor.snapshot())


@pytest.mark.parametrize(
    ("divide", "want", "reduction"),
    [
        (lambda loss, n: loss / n, 5.0, "sum"),
        (lambda loss, n: loss * (1 / n), 5.0, "sum"),
        (lambda loss, n: loss, 5.0, "mean"),
        (lambda loss, n: loss / 1000, 0.005, "mean"),
    ],
    ids=["divided", "multiplied", "not divided", "divided by something else"],
)
@pytest.mark.parametrize("count", [2, 3, 7, 10])
def test_micro_batches_make_one_mean_loss_however_the_user_divides(
    divide: Callable[[Any, int], Any], want: float, reduction: str, count: int, weight: nn.Parameter, watch: Any
) -> None:
    optimizer = torch.optim.SGD([weight], lr=0.0)
    monitor = watch(optimizer)
    seen = []
    monitor.sinks.append(type("Keep", (), {"record": staticmethod(seen.append), "event": staticmethod(print)})())
    for k in range(count):
        divide((weight * 0 + 5.0 + (k - (count - 1) / 2)).sum(), count).backward()
    optimizer.step()
    assert exported(monitor)[LOSS] == pytest.approx(want, rel=1e-6)
    assert seen[0].loss_reduction == reduction
    assert seen[0].micro_batches == count


def test_a_last_short_window_is_the_sum_that_its_gradient_is(weight: nn.Parameter, watch: Any) -> None:
    optimizer = torch.optim.SGD([weight], lr=0.0)
    monitor = watch(optimizer)
    for count in (4, 3):  # an epoch of seven micro-batches, each divided by four
        for _ in range(count):
            ((weight * 0 + 8.0).sum() / 4).backward()
        optimizer.step()
    assert exported(monitor)[LOSS] == 6.0


def test_the_user_may_say_how_losses_add(weight: nn.Parameter, watch: Any) -> None:
    optimizer = torch.optim.SGD([weight], lr=0.0)
    monitor = watch(optimizer, loss_reduction="sum")
    for _ in range(3):
        (weight * 0 + 2.0).sum().backward()
    optimizer.step()
    assert exported(monitor)[LOSS] == 6.0


def test_what_is_done_to_the_loss_after_backward_does_not_show(weight: nn.Parameter, watch: Any) -> None:
    optimizer = torch.optim.SGD([weight], lr=0.0)
    monitor = watch(optimizer)
    loss = (weight * 3).sum()
    loss.backward()
    with torch.no_grad():
        loss.mul_(100)
    optimizer.step()
    assert exported(monitor)[LOSS] == 6.0


def test_both_ways_of_calling_backward_are_seen_and_a_vector_is_not(weight: nn.Parameter, watch: Any) -> None:
    optimizer = torch.optim.SGD([weight], lr=0.0)
    monitor = watch(optimizer)
    torch.autograd.backward([(weight * 2).sum()])
    optimizer.step()
    assert exported(monitor)[LOSS] == 4.0
    (weight * torch.ones(3)).backward(torch.ones(3))
    optimizer.step()
    assert exported(monitor)[LOSS] == 4.0  # the last that was seen


def test_a_backward_that_raises_counts_for_nothing(weight: nn.Parameter, watch: Any) -> None:
    optimizer = torch.optim.SGD([weight], lr=0.0)
    monitor = watch(optimizer)
    loss = (weight * weight).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    optimizer.step()
    assert exported(monitor)["optwatch_accumulation_steps"] == 1


def test_two_optimizers_after_one_backward_report_the_same_loss(watch: Any) -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    first, second = torch.optim.SGD([a], lr=0.1), torch.optim.AdamW([b])
    monitor = watch(first, second)
    (a + 2 * b).sum().backward()
    first.step()
    second.step()
    got = exported(monitor)
    assert got['optwatch_loss{optimizer="SGD"}'] == got['optwatch_loss{optimizer="AdamW"}'] == 6.0


def test_two_losses_of_a_gan_are_told_apart(watch: Any) -> None:
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    discriminator, generator = torch.optim.Adam([a], lr=0.0), torch.optim.Adam([b], lr=0.0)
    monitor = watch(discriminator, generator)
    for _ in range(3):
        (a * 2).sum().backward()
        discriminator.step()
        (b * 7).sum().backward()
        generator.step()
    got = exported(monitor)
    assert got['optwatch_loss{optimizer="Adam0"}'] == 2.0
    assert got['optwatch_loss{optimizer="Adam1"}'] == 7.0


def test_the_norm_before_clipping_is_seen_through_a_name_imported_earlier(weight: nn.Parameter, watch: Any) -> None:
    optimizer = torch.optim.SGD([weight], lr=0.0)
    monitor = watch(optimizer)
    (weight * 30).sum().backward()
    clip_grad_norm_(iter([weight]), 3.0)  # a generator, as model.parameters() is
    optimizer.step()
    got = exported(monitor)
    assert got['optwatch_grad_norm{stage="before_clip"}'] == 30.0
    assert got['optwatch_grad_norm{stage="at_step"}'] == pytest.approx(3.0, rel=1e-5)


def test_clipping_somebody_elses_parameters_changes_nothing(weight: nn.Parameter, watch: Any) -> None:
    optimizer = torch.optim.SGD([weight], lr=0.0)
    monitor = watch(optimizer)
    other = nn.Parameter(torch.ones(3))
    (weight.sum() + other.sum()).backward()
    clip_grad_norm_([other], 0.1)
    optimizer.step()
    assert 'optwatch_grad_norm{stage="before_clip"}' not in exported(monitor)


def test_torchs_functions_are_put_back_with_the_last_monitor(watch: Any) -> None:
    def held() -> list[Any]:
        scaler = torch.amp.GradScaler
        return [
            torch.Tensor.backward,
            torch.autograd.backward,
            clip_grad._clip_grads_with_norm_,
            scaler.scale,
            scaler.step,
        ]

    before = held()
    first = watch(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    second = watch(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    assert all(now is not then for now, then in zip(held(), before, strict=True))
    first.detach()
    assert all(now is not then for now, then in zip(held(), before, strict=True))
    second.detach()
    assert held() == before


def amp_step(weight: nn.Parameter, optimizer: torch.optim.Optimizer, scaler: Any, factor: float, clip: bool) -> None:
    scaler.scale((weight * factor).sum() / 2).backward()
    scaler.scale((weight * factor).sum() / 2).backward()
    if clip:
        scaler.unscale_(optimizer)
        clip_grad_norm_([weight], 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_shows_in_no_number(fused: bool, clip: bool, weight: nn.Parameter, watch: Any) -> None:
    optimizer = torch.optim.AdamW([weight], lr=0.0, fused=fused)
    monitor = watch(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    amp_step(weight, optimizer, scaler, 3.0, clip)
    got = exported(monitor)
    assert got[LOSS] == 6.0
    assert got['optwatch_grad_norm{stage="at_step"}'] == pytest.approx(1.0 if clip else 3.0, rel=1e-5)
    assert got['optwatch_skipped_steps_total{reason="overflow"}'] == 0


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_is_a_skipped_step_and_no_incident(fused: bool, weight: nn.Parameter, watch: Any) -> None:
    optimizer = torch.optim.AdamW([weight], lr=0.0, fused=fused)
    monitor = watch(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    amp_step(weight, optimizer, scaler, 2.0**20, clip=False)  # the scaled gradient is 2^140: inf in float32
    got = exported(monitor)
    assert got['optwatch_skipped_steps_total{reason="overflow"}'] == 1
    assert got["optwatch_steps_total"] == 0
    assert got['optwatch_nonfinite_total{source="gradient"}'] == 0
    scaler.update(2.0**8)
    amp_step(weight, optimizer, scaler, 3.0, clip=False)
    got = exported(monitor)
    assert got["optwatch_steps_total"] == 1
    assert got[LOSS] == 6.0
    assert got["optwatch_accumulation_steps"] == 2  # those of the skipped step are gone
    assert got['optwatch_skipped_steps_total{reason="overflow"}'] == 1
