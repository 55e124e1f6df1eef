"""Weights and moments are read in rotation: each parameter once, evenly, and each number exact for its own step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optwatch.training.sampling import TENSOR_COST, Schedule


@given(
    sizes=st.lists(st.integers(0, 10**7), max_size=40),
    every=st.integers(1, 12),
    stretch=st.integers(1, 4),
    start=st.integers(3, 60),
)
def test_a_rotation_reads_each_parameter_once(sizes: list[int], every: int, stretch: int, start: int) -> None:
    schedule = Schedule(sizes, every)
    steps = [schedule.due(step, stretch) for step in range(start, start + every * stretch)]
    assert sorted(index for due, _ in steps for index in due) == list(range(len(sizes)))
    assert [complete for _, complete in steps].count(True) == 1
    assert all(due == sorted(due) for due, _ in steps)
    assert Schedule(list(sizes), every).due(start, stretch) == steps[0]


@given(sizes=st.lists(st.integers(0, 10**6), min_size=1, max_size=60), every=st.integers(1, 10))
def test_no_step_of_a_rotation_costs_more_than_its_share_and_one_tensor(sizes: list[int], every: int) -> None:
    schedule = Schedule(sizes, every)
    costs = [sum(sizes[i] + TENSOR_COST for i in schedule.due(step)[0]) for step in range(every * 2, every * 3)]
    assert max(costs) <= (sum(sizes) + len(sizes) * TENSOR_COST) / every + max(sizes) + TENSOR_COST


def test_the_first_step_reads_everything_and_the_second_makes_up_for_what_had_no_moment_then() -> None:
    schedule = Schedule([5] * 9, 3)
    first, second, third = (schedule.due(step) for step in (1, 2, 3))
    assert first == (list(range(9)), True)
    assert not second[1]
    assert third[1]
    assert sorted(second[0] + third[0]) == list(range(9))
    assert len(second[0]) == 6
    assert Schedule([5] * 9, 2).due(2) == (list(range(9)), True)


def test_steps_that_read_the_same_are_given_the_same_list_so_that_what_is_kept_of_each_does_not_grow() -> None:
    schedule = Schedule([5] * 9, 3)
    assert len({id(schedule.due(step, stretch)[0]) for step in range(3, 300) for stretch in (1, 2, 4)}) == 4


def model() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def test_what_is_exported_is_each_parameters_number_at_the_step_that_read_it(watch: Any) -> None:
    net = model()
    parameters = list(net.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    monitor = watch(optimizer, sample_every=3)
    schedule = Schedule([p.numel() for p in parameters], 3)
    latest: dict[int, dict[str, float]] = {}
    for step in range(1, 10):
        optimizer.zero_grad()
        net(torch.randn(4, 6)).square().mean().backward()
        due, completes = schedule.due(step)
        before = {i: _before(optimizer, parameters[i]) for i in due}
        optimizer.step()
        for i in due:
            state = optimizer.state[parameters[i]]
            latest[i] = before[i] | {
                "weight": _squares(parameters[i]),
                "first": _squares(state["exp_avg"]),
                "second": state["exp_avg_sq"].double().sum().item(),
                "largest": state["exp_avg_sq"].max().item(),
            }
        assert monitor.flush()
        got = monitor.snapshot()
        if not completes:
            continue
        numbers = latest.values()
        assert got["optwatch_weight_norm"] == pytest.approx(math.sqrt(sum(x["weight"] for x in numbers)))
        assert got["optwatch_first_moment_norm"] == pytest.approx(math.sqrt(sum(x["first"] for x in numbers)))
        assert got["optwatch_second_moment_mean"] == pytest.approx(
            sum(x["second"] for x in numbers) / sum(p.numel() for p in parameters)
        )
        assert got["optwatch_second_moment_max"] == pytest.approx(max(x["largest"] for x in numbers))
        if step > 1:
            norms = math.sqrt(sum(x["gradient"] for x in numbers) * sum(x["moment"] for x in numbers))
            assert got["optwatch_grad_moment_cosine"] == pytest.approx(sum(x["dot"] for x in numbers) / norms)
    assert not monitor.faults.counts


def _squares(tensor: torch.Tensor) -> float:
    return float(tensor.detach().double().square().sum().item())


def _before(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, float]:
    assert parameter.grad is not None
    moment = optimizer.state[parameter].get("exp_avg", torch.zeros_like(parameter)).double()
    return {
        "dot": float((parameter.grad.double() * moment).sum().item()),
        "gradient": _squares(parameter.grad),
        "moment": _squares(moment),
    }


def test_a_weight_that_is_not_finite_is_met_when_it_is_read_not_when_the_rotation_ends(watch: Any) -> None:
    frozen = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(4)), frozen], lr=0.1)
    monitor = watch(optimizer, sample_every=2)
    records: list[Any] = []
    monitor.sinks.append(type("Kept", (), {"record": lambda _, record: records.append(record), "event": print})())
    read_at = next(step for step in (3, 4) if 1 in Schedule([4, 3], 2).due(step)[0])
    for step in range(1, read_at + 1):
        if step == read_at:
            with torch.no_grad():
                frozen[0] = math.nan
        optimizer.step()
    assert monitor.flush()
    assert [bool(record.nonfinite) for record in records] == [False] * (read_at - 1) + [True]
    assert records[-1].nonfinite[0].source == "weight"
