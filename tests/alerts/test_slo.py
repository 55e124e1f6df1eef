"""The rules of the objectives are those of their specifications, and their promtool tests notice a broken one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml

import optwatch_server.catalogue
from optwatch_server.objectives.rules import rules
from optwatch_server.objectives.slo import load

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "alerts" / "rules" / "slo.yaml"
TESTS = sorted((ROOT / "alerts" / "tests").glob("slo_*.yaml"))
SLOS = load(ROOT / "alerts" / "slo")


def test_the_generated_rules_are_current(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "generate_slo.py"
    subprocess.run([sys.executable, str(script), str(tmp_path / "slo.yaml")], check=True, capture_output=True)
    assert (tmp_path / "slo.yaml").read_text() == RULES.read_text(), "run `make generate`"


def test_the_bound_of_time_to_page_is_a_bucket_of_the_server() -> None:
    (objective,) = [slo for slo in SLOS if slo.name == "time-to-page"]
    (bound,) = re.findall(r'le=~"([^"]*)"', objective.good or "")
    bounds = [str(bucket) for bucket in optwatch_server.catalogue.PAGE_BUCKETS]
    assert [bucket for bucket in bounds if re.fullmatch(bound, bucket)] == ["45.0"]


def test_the_statuses_of_training_success_are_those_of_the_server_without_the_cancelled() -> None:
    (objective,) = [slo for slo in SLOS if slo.name == "training-success"]
    values = optwatch_server.catalogue.BY_NAME["optwatch_fleet_runs_ended_total"].values
    (statuses,) = [set(closed) for closed in values if "succeeded" in closed]
    asked = set(re.findall(r'status=~"([^"]*)"', objective.total)[0].split("|"))
    assert statuses - asked == {"cancelled"}


def test_every_window_of_an_alert_is_recorded_in_its_group_before_it() -> None:
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        recorded: set[str] = set()
        for rule in group["rules"]:
            assert set(re.findall(r"slo:\w+:\w+", rule["expr"])) <= recorded
            recorded.add(rule.get("record", ""))


def _mutants() -> Iterator[tuple[str, str, str]]:
    """What was changed, a word in the names of the promtool tests about it, and the rules with the change."""
    text = rules(SLOS)
    for slo in SLOS:
        for alert in slo.alerts:
            kind = {"page": "pages_on_a_fast_burn", "ticket": "opens_a_ticket"}[alert.notify]
            about = f"{slo.name.replace('-', '_')}_{kind}"
            at = text.index(f"      - alert: {alert.name}\n")
            expr = text[at : text.index("        annotations:", at)]
            for burn in alert.burns:
                for factor in (burn.factor * 95 / 100, burn.factor * 105 / 100):
                    changed = expr.replace(f"> {burn.factor:f}\n", f"> {factor.normalize():f}\n")
                    yield f"{alert.name}: {burn.factor} becomes {factor}", about, text.replace(expr, changed)
            for what, old, new in (
                ("one event less", f">= {slo.minimum_bad_events}", f">= {slo.minimum_bad_events - 1}"),
                ("one event more", f">= {slo.minimum_bad_events}", f">= {slo.minimum_bad_events + 1}"),
                ("any condition of a pair", "  and\n", "  or\n"),
                ("both pairs", "or\n          (", "and\n          ("),
                ("another receiver", f"notify: {alert.notify}", "notify: nobody"),
            ):
                assert old in expr, what
                yield f"{alert.name}: {what}", about, text.replace(expr, expr.replace(old, new))
    for what, about, old, new in (
        ("the page does not outlive its burn", "success_pages", "        keep_firing_for: 15m\n", ""),
        ("nothing bad is no number", "error_ratios", "or\n          0 * sum", "and\n          0 * sum"),
        ("replicas are added up", "error_ratios", "max by (project, status)", "sum by (project, status)"),
        ("nothing ended is no number", "error_ratios", "clamp_min(", "clamp_max("),
        ("cancelled runs count", "success_pages", "succeeded|failed|lost", "succeeded|failed|lost|cancelled"),
    ):
        assert old in text, what
        yield what, about, text.replace(old, new)


MUTANTS = list(_mutants())
# The rest takes minutes: those of each alert are spread evenly, and OPTWATCH_MUTANTS=all tries every one.
TRIED = MUTANTS if os.environ.get("OPTWATCH_MUTANTS") == "all" else MUTANTS[::3]


def tried(test: Path, text: str, folder: Path) -> Path:
    """A copy of a promtool test beside rules made of `text`: those of its objective, if its name has one. The other's
    take as long, and it does not ask for them."""
    groups = yaml.safe_load(text)["groups"]
    own = [group for group in groups if group["name"].replace("-", "_") in test.stem]
    for name in ("tests", "rules"):
        (folder / name).mkdir()
    (folder / "rules" / "slo.yaml").write_text(yaml.safe_dump({"groups": own or groups}, sort_keys=False))
    return Path(shutil.copy(test, folder / "tests"))


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.stem)
def test_the_rules_of_an_objective_alone_pass_its_tests_so_that_only_a_mutation_can_fail_them(
    test: Path, tmp_path: Path, run: Callable[..., CompletedProcess[str]]
) -> None:
    assert run("promtool", "test", "rules", tried(test, RULES.read_text(), tmp_path)).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("about", "text"), [pytest.param(*mutant[1:], id=mutant[0]) for mutant in TRIED])
def test_a_mutant_of_a_factor_a_guard_or_a_window_is_caught(
    about: str, text: str, tmp_path: Path, run: Callable[..., CompletedProcess[str]]
) -> None:
    (test,) = [path for path in TESTS if about in path.stem]
    assert run("promtool", "test", "rules", tried(test, text, tmp_path)).returncode != 0
