"""Settings(skip_nonfinite_steps=True): a step with a bad gradient changes nothing, and others are as without it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

KINDS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {}),
    "fused AdamW": (torch.optim.AdamW, {"fused": True}),
    "SGD with momentum": (torch.optim.SGD, {"momentum": 0.9, "lr": 0.1}),
    "fused SGD": (torch.optim.SGD, {"momentum": 0.9, "lr": 0.1, "fused": True}),
}
SKIPPED = 'optwatch_skipped_steps_total{reason="nonfinite"}'


def everything(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, torch.Tensor)]
    return [tensor.detach().clone() for tensor in [*net.parameters(), *state]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_with_a_bad_gradient_leaves_weights_and_moments_as_they_were(kind: str, net: Any, watch: Any) -> None:
    made, options = KINDS[kind]
    plain = copy.deepcopy(net)
    optimizer, alone = made(net.parameters(), **options), made(plain.parameters(), **options)
    monitor = watch(optimizer, skip_nonfinite_steps=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 100)
    for value in (1.0, 2.0, math.nan, math.inf, 3.0):
        before = everything(net, optimizer)
        for model, stepped in ((net, optimizer), (plain, alone)):
            stepped.zero_grad()
            model(torch.full((2, 4), value)).square().mean().backward()
            if stepped is optimizer or math.isfinite(value):
                stepped.step()
        schedule.step()
        if not math.isfinite(value):
            assert all(map(torch.equal, before, everything(net, optimizer)))
    assert all(map(torch.equal, everything(net, optimizer), everything(plain, alone)))
    assert monitor.flush()
    got = monitor.snapshot()
    assert (got[SKIPPED], got["optwatch_steps_total"]) == (2, 3)
    assert not monitor.faults.counts


def test_its_event_says_that_the_step_was_left_out(net: Any, watch: Any, step: Any, caplog: Any) -> None:
    optimizer = torch.optim.AdamW(net.parameters())
    monitor = watch(optimizer, skip_nonfinite_steps=True)
    step(optimizer)
    step(optimizer, math.nan)
    assert monitor.flush()
    (said,) = [record.getMessage() for record in caplog.records if "NaN" in record.getMessage()]
    assert "first in what the model was given; optwatch has skipped 1 steps in a row" in said
    assert "The step was left out" in said


def test_without_the_setting_nothing_is_left_out_and_after_detach_nothing_is_either(
    net: Any, watch: Any, step: Any
) -> None:
    optimizer = torch.optim.AdamW(net.parameters())
    watch(optimizer, skip_nonfinite_steps=True).detach()
    assert "step" not in vars(optimizer)
    watch(optimizer)
    step(optimizer, math.nan)
    assert all(bool(p.isnan().all()) for p in net.parameters())


def test_an_optimizer_whose_device_would_be_waited_for_is_refused_with_what_to_do(watch: Any) -> None:
    parameter = nn.Parameter(torch.zeros(2, device="meta"))
    optimizer = torch.optim.AdamW([parameter])
    with pytest.raises(ValueError, match="AdamW would wait for its device before each step: make it with fused=True"):
        watch(optimizer, skip_nonfinite_steps=True)
    assert "step" not in vars(optimizer)
