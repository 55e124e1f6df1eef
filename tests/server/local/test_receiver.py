"""The receiver keeps every webhook that Alertmanager sends, says no to others, and prints pages a person can read."""

from __future__ import annotations

import http.client
import io
import json
import threading
import time
from typing import Any

import pytest

from optwatch_server.local.receiver import MAX_BODY_BYTES, Notification, Receiver, text

ALERT = {
    "status": "firing",
    "labels": {
        "alertname": "TrainingNonFinite",
        "run": "gpt-small",
        "run_id": "run-1",
        "project": "nlp",
        "team": "research",
    },
    "annotations": {
        "summary": "A training run computes NaN or Inf.",
        "description": "Run gpt-small (run-1) computes NaN or Inf. " + "First seen at step 812 in the gradient. " * 3,
        "run_url": "http://optwatch:8000/runs/run-1",
        "runbook_url": "http://optwatch:8000/runbooks/TrainingNonFinite",
    },
    "startsAt": "2026-11-22T10:02:03.123456789Z",
    "endsAt": "0001-01-01T00:00:00Z",
}


def _webhook(**changes: Any) -> dict[str, Any]:
    return {"version": "4", "status": "firing", "alerts": [ALERT], **changes}


def _post(receiver: Receiver, path: str, body: bytes, headers: dict[str, str] | None = None) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", receiver.port, timeout=5)
    try:
        connection.request("POST", path, body, headers or {})
        return connection.getresponse().status
    finally:
        connection.close()


def test_a_page_and_a_ticket_are_kept_under_their_paths_in_order_of_arrival() -> None:
    before = time.time()
    with Receiver() as receiver:
        assert receiver.page_url == f"http://127.0.0.1:{receiver.port}/page"
        assert receiver.ticket_url == f"http://127.0.0.1:{receiver.port}/ticket"
        assert _post(receiver, "/page", json.dumps(_webhook()).encode()) == 200
        assert _post(receiver, "/ticket", json.dumps(_webhook(status="resolved")).encode()) == 200
        page, ticket = receiver.notifications
    assert (page.receiver, page.status, ticket.receiver, ticket.status) == ("page", "firing", "ticket", "resolved")
    assert page.names() == {"TrainingNonFinite"}
    assert page.names("run_id") == {"run-1"}
    assert page.names("no_such_label") == set()
    assert before <= page.arrived_at <= ticket.arrived_at <= time.time()


def test_what_has_arrived_stays_readable_after_the_receiver_stopped() -> None:
    with Receiver() as receiver:
        _post(receiver, "/page", json.dumps(_webhook()).encode())
    receiver.stop()  # repeating it changes nothing
    assert len(receiver.notifications) == 1


def test_a_receiver_that_never_started_can_be_stopped() -> None:
    Receiver().stop()


def test_wait_for_finds_a_notification_that_has_come_already() -> None:
    with Receiver() as receiver:
        _post(receiver, "/page", json.dumps(_webhook()).encode())
        assert receiver.wait_for(lambda n: n.receiver == "page", timeout=0).receiver == "page"


def test_wait_for_returns_when_a_later_notification_fits() -> None:
    with Receiver() as receiver:
        _post(receiver, "/page", json.dumps(_webhook()).encode())
        body = json.dumps(_webhook(status="resolved")).encode()
        later = threading.Timer(0.2, _post, (receiver, "/page", body))
        later.start()
        assert receiver.wait_for(lambda n: n.status == "resolved", timeout=30).status == "resolved"
        later.join()


def test_wait_for_says_what_came_instead() -> None:
    with Receiver() as receiver:
        with pytest.raises(TimeoutError, match=r"no such notification within 0.01 s; arrived: nothing"):
            receiver.wait_for(lambda n: True, timeout=0.01)
        _post(receiver, "/page", json.dumps(_webhook()).encode())
        with pytest.raises(TimeoutError, match=r"arrived: .'page: TrainingNonFinite firing'"):
            receiver.wait_for(lambda n: n.receiver == "ticket", timeout=0.01)


def test_many_webhooks_at_once_are_all_kept() -> None:
    with Receiver() as receiver:
        body = json.dumps(_webhook()).encode()
        threads = [threading.Thread(target=_post, args=(receiver, "/page", body)) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(receiver.notifications) == 20


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/other", b"{}", None, 404),
        ("/page", b"not json", None, 400),
        ("/page", b"[]", None, 400),
        ("/page", b'{"alerts": {}}', None, 400),
        ("/page", b'{"alerts": [1]}', None, 400),
        ("/page", b"", {"Content-Length": str(MAX_BODY_BYTES + 1)}, 413),
        ("/page", b"", {"Content-Length": "-1"}, 413),
        ("/page", b"", {"Content-Length": "many"}, 411),
    ],
)
def test_what_is_no_webhook_of_alertmanager_is_refused(
    path: str, body: bytes, headers: dict[str, str] | None, status: int
) -> None:
    with Receiver() as receiver:
        assert _post(receiver, path, body, headers) == status
        assert receiver.notifications == ()


def test_a_page_is_printed_with_run_time_description_and_links() -> None:
    shown = io.StringIO()
    with Receiver(show=shown) as receiver:
        _post(receiver, "/page", json.dumps(_webhook()).encode())
    lines = shown.getvalue().splitlines()
    assert lines[:5] == [
        "PAGE: TrainingNonFinite",
        "-----------------------",
        "A training run computes NaN or Inf.",
        "  Run        gpt-small (run-1), project nlp, team research",
        "  Since      2026-11-22 10:02:03 UTC",
    ]
    assert lines[5].startswith("  Details    Run gpt-small")
    assert lines[6].startswith("             ")
    assert lines[-2:] == [
        "  Run page   http://optwatch:8000/runs/run-1",
        "  Runbook    http://optwatch:8000/runbooks/TrainingNonFinite",
    ]
    assert all(len(line) <= 100 for line in lines)


def test_a_resolved_page_says_so_and_until_when() -> None:
    alert = {**ALERT, "status": "resolved", "endsAt": "2026-11-22T12:12:03+02:00"}
    printed = text(Notification("page", 0.0, _webhook(alerts=[alert])))
    assert printed.startswith("PAGE resolved: TrainingNonFinite\n")
    assert "  Until      2026-11-22 10:12:03 UTC\n" in printed


def test_an_alert_with_nothing_but_a_name_is_printed_without_empty_rows() -> None:
    printed = text(Notification("ticket", 0.0, {"alerts": [{"labels": {"alertname": "Other"}, "startsAt": "once"}]}))
    assert printed == "TICKET: Other\n-------------\n  Since      once"
