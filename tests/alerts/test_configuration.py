"""Prometheus and Alertmanager accept what is shipped, route it as meant, and every rule does what its tests say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml

ALERTS = Path(__file__).resolve().parents[2] / "alerts"
RULES = sorted((ALERTS / "rules").glob("*.yaml"))
TESTS = sorted((ALERTS / "tests").glob("*.yaml"))
Run = Callable[..., CompletedProcess[str]]


def _alertmanager() -> dict:
    return yaml.safe_load((ALERTS / "alertmanager.yaml").read_text(encoding="utf-8"))


def _names_in(matcher: str) -> set[str]:
    """The names that a matcher on alertname fits."""
    return set(re.fullmatch(r'alertname=~?"([\w|]+)"', matcher)[1].split("|"))


def _alerts() -> list[dict]:
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


@pytest.mark.parametrize("rules", RULES, ids=lambda path: path.stem)
def test_promtool_accepts_the_rules(rules: Path, run: Run) -> None:
    done = run("promtool", "check", "rules", "--lint-fatal", rules)
    assert done.returncode == 0, done.stdout


def test_promtool_accepts_the_configuration_and_finds_the_rules_from_it(run: Run) -> None:
    done = run("promtool", "check", "config", "--lint-fatal", ALERTS / "prometheus.yaml")
    assert done.returncode == 0, done.stdout
    assert all(str(path) in done.stdout for path in RULES)


def test_amtool_accepts_the_configuration(run: Run) -> None:
    done = run("amtool", "check-config", ALERTS / "alertmanager.yaml")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("tests", TESTS, ids=lambda path: path.stem)
def test_the_rules_do_what_their_tests_say(tests: Path, run: Run) -> None:
    done = run("promtool", "test", "rules", tests)
    assert done.returncode == 0, done.stdout


def test_every_alert_has_promtool_tests_of_its_full_labels_and_annotations() -> None:
    expected: dict[str, int] = {}
    silent: dict[str, int] = {}
    for path in TESTS:
        for test in yaml.safe_load(path.read_text())["tests"]:
            for case in test.get("alert_rule_test", []):
                counts = expected if case["exp_alerts"] else silent
                counts[case["alertname"]] = counts.get(case["alertname"], 0) + 1
                for alert in case["exp_alerts"]:
                    assert alert["exp_labels"], test["name"]
                    assert alert["exp_annotations"], test["name"]
    names = {rule["alert"] for rule in _alerts()}
    assert set(expected) == names
    assert set(silent) == names


def test_every_promtool_test_is_named_by_a_sentence_and_no_two_alike() -> None:
    for path in TESTS:
        names = [test["name"] for test in yaml.safe_load(path.read_text())["tests"]]
        assert len(path.stem.split("_")) >= 4, path
        assert all(len(name.split()) >= 5 for name in names), names
        assert len(set(names)) == len(names), names


@pytest.mark.parametrize("rule", _alerts(), ids=lambda rule: rule["alert"])
def test_an_alert_goes_to_the_receiver_that_its_label_notify_names(rule: dict, run: Run) -> None:
    labels = [f"{name}={value}" for name, value in rule["labels"].items()]
    labels += [f"alertname={rule['alert']}", "run_id=r1"]
    routed = ["config", "routes", "test", f"--config.file={ALERTS / 'alertmanager.yaml'}"]
    done = run("amtool", *routed, f"--verify.receivers={rule['labels']['notify']}", *labels)
    assert done.returncode == 0, done.stdout
    wrong = {"page": "ticket", "ticket": "page"}[rule["labels"]["notify"]]
    assert run("amtool", *routed, f"--verify.receivers={wrong}", *labels).returncode != 0


def test_an_alert_that_does_not_say_whom_to_notify_is_a_ticket_and_not_lost(run: Run) -> None:
    routed = ["config", "routes", "test", f"--config.file={ALERTS / 'alertmanager.yaml'}"]
    done = run("amtool", *routed, "--verify.receivers=ticket", "alertname=Other", "severity=critical")
    assert done.returncode == 0, done.stdout


def test_a_page_is_one_a_run_and_a_ticket_one_a_cluster() -> None:
    route = _alertmanager()["route"]
    page, sweeps, ticket = route["routes"]
    assert (page["receiver"], page["group_by"]) == ("page", ["alertname", "run_id"])
    flood, _ = page["routes"]
    assert flood["matchers"] == ['alertname="TrainingFlood"']
    assert flood["group_by"] == ["alertname", "cause", "cluster"]
    for tickets in (sweeps, ticket):
        assert tickets["receiver"] == "ticket"
        assert {**route, **tickets}["group_by"] == ["alertname", "cluster"]


def test_only_tickets_of_sweeps_are_muted_by_the_clock() -> None:
    page, sweeps, ticket = _alertmanager()["route"]["routes"]
    assert sweeps["matchers"] == ['notify="ticket"', 'sweep=~".+"']
    assert sweeps["mute_time_intervals"] == ["sweeps"]
    assert "mute_time_intervals" not in json.dumps([page, ticket])


def test_inhibition_names_only_alerts_that_exist_and_never_mutes_in_a_circle() -> None:
    names = {rule["alert"] for rule in _alerts()}
    muted: dict[str, set[str]] = {}
    for rule in _alertmanager()["inhibit_rules"]:
        sources, targets = (_names_in(rule[f"{side}_matchers"][0]) for side in ("source", "target"))
        assert sources | targets <= names, rule
        for source in sources:
            muted.setdefault(source, set()).update(targets)
    pages = {rule["alert"] for rule in _alerts() if rule["labels"]["notify"] == "page"}
    for source, targets in muted.items():
        assert source in pages or not targets & pages, f"the ticket {source} mutes a page"
        reached, seen = set(targets), set()
        while reached - seen:
            seen |= (step := reached - seen)
            reached |= {other for name in step for other in muted.get(name, ())}
        assert source not in reached, f"{source} mutes itself"


def test_inhibition_is_of_the_same_run_save_where_the_source_has_none() -> None:
    for rule in _alertmanager()["inhibit_rules"]:
        (source, *_) = _names_in(rule["source_matchers"][0])
        assert rule["equal"] == (["cluster"] if source in {"TrainingFlood", "OptwatchServerDown"} else ["run_id"])


def test_a_flood_mutes_the_pages_of_runs_by_their_cause_and_no_other() -> None:
    causes = {}
    for rule in _alertmanager()["inhibit_rules"]:
        if rule["source_matchers"][0] == 'alertname="TrainingFlood"':
            (cause,) = re.findall(r'cause="(\w+)"', rule["source_matchers"][1])
            assert rule["target_matchers"] == [f'alertname="{cause}"']
            causes[cause] = True
    about_runs = {
        rule["alert"] for rule in _alerts() if rule["labels"]["notify"] == "page" and "run_url" in rule["annotations"]
    }
    assert set(causes) == about_runs


def test_names_are_joined_in_one_place_and_evaluated_before_what_needs_them_in_every_promtool_test() -> None:
    for path in RULES:
        if path.stem != "names":
            assert "optwatch_run_info[" not in path.read_text(encoding="utf-8"), path
    for path in TESTS:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "../rules/names.yaml" in document["rule_files"]:
            assert document["group_eval_order"][0] == "optwatch-names", path


def test_no_label_is_added_that_would_keep_pages_of_the_server_apart_from_those_of_prometheus() -> None:
    assert "external_labels" not in yaml.safe_load((ALERTS / "prometheus.yaml").read_text())["global"]


def test_every_receiver_also_tells_what_resolved() -> None:
    for receiver in yaml.safe_load((ALERTS / "alertmanager.yaml").read_text())["receivers"]:
        assert all(webhook["send_resolved"] for webhook in receiver["webhook_configs"])


@pytest.mark.parametrize("name", ["promtool", "amtool"])
def test_a_missing_program_fails_the_tests_and_names_its_package(
    name: str, program: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match=rf"^{name} is not on PATH, .*prometheus prometheus-alertmanager"):
        program(name)
