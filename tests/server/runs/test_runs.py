from concurrent.futures import ThreadPoolExecutor

import pytest

FULL = {
    "name": "llama 7B",
    "project": "pretraining",
    "team": "research",
    "tags": {"sweep": "lr", "gpu": "h100"},
    "started_at": 1_699_999_990.5,
    "optimizer": "AdamW",
    "hyperparameters": {"lr": 3e-4, "betas": [0.9, 0.95], "clip": "Infinity"},
    "device": "cuda:0",
    "world_size": 8,
    "seed": 42,
    "resumed_from": "run-0",
    "target": {"metric": "loss", "value": 2.5, "by_step": 1000},
    "versions": {"optwatch": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
    "code_version": "abc123",
    "host": "node-7",
    "pid": 4242,
    "heartbeat_interval_seconds": 5.0,
}


def test_a_created_run_comes_back_as_it_was_sent(live) -> None:
    answer = live.run(**FULL)
    assert answer.status_code == 201
    assert answer.headers["Location"] == "/api/v1/runs/run-1"
    got = live.client.get("/api/v1/runs/run-1").json()
    assert {name: got[name] for name in FULL} == FULL
    assert (got["status"], got["created_at"], got["ranks"]) == ("running", live.clock.now, [])


def test_what_a_run_leaves_out_has_a_default(live) -> None:
    got = live.run(team=None, started_at=None).json()
    assert (got["name"], got["project"], got["team"], got["tags"]) == ("run-1", "", "", {})
    assert (got["started_at"], got["heartbeat_interval_seconds"]) == (live.clock.now, 10.0)


def test_creating_a_run_again_changes_nothing(live) -> None:
    first = live.run(name="first").json()
    live.clock.now += 5
    again = live.run(name="second", tags={"a": "b"})
    assert (again.status_code, again.json()) == (200, first)


def test_many_creations_of_one_run_at_once_make_one(live) -> None:
    with ThreadPoolExecutor(16) as pool:
        codes = list(pool.map(lambda _: live.run(tags={"a": "b"}).status_code, range(32)))
    assert sorted(codes) == [200] * 31 + [201]
    assert len(live.client.get("/api/v1/runs").json()["runs"]) == 1


def test_text_that_no_database_can_store_does_not_fail_the_run(live) -> None:
    answer = live.client.post(
        "/api/v1/runs",
        content=rb'{"schema": 1, "id": "run-1", "name": "a\u0000b\ud800", "hyperparameters": {"k\u0000": ["\ud800"]}}',
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 201
    assert answer.json()["name"].startswith("a\N{REPLACEMENT CHARACTER}b")


def test_pages_of_runs_hold_each_run_once_newest_first(live) -> None:
    for number in range(5):
        live.clock.now += number % 2  # some are made in the same instant
        live.run(f"run-{number}")
    seen, after = [], None
    while True:
        page = live.client.get("/api/v1/runs", params={"limit": 2, **({"after": after} if after else {})}).json()
        seen += [run["id"] for run in page["runs"]]
        live.clock.now += 1
        live.run(f"late-{len(seen)}")  # what is made meanwhile is newer, and shifts no page
        if (after := page["next"]) is None:
            break
    made = [run["id"] for run in live.client.get("/api/v1/runs").json()["runs"] if run["id"] in seen]
    assert sorted(seen) == [f"run-{number}" for number in range(5)]
    assert seen == made


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, ["c", "b", "a"]),
        ({"project": "p"}, ["b", "a"]),
        ({"team": "t"}, ["c"]),
        ({"status": "failed"}, ["b"]),
        ({"status": "running", "project": "p"}, ["a"]),
        ({"tag": "gpu"}, ["b", "a"]),
        ({"tag": "gpu=h100"}, ["a"]),
        ({"tag": ["gpu", "sweep=x=y"]}, ["b"]),
        ({"project": "nobody"}, []),
    ],
)
def test_a_list_is_narrowed_by_its_filters(live, query: dict[str, str], expected: list[str]) -> None:
    live.run("a", project="p", tags={"gpu": "h100"})
    live.run("b", project="p", tags={"gpu": "h200", "sweep": "x=y"})
    live.run("c", project="q", team="t")
    live.finish("b", "failed")
    assert [run["id"] for run in live.client.get("/api/v1/runs", params=query).json()["runs"]] == expected


@pytest.mark.parametrize("after", ["nonsense", "!!", "bnVsbA", "WzEsMl0", "WzFlOTk5LCAiYSJd", "WyJhIiwgImIiXQ"])
def test_a_cursor_that_no_page_gave_is_refused(live, after: str) -> None:
    answer = live.client.get("/api/v1/runs", params={"after": after})
    assert answer.status_code == 422
    assert f"after is {after!r}, which is no cursor of this server" in answer.json()["detail"]


def test_a_finish_ends_the_run_and_repeating_it_changes_nothing(live) -> None:
    live.run()
    live.clock.now += 60
    ended = live.finish(status="failed", reason="CUDA out of memory", final_step=99, finished_at=1_700_000_059.0)
    assert ended.status_code == 200
    got = ended.json()
    assert (got["status"], got["reason"], got["final_step"]) == ("failed", "CUDA out of memory", 99)
    assert (got["finished_at"], got["status_since"]) == (1_700_000_059.0, live.clock.now)
    live.clock.now += 60
    assert live.finish(status="failed").json() == got
    assert live.finish(status="succeeded").json() == got


def test_a_lost_run_can_still_be_finished(live) -> None:
    live.run()
    live.advance(30)
    assert live.status() == "lost"
    assert live.finish().json()["status"] == "succeeded"


def test_finishing_or_getting_an_unknown_run_says_how_to_create_it(live) -> None:
    for answer in (live.finish("nobody"), live.client.get("/api/v1/runs/nobody")):
        assert answer.status_code == 404
        assert (
            answer.json()["detail"]
            == "no run 'nobody' is known here: create it with POST /api/v1/runs, or check the id"
        )
