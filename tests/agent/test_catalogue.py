"""The catalogue follows the conventions of Prometheus, and says of each metric what its name and labels mean."""

from __future__ import annotations

import re

import pytest

from optwatch.catalogue import BY_NAME, COMMON_LABELS, EVENT_SEVERITIES, METRICS, RUN_WIDE, Metric, severities
from optwatch.events import Event

every_metric = pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(METRICS)


@every_metric
def test_a_name_is_ours_and_lower_case(metric: Metric) -> None:
    assert re.fullmatch(r"optwatch_[a-z][a-z0-9]*(_[a-z0-9]+)*", metric.name)
    assert not metric.name.startswith(("optwatch_server_", "optwatch_fleet_"))


@every_metric
def test_counters_and_only_they_end_in_total(metric: Metric) -> None:
    assert metric.name.endswith("_total") == (metric.kind == "counter")


@every_metric
def test_no_name_has_a_suffix_that_prometheus_gives_itself(metric: Metric) -> None:
    assert not metric.name.endswith(("_count", "_sum", "_bucket", "_created"))


@every_metric
def test_a_base_unit_is_the_names_last_word_before_total(metric: Metric) -> None:
    last = metric.name.removesuffix("_total").rpartition("_")[2]
    if metric.unit in ("seconds", "bytes") or last in ("seconds", "bytes"):
        assert last == metric.unit
    assert last not in ("milliseconds", "ms", "minutes", "hours", "percent", "mb", "mib", "kilobytes")
    if last == "ratio":
        assert metric.unit in ("ratio", "1")


@every_metric
def test_summaries_and_only_they_have_quantiles(metric: Metric) -> None:
    assert ("quantile" in metric.labels) == (metric.kind == "summary")


@every_metric
def test_help_is_a_sentence(metric: Metric) -> None:
    assert re.fullmatch(r"([A-Z0-9]|[a-z_]+\(\)).*\.", metric.help)
    assert "\n" not in metric.help


@every_metric
def test_labels_are_distinct_have_their_values_listed_and_leave_the_common_ones_alone(metric: Metric) -> None:
    assert len(set(metric.labels)) == len(metric.labels)
    assert len(metric.values) == len(metric.labels)
    assert not {*COMMON_LABELS, "le"} & set(metric.labels)
    assert "optimizer" not in metric.labels or metric.name in RUN_WIDE


def test_every_kind_of_event_has_severities_that_the_wire_knows() -> None:
    assert {s for kind in EVENT_SEVERITIES for s in severities(kind)} <= {"critical", "warning", "info"}
    assert all(EVENT_SEVERITIES[kind] in severities(kind) for kind in EVENT_SEVERITIES)


def test_an_event_has_the_severity_of_its_kind_or_where_the_kind_has_several_its_own() -> None:
    assert Event("audit_finding", 1, 0.0, "", "", "").severity == "warning"
    assert Event("audit_finding", 1, 0.0, "", "", "", grade="critical").severity == "critical"
    with pytest.raises(ValueError, match=r"Event\(kind='crashed', grade='info'\): give 'critical', or none"):
        Event("crashed", 1, 0.0, "", "", "", grade="info")


def test_what_is_run_wide_is_in_the_catalogue() -> None:
    assert not RUN_WIDE - set(BY_NAME)
