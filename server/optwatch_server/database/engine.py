"""The database: SQLite as the embedded default, PostgreSQL when it has to scale; one set of models for both."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import Session

ENVIRONMENT = "OPTWATCH_DATABASE_URL"
_BUSY_SECONDS = 30


def default_url(environment: Mapping[str, str] = os.environ) -> str:
    """Return `OPTWATCH_DATABASE_URL`, or the URL of an SQLite file in the user's data folder.

    The folder does not depend on where the server is started, so that a restart finds its history again.
    """
    if url := environment.get(ENVIRONMENT):
        return url
    data = environment.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return f"sqlite:///{Path(data) / 'optwatch' / 'optwatch.sqlite3'}"


def parse_url(text: str) -> URL:
    """Return the URL with the driver we install for it.

    Raises:
        ValueError: it is no database URL, or one of another database than SQLite in a file and PostgreSQL.
    """
    advice = "use sqlite:////path/to/file.sqlite3 or postgresql://user:password@host:5432/name"
    try:
        url = make_url(text)
    except ArgumentError as error:
        # The text itself may hold a password, so it is not repeated.
        raise ValueError(f"the database URL cannot be read: {advice}") from error
    backend = url.get_backend_name()
    if backend == "sqlite":
        if url.database in (None, "", ":memory:"):
            raise ValueError(f"the database URL {text!r} names no file, and what is kept in memory is lost: {advice}")
        return url.set(drivername="sqlite+pysqlite")
    if backend in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    raise ValueError(f"the database {backend!r} is not supported: {advice}")


class Database:
    """Hands out sessions. Opening it connects nothing; `close` gives every connection back.

    Raises:
        ValueError: see `parse_url`.
    """

    def __init__(self, url: str) -> None:
        self.url = parse_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        if self.is_sqlite:
            Path(str(self.url.database)).parent.mkdir(parents=True, exist_ok=True)
            self.engine = create_engine(self.url, connect_args={"timeout": _BUSY_SECONDS})
            _prepare_sqlite(self.engine)
        else:
            # A database that was restarted must not cost the first requests after it: hence the ping.
            self.engine = create_engine(
                self.url, pool_pre_ping=True, max_overflow=15, connect_args={"connect_timeout": 10}
            )
        self._reads = self.engine.execution_options(optwatch_reads=True)
        # SQLite has one writer. Threads that queue here are served in turn; those that queue inside SQLite poll for it.
        self._writer = threading.Lock() if self.is_sqlite else nullcontext()

    @property
    def shown(self) -> str:
        """The URL without its password and without the driver."""
        return self.url.set(drivername=self.url.get_backend_name()).render_as_string(hide_password=True)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Give a session that only reads."""
        with Session(self._reads) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Give a session whose changes are committed, durably, when the block ends without an exception."""
        with self._writer, Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


def _prepare_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # the driver must not begin transactions of its own: see _begin
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")  # what was acknowledged survives a power cut too
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A transaction that reads first and writes later fails at once when another one wrote in between: no timeout
        # helps there. A writer therefore takes the lock when it begins, and waits for it.
        reads = connection.get_execution_options().get("optwatch_reads", False)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")
