import threading

import pytest

from optwatch_server.service import Service


def test_a_silent_run_is_lost_at_25_seconds_and_not_before(live) -> None:
    live.run()
    live.beat(step=7)
    live.advance(24.9)
    assert live.status() == "running"
    live.advance(0.1)
    got = live.client.get("/api/v1/runs/run-1").json()
    assert (got["status"], got["lost_at"]) == ("lost", live.clock.now)
    assert got["lost_reason"] == "rank 0 fell silent at step 7, having promised a heartbeat every 10 s"


def test_a_run_that_never_beat_is_covered_by_the_interval_it_named(live) -> None:
    live.run(heartbeat_interval_seconds=4)
    live.advance(9.9)
    assert live.status() == "running"
    live.advance(0.1)
    assert live.status() == "lost"
    reason = live.client.get("/api/v1/runs/run-1").json()["lost_reason"]
    assert reason == "it never sent a heartbeat, though it promised one every 4 s"


def test_a_run_that_beats_on_time_is_never_lost(live) -> None:
    live.run()
    for _ in range(30):
        live.beat()
        live.advance(10)
    assert live.status() == "running"


def test_a_longer_promise_holds_until_it_is_broken(live) -> None:
    live.run()
    live.beat(promise_seconds=1800, promise_reason="writing a checkpoint")
    live.advance(1814)
    assert live.status() == "running"
    live.advance(1)
    assert live.status() == "lost"
    reason = live.client.get("/api/v1/runs/run-1").json()["lost_reason"]
    assert reason == "rank 0 fell silent, having promised to be back within 1800 s (writing a checkpoint)"


def test_a_beat_without_the_longer_promise_takes_it_back(live) -> None:
    live.run()
    live.beat(promise_seconds=1800)
    live.advance(60)
    live.beat()
    live.advance(25)
    assert live.status() == "lost"


def test_one_silent_rank_loses_the_run_and_names_itself(live) -> None:
    live.run(world_size=2)
    live.beat(rank=0)
    live.beat(rank=1)
    for _ in range(3):
        live.advance(10)
        live.beat(rank=0)
    assert live.status() == "lost"
    assert "rank 1 fell silent" in live.client.get("/api/v1/runs/run-1").json()["lost_reason"]


def test_a_run_whose_ranks_all_fell_silent_says_how_many(live) -> None:
    live.run(world_size=3)
    live.beats(*({"run_id": "run-1", "rank": rank, "step": 7} for rank in range(3)))
    live.advance(25)
    reason = live.client.get("/api/v1/runs/run-1").json()["lost_reason"]
    assert reason == "rank 0 fell silent at step 7, having promised a heartbeat every 10 s; 3 ranks are silent"


def test_a_beat_from_a_lost_run_makes_it_running_again(live) -> None:
    live.run()
    live.beat()
    live.advance(30)
    assert live.status() == "lost"
    lost_at = live.client.get("/api/v1/runs/run-1").json()["lost_at"]
    live.beat()
    got = live.client.get("/api/v1/runs/run-1").json()
    assert (got["status"], got["status_since"], got["lost_reason"]) == ("running", live.clock.now, "")
    assert got["lost_at"] == lost_at
    live.advance(24)
    assert live.status() == "running"


def test_a_lost_run_that_never_beat_is_running_from_its_first_beat_on(live) -> None:
    live.run()
    live.advance(30)
    assert live.status() == "lost"
    live.beat()
    assert live.status() == "running"


def test_a_run_does_not_flap_while_one_of_its_ranks_stays_silent(live) -> None:
    live.run()
    live.beat(rank=0)
    live.beat(rank=1)
    live.advance(30)
    statuses = []
    for _ in range(3):
        live.beat(rank=0)
        statuses.append(live.status())
        live.advance(10)
    assert statuses == ["lost"] * 3
    live.beat(rank=1)
    assert live.status() == "running"


def test_a_server_outage_of_five_minutes_loses_no_run(live, serving) -> None:
    live.run("beaten")
    live.beat("beaten")
    live.run("never")
    live.clock.now += 300
    with serving(live.service.database, live.clock) as restarted:
        restarted.advance(59)
        assert (restarted.status("beaten"), restarted.status("never")) == ("running", "running")
        restarted.beat("beaten")
        restarted.advance(1)
        assert (restarted.status("beaten"), restarted.status("never")) == ("running", "lost")


def test_a_run_that_beat_since_the_restart_is_judged_at_once(live, serving) -> None:
    live.run()
    live.beat()
    live.clock.now += 300
    with serving(live.service.database, live.clock) as restarted:
        restarted.beat()
        restarted.advance(25)
        assert restarted.status() == "lost"


def test_time_in_which_no_sweep_worked_is_not_held_against_anyone(live) -> None:
    live.run()
    live.beat()
    live.clock.now += 300  # the process was stopped, or its database was away: no sweep in between
    live.advance(2)
    assert live.status() == "running"
    live.advance(60)
    assert live.status() == "lost"


def test_a_clock_set_back_loses_nothing(live) -> None:
    live.run()
    live.beat()
    live.clock.now -= 3600
    live.advance(2)
    assert live.status() == "running"


def test_a_finished_run_is_never_lost(live) -> None:
    live.run()
    live.beat()
    live.finish()
    live.advance(120)
    assert live.status() == "succeeded"


def test_a_sweep_names_what_it_found_only_once(live) -> None:
    live.run()
    live.advance(24)
    live.clock.now += 1
    assert live.service.sweeper.sweep() == ["run-1"]
    assert live.service.sweeper.sweep() == []


def test_the_thread_goes_on_after_a_sweep_that_failed(small, monkeypatch: pytest.MonkeyPatch) -> None:
    sweeper = Service(small.service.database, clock=small.clock).sweeper
    monkeypatch.setattr(sweeper, "_every_seconds", 0.001)
    swept, answers = threading.Event(), iter([OSError("disk gone")])

    def sweep() -> list[str]:
        for error in answers:
            raise error
        swept.set()
        return []

    monkeypatch.setattr(sweeper, "sweep", sweep)
    sweeper.start()
    try:
        assert swept.wait(timeout=30)
    finally:
        sweeper.stop()
    assert sweeper.errors == 1


def test_a_beat_that_arrives_while_the_sweeper_judges_saves_the_run(live, monkeypatch: pytest.MonkeyPatch) -> None:
    live.run()
    live.beat()
    live.advance(24)
    live.clock.now += 1
    sweeper = live.service.sweeper
    judge = sweeper._judge

    def judge_after_a_beat(suspects: set[str], now: float) -> list[str]:
        live.beat()
        return judge(suspects, now)

    monkeypatch.setattr(sweeper, "_judge", judge_after_a_beat)
    assert sweeper.sweep() == []
    assert live.status() == "running"
