"""Events: kept once each, whatever is repeated, and listed in the order in which they occurred."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, select, tuple_
from sqlalchemy.orm import Session

from optwatch_server import wire
from optwatch_server.database.models import EventRow
from optwatch_server.database.upsert import insert_into
from optwatch_server.paging import due as paging

from . import registry as runs
from .heartbeats import unknown

_ORDER = (EventRow.occurred_at, EventRow.rank, EventRow.sequence, EventRow.id)


def receive(session: Session, events: Sequence[wire.Event], now: float, *, page: bool = False) -> wire.EventsAccepted:
    """Keep the events that are new; count repeats, and name unknown runs, whose events are not kept.

    With `page`, the pages of new critical events are asked for in the same transaction.
    """
    known = runs.known(session, sorted({event.run_id for event in events}))
    rows = {
        str(event.id): {
            "id": str(event.id),
            "run_id": event.run_id,
            "rank": event.rank,
            "sequence": event.sequence,
            "kind": event.kind,
            "severity": event.severity,
            "step": event.step,
            "occurred_at": event.occurred_at,
            "received_at": now,
            "summary": event.summary,
            "likely": event.likely or "",
            "runbook": event.runbook or "",
            "details": event.details,
        }
        for event in events
        if event.run_id in known
    }
    new: set[str] = set()
    if rows:
        insert = insert_into(session, EventRow).on_conflict_do_nothing(index_elements=["id"]).returning(EventRow.id)
        # In one order for everyone, so that two retries of a batch wait for each other and never deadlock.
        new = set(session.execute(insert, [rows[key] for key in sorted(rows)]).scalars())
    if page and new:
        paging.ask_for_events(session, [event for event in events if str(event.id) in new], now)
    return wire.EventsAccepted(
        accepted=len(new),
        duplicates=sum(event.run_id in known for event in events) - len(new),
        unknown_runs=unknown(events, known),
    )


def of_run(
    session: Session, run_id: str, limit: int, after: str | None = None
) -> tuple[Sequence[EventRow], str | None]:
    """Return up to `limit` events of a run, oldest first, and the cursor of the next page or None at the end.

    Raises:
        Problem: 422, `after` is no cursor that this server gave.
    """
    statement = select(EventRow).where(EventRow.run_id == run_id).order_by(*_ORDER).limit(limit + 1)
    if after is not None:
        statement = statement.where(tuple_(*_ORDER) > tuple_(*runs.decode_cursor(after, len(_ORDER))))
    rows = session.scalars(statement).all()
    if len(rows) <= limit:
        return rows, None
    last = rows[limit - 1]
    return rows[:limit], runs.encode_cursor(last.occurred_at, last.rank, last.sequence, last.id)


def newest_of_run(session: Session, run_id: str, limit: int, severity: str | None = None) -> Sequence[EventRow]:
    """Return up to `limit` events of a run, newest first, all or of one severity."""
    statement = select(EventRow).where(EventRow.run_id == run_id)
    if severity is not None:
        statement = statement.where(EventRow.severity == severity)
    return session.scalars(statement.order_by(*(column.desc() for column in _ORDER)).limit(limit)).all()


def counts(session: Session, run_ids: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return how many events each of the runs has, by run id and severity; what does not occur is left out."""
    statement = (
        select(EventRow.run_id, EventRow.severity, func.count())
        .where(EventRow.run_id.in_(run_ids))
        .group_by(EventRow.run_id, EventRow.severity)
    )
    found: dict[str, dict[str, int]] = {}
    for run_id, severity, count in session.execute(statement):
        found.setdefault(run_id, {})[severity] = count
    return found
