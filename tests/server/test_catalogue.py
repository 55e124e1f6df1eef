import dataclasses
import re

import pytest

import optwatch.catalogue
from optwatch_server import catalogue, wire

NAMES = re.compile(r"optwatch_(server|fleet)_[a-z_]+")


def test_the_agents_and_the_servers_metrics_have_the_same_form() -> None:
    def form(metric: type) -> list[tuple[str, object]]:
        return [(field.name, field.type) for field in dataclasses.fields(metric)]

    assert form(catalogue.Metric) == form(optwatch.catalogue.Metric)
    assert (catalogue.Kind, catalogue.Cadence) == (optwatch.catalogue.Kind, optwatch.catalogue.Cadence)


def test_no_name_is_used_twice_on_either_side() -> None:
    names = [metric.name for metric in (*catalogue.METRICS, *optwatch.catalogue.METRICS)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("metric", catalogue.METRICS, ids=lambda metric: metric.name)
def test_a_name_tells_unit_and_kind(metric: catalogue.Metric) -> None:
    assert NAMES.fullmatch(metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.name.removesuffix("_total").endswith("_seconds") == (metric.unit == "seconds")
    assert len(metric.labels) == len(metric.values)
    assert metric.help.endswith(".")


def test_the_statuses_are_those_of_the_wire() -> None:
    assert catalogue.STATUSES == wire.STATUSES
