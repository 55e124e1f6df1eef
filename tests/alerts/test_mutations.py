"""The promtool tests would notice a rule that was broken: each mutant of a rule makes at least one of them fail."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml

ALERTS = Path(__file__).resolve().parents[2] / "alerts"
FILES = [path for path in sorted((ALERTS / "rules").glob("*.yaml")) if path.stem != "slo"]
"""Rules of service-level objectives are generated, and tested as what generates them."""
TESTS = [path for path in sorted((ALERTS / "tests").glob("*.yaml")) if not path.stem.startswith("slo_")]
PER_RULE = None if os.environ.get("OPTWATCH_MUTANTS") == "all" else 2
"""Mutants tried of each rule, spread evenly over all: those take minutes. OPTWATCH_MUTANTS=all tries them."""
Run = Callable[..., CompletedProcess[str]]
Rule = dict[str, Any]

SWAPS = {
    r" > (?!bool|on|-)": [" >= ", " < "],
    r" > (?=on|bool)": [" < "],
    r" < (?!bool|on|Inf)": [" <= ", " > "],
    r" <= ": [" < "],
    r" >= ": [" > ", " < "],
    r" == (?!bool)": [" != "],
    r"\bor\b(?! on)": ["and", "unless"],
    r"\bor on \(": ["and on ("],
    r"\bunless\b": ["and"],
    r"\band\b": ["or", "unless"],
    r"\bincrease\(": ["delta("],
    r"\bmax_over_time\(": ["min_over_time("],
    r"\bmin_over_time\(": ["max_over_time("],
    r"\bavg_over_time\(": ["max_over_time(", "min_over_time("],
    r"\blast_over_time\(": ["count_over_time("],
    r"\bchanges\(": ["count_over_time("],
    r"\bclamp_min\(": ["clamp_max("],
    r"\babs\(": ["-("],
    r"\bmax by \(run_id\)": ["max by (run_id, rank, instance)"],
    r"\bmax by \((?=run_id, )": ["max by (instance, rank, "],
    r"\bmin by \(": ["max by ("],
    r"\bavg by \(": ["max by (", "min by ("],
    r"\bsum by \(": ["max by ("],
    r"\bcount by \((?=count)": ["sum by ("],
    r"\btopk by \(run_id\) \(1,": ["topk by (run_id) (2,", "topk (1,"],
    r"group_left \(run, project, team": ["group_left (run"],
    r", sweep\)": [")"],
    r'signal="loss"': ['signal="grad_norm"'],
    r'signal="grad_norm"': ['signal="loss"'],
    r'(kind|cause)="\w+"': [r'\1=~".+"', r'\1="other"'],
    r'cause=~"crashed\|unknown"': ['cause="crashed"', 'cause="unknown"'],
    r'result="succeeded"': ['result=~".*"'],
    r'!="",device!~"cpu\.\*"': ['=~".*"'],
    r'alertstate="firing",': [""],
    r'notify="page",': [""],
    r"(?<![\w.:\[\"$])(\d+\.\d+|\d{2,}|[2-9])(?![\w.\]])": ["0.8", "1.2"],
}
"""What stands in an expression, and what it is replaced by, at each place by itself; a number is multiplied."""
WINDOW = r"(?<=\[)\d+[mh](?=\])|(?<=offset )\d+[mh]"
"""Windows and offsets are replaced at all places of an expression together: they stand for one number of the head."""

EQUIVALENT = (
    # `group` and `topk` of times look at no value that any function which keeps the series would change.
    r".*: last_over_time\( \d+ of \d+ becomes count_over_time\(",
    # More is recorded, or for longer, than the alerts need: it would cost time and change none of them.
    r".*:nonzero: (> 1 of 1 becomes >=|and 1 of 1 becomes or|1h becomes 5400s)",
    # A best that equals the value is the same number.
    r".*:best: < 1 of 1 becomes <=",
    # What is read there has one series a run already.
    r"Training(ValidationRegressed|Overfitting|WeightNormDrop|EpsilonDominated|RankMismatch|ScheduleJump): max by .*",
    r"Training(Plateau|LossDrift|MemoryForecast|AuditFinding): max by .*",
    r"TrainingCheckpointFailed: max by .*",
    r"Training(OutOfMemory|Crashed|Diverged|ReplicaDivergence|ResumedWithoutState): max by .*",
    # Joined by `and` or `unless`, where more series of a run change nothing; or folded by the alerts behind.
    r"TrainingStalled: max by \(run_id\) .*",
    r"optwatch:run_(failure|event):recent: max by .*",
    # At the edge of the window both sides are the same sample; and a rise within it is what `increase` sees.
    r".*: > 2 of 2 becomes >=",
    r".*: max_over_time\( 1 of 2 becomes min_over_time\(",
    # A second `topk` behind it keeps one name.
    r"optwatch:run_(name|sweep):seen_timestamp_seconds: topk by .* becomes topk by .*",
    # Only from a thousand runs on do the two print differently.
    r"TrainingFlood: %\.0f in the description .*",
    # An alert's name says already whether it is a page; and only a restart of Prometheus could need the memory.
    r'optwatch:flood:runs: (notify="page",|2m) .*',
)
"""Mutants that do the same as the rule, with the reason; matched as a whole."""


@cache
def _groups() -> list[tuple[str, Rule]]:
    """File and group of every rule file here, as data."""
    return [(path.name, group) for path in FILES for group in yaml.safe_load(path.read_text())["groups"]]


def _name(rule: Rule) -> str:
    return str(rule.get("alert") or rule["record"])


RULES = {_name(rule): (file, group["name"], rule) for file, group in _groups() for rule in group["rules"]}


@cache
def _concerned(name: str) -> tuple[str, ...]:
    """The alerts that a rule is about: itself, or those that use what it records, of its own file where there are any.

    Names are used by all alerts: one of them has the tests about names.
    """
    if "alert" in RULES[name][2]:
        return (name,)
    if RULES[name][0] == "names.yaml":
        return ("TrainingNonFinite", "TrainingGradientSpike")
    users = [other for other, (_, _, rule) in RULES.items() if other != name and name in rule["expr"]]
    return tuple(dict.fromkeys(alert for user in users for alert in _concerned(user)))


def _changed(rule: Rule, **changes: Any) -> Rule:
    changed = copy.deepcopy(rule)
    for key, value in changes.items():
        if value is None:
            del changed[key]
        else:
            changed[key] = value
    return changed


def _mutants_of(rule: Rule) -> Iterator[tuple[str, Rule]]:
    """What was changed, and the rule with that change."""
    expr = rule["expr"]
    for pattern, replacements in SWAPS.items():
        places = list(re.finditer(pattern, expr))
        for count, place in enumerate(places, start=1):
            for replacement in replacements:
                number = re.fullmatch(r"[\d.]+", replacement)
                new = f"{float(place[0]) * float(replacement):g}" if number else place.expand(replacement)
                changed = expr[: place.start()] + new + expr[place.end() :]
                what = f"{place[0].strip()} {count} of {len(places)} becomes {new.strip() or 'nothing'}"
                yield what, _changed(rule, expr=changed)
    for window in dict.fromkeys(re.findall(WINDOW, expr)):
        for factor in (0.5, 1.5):
            minutes = int(window[:-1]) * (60 if window[-1] == "h" else 1)
            new = f"{round(minutes * factor * 60)}s"
            changed = re.sub(rf"(?<=\[){window}(?=\])|(?<=offset ){window}", new, expr)
            yield f"{window} becomes {new}", _changed(rule, expr=changed)
    if "alert" not in rule:
        return
    if "for" in rule:
        seconds = int(rule["for"][:-1]) * {"s": 1, "m": 60}[rule["for"][-1]]
        yield "does not wait", _changed(rule, **{"for": None})
        yield "waits longer", _changed(rule, **{"for": f"{round(seconds * 1.5)}s"})
    else:
        yield "waits", _changed(rule, **{"for": "1m"})
    for key, swap in (
        ("severity", {"critical": "warning", "warning": "critical"}),
        ("notify", {"page": "ticket", "ticket": "page"}),
    ):
        yield (
            f"{key} is another",
            _changed(rule, labels={**rule["labels"], key: swap[rule["labels"][key]]}),
        )
    said = rule["annotations"]["description"]
    for old, new in (("bottomk", "topk"), ("+ 0.1", "- 0.1"), ("+ 0.3", "- 0.3"), ("%.0f", "%.3g"), ("max(", "min(")):
        if old in said:
            yield (
                f"{old} in the description becomes {new}",
                _changed(rule, annotations={**rule["annotations"], "description": said.replace(old, new)}),
            )


def _mutants(name: str) -> list[tuple[str, Rule]]:
    found = [
        (what, rule)
        for what, rule in _mutants_of(RULES[name][2])
        if not any(re.fullmatch(pattern, f"{name}: {what}") for pattern in EQUIVALENT)
    ]
    if PER_RULE is None or len(found) <= PER_RULE:
        return found
    return [found[round(index * (len(found) - 1) / (PER_RULE - 1))] for index in range(PER_RULE)]


def _about(alert: str, test: str) -> bool:
    """Whether a test is about an alert, or about no alert but what is recorded."""
    return alert in test or not ("ALERTS" in test or "alertname" in test)


@cache
def _tests(alert: str) -> list[Rule]:
    """For each file of promtool tests, those of its tests that are about an alert, and nothing else."""
    found = []
    for path in TESTS:
        text = path.read_text(encoding="utf-8")
        if alert not in text:
            continue
        document = yaml.safe_load(text)
        as_written = yaml.load(text, yaml.BaseLoader)  # text throughout: `0x11` is no number here
        for test, written in zip(document["tests"], as_written["tests"], strict=True):
            test["input_series"] = written["input_series"]
        document["tests"] = [test for test in document["tests"] if _about(alert, json.dumps(test))]
        for test in document["tests"]:
            for key, says in (("alert_rule_test", "alertname"), ("promql_expr_test", "expr")):
                if key in test:
                    about_all = [case for case in test[key] if "ALERTS" not in case.get("expr", "ALERTS")]
                    test[key] = [case for case in test[key] if alert in case[says]] + about_all
        document["tests"] = [t for t in document["tests"] if t.get("alert_rule_test") or t.get("promql_expr_test")]
        if document["tests"]:
            found.append(document)
    return sorted(found, key=lambda document: len(json.dumps(document)))


def _passes(name: str, mutant: Rule, folder: Path, run: Run) -> bool:
    """Whether all promtool tests about the alerts that a rule concerns pass with `mutant` in its place."""
    for alert in _concerned(name):
        (folder / "rules").mkdir(exist_ok=True)
        (folder / "tests").mkdir(exist_ok=True)
        for path in FILES:
            groups = []
            for file, group in _groups():
                rules = [rule for rule in group["rules"] if "record" in rule or _name(rule) == alert]
                rules = [mutant if _name(rule) == name else rule for rule in rules]
                if file == path.name and rules:
                    groups.append({**group, "rules": rules})
            (folder / "rules" / path.name).write_text(json.dumps({"groups": groups}), encoding="utf-8")
        for document in _tests(alert):
            (folder / "tests" / "some.yaml").write_text(json.dumps(document), encoding="utf-8")
            if run("promtool", "test", "rules", folder / "tests" / "some.yaml").returncode != 0:
                return False
    return True


def test_there_are_mutants_of_every_rule_and_each_differs_from_it() -> None:
    for name, (_, _, rule) in RULES.items():
        mutants = list(_mutants_of(rule))
        assert mutants, name
        assert all(mutant != rule for _, mutant in mutants), name
        assert _concerned(name), f"{name} is recorded and no alert uses it"


@pytest.mark.parametrize("name", [name for name in RULES if "alert" in RULES[name][2]])
def test_an_alert_by_itself_passes_its_tests_so_that_only_the_mutation_can_fail_them(
    name: str, tmp_path: Path, run: Run
) -> None:
    assert _passes(name, RULES[name][2], tmp_path, run)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("file", [path.name for path in FILES])
def test_at_least_95_percent_of_the_mutants_of_a_file_are_caught(file: str, tmp_path: Path, run: Run) -> None:
    mutants = [(name, *mutant) for name, rule in RULES.items() if rule[0] == file for mutant in _mutants(name)]
    survivors = [f"{name}: {what}" for name, what, mutant in mutants if _passes(name, mutant, tmp_path, run)]
    print(f"{file}: {len(mutants) - len(survivors)} of {len(mutants)} mutants caught; not caught: {survivors}")
    assert len(survivors) <= 0.05 * len(mutants), survivors
