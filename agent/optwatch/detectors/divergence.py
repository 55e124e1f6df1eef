"""Rises of the loss that do not come back."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

RECENT = 20
"""Losses whose median says where the loss is now: a single good batch is no recovery."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """A rise that has not come back."""

    began: int
    """Step of the spike, or at which the drift was certain."""
    step: int
    before: float
    """Level of the loss before it."""
    now: float
    """Median of the last losses."""


class DivergenceDetector:
    """Finds a loss that has not returned under the limit of its spike or drift within `patience` further losses.

    The limit is from before the rise, so a level that stays high counts although it becomes the new band. Reported
    once for a rise. NaN and Inf are another detector's. State is bounded.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._rise: tuple[int, float, float] | None = None
        self._seen = 0
        self._recent: deque[float] = deque(maxlen=RECENT)

    @property
    def open(self) -> bool:
        """Whether a rise is being watched."""
        return self._rise is not None

    def begin(self, step: int, before: float, limit: float) -> None:
        """A rise has begun, from the level `before`; it is over below `limit`. One that is watched already goes on."""
        if self._rise is None:
            self._rise = (step, before, limit)
            self._seen = 0
            self._recent.clear()

    def observe(self, step: int, loss: float) -> Divergence | None:
        """Take the next loss, that of the rise included; the divergence that is now certain."""
        if self._rise is None or not math.isfinite(loss):
            return None
        began, before, limit = self._rise
        self._recent.append(loss)
        self._seen += 1
        now = median(self._recent)
        if len(self._recent) >= RECENT // 2 and now <= limit:
            self._rise = None
        elif self._seen > self._patience:
            self._rise = None
            return Divergence(began, step, before, now)
        return None

    def state_dict(self) -> dict[str, Any]:
        """Everything it knows, in plain numbers."""
        return {"rise": self._rise, "seen": self._seen, "recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        rise = state["rise"]
        self._rise = None if rise is None else (int(rise[0]), float(rise[1]), float(rise[2]))
        self._seen = int(state["seen"])
        self._recent = deque(state["recent"], maxlen=RECENT)
