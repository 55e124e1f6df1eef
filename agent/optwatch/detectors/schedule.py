"""Jumps of the learning rate that no schedule makes."""

from __future__ import annotations

from dataclasses import dataclass

FACTOR = 10.0
"""Least factor between two steps that is a jump. Warm restarts rise by more, but to no rate that was never there."""


@dataclass(frozen=True, slots=True)
class Jump:
    """A jump of one group's learning rate."""

    group: int
    before: float
    after: float


class ScheduleDetector:
    """Finds a learning rate that goes up tenfold within one step, to more than twice what it has ever been.

    The first `warmup` steps are a warm-up's own. A schedule restored wrongly or a value off by powers of ten looks like
    this; cosine restarts and warm-ups do not.
    """

    def __init__(self, warmup: int) -> None:
        self._warmup = warmup
        self._seen = 0
        self._before: list[float] = []
        self._largest: list[float] = []

    def observe(self, rates: list[float]) -> Jump | None:
        """Take the learning rates of the next step, by group; the first jump among them, if there is one."""
        jump = None
        if len(rates) != len(self._before):  # groups were added: a new beginning
            self._before, self._largest, self._seen = list(rates), list(rates), 0
        for group, (rate, before, largest) in enumerate(zip(rates, self._before, self._largest, strict=True)):
            risen = before > 0 and rate >= FACTOR * before and rate > 2 * largest
            if jump is None and risen and self._seen >= self._warmup:
                jump = Jump(group, before, rate)
        self._before = list(rates)
        self._largest = [max(pair) for pair in zip(rates, self._largest, strict=True)]
        self._seen += 1
        return jump
