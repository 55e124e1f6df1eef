"""The training jobs in examples/kubernetes are what the chart's PodMonitor scrapes and the agent understands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from tests.helm import operator_objects
from tests.helm.conftest import ROOT, Render

EXAMPLES = sorted((ROOT / "examples" / "kubernetes").glob("*.yaml"))
# Kubeflow's CRD is in no package; the fields that the example uses, by hand.
PYTORCH_JOB = operator_objects.thing(
    "apiVersion",
    "kind",
    "metadata",
    "spec",
    apiVersion={"const": "kubeflow.org/v1"},
    kind={"const": "PyTorchJob"},
    metadata=operator_objects.thing("generateName", generateName=operator_objects.TEXT),
    spec=operator_objects.thing(
        "pytorchReplicaSpecs",
        pytorchReplicaSpecs=operator_objects.thing(
            "Master",
            "Worker",
            **dict.fromkeys(
                ("Master", "Worker"),
                operator_objects.thing(
                    "replicas",
                    "restartPolicy",
                    "template",
                    replicas={"type": "integer", "minimum": 1},
                    restartPolicy={"enum": ["Never", "Always", "OnFailure", "ExitCode"]},
                    template={"type": "object"},
                ),
            ),
        ),
    ),
)


def load(path: Path) -> dict[str, Any]:
    (document,) = yaml.safe_load_all(path.read_text())
    return document


def templates(document: dict[str, Any]) -> list[dict[str, Any]]:
    if document["kind"] == "Job":
        return [document["spec"]["template"]]
    return [replica["template"] for replica in document["spec"]["pytorchReplicaSpecs"].values()]


def test_there_is_a_job_and_a_pytorch_job() -> None:
    assert {load(path)["kind"] for path in EXAMPLES} == {"Job", "PyTorchJob"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_valid(path: Path) -> None:
    document = load(path)
    if document["kind"] == "PyTorchJob":
        operator_objects.jsonschema.validate(document, PYTORCH_JOB)
    else:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    for template in templates(document):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **template["metadata"]}}
        kubernetes_validate.validate(pod | {"spec": template["spec"]}, "1.25", strict=True)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_scraped_and_reports_to_the_release_of_the_documentation(path: Path, render: Render) -> None:
    release = render(name="optwatch", namespace="monitoring")
    monitor = release.one("PodMonitor")["spec"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    service = release.one("Service")
    for template in templates(load(path)):
        assert monitor["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        (container,) = template["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports[endpoint["port"]] == 9464
        values = {one["name"]: one.get("value") for one in container["env"]}
        url = f"http://{service['metadata']['name']}.monitoring.svc:{service['spec']['ports'][0]['port']}"
        assert values["OPTWATCH_SERVER"] == url
        assert template["spec"]["enableServiceLinks"] is False
        # One variable has a value to fill in; the others come from the pod itself.
        assert [name for name, value in values.items() if value] == ["OPTWATCH_SERVER"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_variable_of_an_example_is_one_that_the_agent_reads(path: Path) -> None:
    sources = "".join(file.read_text() for file in (ROOT / "agent" / "optwatch").rglob("*.py"))
    settings = re.findall(r"^    ([a-z_]+): .* = ", (ROOT / "agent" / "optwatch" / "settings.py").read_text(), re.M)
    for template in templates(load(path)):
        for one in template["spec"]["containers"][0]["env"]:
            name = one["name"]
            assert f'"{name}"' in sources or name.removeprefix("OPTWATCH_").lower() in settings, name


def test_all_pods_of_a_pytorch_job_are_one_run_and_each_attempt_of_a_job_is_another() -> None:
    for path in EXAMPLES:
        document = load(path)
        assert document["metadata"]["generateName"]
        ids = [
            one["valueFrom"]["fieldRef"]["fieldPath"]
            for template in templates(document)
            for one in template["spec"]["containers"][0]["env"]
            if one["name"] == "OPTWATCH_RUN_ID"
        ]
        if document["kind"] == "PyTorchJob":
            assert set(ids) == {"metadata.labels['training.kubeflow.org/job-name']"}
            policies = [replica["restartPolicy"] for replica in document["spec"]["pytorchReplicaSpecs"].values()]
        else:
            assert ids == ["metadata.name"]
            policies = [templates(document)[0]["spec"]["restartPolicy"]]
        assert set(policies) == {"Never"}
