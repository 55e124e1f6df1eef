def group(target: str, run_id: str, project: str = "", team: str = "") -> dict[str, object]:
    return {"targets": [target], "labels": {"project": project, "team": team, "run_id": run_id}}


def targets(live) -> list[dict[str, object]]:
    answer = live.client.get("/api/v1/sd")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"  # Prometheus refuses any other
    return answer.json()


def test_without_a_live_run_the_list_is_empty_and_not_missing(live) -> None:
    assert targets(live) == []


def test_every_rank_that_can_be_scraped_is_a_target(live) -> None:
    live.run("b", project="p", team="t")
    live.run("a")
    live.beat("b", rank=1, metrics_target="node-2:9101")
    live.beat("b", rank=0, metrics_target="node-1:9100")
    live.beat("b", rank=2)
    live.beat("a", metrics_target="[::1]:9100")
    assert targets(live) == [
        group("[::1]:9100", "a"),
        group("node-1:9100", "b", "p", "t"),
        group("node-2:9101", "b", "p", "t"),
    ]


def test_a_finished_run_is_no_target(live) -> None:
    live.run()
    live.beat(metrics_target="node-1:9100")
    live.finish()
    assert targets(live) == []


def test_a_lost_run_stays_a_target_for_one_hour(live) -> None:
    live.run()
    live.beat(metrics_target="node-1:9100")
    live.advance(25)
    assert live.status() == "lost"
    live.clock.now += 3599
    assert targets(live) == [group("node-1:9100", "run-1")]
    live.clock.now += 1
    assert targets(live) == []


def test_an_address_belongs_to_the_run_that_beat_from_it_last(live) -> None:
    live.run("old")
    live.run("new")
    live.beat("old", metrics_target="node-1:9100")
    live.clock.now += 1
    live.beat("new", metrics_target="node-1:9100")
    assert targets(live) == [group("node-1:9100", "new")]
