"""Closures: what a step is, where the optimizer asks for its gradients itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import nn

GRAD = 'optwatch_grad_norm{stage="at_step"}'
BEFORE = 'optwatch_grad_norm{stage="before_clip"}'
LOSS, BATCHES = "optwatch_loss", "optwatch_accumulation_steps"
Evaluations = list[tuple[float, float]]


class Training:
    """A small regression whose every evaluation is kept: loss and norm of the gradient, both in float64."""

    def __init__(self, clip: float | None = None) -> None:
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1))
        self.x, self.y = torch.randn(32, 6), torch.randn(32, 1)
        self.evaluations: Evaluations = []
        self.clip = clip
        self.optimizer: torch.optim.Optimizer

    def closure(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = (self.net(self.x) - self.y).square().mean()
        loss.backward()
        self.evaluations.append((loss.item(), self.gradient_norm()))
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)
        return loss

    def gradient_norm(self) -> float:
        return math.sqrt(
            sum(p.grad.double().square().sum().item() for p in self.net.parameters() if p.grad is not None)
        )


def lbfgs(p: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(p, lr=0.5, max_iter=4, line_search_fn="strong_wolfe")


def sam(p: Any) -> torch.optim.Optimizer:
    return pytorch_optimizer.SAM(p, torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9)


def exported(monitor: Any) -> dict[str, float]:
    assert monitor.flush()
    return dict(monitor.snapshot())


@pytest.mark.parametrize("make", [lbfgs, lambda p: torch.optim.AdamW(p, lr=1e-2)], ids=["LBFGS", "AdamW"])
@pytest.mark.parametrize("by_name", [False, True], ids=["step(closure)", "step(closure=closure)"])
def test_gradient_and_loss_are_those_of_the_first_evaluation(
    make: Callable[[Any], torch.optim.Optimizer], by_name: bool, watch: Any
) -> None:
    training = Training()
    training.optimizer = make(training.net.parameters())
    monitor = watch(training.optimizer, sample_every=1)
    for step in range(1, 4):
        training.evaluations.clear()
        before = [p.detach().double().clone() for p in training.net.parameters()]
        if by_name:
            training.optimizer.step(closure=training.closure)  # type: ignore[arg-type]  # torch's type says float
        else:
            training.optimizer.step(training.closure)  # type: ignore[arg-type]
        moved = sum((p - q).square().sum().item() for p, q in zip(training.net.parameters(), before, strict=True))
        got = exported(monitor)
        loss, gradient = training.evaluations[0]
        assert got[LOSS] == pytest.approx(loss, rel=1e-6)
        assert got[GRAD] == pytest.approx(gradient, rel=1e-6)
        assert got[BATCHES] == 1
        assert got["optwatch_steps_total"] == step
        assert got["optwatch_update_norm"] == pytest.approx(math.sqrt(moved), rel=1e-5)
    assert len(training.evaluations) > 1 or make is not lbfgs
    assert not monitor.faults.counts


def test_clipping_in_a_closure_is_that_of_its_first_evaluation(watch: Any) -> None:
    training = Training(clip=1e-2)
    training.optimizer = torch.optim.LBFGS(training.net.parameters(), max_iter=3)
    monitor = watch(training.optimizer)
    training.optimizer.step(training.closure)  # type: ignore[arg-type]
    got = exported(monitor)
    assert len(training.evaluations) > 1
    assert got[BEFORE] == pytest.approx(training.evaluations[0][1], rel=1e-6)
    assert got[GRAD] == pytest.approx(1e-2, rel=1e-3)


def test_a_step_without_a_closure_after_one_with_has_its_own_loss_and_gradient(watch: Any) -> None:
    training = Training()
    training.optimizer = torch.optim.AdamW(training.net.parameters())
    monitor = watch(training.optimizer)
    training.optimizer.step(training.closure)  # type: ignore[arg-type]
    training.closure()
    training.optimizer.step()
    got = exported(monitor)
    assert (got[LOSS], got[GRAD]) == pytest.approx(training.evaluations[-1], rel=1e-6)
    assert got[BATCHES] == 1


@pytest.mark.parametrize("two_calls", [False, True], ids=["step(closure)", "first_step and second_step"])
def test_sam_steps_with_its_second_gradient_and_reports_its_first_loss(two_calls: bool, watch: Any) -> None:
    training = Training()
    optimizer: Any = sam(training.net.parameters())
    training.optimizer = optimizer
    monitor = watch(optimizer, sample_every=1)
    for step in range(1, 4):
        training.evaluations.clear()
        before = [p.detach().double().clone() for p in training.net.parameters()]
        training.closure()
        if two_calls:
            optimizer.first_step(zero_grad=True)
            training.closure()
            optimizer.second_step()
        else:
            optimizer.step(training.closure)
        moved = sum((p - q).square().sum().item() for p, q in zip(training.net.parameters(), before, strict=True))
        got = exported(monitor)
        assert got[LOSS] == pytest.approx(training.evaluations[0][0], rel=1e-6)
        assert got[GRAD] == pytest.approx(training.evaluations[1][1], rel=1e-6)
        assert training.evaluations[0][1] != pytest.approx(training.evaluations[1][1], rel=1e-3)
        assert got[BATCHES] == 1
        assert got["optwatch_steps_total"] == step
        assert got["optwatch_update_norm"] == pytest.approx(math.sqrt(moved), rel=1e-5)
    assert not monitor.faults.counts


def wsam(net: nn.Module) -> Any:
    return pytorch_optimizer.WSAM(net, net.parameters(), torch.optim.SGD, lr=0.1)


def test_an_optimizer_that_evaluates_before_and_beside_the_weights_reports_what_came_in_before_its_step(
    watch: Any,
) -> None:
    training = Training()
    training.optimizer = optimizer = wsam(training.net)
    monitor = watch(optimizer)
    for step in range(1, 4):
        training.evaluations.clear()
        training.closure()
        optimizer.step(training.closure)
        got = exported(monitor)
        assert got[LOSS] == pytest.approx(training.evaluations[0][0], rel=1e-6)
        assert got[BATCHES] == 1
        assert got["optwatch_steps_total"] == step
    assert not monitor.faults.counts


class BackwardWithin(torch.optim.Optimizer):
    """Makes its two gradients within a step without a closure, as GSAM does, and steps a base with the second."""

    def __init__(self, training: Training) -> None:
        super().__init__(training.net.parameters(), {"lr": 0.1})
        self.training = training
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.1)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.training.closure()
        with torch.no_grad():
            for p in self.training.net.parameters():
                p.mul_(1.1)
        self.training.closure()
        with torch.no_grad():
            for p in self.training.net.parameters():
                p.div_(1.1)
        self.base_optimizer.step()


def test_gradients_made_within_a_step_are_of_that_step_and_not_of_the_next(watch: Any) -> None:
    training = Training()
    training.optimizer = BackwardWithin(training)
    monitor = watch(training.optimizer)
    for _ in range(3):
        training.evaluations.clear()
        training.optimizer.step()
        got = exported(monitor)
        assert got[LOSS] == pytest.approx(training.evaluations[0][0], rel=1e-6)
        assert got[GRAD] == pytest.approx(training.evaluations[1][1], rel=1e-6)
        assert got[BATCHES] == 1


def test_a_closure_that_raises_reaches_training_and_the_next_step_is_watched(watch: Any) -> None:
    training = Training()
    training.optimizer = lbfgs(training.net.parameters())
    monitor = watch(training.optimizer)

    def broken() -> float:
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        training.optimizer.step(broken)
    training.optimizer.step(training.closure)  # type: ignore[arg-type]
    got = exported(monitor)
    assert (got[LOSS], got[GRAD]) == pytest.approx(training.evaluations[0], rel=1e-6)
    assert not monitor.faults.counts


@pytest.mark.parametrize("make", [lbfgs, sam], ids=["LBFGS", "SAM"])
def test_losses_returns_and_the_number_of_evaluations_are_the_same_with_and_without(make: Any, watch: Any) -> None:
    def train(watched: bool) -> tuple[list[Any], Evaluations, list[torch.Tensor]]:
        training = Training()
        training.optimizer = make(training.net.parameters())
        if watched:
            watch(training.optimizer, sample_every=2)
        returned = []
        for _ in range(5):
            training.closure()
            returned.append(training.optimizer.step(training.closure))  # type: ignore[arg-type]
        return returned, training.evaluations, list(training.net.parameters())

    without, with_agent = train(False), train(True)
    assert without[:2] == with_agent[:2]
    assert all(torch.equal(p, q) for p, q in zip(without[2], with_agent[2], strict=True))


def test_methods_wrapped_on_an_optimizer_are_put_back(watch: Any) -> None:
    training = Training()
    optimizer = sam(training.net.parameters())
    names = set(vars(optimizer))
    monitor = watch(optimizer)
    assert {"first_step", "load_state_dict"} <= set(vars(optimizer))
    monitor.detach()
    assert set(vars(optimizer)) == names
