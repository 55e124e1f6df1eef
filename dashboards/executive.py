"""The executive dashboard: for leads, weekly. Do runs succeed, what do they cost, which to ask about?"""

from __future__ import annotations

from dashboards import promises, spending, weekly
from dashboards.page import page
from grafana_foundation_sdk.builders import dashboard


def executive() -> dashboard.Dashboard:
    """Build `optwatch-executive`. Daily bars count the 24 hours before their mark."""
    built = page(
        "optwatch-executive",
        "optwatch: executive",
        "Do runs succeed, what do they cost, and which should be asked about? Over 30 days, as long as Prometheus "
        "keeps its data.",
        variables=("datasource", "project"),
        begin="now-30d",
        refresh="5m",
    )
    for row, panels in (
        (dashboard.Row("Do we keep our promises?").id(100), promises.panels()),
        (dashboard.Row("Which runs to ask about").id(200), weekly.runs()),
        (dashboard.Row("Validation results").id(300), weekly.validation()),
        (dashboard.Row("Cost").id(400), spending.cost()),
        (dashboard.Row("Device hours").id(500), spending.devices()),
    ):
        built.with_row(row)
        for panel in panels:
            built.with_panel(panel)
    return built
