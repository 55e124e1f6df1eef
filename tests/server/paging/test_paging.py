"""Pages through a real Alertmanager, from the server alone and together with a real Prometheus."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from optwatch_server.local.receiver import Receiver
from optwatch_server.local.serving import serving
from optwatch_server.local.stack import ALERTMANAGER, Process, Stack, find, free_port
from optwatch_server.shipping.configuration import Addresses, export

pytestmark = pytest.mark.e2e


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)
    return value


@contextmanager
def alertmanager(directory: Path, port: int, receiver: Receiver) -> Iterator[str]:
    """Run an Alertmanager with the shipped configuration on this port; stop it by its pid."""
    export(directory, Addresses(page_url=receiver.page_url, ticket_url=receiver.ticket_url))
    command = [
        find(*ALERTMANAGER),
        f"--config.file={directory / 'alertmanager.yaml'}",
        f"--storage.path={directory / 'alertmanager'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
    ]
    process = Process("alertmanager", command, port, directory / "alertmanager.log")
    try:
        yield process.url
    finally:
        process.stop()


def make_run(client: httpx.Client, run_id: str, **fields: object) -> None:
    run = {"schema": 1, "id": run_id, "name": "llama", "project": "nlp", **fields}
    client.post("/api/v1/runs", json=run).raise_for_status()


def send_event(client: httpx.Client, run_id: str, kind: str) -> None:
    event = {
        "id": str(uuid.uuid4()),
        "run_id": run_id,
        "kind": kind,
        "severity": "critical",
        "step": 7,
        "occurred_at": time.time(),
        "summary": "ValueError: no more data",
    }
    client.post("/api/v1/events", json={"schema": 1, "events": [event, event]}).raise_for_status()


def metric(client: httpx.Client, line: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return next(float(text.rpartition(" ")[2]) for text in lines if text.startswith(f"{line} "))


def alerts_of(url: str) -> list[dict[str, Any]]:
    return list(httpx.get(f"{url}/api/v2/alerts", trust_env=False).json())


def pages(receiver: Receiver) -> list[str]:
    return [
        alert["labels"]["alertname"]
        for notification in receiver.notifications
        if (notification.receiver, notification.status) == ("page", "firing")
        for alert in notification.alerts
    ]


def test_a_page_waits_for_an_alertmanager_that_is_away_survives_a_restart_and_arrives_once(tmp_path: Path) -> None:
    failed = 'optwatch_server_alertmanager_sends_total{result="failed"}'
    port = free_port()
    environment = {"OPTWATCH_ALERTMANAGER_URL": f"http://127.0.0.1:{port}"}
    with Receiver() as receiver:
        with (
            serving(tmp_path / "server", environment=environment) as url,
            httpx.Client(base_url=url, trust_env=False) as client,
        ):
            make_run(client, "run-1", heartbeat_interval_seconds=3600)
            send_event(client, "run-1", "nonfinite")
            until(lambda: metric(client, failed) >= 1)
        with (
            serving(tmp_path / "server", environment=environment) as url,
            httpx.Client(base_url=url, trust_env=False) as client,
            alertmanager(tmp_path / "alertmanager", port, receiver) as alertmanager_url,
        ):
            page = receiver.wait_for(lambda notification: notification.receiver == "page", 60)
            make_run(client, "run-2", heartbeat_interval_seconds=3600)
            send_event(client, "run-2", "divergence")  # with an Alertmanager that is there
            receiver.wait_for(lambda notification: "TrainingDiverged" in notification.names(), 60)
            assert sorted(alert["labels"]["alertname"] for alert in alerts_of(alertmanager_url)) == [
                "TrainingDiverged",
                "TrainingNonFinite",
            ]
            assert metric(client, 'optwatch_server_alertmanager_sends_total{result="ok"}') == 2
            assert metric(client, failed) >= 1
            # What Alertmanager really sends is what the alert history takes.
            assert client.post("/api/v1/alerts", json=page.payload).json() == {
                "accepted": 1,
                "duplicates": 0,
                "ignored": 0,
            }
            (kept,) = client.get("/api/v1/runs/run-1/alerts").json()["alerts"]
            assert (kept["alertname"], kept["status"]) == ("TrainingNonFinite", "firing")
            assert kept["fingerprint"] == page.alerts[0]["fingerprint"]
    assert sorted(pages(receiver)) == ["TrainingDiverged", "TrainingNonFinite"]


def test_one_failure_is_one_page_though_the_server_and_prometheus_both_raise_it(tmp_path: Path) -> None:
    port = free_port()
    with (
        Receiver() as receiver,
        Stack(
            tmp_path / "stack",
            server=f"http://127.0.0.1:{port}",
            page_url=receiver.page_url,
            ticket_url=receiver.ticket_url,
        ) as stack,
    ):
        environment = {
            "OPTWATCH_ALERTMANAGER_URL": stack.alertmanager_url,
            "OPTWATCH_PUBLIC_URL": f"http://127.0.0.1:{port}",
        }
        with (
            serving(tmp_path / "server", port=port, environment=environment) as url,
            httpx.Client(base_url=url, trust_env=False) as client,
        ):
            make_run(client, "run-1", heartbeat_interval_seconds=1)  # and never beats
            make_run(client, "run-2", heartbeat_interval_seconds=3600, team="research")
            sent_at = time.monotonic()
            send_event(client, "run-2", "nonfinite")
            receiver.wait_for(lambda notification: "TrainingNonFinite" in notification.names(), 60)
            print(f"\npage {time.monotonic() - sent_at:.1f} s after the event, by the direct path")
            receiver.wait_for(lambda notification: "TrainingRunLost" in notification.names(), 60)

            def prometheus_fires() -> bool:
                found = httpx.get(f"{stack.prometheus_url}/api/v1/alerts", trust_env=False).json()["data"]["alerts"]
                states = {alert["labels"]["alertname"]: alert["state"] for alert in found}
                return states == {"TrainingNonFinite": "firing", "TrainingRunLost": "firing"}

            until(prometheus_fires)
            # The latest to send is the one whose link an alert has: Prometheus has told Alertmanager of both.
            until(lambda: all("/graph?" in alert["generatorURL"] for alert in alerts_of(stack.alertmanager_url)))
            assert sorted(alert["labels"]["alertname"] for alert in alerts_of(stack.alertmanager_url)) == [
                "TrainingNonFinite",
                "TrainingRunLost",
            ]
    assert sorted(pages(receiver)) == ["TrainingNonFinite", "TrainingRunLost"]
