"""The names of batches that training code gives, so that an event can say which batch it was."""

from __future__ import annotations

from torch import Tensor

BATCH_ID = "batch_id"
"""Name under which ``monitor.log`` takes them."""
MAX_BATCHES, MAX_LENGTH = 16, 200
"""Most names of one step that are kept, the last ones, and most characters of one."""


class BatchIds:
    """Those given since the step before. The optimizers that step after the same batch all have it."""

    def __init__(self) -> None:
        self._given: list[str | int | float] = []
        self._had: set[str] = set()

    def add(self, value: float | str | Tensor) -> None:
        """Take the name of a batch, for the step that comes next."""
        if self._had:
            self._given, self._had = [], set()
        plain = value.item() if isinstance(value, Tensor) else value
        self._given.append(plain[:MAX_LENGTH] if isinstance(plain, str) else plain)
        del self._given[:-MAX_BATCHES]

    def of(self, optimizer: str) -> list[str | int | float]:
        """The batches of this optimizer's step; none where it has stepped since they were given."""
        if optimizer in self._had:
            return []
        self._had.add(optimizer)
        return list(self._given)
