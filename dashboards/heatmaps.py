"""Heat maps of one row a series: layers of a run, or ranks of all runs."""

from __future__ import annotations

from dashboards.panels import SOURCE, Query, Size
from grafana_foundation_sdk.builders import heatmap
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode, HeatmapColorScale


def layers(panel_id: int, title: str, description: str, by_layer: str, *, scheme: str, size: Size) -> heatmap.Panel:
    """A heat map of one row a layer, coloured by the power of ten of an expression of `by_layer`.

    Grafana has no logarithmic colour scale, and layers differ by decades: hence the logarithm in the query. Series come
    in alphabetical order, in which ``h.10`` comes before ``h.2`` and ``h.2-3``: hence the zero before a single digit.
    """
    padded = by_layer
    for digit in ("([^0-9]*)([0-9])([^0-9].*)?", "(.*[0-9]-)([0-9])([^0-9].*)?"):
        padded = f'label_replace({padded}, "layer", "${{1}}0${{2}}${{3}}", "layer", "{digit}")'
    query = Query(f"log10({padded})", "{{layer}}")
    return _heat(
        panel_id, title, description, query, _colours(scheme), size, unit="none", cell="prefix:10^", decimals=1
    )


def shares(panel_id: int, title: str, description: str, ratio: str, *, scheme: str, size: Size) -> heatmap.Panel:
    """A heat map of one row a rank, for an expression of `ratio` by run_id and rank; the shades span 0 to 1.

    Rows come in the order of their labels' names, by which rank 0 of all runs would precede rank 1: hence the join into
    one label. Grafana takes a missing value for 0 and would paint it: hence a 0 that is a little more, and the filter.
    """
    joined = f'label_join({ratio}, "instance", "/", "run_id", "rank")'
    query = Query(f"clamp_min(max by (instance) ({joined}), 0.001)", "{{instance}}")
    colours = _colours(scheme).min(0).max(1)
    return _heat(
        panel_id,
        title,
        description,
        query,
        colours,
        size,
        unit="percentunit",
        cell="percentunit",
        decimals=0,
        hidden=0.0005,
    )


def _colours(scheme: str) -> heatmap.HeatmapColorOptions:
    options: heatmap.HeatmapColorOptions = (
        heatmap.HeatmapColorOptions()
        .mode(HeatmapColorMode("scheme"))
        .scheme(scheme)
        .scale(HeatmapColorScale("exponential"))
        .exponent(1)
        .steps(64)
    )
    return options


def _heat(
    panel_id: int,
    title: str,
    description: str,
    query: Query,
    colours: heatmap.HeatmapColorOptions,
    size: Size,
    *,
    unit: str,
    cell: str,
    decimals: int,
    hidden: float = -1000,
) -> heatmap.Panel:
    panel: heatmap.Panel = (
        heatmap.Panel()
        .id(panel_id)
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .cell_values(heatmap.CellValues().unit(cell).decimals(decimals))
        .span(size.width)
        .height(size.height)
        .calculate(False)
        .color(colours)
        # The default hides values up to 1e-9, which for logarithms would be everything below one.
        .filter_values(heatmap.FilterValueRange().le(hidden))
        .cell_gap(0)
        .y_axis(heatmap.YAxisConfig().reverse(True).axis_placement(common_model.AxisPlacement.LEFT))
        .show_legend()
        .max_data_points(200)
        .targets([query.target(0)])
    )
    return panel
