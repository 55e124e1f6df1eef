"""Events: what a detector saw, in the form in which the server keeps it and a person reads it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from .catalogue import EVENT_SEVERITIES, severities

MAX_TEXT = 4000
"""Most characters of a text that the server takes, with some to spare."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a run. The severity is its kind's (`catalogue.EVENT_SEVERITIES`), unless events of the kind differ.

    Raises:
        ValueError: no such kind, or not with this severity.
    """

    kind: str
    step: int
    occurred_at: float
    """Unix seconds."""
    summary: str
    """What was seen, in one sentence with its numbers."""
    likely: str
    """The likely cause and the next thing to look at."""
    runbook: str
    """Name of the runbook page."""
    details: dict[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    grade: str | None = None
    """``critical`` or ``warning``, by the harm of this event; only for `catalogue.GRADED_EVENTS`."""

    def __post_init__(self) -> None:
        if self.kind not in EVENT_SEVERITIES:
            raise ValueError(f"Event(kind={self.kind!r}): give one of {', '.join(EVENT_SEVERITIES)}, or add it there")
        if self.severity not in severities(self.kind):
            allowed = " or ".join(map(repr, severities(self.kind)))
            raise ValueError(f"Event(kind={self.kind!r}, grade={self.grade!r}): give {allowed}, or none")

    def message(self, run_id: str, rank: int, sequence: int) -> dict[str, Any]:
        """The event as docs/wire.md has it. ``sequence`` ascends for a run and rank."""
        return {
            "id": self.id,
            "run_id": run_id,
            "rank": rank,
            "sequence": sequence,
            "kind": self.kind,
            "severity": self.severity,
            "step": self.step,
            "occurred_at": self.occurred_at,
            "summary": self.summary[:MAX_TEXT],
            "likely": self.likely[:MAX_TEXT],
            "runbook": self.runbook,
            "details": self.details,
        }

    @property
    def severity(self) -> str:
        """``critical``, ``warning`` or ``info``."""
        return self.grade or EVENT_SEVERITIES[self.kind]
