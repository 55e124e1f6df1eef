"""What can be wrong with a resume: each fault with its harm, its usual cause and what to do, and its event."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from optwatch.events import Event

Fault = Literal[
    "moments_missing",
    "step_changed",
    "dtype_cast",
    "hyperparameters_overwritten",
    "groups_swapped",
    "parameters_reordered",
    "contents_changed",
    "weights_not_loaded",
    "masters_missing",
    "scheduler_offset",
    "scaler_reset",
    "generators_not_restored",
]
ITEMS_TOLD = 20
"""Most tensors or groups that one event lists."""


@dataclass(frozen=True, slots=True)
class Advice:
    """What is known of a fault before it is met."""

    grade: Literal["critical", "warning"]
    what: str
    """The fault in a sentence."""
    likely: str
    """The usual cause, and what to do."""


ADVICE: dict[Fault, Advice] = {
    "moments_missing": Advice(
        "critical",
        "the optimizer goes on without state that the checkpoint was saved with",
        "optimizer.load_state_dict() was not called, was called on another optimizer, or the checkpoint lost its "
        "state. Expect a loss spike: stop, load the state, start again from the checkpoint.",
    ),
    "step_changed": Advice(
        "warning",
        "the optimizer's step counts are not those that were saved",
        "The state was rebuilt without `step`, or the count was set anew. Bias correction uses it: with moments kept, "
        "a count of 0 makes the next updates several times too small or too large. Restore `step` with the moments.",
    ),
    "dtype_cast": Advice(
        "warning",
        "tensors have come back in a narrower dtype, or rounded through one",
        "load_state_dict casts floating state to the dtype of its parameter: load the state before the model is cast, "
        "or put the float32 state back after loading. A checkpoint converted to 16 bits has lost the rest for good.",
    ),
    "hyperparameters_overwritten": Advice(
        "warning",
        "hyper-parameters are not those that were meant",
        "load_state_dict puts the saved values in place of those that the optimizer was constructed with, and code "
        "after it (a new scheduler's first step, a command-line value) in place of the saved ones. Set what is meant "
        "after everything has been loaded.",
    ),
    "groups_swapped": Advice(
        "critical",
        "parameter groups have changed places",
        "load_state_dict goes by order and not by name: each group has the other's weight decay, rate or moments. "
        "Build the groups in the order in which they were saved.",
    ),
    "parameters_reordered": Advice(
        "critical",
        "parameters and what belongs to them no longer pair up",
        "load_state_dict goes by order: where shapes agree, moments land silently on another parameter. Give the "
        "optimizer its parameters in the order in which they were saved, or load by name.",
    ),
    "contents_changed": Advice(
        "critical",
        "tensors do not hold what was saved",
        "The file or shard was damaged or is of another save, or something wrote to the tensors after loading. Check "
        "it with `optwatch checkpoint verify PATH`, and go back to a checkpoint that is whole.",
    ),
    "weights_not_loaded": Advice(
        "critical",
        "no weight is the one that was saved",
        "model.load_state_dict() was not called, or another checkpoint was loaded than the one named. Load the model "
        "before the first step.",
    ),
    "masters_missing": Advice(
        "warning",
        "the float32 master weights are gone",
        "The checkpoint holds the 16-bit weights only, or the masters were made anew from them: updates smaller than "
        "their rounding were lost with them. Save and load the optimizer's master weights too.",
    ),
    "scheduler_offset": Advice(
        "warning",
        "the learning-rate scheduler is not at the step at which it was saved",
        "scheduler.load_state_dict() was not called, or the scheduler was stepped again on resuming. Until it is "
        "restored the run repeats or skips a part of its schedule.",
    ),
    "scaler_reset": Advice(
        "warning",
        "the gradient scaler starts from a larger scale than it had",
        "scaler.load_state_dict() was not called. The first steps overflow and are skipped until the scale is back.",
    ),
    "generators_not_restored": Advice(
        "warning",
        "random generators do not go on from where they were",
        "Their states were not saved or not restored: dropout and shuffling repeat or differ, and samples may be "
        "seen twice. Save torch.get_rng_state(), torch.cuda.get_rng_state_all(), random.getstate() and NumPy's, and "
        "set them after everything else has been loaded.",
    ),
}


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor, group or generator that is not as it was."""

    name: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.name}: {self.expected} was saved, {self.found} is there now"


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault, with all that show it."""

    fault: Fault
    items: tuple[Item, ...]
    optimizer: str = ""

    @property
    def summary(self) -> str:
        """The fault and its first example, in one sentence."""
        others = f" (and {len(self.items) - 1} more)" if len(self.items) > 1 else ""
        return f"{ADVICE[self.fault].what}: {self.items[0]}{others}"

    def event(self, checkpoint: str, step: int, changed_since: bool) -> Event:
        """The event of this finding on a run that resumed from `checkpoint` before `step`."""
        advice = ADVICE[self.fault]
        missing = self.fault == "moments_missing"
        since = " The checkpoint has been written to since its fingerprint was taken." if changed_since else ""
        return Event(
            kind="resumed_without_state" if missing else "audit_finding",
            step=step,
            occurred_at=time.time(),
            summary=f"Resumed from {checkpoint}, before step {step}: {self.summary}.{since}",
            likely=advice.likely,
            runbook="TrainingResumedWithoutState" if missing else "TrainingAuditFinding",
            details={
                "audit": "resume",
                "fault": self.fault,
                "checkpoint": checkpoint,
                "count": len(self.items),
                "items": [
                    {"name": item.name, "expected": item.expected, "found": item.found}
                    for item in self.items[:ITEMS_TOLD]
                ],
                "optimizer": self.optimizer,
            },
            grade=None if missing else advice.grade,
        )
