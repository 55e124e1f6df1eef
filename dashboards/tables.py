"""Tables, whose columns each have their own look."""

from __future__ import annotations

from dataclasses import dataclass

from dashboards.colours import PLAIN
from dashboards.panels import SOURCE, Query, Size
from grafana_foundation_sdk.builders import dashboard, table
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import dashboard as model


@dataclass(frozen=True, slots=True)
class Column:
    """How one column of a table looks: its heading, its width in pixels, and what else differs from plain text."""

    heading: str
    width: int | None = None
    links: tuple[tuple[str, str], ...] = ()
    """Titles and URLs that each cell leads to; with several, a click opens a menu of them."""
    unit: str | None = None
    decimals: int | None = None
    verdict: dashboard.ThresholdsConfig | None = None
    """Thresholds that colour the text."""
    mappings: list[model.ValueMapping] | None = None
    """Texts of values, whose colours fill the cell."""

    def overrides(self) -> list[model.DynamicConfigValue]:
        """The column as field overrides. An empty cell would show the text of an empty table: hence the dash."""
        links = [{"targetBlank": True, "title": title, "url": url} for title, url in self.links]
        thresholds = None if self.verdict is None else self.verdict.build()
        cell = {"type": "color-background", "mode": "basic"} if self.mappings else {"type": "color-text"}
        given = {
            "noValue": "–",
            "custom.width": self.width,
            "links": links or None,
            "unit": self.unit,
            "decimals": self.decimals,
            "thresholds": thresholds,
            "mappings": self.mappings,
            "color": {"mode": "thresholds"} if self.verdict else None,
            "custom.cellOptions": cell if self.verdict or self.mappings else None,
        }
        return [model.DynamicConfigValue(name, value) for name, value in given.items() if value is not None]


def rows(
    panel_id: int,
    title: str,
    description: str,
    *queries: Query,
    columns: dict[str, Column],
    size: Size,
    no_value: str,
) -> table.Panel:
    """A table of instant queries, merged into one row for each set of labels that they share.

    `columns` maps fields to their looks, in order: a label, ``Value``, or ``Value #B`` where there are several queries.
    The unit is ``string``: with any other, Grafana formats labels that look like numbers.
    """
    values = {"Time", "Value", *(f"Value #{chr(ord('A') + index)}" for index in range(len(queries)))}
    organize = {
        "excludeByName": dict.fromkeys(sorted(values - set(columns)), True),
        "indexByName": {field: index for index, field in enumerate(columns)},
        "renameByName": {field: column.heading for field, column in columns.items()},
    }
    panel: table.Panel = (
        table.Panel()
        .id(panel_id)
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit("string")
        .span(size.width)
        .height(size.height)
        .no_value(no_value)
        .show_header(True)
        .cell_height(common_model.TableCellHeight("sm"))
        .color_scheme(dashboard.FieldColor().mode(model.FieldColorModeId("fixed")).fixed_color(PLAIN))
        .targets([query.target(index, instant=True, as_table=True) for index, query in enumerate(queries)])
    )
    if len(queries) > 1:
        panel.with_transformation(model.DataTransformerConfig("merge", options={}))
    panel.with_transformation(model.DataTransformerConfig("organize", options=organize))
    for column in columns.values():
        panel.override_by_name(column.heading, column.overrides())
    return panel
