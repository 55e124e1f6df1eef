"""The reporter against servers that are absent, slow, broken or gone for a while: training never notices."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from optwatch.delivery import reporter as module
from optwatch.delivery import retry as retry_module
from optwatch.delivery.client import finite
from optwatch.delivery.reporter import BACKLOG, EVENTS_PATH, Reporter, Retry
from optwatch.events import Event
from optwatch.faults import Faults
from optwatch.lifecycle.run import describe

RUN = "/api/v1/runs"


def event(step: int, **details: Any) -> Event:
    return Event("nonfinite", step, 1.7e9 + step, f"NaN at step {step}", "A bad batch.", "TrainingNonFinite", details)


def steps(events: list[dict[str, Any]]) -> list[int]:
    return [event["step"] for event in events]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not have half a minute for a server to be asked again."""
    monkeypatch.setattr(retry_module, "RETRY_SECONDS", (0.01, 0.05))


@pytest.fixture
def report(settings: Any) -> Iterator[Callable[..., Reporter]]:
    """Starts reporters of run `r`, each closed in the end. `rank` as RANK would say; the rest are settings."""
    reporters: list[Reporter] = []

    def start(server: str, rank: int = 0, latest: Any = None, **changes: Any) -> Reporter:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        environment = {"OPTWATCH_RUN_ID": "r", "RANK": str(rank), "WORLD_SIZE": "4"}
        given = {"run": None, "project": None, "tags": None, "seed": None, "resume_from": None, "target": None}
        run = describe([optimizer], **given, heartbeat_interval_seconds=0.05, environment=environment)
        made = settings(heartbeat_interval_seconds=0.05, request_timeout_seconds=1, **changes)
        values = latest or (lambda: {"step": 3, "values": {"loss": 1.0}})
        reporters.append(Reporter(server, run, made, Faults(), values, 9464))
        return reporters[-1]

    yield start
    for reporter in reporters:
        reporter.close(0.3)
        reporter._thread.join(10)
        assert not reporter._thread.is_alive()


def test_the_run_comes_first_then_events_in_order_and_then_the_end(stand_in: Any, report: Any) -> None:
    server = stand_in()
    reporter = report(server.url)
    for step in range(450):
        reporter.event(event(step))
    reporter.finish("succeeded", None, 450)
    reporter.close(20)
    paths = [path for path, _ in server.requests if path != "/api/v1/heartbeats"]
    assert paths[0] == RUN
    assert paths[-1] == f"{RUN}/r/finish"
    assert set(paths[1:-1]) == {EVENTS_PATH}
    assert steps(server.events()) == list(range(450))
    assert [e["sequence"] for e in server.events()] == list(range(1, 451))
    assert max(len(body["events"]) for body in server.bodies("/events")) <= module.BATCH
    assert (reporter._faults.counts, reporter.dropped) == ({}, 0)


def test_heartbeats_carry_the_latest_values_and_where_to_scrape(stand_in: Any, report: Any, eventually: Any) -> None:
    server = stand_in()
    report(server.url)
    eventually(lambda: len(server.bodies("/heartbeats")) >= 3)
    beat = server.bodies("/heartbeats")[0]["beats"][0]
    assert beat | {"sent_at": 0} == {
        "run_id": "r",
        "rank": 0,
        "step": 3,
        "sent_at": 0,
        "interval_seconds": 0.05,
        "metrics_target": "127.0.0.1:9464",
        "values": {"loss": 1.0},
    }


def test_what_settings_advertise_is_what_prometheus_is_told(stand_in: Any, report: Any, eventually: Any) -> None:
    server = stand_in()
    report(server.url, advertise="trainer-7.cluster")
    eventually(lambda: server.bodies("/heartbeats"))
    assert server.bodies("/heartbeats")[0]["beats"][0]["metrics_target"] == "trainer-7.cluster:9464"


def test_submitting_never_meets_the_server_even_if_it_never_answers(
    stand_in: Any, report: Any, eventually: Any
) -> None:
    server = stand_in()
    server.answer = server.never
    reporter = report(server.url)
    threads: set[int] = set()

    def connect(*arguments: Any, **options: Any) -> Any:
        threads.add(threading.get_ident())
        return opened(*arguments, **options)

    eventually(lambda: server.requests)  # the reporter's thread is now inside a request that is not answered
    opened, reporter._client._open = reporter._client._open, connect
    for step in range(BACKLOG):
        reporter.event(event(step))
    eventually(lambda: threads)
    assert threads == {reporter._thread.ident}
    assert reporter.dropped == 0


def test_submitting_takes_no_lock_that_the_reporters_thread_holds_while_it_sends(stand_in: Any, report: Any) -> None:
    server = stand_in()
    server.answer = server.never
    reporter = report(server.url)
    done = threading.Event()

    def submit() -> None:
        for step in range(100):
            reporter.event(event(step))
        done.set()

    while not server.requests:  # the thread is now inside a request that is not answered
        assert reporter._thread.is_alive()
    threading.Thread(target=submit, daemon=True).start()
    assert done.wait(30)
    assert [path for path, _ in server.requests] == [RUN]


def test_beyond_the_backlog_events_are_dropped_and_counted_but_never_the_runs_end(
    settings: Any, monkeypatch: pytest.MonkeyPatch, report: Any, stand_in: Any, eventually: Any
) -> None:
    server, hold = stand_in(), threading.Event()
    monkeypatch.setattr(Reporter, "_fill", lambda self, spool, fill=Reporter._fill: hold.wait(30) and fill(self, spool))
    reporter = report(server.url, spool_max_bytes=2**30)
    for step in range(BACKLOG + 5):
        reporter.event(event(step))
    reporter.finish("succeeded", None, None)
    assert reporter.dropped == 6  # the run's own message was waiting as well
    hold.set()
    eventually(lambda: server.bodies("/finish"), 60)
    assert steps(server.events()) == list(range(BACKLOG - 1))


BROKEN = {
    "500": lambda server: server.response(500),
    "503 with a page": lambda server: server.response(503, b"<html>down</html>"),
    "404 of an ingress without a backend": lambda server: server.response(404, b"default backend"),
    "401 of a login": lambda server: server.response(401),
    "429": lambda server: server.response(429),
    "408": lambda server: server.response(408),
    "a redirect": lambda server: server.response(301, headers=f"Location: {server.url}/api/v1/runs\r\n"),
    "a page instead of JSON": lambda server: server.response(200, b"<html>welcome</html>"),
    "JSON of somebody else": lambda server: server.response(200, b'["hello"]'),
    "bytes that are no text": lambda server: server.response(200, b"\xff\xfe\x00"),
    "something that is no HTTP": lambda server: b"SSH-2.0-OpenSSH_9.6\r\n",
    "nothing": lambda server: b"",
    "half a header": lambda server: b"HTTP/1.0 200 OK\r\nContent-Le",
    "half a body": lambda server: b'HTTP/1.0 200 OK\r\nContent-Length: 50\r\n\r\n{"acc',
    "half an error": lambda server: b"HTTP/1.0 500 X\r\nContent-Length: 50\r\n\r\n{",
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_answer_is_counted_and_everything_arrives_once_it_is_mended(
    broken: str, stand_in: Any, report: Any, eventually: Any
) -> None:
    server = stand_in()
    server.answer = lambda path, body: BROKEN[broken](server)
    reporter = report(server.url)
    for step in range(3):
        reporter.event(event(step))
    eventually(lambda: reporter._faults.counts.get("reporter", 0) >= 4)
    sent_in_vain = len(server.requests)
    server.answer = server.accept
    reporter.finish("succeeded", None, 3)
    eventually(lambda: server.bodies("/finish"))
    after = [(path, body) for path, body in server.requests[sent_in_vain:] if path != "/api/v1/heartbeats"]
    assert [path for path, _ in after][:1] == [RUN]
    assert [e["step"] for path, body in after if path == EVENTS_PATH for e in body["events"]] == [0, 1, 2]
    assert set(reporter._faults.counts) == {"reporter"}
    assert reporter.dropped == 0


def test_an_absent_server_costs_nothing_and_gets_everything_when_it_comes(
    stand_in: Any, report: Any, eventually: Any
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    reporter = report(f"http://127.0.0.1:{port}")
    for step in range(5):
        reporter.event(event(step))
    eventually(lambda: reporter._faults.counts.get("reporter", 0) >= 3)
    server = stand_in(port)
    reporter.finish("failed", "KeyError: 'x'", 5)
    eventually(lambda: server.bodies("/finish"))
    assert steps(server.events()) == [0, 1, 2, 3, 4]
    assert server.bodies("/finish")[0]["reason"] == "KeyError: 'x'"


def test_a_server_that_never_answers_is_given_up_and_asked_again(stand_in: Any, report: Any, eventually: Any) -> None:
    server = stand_in()
    server.answer = server.never
    reporter = report(server.url)
    reporter.event(event(1))
    eventually(lambda: reporter._faults.counts.get("reporter", 0) >= 1)
    server.answer = server.accept
    eventually(lambda: server.events())
    assert steps(server.events()) == [1]


@pytest.mark.parametrize("status", [400, 413, 422])
def test_one_refused_event_does_not_cost_the_others_of_its_batch(
    status: int, stand_in: Any, report: Any, eventually: Any
) -> None:
    server = stand_in()

    def picky(path: str, body: Any) -> bytes:
        bad = path == EVENTS_PATH and any(e["step"] == 7 for e in body["events"])
        return bytes(server.response(status if bad else 200, b'{"detail": "step is 7"}'))

    hold = threading.Event()
    server.answer = lambda path, body: hold.wait(30) and picky(path, body)
    reporter = report(server.url)
    for step in range(20):
        reporter.event(event(step))
    hold.set()
    reporter.finish("succeeded", None, 20)
    eventually(lambda: server.bodies("/finish"))
    alone = [body["events"][0]["step"] for body in server.bodies("/events") if len(body["events"]) == 1]
    assert alone == list(range(20))
    assert reporter.dropped == 1
    assert reporter._faults.counts == {"reporter": 1}


def test_a_refusal_is_logged_with_what_the_server_said(
    stand_in: Any, report: Any, eventually: Any, caplog: Any
) -> None:
    server = stand_in()
    server.answer = lambda path, body: server.response(422, b'{"detail": "kind is missing"}')
    report(server.url)
    expected = "POST /api/v1/runs: the server answered 422: "
    eventually(lambda: expected in caplog.text)
    assert "kind is missing" in caplog.text


def test_a_redirect_is_not_followed_but_named(stand_in: Any, report: Any, eventually: Any, caplog: Any) -> None:
    server = stand_in()
    server.answer = lambda path, body: server.response(301, headers="Location: https://optwatch.example/\r\n")
    report(server.url)
    eventually(lambda: "to go to https://optwatch.example/: give attach(server=...) that address" in caplog.text)


def test_heartbeats_go_on_while_events_cannot_be_delivered(stand_in: Any, report: Any, eventually: Any) -> None:
    server = stand_in()
    server.answer = lambda path, body: server.response(500 if path == EVENTS_PATH else 200)
    reporter = report(server.url)
    reporter.event(event(1))
    eventually(lambda: len(server.events()) >= 2)
    before = len(server.bodies("/heartbeats"))
    eventually(lambda: len(server.bodies("/heartbeats")) >= before + 3)


def test_a_refused_heartbeat_holds_no_event_up(stand_in: Any, report: Any, eventually: Any) -> None:
    server = stand_in()
    server.answer = lambda path, body: server.response(422 if path.endswith("/heartbeats") else 200)
    reporter = report(server.url)
    eventually(lambda: reporter._faults.counts.get("reporter", 0) >= 2)
    reporter.event(event(1))
    eventually(lambda: server.events())


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_0_tells_a_server_that_has_forgotten_the_run(
    rank: int, stand_in: Any, report: Any, eventually: Any
) -> None:
    server = stand_in()
    unknown = b'{"accepted": 0, "unknown_runs": ["r"]}'
    server.answer = lambda path, body: server.response(200, b"{}" if path == RUN else unknown)
    reporter = report(server.url, rank)
    reporter.event(event(1))
    reporter.finish("succeeded", None, 1)
    eventually(lambda: len(server.events()) >= 2 and server.bodies("/heartbeats"))
    assert bool(server.bodies("/runs")) == (rank == 0)
    assert not server.bodies("/finish")  # it would overtake the event
    server.answer = server.accept
    seen = len(server.events())
    eventually(lambda: len(server.events()) > seen)
    if rank == 0:
        eventually(lambda: server.bodies("/finish"))
    assert reporter.dropped == 0


def test_the_end_of_a_run_that_the_server_has_forgotten_makes_it_known_again(
    stand_in: Any, report: Any, eventually: Any
) -> None:
    server = stand_in()
    reporter = report(server.url)
    eventually(lambda: server.bodies("/runs"))
    known: list[str] = []

    def forgetful(path: str, body: Any) -> bytes:
        if path == RUN:
            known.append(path)
        return bytes(server.response(404 if path.endswith("/finish") and not known else 200))

    server.answer = forgetful
    reporter.finish("succeeded", None, 1)
    reporter.close(20)
    assert [path for path, _ in server.requests if path != "/api/v1/heartbeats"] == [
        RUN,
        f"{RUN}/r/finish",
        RUN,
        f"{RUN}/r/finish",
    ]
    assert reporter._faults.counts == {}


def test_closing_tries_once_more_at_once_however_long_the_wait_was_to_be(
    stand_in: Any, report: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry_module, "RETRY_SECONDS", (1000.0, 1000.0))
    server = stand_in()
    server.answer = lambda path, body: server.response(500)
    reporter = report(server.url)
    eventually(lambda: reporter._faults.counts.get("reporter", 0) >= 1)
    server.answer = server.accept
    reporter.event(event(1))
    reporter.close(20)
    assert steps(server.events()) == [1]


def test_an_event_that_is_no_json_is_counted_and_the_others_go_on(stand_in: Any, report: Any, eventually: Any) -> None:
    server = stand_in()
    reporter = report(server.url)
    reporter.event(event(1, tensor=torch.zeros(2)))
    reporter.event(event(2))
    eventually(lambda: server.events())
    assert steps(server.events()) == [2]
    assert (reporter._faults.counts, reporter.dropped) == ({"spool": 1}, 1)


def test_texts_are_cut_to_what_the_server_takes(stand_in: Any, report: Any, eventually: Any) -> None:
    server = stand_in()
    reporter = report(server.url)
    reporter.event(Event("nonfinite", 1, 1.0, "s" * 9000, "l" * 9000, "TrainingNonFinite"))
    reporter.finish("failed", "r" * 9000, 1)
    eventually(lambda: server.bodies("/finish"))
    sent = server.events()[0]
    assert {len(sent["summary"]), len(sent["likely"]), len(server.bodies("/finish")[0]["reason"])} == {4000}


def test_retries_draw_nothing_from_the_users_random_numbers() -> None:
    random.seed(3)
    before = random.getstate()
    retry = Retry()
    for _ in range(50):
        retry.failed()
    assert random.getstate() == before


def test_waits_double_up_to_the_longest_and_start_again_after_a_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_module, "RETRY_SECONDS", (1.0, 8.0))
    monkeypatch.setattr(retry_module.time, "monotonic", lambda: 100.0)
    retry = Retry()
    for expected in (1, 2, 4, 8, 8):
        retry.failed()
        assert 0.7 * expected <= retry.due - 100 <= 1.3 * expected
    retry.succeeded()
    assert retry.due == 100
    retry.failed()
    assert retry.due - 100 <= 1.3


def test_numbers_that_are_not_finite_become_the_wires_words() -> None:
    nan, inf = float("nan"), float("inf")
    assert finite({"a": [nan, (inf, -inf), 1.5, True, None], 3: {"b": "nan"}}) == {
        "a": ["NaN", ["Infinity", "-Infinity"], 1.5, True, None],
        "3": {"b": "nan"},
    }
