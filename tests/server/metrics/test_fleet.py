import statistics
import time

from sqlalchemy import insert

from optwatch_server.catalogue import BY_NAME, PAGE_BUCKETS
from optwatch_server.database.models import RankRow, RunRow
from optwatch_server.metrics.fleet import MAX_KINDS, observe_time_to_page
from optwatch_server.runs.accounting import add

from .test_metrics import scrape

LABELS = {"run_id": "run-1", "run": "llama", "project": "p", "team": "t"}


def sample(live, name: str, **labels: str) -> float | None:
    """Return the value of the only sample that has these labels, or None."""
    found = [value for has, value in scrape(live).get(name, []) if labels.items() <= has.items()]
    assert len(found) <= 1
    return found[0] if found else None


def start(live, **fields: object) -> None:
    live.run(name="llama", project="p", team="t", **fields)


def test_a_run_has_the_status_it_has_for_a_day_after_its_end(live) -> None:
    start(live)
    assert scrape(live)["optwatch_fleet_run_status"] == [({**LABELS, "status": "running"}, 1.0)]
    live.beat()
    live.advance(25)
    assert scrape(live)["optwatch_fleet_run_status"] == [({**LABELS, "status": "lost"}, 1.0)]
    live.finish(status="cancelled")
    live.clock.now += 24 * 3600 - 1
    assert scrape(live)["optwatch_fleet_run_status"] == [({**LABELS, "status": "cancelled"}, 1.0)]
    live.clock.now += 1
    assert "optwatch_fleet_run_status" not in scrape(live)


def test_a_failed_run_is_exported_with_its_cause_for_a_day(live) -> None:
    start(live)
    live.events(live.event(kind="nonfinite"), live.event(kind="crashed", occurred_at=live.clock.now + 1))
    live.finish(status="failed", finished_at=live.clock.now)
    assert scrape(live)["optwatch_fleet_run_failed"] == [({**LABELS, "cause": "crashed"}, 1.0)]
    assert scrape(live)["optwatch_fleet_run_ended_timestamp_seconds"] == [(LABELS, live.clock.now)]
    live.clock.now += 24 * 3600
    assert "optwatch_fleet_run_failed" not in scrape(live)


def test_a_cause_is_one_of_a_closed_set_whatever_an_agent_calls_it(live) -> None:
    start(live)
    live.finish(status="failed", cause="the_moon"[:8])
    assert scrape(live)["optwatch_fleet_run_failed"] == [({**LABELS, "cause": "unknown"}, 1.0)]
    assert live.client.get("/api/v1/runs/run-1").json()["cause"] == "the_moon"


def test_the_latest_event_of_each_kind_is_when_the_server_received_it(live) -> None:
    start(live)
    live.events(live.event(kind="nonfinite"), live.event(kind="loss_spike", severity="warning"))
    first = live.clock.now
    live.clock.now += 5
    live.events(live.event(kind="nonfinite", occurred_at=1.0))
    assert sorted(scrape(live)["optwatch_fleet_run_event_timestamp_seconds"], key=str) == [
        ({**LABELS, "kind": "loss_spike"}, first),
        ({**LABELS, "kind": "nonfinite"}, live.clock.now),
    ]


def test_kinds_that_agents_make_up_are_bounded(live) -> None:
    start(live)
    live.events(*(live.event(kind=f"kind_{number}") for number in range(MAX_KINDS)))
    live.clock.now += 1
    live.events(live.event(kind="newest"))
    exported = scrape(live)["optwatch_fleet_run_event_timestamp_seconds"]
    assert len(exported) == MAX_KINDS
    assert "newest" in {labels["kind"] for labels, _ in exported}


def test_a_longer_promise_is_exported_while_it_holds(live) -> None:
    start(live)
    live.beat(rank=0, promise_seconds=60)
    live.beat(rank=1, promise_seconds=1800)
    live.beat(rank=2, promise_seconds=5)  # no longer than the next beat anyway
    name = "optwatch_fleet_run_promised_until_timestamp_seconds"
    assert scrape(live)[name] == [(LABELS, live.clock.now + 1800)]
    live.clock.now += 1799
    assert name in scrape(live)
    live.clock.now += 1
    assert name not in scrape(live)
    live.beat(rank=1, promise_seconds=1800)
    live.beat(rank=1)
    assert name not in scrape(live)


def test_cost_is_device_hours_times_the_rate_of_the_tag(live) -> None:
    start(live, started_at=live.clock.now, world_size=8, tags={"cost_per_device_hour": "2.5", "cost_budget": "100"})
    live.clock.now += 1800
    assert sample(live, "optwatch_fleet_run_cost", **LABELS) == 8 * 0.5 * 2.5
    assert sample(live, "optwatch_fleet_run_cost_budget", **LABELS) == 100
    live.finish()
    live.clock.now += 1800
    assert sample(live, "optwatch_fleet_run_cost", **LABELS) == 8 * 0.5 * 2.5


def test_a_tag_that_is_no_amount_is_as_good_as_none(live) -> None:
    for run_id, tag in (("a", "two"), ("b", "nan"), ("c", "-1"), ("d", "inf")):
        live.run(run_id, tags={"cost_per_device_hour": tag, "cost_budget": tag})
    served = scrape(live)
    assert "optwatch_fleet_run_cost" not in served
    assert "optwatch_fleet_run_cost_budget" not in served


def test_every_counter_of_a_project_is_0_before_its_first_run_ends(live) -> None:
    live.run(project="p")
    served = scrape(live)
    for name, count in (
        ("optwatch_fleet_runs_ended_total", 4),
        ("optwatch_fleet_runs_recovered_total", 1),
        ("optwatch_fleet_failures_total", 5),
        ("optwatch_fleet_run_seconds_total", 4),
        ("optwatch_fleet_device_seconds_total", 4),
        ("optwatch_fleet_cost_total", 4),
    ):
        assert [value for labels, value in served[name] if labels["project"] == "p"] == [0.0] * count
    assert served["optwatch_server_alertmanager_sends_total"] == [({"result": "ok"}, 0.0), ({"result": "failed"}, 0.0)]
    assert {labels["path"] for labels, _ in served["optwatch_fleet_time_to_page_seconds_count"]} == {
        "direct",
        "prometheus",
    }


def test_time_to_page_is_counted_in_its_bucket_and_never_below_0(live) -> None:
    first, last = PAGE_BUCKETS[0], PAGE_BUCKETS[-1]
    with live.service.database.write() as session:
        for seconds in (-3.0, first, first + 0.1, 9999.0):
            observe_time_to_page(session, "direct", seconds)
        # What was counted under a bound that is none any more stays counted, in the next larger bucket.
        add(session, {("optwatch_fleet_time_to_page_seconds", "direct", str(last - 0.1)): 2})
    name = "optwatch_fleet_time_to_page_seconds"
    served = scrape(live)
    buckets = {labels["le"]: value for labels, value in served[f"{name}_bucket"] if labels["path"] == "direct"}
    assert list(buckets) == [*(str(bound) for bound in PAGE_BUCKETS), "+Inf"]
    assert [buckets[str(first)], buckets[str(PAGE_BUCKETS[1])]] == [2, 3]
    assert [buckets[str(PAGE_BUCKETS[-2])], buckets[str(last)], buckets["+Inf"]] == [3, 5, 6]
    assert sample(live, f"{name}_sum", path="direct") == first + (first + 0.1) + 9999
    assert sample(live, f"{name}_count", path="prometheus") == 0


def test_a_scrape_costs_no_more_with_a_long_history(live) -> None:
    def seconds() -> float:
        taken = []
        for _ in range(5):
            began = time.perf_counter()
            list(live.service.registry.collect())
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    live.run()
    live.beat()
    short = seconds()
    ended = {
        "name": "old", "project": "p", "team": "", "started_at": 0.0, "created_at": 0.0, "optimizer": "",
        "hyperparameters": {}, "device": "", "versions": {}, "code_version": "", "host": "",
        "heartbeat_interval_seconds": 10.0, "status": "succeeded", "status_since": 1.0, "lost_reason": "",
        "reason": "", "counted_status": "succeeded", "cause": "", "counted_seconds": 0.0,
    }  # fmt: skip
    beat = {
        "rank": 0, "received_at": 1.0, "interval_seconds": 10.0, "promise_reason": "", "due_at": 1.0, "latest": {},
    }  # fmt: skip
    with live.service.database.write() as session:
        session.execute(insert(RunRow), [{**ended, "id": f"old-{number}"} for number in range(5000)])
        session.execute(insert(RankRow), [{**beat, "run_id": f"old-{number}"} for number in range(5000)])
    # Not one of the 5000 is read; the bound is far above the noise and far below what reading them takes.
    assert seconds() < short + 0.05
    assert len(scrape(live)["optwatch_fleet_run_status"]) == 1


def test_the_labels_of_a_run_come_first_in_each_of_its_series() -> None:
    for name, metric in BY_NAME.items():
        if name.startswith("optwatch_fleet_run_") and metric.kind == "gauge":
            assert metric.labels[:4] == ("run_id", "run", "project", "team")
