"""A loss that has stopped falling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .window import SortedWindow

LEVEL = 100
"""Losses whose median is the level."""
LEAST_IMPROVEMENT = 0.002
"""Part of its size by which a level has to be lower than the best to count as new."""
RATE_AT_ITS_END = 0.1
"""Part of the largest learning rate below which a schedule is ending, and a loss that stands still is meant to."""


@dataclass(frozen=True, slots=True)
class Plateau:
    """A level that no longer falls."""

    step: int
    since: int
    """Step of the best level."""
    best: float


class PlateauDetector:
    """Finds a loss whose level (the median of its last hundred values) has had no new best for `patience` values.

    Said once until there is a new best. A learning rate below a tenth of its largest is a schedule's end: then standing
    still is meant. NaN and Inf are another detector's. State is bounded.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._values = SortedWindow(LEVEL)
        self._best = math.inf
        self._best_step = 0
        self._waited = 0
        self._largest_rate = 0.0

    def observe(self, step: int, loss: float, rate: float | None) -> Plateau | None:
        """Take the next loss and learning rate (None where it is not known); the plateau that is now certain."""
        if not math.isfinite(loss):
            return None
        if rate is not None:
            self._largest_rate = max(self._largest_rate, rate)
        self._values.add(loss)
        if len(self._values) < LEVEL:
            return None
        level = self._values.median()
        if level < self._best - LEAST_IMPROVEMENT * abs(self._best) or math.isinf(self._best):
            self._best, self._best_step, self._waited = level, step, 0
            return None
        if rate is not None and rate < RATE_AT_ITS_END * self._largest_rate:
            return None
        self._waited += 1
        return Plateau(step, self._best_step, self._best) if self._waited == self._patience else None

    def state_dict(self) -> dict[str, Any]:
        """Everything it knows, in plain numbers; None for a best that is not known yet."""
        return {
            "values": self._values.values(),
            "best": None if math.isinf(self._best) else self._best,
            "best_step": self._best_step,
            "waited": self._waited,
            "largest_rate": self._largest_rate,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._values.restore(state["values"])
        self._best = math.inf if state["best"] is None else float(state["best"])
        self._best_step, self._waited = int(state["best_step"]), int(state["waited"])
        self._largest_rate = float(state["largest_rate"])
