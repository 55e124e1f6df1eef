"""Runs: create, get, list and finish. Creating and finishing can be repeated without changing anything."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from sqlalchemy import and_, exists, or_, select, update
from sqlalchemy.orm import Session

from optwatch_server import wire
from optwatch_server.database.models import RunRow, TagRow
from optwatch_server.database.upsert import insert_into
from optwatch_server.web.numbers import clean_text
from optwatch_server.web.problems import Problem, unknown_run

from . import accounting

LIVE = ("running", "lost")
"""The statuses of a run that has not ended."""


def create(session: Session, run: wire.Run, now: float) -> bool:
    """Store a run that is not known yet; return False, and change nothing, where its id is known."""
    insert = insert_into(session, RunRow).on_conflict_do_nothing(index_elements=["id"]).returning(RunRow.id)
    new = session.execute(
        insert,
        {
            "id": run.id,
            "name": run.name or run.id,
            "project": run.project or "",
            "team": run.team or "",
            "started_at": now if run.started_at is None else run.started_at,
            "created_at": now,
            "optimizer": run.optimizer or "",
            "hyperparameters": run.hyperparameters,
            "device": run.device or "",
            "world_size": run.world_size,
            "seed": None if run.seed is None else str(run.seed),
            "resumed_from": run.resumed_from,
            "target": None if run.target is None else run.target.model_dump(),
            "versions": {name: version for name, version in run.versions.items() if version is not None},
            "code_version": run.code_version or "",
            "host": run.host or "",
            "pid": run.pid,
            "heartbeat_interval_seconds": run.heartbeat_interval_seconds,
            "status": "running",
            "status_since": now,
            "lost_reason": "",
            "reason": "",
        },
    ).scalars()
    if new.first() is None:
        return False
    accounting.know_project(session, run.project or "")
    if run.tags:
        rows = [{"run_id": run.id, "name": name, "value": value} for name, value in run.tags.items()]
        session.execute(insert_into(session, TagRow).on_conflict_do_nothing(), rows)
    return True


def get(session: Session, run_id: str) -> RunRow:
    """Return a run.

    Raises:
        Problem: 404, it is not known.
    """
    run = session.get(RunRow, run_id)
    if run is None:
        raise unknown_run(run_id)
    return run


def tags(session: Session, run_ids: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the tags of each of the runs, by run id; a run without tags has an empty dict."""
    found: dict[str, dict[str, str]] = {run_id: {} for run_id in run_ids}
    statement = select(TagRow).where(TagRow.run_id.in_(run_ids)).order_by(TagRow.run_id, TagRow.name)
    for tag in session.scalars(statement):
        found[tag.run_id][tag.name] = tag.value
    return found


def known(session: Session, run_ids: Sequence[str]) -> set[str]:
    """Return those of `run_ids` that are known."""
    return set(session.scalars(select(RunRow.id).where(RunRow.id.in_(run_ids))))


def finish(session: Session, run_id: str, finish: wire.Finish, now: float) -> None:
    """End a run. The first end counts: a repeat, or another end after it, changes nothing.

    Raises:
        Problem: 404, the run is not known.
    """
    session.execute(
        update(RunRow)
        .where(RunRow.id == run_id, RunRow.status.in_(LIVE))
        .values(
            status=finish.status,
            status_since=now,
            finished_at=now if finish.finished_at is None else finish.finished_at,
            reason=finish.reason or "",
            final_step=finish.final_step,
            cause=(finish.cause or accounting.cause_of(session, run_id)) if finish.status == "failed" else "",
        )
    )
    get(session, run_id)


@dataclass(frozen=True, slots=True)
class Filters:
    """What a list of runs is narrowed to; None is no filter. A tag is ``name`` or ``name=value``, and all must fit."""

    project: str | None = None
    team: str | None = None
    status: wire.Status | None = None
    tags: Sequence[str] = field(default_factory=tuple)


def newest(
    session: Session, filters: Filters, limit: int, after: str | None = None
) -> tuple[Sequence[RunRow], str | None]:
    """Return up to `limit` runs, newest first, and the cursor of the next page or None at the end.

    The cursor is a key and not a count, so that a page costs the same at any depth and no run is shown twice.

    Raises:
        Problem: 422, `after` is no cursor that this server gave.
    """
    statement = select(RunRow).order_by(RunRow.created_at.desc(), RunRow.id.desc()).limit(limit + 1)
    if filters.project is not None:
        statement = statement.where(RunRow.project == filters.project)
    if filters.team is not None:
        statement = statement.where(RunRow.team == filters.team)
    if filters.status is not None:
        statement = statement.where(RunRow.status == filters.status)
    for tag in filters.tags:
        name, separator, value = tag.partition("=")
        fits = and_(TagRow.run_id == RunRow.id, TagRow.name == name)
        statement = statement.where(exists().where(and_(fits, TagRow.value == value) if separator else fits))
    if after is not None:
        at, run_id = decode_cursor(after, 2)
        statement = statement.where(
            or_(RunRow.created_at < at, and_(RunRow.created_at == at, RunRow.id < run_id)), RunRow.created_at <= at
        )
    rows = session.scalars(statement).all()
    if len(rows) <= limit:
        return rows, None
    last = rows[limit - 1]
    return rows[:limit], encode_cursor(last.created_at, last.id)


def encode_cursor(*key: float | str) -> str:
    """Return a key as opaque text that fits into a URL."""
    return base64.urlsafe_b64encode(json.dumps(key).encode()).decode().rstrip("=")


def decode_cursor(text: str, length: int) -> list[float | str]:
    """Return the key of `length` parts that `encode_cursor` made text of: a number first, then numbers and an id.

    Raises:
        Problem: 422, this server made no such text.
    """
    try:
        key = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (binascii.Error, ValueError):
        key = None
    fits = (
        isinstance(key, list)
        and len(key) == length
        and all(isinstance(part, (int, float)) and -(2**63) <= part < 2**63 for part in key[:-1])
        and isinstance(key[-1], str)
        and key[-1] == clean_text(key[-1])
    )
    if not fits:
        raise Problem(422, f"after is {text[:80]!r}, which is no cursor of this server: take `next` of the page before")
    return list(key)
