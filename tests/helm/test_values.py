"""Values: each is in the schema and commented, the schema has no other, and a wrong one is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import helm_python
import pytest
import yaml
from tests.helm.conftest import CHART, Render, ci_values

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
TEXT = (CHART / "values.yaml").read_text()
# Helm itself passes this one when the chart is a part of another.
HELMS_OWN = {"global"}
# Whoever installs names these keys: labels, annotations, quantities.
MAPS = {"$ref": "#/definitions/strings"}


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    if reference := schema.get("$ref"):
        return SCHEMA["definitions"][reference.rsplit("/", 1)[1]]
    return schema


def in_schema(schema: dict[str, Any], path: str = "") -> Iterator[str]:
    properties = resolved(schema).get("properties")
    if not properties or path.endswith((".page", ".ticket", "affinity", "resources")):
        yield path
        return
    for name, child in properties.items():
        if path or name not in HELMS_OWN:
            yield from in_schema(child, f"{path}.{name}".removeprefix("."))


def in_values(values: Any, path: str = "") -> Iterator[str]:
    if not isinstance(values, dict) or not values or path.endswith("resources"):
        yield path
        return
    for name, child in values.items():
        yield from in_values(child, f"{path}.{name}".removeprefix("."))


def test_every_value_is_in_the_schema_and_every_property_of_the_schema_is_a_value() -> None:
    assert set(in_values(VALUES)) == set(in_schema(SCHEMA))


def test_every_value_has_a_comment_above_it() -> None:
    lines = TEXT.splitlines()
    parents: list[tuple[int, str]] = []
    commented = set()
    for number, line in enumerate(lines):
        if not (found := re.match(r"( *)([A-Za-z]+):(.*)", line)):
            continue
        indent = len(found[1])
        parents = [parent for parent in parents if parent[0] < indent] + [(indent, found[2])]
        above = number - 1
        while lines[above].startswith(f"{found[1]}#") and not lines[above].startswith(f"{found[1]}# -- "):
            above -= 1
        if lines[above].startswith(f"{found[1]}# -- "):
            commented.add(".".join(name for _, name in parents))
    assert set(in_values(VALUES)) - commented == set()


def objects(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield path, schema
        for name, child in schema.items():
            yield from objects(child, f"{path}/{name}")
    elif isinstance(schema, list):
        for number, child in enumerate(schema):
            yield from objects(child, f"{path}/{number}")


def test_the_schema_takes_no_unknown_name_except_where_kubernetes_owns_the_type() -> None:
    open_ones = {path for path, one in objects(SCHEMA) if one.get("additionalProperties") is not False}
    assert open_ones == {
        "/definitions/object",
        "/definitions/objects/items",
        "/definitions/strings",
        "/properties/global",
        "/properties/resources/properties/limits",
        "/properties/resources/properties/requests",
    }


@pytest.mark.parametrize("path", sorted(in_values(VALUES)))
def test_a_misspelt_name_beside_each_value_is_refused(chart: helm_python.Chart, path: str) -> None:
    *parents, _ = path.split(".")
    values: dict[str, Any] = {"mispelt": 1}
    for parent in reversed(parents):
        values = {parent: values}
    with pytest.raises(helm_python.HelmValuesError, match="mispelt"):
        chart.validate_schema(values)


POSTGRESQL = {"type": "postgresql", "postgresql": {"existingSecret": "s"}}
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("/replicas", {"replicas": 2}),
    ("/replicas", {"replicas": 0, "database": POSTGRESQL}),
    ("/database/postgresql/existingSecret", {"database": {"type": "postgresql"}}),
    ("/database/type", {"database": {"type": "mysql"}}),
    ("/database/sqlite/size", {"database": {"sqlite": {"size": "ten"}}}),
    ("/database/sqlite/accessModes/0", {"database": {"sqlite": {"accessModes": ["ReadOnlyMany"]}}}),
    ("/database/postgresql/port", {"database": {"postgresql": {"port": 70000}}}),
    ("/recordings/url", {"recordings": {"url": "bucket/optwatch"}}),
    ("/recordings/url", {"recordings": {"url": "s3://key:secret@bucket/optwatch"}}),
    ("/recordings/url", {"recordings": {"url": "s3://bucket", "existingClaim": "shared"}}),
    ("/image/tag", {"image": {"tag": "latest"}}),
    ("/image/digest", {"image": {"digest": "sha256:short"}}),
    ("/image/pullPolicy", {"image": {"pullPolicy": "Sometimes"}}),
    ("/securityContext/runAsUser", {"securityContext": {"runAsUser": 0}}),
    ("/alertmanagerUrls/0", {"alertmanagerUrls": ["alertmanager:9093"]}),
    ("/alertmanagerUrls", {"alertmanagerUrls": "http://alertmanager:9093"}),
    ("/publicUrl", {"publicUrl": "optwatch.example.com"}),
    ("/grafanaUrl", {"grafanaUrl": 'http://grafana" or {{ vector(1) }}'}),
    ("/costPerDeviceHour", {"costPerDeviceHour": "2.5"}),
    ("/costPerDeviceHour", {"costPerDeviceHour": -1}),
    ("/extraEnv/0", {"extraEnv": [{"name": "A"}]}),
    ("/extraEnv/0/name", {"extraEnv": [{"name": "A-B", "value": "c"}]}),
    ("/ingress/host", {"ingress": {"enabled": True}}),
    ("/scrapeConfig/enabled", {"scrapeConfig": {"enabled": True}}),
    ("/serviceMonitor/interval", {"serviceMonitor": {"interval": "5"}}),
    ("/prometheusRule/interval", {"prometheusRule": {"interval": 5}}),
    ("/alertmanagerConfig/receivers/page", {"alertmanagerConfig": {"enabled": True}}),
    (
        "/alertmanagerConfig/receivers/page",
        {"alertmanagerConfig": {"receivers": {"page": {"pagerDutyConfigs": []}}}},
    ),
    ("/probes/periodSeconds", {"probes": {"periodSeconds": 0}}),
    ("/podDisruptionBudget/maxUnavailable", {"podDisruptionBudget": {"maxUnavailable": "0%"}}),
    ("/podLabels/team", {"podLabels": {"team": 7}}),
    ("/resources/limits/memory", {"resources": {"limits": {"memory": "much"}}}),
    ("/fullnameOverride", {"fullnameOverride": "Fleet"}),
]


@pytest.mark.parametrize(("name", "values"), WRONG, ids=[f"{number}{name}" for number, (name, _) in enumerate(WRONG)])
def test_a_wrong_value_is_refused_by_its_name(render: Render, name: str, values: dict[str, Any]) -> None:
    with pytest.raises(helm_python.HelmError, match=f"'{re.escape(name)}'"):
        render(values)


def test_one_replica_more_is_taken_with_postgresql_and_refused_with_sqlite(render: Render) -> None:
    assert render({"replicas": 2, "database": POSTGRESQL}).one("Deployment")["spec"]["replicas"] == 2
    assert render({"replicas": 1}).one("Deployment")["spec"]["replicas"] == 1
    with pytest.raises(helm_python.HelmError, match="maximum"):
        render({"replicas": 2})


def test_a_null_leaves_the_user_to_the_platform(render: Render) -> None:
    context = render({"securityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None}})
    spec = context.one("Deployment")["spec"]["template"]["spec"]["securityContext"]
    assert spec == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def test_the_values_that_ci_renders_turn_everything_on_and_everything_off() -> None:
    def switches(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, bool]]:
        for name, child in values.items():
            if isinstance(child, dict):
                yield from switches(child, f"{path}{name}.")
            elif name == "enabled":
                yield f"{path}{name}", child

    defaults = dict(switches(VALUES))
    seen = {
        (name, state) for values in ci_values().values() for name, state in (defaults | dict(switches(values))).items()
    }
    # These go with prometheusOperator.enabled, or make no object without a second replica.
    under_another = {"serviceMonitor", "prometheusRule", "podDisruptionBudget"}
    expected = {(name, state) for name in defaults for state in (True, False)}
    assert {one for one in expected - seen if one[0].split(".")[0] not in under_another} == set()
