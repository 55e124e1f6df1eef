"""The Prometheus text format (0.0.4) from a table, with the text of names and labels made once.

Names and labels do not change between scrapes, only numbers do, and a renderer that makes all of it anew holds the
interpreter's lock for hundreds of milliseconds at 20 000 series, which training would notice. What this writes is what
prometheus-client's `generate_latest` writes of the same table: byte for byte, but that numbers of a full block have all
of their seventeen digits. To find the fewest that say the same takes Python twice as long.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.utils import floatToGoString

from optwatch.catalogue import DURATION_BUCKETS, METRICS, Metric

from .table import Labels, Table, named

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LINES_A_BLOCK = 200
"""Lines handed on at once: the whole text is never in memory, and other threads run in between."""
_PLAIN = 1e6
"""Below it a number is written as Python writes it; above, Go switches to exponents."""
_EXACT, _SHORTEST = "%.17g\n", "%s\n"
"""The end of a line in a template. No label has a line's end in it."""


@dataclass(frozen=True, slots=True)
class _Lines:
    """The text of one metric's series."""

    labels: list[Labels]
    """In the table's order."""
    templates: list[str]
    """Of a block of lines each."""


class Exposition:
    """Renders one table. Keeps the text of each series, and none of series that are gone."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._common = dict(table.common)
        self._heads = {metric.name: _head(metric) for metric in METRICS}
        self._lines: dict[str, _Lines] = {metric.name: _Lines([], []) for metric in METRICS}
        self._histograms: dict[tuple[str, Labels], list[str]] = {}

    def blocks(self) -> Iterator[bytes]:
        """The text, in blocks of whole lines, UTF-8."""
        values, histograms = self._table.read()
        pending: list[str] = []
        waiting = 0
        for metric in METRICS:
            pending.append(self._heads[metric.name])
            if metric.kind == "histogram":
                for scope, (counts, total) in histograms.items():
                    pending += self._histogram(metric, scope, counts, total)
                continue
            numbers = list(values[metric.name].values())
            for i, template in enumerate(self._templates(metric, values[metric.name])):
                block = numbers[i * LINES_A_BLOCK : (i + 1) * LINES_A_BLOCK]
                pending.append(_filled(template, block))
                waiting += len(block)
                if waiting >= LINES_A_BLOCK:
                    yield "".join(pending).encode()
                    pending.clear()
                    waiting = 0
        yield "".join(pending).encode()

    def _templates(self, metric: Metric, series: dict[Labels, float]) -> list[str]:
        """Of each block of the metric's lines: made anew when its series are others than at the last scrape."""
        labels = list(series)
        if labels != self._lines[metric.name].labels:
            starts = [self._start(metric.name, named(metric, each)).replace("%", "%%") for each in labels]
            blocks = [starts[i : i + LINES_A_BLOCK] for i in range(0, len(starts), LINES_A_BLOCK)]
            self._lines[metric.name] = _Lines(labels, [_EXACT.join([*block, ""]) for block in blocks])
        return self._lines[metric.name].templates

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


def _filled(template: str, numbers: list[float]) -> str:
    if len(numbers) == LINES_A_BLOCK and math.isfinite(sum(numbers)):  # %g writes NaN and Inf as Prometheus does not
        return template % tuple(numbers)
    return template.replace(_EXACT, _SHORTEST) % tuple(map(_text, numbers))


def _text(value: float) -> str:
    return repr(value) if -_PLAIN < value < _PLAIN else _large(value)  # NaN is not


def _large(value: float) -> str:
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]


def _head(metric: Metric) -> str:
    text = metric.help.replace("\\", r"\\").replace("\n", r"\n")
    return f"# HELP {metric.name} {text}\n# TYPE {metric.name} {metric.kind}\n"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
