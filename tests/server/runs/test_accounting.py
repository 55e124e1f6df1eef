import contextlib

import pytest
from sqlalchemy import text
from tests.server.metrics.test_fleet import sample
from tests.server.metrics.test_metrics import scrape

from optwatch_server.settings import Settings

ENDED, FAILURES = "optwatch_fleet_runs_ended_total", "optwatch_fleet_failures_total"


def settle(live) -> None:
    live.service.sweeper.sweep()


def counted(live, name: str) -> dict[str, float]:
    """Return what a counter of project p has counted, by its other label, without the zeros."""
    rows = scrape(live)[name]
    return {next((v for k, v in has.items() if k != "project"), ""): n for has, n in rows if has["project"] == "p" if n}


def test_each_end_is_counted_once_by_status(live) -> None:
    for run_id, status in (("a", "succeeded"), ("b", "failed"), ("c", "cancelled")):
        live.run(run_id, project="p")
        live.finish(run_id, status)
        live.finish(run_id, status)
        settle(live)
    settle(live)
    assert counted(live, ENDED) == {"succeeded": 1, "failed": 1, "cancelled": 1}


def test_a_restart_neither_forgets_nor_repeats_a_count(live, serving) -> None:
    live.run(project="p")
    live.finish(status="failed")
    with serving(live.service.database, live.clock) as restarted:  # before the sweeper came by
        settle(restarted)
        assert counted(restarted, ENDED) == {"failed": 1}
    with serving(live.service.database, live.clock) as restarted:
        settle(restarted)
        assert counted(restarted, ENDED) == {"failed": 1}


def test_two_replicas_count_an_end_once(live, serving) -> None:
    live.run(project="p")
    live.finish()
    with serving(live.service.database, live.clock) as other:
        settle(live)
        settle(other)
        assert counted(other, ENDED) == {"succeeded": 1}


def test_a_lost_run_that_comes_back_counts_as_lost_and_as_recovered(live) -> None:
    live.run(project="p")
    live.beat()
    live.advance(25)
    live.beat()
    settle(live)
    assert counted(live, ENDED) == {"lost": 1}
    assert counted(live, FAILURES) == {"lost": 1}
    assert sample(live, "optwatch_fleet_runs_recovered_total", project="p") == 1
    live.finish()
    settle(live)
    assert counted(live, ENDED) == {"lost": 1, "succeeded": 1}
    assert sample(live, "optwatch_fleet_runs_recovered_total", project="p") == 1


def test_a_lost_run_that_only_ends_counts_as_recovered_too(live) -> None:
    live.run(project="p")
    live.beat()
    live.advance(25)
    live.finish(status="failed", cause="crashed")
    settle(live)
    assert counted(live, FAILURES) == {"lost": 1, "crashed": 1}
    assert sample(live, "optwatch_fleet_runs_recovered_total", project="p") == 1


@pytest.mark.parametrize(
    ("kinds", "told", "cause"),
    [
        ((), "out_of_memory", "out_of_memory"),
        (("nonfinite",), "crashed", "crashed"),
        (("nonfinite",), None, "nonfinite"),
        (("nonfinite", "out_of_memory"), None, "out_of_memory"),
        (("crashed", "divergence"), None, "crashed"),
        (("divergence",), None, "unknown"),
        ((), None, "unknown"),
    ],
)
def test_the_cause_of_a_failure_is_what_was_told_or_its_latest_critical_event(
    small, kinds: tuple[str, ...], told: str | None, cause: str
) -> None:
    small.run(project="p")
    for number, kind in enumerate(kinds):
        small.events(small.event(kind=kind, occurred_at=small.clock.now + number))
    small.events(small.event(kind="crashed", severity="warning", occurred_at=small.clock.now + 10))
    small.finish(status="failed", cause=told)
    settle(small)
    assert counted(small, FAILURES) == {cause: 1}
    assert small.client.get("/api/v1/runs/run-1").json()["cause"] == cause


def test_only_a_failure_has_a_cause(small) -> None:
    small.run(project="p")
    small.finish(cause="crashed")
    assert small.client.get("/api/v1/runs/run-1").json()["cause"] == ""


def test_seconds_of_all_ends_add_up_to_what_was_allocated(live) -> None:
    began = live.clock.now
    live.run(project="p", started_at=began, world_size=4, tags={"cost_per_device_hour": "3600"})
    for _ in range(10):
        live.advance(10)
        live.beat()
    live.advance(25)
    assert counted(live, "optwatch_fleet_run_seconds_total") == {"lost": 100}
    live.clock.now += 75
    live.beat()
    live.clock.now += 10
    live.finish(finished_at=live.clock.now)
    settle(live)
    assert counted(live, "optwatch_fleet_run_seconds_total") == {"lost": 100, "succeeded": 110}
    assert counted(live, "optwatch_fleet_device_seconds_total") == {"lost": 400, "succeeded": 440}
    assert counted(live, "optwatch_fleet_cost_total") == {"lost": 400, "succeeded": 440}


def test_clocks_that_are_wrong_by_decades_do_not_spoil_a_total(live) -> None:
    live.run("a", project="p", started_at=0.0)
    live.run("b", project="p", started_at=live.clock.now + 1e9)
    live.finish("a", finished_at=live.clock.now + 1e9)
    live.finish("b")
    settle(live)
    assert counted(live, "optwatch_fleet_run_seconds_total") == {"succeeded": 30 * 86_400}


def test_the_servers_rate_holds_for_runs_without_a_tag(database, clock, serving) -> None:
    with serving(database, clock, settings=Settings(cost_per_device_hour=3600.0)) as live:
        live.run(project="p", started_at=clock.now)
        live.run("b", project="p", started_at=clock.now, tags={"cost_per_device_hour": "0"})
        clock.now += 60
        assert sample(live, "optwatch_fleet_run_cost", run_id="run-1") == 60
        assert sample(live, "optwatch_fleet_run_cost", run_id="b") == 0
        live.finish()
        live.finish("b")
        settle(live)
        assert counted(live, "optwatch_fleet_cost_total") == {"succeeded": 60}


def test_a_run_that_a_server_of_the_version_before_ended_is_counted(live) -> None:
    live.run(project="p")
    live.events(live.event(kind="out_of_memory"))
    with live.service.database.write() as session:  # what its code does: it knows no `cause` and counts nothing
        session.execute(text("UPDATE runs SET status = 'failed', status_since = created_at"))
    settle(live)
    assert counted(live, FAILURES) == {"out_of_memory": 1}


def test_more_ends_than_one_transaction_takes_are_counted_by_the_sweeps_that_follow(
    live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optwatch_server.runs.accounting.BATCH", 2)
    for number in range(5):
        live.run(f"run-{number}", project="p")
        live.finish(f"run-{number}")
    for expected in (2, 4, 5, 5):
        settle(live)
        assert counted(live, ENDED) == {"succeeded": expected}


def test_accounts_that_cannot_be_kept_do_not_keep_runs_from_being_called_lost(
    live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise ArithmeticError

    monkeypatch.setattr("optwatch_server.runs.accounting.count", fail)
    live.run()
    live.beat()
    for _ in range(3):
        live.clock.now += 10
        with contextlib.suppress(ArithmeticError):
            settle(live)
    assert live.status() == "lost"
