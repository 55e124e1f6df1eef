"""Messages that the server has not had yet, kept in order on disk so that they outlive the process."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from optwatch.faults import Faults

_SCHEMA = """
create table if not exists messages (number integer primary key autoincrement, path text not null, body text not null);
create table if not exists owner (server text not null, run text);
"""


def default_directory() -> Path:
    """``$XDG_STATE_HOME/optwatch/spool``, by default under ``~/.local/state``; under the folder for temporary files
    where this user has no home (a container under an arbitrary user id)."""
    state = os.environ.get("XDG_STATE_HOME")
    if state:
        return Path(state) / "optwatch" / "spool"
    try:
        return Path.home() / ".local" / "state" / "optwatch" / "spool"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"optwatch-{os.getuid()}" / "spool"


@dataclass(frozen=True, slots=True)
class Message:
    """One request that is due."""

    number: int
    path: str
    body: dict[str, Any]


class Spool:
    """A queue of messages for one server in one SQLite file, used by one thread.

    Where the disk cannot be written (no folder, no space, no rights) the queue goes on in memory and the fault is
    counted; one that is `inherited` from a dead process has no such use. A file is locked while its process lives, so
    that `orphans` finds just those of dead ones.

    Raises:
        OSError: an inherited file is locked by a living process.
        sqlite3.Error: an inherited file cannot be read.
    """

    def __init__(
        self,
        path: Path,
        server: str,
        max_bytes: int,
        faults: Faults,
        run: dict[str, Any] | None = None,
        inherited: bool = False,
    ) -> None:
        self.path = path
        self.inherited = inherited
        self.on_disk = True
        self.dropped = 0
        self._max_bytes = max_bytes
        self._faults = faults
        self._lock: TextIO | None = None
        self._database: sqlite3.Connection | None = None
        self.server = server
        self.run = run
        """The body that makes the run known to a server which has lost it; None for ranks that do not speak for it."""
        try:
            if not inherited:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(path)
            self._connect(str(path))
            self._prepare()
        except (OSError, sqlite3.Error) as error:
            if inherited:
                self._release()
                raise
            faults.record("spool", error)
            self._to_memory([])
        self._bytes = self._measure()

    @property
    def _db(self) -> sqlite3.Connection:
        if self._database is None:
            raise sqlite3.ProgrammingError(f"the spool {self.path} is closed")
        return self._database

    def _connect(self, place: str) -> None:
        self._database = sqlite3.connect(place, timeout=1, check_same_thread=False)

    def _prepare(self) -> None:
        # WAL without a flush a commit: what a killed process wrote is kept; only a power cut may lose the last writes.
        self._rows("pragma journal_mode=wal")
        self._rows("pragma synchronous=normal")
        self._db.executescript(_SCHEMA)
        owner = self._rows("select server, run from owner")
        if owner:
            self.server, self.run = str(owner[0][0]), json.loads(owner[0][1])
        else:
            self._db.execute("insert into owner values (?, ?)", (self.server, json.dumps(self.run)))
        self._db.commit()

    def _rows(self, statement: str, *values: object) -> list[Any]:
        """All rows of a statement. Read to the end, since a cursor that is not keeps its statement under way until it
        is freed, and ``gc.get_objects()`` on another thread (`layers.find_model`) puts that off beyond our commit."""
        return self._db.execute(statement, values).fetchall()

    def _measure(self) -> int:
        return int(self._rows("select coalesce(sum(length(body)), 0) from messages")[0][0])

    def _to_memory(self, messages: list[tuple[str, str]]) -> None:
        """Go on without the disk. The file stays as it is until the spool is closed: if this process is killed, the
        next one still delivers what is in it, and the server takes a repeat for what it is."""
        self.on_disk = False
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                self._database.close()
        self._connect(":memory:")
        self._prepare()
        with self._db:
            self._db.executemany("insert into messages (path, body) values (?, ?)", messages)
        self._bytes = self._measure()

    def append(self, path: str, body: dict[str, Any], vital: bool = False) -> bool:
        """Keep one message; False if it was dropped because the spool is full. A `vital` one has room in a full one.

        Raises:
            TypeError, ValueError: the body is no JSON.
        """
        text = json.dumps(body, allow_nan=False)
        if self._bytes + len(text) > self._max_bytes and not vital:
            self.dropped += 1
            return False
        try:
            with self._db:
                self._db.execute("insert into messages (path, body) values (?, ?)", (path, text))
            self._bytes += len(text)
        except sqlite3.Error as error:
            self._faults.record("spool", error)
            kept: list[tuple[str, str]] = []
            with contextlib.suppress(sqlite3.Error):
                kept = self._rows("select path, body from messages order by number")
            self._to_memory([*kept, (path, text)])
        return True

    def first(self, count: int) -> list[Message]:
        """The oldest messages, in order."""
        rows = self._rows("select number, path, body from messages order by number limit ?", count)
        return [Message(number, path, json.loads(body)) for number, path, body in rows]

    def acknowledge(self, messages: list[Message]) -> None:
        """Forget messages that the server has, or never will take."""
        try:
            with self._db:
                self._db.executemany("delete from messages where number = ?", [(m.number,) for m in messages])
        except sqlite3.Error as error:
            # A full disk can refuse a delete as well; the server takes a repeat for what it is.
            self._faults.record("spool", error)
            kept = self._rows("select number, path, body from messages order by number")
            done = {message.number for message in messages}
            self._to_memory([(path, body) for number, path, body in kept if number not in done])
        self._bytes = self._measure()

    def __len__(self) -> int:
        return int(self._rows("select count(*) from messages")[0][0])

    def close(self) -> int:
        """Close the file, and remove it when nothing is left; the number of messages left that are in memory only."""
        left = len(self)
        if self._database is not None:
            self._database.close()
        if not left and self._lock:
            for suffix in ("", "-wal", "-shm", ".lock"):
                with contextlib.suppress(OSError):  # a folder that has become read-only: the next run finds it empty
                    Path(f"{self.path}{suffix}").unlink(missing_ok=True)
        self._release()
        return 0 if self.on_disk else left

    def _release(self) -> None:
        if self._database is not None:
            self._database.close()
        if self._lock:
            self._lock.close()


def _lock(path: Path) -> TextIO:
    file = Path(f"{path}.lock").open("w")  # noqa: SIM115 - held open for as long as the spool is
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def orphans(directory: Path, server: str, max_bytes: int, faults: Faults) -> Iterator[Spool]:
    """Spools for `server` that dead processes left in `directory`, each opened; the caller closes them."""
    for path in sorted(directory.glob("*.sqlite3")):
        try:
            spool = Spool(path, server, max_bytes, faults, inherited=True)
        except OSError:
            continue  # its process lives, or another one inherits it
        except (sqlite3.Error, ValueError) as error:
            faults.record("spool", error)
            if not isinstance(error, sqlite3.OperationalError):
                # Torn beyond reading: set aside for a person, or every run from now on would trip over it.
                with contextlib.suppress(OSError):
                    path.replace(path.with_suffix(".broken"))
            continue
        if spool.server == server:
            yield spool
        else:
            spool.close()
