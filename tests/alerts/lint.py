"""House rules of alerts and runbooks, as functions from documents to a list of what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dashboards.promql import labels_used, selectors

import optwatch.catalogue
import optwatch_server.catalogue

SEVERITIES = ("critical", "warning")
NOTIFY = ("page", "ticket")
SECTIONS = ["Meaning", "Impact", "Diagnosis", "Mitigation", "Escalation", "Related"]
PREFIX = "http://optwatch:8000"
DASHBOARD = "http://grafana:3000/d/"
TARGET_LABELS = {"job", "instance", "run_id", "project", "team"}
"""Labels that Prometheus itself gives to what it scrapes: its own two, and those of the targets' list."""
PROMETHEUS = {
    "up": TARGET_LABELS,
    "scrape_samples_post_metric_relabeling": TARGET_LABELS,
    "ALERTS": {
        "alertname",
        "alertstate",
        *("severity", "notify", "run_id", "run", "project", "team", "cause", "sweep"),
    },
}
"""Series that Prometheus makes itself, which no catalogue names."""

PAGES = {
    "TrainingNonFinite",
    "TrainingOutOfMemory",
    "TrainingCrashed",
    "TrainingRunLost",
    "TrainingStalled",
    "TrainingDiverged",
    "TrainingReplicaDivergence",
    "TrainingResumedWithoutState",
    "TrainingFlood",  # the page that stands for a flood of the others
    "OptwatchServerDown",
    "OptwatchEventsUndelivered",
}
TICKETS = {
    "TrainingLossSpike",
    "TrainingGradientSpike",
    "TrainingSlowConvergence",
    "TrainingValidationRegressed",
    "TrainingOverfitting",
    "TrainingPlateau",
    "TrainingLossDrift",  # what a slow divergence looks like long before it is one
    "TrainingRankMismatch",
    "TrainingStraggler",  # money that nothing else shows: every rank's step is as long as the slowest one's
    "TrainingScheduleJump",
    "TrainingMemoryForecast",
    "TrainingCheckpointStale",
    "TrainingCheckpointFailed",
    "TrainingUpdateRatioOutOfBand",
    "TrainingWeightNormDrop",
    "TrainingEpsilonDominated",
    "TrainingAuditFinding",
    "TrainingCostOverBudget",
    "TrainingGpuIdle",
    "OptwatchAgentErrors",
    "OptwatchSeriesOverBudget",
}
"""The design's table of what pages and what is a ticket. Not all of it has a signal yet; nothing else is added."""
SLO_BURN = re.compile(r"(Training|Optwatch)[A-Z]\w*(Fast|Slow)Burn")
"""Alerts of service-level objectives, which page on a fast burn and are tickets on a slow one."""
FLEET_WIDE = {"TrainingFlood"}
"""Alerts about many runs at once: they select no run and link to none."""
KINDS = {
    "nonfinite": "TrainingNonFinite",
    "divergence": "TrainingDiverged",
    "out_of_memory": "TrainingOutOfMemory",
    "crashed": "TrainingCrashed",
    "resumed_without_state": "TrainingResumedWithoutState",
    "replica_divergence": "TrainingReplicaDivergence",
    "loss_spike": "TrainingLossSpike",
    "grad_spike": "TrainingGradientSpike",
    "schedule_jump": "TrainingScheduleJump",
    "checkpoint_failed": "TrainingCheckpointFailed",
    "stall": "TrainingStalled",
    "validation_regression": "TrainingValidationRegressed",
    "plateau": "TrainingPlateau",
    "drift": "TrainingLossDrift",
    "memory_forecast": "TrainingMemoryForecast",
    "audit_finding": "TrainingAuditFinding",
    "rank_mismatch": "TrainingRankMismatch",
    "straggler": "TrainingStraggler",
}
"""The alert of each kind of event; the server raises the critical ones as well (docs/paging.md)."""


def known_series(recorded: Iterable[Mapping[str, Any]] = ()) -> dict[str, set[str]]:
    """Names as scraped, with the labels each may have, from the catalogues of agent and server.

    `recorded` are recording rules, each after those that it uses: what one records has the labels of what it reads.
    """
    series: dict[str, set[str]] = {name: set(labels) for name, labels in PROMETHEUS.items()}
    agent = {*optwatch.catalogue.COMMON_LABELS, "optimizer"}
    for common, metrics in ((agent, optwatch.catalogue.METRICS), (set(), optwatch_server.catalogue.METRICS)):
        for metric in metrics:
            labels = TARGET_LABELS | common | set(metric.labels)
            if metric.kind == "histogram":
                series[f"{metric.name}_bucket"] = labels | {"le"}
                series |= {f"{metric.name}_sum": labels, f"{metric.name}_count": labels}
            else:
                series[metric.name] = labels
    recorded = list(recorded)
    for rule in [*recorded, *recorded]:  # twice, for those that read their own last value
        read = [series.get(name, set()) for name, _ in selectors(rule["expr"])]
        series[rule["record"]] = set().union(*read) | made(rule["expr"]) | set(rule.get("labels", {}))
    return series


def made(query: str) -> set[str]:
    """Labels that label_replace makes in a query."""
    return set(re.findall(r'"(\w+)",\s*"[^"]*",\s*"[^"]*",\s*"[^"]*"\s*\)', query))


def query_problems(where: str, query: str, series: Mapping[str, set[str]]) -> list[str]:
    """Series that no catalogue has, and labels that those used do not have."""
    problems = []
    at_hand: set[str] = set()
    for name, matched in selectors(query):
        if name in ("Inf", "NaN"):  # numbers
            continue
        if name not in series:
            problems.append(f"{where} asks for {name}, which no catalogue has")
            continue
        at_hand |= series[name]
        problems += [f"{where} matches {name} on {label}, which it has not" for label in sorted(matched - series[name])]
    missing = labels_used(query) - at_hand - made(query) if at_hand else set()
    return problems + [f"{where} groups or joins by {label}, which nothing in it has" for label in sorted(missing)]


def rule_problems(rule: Mapping[str, Any], series: Mapping[str, set[str]]) -> list[str]:
    """What is wrong with one alert."""
    name, labels, notes = rule["alert"], rule.get("labels", {}), rule.get("annotations", {})
    problems = []
    if not re.fullmatch(r"(Training|Optwatch)[A-Z][A-Za-z]*", name):
        problems.append(f"{name} does not begin with the word Training or Optwatch")
    burn = SLO_BURN.fullmatch(name)
    wanted = "page" if name in PAGES or (burn and burn[2] == "Fast") else "ticket" if name in TICKETS or burn else None
    if wanted is None:
        problems.append(f"{name} is not in the design's table of pages and tickets")
    elif labels.get("notify") in NOTIFY and labels["notify"] != wanted:
        problems.append(f"{name} has notify {labels['notify']!r}, and is a {wanted} in the design's table")
    if len(name) > 40:
        problems.append(f"{name} has {len(name)} characters, more than 40")
    for label, allowed in (("severity", SEVERITIES), ("notify", NOTIFY)):
        if labels.get(label) not in allowed:
            problems.append(f"{name} has {label} {labels.get(label)!r}, not one of {allowed}")
    if extra := sorted(set(labels) - {"severity", "notify"}):
        problems.append(f"{name} has labels {extra}, with which the server's own alerts would not be folded into it")
    summary, description = notes.get("summary", ""), notes.get("description", "")
    if not re.fullmatch(r"[A-Z][^.{}]*\.", summary):
        problems.append(f"{name} has summary {summary!r}, not one sentence without a template")
    if "{{" not in description:
        problems.append(f"{name} has a description that names nothing of the case")
    if notes.get("runbook_url") != f"{PREFIX}/runbooks/{name}":
        problems.append(f"{name} has runbook_url {notes.get('runbook_url')!r}, not {PREFIX}/runbooks/{name}")
    if not notes.get("dashboard_url", "").startswith(DASHBOARD):
        problems.append(f"{name} has dashboard_url {notes.get('dashboard_url')!r}, not one below {DASHBOARD}")
    if name.startswith("Training") and name not in FLEET_WIDE and not burn:
        if not notes.get("dashboard_url", "").endswith("?var-run_id={{ $labels.run_id }}"):
            problems.append(f"{name} has a dashboard_url that does not select the run")
        if notes.get("run_url") != PREFIX + "/runs/{{ $labels.run_id }}":
            problems.append(f"{name} has run_url {notes.get('run_url')!r}, not the page of the run")
    problems += query_problems(f"{name}'s expr", rule["expr"], series)
    for query in re.findall(r'printf\s+"([^"]*)"\s+\$labels\.run_id\s*\|\s*query', description):
        problems += query_problems(f"{name}'s description", query, series)
    return problems


def event_problems(severities: Mapping[str, str], alerts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Kinds of event without an alert that asks for them, and critical ones that page nobody."""
    problems = []
    for kind, severity in severities.items():
        rule = alerts.get(KINDS.get(kind, ""))
        if rule is None:
            problems.append(f"events of kind {kind} have no alert")
        elif severity == "critical" and rule["labels"]["notify"] != "page":
            problems.append(f"events of kind {kind} are critical, and {rule['alert']} pages nobody")
        elif severity == "critical" and f'kind="{kind}"' not in rule["expr"]:
            problems.append(f"{rule['alert']} does not ask for events of kind {kind}")
    return problems


def pairing_problems(alerts: Iterable[str], runbooks: Iterable[str]) -> list[str]:
    """Alerts without a runbook, and runbooks without an alert."""
    alerts, runbooks = set(alerts), set(runbooks)
    return [f"{name} has no runbook runbooks/{name}.md" for name in sorted(alerts - runbooks)] + [
        f"runbooks/{name}.md belongs to no alert" for name in sorted(runbooks - alerts)
    ]


def runbook_problems(name: str, text: str, others: Iterable[str], series: Mapping[str, set[str]]) -> list[str]:
    """What is wrong with one runbook, the syntax of its queries and commands aside."""
    problems = []
    if not text.startswith(f"# {name}\n"):
        problems.append(f"{name} does not begin with its name as the title")
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    sections = re.findall(r"^## (.+)$", prose, flags=re.MULTILINE)
    if sections != SECTIONS:
        problems.append(f"{name} has sections {sections}, not {SECTIONS}")
    opening = text.split("\n## ")[0]
    if not re.search(r"^1\. ", opening, flags=re.MULTILINE) or len(opening.splitlines()) > 24:
        problems.append(f"{name} does not say within a first screen of 24 lines what to do, as a numbered list")
    for target in re.findall(r"\]\(([^)#]+)\.md", text):
        if target not in others:
            problems.append(f"{name} links to {target}.md, which is not there")
    for query in fences(text, "promql"):
        problems += query_problems(f"{name}'s query {query!r}", query, series)
    return problems


def fences(text: str, language: str) -> list[str]:
    """The contents of all fenced blocks of a language, without the indentation of a list they stand in."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, flags=re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", body, flags=re.MULTILINE).strip() for indent, body in found]


def load(folder: Path) -> dict[str, str]:
    """The text of all runbooks of a folder, by name."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.md"))}
