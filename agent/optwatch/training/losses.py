"""The losses that a step trained on."""

from __future__ import annotations

from torch import Tensor

from .taps import MicroBatch


class Losses:
    """Losses of the backward passes since the last step of any optimizer of the run.

    The optimizers of one run share them: the first to step claims what came in; one that steps with nothing new (Muon
    and AdamW after one backward) reports the same losses again.
    """

    def __init__(self) -> None:
        self._pending: list[MicroBatch] = []
        self._claimed: list[MicroBatch] = []
        self._seconds = 0.0

    def add(self, batches: list[MicroBatch], seconds: float) -> None:
        """Keep the micro-batches of a backward pass, at which it has taken so long to look."""
        self._seconds += seconds
        self._pending.extend(batches)
        # A process that calls backward() without ever stepping must not grow: the oldest go.
        del self._pending[:-10_000]

    def claim(self) -> list[MicroBatch]:
        """The micro-batches that the step now beginning trains on."""
        if self._pending:
            self._claimed, self._pending = self._pending, []
        return self._claimed

    def spent(self) -> float:
        """Seconds that looking at backward passes has taken of the training thread since this was last asked."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def take(self) -> list[MicroBatch]:
        """Those that came in since the last claim; empty where none did."""
        return self.claim() if self._pending else []

    def drop(self) -> None:
        """Forget what came in: no step was trained on it."""
        self._pending = []

    @property
    def scale(self) -> Tensor | None:
        """What the loss of the last backward pass was scaled by, and so are the gradients: 0-d, on the device."""
        batches = self._pending or self._claimed
        return batches[-1].scale if batches else None
