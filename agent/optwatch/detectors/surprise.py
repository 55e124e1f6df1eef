"""How surprising a value is, measured by the run's own past: light-tailed runs are judged sharply, heavy-tailed ones
mildly, with one setting for both."""

from __future__ import annotations

import math
from typing import Any

from .window import SortedWindow

ERRORS = 100
"""Values whose distance from the level before them gives the scale of the noise."""
SCORES = 1000
"""Scores whose largest part gives the tail of the noise."""
TAIL = 0.1
"""That part."""
PRIOR_START, PRIOR_INDEX, PRIOR_WEIGHT = 1.5, 0.2, 20
"""What is believed of the tail before it is known: that it begins here (in robust standard deviations) and has this
index, which is about a normal distribution's, with the weight of this many values."""
LIGHTEST_START = 1.2
"""A tail is not believed to begin lower than this."""
EARLY_SCALE = 0.1
"""Scale (of a logarithm: ten percent) that is believed at first; it fades out over the first `ERRORS` values."""
LEAST_SCALE = 1e-4
REFRESH = 10
"""Scores between two estimates of the tail, which moves slowly."""


class Surprise:
    """Gives each value its surprise: minus the logarithm of how often the run's own noise goes that high.

    A value's error is its distance from the level before it; errors are centred and scaled by the median and the median
    absolute deviation of the last hundred. Up to the point where the largest tenth of the last thousand scores begin,
    surprise grows in proportion; beyond it the tail is a power law whose index is Hill's estimate (Hill 1975,
    doi:10.1214/aos/1176343247) over that part. Rare outliers of the data thus raise their own bar, and a few true
    spikes do not, since each weighs by its logarithm only. State is bounded.
    """

    def __init__(self) -> None:
        self._errors = SortedWindow(ERRORS)
        self._scores = SortedWindow(SCORES)
        self._seen = 0
        self._start, self._index = PRIOR_START, PRIOR_INDEX
        self._since_estimate = 0

    def scale(self, unit: float) -> float:
        """Robust standard deviation of the errors. `unit` is 1 for logarithms, else the size of the level. 0 where that
        is 0 and most errors are: a signal that stands at exactly zero has no scale."""
        known = self._errors.deviation(self._errors.median()) if len(self._errors) else 0.0
        return max(known, unit * EARLY_SCALE * (1 - self._seen / ERRORS), unit * LEAST_SCALE)

    def judge(self, error: float, unit: float) -> tuple[float, float]:
        """Score (in robust standard deviations) and surprise (in nats, 0 or more) of an error; changes nothing. Without
        a scale nothing is a surprise."""
        scale = self.scale(unit)
        if scale == 0:
            return 0.0, 0.0
        center = self._errors.median() if len(self._errors) else 0.0
        score = (error - center) / scale
        at_start = -math.log(TAIL)
        if score > self._start:
            return score, at_start + math.log(score / self._start) / self._index
        # A score of 0 has half of them above it.
        return score, max(0.0, math.log(2) + (at_start - math.log(2)) * score / self._start)

    def learn(self, error: float, score: float | None) -> None:
        """Take an ordinary error and its score (None while there is none yet) for what the run's noise is."""
        self._errors.add(error)
        self._seen += 1
        if score is not None:
            self._learn_score(score)

    def learn_outlier(self, score: float, limit: float) -> None:
        """Take a score that stood out by itself, as no more than one whose surprise is `limit`: where outliers are
        what the data has, they are what is to be expected."""
        self._learn_score(min(score, self._start * math.exp(self._index * (limit + math.log(TAIL)))))

    def _learn_score(self, score: float) -> None:
        self._scores.add(score)
        self._since_estimate += 1
        if self._since_estimate >= REFRESH:
            self._estimate()

    def _estimate(self) -> None:
        self._since_estimate = 0
        tail = self._scores.largest(round(TAIL * len(self._scores)))
        if not tail:
            return
        share = len(self._scores) / SCORES
        self._start = max(LIGHTEST_START, share * tail[0] + (1 - share) * PRIOR_START)
        logarithms = sum(math.log(score / tail[0]) for score in tail) if tail[0] > 0 else 0.0
        self._index = (PRIOR_WEIGHT * PRIOR_INDEX + logarithms) / (PRIOR_WEIGHT + len(tail))

    def state_dict(self) -> dict[str, Any]:
        """Everything it knows, in plain numbers."""
        return {
            "errors": self._errors.values(),
            "scores": self._scores.values(),
            "seen": self._seen,
            "tail": [self._start, self._index, self._since_estimate],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._errors.restore(state["errors"])
        self._scores.restore(state["scores"])
        self._seen = int(state["seen"])
        start, index, since = state["tail"]
        self._start, self._index, self._since_estimate = float(start), float(index), int(since)
