"""The on-call dashboard: what is broken, since when, whose it is, and what to do, on one screen."""

from __future__ import annotations

from dashboards import aftermath, service, triage
from dashboards.page import page
from grafana_foundation_sdk.builders import dashboard


def oncall() -> dashboard.Dashboard:
    """Build `optwatch-oncall`. All of the first row has to fit 1600 × 900 pixels."""
    built = page(
        "optwatch-oncall",
        "optwatch: on-call",
        "What is broken, since when, whose it is, and what to do. The first screen is for the one who was woken.",
        variables=("datasource", "project"),
        begin="now-3h",
        refresh="10s",
    )
    for row, panels in (
        (dashboard.Row("What is broken, and since when?").id(100), triage.panels()),
        (dashboard.Row("What happened before").id(200), aftermath.panels()),
        (dashboard.Row("Is optwatch itself well?").id(300), service.panels()),
    ):
        built.with_row(row)
        for panel in panels:
            built.with_panel(panel)
    return built
