from concurrent.futures import ThreadPoolExecutor

from optwatch_server.runs.heartbeats import due_at


def test_a_promise_is_broken_one_and_a_half_intervals_after_its_end() -> None:
    assert due_at(100.0, 10.0) == 125.0
    assert due_at(100.0, 10.0, 1800.0) == 1915.0
    assert due_at(100.0, 10.0, 3.0) == 125.0


def test_the_latest_beat_of_each_rank_is_kept_with_its_values(live) -> None:
    live.run()
    live.beats(
        {"run_id": "run-1", "rank": 0, "step": 1},
        {"run_id": "run-1", "rank": 1, "step": 5, "values": {"loss": "NaN", "grad_norm": 1.5}},
        {"run_id": "run-1", "rank": 0, "step": 2},
    )
    live.clock.now += 10
    answer = live.beat(
        step=12, sent_at=5.5, promise_seconds=1800, promise_reason="compiling", metrics_target="node-7:9100"
    )
    assert answer.json() == {"accepted": 1, "unknown_runs": []}
    first, second = live.client.get("/api/v1/runs/run-1").json()["ranks"]
    assert first == {
        "rank": 0,
        "step": 12,
        "sent_at": 5.5,
        "received_at": live.clock.now,
        "due_at": live.clock.now + 1815,
        "interval_seconds": 10,
        "promise_seconds": 1800,
        "promise_reason": "compiling",
        "metrics_target": "node-7:9100",
        "values": {},
    }
    assert (second["step"], second["values"]) == (5, {"loss": "NaN", "grad_norm": 1.5})


def test_a_beat_without_an_interval_promises_that_of_its_run(live) -> None:
    live.run(heartbeat_interval_seconds=4)
    live.beats({"run_id": "run-1"})
    assert live.client.get("/api/v1/runs/run-1").json()["ranks"][0]["due_at"] == live.clock.now + 10


def test_beats_of_unknown_runs_are_named_and_the_others_are_kept(live) -> None:
    live.run()
    answer = live.beats({"run_id": "zoe"}, {"run_id": "run-1"}, {"run_id": "adam"}, {"run_id": "zoe", "rank": 1})
    assert answer.json() == {"accepted": 1, "unknown_runs": ["adam", "zoe"]}


def test_a_finished_run_stays_finished_when_a_late_beat_arrives(live) -> None:
    live.run()
    live.finish()
    assert live.beat(step=9).json()["accepted"] == 1
    assert live.status() == "succeeded"


def test_many_ranks_beating_at_once_in_any_order_all_succeed(live) -> None:
    for number in range(4):
        live.run(f"run-{number}")

    def beat(number: int) -> int:
        order = range(4) if number % 2 else reversed(range(4))
        return live.beats(*({"run_id": f"run-{run}", "rank": number % 8, "step": number} for run in order)).status_code

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(beat, range(64))) == {200}
    for number in range(4):
        assert len(live.client.get(f"/api/v1/runs/run-{number}").json()["ranks"]) == 8
