"""Where a pass stopped being finite, as far as the outputs of layers tell: on the host thread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optwatch.record import Passes
from optwatch.training.transfer import Arrival

BACKWARD = "\0"
"""Ends the label of the gradient of an output."""


@dataclass(frozen=True, slots=True)
class Trace:
    """The outputs since the step before, on their way to the host."""

    labels: Sequence[str]
    """In execution order."""
    values: Sequence[Tensor | list[float]]
    """On the host, each a number for each of k outputs in turn or two, shape ``(k, 2)``: one of an output's is NaN, or
    infinite, exactly where an entry of it is."""
    arrivals: Sequence[Arrival]
    gradients: bool
    """Whether gradients of outputs were read as well, and are those whose label ends in `BACKWARD`."""


class Reader:
    """What traces that have arrived say, on the host thread. An output that is infinite at healthy steps too, as masked
    scores are, tells nothing: such labels are remembered and passed over."""

    def __init__(self) -> None:
        self._usual: set[tuple[str, str]] = set()

    def learn(self, trace: Trace) -> None:
        """Take the trace of a healthy step."""
        self._usual.update(_bad(trace))

    def passes(self, trace: Trace) -> Passes:
        """Where a pass of a step that is not healthy stopped being finite."""
        bad = [found for found in _bad(trace) if found not in self._usual]
        forward = next((found for found in bad if not found[0].endswith(BACKWARD)), None)
        backward = any(label.endswith(BACKWARD) for label, _ in bad)
        return Passes(
            order=list(dict.fromkeys(label for label in trace.labels if not label.endswith(BACKWARD))),
            broken=forward[0] if forward else None,
            value=("nan" if forward[1] == "nan" else "inf") if forward else None,
            own_gradients_finite=not backward if trace.gradients else None,
        )


def _bad(trace: Trace) -> list[tuple[str, str]]:
    """The outputs that are not finite, in execution order, and what they hold."""
    # Looked at one by one only where they add up to no number: numbers of one sign, or pairs of a small dtype, may.
    if all(math.isfinite(sum(each) if isinstance(each, list) else float(each.sum())) for each in trace.values):
        return []
    values = [
        torch.tensor(each, dtype=torch.float64).view(-1, 1) if isinstance(each, list) else each for each in trace.values
    ]
    nans = [nan for each in values for nan in each.isnan().any(1).tolist()]
    infs = [inf for each in values for inf in each.isinf().any(1).tolist()]
    kinds = zip(trace.labels, nans, infs, strict=True)
    return [(label, "nan" if nan else "inf") for label, nan, inf in kinds if nan or inf]
