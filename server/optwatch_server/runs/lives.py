"""Lives of runs in whole seconds and cents, so that parts add up exactly however a span of time is cut."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session, load_only

from optwatch_server.database.models import RankRow, RunRow, TagRow

from . import accounting


@dataclass(frozen=True, slots=True)
class Use:
    """Time within the week of runs of one kind, in whole seconds, and its cost in cents of whatever unit rates have."""

    runs: int = 0
    run_seconds: int = 0
    device_seconds: int = 0
    cost_cents: int = 0
    unpriced_device_seconds: int = 0
    """Device time of runs without a rate, which is in no cost."""

    def __add__(self, other: Use) -> Use:
        return Use(
            self.runs + other.runs,
            self.run_seconds + other.run_seconds,
            self.device_seconds + other.device_seconds,
            self.cost_cents + other.cost_cents,
            self.unpriced_device_seconds + other.unpriced_device_seconds,
        )


@dataclass(frozen=True, slots=True)
class Life:
    """A run's life in whole Unix seconds: `counted_at` is when its end became known, None for one that goes on."""

    run: RunRow
    began: int
    ended: int | None
    counted_at: int | None
    rate: Decimal | None

    def outcome(self, until: int) -> str:
        """Return what was known of it at a moment: its status, or ``running``."""
        return self.run.status if self.counted_at is not None and self.counted_at < until else "running"

    def use(self, begin: int, end: int) -> Use:
        """Return what the run used within a span; spans that adjoin add up to their union, to the second and cent."""
        life_end = end if self.ended is None else min(end, self.ended)
        first, last = max(begin, self.began), max(life_end, self.began)
        if last <= first and not (begin <= self.began < end):
            return Use()
        seconds = max(0, last - first)
        devices = self.run.world_size or 1
        cents = self._cents(last) - self._cents(first) if seconds else 0
        return Use(1, seconds, seconds * devices, cents, 0 if self.rate is not None else seconds * devices)

    def _cents(self, at: int) -> int:
        """Return the cost from the run's begin to a moment: of whole seconds, rounded once, so that parts add up."""
        hours = Decimal((at - self.began) * (self.run.world_size or 1)) / 3600
        return int(((self.rate or Decimal(0)) * hours * 100).to_integral_value(ROUND_HALF_EVEN))

    def whole(self) -> Use:
        """Return what an ended run used from its begin to its end."""
        return self.use(self.began, max(self.began + 1, self.ended or 0))


def lives(session: Session, first: int, until: int, project: str | None, default_rate: float | None) -> list[Life]:
    """Return all runs that lived between two moments (Unix seconds), by id; `default_rate` is per device hour."""
    alive = or_(RunRow.status == "running", RunRow.status_since >= first)
    columns = (
        RunRow.id,
        RunRow.name,
        RunRow.project,
        RunRow.team,
        RunRow.started_at,
        RunRow.created_at,
        RunRow.world_size,
        RunRow.status,
        RunRow.status_since,
        RunRow.finished_at,
        RunRow.cause,
        RunRow.reason,
        RunRow.lost_reason,
    )
    statement = select(RunRow).options(load_only(*columns, raiseload=True)).where(RunRow.started_at < until, alive)
    if project is not None:
        statement = statement.where(RunRow.project == project)
    runs = session.scalars(statement.order_by(RunRow.id)).all()
    heard = select(RankRow.run_id, func.max(RankRow.received_at)).group_by(RankRow.run_id)
    lost = heard.join(RunRow, RunRow.id == RankRow.run_id).where(RunRow.status == "lost", RunRow.status_since >= first)
    heard_at = {row[0]: row[1] for row in session.execute(lost)}
    tags = select(TagRow).join(RunRow, RunRow.id == TagRow.run_id).where(TagRow.name == accounting.RATE_TAG, alive)
    rates = {tag.run_id: rate for tag in session.scalars(tags) if (rate := accounting.amount(tag.value)) is not None}
    return [_life(run, heard_at.get(run.id), rates.get(run.id, default_rate)) for run in runs]


def _life(run: RunRow, heard_at: float | None, rate: float | None) -> Life:
    began = max(run.started_at, run.created_at - accounting.OLDEST_START_SECONDS)
    priced = None if rate is None else Decimal(str(rate))
    if run.status == "running":
        return Life(run, math.floor(began), None, None, priced)
    # The same end as that of the totals which Prometheus scrapes.
    ended = math.floor(began + accounting.wall_seconds(run, heard_at, 0.0))
    return Life(run, math.floor(began), ended, math.floor(run.status_since) if run.status == "lost" else ended, priced)
