"""What the top of a run's page says to someone woken at three: what broke, where, since when, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optwatch_server.database.models import EventRow, RankRow, RunRow

from .numbers import shown


@dataclass(frozen=True, slots=True)
class Incident:
    """One thing that is wrong with a run. `since` is Unix seconds, and `since_what` says what happened then."""

    title: str
    what: str
    where: str
    since: float
    since_what: str
    step: int | None
    step_what: str
    likely: str
    runbook: str


def incidents(run: RunRow, ranks: Sequence[RankRow], critical: Sequence[EventRow], now: float) -> list[Incident]:
    """Return what is wrong with a run, the worst first; nothing for one that is well.

    `critical` are its critical events, newest first.
    """
    found = []
    if run.status == "lost":
        found.append(_lost(run, ranks, now))
    if run.status == "failed":
        found.append(_failed(run, ranks, critical))
    if critical:  # also of a run that succeeded: it may have trained on NaN to its end
        found.append(_event(run, ranks, critical[0]))
    return found


def last_step(run: RunRow, ranks: Sequence[RankRow]) -> int | None:
    """Return the step a run ended at, or the highest that a rank reported."""
    if run.final_step is not None:
        return run.final_step
    return max((rank.step for rank in ranks if rank.step is not None), default=None)


def _place(run: RunRow, ranks: Sequence[RankRow], rank: int) -> str:
    """Return the host of a rank, as far as it is known: the run's own host is only that of the process that made it."""
    target = next((row.metrics_target for row in ranks if row.rank == rank), None)
    if len(ranks) > 1 or (run.world_size or 1) > 1:
        return target.rpartition(":")[0] if target else ""
    process = "" if run.pid is None else f" (pid {run.pid})"
    return f"{run.host}{process}" if run.host else ""


def _lost(run: RunRow, ranks: Sequence[RankRow], now: float) -> Incident:
    silent = [rank for rank in ranks if rank.due_at <= now]
    first = min(silent, key=lambda rank: rank.received_at, default=None)
    step = last_step(run, ranks) if first is None or first.step is None else first.step
    listed = ", ".join(str(rank.rank) for rank in silent[:8]) + (" and others" if len(silent) > 8 else "")
    where = f"rank{'s' if len(silent) > 1 else ''} {listed} of {len(ranks)}" if silent else "every rank"
    return Incident(
        title="Lost: no heartbeat",
        what=run.lost_reason,
        where=" on ".join(part for part in (where, _place(run, ranks, first.rank if first else 0)) if part),
        since=run.created_at if first is None else first.received_at,
        since_what="created, never heard" if first is None else "last heartbeat",
        step=step,
        step_what="Last step",
        likely="The process was killed or hangs, its node is gone, or the network to this server is cut.",
        runbook="TrainingRunLost",
    )


def _failed(run: RunRow, ranks: Sequence[RankRow], critical: Sequence[EventRow]) -> Incident:
    cause = critical[0] if critical else None
    return Incident(
        title="Failed",
        what=run.reason or "The training process ended with a failure and gave no reason.",
        where=_place(run, ranks, cause.rank if cause else 0),
        since=run.status_since if run.finished_at is None else run.finished_at,
        since_what="ended",
        step=last_step(run, ranks),
        step_what="Last step",
        likely=f"{cause.summary} (step {cause.step})" if cause else "",
        runbook=cause.runbook if cause and cause.runbook else "TrainingCrashed",
    )


def _event(run: RunRow, ranks: Sequence[RankRow], event: EventRow) -> Incident:
    details = [f"{name} {shown(event.details[name])}" for name in ("layer", "parameter") if event.details.get(name)]
    return Incident(
        title=f"Critical event: {event.kind.replace('_', ' ')}",
        what=event.summary,
        where=", ".join(part for part in (*details, f"rank {event.rank}", _place(run, ranks, event.rank)) if part),
        since=event.occurred_at,
        since_what="seen",
        step=event.step,
        step_what="Step",
        likely=event.likely,
        runbook=event.runbook,
    )
