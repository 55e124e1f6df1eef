"""Objectives are read as written, refused where they make no sense, and made into rules of the agreed names."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
import yaml

from optwatch_server.objectives.rules import rules
from optwatch_server.objectives.slo import WINDOWS, Burn, load, parse
from optwatch_server.shipped import shipped

SPEC = (shipped("alerts") / "slo" / "training-success.yaml").read_text(encoding="utf-8")


def changed(old: str, new: str, count: int = -1) -> str:
    assert old in SPEC
    return SPEC.replace(old, new, count)


def test_the_shipped_objectives_say_what_operations_promises() -> None:
    time_to_page, success = load(shipped("alerts") / "slo")
    assert (success.name, success.target, success.budget) == ("training-success", Decimal("0.95"), Decimal("0.05"))
    assert (time_to_page.name, time_to_page.target) == ("time-to-page", Decimal("0.99"))
    for slo in (success, time_to_page):
        page, ticket = slo.alerts
        assert (page.notify, ticket.notify) == ("page", "ticket")
        assert page.burns == (Burn(Decimal("14.4"), "1h", "5m"), Burn(Decimal("6"), "6h", "30m"))
        assert ticket.burns == (Burn(Decimal("3"), "1d", "2h"), Burn(Decimal("1"), "3d", "6h"))


def test_an_alert_that_could_never_fire_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(ValueError, match="can never fire") as refused:
        parse(changed("target: 0.95", "target: 0.9"), "a.yaml")
    assert str(refused.value) == (
        "a.yaml: TrainingSuccessFastBurn can never fire: a burn of 14.4 at target 0.9 asks for an error ratio above "
        "14.4 × (1 − 0.9) = 1.44, and no ratio exceeds 1: take a factor below 10, or a target above 0.930556"
    )


@pytest.mark.parametrize(("target", "fires"), [("0.93", False), ("0.931", True)])
def test_a_target_is_refused_from_just_below_the_one_where_the_alert_can_fire(target: str, fires: bool) -> None:
    text = changed("target: 0.95", f"target: {target}")
    if fires:
        assert parse(text, "a.yaml").target == Decimal(target)
    else:
        with pytest.raises(ValueError, match="can never fire"):
            parse(text, "a.yaml")


def test_a_ratio_of_exactly_1_cannot_be_exceeded_either() -> None:
    with pytest.raises(ValueError, match=r"20 × \(1 − 0.95\) = 1.0, and no ratio exceeds 1"):
        parse(changed("threshold: 14.4", "threshold: 20"), "a.yaml")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("target: 0.95", "target: 1.5", r"spec.objectives.0.target is '1.5': Input should be less than 1"),
        ("target: 0.95", "target: 0", r"spec.objectives.0.target is '0': Input should be greater than 0"),
        ("target: 0.95", "taget: 0.95", r"spec.objectives.0.target: Field required \(and 1 more\)"),
        ("openslo/v1", "openslo/v2", r"apiVersion is 'openslo/v2': Input should be 'openslo/v1'"),
        ("kind: SLO\n", "kind: SLI\n", r"kind is 'SLI': Input should be 'SLO'"),
        ("duration: 30d", "duration: 28d", r"spec.timeWindow.0.duration is '28d': Input should be '30d'"),
        ("lookbackWindow: 1h", "lookbackWindow: 4h", r"lookbackWindow is '4h': Input should be '5m', '30m', '1h'"),
        ("short-window: 5m", "short-window: 1h", r"'1h' beside lookbackWindow 1h: choose one of 5m, 30m$"),
        ("short-window: 5m", "short-window: 7m", r"'7m' beside lookbackWindow 1h: choose one of 5m, 30m$"),
        ("optwatch.io/short-window: 5m", "other: 5m", r"short-window None beside lookbackWindow 1h"),
        ('events: "3"', 'events: "0"', r"minimum-bad-events is '0': give a whole number from 1 on"),
        ('events: "3"', 'events: "few"', r"minimum-bad-events is 'few': give a whole number from 1 on"),
        ("optwatch.io/advice", "optwatch.io/advise", r"metadata.annotations lacks optwatch.io/advice"),
        ("        bad:", "        good:", None),
        ("        total:", "        good:", r"spec.indicator.spec.ratioMetric.total: Field required"),
        ("severity: page", "severity: ticket", r"severity 'ticket' and tells 'page': make them the same"),
        ("displayName: TrainingSuccessFastBurn", "displayName: FastBurn", r"displayName 'FastBurn': it is the alert's"),
        ("threshold: 14.4", "threshold: -1", r"threshold is '-1': Input should be greater than 0"),
        ("spec:\n  description", "spec:\n\tdescription", r"not YAML"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_field_the_value_and_the_fix(
    old: str, new: str, told: str | None
) -> None:
    if told is None:
        assert parse(changed(old, new), "a.yaml").bad is None
        return
    with pytest.raises(ValueError, match=rf"(?s)^a\.yaml: .*{told}"):
        parse(changed(old, new, 1), "a.yaml")


def test_a_ratio_is_told_by_good_or_bad_events_and_not_by_both() -> None:
    bad = SPEC[SPEC.index("        bad:") : SPEC.index("        total:")]
    for text in (SPEC.replace(bad, ""), SPEC.replace(bad, bad + bad.replace("bad:", "good:"))):
        with pytest.raises(ValueError, match=r"ratioMetric needs one of good and bad beside total"):
            parse(text, "a.yaml")


def test_two_policies_of_one_alert_must_agree() -> None:
    with pytest.raises(ValueError, match="two policies of TrainingSuccessFastBurn differ in severity or description"):
        parse(changed("description: Most training runs", "description: Many training runs", 1), "a.yaml")


def test_names_are_unique_over_all_files(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(SPEC)
    (tmp_path / "b.yaml").write_text(SPEC)
    with pytest.raises(ValueError, match=r"b\.yaml: another file defines 'training-success' too"):
        load(tmp_path)
    (tmp_path / "b.yaml").write_text(SPEC.replace("name: training-success\n", "name: other\n"))
    with pytest.raises(ValueError, match=r"b\.yaml: the alert TrainingSuccessFastBurn belongs to training-success"):
        load(tmp_path)


def test_a_folder_without_objectives_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no \*\.yaml: put at least one OpenSLO v1 file of kind SLO there"):
        load(tmp_path)


def test_rules_have_every_window_of_every_objective_under_the_names_of_sloth() -> None:
    slos = load(shipped("alerts") / "slo")
    groups = yaml.safe_load(rules(slos))["groups"]
    assert [group["name"] for group in groups] == ["slo-time-to-page", "slo-training-success"]
    for slo, group in zip(slos, groups, strict=True):
        records = {rule["record"]: rule["labels"] for rule in group["rules"] if "record" in rule}
        labels = {"optwatch_slo": slo.name, "optwatch_service": slo.service}
        for window in WINDOWS:
            assert records.pop(f"slo:sli_error:ratio_rate{window}") == {**labels, "window": window}
        assert records == dict.fromkeys(
            [
                "slo:sli_events:total",
                "slo:sli_events:bad",
                "slo:objective:ratio",
                "slo:current_burn_rate:ratio",
                "slo:error_budget:ratio",
            ],
            labels,
        )
