"""Jumps of a signal far outside of what its own noise does, for one value or for several."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

from .surprise import Surprise

RECENT = 50
"""Ordinary values all of which a jump has to exceed: where the signal has just been is nowhere to jump to."""
LASTING_CAP, LASTING_DRIFT, LASTING_LIMIT = 4.0, 2.0, 11.0
"""The sum of surprises, each at most the cap and less the drift, at which values are too high for too long (Page 1954,
doi:10.1093/biomet/41.1-2.100). Surprise of noise is 1 on average; the cap makes one value count for little."""
ORDINARY = 3.0
"""Surprise (one in twenty) below which a spike is over."""
LEAST_LASTING = 0.4
"""Part of the least increase that ends a spike, or keeps one of several values from beginning."""
OUTLIER = 3
"""Most values of an episode that was an outlier of the data: those are learned, and raise the bar for the next."""
NEW_LEVEL = 30
"""Values outside the band after which they are the new band."""
LIMIT_DEVIATIONS = 3.0


@dataclass(frozen=True, slots=True)
class Spike:
    """A spike that has just begun."""

    step: int
    value: float
    level: float
    """Median of the values before it."""
    deviations: float
    """How many robust standard deviations of the noise the value is above the level."""
    rarity: float
    """In how many steps the run's noise goes that high once, by its own tail."""
    lasting: bool
    """Whether it is no single value but several in a row that are too high together."""
    limit: float
    """The value below which the signal is back."""


class SpikeDetector:
    """Finds the steps at which a signal jumps up beyond its own noise.

    The level is the median of the last `window` ordinary values, as logarithms (as they are, once one was not
    positive), so that one outlier does not move it. A value is a spike where the run's noise, by its own tail
    (`Surprise`), goes that high less than once in `rarity` values, where it is `min_increase` above the level and above
    the last fifty ordinary values; several values in a row need less each. A spike is reported once, when it begins;
    its values do not join the band, unless thirty of them in a row make the new one; one by
    itself raises the bar for others like it. NaN and Inf change nothing here:
    they are another detector's. State is bounded.
    """

    def __init__(self, window: int, rarity: float, min_increase: float, warmup: int) -> None:
        self._window = window
        self._limit = math.log(rarity)
        self._min_increase = min_increase
        self._warmup = max(warmup, 8)
        self._surprise = Surprise()
        self._ordinary: deque[float] = deque(maxlen=max(window, RECENT))
        self._outside: list[float] = []
        self._peak = 0.0
        self._excess = 0.0
        self._seen = 0
        self.logarithmic = True
        """Whether levels are logarithms: until a value was not positive."""

    @property
    def ready(self) -> bool:
        """Whether the warm-up is over."""
        return self._seen > self._warmup

    def observe(self, step: int, value: float) -> Spike | None:
        """Take the next value; the spike that begins with it, if one does."""
        if not math.isfinite(value):
            return None
        if self.logarithmic and value <= 0:
            # A signal that crosses zero has no logarithm: start over with the values themselves.
            self._restart(logarithmic=False)
        x = math.log(value) if self.logarithmic else value
        self._seen += 1
        level = self.level()
        if level is None or not self.ready:
            if level is not None and self._seen > self._warmup // 3:
                self._surprise.learn(x - level, None)
            self._ordinary.append(x)
            return None
        return self._judge(step, value, x, level)

    def level(self) -> float | None:
        """Median of the last ordinary values (of their logarithms, see `transform`); None before the first."""
        return median(list(self._ordinary)[-self._window :]) if self._ordinary else None

    def margin(self, level: float, deviations: float) -> float:
        """How far above `level` is `deviations` of the noise and the least increase."""
        return max(deviations * self.scale(level), self._least(level))

    def scale(self, level: float) -> float:
        """Robust standard deviation of the noise about `level`."""
        return self._surprise.scale(1.0 if self.logarithmic else abs(level))

    def transform(self, value: float) -> float | None:
        """The value as levels are kept: its logarithm, or itself once one was not positive."""
        return (math.log(value) if value > 0 else None) if self.logarithmic else value

    def invert(self, x: float) -> float:
        """The value that `transform` made into `x`."""
        return math.exp(min(x, 700.0)) if self.logarithmic else x

    def _least(self, level: float) -> float:
        return math.log1p(self._min_increase) if self.logarithmic else self._min_increase * abs(level)

    def _judge(self, step: int, value: float, x: float, level: float) -> Spike | None:
        error, least = x - level, self._least(level)
        if error and self.scale(level) == 0:
            # A signal that leaves zero, where it stood exactly until now: its noise is yet to be known.
            self._restart(logarithmic=False)
            self._seen = 1
            self._ordinary.append(x)
            return None
        score, surprise = self._surprise.judge(error, 1.0 if self.logarithmic else abs(level))
        if self._outside:
            if surprise < ORDINARY or error < LEAST_LASTING * least:
                if len(self._outside) <= OUTLIER:
                    self._surprise.learn_outlier(self._peak, self._limit)
                self._outside.clear()
                self._ordinary.append(x)
                self._surprise.learn(error, score)
                return None
            self._outside.append(x)
            self._peak = max(self._peak, score)
            if len(self._outside) >= NEW_LEVEL:
                self._ordinary.extend(self._outside)
                self._outside.clear()
            return None
        self._excess = max(0.0, self._excess + min(surprise, LASTING_CAP) - LASTING_DRIFT)
        jump = surprise > self._limit and error > least and x > max(self._ordinary)
        lasting = self._excess > LASTING_LIMIT and error > LEAST_LASTING * least
        if not (jump or lasting):
            self._ordinary.append(x)
            self._surprise.learn(error, score)
            return None
        self._outside.append(x)
        self._peak, self._excess = score, 0.0
        return Spike(
            step,
            value,
            self.invert(level),
            score,
            math.exp(min(surprise, 700.0)),
            not jump,
            self.invert(level + self.margin(level, LIMIT_DEVIATIONS)),
        )

    def _restart(self, logarithmic: bool) -> None:
        self.logarithmic = logarithmic
        self._surprise = Surprise()
        self._ordinary.clear()
        self._outside.clear()
        self._excess, self._seen = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """Everything it knows, in plain numbers."""
        return {
            "surprise": self._surprise.state_dict(),
            "ordinary": list(self._ordinary),
            "outside": self._outside[:],
            "peak": self._peak,
            "excess": self._excess,
            "seen": self._seen,
            "logarithmic": self.logarithmic,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._restart(bool(state["logarithmic"]))
        self._surprise.load_state_dict(state["surprise"])
        self._ordinary.extend(state["ordinary"])
        self._outside.extend(state["outside"])
        self._peak, self._excess, self._seen = float(state["peak"]), float(state["excess"]), int(state["seen"])
