"""Events that no detector sees: how a run failed, a checkpoint that was not written, or one that was not safe."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from optwatch.events import Event

from .checkpoints import Written
from .ending import Outcome


@dataclass(frozen=True)
class Exhausted:
    """What held the memory as a run failed. All sizes in bytes."""

    parts: dict[str, int] = field(default_factory=dict)
    """``weights``, ``gradients``, ``optimizer_state``, and ``rest``: activations, buffers and whatever else."""
    memory: dict[str, float] = field(default_factory=dict)
    """By kind, as `Device.memory` has it."""
    asked: int | None = None
    """What the allocation that failed asked for; None where the allocator does not say."""


def told(sizes: Mapping[str, float]) -> str:
    """Sizes by name, as text."""
    return ", ".join(f"{name.replace('_', ' ')} {size / 2**30:.2f} GiB" for name, size in sizes.items())


def run_failed(outcome: Outcome, step: int, exhausted: Exhausted, optimizer: str) -> Event:
    """The event of the failure that ends a run, and what held the memory then."""
    at = f" Raised at {outcome.frames[-1]}." if outcome.frames else ""
    if outcome.cause == "out_of_memory":
        asked = "" if exhausted.asked is None else f" of {exhausted.asked / 2**30:.2f} GiB"
        known = f": {told(exhausted.memory)}. Held by {told(exhausted.parts)}" if exhausted.parts else ""
        likely = (
            f"An allocation{asked} did not fit{known}. A smaller "
            "micro-batch with more accumulation, activation checkpointing or a leaner optimizer makes room."
        )
    else:
        likely = (
            "The training code raised it. Mend it, or skip the input that caused it, and resume from the last "
            "checkpoint, optimizer state included."
        )
    return Event(
        kind=outcome.cause or "crashed",
        step=step,
        occurred_at=time.time(),
        summary=f"Training ended after step {step}: {outcome.reason or 'no reason was given'}.{at}",
        likely=likely,
        runbook="TrainingOutOfMemory" if outcome.cause == "out_of_memory" else "TrainingCrashed",
        details={
            "reason": outcome.reason,
            "frames": list(outcome.frames),
            "memory_bytes": exhausted.memory,
            "held_bytes": exhausted.parts,
            "asked_bytes": exhausted.asked,
            "optimizer_state_bytes": exhausted.parts.get("optimizer_state", 0),
            "optimizer": optimizer,
        },
    )


def checkpoint_failed(written: Written, step: int, optimizer: str) -> Event:
    """The event of a checkpoint that was not written."""
    return Event(
        kind="checkpoint_failed",
        step=step,
        occurred_at=time.time(),
        summary=f"The checkpoint {written.path} failed at step {step} after {written.duration:.1f} s: {written.error}.",
        likely="The disk is full, the store is away or the path is wrong. Until one succeeds, a crash costs everything "
        "since the last good checkpoint.",
        runbook="TrainingCheckpointFailed",
        details={"path": written.path, "error": written.error, "optimizer": optimizer},
    )


def checkpoint_in_place(written: Written, step: int, optimizer: str) -> Event:
    """The event of a checkpoint that was written over the one before it."""
    return Event(
        kind="audit_finding",
        step=step,
        occurred_at=time.time(),
        summary=f"The checkpoint {written.path} was written over the one before it, in place, at step {step}: for "
        f"{written.duration:.1f} s there was neither.",
        likely="A process that dies or a disk that fills while it writes leaves no checkpoint at all. Write to another "
        "name in the same folder, then os.replace() it onto the path.",
        runbook="TrainingAuditFinding",
        details={"audit": "checkpoint", "fault": "written_in_place", "path": written.path, "optimizer": optimizer},
    )
