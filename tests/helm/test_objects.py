"""Every ci/*-values.yaml renders to objects that Kubernetes takes, that fit together and that are locked down."""

from __future__ import annotations

import base64
import gzip
import json
import re
from typing import Any

import helm_python
import jsonschema
import kubernetes_validate
import pytest
import yaml
from tests.helm import operator_objects
from tests.helm.conftest import CHART, Release, Render, ci_values

OLDEST = yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"].removeprefix(">=").removesuffix(".0-0")
MEBIBYTE = 2**20


def pods(release: Release) -> list[dict[str, Any]]:
    return [
        document["spec"] if document["kind"] == "Pod" else document["spec"]["template"]["spec"]
        for document in release.objects
        if document["kind"] in ("Pod", "Deployment", "Job", "StatefulSet", "DaemonSet", "CronJob")
    ]


def containers(release: Release) -> list[dict[str, Any]]:
    return [one for pod in pods(release) for one in [*pod["containers"], *pod.get("initContainers", [])]]


@pytest.mark.parametrize("values", ci_values().values(), ids=ci_values())
def test_helm_lints_the_chart_without_a_warning(values: dict[str, Any]) -> None:
    report = helm_python.lint(CHART, values, strict=True, namespace="monitoring")
    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
def test_every_object_fits_the_strict_schema_of_the_oldest_and_the_newest_kubernetes(
    release: Release, version: str
) -> None:
    assert release.objects
    for document in release.objects:
        if operator_objects.known(document):
            operator_objects.check(document)
        else:
            kubernetes_validate.validate(document, version, strict=True)


def test_the_checks_of_objects_can_fail(render: Render) -> None:
    release = render()
    monitor = release.one("ServiceMonitor")
    monitor["spec"]["endpoints"][0]["scrapeTimeOut"] = "4s"
    with pytest.raises(jsonschema.ValidationError, match="scrapeTimeOut"):
        operator_objects.check(monitor)
    service = release.one("Service")
    service["spec"]["selectors"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="selectors"):
        kubernetes_validate.validate(service, OLDEST, strict=True)


def test_no_two_objects_share_a_name_and_all_names_are_valid(render: Render) -> None:
    for values in ci_values().values():
        for name in ("optwatch", "a", "x" * 53):
            objects = render(values, name=name).objects
            keys = [(o["kind"], o["metadata"]["namespace"], o["metadata"]["name"]) for o in objects]
            assert len(keys) == len(set(keys))
            for kind, _, its_name in keys:
                longest = 63 if kind in ("Service", "Pod", "Deployment") else 253
                assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", its_name), its_name
                assert len(its_name) <= longest
            for one in objects:
                for value in one["metadata"]["labels"].values():
                    assert re.fullmatch(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?", value), value


def test_every_selector_finds_the_server_and_not_the_test_pod(release: Release) -> None:
    deployment = release.one("Deployment")
    server = deployment["spec"]["template"]["metadata"]["labels"]
    others = [pod["metadata"]["labels"] for pod in release.all("Pod")]
    selectors = [deployment["spec"]["selector"]["matchLabels"], release.one("Service")["spec"]["selector"]]
    selectors += [policy["spec"]["podSelector"]["matchLabels"] for policy in release.all("NetworkPolicy")]
    selectors += [budget["spec"]["selector"]["matchLabels"] for budget in release.all("PodDisruptionBudget")]
    for selector in selectors:
        assert selector.items() <= server.items()
        assert not any(selector.items() <= other.items() for other in others)
    for monitor in release.all("ServiceMonitor"):
        service = release.one("Service")
        assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        assert monitor["spec"]["namespaceSelector"]["matchNames"] == [service["metadata"]["namespace"]]
        assert monitor["spec"]["endpoints"][0]["port"] in [port["name"] for port in service["spec"]["ports"]]


def test_every_port_named_anywhere_is_a_port_of_the_container(release: Release) -> None:
    container = release.container()
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert [port["targetPort"] for port in release.one("Service")["spec"]["ports"]] == list(ports)
    assert {container[probe]["httpGet"]["port"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")} == {
        "http"
    }
    assert container["args"][container["args"].index("--port") + 1] == str(ports["http"])
    for policy in release.all("NetworkPolicy"):
        assert [port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]] == ["http"]
    for ingress in release.all("Ingress"):
        backend = ingress["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
        assert backend == {"name": release.one("Service")["metadata"]["name"], "port": {"name": "http"}}


def test_every_pod_meets_the_restricted_pod_security_standard(release: Release) -> None:
    for pod in pods(release):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"].get("runAsUser") != 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert all({"emptyDir", "persistentVolumeClaim"} & set(volume) for volume in pod["volumes"])
        assert "/tmp" in [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]
    for container in containers(release):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
        }
        assert container["resources"]["requests"]
        assert container["resources"]["limits"]["memory"]
    for account in release.all("ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    assert not [document for document in release.objects if "rbac" in document["apiVersion"]]


def test_every_image_names_its_version(release: Release) -> None:
    for container in containers(release):
        assert re.fullmatch(r".+(:[A-Za-z0-9_][\w.-]*|@sha256:[0-9a-f]{64})", container["image"])
        assert not container["image"].endswith(":latest")


def test_the_default_image_is_that_of_the_chart_s_version(render: Render, chart: helm_python.Chart) -> None:
    assert render().container()["image"] == f"ghcr.io/optwatch/optwatch-server:{chart.metadata['appVersion']}"


def test_nothing_secret_is_rendered_anywhere(release: Release) -> None:
    assert release.all("Secret") == []
    text = json.dumps([one for one in release.objects if one["kind"] not in ("ConfigMap", "PrometheusRule")])
    text = text.replace("automountServiceAccountToken", "")
    assert not re.search(r"password|passwd|token|api_?key|://[^/\s\"]+:[^/\s\"]+@", text, re.IGNORECASE)


def test_a_service_is_never_called_optwatch_since_its_variables_would_be_read_as_the_agent_s(render: Render) -> None:
    for name, values in (("optwatch", {}), ("o", {"fullnameOverride": "optwatch"})):
        service = render(values, name=name).one("Service")["metadata"]["name"]
        variables = service.upper().replace("-", "_")
        assert f"{variables}_PORT" != "OPTWATCH_PORT"
        assert service == "optwatch-server"


def test_sqlite_stops_the_old_pod_first_and_keeps_the_history_when_uninstalled(render: Render) -> None:
    release = render()
    spec = release.one("Deployment")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    claim = release.one("PersistentVolumeClaim")
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    volumes = {volume["name"]: volume for volume in spec["template"]["spec"]["volumes"]}
    assert volumes["data"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    mounts = {mount["name"]: mount["mountPath"] for mount in release.container()["volumeMounts"]}
    url = {one["name"]: one.get("value") for one in release.container()["env"]}["OPTWATCH_DATABASE_URL"]
    assert url == f"sqlite:///{mounts['data']}/optwatch.sqlite3"


def test_an_existing_claim_is_used_and_none_is_made(render: Render) -> None:
    release = render({"database": {"sqlite": {"existingClaim": "mine"}}})
    assert release.all("PersistentVolumeClaim") == []
    volumes = release.one("Deployment")["spec"]["template"]["spec"]["volumes"]
    assert {"name": "data", "persistentVolumeClaim": {"claimName": "mine"}} in volumes


def test_postgresql_rolls_and_takes_its_url_from_the_secret_alone(render: Render) -> None:
    release = render(ci_values()["postgresql"])
    spec = release.one("Deployment")["spec"]
    assert (spec["replicas"], spec["strategy"]["type"]) == (3, "RollingUpdate")
    assert release.container()["env"][0] == {
        "name": "OPTWATCH_DATABASE_URL",
        "valueFrom": {"secretKeyRef": {"name": "optwatch-database", "key": "url"}},
    }
    assert "data" not in [volume["name"] for volume in spec["template"]["spec"]["volumes"]]
    assert release.one("PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_recordings_go_to_the_claim_or_url_that_is_named_and_with_neither_where_the_server_keeps_them(
    render: Render,
) -> None:
    def kept(values: dict[str, Any]) -> tuple[str | None, dict[str, str], dict[str, Any]]:
        release = render(values)
        variables = {one["name"]: one.get("value") for one in release.container()["env"]}
        mounts = {mount["name"]: mount["mountPath"] for mount in release.container()["volumeMounts"]}
        volumes = release.one("Deployment")["spec"]["template"]["spec"]["volumes"]
        return variables.get("OPTWATCH_RECORDINGS_URL"), mounts, {volume["name"]: volume for volume in volumes}

    postgresql = {"database": {"type": "postgresql", "postgresql": {"existingSecret": "s"}}}
    for values, volumes in (({}, {"tmp", "data"}), (postgresql, {"tmp"})):
        url, mounts, found = kept(values)
        assert (url, set(mounts), set(found)) == (None, volumes, volumes)
        url, mounts, found = kept(values | {"recordings": {"url": "s3://bucket/optwatch"}})
        assert (url, set(mounts), set(found)) == ("s3://bucket/optwatch", volumes, volumes)
        url, mounts, found = kept(values | {"recordings": {"existingClaim": "shared"}})
        assert url == mounts["recordings"]
        assert found["recordings"]["persistentVolumeClaim"] == {"claimName": "shared"}


def test_one_replica_has_no_disruption_budget_since_it_could_only_block_a_drain(render: Render) -> None:
    database = {"type": "postgresql", "postgresql": {"existingSecret": "s"}}
    assert render({"replicas": 1, "database": database}).all("PodDisruptionBudget") == []
    assert len(render({"replicas": 2, "database": database}).all("PodDisruptionBudget")) == 1


def test_the_server_gets_its_alertmanagers_and_the_cost_rate_as_variables(render: Render) -> None:
    def variables(values: dict[str, Any]) -> dict[str, str]:
        return {one["name"]: one.get("value") for one in render(values).container()["env"]}

    assert set(variables({})) == {"OPTWATCH_DATABASE_URL", "OPTWATCH_PUBLIC_URL", "OPTWATCH_GRAFANA_URL"}
    found = variables({"alertmanagerUrls": ["http://a:9093", "http://b:9093"], "costPerDeviceHour": 2.5})
    assert found["OPTWATCH_ALERTMANAGER_URL"] == "http://a:9093,http://b:9093"
    assert found["OPTWATCH_COST_PER_DEVICE_HOUR"] == "2.5"
    assert variables({"costPerDeviceHour": 0})["OPTWATCH_COST_PER_DEVICE_HOUR"] == "0"
    assert float(variables({"costPerDeviceHour": 12000000})["OPTWATCH_COST_PER_DEVICE_HOUR"]) == 12e6


def test_the_links_that_the_server_makes_begin_as_those_of_the_rules_do(render: Render) -> None:
    release = render({"publicUrl": "https://optwatch.example.com/", "grafanaUrl": "https://grafana.example.com/g/"})
    variables = {one["name"]: one.get("value") for one in release.container()["env"]}
    assert variables["OPTWATCH_PUBLIC_URL"] == "https://optwatch.example.com"
    assert variables["OPTWATCH_GRAFANA_URL"] == "https://grafana.example.com/g"
    for alert in release.alerts():
        assert alert["annotations"]["runbook_url"].startswith("https://optwatch.example.com/runbooks/")


def test_the_network_policy_opens_the_way_to_dns_database_and_alertmanagers_only(render: Render) -> None:
    def ports(values: dict[str, Any]) -> set[int]:
        rules = render(values).one("NetworkPolicy")["spec"]["egress"]
        return {port["port"] for rule in rules for port in rule["ports"]}

    assert ports({}) == {53}
    assert ports({"alertmanagerUrls": ["http://a:9093", "https://b", "http://c/x", "http://[::1]:9094"]}) == {
        53,
        9093,
        443,
        80,
        9094,
    }
    assert ports({"recordings": {"url": "s3://bucket/optwatch"}}) == {53, 443}
    assert ports({"recordings": {"url": "/tmp/recordings"}}) == {53}
    assert ports({"database": {"type": "postgresql", "postgresql": {"existingSecret": "s", "port": 6432}}}) == {
        53,
        6432,
    }


def test_operator_objects_carry_the_release_label_and_go_together(render: Render) -> None:
    kinds = ("ServiceMonitor", "PodMonitor", "PrometheusRule")
    release = render()
    for kind in kinds:
        for document in release.all(kind):
            assert document["metadata"]["labels"]["release"] == "kube-prometheus-stack"
    other = render({"prometheusOperator": {"release": "", "labels": {"team": "ml"}}})
    for kind in kinds:
        for document in other.all(kind):
            assert "release" not in document["metadata"]["labels"]
            assert document["metadata"]["labels"]["team"] == "ml"
    off = render(ci_values()["minimal"])
    assert not [document for document in off.objects if "coreos" in document["apiVersion"]]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("serviceMonitor", "ServiceMonitor"),
        ("podMonitor", "PodMonitor"),
        ("prometheusRule", "PrometheusRule"),
        ("dashboards", "ConfigMap"),
        ("tests", "Pod"),
        ("networkPolicy", "NetworkPolicy"),
    ],
)
def test_each_switch_switches_its_object(render: Render, value: str, kind: str) -> None:
    assert render().all(kind)
    assert render({value: {"enabled": False}}).all(kind) == []


def test_training_pods_are_found_by_label_in_all_namespaces_or_in_those_named(render: Render) -> None:
    spec = render().one("PodMonitor")["spec"]
    assert spec["selector"]["matchLabels"] == {"optwatch.dev/scrape": "true"}
    assert spec["namespaceSelector"] == {"any": True}
    assert spec["podMetricsEndpoints"][0]["honorLabels"] is True
    named = render({"podMonitor": {"namespaces": ["training"]}}).one("PodMonitor")["spec"]
    assert named["namespaceSelector"] == {"matchNames": ["training"]}


def test_jobs_are_called_as_in_the_shipped_prometheus_configuration(render: Render) -> None:
    prometheus = yaml.safe_load((CHART.parents[1] / "alerts" / "prometheus.yaml").read_text())
    jobs = {job["job_name"] for job in prometheus["scrape_configs"]}
    for values in (ci_values()["default"], ci_values()["postgresql"]):
        specs = [one["spec"] for one in render(values).objects if operator_objects.known(one)]
        endpoints = [
            endpoint
            for spec in specs
            for endpoint in spec.get("endpoints") or spec.get("podMetricsEndpoints") or [spec]
            if "relabelings" in endpoint
        ]
        assert {step["replacement"] for one in endpoints for step in one["relabelings"]} == jobs


def test_objects_fit_into_what_kubernetes_and_helm_can_store(release: Release, chart: helm_python.Chart) -> None:
    for document in release.objects:
        assert len(json.dumps(document).encode()) < MEBIBYTE, document["metadata"]["name"]
    # Helm keeps the chart and what it rendered, compressed, in one Secret.
    stored = json.dumps([chart.files, chart.templates, release.objects]).encode()
    assert len(base64.b64encode(gzip.compress(stored))) < MEBIBYTE
