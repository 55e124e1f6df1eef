"""Moments by definition: computed in float64 from the gradients that an optimizer saw, without a look at its state.

A definition takes the trace of one parameter and returns its moment after the last step. Its state is never read, so
that a key with another meaning than was thought cannot agree with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class Trace:
    """What happened to one parameter, step by step, in float64."""

    gradients: list[Tensor] = field(default_factory=list)
    before: list[Tensor] = field(default_factory=list)
    after: list[Tensor] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    """Its group's numbers before each step."""
    recorded: list[dict[str, Tensor]] = field(default_factory=list)
    """What the case wants recorded after each step."""
    others: list[Trace] = field(default_factory=list)
    """The traces of all parameters of the optimizer, in order, this one included."""

    def hyper(self, path: str | float) -> float:
        """A number of the group, as ``key`` or ``key.index``."""
        if not isinstance(path, str):
            return path
        name, _, index = path.partition(".")
        value = self.groups[0][name]
        return float(value[int(index)] if index else value)

    def global_norm(self, step: int) -> float:
        """√Σ‖g‖² over all parameters at a step (from 0)."""
        return sum(float(t.gradients[step].square().sum()) for t in self.others) ** 0.5


Definition = Callable[[Trace], "Tensor | None"]
Inputs = Callable[[Trace], list[Tensor]]


def gradients(trace: Trace) -> list[Tensor]:
    """The gradients as they came."""
    return trace.gradients


def centralised(trace: Trace) -> list[Tensor]:
    """Gradients less their mean over all dimensions but the first (Yong et al. 2020)."""
    return [g - g.mean(tuple(range(1, g.dim())), keepdim=True) if g.dim() > 1 else g for g in trace.gradients]


def with_decay(trace: Trace) -> list[Tensor]:
    """Gradients with the weights' decay added."""
    decay = trace.hyper("weight_decay")
    return [g + decay * p for g, p in zip(trace.gradients, trace.before, strict=True)]


def ema(beta: str | float, of: Inputs = gradients, power: int = 1) -> Definition:
    """m ← βm + (1 − β)xᵖ from 0."""

    def compute(trace: Trace) -> Tensor:
        b, xs = trace.hyper(beta), of(trace)
        m = torch.zeros_like(xs[0])
        for x in xs:
            m = b * m + (1 - b) * x**power
        return m

    return compute


def squares(beta: str | float = "betas.1", of: Inputs = gradients) -> Definition:
    """v ← βv + (1 − β)x² from 0."""
    return ema(beta, of, 2)


def debiased(beta: str, of: Inputs = gradients, power: int = 1) -> Definition:
    """The moving average divided by 1 − βᵗ."""
    plain = ema(beta, of, power)
    return lambda trace: plain(trace) / (1 - trace.hyper(beta) ** len(trace.gradients))


def heavy_ball(beta: str | float, of: Inputs = gradients, factor: float = 1.0) -> Definition:
    """m ← βm + c·x from 0."""

    def compute(trace: Trace) -> Tensor:
        m = torch.zeros_like(trace.gradients[0])
        for x in of(trace):
            m = trace.hyper(beta) * m + factor * x
        return m

    return compute


def from_first(beta: str, of: Inputs = gradients, power: int = 1) -> Definition:
    """A moving average that begins with the first x."""

    def compute(trace: Trace) -> Tensor:
        first, *rest = of(trace)
        m = first**power
        for x in rest:
            m = trace.hyper(beta) * m + (1 - trace.hyper(beta)) * x**power
        return m

    return compute


def total(power: int = 2, mean: bool = False) -> Definition:
    """Σxᵖ, or its mean, over the steps."""

    def compute(trace: Trace) -> Tensor:
        result = sum(g**power for g in trace.gradients)
        assert isinstance(result, Tensor)
        return result / len(trace.gradients) if mean else result

    return compute


def largest(beta: str = "betas.1", of: Inputs = gradients) -> Definition:
    """The running maximum of the moving average of squares (AMSGrad)."""

    def compute(trace: Trace) -> Tensor:
        v = torch.zeros_like(trace.gradients[0])
        best = v
        for x in of(trace):
            v = trace.hyper(beta) * v + (1 - trace.hyper(beta)) * x**2
            best = torch.maximum(best, v)
        return best

    return compute


def about_the_mean(epsilon: bool) -> Definition:
    """AdaBelief: the moving average of (g − m)², with ε added at each step."""

    def compute(trace: Trace) -> Tensor:
        b1, b2 = trace.hyper("betas.0"), trace.hyper("betas.1")
        m = torch.zeros_like(trace.gradients[0])
        v = m
        for g in trace.gradients:
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * (g - m) ** 2 + (trace.hyper("eps") if epsilon else 0.0)
        return v

    return compute


def factored(v_of: Callable[[Trace, int], float], epsilon: Callable[[Trace], float]) -> Definition:
    """Shazeer & Stern 2018, algorithm 4: moving averages of row and column means, and their product."""

    def compute(trace: Trace) -> Tensor:
        first = trace.gradients[0]
        rows, columns, plain = (torch.zeros(()).double() for _ in range(3))
        for t, g in enumerate(trace.gradients, start=1):
            b, square = v_of(trace, t), g.square() + epsilon(trace)
            if first.dim() < 2:
                plain = b * plain + (1 - b) * square
            else:
                rows = b * rows + (1 - b) * square.mean(-1)
                columns = b * columns + (1 - b) * square.mean(-2)
        if first.dim() < 2:
            return plain
        return rows[..., :, None] * columns[..., None, :] / rows.mean(-1)[..., None, None]

    return compute


def updates(trace: Trace) -> list[Tensor]:
    """p before − p after of each step: what an optimizer without momentum of its own updates by."""
    return [x - y for x, y in zip(trace.before, trace.after, strict=True)]


def last_update(trace: Trace) -> Tensor:
    """The last step's p before − p after."""
    return updates(trace)[-1]


Hyper = Mapping[str, Any]
