"""The Prometheus text format (0.0.4) from a table, with the text of names and labels made once.

Names and labels do not change between scrapes, only numbers do, and a renderer that makes all of it anew holds the
interpreter's lock for hundreds of milliseconds at 20 000 series, which training would notice. What this writes is, byte
for byte, what prometheus-client's `generate_latest` writes of the same table.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from prometheus_client.utils import floatToGoString

from .catalogue import DURATION_BUCKETS, METRICS, Metric
from .table import Labels, Table, named

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LINES_A_BLOCK = 200
"""Lines handed on at once: the whole text is never in memory, and other threads run in between."""
_PLAIN = 1e6
"""Below it a number is written as Python writes it; above, Go switches to exponents."""


class Exposition:
    """Renders one table. Keeps one string for each series, and none of series that are gone."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._common = dict(table.common)
        self._heads = {metric.name: _head(metric) for metric in METRICS}
        self._starts: dict[str, dict[Labels, str]] = {metric.name: {} for metric in METRICS}
        self._histograms: dict[tuple[str, Labels], list[str]] = {}

    def blocks(self) -> Iterator[bytes]:
        """The text, in blocks of whole lines, UTF-8."""
        values, histograms = self._table.read()
        lines: list[str] = []
        for metric in METRICS:
            lines.append(self._heads[metric.name])
            if metric.kind == "histogram":
                for scope, (counts, total) in histograms.items():
                    lines += self._histogram(metric, scope, counts, total)
                continue
            series = values[metric.name]
            starts = self._starts_of(metric, series)
            items = iter(series.items())
            while block := list(islice(items, LINES_A_BLOCK)):
                lines += [
                    f"{starts[labels]}{value!r}\n"
                    if -_PLAIN < value < _PLAIN  # NaN is not
                    else f"{starts[labels]}{_large(value)}\n"
                    for labels, value in block
                ]
                if len(lines) >= LINES_A_BLOCK:
                    yield "".join(lines).encode()
                    lines.clear()
        yield "".join(lines).encode()

    def _starts_of(self, metric: Metric, series: dict[Labels, float]) -> dict[Labels, str]:
        starts = self._starts[metric.name]
        if len(starts) != len(series) or not starts.keys() >= series.keys():
            starts = self._starts[metric.name] = {
                labels: starts.get(labels) or self._start(metric.name, named(metric, labels)) for labels in series
            }
        return starts

    def _start(self, name: str, labels: dict[str, str]) -> str:
        pairs = ",".join(f'{key}="{_escape(value)}"' for key, value in sorted((self._common | labels).items()))
        return f"{name}{{{pairs}}} " if pairs else f"{name} "

    def _histogram(self, metric: Metric, scope: Labels, counts: list[int], total: float) -> Iterator[str]:
        starts = self._histograms.get((metric.name, scope))
        if starts is None:
            labels = named(metric, scope)
            bounds = (*map(str, DURATION_BUCKETS), "+Inf")
            starts = [self._start(f"{metric.name}_bucket", labels | {"le": bound}) for bound in bounds]
            starts += [self._start(f"{metric.name}_{part}", labels) for part in ("count", "sum")]
            self._histograms[metric.name, scope] = starts
        running = 0
        for start, count in zip(starts, counts, strict=False):
            running += count
            yield f"{start}{_large(running)}\n"
        yield f"{starts[-2]}{_large(running)}\n"
        yield f"{starts[-1]}{_large(total)}\n"


def _large(value: float) -> str:
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]


def _head(metric: Metric) -> str:
    text = metric.help.replace("\\", r"\\").replace("\n", r"\n")
    return f"# HELP {metric.name} {text}\n# TYPE {metric.name} {metric.kind}\n"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
