import json

import pytest
from tests.server.metrics.test_fleet import sample

from optwatch_server.paging.due import rfc3339

TIMES = "optwatch_fleet_time_to_page_seconds"


def alert(live, **fields: object) -> dict[str, object]:
    """Return an alert as Alertmanager's webhook tells of it."""
    labels = {"alertname": "TrainingNonFinite", "severity": "critical", "notify": "page", "run_id": "run-1"}
    return {
        "status": "firing",
        "labels": {**labels, **fields.pop("labels", {})},
        "annotations": {"summary": "A training run computes NaN or Inf.", "description": "Run llama computes NaN."},
        "startsAt": rfc3339(live.clock.now),
        "endsAt": "0001-01-01T00:00:00Z",
        "generatorURL": "http://prometheus:9090/graph?g0.expr=up",
        "fingerprint": "c0ffee",
        **fields,
    }


def webhook(live, *alerts: object, **fields: object):
    body = {"version": "4", "groupKey": "{}", "receiver": "page", "status": "firing", "alerts": alerts, **fields}
    return live.client.post("/api/v1/alerts", json=body)


def listed(live, run_id: str = "run-1") -> list[dict[str, object]]:
    return live.client.get(f"/api/v1/runs/{run_id}/alerts").json()["alerts"]


def test_an_alert_is_kept_from_firing_to_resolved(live) -> None:
    live.run()
    began = live.clock.now
    fired = alert(live)
    assert webhook(live, fired).json() == {"accepted": 1, "duplicates": 0, "ignored": 0}
    (got,) = listed(live)
    assert got == {
        "fingerprint": "c0ffee",
        "alertname": "TrainingNonFinite",
        "severity": "critical",
        "status": "firing",
        "starts_at": began,
        "ends_at": None,
        "received_at": began,
        "summary": "A training run computes NaN or Inf.",
        "description": "Run llama computes NaN.",
    }
    live.clock.now += 60
    resolved = {**fired, "status": "resolved", "endsAt": rfc3339(live.clock.now)}
    assert webhook(live, resolved).json()["accepted"] == 1
    assert [(a["status"], a["starts_at"], a["ends_at"]) for a in listed(live)] == [("resolved", began, began + 60)]


def test_a_repeated_webhook_changes_nothing_in_any_order(live) -> None:
    live.run()
    fired = alert(live)
    resolved = {**fired, "status": "resolved", "endsAt": rfc3339(live.clock.now + 60)}
    for told, expected in ((fired, 1), (fired, 0), (resolved, 1), (resolved, 0), (fired, 0)):
        assert webhook(live, told).json()["accepted"] == expected
    assert [a["status"] for a in listed(live)] == ["resolved"]
    assert sample(live, f"{TIMES}_count", path="prometheus") == 0  # nothing to measure from


def test_an_alert_that_fires_again_is_a_second_entry_newest_first(live) -> None:
    live.run()
    for _ in range(3):
        fired = alert(live)
        webhook(live, fired)
        webhook(live, {**fired, "status": "resolved", "endsAt": rfc3339(live.clock.now + 5)})
        live.clock.now += 60
    starts = [a["starts_at"] for a in listed(live)]
    assert starts == sorted(starts, reverse=True)
    first = live.client.get("/api/v1/runs/run-1/alerts", params={"limit": 2}).json()
    second = live.client.get("/api/v1/runs/run-1/alerts", params={"limit": 2, "after": first["next"]}).json()
    assert [a["starts_at"] for a in first["alerts"] + second["alerts"]] == starts
    assert second["next"] is None


def test_an_alert_that_was_resolved_before_it_was_told_to_fire_is_kept(live) -> None:
    live.run()
    webhook(live, alert(live, status="resolved", endsAt=rfc3339(live.clock.now + 9)))
    assert [(a["status"], a["ends_at"]) for a in listed(live)] == [("resolved", live.clock.now + 9)]


def test_what_is_about_no_known_run_or_cannot_be_read_costs_only_itself(live) -> None:
    live.run()
    odd = [
        "no object",
        {"status": "firing"},
        alert(live, startsAt="yesterday"),
        alert(live, status="pending"),
        alert(live, labels={"run_id": "nobody"}),
        alert(live, labels={"run_id": "../x"}),
        {**alert(live), "labels": {"alertname": "OptwatchServerDown"}},
    ]
    answer = webhook(live, *odd, alert(live), version="5", unheard_of={"a": 1})
    assert (answer.status_code, answer.json()) == (200, {"accepted": 1, "duplicates": 0, "ignored": len(odd)})
    assert len(listed(live)) == 1


def test_texts_that_a_database_cannot_hold_are_cleaned_and_cut(live) -> None:
    live.run()
    told = alert(live, annotations={"summary": "a\0b", "description": "x" * 5000}, fingerprint="")
    told["labels"]["alertname"] = "A" * 500
    assert webhook(live, told, told).json() == {"accepted": 1, "duplicates": 1, "ignored": 0}
    (got,) = listed(live)
    assert (got["summary"], len(got["description"]), len(got["alertname"])) == (
        "a\N{REPLACEMENT CHARACTER}b",
        4096,
        128,
    )
    assert len(got["fingerprint"]) == 64


@pytest.mark.parametrize("body", ["[]", '{"alerts": 1}', "{}"])
def test_what_is_no_webhook_is_refused_with_the_field(small, body: str) -> None:
    answer = small.client.post("/api/v1/alerts", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert json.loads(answer.text)["detail"]


def test_the_alerts_of_an_unknown_run_are_a_404(small) -> None:
    assert small.client.get("/api/v1/runs/nobody/alerts").status_code == 404


def test_time_to_page_is_measured_from_the_event_of_that_kind_to_the_webhook(live) -> None:
    live.run()
    live.events(live.event(occurred_at=live.clock.now - 3600), live.event(), live.event(kind="crashed"))
    live.clock.now += 12
    told = alert(live)
    webhook(live, told)
    webhook(live, told)
    assert (sample(live, f"{TIMES}_count", path="prometheus"), sample(live, f"{TIMES}_sum", path="prometheus")) == (
        1,
        12,
    )


def test_a_page_that_the_server_sent_itself_is_not_measured_as_one_of_prometheus(live) -> None:
    live.run()
    live.events(live.event())
    webhook(live, alert(live, generatorURL="http://optwatch:8000/runs/run-1"))
    assert sample(live, f"{TIMES}_count", path="prometheus") == 0


def test_time_to_page_of_a_lost_run_is_measured_from_its_being_lost(live) -> None:
    live.run()
    live.beat()
    live.advance(25)
    live.clock.now += 8
    webhook(live, alert(live, labels={"alertname": "TrainingRunLost"}))
    assert sample(live, f"{TIMES}_sum", path="prometheus") == 8


def test_the_run_page_shows_alert_state_since_and_until(small) -> None:
    small.run()
    assert "<h2>Alerts</h2>" not in small.page("/runs/run-1").text
    fired = alert(small, annotations={"summary": "<script>"})
    webhook(small, fired)
    page = small.page("/runs/run-1").text
    assert '<a href="/runbooks/TrainingNonFinite">TrainingNonFinite</a>' in page
    assert ">firing</span>" in page
    assert "<script>" not in page
    webhook(small, {**fired, "status": "resolved", "endsAt": rfc3339(small.clock.now)})
    page = small.page("/runs/run-1").text
    assert ">resolved</span>" in page
    assert ">firing</span>" not in page


def test_the_run_page_tells_of_a_promise_while_it_holds(small) -> None:
    small.run()
    small.beat(promise_seconds=1800, promise_reason="writing a checkpoint")
    told = "promised to be back by <strong>2023-11-14 22:43:20 UTC</strong>: writing a checkpoint"
    assert told in small.page("/runs/run-1").text
    small.clock.now += 1800
    assert "promised to be back by" not in small.page("/runs/run-1").text


def test_the_run_page_tells_the_cause_of_a_failure(small) -> None:
    small.run()
    small.finish(status="failed", reason="killed", cause="out_of_memory")
    assert "killed (cause: out of memory)" in small.page("/runs/run-1").text
