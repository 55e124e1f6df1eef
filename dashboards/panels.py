"""Constructors of panels, so that one subject has one colour, one legend and one axis style on every dashboard.

The SDK is typed for Python 3.11 and up, and this project is checked as 3.10, where its chained calls have no type and
its enum members are plain strings: hence the annotated results and ``Enum("value")``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dashboards.colours import BAD, GOOD, NEUTRAL, Hue
from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = common_model.DataSourceRef("prometheus", "${datasource}")
RUN = 'run_id=~"$run_id"'
SELECTED = f'{RUN}, rank=~"$rank"'
"""Matchers that every per-rank query carries: what the variables at the top of the page chose."""


def whole(metric: str, matchers: str = "", *, by: str = "run_id, optimizer", roots: str = "", share: str = "") -> str:
    """A statistic of the whole model, whichever ranks are chosen: rank 0 exports it, or all do, and alike.

    Where ranks do not add up themselves (``aggregation="promql"``) their parts are added up here: `roots` is the
    quantity whose sum has the statistic as its square root, `share` the one whose sum is divided by the number of
    entries. Without either the statistic does not add up, and is absent there. A sum counts only while all ranks are
    in it: as many as the run says that it has.
    """
    chosen = ", ".join(filter(None, (RUN, matchers)))
    given = f"max by ({by}) (optwatch_{metric}{{{chosen}}})"
    level = "optwatch_layer_shard_contribution" if metric.startswith("layer_") else "optwatch_shard_contribution"
    where = chosen if level.startswith("optwatch_layer") else RUN

    def added(quantity: str) -> str:
        return f'sum by ({by}) ({level}{{{where}, quantity="{quantity}"}})'

    ranks = f'group by (run_id, rank) (optwatch_shard_contribution{{{RUN}, quantity="{roots or share}"}})'
    whole_run = (
        f'count_values by (run_id) ("world_size", count by (run_id) ({ranks}))'
        f" and on (run_id, world_size) optwatch_run_info{{{RUN}}}"
    )
    complete = f"and on ({'run_id' if 'run_id' in by else ''}) ({whole_run})"
    if roots:
        return f"{given} or sqrt({added(roots)}) {complete}"
    if share:
        return f"{given} or {added(share)} / {added('second_moment_entries')} {complete}"
    return given


@dataclass(frozen=True, slots=True)
class Query:
    """One PromQL expression and the legend of its series; ``{{label}}`` in it becomes the label's value."""

    expr: str
    legend: str = "{{run_id}}/{{rank}}"

    def target(self, index: int, *, instant: bool = False, as_table: bool = False) -> prometheus.Dataquery:
        """The query as the SDK wants it, with a reference id made from its place in the panel."""
        query: prometheus.Dataquery = (
            prometheus.Dataquery()
            .ref_id(chr(ord("A") + index))
            .expr(self.expr)
            .legend_format("" if as_table else self.legend)
        )
        query.datasource(SOURCE)
        query.format(PromQueryFormat("table" if as_table else "time_series"))
        if instant:
            query.instant()
        else:
            query.range()
        return query


def extremes(per_rank: str) -> tuple[Query, Query]:
    """The highest and the lowest of all ranks of a run, whichever are chosen; nothing where it has only one."""
    several = f"and on (run_id) count by (run_id) ({per_rank}) > 1"
    return (
        Query(f"max by (run_id) ({per_rank}) {several}", "{{run_id}} highest rank"),
        Query(f"min by (run_id) ({per_rank}) {several}", "{{run_id}} lowest rank"),
    )


@dataclass(frozen=True, slots=True)
class Size:
    """Width in the 24 columns of the grid and height in its rows of 38 pixels."""

    width: int
    height: int = 8


def limits(*steps: tuple[float, str], base: str = GOOD) -> dashboard.ThresholdsConfig:
    """Thresholds: `base` below the first step, then each step's colour from its value on."""
    first = [model.Threshold(None, base)]
    config: dashboard.ThresholdsConfig = dashboard.ThresholdsConfig().mode(model.ThresholdsMode("absolute"))
    config.steps(first + [model.Threshold(value, colour) for value, colour in steps])
    return config


def graph(
    panel_id: int,
    title: str,
    description: str,
    *queries: Query,
    unit: str,
    colour: Hue,
    size: Size,
    log: Literal[2, 10] | None = None,
    limit: float | None = None,
    dashed: str | None = None,
    stacked: bool = False,
    beside: str | None = None,
    tones: tuple[tuple[str, int], ...] = (),
    fixed: dict[str, str] | None = None,
    steps: bool = False,
    daily: bool = False,
    bars: bool = False,
    points: bool = False,
    floor: float | None = None,
    minimum: float | None = None,
    reach: float | None = None,
    decimals: int | None = None,
    no_value: str | None = None,
) -> timeseries.Panel:
    """A time series in the tones of one subject.

    `log` is the base of a logarithmic axis, `limit` draws a dashed red line, `dashed` is a regular expression of series
    to draw dashed, `beside` of those that a stack leaves out and draws dashed over it, `tones` gives series a tone
    where names do not begin with a run, `fixed` gives the series of a name its colour, and `steps` is for counts, which
    hold their value between samples. `daily` takes one value a day, for queries over ``[1d]``, `bars` draws bars, and
    `points` marks each value. The axis goes down to `floor` and up to `reach` at least: Grafana scales a line of zeros
    to a hundred.
    """
    panel: timeseries.Panel = (
        timeseries.Panel()
        .id(panel_id)
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .span(size.width)
        .height(size.height)
        .color_scheme(dashboard.FieldColor().mode(model.FieldColorModeId("shades")).fixed_color(colour.main))
        .line_width(1.5)
        .fill_opacity(35 if stacked else 0)
        .show_points(common_model.VisibilityMode.NEVER)
        .span_nulls(False)
        .legend(_legend())
        .tooltip(common.VizTooltipOptions().mode(common_model.TooltipDisplayMode("multi")).sort(_DESCENDING))
        .targets([query.target(index) for index, query in enumerate(queries)])
    )
    if fixed is None:
        for pattern, properties in colour.overrides():
            panel.override_by_regexp(pattern, properties)
    for name, text in (fixed or {}).items():
        panel.override_by_name(name, [model.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": text})])
    for pattern, index in tones:
        panel.override_by_regexp(f"/{pattern}/", [colour.tone(index)])
    if log is not None:
        panel.scale_distribution(
            common.ScaleDistributionConfig().type(common_model.ScaleDistribution("log")).log(log),
        )
    if limit is not None:
        panel.thresholds(limits((limit, BAD), base="transparent"))
        panel.thresholds_style(
            common.GraphThresholdsStyleConfig().mode(common_model.GraphThresholdsStyleMode("dashed"))
        )
    if dashed is not None:
        panel.override_by_regexp(
            f"/{dashed}/", [model.DynamicConfigValue("custom.lineStyle", {"dash": [6, 4], "fill": "dash"})]
        )
    if beside is not None:
        panel.override_by_regexp(
            f"/{beside}/",
            [
                model.DynamicConfigValue("custom.stacking", {"mode": "none", "group": "B"}),
                model.DynamicConfigValue("custom.fillOpacity", 0),
                model.DynamicConfigValue("custom.lineStyle", {"dash": [6, 4], "fill": "dash"}),
                model.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": NEUTRAL.main}),
            ],
        )
    if stacked:
        panel.stacking(common.StackingConfig().mode(common_model.StackingMode("normal")).group("A"))
    if daily:
        panel.interval("1d")
    if points:
        panel.show_points(common_model.VisibilityMode("always")).point_size(6)
    if bars:
        panel.draw_style(common_model.GraphDrawStyle("bars")).fill_opacity(80).line_width(0)
    if steps:
        panel.line_interpolation(common_model.LineInterpolation("stepAfter"))
    if minimum is not None:
        panel.min(minimum)
    if floor is not None:
        panel.axis_soft_min(floor)
    if reach is not None:
        panel.axis_soft_max(reach)
    if decimals is not None:
        panel.decimals(decimals)
    if no_value is not None:
        panel.no_value(no_value)
    return panel


_DESCENDING = common_model.SortOrder.DESCENDING


def _legend() -> common.VizLegendOptions:
    legend: common.VizLegendOptions = (
        common.VizLegendOptions()
        .display_mode(common_model.LegendDisplayMode("list"))
        .placement(common_model.LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs([])
    )
    return legend


def number(
    panel_id: int,
    title: str,
    description: str,
    query: Query,
    *,
    unit: str,
    thresholds: dashboard.ThresholdsConfig,
    size: Size,
    decimals: int | None = None,
    mappings: list[model.ValueMapping] | None = None,
    no_value: str = "no data",
    filled: bool = False,
) -> stat.Panel:
    """One number, as it is now; `filled` colours the background, for what has to be seen first."""
    panel: stat.Panel = (
        stat.Panel()
        .id(panel_id)
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .span(size.width)
        .height(size.height)
        .thresholds(thresholds)
        .no_value(no_value)
        .color_mode(
            common_model.BigValueColorMode.BACKGROUND_SOLID if filled else common_model.BigValueColorMode.VALUE,
        )
        .graph_mode(common_model.BigValueGraphMode.NONE)
        .justify_mode(common_model.BigValueJustifyMode.CENTER)
        .orientation(common_model.VizOrientation.HORIZONTAL)
        .text_mode(common_model.BigValueTextMode.AUTO)
        # `last` and not `lastNotNull`: the latter would hide a NaN behind the number before it.
        .reduce_options(common.ReduceDataOptions().calcs(["last"]).fields("").values(False))
        .targets([query.target(0, instant=True)])
    )
    if decimals is not None:
        panel.decimals(decimals)
    if mappings is not None:
        panel.mappings(mappings)
    return panel
