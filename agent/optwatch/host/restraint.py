"""Keeps what the agent costs under a share of step time, by reading less.

The cost is what its hooks take on the training thread and its host thread takes of a core. On CUDA the hooks' seconds
are those of launching: what the device itself spends is not in them.
"""

from __future__ import annotations

from dataclasses import dataclass

WINDOW = 64
"""Steps whose mean is judged: a multiple of every pace, so that a window holds as many readings as the next."""
MAX_STRETCH = 16
"""Most times longer than asked for that a rotation over weights and moments takes."""
MAX_GRADIENT_INTERVAL = 8
"""Most steps between two readings of the gradients."""
RECOVERY = 0.4
"""Share of the budget under which more is read again: twice as much costs at most twice as much, and stays under it."""
PAUSE = 10.0
"""Times the mean that a step counts as at most: what is longer is a pause, for validation or a checkpoint."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How much is read."""

    stretch: int = 1
    """Steps between two readings of a part of the weights and moments."""
    gradient_interval: int = 1
    """Steps between two readings of the gradients."""


@dataclass(slots=True)
class Change:
    """A decision: the pace from now on, and the measured share of step time that led to it."""

    pace: Pace
    share: float
    less: bool
    """Whether it reads less than before."""


class Restraint:
    """Decides the pace of one optimizer from what its steps cost. Knows no clock: seconds are given to it.

    Weights and moments are read half as often, and half as often again, while the cost is above the budget. Only when
    that is not enough are gradients read at every second, fourth, eighth step, and only where this alone can bring the
    cost under the budget: a NaN is best seen in the step that made it, and steps so short that the agent's fixed cost
    is above the budget would lose that for nothing.
    """

    def __init__(self, budget: float) -> None:
        self._budget = budget
        self.pace = Pace()
        self.share = 0.0
        """Of step time, over the last window; while there has been none, over the steps so far."""
        self._steps = 0
        self._windows = 0
        self._cost = self._gradient_cost = self._duration = 0.0

    def observe(self, cost: float, gradient_cost: float, duration: float) -> Change | None:
        """Take a step's seconds: of the agent in all, of reading gradients, and of the whole step; a decision if there
        is one, which is at the end of a window only."""
        if self._steps:
            duration = min(duration, PAUSE * self._duration / self._steps)
        self._steps += 1
        self._cost += cost
        self._gradient_cost += gradient_cost
        self._duration += duration
        if self._windows == 0 and self._duration > 0:
            self.share = self._cost / self._duration
        if self._steps < WINDOW or self._duration <= 0:
            return None
        self.share = self._cost / self._duration
        # The first window allocates and compiles: no decision from it.
        pace = self._next() if self._windows else self.pace
        self._windows += 1
        self._steps, self._cost, self._gradient_cost, self._duration = 0, 0.0, 0.0, 0.0
        if pace == self.pace:
            return None
        less = (pace.stretch, pace.gradient_interval) > (self.pace.stretch, self.pace.gradient_interval)
        self.pace = pace
        return Change(pace, self.share, less)

    def _next(self) -> Pace:
        stretch, interval = self.pace.stretch, self.pace.gradient_interval
        if self.share > self._budget:
            if stretch < MAX_STRETCH:
                return Pace(stretch * 2, interval)
            rest = self._cost - self._gradient_cost
            if interval < MAX_GRADIENT_INTERVAL and rest + self._gradient_cost / 2 <= self._budget * self._duration:
                return Pace(stretch, interval * 2)
        elif self.share < RECOVERY * self._budget:
            if interval > 1:
                return Pace(stretch, interval // 2)
            if stretch > 1:
                return Pace(stretch // 2, interval)
        return self.pace
