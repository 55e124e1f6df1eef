"""Training that stands still while its process lives."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

USUAL = 50
"""Steps whose median interval is the usual one."""
TIMES_USUAL = 10.0
TIMES_LONGEST = 2.0
"""Times the longest pause that training has come back from: an evaluation of half an hour alarms once at most."""
BEFORE_SECOND_STEP = 6.0
"""Times the least: models compile in their first step."""


@dataclass(frozen=True, slots=True)
class Stall:
    """No step for far longer than usual."""

    seconds: float
    """Since the last step."""
    usual: float | None
    """Median interval between steps; None before the second."""


class StallDetector:
    """Finds that no step has come for ten usual intervals, twice the longest earlier pause, and `least` seconds.

    It has no clock of its own: `stepped` and `check` are told the time, in seconds of any steady clock. Said once until
    the next step. Before the first step it says nothing.
    """

    def __init__(self, least: float) -> None:
        self._least = least
        self._intervals: deque[float] = deque(maxlen=USUAL)
        self._longest = 0.0
        self._last: float | None = None
        self._said = False

    def stepped(self, now: float) -> None:
        """A step was taken at `now`."""
        if self._last is not None:
            self._intervals.append(now - self._last)
            self._longest = max(self._longest, now - self._last)
        self._last, self._said = now, False

    def paused(self, now: float) -> None:
        """Something announced (a checkpoint) held training until `now`: that is no interval between steps."""
        if self._last is not None:
            self._last = now

    @property
    def limit(self) -> float:
        """Seconds without a step that are a stall."""
        if not self._intervals:
            return BEFORE_SECOND_STEP * self._least
        return max(self._least, TIMES_USUAL * median(self._intervals), TIMES_LONGEST * self._longest)

    def check(self, now: float) -> Stall | None:
        """The stall that is certain at `now`, once."""
        if self._said or self._last is None or now - self._last <= self.limit:
            return None
        self._said = True
        return Stall(now - self._last, median(self._intervals) if self._intervals else None)
