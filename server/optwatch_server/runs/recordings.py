"""Recordings: the black boxes that agents upload; a row for each in the database, and its numbers in the store."""

from __future__ import annotations

import base64
import binascii
import gzip
import json
import struct
import zlib
from collections.abc import Sequence
from uuid import UUID

from pydantic import BaseModel
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from optwatch_server import wire
from optwatch_server.database.engine import Database
from optwatch_server.database.models import RecordingRow, RunRow
from optwatch_server.database.upsert import insert_into
from optwatch_server.web.problems import Problem

from . import registry as runs
from .store import Store, StoreError

MAX_RANKS = 16
"""Ranks of a run of which recordings are kept: those that came first. When one rank breaks, often all do."""
KEPT_OF_RANK = 4
"""Recordings of one rank that are kept: the newest."""
MAX_NUMBERS = 4 * 2**20
"""Numbers in the series of one recording, whatever their bytes are compressed to."""
ABSENT = -float("inf")
_SIZES = {"float32": 4, "bfloat16": 2}


class RecordingResource(BaseModel):
    """A recording as it is listed. `received_at` is by the server's clock, `size` in bytes as it is stored."""

    id: str
    run_id: str
    rank: int
    reason: str
    step: int | None
    layer: str
    first_step: int | None
    last_step: int | None
    recorded_at: float
    received_at: float
    size: int

    @classmethod
    def of(cls, row: RecordingRow) -> RecordingResource:
        """Return the resource of a stored recording."""
        return cls(**{name: getattr(row, name) for name in cls.model_fields})


class RecordingList(BaseModel):
    """The recordings of a run, newest first."""

    recordings: list[RecordingResource]


def decode(series: wire.Series, rows: int) -> list[list[float | None]]:
    """Return the numbers of a series, one list of `rows` for each member; None where there was none.

    Raises:
        ValueError: the data is not what the series says.
    """
    size = _SIZES[series.type]
    expected = rows * size * len(series.members)
    try:
        unpacker = zlib.decompressobj()
        planes = unpacker.decompress(base64.b64decode(series.data, validate=True), expected + 1)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"the data of {series.name} cannot be read: {error}") from None
    if len(planes) != expected or not unpacker.eof:
        raise ValueError(
            f"the data of {series.name} is not {expected} bytes long: send {size} for each of {len(series.members)} "
            f"members and {rows} rows"
        )
    return [_numbers(planes[at : at + rows * size], rows, size) for at in range(0, expected, max(1, rows * size))]


def _numbers(planes: bytes, rows: int, size: int) -> list[float | None]:
    values = bytearray(4 * rows)  # bfloat16 is the upper half of a float32
    for byte in range(size):
        values[4 - size + byte :: 4] = planes[byte * rows : (byte + 1) * rows]
    return [None if value == ABSENT else value for value in struct.unpack(f"<{rows}f", values)]


def check(recording: wire.Recording) -> None:
    """Look at whether a recording holds what it says.

    Raises:
        Problem: 422, it does not; the text names the table, the column and the fix.
    """
    if sum(table.rows * len(series.members) for table in recording.tables for series in table.series) > MAX_NUMBERS:
        raise Problem(422, f"the recording has more than {MAX_NUMBERS} numbers in its series: leave some out")
    for table in recording.tables:
        where = f"table {table.name} of {table.optimizer or 'the optimizer'}"
        for name, column in table.columns.items():
            if len(column) != table.rows:
                raise Problem(422, f"{where}: column {name} has {len(column)} values: send {table.rows}, one a row")
        if not all(isinstance(step, float) and 0 <= step < 2**63 for step in table.columns.get("step", [None])):
            raise Problem(422, f"{where}: the column step is missing or holds what is no step: send 0 or more")
        for series in table.series:
            try:
                decode(series, table.rows)
            except ValueError as error:
                raise Problem(422, f"{where}: {error}") from None


def receive(database: Database, store: Store, run_id: str, recording: wire.Recording, now: float) -> tuple[bool, bool]:
    """Keep a recording; return whether it is new and whether it is kept.

    It is in the store before the database says so: what is acknowledged can be read.

    Raises:
        Problem: 404, the run is not known; 422, see `check`; 503, the store does not take it.
    """
    check(recording)
    key = str(recording.id)
    with database.read() as session:
        runs.get(session, run_id)
        if session.get(RecordingRow, key) is not None:
            return False, True
        if not _has_room(session, run_id, recording.rank):
            return False, False
    path = f"{run_id}/{key}.json.gz"
    data = gzip.compress(recording.model_dump_json(by_alias=True).encode(), mtime=0)
    try:
        store.put(path, data)
    except StoreError as error:
        raise Problem(503, f"{error}: nothing was kept, send it again later") from error
    tables = [table for table in recording.tables if table.name == "steps"]
    steps = [int(step) for table in tables for step in table.columns["step"] if isinstance(step, float)]
    row = {
        "id": key,
        "run_id": run_id,
        "rank": recording.rank,
        "reason": recording.reason,
        "step": recording.step,
        "layer": recording.layer or "",
        "first_step": min(steps, default=None),
        "last_step": max(steps, default=None),
        "recorded_at": recording.recorded_at,
        "received_at": now,
        "size": len(data),
        "path": path,
    }
    with database.write() as session:
        session.execute(select(RunRow.id).where(RunRow.id == run_id).with_for_update())  # one at a time for a run
        kept = _has_room(session, run_id, recording.rank)
        gone = [path]
        if kept:
            session.execute(insert_into(session, RecordingRow).on_conflict_do_nothing(index_elements=["id"]), row)
            gone = _forget_old(session, run_id, recording.rank)
    for old in gone:
        try:
            store.delete(old)
        except StoreError:  # a file that nothing names any more costs its room and nothing else
            continue
    return kept, kept


def _has_room(session: Session, run_id: str, rank: int) -> bool:
    ranks = set(session.scalars(select(RecordingRow.rank).where(RecordingRow.run_id == run_id).distinct()))
    return rank in ranks or len(ranks) < MAX_RANKS


def _forget_old(session: Session, run_id: str, rank: int) -> list[str]:
    """Delete all but the newest rows of a rank; return their paths."""
    of_rank = (RecordingRow.run_id == run_id, RecordingRow.rank == rank)
    newest = (RecordingRow.received_at.desc(), RecordingRow.recorded_at.desc(), RecordingRow.id.desc())
    rows = session.scalars(select(RecordingRow).where(*of_rank).order_by(*newest)).all()[KEPT_OF_RANK:]
    session.execute(delete(RecordingRow).where(RecordingRow.id.in_([row.id for row in rows])))
    return [row.path for row in rows]


def of_run(session: Session, run_id: str) -> Sequence[RecordingRow]:
    """Return the recordings of a run, newest first."""
    order = (RecordingRow.received_at.desc(), RecordingRow.recorded_at.desc(), RecordingRow.id.desc())
    return session.scalars(select(RecordingRow).where(RecordingRow.run_id == run_id).order_by(*order)).all()


def find(session: Session, run_id: str, recording_id: UUID) -> RecordingRow:
    """Return one recording of a run.

    Raises:
        Problem: 404, the run has none with this id.
    """
    row = session.get(RecordingRow, str(recording_id))
    if row is None or row.run_id != run_id:
        raise Problem(404, f"run {run_id!r} has no recording {recording_id}: GET /api/v1/runs/{run_id}/recordings")
    return row


def load(store: Store, path: str) -> wire.Recording:
    """Return a recording from the store.

    Raises:
        StoreError: it cannot be had from there, or is damaged.
    """
    data = store.get(path)
    try:
        return wire.Recording.model_validate_json(gzip.decompress(data))
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise StoreError(f"the recording {path} in the store {store.shown} is damaged: {error}") from error


def document(store: Store, path: str) -> bytes:
    """Return a recording as its agent sent it, as JSON.

    Raises:
        Problem: 503, it cannot be had from the store.
    """
    try:
        return json.dumps(load(store, path).model_dump(mode="json", by_alias=True), allow_nan=False).encode()
    except StoreError as error:
        raise Problem(503, f"{error}: try again later") from error
