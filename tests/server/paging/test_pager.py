"""What is paged at once, when, and how often, against an Alertmanager that notes down what it is sent."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import yaml
from sqlalchemy import text
from tests.server.metrics.test_fleet import sample

from optwatch_server.paging.alertmanager import AlertmanagerError, post
from optwatch_server.paging.due import ALERTS, LOST, SUMMARIES, rfc3339
from optwatch_server.settings import Settings
from optwatch_server.shipped import shipped
from optwatch_server.wire import Finish

SENDS = "optwatch_server_alertmanager_sends_total"
TIMES = "optwatch_fleet_time_to_page_seconds"


class FakeAlertmanager:
    """Takes alerts with `status`, and keeps what it took and the headers it came with."""

    def __init__(self) -> None:
        self.status = 200
        self.refuse = ""  # a run whose alert makes a whole request be refused
        self.taken: list[dict[str, Any]] = []
        self.headers: dict[str, str] = {}
        self.path = ""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                fake.headers, fake.path = dict(self.headers), self.path
                alerts = json.loads(body)
                refused = any(alert["labels"]["run_id"] == fake.refuse for alert in alerts)
                status = 400 if refused else fake.status
                if status == 200:
                    fake.taken += alerts
                self.send_response(status)
                self.send_header("Content-Length", "4")
                self.end_headers()
                self.wfile.write(b"told")

            def log_message(self, format: str, *args: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def names(self) -> list[str]:
        return [alert["labels"]["alertname"] for alert in self.taken]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def alertmanager() -> Iterator[FakeAlertmanager]:
    fake = FakeAlertmanager()
    yield fake
    fake.close()


@pytest.fixture
def live(database, clock, serving, alertmanager: FakeAlertmanager):
    """A server on both databases that pages the fake; tests say when it sends."""
    with serving(database, clock, settings=Settings((alertmanager.url,))) as server:
        yield server


def send(live) -> int:
    return live.service.pager.send()


def test_a_critical_event_is_sent_with_the_rules_labels_and_what_a_person_needs(live, alertmanager) -> None:
    live.run(name="llama", project="p", team="")
    live.clock.now += 3
    live.events(
        live.event(
            summary="NaN in the loss at step 7.",
            likely="the learning rate is too high",
            details={"layer": "blocks.3"},
            occurred_at=live.clock.now - 2,
        )
    )
    assert send(live) == 1
    now = live.clock.now
    assert alertmanager.taken == [
        {
            "labels": {
                "alertname": "TrainingNonFinite",
                "severity": "critical",
                "notify": "page",
                "run_id": "run-1",
                "run": "llama",
                "project": "p",
            },
            "annotations": {
                "summary": "A training run computes NaN or Inf.",
                "description": "Run llama (run-1, project p, team none): NaN in the loss at step 7 (at step 7, "
                "on rank 0, the layer to look at first is blocks.3). Likely: the learning rate is too high.",
                "runbook_url": "http://optwatch:8000/runbooks/TrainingNonFinite",
                "dashboard_url": "http://grafana:3000/d/optwatch-debug?var-run_id=run-1",
                "run_url": "http://optwatch:8000/runs/run-1",
            },
            "startsAt": rfc3339(now - 2),
            "endsAt": rfc3339(now + 600),
            "generatorURL": "http://optwatch:8000/runs/run-1",
        }
    ]
    assert sample(live, SENDS, result="ok") == 1
    assert (sample(live, f"{TIMES}_count", path="direct"), sample(live, f"{TIMES}_sum", path="direct")) == (1, 2)


@pytest.mark.parametrize("name", sorted(SUMMARIES))
def test_a_rule_of_the_same_name_gives_the_same_labels_and_summary(name: str) -> None:
    files = (shipped("alerts") / "rules").glob("*.yaml")
    groups = [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    rules = [rule for group in groups for rule in group["rules"] if rule.get("alert") == name]
    for rule in rules:
        assert rule["labels"] == {"severity": "critical", "notify": "page"}
        assert rule["annotations"]["summary"] == SUMMARIES[name]
    assert rules or name not in ("TrainingNonFinite", LOST)  # those are tested end to end


def test_every_kind_that_pages_has_a_summary() -> None:
    assert {*ALERTS.values(), LOST} == set(SUMMARIES)


def test_warnings_and_kinds_without_a_rule_are_not_sent(live, alertmanager) -> None:
    live.run()
    live.events(live.event(severity="warning"), live.event(kind="something_else"))
    assert send(live) == 0
    assert alertmanager.taken == []


def test_an_event_that_is_sent_again_pages_once(live, alertmanager) -> None:
    live.run()
    event = live.event()
    live.events(event)
    send(live)
    live.events(event)
    live.clock.now += 3600
    assert send(live) == 0
    assert len(alertmanager.taken) == 1


def test_many_ranks_that_see_the_same_ask_for_one_page(live, alertmanager) -> None:
    live.run()
    live.events(*(live.event(rank=rank) for rank in range(50)), live.event(kind="crashed"))
    live.events(*(live.event(rank=rank) for rank in range(50)))
    assert send(live) == 2
    assert sorted(alertmanager.names()) == ["TrainingCrashed", "TrainingNonFinite"]


def test_an_incident_that_goes_on_is_sent_again_at_most_once_a_minute_and_stays_one_page(live, alertmanager) -> None:
    live.run()
    live.events(live.event())
    send(live)
    for _ in range(12):
        live.clock.now += 10
        live.events(live.event())
        send(live)
    assert len(alertmanager.taken) == 3
    assert len({alert["startsAt"] for alert in alertmanager.taken}) == 1
    assert alertmanager.taken[-1]["endsAt"] == rfc3339(live.clock.now + 600)
    assert sample(live, f"{TIMES}_count", path="direct") == 1


def test_what_happens_again_after_the_page_is_over_is_another_one(live, alertmanager) -> None:
    live.run()
    live.events(live.event())
    send(live)
    live.clock.now += 600
    live.events(live.event())
    assert send(live) == 1
    assert alertmanager.taken[1]["startsAt"] == rfc3339(live.clock.now)
    assert sample(live, f"{TIMES}_count", path="direct") == 2


def test_a_page_that_nobody_took_is_tried_again_later_and_later(live, alertmanager) -> None:
    live.run()
    live.events(live.event())
    alertmanager.status = 503
    tried = []
    for second in range(70):
        alertmanager.path = ""
        assert send(live) == 0
        if alertmanager.path:
            tried.append(second)
        live.clock.now += 1
    assert tried == [0, 1, 3, 7, 15, 31, 61]
    alertmanager.status = 200
    live.clock.now += 30
    assert send(live) == 1
    assert len(alertmanager.taken) == 1
    assert sample(live, SENDS, result="failed") == 7
    assert sample(live, f"{TIMES}_sum", path="direct") == 100


def test_a_page_survives_a_restart_until_it_is_sent(live, serving, alertmanager) -> None:
    live.run()
    live.events(live.event())
    with serving(live.service.database, live.clock, settings=live.service.settings) as restarted:
        assert send(restarted) == 1
    assert send(live) == 0


def test_what_another_replica_has_claimed_is_left_to_it_until_its_claim_runs_out(live, serving, alertmanager) -> None:
    live.run()
    live.events(live.event())
    with live.service.database.write() as session:
        claims, _ = live.service.pager._claim(session)  # and then that process dies
    assert len(claims) == 1
    with serving(live.service.database, live.clock, settings=live.service.settings) as other:
        live.clock.now += 59
        assert send(other) == 0
        live.clock.now += 1
        assert send(other) == 1


def test_an_event_that_comes_while_its_page_is_being_sent_is_sent_after_it(live, alertmanager) -> None:
    live.run()
    live.events(live.event())
    pager = live.service.pager
    with live.service.database.write() as session:
        claims, _ = pager._claim(session)
    live.events(live.event(summary="and another"))
    assert pager._send(claims) == 1
    live.clock.now += 60
    assert send(live) == 1
    assert "and another" not in alertmanager.taken[0]["annotations"]["description"]


def test_one_page_that_is_refused_does_not_hold_back_the_others(live, alertmanager) -> None:
    for run_id in ("a", "b", "c"):
        live.run(run_id)
        live.events(live.event(run_id))
    alertmanager.refuse = "b"
    assert send(live) == 2
    assert sorted(alert["labels"]["run_id"] for alert in alertmanager.taken) == ["a", "c"]
    alertmanager.refuse = ""
    live.clock.now += 30
    assert send(live) == 1


def test_every_alertmanager_gets_the_page_and_one_that_takes_it_is_enough(database, clock, serving) -> None:
    fakes = [FakeAlertmanager(), FakeAlertmanager()]
    settings = Settings(("http://127.0.0.1:9", *(fake.url for fake in fakes)))
    with serving(database, clock, settings=settings) as live:
        live.run()
        live.events(live.event())
        assert send(live) == 1
        assert (sample(live, SENDS, result="ok"), sample(live, SENDS, result="failed")) == (2, 1)
    assert [fake.names() for fake in fakes] == [["TrainingNonFinite"]] * 2
    for fake in fakes:
        fake.close()


def test_a_lost_run_is_sent_every_minute_until_it_is_heard_of_again(live, alertmanager) -> None:
    live.run(name="llama")
    live.beat(step=7)
    live.advance(25)
    lost_at = live.clock.now
    assert send(live) == 1
    (alert,) = alertmanager.taken
    assert alert["labels"]["alertname"] == "TrainingRunLost"
    assert (alert["startsAt"], alert["endsAt"]) == (rfc3339(lost_at), rfc3339(lost_at + 300))
    assert (
        "Run llama (run-1, project none, team none) stopped sending heartbeats without finishing: rank 0 fell "
        in (alert["annotations"]["description"])
    )
    for _ in range(30):
        live.advance(10)
        send(live)
    assert len(alertmanager.taken) == 6
    assert len({alert["startsAt"] for alert in alertmanager.taken}) == 1
    live.beat()
    for _ in range(12):
        live.advance(10)
        live.beat()
        assert send(live) == 0
    assert len(alertmanager.taken) == 6  # it lapses: nothing is said that the rule could contradict
    live.advance(25)
    assert send(live) == 1
    assert alertmanager.taken[-1]["startsAt"] == rfc3339(live.clock.now)


def test_a_lost_run_that_is_finished_or_a_day_old_is_sent_no_more(live, alertmanager) -> None:
    for run_id in ("a", "b"):
        live.run(run_id)
        live.beat(run_id)
    live.advance(25)
    assert send(live) == 2
    live.finish("a")
    live.clock.now += 60
    assert send(live) == 1
    live.clock.now += 24 * 3600
    assert send(live) == 0


def test_a_run_that_is_back_before_its_page_was_sent_pages_nobody(live, alertmanager) -> None:
    live.run()
    live.beat()
    live.advance(25)
    live.beat()
    assert send(live) == 0
    assert alertmanager.taken == []


def test_without_an_alertmanager_nothing_is_asked_for(database, clock, serving) -> None:
    with serving(database, clock) as live:
        live.run()
        live.events(live.event())
        live.advance(25)
        with database.read() as session:
            assert session.execute(text("SELECT count(*) FROM pages")).scalar_one() == 0


def test_the_request_that_brings_an_event_does_not_wait_for_an_alertmanager_that_does_not_answer(
    small, serving
) -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    settings = Settings((f"http://127.0.0.1:{silent.getsockname()[1]}",))
    with serving(small.service.database, small.clock, settings=settings) as live:
        live.service.pager.start()
        live.run()
        answer = live.client.post("/api/v1/events", json={"schema": 1, "events": [live.event()]}, timeout=3)
        assert answer.json()["accepted"] == 1
        silent.close()
        live.service.pager.stop()


def test_a_path_and_a_password_of_the_address_are_used_and_the_password_is_not_told(alertmanager) -> None:
    host = alertmanager.url.removeprefix("http://")
    alert = {"labels": {"run_id": "a"}}
    post(f"http://user:se%40cret@{host}/prefix", [alert])
    assert alertmanager.path == "/prefix/api/v2/alerts"
    assert alertmanager.headers["Authorization"] == "Basic dXNlcjpzZUBjcmV0"
    alertmanager.status = 401
    with pytest.raises(AlertmanagerError, match=f"^http://{host}/prefix answered 401: told$"):
        post(f"http://user:se%40cret@{host}/prefix", [alert])
    with pytest.raises(AlertmanagerError, match=r"^http://127.0.0.1:9 cannot be reached \(.*refused"):
        post("http://127.0.0.1:9", [alert])


def test_a_finish_may_name_the_cause_as_the_kind_of_an_event() -> None:
    assert Finish.model_validate({"schema": 1, "status": "failed", "cause": "out_of_memory"}).cause == "out_of_memory"
