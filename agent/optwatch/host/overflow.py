"""Steps that a gradient scaler skips: looking for its scale is no incident, never finding one is.

A scaler halves its scale at each overflow until gradients are finite, which takes some steps at the start of a run and
one every few thousand later. Where NaN is in gradients at any scale it skips for ever: no weight changes any more, and
nothing else would say so.
"""

from __future__ import annotations

from dataclasses import dataclass

from optwatch.record import StepRecord

SMALLEST_SCALE = 2.0**-14
"""Scale at which no overflow is one of float16: gradients would have to be above 65504 · 2¹⁴, or 10⁹."""


@dataclass
class _Skips:
    loads: int = 0
    since_load: int = 0
    in_a_row: int = 0


class Overflows:
    """Counts skipped steps by optimizer, and judges when they are no search for a scale any more.

    ``limit`` is the number of consecutive skips of one.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._skips: dict[str, _Skips] = {}

    def judge(self, record: StepRecord, scale: float | None, loads: int) -> None:
        """Say of a new record whether its step was skipped by a search (``overflow``) or in vain (``nonfinite``).

        In vain is from the `limit`-th skip in a row on, or from where the scale has fallen to `SMALLEST_SCALE`. The
        step becomes the count of steps taken: attempts less those skipped since the optimizer's own count was last
        read, at its ``loads``-th loading of state.
        """
        skips = self._skips.setdefault(record.optimizer, _Skips())
        if loads != skips.loads:
            skips.loads, skips.since_load = loads, 0
        if record.skipped is None:
            skips.in_a_row = 0
        else:
            skips.since_load += 1
            skips.in_a_row += 1
            record.skipped_in_a_row = skips.in_a_row
            if skips.in_a_row >= self._limit or (scale is not None and scale <= SMALLEST_SCALE):
                record.skipped = "nonfinite"
        record.step -= skips.since_load
