from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from optwatch_server.cli import main

COMMAND = [sys.executable, "-c", "import sys; from optwatch_server.cli import main; sys.exit(main(sys.argv[1:]))"]


@contextmanager
def started(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start a server process; give it and its URL, and end it by its id."""
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
    )
    assert process.stdout is not None
    deadline = threading.Timer(60, process.kill)  # a server that never gets ready must not block the line below
    deadline.start()
    try:
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, f"no URL in {line!r}"
        yield process, found[0]
    finally:
        deadline.cancel()
        process.kill()
        process.communicate(timeout=30)


def test_it_says_where_it_listens_and_what_it_stores_and_stops_cleanly_on_sigterm(tmp_path: Path) -> None:
    environment = {"XDG_DATA_HOME": str(tmp_path), "OPTWATCH_DATABASE_URL": ""}
    with started("--port", "0", environment=environment) as (process, url):
        assert httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
        assert url.startswith("http://127.0.0.1:")
        assert (tmp_path / "optwatch" / "optwatch.sqlite3").is_file()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


def test_the_environment_selects_the_database(tmp_path: Path) -> None:
    file = tmp_path / "chosen.sqlite3"
    with started("--port", "0", environment={"OPTWATCH_DATABASE_URL": f"sqlite:///{file}"}) as (process, _url):
        assert file.is_file()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0


def test_a_taken_port_is_named_with_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--port", str(port), "--database-url", f"sqlite:///{tmp_path / 'a.sqlite3'}"]) == 1
    assert capsys.readouterr().err == (
        f"optwatch server: port {port} on 127.0.0.1 is taken: stop what listens there, "
        "or choose another with --port (0 picks a free one)\n"
    )
    assert not (tmp_path / "a.sqlite3").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--port", "70000"], "port 70000 does not exist: choose one from 1 to 65535 with --port, or 0 for a free one"),
        (["--port", "0", "--alertmanager-url", "alertmanager:9093"], "give something like http://alertmanager:9093"),
        (["--port", "0", "--public-url", "watch"], "--public-url or $OPTWATCH_PUBLIC_URL is 'watch'"),
        (["--port", "0", "--database-url", "mysql://db/x"], "the database 'mysql' is not supported"),
        (["--port", "0", "--database-url", "sqlite:////proc/none/a.sqlite3"], "/proc/none"),
        (
            ["--port", "0", "--database-url", "postgresql://u:secret@127.0.0.1:9/x"],
            "check that it is up and that --database-url or $OPTWATCH_DATABASE_URL is right",
        ),
    ],
)
def test_what_keeps_it_from_starting_is_one_clear_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert "secret" not in error


def test_what_was_acknowledged_survives_kill_9(database_url: str) -> None:
    arguments = ("--port", "0", "--database-url", database_url)
    acknowledged: list[str] = []
    with started(*arguments) as (process, url):
        client = httpx.Client(base_url=url, trust_env=False)
        client.post("/api/v1/runs", json={"schema": 1, "id": "run-1"}).raise_for_status()
        killer = threading.Timer(0.3, process.kill)
        killer.start()
        try:
            while True:
                event = {
                    "id": str(uuid.uuid4()),
                    "run_id": "run-1",
                    "kind": "nonfinite",
                    "severity": "critical",
                    "occurred_at": float(len(acknowledged)),
                    "summary": "a NaN was seen",
                }
                client.post("/api/v1/events", json={"schema": 1, "events": [event]}).raise_for_status()
                acknowledged.append(event["id"])
        except httpx.TransportError:
            pass
        finally:
            killer.join()
            client.close()
        assert process.wait(timeout=30) == -signal.SIGKILL
    assert acknowledged
    with started(*arguments) as (_process, url), httpx.Client(base_url=url, trust_env=False) as client:
        kept, query = [], {"limit": 500}
        while True:
            page = client.get("/api/v1/runs/run-1/events", params=query).json()
            kept += [event["id"] for event in page["events"]]
            if page["next"] is None:
                break
            query = {"limit": 500, "after": page["next"]}
    assert kept[: len(acknowledged)] == acknowledged
