"""The notes that `helm install` ends with say where the runs are, what goes into training code, and what is off."""

from __future__ import annotations

from tests.helm.conftest import Render, ci_values


def test_the_notes_give_the_run_page_and_the_line_for_training_code(render: Render) -> None:
    notes = render().notes
    assert "http://optwatch-server.monitoring.svc:8000/runs/RUN_ID" in notes
    assert "OPTWATCH_SERVER=http://optwatch-server.monitoring.svc:8000\n" in notes
    assert "optwatch.attach(optimizer)" in notes
    assert 'optwatch.dev/scrape: "true"' in notes
    assert "port-forward service/optwatch-server 8000:8000" in notes


def test_the_notes_give_the_public_url_where_there_is_one(render: Render) -> None:
    notes = render({"publicUrl": "https://optwatch.example.com"}).notes
    assert "https://optwatch.example.com/runs/RUN_ID" in notes
    assert "port-forward" not in notes


def test_the_notes_name_what_is_switched_off_and_nothing_else(render: Render) -> None:
    def off(name: str) -> list[str]:
        part = render(ci_values()[name]).notes.split("Switched off:\n")[1].split("\n\n")[0]
        return [line.removeprefix("  - ").split(":")[0].strip() for line in part.splitlines() if line.strip()]

    assert off("everything") == ["nothing"]
    assert off("default") == ["alertmanagerConfig", "alertmanagerUrls", "ingress", "costPerDeviceHour"]
    assert off("minimal") == [
        "prometheusOperator",
        "alertmanagerUrls",
        "dashboards",
        "ingress",
        "networkPolicy",
        "tests",
        "costPerDeviceHour",
    ]


def test_the_notes_say_where_black_boxes_stay_if_postgresql_has_no_place_for_them(render: Render) -> None:
    database = {"type": "postgresql", "postgresql": {"existingSecret": "s"}}
    assert "- recordings: black boxes of incidents stay" in render({"database": database}).notes
    assert "black boxes" not in render({"database": database, "recordings": {"url": "s3://bucket"}}).notes
    assert "black boxes" not in render(ci_values()["postgresql"]).notes


def test_the_notes_warn_of_a_database_that_is_lost_with_its_pod(render: Render) -> None:
    assert "is lost when the pod goes" in render(ci_values()["minimal"]).notes
    assert "is lost when the pod goes" not in render().notes


def test_the_notes_warn_that_helm_test_pages_a_person_where_it_does(render: Render) -> None:
    assert "tell them first" in render(ci_values()["everything"]).notes
    assert "tell them first" not in render().notes
