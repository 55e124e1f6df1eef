"""The chart, rendered by Helm's own engine as a library: no helm binary and no cluster are needed."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "optwatch"
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # `scripts` and `tests` are folders of the repository, not of the distribution


# libyaml's is ten times as fast, and the same; a PyYAML without it still works.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Release:
    """What one set of values renders to: the objects, and the notes that `helm install` ends with."""

    def __init__(self, rendered: dict[str, str]) -> None:
        self.notes = next(text for path, text in rendered.items() if path.endswith("NOTES.txt"))
        self.objects: list[dict[str, Any]] = [
            document
            for path, text in sorted(rendered.items())
            if not path.endswith("NOTES.txt")
            for document in yaml.load_all(text, LOADER)
            if document
        ]
        self.bytes = sum(len(text.encode()) for text in rendered.values())

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [document for document in self.objects if document["kind"] == kind]

    def one(self, kind: str) -> dict[str, Any]:
        (found,) = self.all(kind)
        return found

    def alerts(self) -> list[dict[str, Any]]:
        groups = [group for one in self.all("PrometheusRule") for group in one["spec"]["groups"]]
        return [rule for group in groups for rule in group["rules"] if "alert" in rule]

    def container(self) -> dict[str, Any]:
        return self.one("Deployment")["spec"]["template"]["spec"]["containers"][0]


Render = Callable[..., Release]


@pytest.fixture(scope="session")
def chart() -> Iterator[helm_python.Chart]:
    with helm_python.Chart.load(CHART) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def render(chart: helm_python.Chart) -> Render:
    """Renders the chart with `values`, which it checks against the schema first, as `helm install` does."""

    @functools.cache
    def text(values: str, name: str, namespace: str) -> dict[str, str]:
        return chart.render(json.loads(values), name=name, namespace=namespace)

    def render(values: dict[str, Any] | None = None, name: str = "optwatch", namespace: str = "monitoring") -> Release:
        return Release(text(json.dumps(values or {}), name, namespace))

    return render


def ci_values() -> dict[str, dict[str, Any]]:
    files = sorted((CHART / "ci").glob("*-values.yaml"))
    return {path.name.removesuffix("-values.yaml"): yaml.safe_load(path.read_text()) for path in files}


@pytest.fixture(params=sorted(ci_values()), scope="session")
def release(request: pytest.FixtureRequest, render: Render) -> Release:
    """The release of each ci/*-values.yaml in turn."""
    return render(ci_values()[request.param])


@pytest.fixture(scope="session")
def program() -> Callable[[str], str]:
    """Gives a program's path, or fails the test: what was never checked by it is a guess."""

    def find(name: str) -> str:
        if (path := shutil.which(name)) is None:
            pytest.fail(f"{name} is not on PATH; on Debian: apt-get install prometheus prometheus-alertmanager")
        return path

    return find
