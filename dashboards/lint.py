"""House rules of dashboards, as checks of finished JSON: each takes a document and returns what is wrong with it.

Every problem names the panel by id and title, what was found and what is wanted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dashboards.promql import labels_used, selectors

Document = Mapping[str, Any]

LEGENDS = frozenset({"barchart", "histogram", "piechart", "timeseries", "trend"})
"""Types of panel whose series nobody can tell apart without a legend."""
VARIABLES = ["datasource", "project", "run_id", "rank", "layer"]
_ALERT_LABELS = frozenset({"alertname", "severity", "notify", "run_id", "rank", "run", "project", "team"})
PROMETHEUS = {"ALERTS": _ALERT_LABELS | {"alertstate"}, "ALERTS_FOR_STATE": _ALERT_LABELS}
"""Labels of the series that Prometheus makes of rules, which no catalogue names."""
TARGET_LABELS = frozenset({"job", "instance"})


def panels(document: Document) -> Iterator[Mapping[str, Any]]:
    """Every panel that draws data; rows are not among them."""
    for panel in document["panels"]:
        if panel["type"] == "row":
            yield from panel.get("panels", [])
        else:
            yield panel


def named(panel: Mapping[str, Any]) -> str:
    """How a problem calls a panel."""
    return f"panel {panel.get('id')} ({panel.get('title')!r})"


def described(document: Document) -> list[str]:
    """Every panel has a title, a description that says what good looks like, a unit and thresholds where it judges."""
    problems = []
    for panel in panels(document):
        defaults = panel.get("fieldConfig", {}).get("defaults", {})
        if not panel.get("title"):
            problems.append(f"{named(panel)} has no title")
        if "Good:" not in (panel.get("description") or ""):
            problems.append(f"{named(panel)} has a description without 'Good: ...', what good looks like")
        if not defaults.get("unit"):
            problems.append(f"{named(panel)} has no unit")
        if panel["type"] == "stat" and not defaults.get("thresholds", {}).get("steps"):
            problems.append(f"{named(panel)} is a stat without thresholds")
        if panel["type"] in LEGENDS and panel["options"]["legend"].get("showLegend") is not True:
            problems.append(f"{named(panel)} hides its legend, as the SDK does by default")
    return problems


def identified(document: Document) -> list[str]:
    """Ids are there, whole numbers and unique, rows included: links to panels hold on to them."""
    problems, seen = [], set()
    for panel in [*panels(document), *(p for p in document["panels"] if p["type"] == "row")]:
        number = panel.get("id")
        if not isinstance(number, int) or number < 1:
            problems.append(f"{named(panel)} has the id {number!r}: give a fixed whole number above 0")
        elif number in seen:
            problems.append(f"{named(panel)} has an id that another panel has")
        seen.add(number)
    return problems


def placed(document: Document) -> list[str]:
    """Panels lie within 24 columns and cover no other panel."""
    problems, taken = [], dict[tuple[int, int], str]()
    for panel in document["panels"]:
        at = panel["gridPos"]
        if at["x"] < 0 or at["x"] + at["w"] > 24 or at["w"] < 1 or at["h"] < 1:
            problems.append(f"{named(panel)} lies outside the 24 columns: {at}")
        cells = [(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])]
        covered = {taken[cell] for cell in cells if cell in taken}
        problems += [f"{named(panel)} lies over {other}" for other in sorted(covered)]
        taken.update(dict.fromkeys(cells, named(panel)))
    return problems


def framed(document: Document) -> list[str]:
    """The page is read-only and has a fixed uid, the variables, and annotations that are sampled often enough.

    A page about all runs ends the variables after the project.
    """
    problems = []
    if document.get("editable") is not False:
        problems.append("the dashboard is editable: changes belong in dashboards/")
    if not str(document.get("uid", "")).startswith("optwatch-"):
        problems.append(f"the dashboard's uid is {document.get('uid')!r}: give optwatch-NAME")
    names = [variable["name"] for variable in document["templating"]["list"]]
    if names not in (VARIABLES, VARIABLES[:2]):
        problems.append(f"the variables are {names}: give {VARIABLES}, or the first two of them")
    for annotation in document["annotations"]["list"]:
        if not annotation.get("step"):
            problems.append(f"annotation {annotation['name']!r} has no step: Grafana would look once a minute")
    for item in [*document["annotations"]["list"], *document["links"]]:
        if "placement" in item:
            problems.append(f"{item.get('name') or item.get('title')!r} has a placement, which hides it in a menu")
    for panel in panels(document):
        for source in [panel.get("datasource"), *(target.get("datasource") for target in panel["targets"])]:
            if not source or source.get("uid") != "${datasource}":
                problems.append(f"{named(panel)} reads from {source}: give the variable ${{datasource}}")
    return problems


def queries(document: Document) -> Iterator[tuple[str, str, str]]:
    """Where each PromQL expression stands, the expression, and the texts that name labels of its result."""
    for panel in panels(document):
        for target in panel["targets"]:
            yield f"{named(panel)} query {target['refId']}", target["expr"], target.get("legendFormat", "")
    for annotation in document["annotations"]["list"]:
        shown = annotation.get("titleFormat", "") + annotation.get("textFormat", "")
        yield f"annotation {annotation['name']!r}", annotation["expr"], shown
    for variable in document["templating"]["list"]:
        if variable["type"] == "query":
            text = variable["query"]["query"]
            call, _, inner = text.partition("(")
            expr = inner.rpartition(",")[0] if call == "label_values" else inner
            expr = expr if call == "label_values" else expr.rpartition(")")[0]
            label = inner.rpartition(",")[2].strip(" )") if call == "label_values" else "run_id"
            yield f"variable {variable['name']!r}", expr, f"{{{{{label}}}}}"


def known(document: Document, labels: Mapping[str, Iterable[str]]) -> list[str]:
    """Queries use only series of `labels` (scraped name to its labels), and only labels that these series have."""
    problems = []
    for where, expr, legend in queries(document):
        allowed = set(TARGET_LABELS)
        for name, matched in selectors(expr):
            if name in PROMETHEUS:
                own = set(PROMETHEUS[name])
            elif name in labels:
                own = {*labels[name], *TARGET_LABELS}
            else:
                problems.append(f"{where} asks for {name}, which no catalogue has")
                continue
            problems += [f"{where} matches {name} on {label}, which it has not" for label in sorted(matched - own)]
            allowed |= own
        used = labels_used(expr) | set(re.findall(r"{{\s*(\w+)\s*}}", legend))
        problems += [f"{where} uses the label {label}, which its series have not" for label in sorted(used - allowed)]
    return problems


def rated(document: Document) -> list[str]:
    """Rates follow the scrape interval: a fixed window is empty or jagged on somebody's Prometheus.

    Whole days are long enough for any of them, and so is the range shown, where one value is asked for.
    """
    problems = []
    asked = [(f"annotation {item['name']!r}", item["expr"], False) for item in document["annotations"]["list"]]
    for panel in panels(document):
        for target in panel["targets"]:
            asked.append((f"{named(panel)} query {target['refId']}", target["expr"], target.get("instant") is True))
    for where, expr, instant in asked:
        bare = re.sub(r'"[^"]*"', '""', expr)  # a matcher may hold brackets of its own
        for window, at in re.findall(r"\b(?:rate|irate|increase)\([^[]*\[([^]]*)\]( @ end\(\))?", bare):
            whole = re.fullmatch(r"[0-9]+d", window) or (window == "$__range" and (instant or at))
            if window != "$__rate_interval" and not whole:
                problems.append(f"{where} takes a rate over [{window}]: give [$__rate_interval]")
    return problems


def scraped(metrics: Iterable[Any], common: Iterable[str]) -> dict[str, set[str]]:
    """Names as they are scraped and the labels they have, from a catalogue: a histogram has three."""
    names: dict[str, set[str]] = {}
    for metric in metrics:
        own = {*common, *metric.labels}
        if metric.kind == "histogram":
            names |= {metric.name + "_bucket": own | {"le"}, metric.name + "_sum": own, metric.name + "_count": own}
        else:
            names[metric.name] = own
    return names
