"""Where a pass stopped being finite, as far as the outputs of layers tell: on the host thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .record import Passes
from .transfer import Arrival

BACKWARD = "\0"
"""Ends the label of the gradient of an output."""


@dataclass(frozen=True, slots=True)
class Trace:
    """The outputs since the step before, on their way to the host."""

    labels: Sequence[str]
    """In execution order."""
    values: Sequence[Tensor]
    """Each of shape ``(2k,)``, in the outputs' dtype, on the host: smallest and largest entry of k outputs in turn."""
    arrivals: Sequence[Arrival]
    gradients: bool
    """Whether gradients of outputs were read as well, and are those whose label ends in `BACKWARD`."""


class Reader:
    """What traces say, on the host thread. An output that is infinite at healthy steps too, as masked scores are, tells
    nothing: such labels are remembered and passed over."""

    def __init__(self) -> None:
        self._usual: set[tuple[str, str]] = set()

    def passes(self, trace: Trace, healthy: bool) -> Passes:
        """The first output that is not finite, of a trace that has arrived; `healthy` where nothing else is bad."""
        if all(bool(torch.isfinite(values).all()) for values in trace.values):
            bad: list[tuple[str, str]] = []
        else:
            ends = torch.cat([values.to(torch.float64) for values in trace.values]).view(-1, 2)
            kinds = zip(trace.labels, ends.isnan().any(1).tolist(), ends.isinf().any(1).tolist(), strict=True)
            bad = [(label, "nan" if nan else "inf") for label, nan, inf in kinds if nan or inf]
        if healthy:
            self._usual.update(bad)
            bad = []
        bad = [found for found in bad if found not in self._usual]
        forward = next((found for found in bad if not found[0].endswith(BACKWARD)), None)
        backward = any(label.endswith(BACKWARD) for label, _ in bad)
        return Passes(
            order=list(dict.fromkeys(label for label in trace.labels if not label.endswith(BACKWARD))),
            broken=forward[0] if forward else None,
            value=("nan" if forward[1] == "nan" else "inf") if forward else None,
            own_gradients_finite=not backward if trace.gradients else None,
        )
