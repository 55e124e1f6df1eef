"""Validation that has become worse than it was."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .window import SortedWindow

NAME = re.compile(r"(val|valid|validation|eval|evaluation|test)([^a-z]|$)", re.IGNORECASE)
"""How the name of a value from a fixed set begins."""
FALLS = re.compile(r"loss|perplexity|ppl|error|nll|bpb|wer|cer|mse|mae|rmse", re.IGNORECASE)
RISES = re.compile(r"acc|f1|auc|bleu|rouge|precision|recall|score|reward|iou", re.IGNORECASE)
IN_A_ROW = 2
"""Evaluations that have to be worse: one noisy one is not it."""
LEAST_KNOWN = 3
RISES_KEPT = 50
"""Rises from one evaluation to the next whose median gives their noise."""
RISE_DEVIATIONS = 0.954
"""Median rise between two of the same normal distribution, over its standard deviation: 0.674 · √2."""
DEVIATIONS = 6.0
"""The best of some hundred evaluations is three deviations below their middle already."""
MAX_METRICS = 20


@dataclass(frozen=True, slots=True)
class Regression:
    """A metric that is well behind its best."""

    metric: str
    value: float
    best: float
    best_step: int


def direction(name: str, target: tuple[str, Literal["min", "max"]] | None = None) -> Literal["min", "max"] | None:
    """Whether a logged value is validation whose better side is known from its name or from the run's target."""
    if target is not None and name == target[0] and name != "loss":
        return target[1]
    if not NAME.match(name):
        return None
    if FALLS.search(name):
        return "min"
    return "max" if RISES.search(name) else None


class ValidationDetector:
    """Finds a metric that was worse than its best by `least` of its size and by six of its own robust standard
    deviations, twice in a row. Said once until it is back within half of that. State is bounded; NaN is left out.
    """

    def __init__(self, least: float, target: tuple[str, Literal["min", "max"]] | None = None) -> None:
        self._least = least
        self._target = target
        self._metrics: dict[str, _Metric] = {}

    def observe(self, name: str, value: float, step: int) -> Regression | None:
        """Take one logged value; the regression that is now certain."""
        if not math.isfinite(value) or (better := direction(name, self._target)) is None:
            return None
        if name not in self._metrics and len(self._metrics) >= MAX_METRICS:
            return None
        metric = self._metrics.setdefault(name, _Metric())
        sign = 1.0 if better == "min" else -1.0
        best = metric.observe(sign * value, step, self._least)
        return None if best is None else Regression(name, value, sign * best[0], best[1])

    def state_dict(self) -> dict[str, Any]:
        """Everything it knows, in plain numbers."""
        return {name: metric.state_dict() for name, metric in self._metrics.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for name, saved in state.items():
            self._metrics.setdefault(name, _Metric()).load_state_dict(saved)


class _Metric:
    """One metric that ought to fall."""

    def __init__(self) -> None:
        self._rises = SortedWindow(RISES_KEPT)
        self._last: float | None = None
        self._best = math.inf
        self._best_step = 0
        self._seen = 0
        self._worse: deque[bool] = deque(maxlen=IN_A_ROW)
        self._said = False

    def observe(self, value: float, step: int, least: float) -> tuple[float, int] | None:
        """Take the next value; the best value and its step where it is well behind them now."""
        noise = self._rises.median() / RISE_DEVIATIONS if len(self._rises) else 0.0
        margin = max(least * abs(self._best), DEVIATIONS * noise) if self._last is not None else math.inf
        behind = value - self._best
        self._worse.append(behind > margin)
        if behind <= margin / 2:
            self._said = False
        found = None
        if self._seen >= LEAST_KNOWN and len(self._worse) == IN_A_ROW and all(self._worse) and not self._said:
            self._said = True
            found = (self._best, self._best_step)
        # A fall is what training does, and a rise beyond the margin what is looked for: others are noise.
        if self._last is not None and value > self._last and behind <= margin:
            self._rises.add(value - self._last)
        if value < self._best:
            self._best, self._best_step = value, step
        self._last = value
        self._seen += 1
        return found

    def state_dict(self) -> dict[str, Any]:
        return {
            "rises": self._rises.values(),
            "last": self._last,
            "best": None if math.isinf(self._best) else self._best,
            "best_step": self._best_step,
            "seen": self._seen,
            "worse": list(self._worse),
            "said": self._said,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._rises.restore(state["rises"])
        self._last = state["last"]
        self._best = math.inf if state["best"] is None else float(state["best"])
        self._best_step, self._seen = int(state["best_step"]), int(state["seen"])
        self._worse = deque(map(bool, state["worse"]), maxlen=IN_A_ROW)
        self._said = bool(state["said"])
