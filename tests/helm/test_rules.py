"""Rules, dashboards and routes in the chart are the shipped ones with addresses replaced, and Prometheus takes them."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from scripts import generate_chart
from tests.helm.conftest import CHART, ROOT, Render, ci_values

URLS = {"publicUrl": "https://optwatch.example.com/", "grafanaUrl": "https://grafana.example.com/g/"}
SOURCES = sorted((ROOT / "alerts" / "rules").glob("*.yaml"))


def test_the_generated_files_are_those_of_the_sources() -> None:
    assert generate_chart.stale(generate_chart.files()) == [], "run: python scripts/generate_chart.py"


def test_generating_twice_gives_the_same_bytes_and_removes_what_has_no_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate_chart, "FILES", tmp_path)
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "gone.yaml").write_text("groups: []\n")
    assert generate_chart.main(["--check"]) == 1
    assert generate_chart.main([]) == 0
    first = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert not any(path.name == "gone.yaml" for path in first)
    assert generate_chart.main([]) == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == first
    assert generate_chart.main(["--check"]) == 0


def addressed(text: str) -> str:
    return text.replace("http://optwatch:8000", "https://optwatch.example.com").replace(
        "http://grafana:3000", "https://grafana.example.com/g"
    )


def test_the_rules_are_the_shipped_ones_with_addresses_and_an_interval(render: Render) -> None:
    objects = {one["metadata"]["name"]: one["spec"] for one in render(URLS).all("PrometheusRule")}
    assert set(objects) == {f"optwatch-{path.stem.replace('_', '-').lower()}" for path in SOURCES}
    for path in SOURCES:
        groups = yaml.safe_load(addressed(path.read_text()))["groups"]
        for group in groups:
            group.setdefault("interval", "5s")
        assert objects[f"optwatch-{path.stem.replace('_', '-').lower()}"]["groups"] == groups
    assert "http://optwatch" not in json.dumps(objects)
    assert "http://grafana" not in json.dumps(objects)


def test_promtool_takes_the_rules_as_rendered(render: Render, program: Callable[[str], str], tmp_path: Path) -> None:
    for document in render(URLS).all("PrometheusRule"):
        path = tmp_path / f"{document['metadata']['name']}.yaml"
        path.write_text(yaml.safe_dump(document["spec"]))
        done = subprocess.run([program("promtool"), "check", "rules", path], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "g", "rules": [{"alert": "A", "expr": "up >"}]}]}))
    assert subprocess.run([program("promtool"), "check", "rules", path], capture_output=True).returncode != 0


def test_every_dashboard_is_one_config_map_with_its_links_replaced(render: Render) -> None:
    sources = sorted((ROOT / "dashboards" / "generated").glob("*.json"))
    maps = render(URLS).all("ConfigMap")
    assert sources
    assert len(maps) == len(sources)
    shown = {file: json.loads(text) for one in maps for file, text in one["data"].items()}
    assert shown == {f"optwatch-{path.name}": json.loads(addressed(path.read_text())) for path in sources}
    for one in maps:
        assert one["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert one["metadata"]["annotations"] == {"grafana_folder": "optwatch"}


def test_folder_label_and_namespace_of_the_dashboards_are_values(render: Render) -> None:
    values = {"label": "dash", "labelValue": "yes", "folderAnnotation": "dir", "folder": "ML", "namespace": "grafana"}
    metadata = render({"dashboards": values}).all("ConfigMap")[0]["metadata"]
    assert metadata["labels"]["dash"] == "yes"
    assert metadata["annotations"] == {"dir": "ML"}
    assert metadata["namespace"] == "grafana"
    assert "annotations" not in render({"dashboards": {"folder": ""}}).all("ConfigMap")[0]["metadata"]


def test_links_begin_with_the_ingress_or_the_service_where_no_url_is_given(render: Render) -> None:
    def runbook(values: dict[str, Any]) -> str:
        return str(render(values).alerts()[0]["annotations"]["runbook_url"])

    assert runbook({}).startswith("http://optwatch-server.monitoring.svc:8000/runbooks/")
    ingress = {"enabled": True, "host": "watch.example.com"}
    assert runbook({"ingress": ingress}).startswith("http://watch.example.com/runbooks/")
    assert runbook({"ingress": {**ingress, "tlsSecret": "t"}}).startswith("https://watch.example.com/runbooks/")
    assert runbook({"ingress": ingress, **URLS}).startswith("https://optwatch.example.com/runbooks/")


def test_every_shipped_alert_is_one_that_the_routes_take() -> None:
    pattern = generate_chart.OURS["value"]
    names = [
        rule["alert"]
        for path in SOURCES
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
        if "alert" in rule
    ]
    assert names
    assert [name for name in names if not re.fullmatch(pattern, name)] == []
    assert not re.fullmatch(pattern, "KubePodCrashLooping")


SNAKE = {made: name for name, made in generate_chart._ROUTE.items()}


def matchers(given: list[dict[str, str]]) -> list[str]:
    return [f"{one['name']}{one['matchType']}{json.dumps(one['value'])}" for one in given]


def as_alertmanager_reads_it(spec: dict[str, Any]) -> dict[str, Any]:
    """What the operator makes of the object: Alertmanager's own form of it, below its own first route."""

    def route(given: dict[str, Any]) -> dict[str, Any]:
        made = {SNAKE[key]: value for key, value in given.items() if key in SNAKE}
        if "matchers" in given:
            made["matchers"] = matchers(given["matchers"])
        if "routes" in given:
            made["routes"] = [route(child) for child in given["routes"]]
        return made

    rules = [
        {
            "source_matchers": matchers(rule["sourceMatch"]),
            "target_matchers": matchers(rule["targetMatch"]),
            **({"equal": rule["equal"]} if "equal" in rule else {}),
        }
        for rule in spec.get("inhibitRules", [])
    ]
    intervals = [
        {
            "name": interval["name"],
            "time_intervals": [
                {
                    key: [{"start_time": at["startTime"], "end_time": at["endTime"]} for at in value]
                    if key == "times"
                    else value
                    for key, value in part.items()
                }
                for part in interval["timeIntervals"]
            ],
        }
        for interval in spec.get("muteTimeIntervals", [])
    ]
    return {
        "route": {"receiver": "others", "routes": [route(spec["route"])]},
        "inhibit_rules": rules,
        "receivers": [{"name": name} for name in ("others", *(one["name"] for one in spec["receivers"]))],
        **({"time_intervals": intervals} if intervals else {}),
    }


def normalised(document: Any) -> Any:
    """Matchers without the spaces that Alertmanager allows in them, and intervals without their default location."""
    if isinstance(document, dict):
        return {
            key: [re.sub(r"\s*(=~|!~|!=|=)\s*", r"\1", text, count=1) for text in value]
            if key.endswith("matchers")
            else normalised(value)
            for key, value in document.items()
            if (key, value) != ("location", "UTC")
        }
    return [normalised(one) for one in document] if isinstance(document, list) else document


def test_the_alertmanager_config_routes_and_inhibits_as_the_shipped_configuration_does(render: Render) -> None:
    spec = render(ci_values()["everything"]).one("AlertmanagerConfig")["spec"]
    shipped = normalised(yaml.safe_load((ROOT / "alerts" / "alertmanager.yaml").read_text()))
    made = as_alertmanager_reads_it(spec)
    (ours,) = made["route"]["routes"]
    assert ours.pop("matchers") == ['alertname=~"(Training|Optwatch).+"']
    assert ours == shipped["route"]
    assert made["inhibit_rules"] == shipped.get("inhibit_rules", [])
    assert made.get("time_intervals") == shipped.get("time_intervals")
    assert {one["name"] for one in spec["receivers"]} == generate_chart.RECEIVERS


def test_amtool_routes_a_page_a_ticket_and_somebody_else_s_alert(
    render: Render, program: Callable[[str], str], tmp_path: Path
) -> None:
    path = tmp_path / "alertmanager.yaml"
    spec = render(ci_values()["everything"]).one("AlertmanagerConfig")["spec"]
    path.write_text(yaml.safe_dump(as_alertmanager_reads_it(spec)))

    def receiver(*labels: str) -> str:
        command = [program("amtool"), "config", "routes", "test", f"--config.file={path}", *labels]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    check = subprocess.run([program("amtool"), "check-config", path], capture_output=True, text=True, timeout=60)
    assert check.returncode == 0, check.stdout + check.stderr
    assert receiver("alertname=TrainingNonFinite", "notify=page") == "page"
    assert receiver("alertname=TrainingLossSpike", "notify=ticket") == "ticket"
    assert receiver("alertname=TrainingNew") == "ticket"
    assert receiver("alertname=KubePodCrashLooping", "notify=page") == "others"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mute": []}, "mute"),
        ({"receivers": [{"name": "sms"}]}, "sms"),
        ({"route": {"receiver": "page", "group_every": "1s"}}, "group_every"),
        ({"route": {"receiver": "page", "matchers": ['a="b"']}}, "first route"),
        ({"route": {"receiver": "page", "routes": [{"matchers": ["nonsense"]}]}}, "nonsense"),
        ({"inhibit_rules": [{"source_match": {}}]}, "source_match"),
        ({"time_intervals": [{"name": "n", "time_intervals": [{"location": "Europe/Berlin"}]}]}, "Europe/Berlin"),
    ],
)
def test_what_the_chart_could_not_carry_of_the_routes_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    document = yaml.safe_load((ROOT / "alerts" / "alertmanager.yaml").read_text())
    with pytest.raises(ValueError, match=message):
        generate_chart.alertmanager_config(copy.deepcopy(document) | change)


def test_a_scheduled_mute_is_carried_over() -> None:
    document = {
        "route": {"receiver": "page", "routes": [{"receiver": "ticket", "mute_time_intervals": ["night"]}]},
        "receivers": [],
        "time_intervals": [
            {
                "name": "night",
                "time_intervals": [
                    {"times": [{"start_time": "22:00", "end_time": "24:00"}], "weekdays": ["monday:friday"]}
                ],
            }
        ],
    }
    made = generate_chart.alertmanager_config(document)
    assert made["route"]["routes"] == [{"receiver": "ticket", "muteTimeIntervals": ["night"]}]
    spec = {"receivers": [], **made}
    assert as_alertmanager_reads_it(spec)["time_intervals"] == document["time_intervals"]


def test_the_chart_has_no_rule_or_dashboard_that_helm_would_leave_out() -> None:
    ignored = (CHART / ".helmignore").read_text().split()
    assert not any(pattern.strip("/") in ("files", "*.yaml", "*.json") for pattern in ignored)
