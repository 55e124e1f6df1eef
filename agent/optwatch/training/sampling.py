"""When weights and moments are read: a part of the parameters at each step, in rotation.

Reading all of them every tenth step would make that step longer than the nine before it. A *rotation* goes over all
parameters once in `every` steps, each step reading a part of about the same cost.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

TENSOR_COST = 16_384
"""What reading one more tensor costs, in elements: parts are balanced by both."""


class Schedule:
    """Which parameters are read at which step, for one list of parameters.

    The same for the same sizes, whatever the process: ranks that share parameters read the same ones at each step.

    Args:
        sizes: elements of each parameter.
        every: steps that a rotation takes.
    """

    def __init__(self, sizes: Sequence[int], every: int) -> None:
        self._everything = list(range(len(sizes)))
        self._nothing: list[int] = []  # always the same list, as each part is: what is made of one is kept
        self._parts: list[list[int]] = [[] for _ in range(every)]
        lightest = [(0, part) for part in range(every)]
        for index in sorted(self._everything, key=lambda index: -sizes[index]):
            cost, part = lightest[0]
            heapq.heapreplace(lightest, (cost + sizes[index] + TENSOR_COST, part))
            self._parts[part].append(index)
        for indices in self._parts:
            indices.sort()

    def due(self, step: int, stretch: int = 1) -> tuple[list[int], bool]:
        """Indices of the parameters to read at a step, ascending, and whether a rotation is complete with them.

        Steps count from 1. The first reads everything, so that every signal exists at once; so that every moment has
        been met before a step when the first rotation ends, the second makes up for those that had none yet. With a
        `stretch` a part is read only every so many steps, and a rotation takes as many times longer.
        """
        every = len(self._parts)
        if step == 1 or (every == 1 and step % stretch == 0):
            return self._everything, True
        if step == 2 and stretch == 1:
            return sorted(self._parts[1] + self._parts[2 % every]), every == 2
        if step % stretch:
            return self._nothing, False
        turn = step // stretch % every
        return self._parts[turn], turn == 0

    def part(self, turn: int) -> list[int]:
        """Indices of the parameters of one part, ascending; ``every`` turns in a row have all parts."""
        return self._parts[turn % len(self._parts)]

    @property
    def everything(self) -> list[int]:
        """Indices of all parameters."""
        return self._everything
