"""Which phase of a step made the first number that is not finite, and in which layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from optwatch.record import INPUT, NonFinite, StepRecord

Phase = Literal["input", "forward", "loss", "backward", "communication", "moments", "weights"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where it began."""

    phase: Phase
    layer: str = ""
    parameter: str = ""
    """The tensor, where it is a parameter's: empty for an activation."""
    sure: bool = True
    """Whether the layer was seen to break, and is not only where to look first."""


def origin(record: StepRecord) -> Origin:
    """Where a record that holds anything not finite says that it began. What a step meets first counts.

    - Moments and weights that were bad before the forward pass were made by the step before; of both, the moments.
    - What the model was given, and the first layer in execution order whose output is bad, made a bad loss. Where all
      outputs are finite it was made after the last layer: by the loss function.
    - A bad gradient under finite outputs is the backward pass's, which goes from the last layer to the first and
      carries what broke in one to all those before it: the last one in execution order broke first. It is another
      rank's where this rank's gradients of all outputs are finite and several layers are bad all the same.
    """
    passes, found = record.passes, record.nonfinite[0]
    if record.nonfinite_before:
        found = record.nonfinite_before[0]
    if found.source in ("loss", "gradient") and passes is not None and passes.broken is not None:
        return Origin("input") if passes.broken == INPUT else Origin("forward", passes.broken)
    if found.source == "loss":
        if passes is not None and passes.order:
            return Origin("loss")
        return _guessed(record)
    if found.source == "gradient":
        if not found.layers:
            return Origin("backward")
        at = _last_executed(found, passes.order if passes else [])
        others = passes is not None and passes.own_gradients_finite is True and len(set(found.layers)) > 1
        return Origin("communication" if others else "backward", found.layers[at], found.parameters[at], not others)
    return Origin("moments" if found.source == "moment" else "weights", found.layers[0], found.parameters[0])


def _guessed(record: StepRecord) -> Origin:
    """The layer of a loss under which no layer is watched: the first whose gradient is bad; where none is, the one with
    the largest, which was most about to leave the finite numbers."""
    if tensors := next((found for found in record.nonfinite if found.parameters), None):
        return Origin("forward", tensors.layers[0], tensors.parameters[0], sure=False)
    norms = record.layer_grad_norm
    return Origin("forward", record.layers[norms.index(max(norms))] if norms else "", sure=False)


def _last_executed(found: NonFinite, order: list[str]) -> int:
    """Position of the bad tensor whose layer was executed last; the last one in the model's order where that is not
    known of all of them."""
    within = [[at for at, label in enumerate(order) if name.startswith(f"{label}.")] for name in found.parameters]
    if not all(within):
        return len(within) - 1
    return max(range(len(within)), key=lambda i: (max(within[i]), i))
