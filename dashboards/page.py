"""The frame around the panels: variables, links, annotations, and the text of a finished dashboard."""

from __future__ import annotations

import json
from typing import Any

from dashboards.colours import BAD, NEUTRAL, WARN
from dashboards.panels import RUN, SOURCE
from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as model

SERVER_URL = "http://optwatch:8000"
"""Where links to run pages and runbooks lead. Exporting for another address replaces this text in the JSON."""

RUN_PAGE = f"{SERVER_URL}/runs/"
RUNBOOKS = f"{SERVER_URL}/runbooks"

ANNOTATION_STEP = "15s"
"""Grafana samples annotations every 60 s unless told otherwise, which misses what is shorter."""


PAGES = {
    "optwatch-executive": ("Executive", "Success, cost and paging over weeks"),
    "optwatch-oncall": ("On-call", "What is broken, since when, whose it is, and what to do"),
    "optwatch-debug": ("Debug", "One run or several, from 'is it fine' to 'why'"),
}
"""Uid of each dashboard, and the name and hint of the links to it."""


def page(
    uid: str,
    title: str,
    description: str,
    *,
    variables: tuple[str, ...] = ("datasource", "project", "run_id", "rank", "layer"),
    begin: str = "now-1h",
    refresh: str = "30s",
) -> dashboard.Dashboard:
    """An empty, read-only dashboard with the variables, links and annotations that all of them share.

    A page about the whole fleet leaves out the variables after ``project``, and has no annotations: those of all runs
    at once would cover every panel.
    """
    built: dashboard.Dashboard = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["optwatch"])
        .readonly()
        .timezone("browser")
        .time(begin, "now")
        .refresh(refresh)
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
    )
    one_run = "run_id" in variables
    for name, variable in _variables(one_run).items():
        if name in variables:
            built.with_variable(variable)
    for annotation in _annotations() if one_run else ():
        built.annotation(annotation)
    for other, (name, hint) in PAGES.items():
        if other != uid:
            built.link(_link(name, f"/d/{other}", hint, icon="dashboard").target_blank(False).include_vars(True))
    if one_run:
        built.link(_link("Run page", RUN_PAGE + "${run_id}", "What the server knows of the run: events, alerts, ranks"))
    else:
        built.link(_link("Runs", SERVER_URL + "/", "All runs the server knows"))
    built.link(_link("Runbooks", RUNBOOKS, "What to do about an alert"))
    return built


def encode(built: dashboard.Dashboard) -> str:
    """The dashboard as JSON text: keys sorted, one newline at the end, the same bytes every time."""
    document: dict[str, Any] = json.loads(json.dumps(built.build(), cls=JSONEncoder))
    document["annotations"].setdefault("list", [])
    # The SDK always writes a placement, which moves links and annotations out of sight into the controls menu.
    for item in [*document["links"], *document["annotations"]["list"]]:
        item.pop("placement", None)
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _link(title: str, url: str, tooltip: str, icon: str = "external link") -> dashboard.DashboardLink:
    link: dashboard.DashboardLink = (
        dashboard.DashboardLink(title)
        .type(model.DashboardLinkType("link"))
        .icon(icon)
        .url(url)
        .tooltip(tooltip)
        .target_blank(True)
    )
    return link


def _variables(one_run: bool) -> dict[str, dashboard.DatasourceVariable | dashboard.QueryVariable]:
    # The fleet's own series also know the projects whose runs have all ended.
    projects = "optwatch_run_info" if one_run else "optwatch_fleet_runs_ended_total"
    newest = (
        "query_result(sort_desc(max by (run_id) (last_over_time(optwatch_last_step_timestamp_seconds[$__range])) "
        'and on (run_id) max by (run_id) (last_over_time(optwatch_run_info{project=~"$project"}[$__range]))))'
    )
    everything = model.VariableOption(selected=True, text="All", value="$__all")
    return {
        "datasource": dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"),
        "project": _query("project", "Project", f"label_values({projects}, project)")
        .include_all(True)
        .all_value(".*")
        .current(everything)
        .sort(model.VariableSort.ALPHABETICAL_ASC),
        # Newest first and no "All", which would be the default: a page opened without parameters shows the last run.
        "run_id": _query("run_id", "Run", newest).regex('/run_id="([^"]+)"/').multi(True),
        "rank": _query("rank", "Rank", f"label_values(optwatch_steps_total{{{RUN}}}, rank)")
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(model.VariableOption(selected=True, text=["0"], value=["0"]))
        .sort(model.VariableSort.NUMERICAL_ASC),
        "layer": _query("layer", "Layer", f"label_values(optwatch_layer_grad_norm{{{RUN}}}, layer)")
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(everything)
        .sort(model.VariableSort.NATURAL_ASC),
    }


def _query(name: str, label: str, query: str) -> dashboard.QueryVariable:
    variable: dashboard.QueryVariable = (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query({"query": query, "refId": name})
        .definition(query)
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .allow_custom_value(True)
    )
    return variable


def _annotations() -> list[dashboard.AnnotationQuery]:
    # A counter compared with itself one step ago marks each change once; increase() would draw it as a region.
    def grown(metric: str, matchers: str, by: str) -> str:
        selector = f"{metric}{{{RUN}{matchers}}}"
        return f"sum by (run_id, {by}) ({selector} - {selector} offset $__interval) > 0"

    firing = f'ALERTS{{alertstate="firing", {RUN}}}'
    shown_elsewhere = ', kind!~"nonfinite|loss_spike|grad_spike"'
    return [
        _annotation(
            "Non-finite", grown("optwatch_nonfinite_total", "", "source"), BAD, "NaN or Inf in {{source}}", "{{run_id}}"
        ),
        _annotation("Spikes", grown("optwatch_spikes_total", "", "signal"), WARN, "{{signal}} spike", "{{run_id}}"),
        _annotation(
            "Other events",
            grown("optwatch_events_total", shown_elsewhere, "kind, severity"),
            NEUTRAL.main,
            "{{kind}} ({{severity}})",
            "{{run_id}}",
        ),
        _annotation(
            "Alerts",
            f"{firing} unless {firing} offset $__interval",
            f"dark-{BAD}",
            "{{alertname}} begins to fire ({{severity}})",
            "{{run_id}}",
        ),
    ]


def _annotation(name: str, expr: str, colour: str, title: str, text: str) -> dashboard.AnnotationQuery:
    annotation: dashboard.AnnotationQuery = (
        dashboard.AnnotationQuery()
        .name(name)
        .datasource(SOURCE)
        .enable(True)
        .expr(expr)
        .step(ANNOTATION_STEP)
        .icon_color(colour)
        .title_format(title)
        .text_format(text)
        .tag_keys("run_id")
    )
    return annotation
