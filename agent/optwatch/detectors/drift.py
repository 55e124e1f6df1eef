"""A level that rises slowly: no step stands out, and the loss is above its best all the same."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

from .spike import SpikeDetector

LEVEL = 25
"""Values whose median is the level: noise moves it by a quarter of its standard deviation."""


@dataclass(frozen=True, slots=True)
class Drift:
    """A rise that is certain now."""

    step: int
    began: int
    """Step of the best level."""
    best: float
    level: float
    deviations: float
    """How many robust standard deviations of the noise the level is above the best."""
    limit: float
    """The value below which the level is back."""


class DriftDetector:
    """Finds a loss whose level is `deviations` of its noise, and the least increase, above its best so far.

    Level is the median of the last 25 values; noise and scale are the spike detector's, as are logarithms. The best
    level is one number, however long ago it was, so that no ramp is too slow. NaN and Inf are another detector's.
    """

    def __init__(self, deviations: float) -> None:
        self._deviations = deviations
        self._recent: deque[float] = deque(maxlen=LEVEL)
        self._best = math.inf
        self._best_step = 0
        self._logarithmic = True

    def observe(self, step: int, value: float, noise: SpikeDetector, silent: bool) -> Drift | None:
        """Take the next value; the drift that is now certain. `silent`: a rise is known of already, only watch."""
        if not math.isfinite(value):
            return None
        x = noise.transform(value)
        if x is None or self._logarithmic != noise.logarithmic:
            self._recent.clear()
            self._best, self._logarithmic = math.inf, noise.logarithmic
            if x is None:
                return None
        self._recent.append(x)
        if len(self._recent) < LEVEL or not noise.ready:
            return None
        level = median(self._recent)
        if level <= self._best:
            self._best, self._best_step = level, step
            return None
        margin, scale = noise.margin(self._best, self._deviations), noise.scale(self._best)
        if silent or level - self._best <= margin or scale == 0:  # 0: the loss stood at exactly zero until now
            return None
        deviations = (level - self._best) / scale
        limit = noise.invert(self._best + margin)
        return Drift(step, self._best_step, noise.invert(self._best), noise.invert(level), deviations, limit)

    def accept(self, step: int) -> None:
        """The rise is over, or reported for good: where the level is now is what it may not rise from."""
        if self._recent:
            self._best, self._best_step = median(self._recent), step

    def state_dict(self) -> dict[str, Any]:
        """Everything it knows, in plain numbers; None for a best that is not known yet."""
        best = None if math.isinf(self._best) else self._best
        return {
            "recent": list(self._recent),
            "best": best,
            "best_step": self._best_step,
            "logarithmic": self._logarithmic,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._recent = deque(state["recent"], maxlen=LEVEL)
        self._best = math.inf if state["best"] is None else float(state["best"])
        self._best_step, self._logarithmic = int(state["best_step"]), bool(state["logarithmic"])
