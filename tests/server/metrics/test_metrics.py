import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.exc import OperationalError

from optwatch_server.catalogue import BY_NAME, STATUSES

RUN = {"run_id": "run-1", "run": "llama", "project": "p", "team": ""}


def scrape(live) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Return labels and values of every sample, by sample name."""
    answer = live.client.get("/metrics")
    assert answer.status_code == 200
    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return samples


def test_every_metric_of_the_catalogue_is_served_with_its_labels_and_no_other(live) -> None:
    live.run(tags={"cost_per_device_hour": "2", "cost_budget": "10"})
    live.beat(step=1, promise_seconds=1800)
    live.events(live.event())
    live.run("failed")
    live.finish("failed", "failed")
    served = scrape(live)
    for name, metric in BY_NAME.items():
        sample = f"{name}_count" if metric.kind == "histogram" else name
        assert set(served[sample][0][0]) == set(metric.labels)
    histograms = {name for name, metric in BY_NAME.items() if metric.kind == "histogram"}
    known = {name + ending for name in histograms for ending in ("_bucket", "_count", "_sum")}
    assert set(served) == known | (set(BY_NAME) - histograms)


def test_every_status_is_counted_even_without_a_run(live) -> None:
    assert scrape(live)["optwatch_fleet_runs"] == [({"status": status}, 0.0) for status in STATUSES]
    live.run("a")
    live.run("b")
    live.finish("b", "failed")
    counted = {labels["status"]: value for labels, value in scrape(live)["optwatch_fleet_runs"]}
    assert counted == {"running": 1, "lost": 0, "succeeded": 0, "failed": 1, "cancelled": 0}


def test_a_running_run_has_its_series_before_it_is_lost(live) -> None:
    live.run(name="llama", project="p")
    served = scrape(live)
    assert served["optwatch_fleet_run_lost"] == [(RUN, 0.0)]
    assert "optwatch_fleet_run_last_step" not in served
    live.beat(rank=0, step=7)
    live.clock.now += 1
    live.beat(rank=1, step=6)
    served = scrape(live)
    assert served["optwatch_fleet_run_last_step"] == [(RUN, 7.0)]
    assert served["optwatch_fleet_run_last_heartbeat_timestamp_seconds"] == [(RUN, live.clock.now)]


def test_a_lost_run_is_1_for_a_day_and_a_finished_one_has_no_series(live) -> None:
    live.run(name="llama", project="p")
    live.beat()
    live.advance(25)
    assert scrape(live)["optwatch_fleet_run_lost"] == [(RUN, 1.0)]
    live.clock.now += 24 * 3600 - 1
    assert scrape(live)["optwatch_fleet_run_lost"] == [(RUN, 1.0)]
    live.clock.now += 1
    assert "optwatch_fleet_run_lost" not in scrape(live)
    live.beat()
    assert scrape(live)["optwatch_fleet_run_lost"] == [(RUN, 0.0)]
    live.finish()
    assert "optwatch_fleet_run_lost" not in scrape(live)


def test_requests_are_counted_by_route_template_and_never_by_raw_path(small) -> None:
    small.run()
    for path in ("/runs/run-1", "/runs/a", "/runs/b", "/nowhere/1", "/nowhere/2", "/api/v1/runs/run-1"):
        small.client.get(path)
    small.client.request("BREW", "/")
    small.client.post("/api/v1/runs", content=b" " * (1024 * 1024 + 1))
    counted = {
        (labels["route"], labels["method"], labels["status"]): value
        for labels, value in scrape(small)["optwatch_server_requests_total"]
    }
    assert counted == {
        ("/api/v1/runs", "POST", "201"): 1,
        ("/runs/{run_id}", "GET", "200"): 1,
        ("/runs/{run_id}", "GET", "404"): 2,
        ("none", "GET", "404"): 2,
        ("/api/v1/runs/{run_id}", "GET", "200"): 1,
        ("/", "other", "405"): 1,
        ("none", "POST", "413"): 1,
    }


def test_the_last_sweep_is_the_last_one_that_worked(small, monkeypatch: pytest.MonkeyPatch) -> None:
    small.advance(4)
    swept = small.clock.now
    with monkeypatch.context() as patch:
        patch.setattr("optwatch_server.runs.sweeper.promises", _no_database)
        small.clock.now += 2
        with pytest.raises(OperationalError):
            small.service.sweeper.sweep()
    assert scrape(small)["optwatch_server_last_sweep_timestamp_seconds"] == [({}, swept)]


def test_without_a_database_the_servers_own_health_is_still_served(small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small.service.database, "read", _no_database)
    served = scrape(small)
    assert "optwatch_server_last_sweep_timestamp_seconds" in served
    assert "optwatch_fleet_runs" not in served


def _no_database(*_arguments: object) -> None:
    raise OperationalError("SELECT 1", {}, OSError("gone"))
