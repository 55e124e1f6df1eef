"""The generated dashboards are current, keep the house rules, and ask only for what exists."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dashboards import lint, promql
from dashboards.generate import DASHBOARDS, write
from dashboards.page import PAGES, SERVER_URL

from optwatch import catalogue as agent
from optwatch_server import catalogue as server

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ROOT / "dashboards" / "generated"
METRICS = [*agent.METRICS, *server.METRICS]

NOT_SHOWN: dict[str, str] = {
    "optwatch_server_request_duration_seconds": "no person waits for the server; what does is in agents' overhead",
}
"""Metrics that no dashboard shows, each with the reason."""


def load(name):
    return json.loads((GENERATED / name).read_text(encoding="utf-8"))


every_dashboard = pytest.mark.parametrize("name", sorted(DASHBOARDS))


@every_dashboard
def test_the_generated_file_is_current_byte_for_byte(name, tmp_path):
    write(tmp_path)
    assert (tmp_path / name).read_bytes() == (GENERATED / name).read_bytes(), (
        f"dashboards/generated/{name} is out of date: run python dashboards/generate.py"
    )


def test_generated_holds_no_dashboard_that_nothing_makes():
    assert {path.name for path in GENERATED.glob("*.json")} == set(DASHBOARDS)


def test_the_command_runs_as_a_file_from_any_folder(tmp_path):
    command = [sys.executable, str(ROOT / "dashboards" / "generate.py"), "out"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(DASHBOARDS)


@every_dashboard
@pytest.mark.parametrize("rule", [lint.described, lint.identified, lint.placed, lint.framed, lint.rated])
def test_the_dashboard_keeps_the_house_rule(name, rule):
    assert rule(load(name)) == []


@every_dashboard
def test_queries_ask_only_for_metrics_and_labels_of_the_catalogues_and_the_rules(name, labels):
    assert lint.known(load(name), labels) == []


@every_dashboard
def test_every_colour_of_a_verdict_is_a_name_that_both_themes_know(name):
    for panel in lint.panels(load(name)):
        for step in panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", []):
            assert re.fullmatch(r"green|yellow|red|text|transparent|#[0-9a-f]{6}", step["color"])


def test_every_metric_of_agent_and_server_is_on_a_dashboard_or_left_out_for_a_reason():
    shown = {
        name for file in DASHBOARDS for _, expr, _ in lint.queries(load(file)) for name, _ in promql.selectors(expr)
    }
    names = {metric.name for metric in METRICS}
    bare = {name if name in names else re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    assert names - bare == set(NOT_SHOWN)
    assert all(NOT_SHOWN.values())


def test_what_is_bad_is_shown_for_all_ranks_whichever_are_chosen():
    expressions = [
        expr for where, expr, _ in lint.queries(load("debug.json")) if re.match(r"panel [16]\d\d |annot", where)
    ]
    assert len(expressions) > 20
    assert not [expr for expr in expressions if "$rank" in expr]


@every_dashboard
def test_links_to_the_server_all_begin_with_the_address_that_an_export_replaces(name):
    text = (GENERATED / name).read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^/\"]+", text)) == {SERVER_URL}
    assert f"{SERVER_URL}/runs/${{" in text
    assert f"{SERVER_URL}/runbooks" in text


@every_dashboard
def test_the_dashboard_links_to_the_two_others_and_keeps_their_project(name):
    document = load(name)
    links = {link["url"]: link["includeVars"] for link in document["links"] if link["url"].startswith("/d/")}
    assert links == {f"/d/{uid}": True for uid in PAGES if uid != document["uid"]}


def test_every_dashboard_has_a_name_by_which_the_others_link_to_it():
    assert {load(name)["uid"] for name in DASHBOARDS} == set(PAGES)


def test_the_first_screen_of_the_on_call_dashboard_fits_900_pixels():
    """Above the panels Grafana 11 has 104 pixels of its own at this width; a row of the grid is 38 with its gap."""
    document = load("oncall.json")
    below = next(row["gridPos"]["y"] for row in document["panels"] if row["id"] == 200)
    assert 104 + 38 * below <= 900


@every_dashboard
def test_an_alert_in_a_table_leads_to_its_runbook_and_a_run_to_its_page(name):
    for panel in lint.panels(load(name)):
        if panel["type"] == "table":
            urls = {
                override["matcher"]["options"]: [link["url"] for link in item["value"]]
                for override in panel["fieldConfig"]["overrides"]
                for item in override["properties"]
                if item["id"] == "links"
            }
            renamed = panel["transformations"][-1]["options"]["renameByName"]
            if "alertname" in renamed:
                assert urls[renamed["alertname"]] == [f"{SERVER_URL}/runbooks/${{__value.text}}"]
            if renamed.get("run_id") == "Run":
                assert urls["Run"] == [
                    f"{SERVER_URL}/runs/${{__value.text}}",
                    "/d/optwatch-debug?var-run_id=${__value.text}",
                ]


def test_the_documentation_tells_what_each_row_answers():
    text = (ROOT / "docs" / "dashboards.md").read_text(encoding="utf-8")
    for name in DASHBOARDS:
        for row in (panel for panel in load(name)["panels"] if panel["type"] == "row"):
            assert f"| {row['title'].replace(' of ${run_id}', '')} | " in text


def test_the_pictures_of_the_documentation_are_there_and_small():
    text = (ROOT / "docs" / "dashboards.md").read_text(encoding="utf-8")
    pictures = {ROOT / "docs" / path for path in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)}
    assert {path.stem for path in pictures} == {Path(name).stem for name in DASHBOARDS}
    for path in pictures:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 300 * 1024


def rules_of(document):
    """The dashboard's queries as recording rules, with values in place of the variables."""
    values = {"$__rate_interval": "1m", "$__range": "1h", "$__interval": "15s"}
    rules = []
    for _, expr, _ in lint.queries(document):
        for variable, value in values.items():
            expr = expr.replace(variable, value)
        rules.append({"record": f"query:{len(rules)}", "expr": re.sub(r"\$\{?[A-Za-z_]\w*\}?", "x", expr)})
    return {"groups": [{"name": "dashboard", "rules": rules}]}


def check_with_promtool(rules, path):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.fail("promtool is missing: apt-get install prometheus")
    path.write_text(yaml.safe_dump(rules), encoding="utf-8")
    return subprocess.run([promtool, "check", "rules", str(path)], capture_output=True, text=True, check=False)


@every_dashboard
def test_prometheus_parses_every_query(name, tmp_path):
    rules = rules_of(load(name))
    checked = check_with_promtool(rules, tmp_path / "rules.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(rules['groups'][0]['rules'])} rules found" in checked.stdout + checked.stderr


def test_a_query_that_prometheus_does_not_parse_is_found(tmp_path):
    document = load("debug.json")
    document["panels"][1]["targets"][0]["expr"] += " +"
    checked = check_with_promtool(rules_of(document), tmp_path / "rules.yaml")
    assert checked.returncode != 0
    assert "parse" in checked.stdout + checked.stderr
