"""Who is late: the one judgement that makes a run lost, and that lets a beat bring it back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import exists, select, update
from sqlalchemy.orm import Session

from optwatch_server.database.models import RankRow, RunRow

OUTAGE_GRACE_SECONDS = 60.0
"""How long after the server's own absence an agent has, at least, to be heard again: its retries back off."""


@dataclass(frozen=True, slots=True)
class Promise:
    """Something that must be heard again before `due_at`; `rank` is None for a run that never beat. Unix seconds."""

    run_id: str
    rank: int | None
    step: int | None
    heard_at: float
    due_at: float
    interval_seconds: float
    promise_seconds: float | None = None
    promise_reason: str = ""

    def broken(self, now: float, watching_since: float) -> bool:
        """Return whether it was due by `now`, the time before `watching_since` not counted against it.

        While the server was away nobody could be heard: those heard last before that get the time to beat again.
        """
        if self.heard_at >= watching_since:
            return now >= self.due_at
        grace = max(2.5 * self.interval_seconds, OUTAGE_GRACE_SECONDS)
        return now >= max(self.due_at, watching_since + grace)

    def reason(self) -> str:
        """Return, for a person, which promise was broken."""
        if self.rank is None:
            return f"it never sent a heartbeat, though it promised one every {self.interval_seconds:g} s"
        at = "" if self.step is None else f" at step {self.step}"
        promised = f"a heartbeat every {self.interval_seconds:g} s"
        if self.promise_seconds is not None and self.promise_seconds > self.interval_seconds:
            why = f" ({self.promise_reason})" if self.promise_reason else ""
            promised = f"to be back within {self.promise_seconds:g} s{why}"
        return f"rank {self.rank} fell silent{at}, having promised {promised}"


def recover(session: Session, run_ids: Sequence[str], now: float) -> None:
    """Set lost runs back to running once no rank of theirs is overdue.

    A run whose rank 1 died stays lost while rank 0 beats on: otherwise it would flap, and page, at every beat.
    """
    if not run_ids:
        return
    overdue = exists().where(RankRow.run_id == RunRow.id, RankRow.due_at <= now)
    session.execute(
        update(RunRow)
        .where(RunRow.id.in_(run_ids), RunRow.status == "lost", ~overdue)
        .values(status="running", status_since=now, lost_reason="")
        .execution_options(synchronize_session=False)
    )


def promises(session: Session, now: float, run_ids: Iterable[str] | None = None) -> list[Promise]:
    """Return what running runs owed by `now`, oldest first within a run, for `Promise.broken` to judge."""
    # Only ranks and runs that are due are read: a healthy fleet costs an index lookup.
    ranks = (
        select(RankRow)
        .join(RunRow, RunRow.id == RankRow.run_id)
        .where(RunRow.status == "running", RankRow.due_at <= now)
        .order_by(RankRow.run_id, RankRow.received_at, RankRow.rank)
    )
    never_due = RunRow.created_at + 2.5 * RunRow.heartbeat_interval_seconds
    never_beat = select(RunRow).where(
        RunRow.status == "running", never_due <= now, ~exists().where(RankRow.run_id == RunRow.id)
    )
    if run_ids is not None:
        chosen = list(run_ids)
        ranks = ranks.where(RunRow.id.in_(chosen))
        never_beat = never_beat.where(RunRow.id.in_(chosen))
    found = [
        Promise(
            row.run_id,
            row.rank,
            row.step,
            row.received_at,
            row.due_at,
            row.interval_seconds,
            row.promise_seconds,
            row.promise_reason,
        )
        for row in session.scalars(ranks)
    ]
    for run in session.scalars(never_beat):
        interval = run.heartbeat_interval_seconds
        found.append(Promise(run.id, None, None, run.created_at, run.created_at + 2.5 * interval, interval))
    return found
