"""Heartbeats: the latest beat of every rank, and the promise of the next one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from optwatch_server import wire
from optwatch_server.database.models import RankRow, RunRow
from optwatch_server.database.upsert import insert_into, replace

from .recovery import recover

GRACE_INTERVALS = 1.5
"""How much longer than promised a rank may be silent, in heartbeat intervals: at 10 s, a run is lost after 25 s."""

_COLUMNS = (
    "step",
    "sent_at",
    "received_at",
    "interval_seconds",
    "promise_seconds",
    "promise_reason",
    "due_at",
    "metrics_target",
    "latest",
)


def due_at(received_at: float, interval_seconds: float, promise_seconds: float | None = None) -> float:
    """Return the Unix time from which on a promise counts as broken, grace included."""
    return received_at + max(interval_seconds, promise_seconds or 0.0) + GRACE_INTERVALS * interval_seconds


def receive(session: Session, beats: Sequence[wire.Beat], now: float) -> wire.HeartbeatsAccepted:
    """Keep the last beat of each rank and wake lost runs; beats of unknown runs are named, not kept.

    Time counts from the receipt by the server's clock, never from `sent_at`: clocks of a cluster differ.
    """
    # Locked, and in one order for everyone: the sweeper must not call a run lost on what it read before these beats.
    statement = (
        select(RunRow.id, RunRow.status, RunRow.heartbeat_interval_seconds)
        .where(RunRow.id.in_({beat.run_id for beat in beats}))
        .order_by(RunRow.id)
        .with_for_update(key_share=True)
    )
    runs = {row.id: row for row in session.execute(statement)}
    latest: dict[tuple[str, int], dict[str, object]] = {}
    for beat in beats:
        if (run := runs.get(beat.run_id)) is None:
            continue
        interval = beat.interval_seconds or run.heartbeat_interval_seconds
        latest[beat.run_id, beat.rank] = {
            "run_id": beat.run_id,
            "rank": beat.rank,
            "step": beat.step,
            "sent_at": beat.sent_at,
            "received_at": now,
            "interval_seconds": interval,
            "promise_seconds": beat.promise_seconds,
            "promise_reason": beat.promise_reason or "",
            "due_at": due_at(now, interval, beat.promise_seconds),
            "metrics_target": beat.metrics_target,
            "latest": beat.values,
        }
    if latest:
        rows = [latest[key] for key in sorted(latest)]
        session.execute(replace(insert_into(session, RankRow), ("run_id", "rank"), _COLUMNS), rows)
        recover(session, [run.id for run in runs.values() if run.status == "lost"], now)
    return wire.HeartbeatsAccepted(
        accepted=sum(beat.run_id in runs for beat in beats),
        unknown_runs=unknown(beats, runs),
    )


def unknown(messages: Iterable[wire.Beat | wire.Event], known: Iterable[str]) -> list[str]:
    """Return the ids of runs that messages are about and nobody created, each once, in order."""
    return sorted({message.run_id for message in messages} - set(known))


def of_run(session: Session, run_id: str) -> Sequence[RankRow]:
    """Return the latest beat of each rank of a run, by rank."""
    return session.scalars(select(RankRow).where(RankRow.run_id == run_id).order_by(RankRow.rank)).all()
