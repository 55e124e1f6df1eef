"""Charts of a recording as SVG geometry: worked out here, drawn by a template, readable without scripts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from optwatch_server import wire
from optwatch_server.runs.recordings import decode

from .numbers import shown

WIDTH, HEIGHT = 640, 210
LEFT, RIGHT, TOP, BOTTOM = 62, 628, 16, 182
LOG_RATIO = 30
"""From this ratio of largest to smallest on, positive values are drawn on a logarithmic axis."""
WORST = 5
RECENT = 16
"""Steps up to the incident whose largest value is set against the median of all."""
TABLE_STEPS = 12

Points = list[tuple[float, float]]
"""Step and value; a value may be NaN or infinite."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line: its SVG path, and where on the upper edge a value was not finite."""

    name: str
    path: str
    broken: list[tuple[float, str]]
    last: float


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart. Coordinates are those of its view box."""

    title: str
    summary: str
    logarithmic: bool
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marks: list[tuple[float, str]]
    """Critical events: where, and what they are."""


@dataclass(frozen=True, slots=True)
class Picture:
    """What the page shows of a recording."""

    charts: list[Chart]
    header: list[str]
    rows: list[list[str]]
    """The last steps as text, newest last."""
    worst: list[str]
    """Layers in the order of their guilt."""


@dataclass(slots=True)
class _Source:
    """The lines of one chart before they have places."""

    title: str
    lines: list[tuple[str, Points]] = field(default_factory=list)


def picture(recording: wire.Recording) -> Picture:
    """Return the charts of a recording, up to its end, with its incident marked."""
    steps = [table for table in recording.tables if table.name == "steps"]
    several = len(steps) > 1
    loss, norm, rate = _Source("Loss"), _Source("Gradient norm"), _Source("Learning rate")
    layers, parameters = _Source("Gradient norm of the worst layers"), _Source("Gradient norm of the worst parameters")
    ratios, weights = _Source("Update ratio of the worst layers"), _Source("Weight norm of the worst layers")
    worst: list[str] = []
    for table in steps:
        scope = f"{table.optimizer}: " if several else ""
        for source, column, name in (
            (loss, "loss", "loss"),
            (norm, "grad_norm", "at the step"),
            (norm, "grad_norm_before_clip", "before clipping"),
            (rate, "learning_rate", "learning rate"),
        ):
            if points := _column(table, column):
                source.lines.append((scope + name, points))
        here = _worst(table, "layer_grad_norm", recording)
        worst += [name for name, _ in here]
        layers.lines += [(scope + name, points) for name, points in here]
        parameters.lines += [(scope + name, points) for name, points in _worst(table, "parameter_grad_norm", recording)]
        for samples in recording.tables:
            if samples.name == "samples" and samples.optimizer == table.optimizer:
                for source, series in ((ratios, "layer_update_ratio"), (weights, "layer_weight_norm")):
                    members = _members(samples, series)
                    source.lines += [(scope + n, members[n]) for n, _ in here if members.get(n)]
    marks, span = _marks(recording), _span(steps)
    sources = (loss, norm, layers, parameters, ratios, weights, rate)
    charts = [_chart(source, span, marks) for source in sources if any(points for _, points in source.lines)]
    return Picture(charts, *_table(steps), worst[:WORST])


def _column(table: wire.RecordedTable, name: str) -> Points:
    values = zip(table.columns["step"], table.columns.get(name, ()), strict=False)
    return [(float(step), float(value)) for step, value in values if step is not None and value is not None]


def _members(table: wire.RecordedTable, name: str) -> dict[str, Points]:
    series = next((series for series in table.series if series.name == name), None)
    if series is None:
        return {}
    steps = [float(step) for step in table.columns["step"] if step is not None]
    columns = zip(series.members, decode(series, table.rows), strict=True)
    return {
        member: [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
        for member, values in columns
    }


def _worst(table: wire.RecordedTable, name: str, recording: wire.Recording) -> list[tuple[str, Points]]:
    """The members that broke first, or rose furthest above their own median before it, worst first."""
    members = _members(table, name)
    order = sorted(members, key=lambda member: (member != recording.layer, *_guilt(members[member], recording.step)))
    return [(member, members[member]) for member in order[:WORST] if members[member]]


def _guilt(points: Points, step: int | None) -> tuple[float, float]:
    """The first step up to the incident at which it was not finite, and minus the ratio of its largest recent value to
    its median: the worst has the smallest."""
    until = [(at, value) for at, value in points if step is None or at <= step]
    broken = next((at for at, value in until if not math.isfinite(value)), math.inf)
    values = [value for _, value in until if math.isfinite(value)]
    middle = statistics.median(values or [0.0])
    return broken, -max(values[-RECENT:]) / middle if middle > 0 else 0.0


def _marks(recording: wire.Recording) -> list[tuple[int, str]]:
    """The incident first, then other critical events that the recording holds."""
    marks = {}
    if recording.step is not None:
        marks[recording.step] = recording.reason
    for note in recording.notes:
        step = note.get("step")
        if note.get("severity") == "critical" and isinstance(step, int) and not isinstance(step, bool):
            marks.setdefault(step, str(note.get("kind", "")))
    return [(step, kind.replace("_", " ")) for step, kind in marks.items()][:8]


def _span(tables: Sequence[wire.RecordedTable]) -> tuple[float, float]:
    steps = [float(step) for table in tables for step in table.columns["step"] if step is not None]
    first, last = min(steps, default=0.0), max(steps, default=1.0)
    return first, last if last > first else first + 1


def _chart(source: _Source, span: tuple[float, float], marks: Iterable[tuple[int, str]]) -> Chart:
    first, last = span
    finite = [v for _, points in source.lines for step, v in points if math.isfinite(v) and step >= first]
    logarithmic = bool(finite) and min(finite) > 0 and max(finite) / min(finite) > LOG_RATIO
    low, high = _range(finite, logarithmic)

    def x(step: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (step - first) / (last - first), 1)

    def y(value: float) -> float:
        at = math.log10(value) if logarithmic else value
        return round(BOTTOM - (BOTTOM - TOP) * ((at - low) / (high - low)), 1)

    lines = []
    for name, all_points in source.lines:
        points = [(step, value) for step, value in all_points if step >= first]  # samples reach further back
        path, pen = [], "M"
        for step, value in points:
            if math.isfinite(value):
                path.append(f"{pen}{x(step)} {y(value)}")
                pen = "L"
            else:
                pen = "M"
        broken = [(x(step), shown(value)) for step, value in points if not math.isfinite(value)]
        lines.append(Line(name, "".join(path), _thinned(broken), points[-1][1] if points else math.nan))
    ticks = _log_ticks(low, high) if logarithmic else [low + (high - low) * part for part in (0, 0.5, 1)]
    return Chart(
        source.title,
        _summary(source, span),
        logarithmic,
        lines,
        [(x(step), shown(round(step))) for step in (first, first + (last - first) / 2, last)],
        [(y(value), shown(float(value))) for value in ticks],
        [(x(step), f"{kind} at step {step}") for step, kind in marks if first <= step <= last],
    )


def _thinned(broken: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """One mark where several would stand on top of each other."""
    kept: list[tuple[float, str]] = []
    for at, text in broken:
        if not kept or at - kept[-1][0] >= 4:
            kept.append((at, text))
    return kept


def _range(finite: Sequence[float], logarithmic: bool) -> tuple[float, float]:
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if logarithmic:
        return math.log10(low), math.log10(high)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value: in the middle
        room = abs(high) / 2 or 1.0
        return low - room, high + room
    return low, high


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, at most five; both ends where less than two lie between them."""
    powers = list(range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1))
    if len(powers) < 2:
        return [10**low, 10**high]
    return [10.0**power for power in powers[:: -(-len(powers) // 5)]]


def _summary(source: _Source, span: tuple[float, float]) -> str:
    """The chart in a sentence, for those who cannot see it."""
    parts = []
    for name, points in source.lines:
        broken = next((step for step, value in points if not math.isfinite(value)), None)
        known = [value for _, value in points if math.isfinite(value)]
        part = f"{name} from {shown(known[0])} to {shown(known[-1])}" if known else f"{name} never finite"
        parts.append(part + (f", not finite from step {round(broken)}" if broken is not None else ""))
    return f"Steps {round(span[0])} to {round(span[1])}: {'; '.join(parts)}."


def _table(tables: Sequence[wire.RecordedTable]) -> tuple[list[str], list[list[str]]]:
    """The last steps in numbers."""
    names = ("loss", "grad_norm", "grad_norm_before_clip", "learning_rate")
    header = ["step", "optimizer", *(name.replace("_", " ") for name in names)]
    rows = []
    for table in tables:
        columns = [table.columns.get(name) or [None] * table.rows for name in names]
        for i in range(max(0, table.rows - TABLE_STEPS), table.rows):
            step = table.columns["step"][i]
            cells = [shown(None if column[i] is None else float(column[i] or 0)) for column in columns]
            rows.append([shown(None if step is None else round(float(step))), table.optimizer, *cells])
    return header, rows
