"""When what was exported is what should have been."""

from __future__ import annotations

import math

from optwatch.catalogue import WHOLE_MODEL

RELATIVE = 1e-5
SKIPPED = 'optwatch_skipped_steps_total{reason="overflow"}'
SKIPPED_IN_VAIN = 'optwatch_skipped_steps_total{reason="nonfinite"}'
OF_EACH_RANK = (
    *("optwatch_loss", "optwatch_learning_rate", "optwatch_accumulation_steps", "optwatch_steps_total"),
    "optwatch_skipped_steps_total",
)


def difference(want: dict[str, float], got: dict[str, float], whole: bool) -> list[str]:
    """Each series that is missing, is there and should not be, or has another number, in words.

    Args:
        want: what is to be exported of the whole model and of this rank.
        got: everything that was.
        whole: whether this rank is the one that exports the whole model.
    """
    have = {series: x for series, x in got.items() if _family(series) in (*OF_EACH_RANK, *WHOLE_MODEL)}
    if not whole:
        want = {series: x for series, x in want.items() if _family(series) not in WHOLE_MODEL}
    said = [f"{series} is missing, should be {want[series]!r}" for series in sorted(want.keys() - have.keys())]
    said += [f"{series} is {have[series]!r}, should be unavailable" for series in sorted(have.keys() - want.keys())]
    said += [
        f"{series} is {have[series]!r}, should be {want[series]!r}"
        for series in sorted(want.keys() & have.keys())
        if not same(have[series], want[series])
    ]
    return said


def same(have: float, want: float) -> bool:
    """To `RELATIVE`; what is not a number equals only what is not."""
    return math.isclose(have, want, rel_tol=RELATIVE, abs_tol=1e-300) or (math.isnan(have) and math.isnan(want))


def _family(series: str) -> str:
    return series.partition("{")[0]
