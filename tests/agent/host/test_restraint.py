"""The agent keeps its cost under the budget by reading less, gradients last, and reads more again when it is cheap."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import nn

from optwatch.host.restraint import (
    MAX_GRADIENT_INTERVAL,
    MAX_STRETCH,
    PAUSE,
    RECOVERY,
    WINDOW,
    Change,
    Pace,
    Restraint,
)


def run(restraint: Restraint, steps: int, fixed: float, gradients: float, state: float) -> list[Change]:
    """Steps of one second that cost `fixed`, and as much as the pace lets the readings cost."""
    changes = []
    for step in range(1, steps + 1):
        read = gradients if step % restraint.pace.gradient_interval == 0 else 0.0
        sampled = state if step % restraint.pace.stretch == 0 else 0.0
        if change := restraint.observe(fixed + read + sampled, read, 1.0):
            changes.append(change)
    return changes


def test_within_the_budget_nothing_changes() -> None:
    restraint = Restraint(0.01)
    assert not run(restraint, 1000, fixed=0.001, gradients=0.004, state=0.0049)
    assert restraint.share == pytest.approx(0.0099)


def test_the_first_steps_decide_nothing() -> None:
    restraint = Restraint(0.01)
    assert not run(restraint, 2 * WINDOW - 1, fixed=0.0, gradients=0.0, state=0.0101)
    assert [change.pace for change in run(restraint, 1, 0.0, 0.0, 0.0101)] == [Pace(2, 1)]


def test_weights_and_moments_are_read_less_until_the_cost_fits() -> None:
    restraint = Restraint(0.01)
    changes = run(restraint, 1000, fixed=0.001, gradients=0.004, state=0.016)
    assert [change.pace for change in changes] == [Pace(2, 1), Pace(4, 1)]
    assert all(change.less and change.share > 0.01 for change in changes)
    assert restraint.share == pytest.approx(0.009)


def test_gradients_are_read_less_only_after_that_and_only_where_it_brings_the_cost_under_the_budget() -> None:
    enough = Restraint(0.01)
    run(enough, 2000, fixed=0.001, gradients=0.016, state=0.0)
    assert enough.pace == Pace(MAX_STRETCH, 2)
    in_vain = Restraint(0.01)
    run(in_vain, 2000, fixed=0.02, gradients=0.016, state=0.0)
    assert in_vain.pace == Pace(MAX_STRETCH, 1)
    assert MAX_STRETCH % MAX_GRADIENT_INTERVAL == 0  # a moment is read against the gradient of its step


def test_more_is_read_again_when_it_has_become_cheap_and_not_before() -> None:
    restraint = Restraint(0.01)
    run(restraint, 500, fixed=0.0, gradients=0.001, state=0.0165)
    assert restraint.pace == Pace(2, 1)
    assert not run(restraint, 500, fixed=RECOVERY * 0.01 + 0.0001, gradients=0.0, state=0.0)
    changes = run(restraint, 500, fixed=RECOVERY * 0.01 - 0.0001, gradients=0.0, state=0.0)
    assert [(change.pace, change.less) for change in changes] == [(Pace(), False)]


def test_a_pause_between_steps_makes_the_agent_no_cheaper() -> None:
    restraint = Restraint(0.01)
    run(restraint, WINDOW - 1, fixed=0.012, gradients=0.0, state=0.0)
    restraint.observe(0.012, 0.0, 3600.0)
    assert restraint.share == pytest.approx(0.012 * WINDOW / (WINDOW - 1 + PAUSE))


def test_an_agent_over_its_budget_reads_less_and_says_so(watch: Any, caplog: pytest.LogCaptureFixture) -> None:
    parameters = [nn.Parameter(torch.ones(50)) for _ in range(4)]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    monitor = watch(optimizer, sample_every=3, overhead_budget=1e-9)  # which no step can be long enough for
    before = monitor.snapshot()
    assert before['optwatch_agent_sampling_interval_steps{what="weights_and_moments"}'] == 3
    with caplog.at_level(logging.WARNING, "optwatch"):
        for _ in range(2 * WINDOW + 10):
            sum(p.square().sum() for p in parameters).backward()
            optimizer.step()
            assert monitor.flush()
    snapshot = monitor.snapshot()
    assert snapshot['optwatch_agent_sampling_interval_steps{what="weights_and_moments"}'] == 6
    assert snapshot['optwatch_agent_sampling_interval_steps{what="gradients"}'] == 1
    assert snapshot["optwatch_agent_overhead_ratio"] > 1e-9
    (said,) = [record.getMessage() for record in caplog.records if "overhead_budget" in record.getMessage()]
    assert "weights and moments are read over 6 steps, gradients at every step" in said
    assert not monitor.faults.counts


def paced(restraint: Restraint, steps: int, seconds: float, cost: float = 0.0) -> list[Change]:
    """Steps that take so long and cost that share of it."""
    given = (restraint.observe(cost * seconds, 0.0, seconds) for _ in range(steps))
    return [change for change in given if change]


def test_a_rotation_that_is_too_short_is_stretched_as_soon_as_the_first_has_shown_it() -> None:
    restraint = Restraint(0.01, rotation_steps=10, rotation_seconds=10.0)
    assert not paced(restraint, 9, seconds=0.2, cost=0.005)
    (change,) = paced(restraint, 1000, seconds=0.2, cost=0.005)
    assert (change.pace, change.less, change.for_cost) == (Pace(4, 1), True, False)
    assert change.step_seconds == pytest.approx(0.2)
    for seconds, stretch in ((1.2, 1), (0.8, 1), (0.7, 2), (0.06, 16), (0.001, MAX_STRETCH)):
        restraint = Restraint(0.01, rotation_steps=10, rotation_seconds=10.0)
        paced(restraint, 10, seconds)
        assert restraint.pace == Pace(stretch, 1)


def test_one_that_was_asked_for_is_not() -> None:
    assert not paced(Restraint(0.01, rotation_steps=10), 1000, seconds=0.001)


def test_steps_that_vary_do_not_make_it_go_back_and_forth() -> None:
    restraint = Restraint(0.01, rotation_steps=10, rotation_seconds=10.0)
    assert [change.pace for change in paced(restraint, 10, seconds=0.7)] == [Pace(2, 1)]
    for seconds in (0.8, 0.7, 0.99, 0.76, 0.5):
        assert not paced(restraint, 2 * WINDOW, seconds)
    assert [change.pace for change in paced(restraint, 2 * WINDOW, seconds=1.1)] == [Pace(1, 1)]
    assert not paced(restraint, 2 * WINDOW, seconds=0.8)


def test_the_cost_stretches_beyond_that_and_gives_back_no_more_than_was_taken_for_it() -> None:
    restraint = Restraint(0.01, rotation_steps=10, rotation_seconds=10.0)
    changes = paced(restraint, 2 * WINDOW, seconds=0.2, cost=0.011)
    assert [(change.pace, change.for_cost) for change in changes] == [(Pace(4, 1), False), (Pace(8, 1), True)]
    assert [(change.pace, change.for_cost) for change in paced(restraint, 4 * WINDOW, 0.2, cost=0.001)] == [
        (Pace(4, 1), True)
    ]
    # What it takes for the length it gives back with it, whatever the cost.
    changes = paced(restraint, 2 * WINDOW, seconds=2.0, cost=0.005)
    assert [(change.pace, change.less, change.for_cost) for change in changes] == [(Pace(1, 1), False, False)]


def test_short_steps_are_sampled_less_often_unless_it_was_asked_for(
    watch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for asked in (None, 10):
        parameters = [nn.Parameter(torch.ones(50)) for _ in range(20)]
        optimizer = torch.optim.SGD(parameters, lr=1e-3)
        monitor = watch(optimizer, sample_every=asked)
        caplog.clear()
        with caplog.at_level(logging.INFO, "optwatch"):
            for _ in range(12):
                sum(p.square().sum() for p in parameters).backward()
                optimizer.step()
            assert monitor.flush()
        snapshot = monitor.snapshot()
        steps = int(snapshot['optwatch_agent_sampling_interval_steps{what="weights_and_moments"}'])
        assert steps > 10 if asked is None else steps == 10  # twelve steps in less than seven seconds
        said = [message for message in caplog.messages if "are read over" in message]
        assert [f"over {steps} of them" in message for message in said] == ([True] if asked is None else [])
        assert 0 < snapshot["optwatch_weight_norm"] < math.sqrt(20 * 50)  # of the first rotation at the latest
        monitor.detach()


def test_gradients_are_read_at_the_steps_that_are_due_only(watch: Any) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    monitor = watch(optimizer)
    next(iter(monitor._watches.values())).gradient_interval = 4
    records: list[Any] = []
    monitor.sinks.append(type("Kept", (), {"record": lambda _, record: records.append(record), "event": print})())
    for _ in range(8):
        parameter.square().sum().backward()
        nn.utils.clip_grad_norm_([parameter], 1.0)
        optimizer.step()
    assert monitor.flush()
    assert [record.grad_norm is not None for record in records] == [False, False, False, True] * 2
    assert [record.grad_norm_before_clip is not None for record in records] == [False, False, False, True] * 2
    assert all(record.loss is not None for record in records)
