"""Alerts and runbooks keep the house rules, and each rule is shown able to fail."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.alerts import lint

from optwatch.catalogue import EVENT_SEVERITIES

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "alerts" / "rules").glob("*.yaml"), key=lambda path: (path.stem != "names", path))
RULES = [
    rule
    for path in FILES
    for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
RECORDED = [rule for rule in RULES if "record" in rule]
SERIES = lint.known_series(RECORDED)
RUNBOOKS = lint.load(ROOT / "runbooks")


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_keeps_the_house_rules(rule: dict[str, Any]) -> None:
    assert lint.rule_problems(rule, SERIES) == []


@pytest.mark.parametrize("name", RUNBOOKS)
def test_a_runbook_keeps_the_house_rules(name: str) -> None:
    assert lint.runbook_problems(name, RUNBOOKS[name], RUNBOOKS, SERIES) == []


def test_every_alert_has_its_runbook_and_every_runbook_its_alert() -> None:
    assert lint.pairing_problems([rule["alert"] for rule in ALERTS], RUNBOOKS) == []


def test_no_two_alerts_have_one_name() -> None:
    names = [rule["alert"] for rule in ALERTS]
    assert len(set(names)) == len(names)


def test_every_kind_of_event_has_its_alert_and_every_critical_one_pages() -> None:
    assert lint.event_problems(EVENT_SEVERITIES, {rule["alert"]: rule for rule in ALERTS}) == []


def test_a_kind_of_event_without_an_alert_is_found_and_so_is_one_that_pages_nobody() -> None:
    alerts = {
        "TrainingCrashed": {"alert": "TrainingCrashed", "labels": {"notify": "ticket"}, "expr": "x"},
        "TrainingDiverged": {"alert": "TrainingDiverged", "labels": {"notify": "page"}, "expr": "x"},
    }
    assert lint.event_problems(dict.fromkeys(("new", "crashed", "divergence"), "critical"), alerts) == [
        "events of kind new have no alert",
        "events of kind crashed are critical, and TrainingCrashed pages nobody",
        "TrainingDiverged does not ask for events of kind divergence",
    ]


@pytest.mark.parametrize("rule", RECORDED, ids=lambda rule: rule["record"])
def test_what_is_recorded_reads_only_what_is_there(rule: dict[str, Any]) -> None:
    assert lint.query_problems(rule["record"], rule["expr"], SERIES) == []


def test_a_page_takes_its_labels_from_the_server_or_the_run_and_no_others() -> None:
    for rule in ALERTS:
        if rule["labels"]["notify"] == "page" and "optwatch:run_names_and_sweeps" in rule["expr"]:
            pytest.fail(f"{rule['alert']} pages and carries `sweep`, which the server's own alert has not")
        if rule["labels"]["notify"] == "ticket" and "topk by (run_id) (1, optwatch:run_names)" in rule["expr"]:
            pytest.fail(f"{rule['alert']} is a ticket without `sweep`: it would not be muted with its sweep")


def _named(name: str) -> Callable[[dict[str, Any]], None]:
    def change(rule: dict[str, Any]) -> None:
        rule["annotations"]["runbook_url"] = f"{lint.PREFIX}/runbooks/{name}"
        rule["alert"] = name

    return change


def _note(key: str, value: str) -> Callable[[dict[str, Any]], None]:
    return lambda rule: rule["annotations"].update({key: value})


def _label(key: str, value: str) -> Callable[[dict[str, Any]], None]:
    return lambda rule: rule["labels"].update({key: value})


def _expr(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    return lambda rule: rule.update(expr=rule["expr"].replace(old, new))


BROKEN_RULES = {
    "does not begin with the word": _named("NonFinite"),
    "is not in the design's table": _named("TrainingOther"),
    "and is a page in the design's table": _label("notify", "ticket"),
    "more than 40": _named("TrainingNonFiniteNumbersInLossOrGradients"),
    "has severity 'page'": _label("severity", "page"),
    "has notify None": lambda rule: rule["labels"].pop("notify"),
    "has labels ['team']": _label("team", "research"),
    "not one sentence without a template": _note("summary", "Run {{ $labels.run }} is ill."),
    "has summary ''": lambda rule: rule["annotations"].pop("summary"),
    "has summary 'One. Two.'": _note("summary", "One. Two."),
    "names nothing of the case": _note("description", "A run is ill."),
    "has runbook_url": _note("runbook_url", "http://optwatch:8000/runbooks/Other"),
    "has dashboard_url": _note("dashboard_url", "http://elsewhere/d/x?var-run_id={{ $labels.run_id }}"),
    "does not select the run": _note("dashboard_url", "http://grafana:3000/d/optwatch-debug"),
    "has run_url None": lambda rule: rule["annotations"].pop("run_url"),
    "asks for optwatch_nonfinite, which no catalogue has": _expr(
        "optwatch:nonfinite_total:nonzero", "optwatch_nonfinite"
    ),
    "matches optwatch:nonfinite_total:nonzero on signal": _expr(":nonzero[10m]", ':nonzero{signal="loss"}[10m]'),
    "groups or joins by cluster": _expr("max by (run_id)", "max by (cluster)"),
    "description asks for optwatch_gone": lambda rule: rule["annotations"].update(
        description=rule["annotations"]["description"].replace("optwatch_nonfinite_first_step", "optwatch_gone")
    ),
    "description matches optwatch_nonfinite_first_step on sauce": lambda rule: rule["annotations"].update(
        description=rule["annotations"]["description"].replace("source=", "sauce=")
    ),
}


@pytest.mark.parametrize("message", BROKEN_RULES)
def test_a_broken_alert_is_found(message: str) -> None:
    rule = copy.deepcopy(next(rule for rule in ALERTS if rule["alert"] == "TrainingNonFinite"))
    BROKEN_RULES[message](rule)
    problems = lint.rule_problems(rule, SERIES)
    assert any(message in problem for problem in problems), problems


BROKEN_RUNBOOKS = {
    "does not begin with its name": ("# TrainingRunLost\n", "# Lost\n"),
    "has sections": ("## Escalation\n", "## Whom to call\n"),
    "within a first screen": ("\n## Meaning", "\nmore" * 30 + "\n## Meaning"),
    "links to TrainingGone.md": ("(TrainingNonFinite.md)", "(TrainingGone.md)"),
    "asks for optwatch_steps, which no catalogue has": ("optwatch_steps_total", "optwatch_steps"),
    "matches optwatch_fleet_run_last_step on rank": ("run_last_step{", 'run_last_step{rank="0",'),
}


@pytest.mark.parametrize("message", BROKEN_RUNBOOKS)
def test_a_broken_runbook_is_found(message: str) -> None:
    old, new = BROKEN_RUNBOOKS[message]
    text = RUNBOOKS["TrainingRunLost"]
    assert old in text
    problems = lint.runbook_problems("TrainingRunLost", text.replace(old, new), RUNBOOKS, SERIES)
    assert any(message in problem for problem in problems), problems


def test_orphans_are_found_both_ways() -> None:
    assert lint.pairing_problems(["TrainingA", "TrainingB"], ["TrainingB", "TrainingC"]) == [
        "TrainingA has no runbook runbooks/TrainingA.md",
        "runbooks/TrainingC.md belongs to no alert",
    ]


def test_a_histogram_is_known_by_its_three_series_and_not_by_its_name() -> None:
    assert "le" in SERIES["optwatch_step_duration_seconds_bucket"]
    assert "optwatch_step_duration_seconds_sum" in SERIES
    assert "optwatch_step_duration_seconds" not in SERIES


def test_a_fence_within_a_list_is_found_without_its_indentation() -> None:
    text = "1. Ask:\n\n   ```promql\n   up\n   ```\n\n```bash\necho\n```\n"
    assert lint.fences(text, "promql") == ["up"]
    assert lint.fences(text, "bash") == ["echo"]
