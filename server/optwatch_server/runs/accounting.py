"""Accounts of runs: what one cost, why it failed, and the running totals behind the fleet's counters.

The totals are rows, so that counters go on where they were after a restart, and a scrape reads a few rows a project
however long the history is. They are not added to by the requests that end runs but by the sweeper, from the difference
between a run's `status` and its `counted_status`, in one transaction: a run is counted exactly once whatever dies in
between, also one that a server of the version before ended, and requests never queue for a project's totals.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping

from sqlalchemy import select
from sqlalchemy.orm import Session

from optwatch_server.catalogue import CAUSES
from optwatch_server.database.models import EventRow, RankRow, RunRow, TagRow, TotalRow
from optwatch_server.database.upsert import insert_into

BATCH = 500
"""Runs counted in one transaction."""
OLDEST_START_SECONDS = 30 * 86_400.0
"""How long before it was made known a run may have started: one wrong clock must not spoil a total for good."""
RATE_TAG = "cost_per_device_hour"
BUDGET_TAG = "cost_budget"

RUNS_ENDED = "optwatch_fleet_runs_ended_total"
RECOVERED = "optwatch_fleet_runs_recovered_total"
FAILURES = "optwatch_fleet_failures_total"
RUN_SECONDS = "optwatch_fleet_run_seconds_total"
DEVICE_SECONDS = "optwatch_fleet_device_seconds_total"
COST = "optwatch_fleet_cost_total"
SENDS = "optwatch_server_alertmanager_sends_total"
TIME_TO_PAGE = "optwatch_fleet_time_to_page_seconds"

Totals = Mapping[tuple[str, str, str], float]
"""Amounts by metric name, project and label."""


def add(session: Session, amounts: Totals) -> None:
    """Add to the totals; those that do not exist are made."""
    # In one order for everyone, so that two transactions wait for each other and never deadlock.
    for (name, project, label), amount in sorted(amounts.items()):
        insert = insert_into(session, TotalRow)
        session.execute(
            insert.on_conflict_do_update(
                index_elements=["name", "project", "label"], set_={"value": TotalRow.value + insert.excluded.value}
            ),
            {"name": name, "project": project, "label": label, "value": amount},
        )


def know_project(session: Session, project: str) -> None:
    """Make a project known to the totals, so that its counters are exported as 0 before its first run ends."""
    insert = insert_into(session, TotalRow).on_conflict_do_nothing()
    session.execute(insert, {"name": RECOVERED, "project": project, "label": "", "value": 0.0})


def cause_of(session: Session, run_id: str) -> str:
    """Return why a run failed: the kind of its latest critical event that tells a cause, or ``unknown``."""
    statement = (
        select(EventRow.kind)
        .where(EventRow.run_id == run_id, EventRow.severity == "critical", EventRow.kind.in_(CAUSES))
        .order_by(EventRow.occurred_at.desc(), EventRow.received_at.desc(), EventRow.sequence.desc())
        .limit(1)
    )
    return session.scalars(statement).first() or "unknown"


def amount(text: str | None) -> float | None:
    """Return what a tag says as a number that is finite and not negative, or None."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


def wall_seconds(run: RunRow, heard_at: float | None, now: float) -> float:
    """Return how long a run has run: to now, to its end, or for a lost one to when it was last heard.

    Times of the agent are taken within what the server knows, as clocks of a cluster differ.
    """
    began = max(run.started_at, run.created_at - OLDEST_START_SECONDS)
    if run.status == "running":
        ended = now
    elif run.status == "lost":
        ended = run.created_at if heard_at is None else heard_at
    else:
        ended = run.status_since if run.finished_at is None else min(run.finished_at, run.status_since)
    return max(0.0, ended - began)


def cost(run: RunRow, wall: float, rate: float) -> float:
    """Return the cost of `wall` seconds on all devices of a run at `rate` per device hour."""
    return wall * (run.world_size or 1) / 3600 * rate


def count(session: Session, now: float, default_rate: float | None) -> int:
    """Bring the totals up to date with what became of runs; return how many were counted, at most `BATCH`.

    A lost run that comes back stays counted as lost and counts as recovered, whether it beats or ends. Its time up to
    the last beat is under ``lost`` and the rest under its end, so that the sum over statuses is what was allocated.
    `default_rate` is the cost of a device hour for runs without the tag.
    """
    # Another replica may be counting: whatever it holds is skipped, and found counted the next time.
    statement = select(RunRow).where(RunRow.status != RunRow.counted_status).order_by(RunRow.id).limit(BATCH)
    changed = session.scalars(statement.with_for_update(skip_locked=True, key_share=True)).all()
    ids = [run.id for run in changed]
    heard = heard_at(session, ids)
    rates = rate_tags(session, ids)
    amounts: dict[tuple[str, str, str], float] = defaultdict(float)
    for run in changed:
        if run.status == "failed" and not run.cause:
            run.cause = cause_of(session, run.id)
        if run.counted_status == "lost":
            amounts[RECOVERED, run.project, ""] += 1
        if run.status != "running":
            wall = wall_seconds(run, heard.get(run.id), now)
            seconds = max(0.0, wall - run.counted_seconds)
            run.counted_seconds += seconds
            rate = rates.get((run.id, RATE_TAG), default_rate)
            amounts[RUNS_ENDED, run.project, run.status] += 1
            amounts[RUN_SECONDS, run.project, run.status] += seconds
            amounts[DEVICE_SECONDS, run.project, run.status] += seconds * (run.world_size or 1)
            amounts[COST, run.project, run.status] += cost(run, seconds, rate or 0.0)
        if run.status in ("failed", "lost"):
            amounts[FAILURES, run.project, failure_label(run)] += 1
        run.counted_status = run.status
    session.flush()
    for project in sorted({run.project for run in changed}):
        know_project(session, project)
    add(session, amounts)
    return len(changed)


def is_uncounted(session: Session) -> bool:
    """Return whether `count` has something to do: one look at an index that holds nothing else."""
    return session.scalars(select(RunRow.id).where(RunRow.status != RunRow.counted_status).limit(1)).first() is not None


def failure_label(run: RunRow) -> str:
    """Return the label `cause` of a failed or lost run, out of a closed set."""
    if run.status == "lost":
        return "lost"
    return run.cause if run.cause in CAUSES else "unknown"


def heard_at(session: Session, run_ids: Collection[str]) -> dict[str, float]:
    """Return when any rank of each run was last heard, by run id; runs that never beat are left out."""
    found: dict[str, float] = {}
    statement = select(RankRow.run_id, RankRow.received_at).where(RankRow.run_id.in_(run_ids))
    for run_id, received_at in session.execute(statement):
        found[run_id] = max(found.get(run_id, received_at), received_at)
    return found


def rate_tags(session: Session, run_ids: Collection[str]) -> dict[tuple[str, str], float]:
    """Return what the tags about cost say, by run id and tag; a tag that is no amount is as good as none."""
    statement = select(TagRow).where(TagRow.run_id.in_(run_ids), TagRow.name.in_((RATE_TAG, BUDGET_TAG)))
    tags = {(tag.run_id, tag.name): amount(tag.value) for tag in session.scalars(statement)}
    return {key: value for key, value in tags.items() if value is not None}
