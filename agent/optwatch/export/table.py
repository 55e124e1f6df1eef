"""The latest value of every series: written by the host thread, read at scrape time. Made from the catalogue."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from prometheus_client.core import Metric as Family

from optwatch.catalogue import BY_NAME, DURATION_BUCKETS, METRICS, RUN_WIDE, Metric, severities

Labels = tuple[str, ...]


class Table:
    """Latest values by metric and label values, as a custom collector of prometheus-client.

    Every counter whose label values are known exists as 0 from the start: a counter born at 1 never makes
    ``increase()`` fire. Gauges appear when first set. One lock guards it, which the training thread never takes.
    """

    def __init__(self, common: Mapping[str, str]) -> None:
        self._lock = threading.Lock()
        self._common = tuple(common.items())
        self._values: dict[str, dict[Labels, float]] = {metric.name: {} for metric in METRICS}
        self._buckets: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = {}

    def begin(self, scopes: Sequence[Labels]) -> None:
        """Give every counter its zero. ``scopes`` are values of the label ``optimizer``, or ``[()]`` for a lone one."""
        for metric in METRICS:
            for scope in [()] if metric.name in RUN_WIDE else scopes:
                if metric.kind == "counter" and all(metric.values):
                    for labels in product(*metric.values):
                        if metric.name != "optwatch_events_total" or labels[1] in severities(labels[0]):
                            self.add(metric.name, 0, *labels, scope=scope)
                elif metric.kind == "histogram":
                    with self._lock:
                        self._buckets[scope] = [0] * (len(DURATION_BUCKETS) + 1)
                        self._sums[scope] = 0.0

    def set(self, name: str, value: float, *labels: str, scope: Labels = ()) -> None:
        """Set one series; ``labels`` are its values in the catalogue's order."""
        with self._lock:
            self._values[name][labels + scope] = float(value)

    def add(self, name: str, value: float, *labels: str, scope: Labels = ()) -> None:
        """Add to one series."""
        with self._lock:
            series = self._values[name]
            series[labels + scope] = series.get(labels + scope, 0.0) + float(value)

    def clear(self, name: str, scope: Labels = ()) -> None:
        """Forget every series of a metric in this scope: what it told is over."""
        with self._lock:
            kept = {k: v for k, v in self._values[name].items() if scope and k[-1:] != scope}
            self._values[name] = kept

    def observe_duration(self, seconds: float, scope: Labels = ()) -> None:
        """Count one step into optwatch_step_duration_seconds."""
        with self._lock:
            buckets = self._buckets[scope]
            at = next((i for i, bound in enumerate(DURATION_BUCKETS) if seconds <= bound), len(DURATION_BUCKETS))
            buckets[at] += 1
            self._sums[scope] += seconds

    def total(self, name: str) -> float:
        """Sum over all series of one metric."""
        with self._lock:
            return sum(self._values[name].values())

    def snapshot(self) -> dict[str, float]:
        """Latest values by series, as in ``optwatch_grad_norm{stage="at_step"}``, without the common labels."""
        with self._lock:
            return {
                _series(BY_NAME[name], labels): value
                for name, series in self._values.items()
                for labels, value in series.items()
            }

    @property
    def common(self) -> Sequence[tuple[str, str]]:
        """Labels and values that every series has."""
        return self._common

    def read(self) -> tuple[dict[str, dict[Labels, float]], dict[Labels, tuple[list[int], float]]]:
        """A copy: values by metric and label values; and of the step durations counts by bucket and sum, by scope."""
        with self._lock:
            copied = {name: dict(series) for name, series in self._values.items()}
            return copied, {scope: (list(counts), self._sums[scope]) for scope, counts in self._buckets.items()}

    def collect(self) -> Iterator[Family]:
        """All families with their samples, for a registry of prometheus-client."""
        copied, buckets = self.read()
        for metric in METRICS:
            # The library adds the suffix itself.
            base = metric.name.removesuffix("_total") if metric.kind == "counter" else metric.name
            family = Family(base, metric.help, metric.kind)
            for labels, value in copied[metric.name].items():
                family.add_sample(metric.name, self._label_pairs(metric, labels), value)
            if metric.kind == "histogram":
                for scope, (counts, total) in buckets.items():
                    self._add_histogram(family, metric, scope, counts, total)
            yield family

    def _label_pairs(self, metric: Metric, labels: Labels) -> dict[str, str]:
        return dict(self._common) | named(metric, labels)

    def _add_histogram(self, family: Family, metric: Metric, scope: Labels, counts: list[int], total: float) -> None:
        pairs = self._label_pairs(metric, scope)
        running = 0
        for bound, count in zip((*map(str, DURATION_BUCKETS), "+Inf"), counts, strict=True):
            running += count
            family.add_sample(f"{metric.name}_bucket", {**pairs, "le": bound}, running)
        family.add_sample(f"{metric.name}_count", pairs, running)
        family.add_sample(f"{metric.name}_sum", pairs, total)


def named(metric: Metric, labels: Labels) -> dict[str, str]:
    """Label values by name; one more than the catalogue lists is the optimizer's."""
    return dict(zip((*metric.labels, "optimizer"), labels, strict=False))


def _series(metric: Metric, labels: Labels) -> str:
    pairs = ",".join(f'{name}="{value}"' for name, value in named(metric, labels).items())
    return f"{metric.name}{{{pairs}}}" if pairs else metric.name
