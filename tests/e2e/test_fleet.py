"""A fleet of small real runs: the right alerts for the right runs, none for the healthy, and data in every panel."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
VARIABLES = {
    r"\$__rate_interval": "30s",
    r"\$__range": "10m",
    r"\$\{?(run_id|rank|layer|project)(:\w+)?\}?": ".*",
}
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]


def fleet_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fleet", ROOT / "examples" / "fleet.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for panel in dashboard["panels"]:
        found += [panel, *panel.get("panels", [])]
    return [panel for panel in found if panel.get("targets")]


def query(expression: str) -> str:
    for pattern, value in VARIABLES.items():
        expression = re.sub(pattern, value, expression)
    return expression


def test_each_run_of_the_fleet_has_its_alerts_and_every_panel_has_data(product: Any) -> None:
    scene = fleet_module()
    fleet = scene.Fleet(product.folder, product.server, steps=100_000)
    try:
        fleet.start()
        product.until(lambda: not missing(scene, product), 240, "alert for every run that something happened to")
        for _ in range(35):  # what was not to come would have come within a ticket's wait
            assert product.run("nobody") == {}  # and the server has errors to show
            time.sleep(1)
        assert scene.differences(scene.alerts(product.receiver)) == []
        pages = [n for n in product.receiver.notifications if n.receiver == "page" and n.status == "firing"]
        paged = [(alert["labels"]["alertname"], alert["labels"].get("run_id")) for n in pages for alert in n.alerts]
        assert sorted(paged) == sorted(set(paged))  # one page a run and cause, through both paths
        # The error ratios of the objectives take some evaluations of their groups, which are a minute apart.
        deadline = time.monotonic() + 200
        while (empty := empty_panels(product)) and time.monotonic() < deadline:
            product.run("nobody")
            time.sleep(2)
        assert not empty, "\n".join(empty)
    finally:
        fleet.stop()


def missing(scene: ModuleType, product: Any) -> list[str]:
    arrived = scene.alerts(product.receiver)
    return [name for run, wanted in scene.EXPECTED.items() for name in wanted - arrived.get(run, set())]


def empty_panels(product: Any) -> list[str]:
    """Titles of panels of which no query returns anything."""
    found = []
    for path in sorted((ROOT / "dashboards" / "generated").glob("*.json")):
        for panel in panels(json.loads(path.read_text())):
            expressions = [query(target["expr"]) for target in panel["targets"]]
            if not any(map(product.query, expressions)):
                found.append(f"{path.stem}: {panel['title']}: {expressions}")
    return found
