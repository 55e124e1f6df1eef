"""Prometheus http_sd: where the agents of live runs can be scraped."""

from __future__ import annotations

from pydantic import BaseModel
from sqlalchemy import and_, or_, select
from sqlalchemy.orm import Session

from optwatch_server.database.models import RankRow, RunRow

LOST_SECONDS = 3600.0
"""How long a lost run stays a target: its agent may still live behind a broken network, and `up` 0 is evidence."""


class TargetGroup(BaseModel):
    """One entry of the list, as Prometheus reads it."""

    targets: list[str]
    labels: dict[str, str]


def targets(session: Session, now: float) -> list[TargetGroup]:
    """Return one entry for each address of a live run, always the full list, by run and rank."""
    recently_lost = and_(RunRow.status == "lost", RunRow.lost_at > now - LOST_SECONDS)
    statement = (
        select(RankRow.metrics_target, RankRow.rank, RunRow.id, RunRow.project, RunRow.team)
        .join(RunRow, RunRow.id == RankRow.run_id)
        .where(RankRow.metrics_target.is_not(None), or_(RunRow.status == "running", recently_lost))
        .order_by(RankRow.received_at, RankRow.run_id, RankRow.rank)
    )
    # A run that died leaves its port to the next one on that host: the latest to beat from an address owns it.
    owners = {row.metrics_target: row for row in session.execute(statement)}
    return [
        TargetGroup(targets=[target], labels={"project": row.project, "team": row.team, "run_id": row.id})
        for target, row in sorted(owners.items(), key=lambda item: (item[1].id, item[1].rank))
    ]
