"""How often to read: no more often than anybody sees, and within a share of step time.

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
SHORT, LONG = 0.75, 2.0
"""Times what a rotation is to take that it takes at least and at most, before it is stretched to twice or half as many
steps: so far apart that it never goes back and forth."""
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
    """A decision: the pace from now on."""

    pace: Pace
    share: float
    """Of step time that the agent took."""
    step_seconds: float
    less: bool
    """Whether it reads less than before."""
    for_cost: bool
    """Whether that share is the reason, and not how long a rotation takes."""


class Restraint:
    """Decides the pace of one optimizer from how long its steps take and what they cost. Knows no clock: it is told.

    Where a rotation over weights and moments takes less time than it is to, it is stretched, as soon as the first has
    shown that. While the cost is above the budget, they are read half as often, and half as often again. Only when that
    is not enough are gradients read at every second, fourth, eighth step, and only where this alone can bring the cost
    under the budget: a NaN is best seen in the step that made it, and steps so short that the agent's fixed cost is
    above the budget would lose that for nothing.

    Args:
        budget: share of step time.
        rotation_steps: that a rotation takes, unless it is stretched.
        rotation_seconds: that it is to take at least, about.
    """

    def __init__(self, budget: float, rotation_steps: int = 1, rotation_seconds: float = 0.0) -> None:
        self._budget = budget
        self._rotation_steps = rotation_steps
        self._rotation_seconds = rotation_seconds
        self._least = self._restrained = 1
        """What rotations are stretched by for their length, and for the cost: the larger counts."""
        self.pace = Pace()
        self.share = 0.0
        """Of step time, over the last window; while there has been none, over the steps so far."""
        self._steps = 0
        self._windows = 0
        self._cost = self._gradient_cost = self._duration = 0.0

    def observe(self, cost: float, gradient_cost: float, duration: float) -> Change | None:
        """Take a step's seconds: of the agent in all, of reading gradients, and of the whole step; a decision if there
        is one, which is at the end of a window, or of the first rotation."""
        if self._steps:
            duration = min(duration, PAUSE * self._duration / self._steps)
        self._steps += 1
        self._cost += cost
        self._gradient_cost += gradient_cost
        self._duration += duration
        if self._windows == 0 and self._duration > 0:
            self.share = self._cost / self._duration
        ends = self._steps >= WINDOW
        if self._duration <= 0 or not (ends or (self._windows == 0 and self._steps == self._rotation_steps)):
            return None
        step_seconds = self._duration / self._steps
        self._stretch_for_length(step_seconds)
        interval = self.pace.gradient_interval
        before = self._restrained, interval
        if ends:
            self.share = self._cost / self._duration
            if self._windows:  # the first allocates and compiles: what it costs says nothing
                interval = self._restrain(interval)
            self._windows += 1
            self._steps, self._cost, self._gradient_cost, self._duration = 0, 0.0, 0.0, 0.0
        pace = Pace(max(self._least, self._restrained), interval)
        if pace == self.pace:
            return None
        less = (pace.stretch, pace.gradient_interval) > (self.pace.stretch, self.pace.gradient_interval)
        self.pace = pace
        return Change(pace, self.share, step_seconds, less, before != (self._restrained, interval))

    def _stretch_for_length(self, step_seconds: float) -> None:
        seconds = self._rotation_steps * step_seconds
        while self._least < MAX_STRETCH and seconds * self._least < SHORT * self._rotation_seconds:
            self._least *= 2
        while self._least > 1 and seconds * self._least > LONG * self._rotation_seconds:
            self._least //= 2

    def _restrain(self, interval: int) -> int:
        """Read less where the last window has cost too much, and more where it was cheap; the interval of gradients."""
        stretch = max(self._least, self._restrained)
        if self.share > self._budget:
            rest = self._cost - self._gradient_cost
            if stretch < MAX_STRETCH:
                self._restrained = stretch * 2
            elif interval < MAX_GRADIENT_INTERVAL and rest + self._gradient_cost / 2 <= self._budget * self._duration:
                return interval * 2
        elif self.share < RECOVERY * self._budget:
            if interval > 1:
                return interval // 2
            self._restrained = max(1, self._restrained // 2)
        return interval
