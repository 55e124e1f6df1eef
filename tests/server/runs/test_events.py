from concurrent.futures import ThreadPoolExecutor

import pytest


def listed(live, run_id: str = "run-1") -> list[dict[str, object]]:
    return live.client.get(f"/api/v1/runs/{run_id}/events").json()["events"]


def test_an_event_comes_back_as_it_was_sent(live) -> None:
    live.run()
    event = live.event(
        rank=3,
        sequence=12,
        likely="the learning rate is too high",
        runbook="TrainingNonFinite",
        details={"source": "loss", "grad_norms_before": [1.0, "Infinity"], "nested": {"a": None}},
    )
    assert live.events(event).json() == {"accepted": 1, "duplicates": 0, "unknown_runs": []}
    assert listed(live) == [{**event, "received_at": live.clock.now}]


def test_a_repeated_event_is_a_duplicate_and_not_a_second_one(live) -> None:
    live.run()
    first, second = live.event(), live.event()
    assert live.events(first, first).json() == {"accepted": 1, "duplicates": 1, "unknown_runs": []}
    assert live.events(first, second).json() == {"accepted": 1, "duplicates": 1, "unknown_runs": []}
    assert live.events({**first, "id": str(first["id"]).upper(), "summary": "changed"}).json()["duplicates"] == 1
    assert {event["summary"] for event in listed(live)} == {"a NaN was seen"}
    assert len(listed(live)) == 2


def test_many_threads_posting_the_same_events_end_with_one_row_each(live) -> None:
    live.run()
    events = [live.event(sequence=number) for number in range(50)]

    def post(number: int) -> dict[str, int]:
        batch = events if number % 2 else events[::-1]
        answer = live.events(*batch)
        assert answer.status_code == 200, answer.text
        return answer.json()

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(post, range(32)))
    assert sum(answer["accepted"] for answer in answers) == 50
    assert sum(answer["duplicates"] for answer in answers) == 31 * 50
    assert sorted(event["id"] for event in listed(live)) == sorted(event["id"] for event in events)


def test_events_of_unknown_runs_are_named_and_taken_once_the_run_is_known(live) -> None:
    live.run()
    lost, kept = live.event("nobody"), live.event()
    assert live.events(lost, kept).json() == {"accepted": 1, "duplicates": 0, "unknown_runs": ["nobody"]}
    live.run("nobody")
    assert live.events(lost).json() == {"accepted": 1, "duplicates": 0, "unknown_runs": []}


def test_events_are_listed_in_the_order_in_which_they_occurred_page_by_page(live) -> None:
    live.run()
    live.run("other")
    late = [live.event(occurred_at=200.0, rank=1, sequence=number) for number in range(3)]
    early = [live.event(occurred_at=100.0, sequence=number) for number in range(2)]
    live.events(*late[::-1], live.event("other"))
    live.events(*early[::-1])
    seen, after = [], None
    while True:
        query = {"limit": 2, **({"after": after} if after else {})}
        page = live.client.get("/api/v1/runs/run-1/events", params=query).json()
        seen += [event["id"] for event in page["events"]]
        if (after := page["next"]) is None:
            break
    assert seen == [event["id"] for event in early + late]


def test_the_events_of_an_unknown_run_are_a_404(live) -> None:
    answer = live.client.get("/api/v1/runs/nobody/events")
    assert answer.status_code == 404
    assert "no run 'nobody' is known here" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("id", "not-a-uuid", "events[0].id is 'not-a-uuid': Input should be a valid UUID"),
        ("severity", "fatal", "events[0].severity is 'fatal': Input should be 'critical', 'warning' or 'info'"),
        ("kind", "Non Finite", "events[0].kind is 'Non Finite'"),
        ("runbook", "../secrets", "events[0].runbook is '../secrets'"),
        ("summary", "x" * 4097, "String should have at most 4096 characters"),
        ("step", 2**63, "events[0].step is 9223372036854775808"),
        ("details", [], "events[0].details is []: Input should be a valid dictionary"),
    ],
)
def test_an_event_beyond_the_contract_is_refused(small, field: str, value: object, told: str) -> None:
    small.run()
    answer = small.events(small.event(**{field: value}))
    assert answer.status_code == 422
    assert told in answer.json()["detail"]
    assert listed(small) == []
