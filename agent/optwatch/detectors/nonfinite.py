"""Incidents of NaN and Inf: where and when each began."""

from __future__ import annotations

from collections import deque
from typing import Any

from optwatch.events import Event
from optwatch.host.attribution import Origin, origin
from optwatch.record import StepRecord

QUIET_STEPS = 10
"""Finite steps after which an incident is over, and a next NaN is a new one."""
HISTORY = 5
"""Gradient norms before the incident that its event carries."""


class NonFiniteDetector:
    """Raises one event for an incident: at its first step, naming where it was met first and in which phase.

    See `attribution` for which phase and layer that is.
    """

    def __init__(self) -> None:
        self.first_steps: dict[str, tuple[int, str]] = {}
        """By source, the step and layer at which the present incident met it first; emptied by the next incident."""
        self.asks = False
        """Whether weights and moments, of which most steps read but a part, are to be read at the next step: where a
        source is met first, and before an incident is taken to be over."""
        self._finite_steps = QUIET_STEPS
        self._grad_norms: deque[float] = deque(maxlen=HISTORY)

    def observe(self, record: StepRecord) -> list[Event]:
        """Take the next record; the event of the incident that begins with it, if one does."""
        if not record.nonfinite:
            self._finite_steps += 1
            self.asks = self._finite_steps == QUIET_STEPS // 2
            if record.grad_norm is not None:
                self._grad_norms.append(record.grad_norm_before_clip or record.grad_norm)
            return []
        begins = self._finite_steps >= QUIET_STEPS
        self._finite_steps = 0
        if begins:
            self.first_steps = {}
        where, known = origin(record), len(self.first_steps)
        for found in record.nonfinite:
            self.first_steps.setdefault(found.source, (record.step, where.layer))
        self.asks = len(self.first_steps) > known
        return [self._event(record, where)] if begins else []

    def _event(self, record: StepRecord, began: Origin) -> Event:
        found = record.nonfinite[0]
        tensors = next((len(each.parameters) for each in record.nonfinite if each.parameters), 0)
        value = {"nan": "NaN", "inf": "Inf"}[found.value]
        where = _where(began)
        count = f", {tensors} tensors in all" if tensors > 1 else ""
        if record.skipped:
            who = "optwatch" if record.refused else "the gradient scaler"
            where += f"; {who} has skipped {record.skipped_in_a_row} steps in a row"
        batches = ", ".join(map(str, record.batch_ids))
        if batches:
            count += f"; batch {batches}"
        rate = max(record.learning_rates, default=0.0)
        norms = ", ".join(f"{norm:.3g}" for norm in self._grad_norms)
        history = f"gradient norms before: {norms}" if norms else "there was no finite step before it"
        details: dict[str, Any] = {
            "source": found.source,
            "value": found.value,
            "phase": began.phase,
            "layer": began.layer,
            "parameter": began.parameter,
            "tensors": tensors,
            "loss": record.loss,
            "learning_rate": rate,
            "grad_norms_before": list(self._grad_norms),
            "skipped_steps": record.skipped_in_a_row,
            "optimizer": record.optimizer,
        }
        if record.grad_scale is not None:
            details["grad_scale"] = record.grad_scale
        if batches:
            details["batch_id"] = record.batch_ids[0] if len(record.batch_ids) == 1 else batches
        return Event(
            kind="nonfinite",
            step=record.step,
            occurred_at=record.started,
            summary=f"{value} in the {found.source} at step {record.step}{where}{count}; learning rate {rate:.3g}, "
            f"{history}.",
            likely=_LIKELY[_kind(record, began)],
            runbook="TrainingNonFinite",
            details=details,
        )


def _where(began: Origin) -> str:
    """What the summary says of it."""
    named = f"layer {began.layer}" + (f" ({began.parameter})" if began.parameter else "")
    if began.phase == "input":
        return ", first in what the model was given"
    if began.phase == "loss":
        return ", first in the loss itself: every layer gave out finite numbers"
    if began.phase == "communication":
        return f", first in gradients that came from another rank: this rank's own were finite, the last is in {named}"
    if not began.layer:
        return ""
    if began.phase == "forward" and not began.sure and not began.parameter:
        return f"; no tensor is bad yet, the largest gradient is in {named}"
    if began.phase == "forward" and began.sure:
        return f", first in the output of {named}"
    return f", first in {named}"


def _kind(record: StepRecord, began: Origin) -> str:
    if record.refused:
        return "refused"
    return "scaler" if record.skipped else began.phase


_LIKELY: dict[str, str] = {
    "input": "The batch itself holds it: look at this batch, how it is read and normalised. The weights were finite; "
    "the update may have spoilt them and the moments: roll back one step and leave this batch out.",
    "forward": "The forward pass made it: weights that the steps before drove too far (rate too high, no warm-up), an "
    "overflow in low precision, or an operation with no value there. Weights are no better than this loss: roll back.",
    "loss": "The loss function made it, of finite outputs: a logarithm or division at 0, a mean over no element, or a "
    "target out of range. Clamp or mask it there; roll back the update that followed.",
    "backward": "The loss was finite and its gradient was not: a square root, norm, logarithm or division at 0 in the "
    "named layer, or an overflow in low precision. The moments hold it now: roll back the optimizer's state as well.",
    "communication": "The gradient of another rank was bad when they were added up: the event of that rank says where. "
    "Where no rank has one, suspect the network or the hardware of one node.",
    "moments": "Loss and gradient were finite and the moments were not: a square that overflowed or underflowed there "
    "(in this dtype), or state that was loaded so. Roll back the optimizer's state, then check eps and dtype.",
    "weights": "Loss and gradient were finite and the weights were not: an epsilon that rounds to 0 in this dtype, a "
    "learning rate that overflows, or weights that something else wrote. Roll back, then check eps, dtype and memory.",
    "refused": "The step was left out, so weights and moments are as they were: look at the batch and the layer named "
    "here. One now and then is a bad batch; where every step is left out nothing trains.",
    "scaler": "Gradients are not finite at any scale, so no weight has changed since: NaN in the weights, the data or "
    "the forward pass, not an overflow that a smaller scale would cure. Roll back to a checkpoint with finite weights, "
    "and look at the first layer named here.",
}
