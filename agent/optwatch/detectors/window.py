"""A bounded window of numbers whose order statistics cost little."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable

NORMAL_CONSISTENCY = 1.4826
"""Median absolute deviation times this estimates a normal standard deviation (Rousseeuw & Croux 1993)."""


class SortedWindow:
    """The last `size` numbers, in order of arrival and sorted. Adding and the median absolute deviation cost O(log n)
    comparisons (and a shift of the sorted list), the median and the largest nothing."""

    def __init__(self, size: int) -> None:
        self._arrived: deque[float] = deque()
        self._sorted: list[float] = []
        self._size = size

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, value: float) -> None:
        """Take one finite number; the oldest leaves a full window."""
        if len(self._arrived) == self._size:
            del self._sorted[bisect_left(self._sorted, self._arrived.popleft())]
        self._arrived.append(value)
        insort(self._sorted, value)

    def clear(self) -> None:
        """Forget everything."""
        self._arrived.clear()
        self._sorted.clear()

    def median(self) -> float:
        """The median; the window must not be empty."""
        values, middle = self._sorted, len(self._sorted) // 2
        return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2

    def deviation(self, center: float) -> float:
        """Median absolute deviation from `center`, as a normal distribution's standard deviation. Of an even number of
        values it is the upper one of the two in the middle."""
        values = self._sorted
        nearest = len(values) // 2 + 1
        # The k nearest to the center lie side by side: search where they begin.
        low, high = 0, len(values) - nearest
        while low < high:
            middle = (low + high) // 2
            if center - values[middle] > values[middle + nearest] - center:
                low = middle + 1
            else:
                high = middle
        return NORMAL_CONSISTENCY * max(center - values[low], values[low + nearest - 1] - center)

    def largest(self, count: int) -> list[float]:
        """The `count` largest, ascending."""
        return self._sorted[len(self._sorted) - count :] if count else []

    def values(self) -> list[float]:
        """What is in it, oldest first."""
        return list(self._arrived)

    def restore(self, values: Iterable[float]) -> None:
        """Take over what `values()` of another window gave."""
        self._arrived = deque(list(values)[-self._size :])
        self._sorted = sorted(self._arrived)
