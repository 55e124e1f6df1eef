"""Metric families for /metrics, made from the catalogue: a name that is not in it, or of another kind, is an error."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from optwatch_server.catalogue import BY_NAME, Metric


def _metric(name: str, kind: str) -> Metric:
    metric = BY_NAME[name]
    if metric.kind != kind:
        raise TypeError(f"{name} is a {metric.kind} in the catalogue and a {kind} here: make them the same")
    return metric


def gauge(name: str) -> GaugeMetricFamily:
    """Return an empty family of that gauge. Raises KeyError or TypeError where the catalogue says otherwise."""
    metric = _metric(name, "gauge")
    return GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)


def counter(name: str) -> CounterMetricFamily:
    """Return an empty family of that counter. Raises KeyError or TypeError where the catalogue says otherwise."""
    metric = _metric(name, "counter")
    return CounterMetricFamily(metric.name, metric.help, labels=metric.labels)


def histogram(name: str) -> HistogramMetricFamily:
    """Return an empty family of that histogram. Raises KeyError or TypeError where the catalogue says otherwise."""
    metric = _metric(name, "histogram")
    return HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)


def cumulative(bounds: Sequence[float], counts: Sequence[float]) -> list[tuple[str, float]]:
    """Return the buckets of a histogram as exported; `counts` has one more than `bounds`, for what is beyond all."""
    return list(zip([*(str(bound) for bound in bounds), "+Inf"], accumulate(counts), strict=True))
