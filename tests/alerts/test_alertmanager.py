"""The shipped routes, inhibitions and muting in a real Alertmanager: who is told of what, and how often."""

from __future__ import annotations

import http.client
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from optwatch_server.local.receiver import Receiver
from optwatch_server.local.stack import ALERTMANAGER, Process, find

SHIPPED = Path(__file__).resolve().parents[2] / "alerts" / "alertmanager.yaml"
WAITS = {"30s": "3s", "15s": "3s", "1s": "1s"}
"""The shipped waits, and shorter ones that a test can wait for; their order stays."""
SETTLED = 6.0
"""Seconds after which everything that is sent at all has been sent, at these waits."""
ALWAYS = {"name": "sweeps", "time_intervals": [{"times": [{"start_time": "00:00", "end_time": "24:00"}]}]}
NEVER = {"name": "sweeps", "time_intervals": [{"years": ["1999"]}]}


class Told:
    """A running Alertmanager and what it has sent."""

    def __init__(self, process: Process, receiver: Receiver) -> None:
        self._process = process
        self._receiver = receiver

    def raises(self, *alerts: dict[str, str]) -> None:
        """Give Alertmanager alerts, as Prometheus and the server do."""
        connection = http.client.HTTPConnection("127.0.0.1", self._process.port, timeout=10)
        try:
            body = json.dumps([{"labels": labels} for labels in alerts])
            connection.request("POST", "/api/v2/alerts", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
        finally:
            connection.close()

    def settled(self) -> None:
        time.sleep(SETTLED)

    def sent(self, receiver: str) -> list[list[str]]:
        """Each notification to a receiver as its alerts' names with run or cause, sorted."""
        told = [notification for notification in self._receiver.notifications if notification.receiver == receiver]
        return sorted(sorted(_short(alert["labels"]) for alert in notification.alerts) for notification in told)


def _short(labels: dict[str, str]) -> str:
    return f"{labels['alertname']} {labels.get('run_id') or labels.get('cause') or ''}".strip()


def page(name: str, run: str = "", **labels: str) -> dict[str, str]:
    which = {"run_id": run, "run": "gpt", "project": "nlp"} if run else {}
    return {"alertname": name, "severity": "critical", "notify": "page", **which, **labels}


def ticket(name: str, run: str, **labels: str) -> dict[str, str]:
    return {**page(name, run, **labels), "severity": "warning", "notify": "ticket"}


def _quicker(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: WAITS[value] if key == "group_wait" else _quicker(value) for key, value in node.items()}
    return [_quicker(value) for value in node] if isinstance(node, list) else node


@contextmanager
def _alertmanager(folder: Path, sweeps: dict[str, Any]) -> Iterator[Told]:
    with Receiver() as receiver:
        document = _quicker(yaml.safe_load(SHIPPED.read_text(encoding="utf-8")))
        document["time_intervals"] = [sweeps]
        for place, url in zip(document["receivers"], (receiver.page_url, receiver.ticket_url), strict=True):
            place["webhook_configs"][0]["url"] = url
        (folder / "alertmanager.yaml").write_text(json.dumps(document))
        program = find(*ALERTMANAGER)
        process = Process.start(
            "alertmanager",
            lambda port: [
                program,
                f"--config.file={folder / 'alertmanager.yaml'}",
                f"--storage.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--cluster.listen-address=",
            ],
            folder,
            30,
        )
        try:
            yield Told(process, receiver)
        finally:
            process.stop()


@pytest.mark.e2e
def test_a_page_is_one_a_run_and_cause_and_mutes_what_it_explains_of_that_run_only(tmp_path: Path) -> None:
    with _alertmanager(tmp_path, ALWAYS) as told:
        told.raises(
            page("TrainingOutOfMemory", "r1"),
            page("TrainingCrashed", "r1"),
            page("TrainingRunLost", "r1"),
            ticket("TrainingCheckpointStale", "r1"),
            ticket("TrainingGpuIdle", "r1"),
            page("TrainingCrashed", "r2"),
            ticket("TrainingGpuIdle", "r3"),
            ticket("TrainingGpuIdle", "r4"),
            page("TrainingNonFinite", "r5"),
            page("TrainingDiverged", "r5"),
            ticket("TrainingLossSpike", "r5"),
            ticket("TrainingLossSpike", "r6"),
        )
        told.raises(page("TrainingNonFinite", "r5"))  # the same, by the other of the two paths
        told.settled()
        assert told.sent("page") == [["TrainingCrashed r2"], ["TrainingNonFinite r5"], ["TrainingOutOfMemory r1"]]
        assert told.sent("ticket") == [["TrainingGpuIdle r3", "TrainingGpuIdle r4"], ["TrainingLossSpike r6"]]


@pytest.mark.e2e
def test_a_flood_is_one_page_where_its_count_comes_seconds_after_the_pages_it_counts(tmp_path: Path) -> None:
    with _alertmanager(tmp_path, ALWAYS) as told:
        told.raises(*[page("TrainingRunLost", f"r{number}") for number in range(20)], page("TrainingStalled", "other"))
        time.sleep(1.5)
        told.raises(page("TrainingFlood", cause="TrainingRunLost"))
        told.settled()
        told.raises(page("TrainingRunLost", "late"), page("TrainingCrashed", "late"))
        told.settled()
        assert told.sent("page") == [
            ["TrainingCrashed late"],
            ["TrainingFlood TrainingRunLost"],
            ["TrainingStalled other"],
        ]


@pytest.mark.e2e
def test_a_server_that_is_down_mutes_what_only_follows_from_it_and_no_page_about_training(tmp_path: Path) -> None:
    with _alertmanager(tmp_path, ALWAYS) as told:
        told.raises(
            page("OptwatchServerDown", job="optwatch-server"),
            page("OptwatchEventsUndelivered", "r1"),
            page("TrainingRunLost", "r1"),
            page("TrainingNonFinite", "r1"),
        )
        told.settled()
        assert told.sent("page") == [["OptwatchServerDown"], ["TrainingNonFinite r1"]]


@pytest.mark.e2e
@pytest.mark.parametrize(("sweeps", "tickets"), [(ALWAYS, 1), (NEVER, 2)], ids=["within", "outside"])
def test_tickets_of_a_sweep_wait_within_its_hours_and_pages_do_not(
    sweeps: dict[str, Any], tickets: int, tmp_path: Path
) -> None:
    with _alertmanager(tmp_path, sweeps) as told:
        told.raises(
            ticket("TrainingLossSpike", "r1", sweep="lr-2026"),
            ticket("TrainingLossSpike", "r2"),
            page("TrainingNonFinite", "r3"),
        )
        told.settled()
        assert told.sent("page") == [["TrainingNonFinite r3"]]
        names = Counter(name for notification in told.sent("ticket") for name in notification)
        assert names == Counter(["TrainingLossSpike r2", "TrainingLossSpike r1"][:tickets])


def test_the_waits_of_pages_leave_time_to_count_a_flood_and_tickets_wait_longer_than_pages() -> None:
    root = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))["route"]
    prometheus = yaml.safe_load((SHIPPED.parent / "prometheus.yaml").read_text(encoding="utf-8"))["global"]
    (flood,) = yaml.safe_load((SHIPPED.parent / "rules" / "flood.yaml").read_text(encoding="utf-8"))["groups"]
    held = root["routes"][0]["routes"][1]["group_wait"]

    def seconds(text: str) -> int:
        return int(text.removesuffix("s"))

    needed = [prometheus["scrape_interval"], prometheus["evaluation_interval"], flood["interval"]]
    assert sum(map(seconds, needed)) < seconds(held) < seconds(root["group_wait"])
