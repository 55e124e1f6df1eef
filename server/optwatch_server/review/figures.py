"""The weekly review: how many runs succeeded, what the rest cost and why, and how long pages took.

Everything is counted in whole seconds and cents, run by run, so that sums over projects, outcomes and weeks are exact.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from optwatch_server.database.models import AlertRow, EventRow, RunRow
from optwatch_server.paging.alerts import BEFORE_SECONDS, KINDS
from optwatch_server.paging.due import LOST
from optwatch_server.runs import accounting
from optwatch_server.runs.lives import Life, Use, lives

from .weeks import Week

OUTCOMES = ("succeeded", "failed", "lost", "cancelled", "running")
"""What became of a run until the end of the week; ``running`` is what had not ended by then."""
BAD = ("failed", "lost")
PERIOD_SECONDS = 30 * 86_400
PAGE_SECONDS = 45.0
"""The bound of the objective time-to-page."""
TREND_WEEKS = 4
SLOWEST = 5


@dataclass(frozen=True, slots=True)
class Ratio:
    """Good and bad events against an objective; a share is None where there were none."""

    good: int
    bad: int
    success_ratio: float | None
    budget_spent_ratio: float | None
    """Bad events per bad event allowed: 1 is the whole budget."""


@dataclass(frozen=True, slots=True)
class Project:
    """What one project was allocated: `total` is the sum over `by_outcome`, and `wasted` that over failed and lost."""

    project: str
    by_outcome: dict[str, Use]
    total: Use
    wasted: Use


@dataclass(frozen=True, slots=True)
class Cause:
    """Failures of one cause that ended in the week, and what their runs used: in the week, and in all."""

    cause: str
    failures: int
    in_week: Use
    in_all: Use


@dataclass(frozen=True, slots=True)
class Ended:
    """A run that ended in the week; its seconds are those of its whole life."""

    id: str
    name: str
    project: str
    team: str
    outcome: str
    cause: str
    reason: str
    ended_at: int
    run_seconds: int
    device_seconds: int


@dataclass(frozen=True, slots=True)
class Paging:
    """Critical alerts that Alertmanager first told in the week; seconds from their cause to that moment."""

    pages: int
    in_time: int
    p50_seconds: float | None
    p99_seconds: float | None
    by_alert: dict[str, int]


@dataclass(frozen=True, slots=True)
class Point:
    """One week of the trend."""

    week: str
    success: Ratio
    total: Use
    wasted: Use


@dataclass(frozen=True, slots=True)
class Review:
    """One week, as far as it had gone at `until` (Unix seconds)."""

    week: str
    begin: int
    until: int
    complete: bool
    project: str | None
    objective: float
    success: Ratio
    period: Ratio
    """The same over the 30 days up to `until`."""
    outcomes: dict[str, int]
    projects: list[Project]
    total: Use
    wasted: Use
    causes: list[Cause]
    failures: list[Ended]
    """The failed and the lost, the most device time first."""
    slowest: list[Ended]
    paging: Paging
    trend: list[Point]

    @property
    def empty(self) -> bool:
        """Whether no run ran in the week at all."""
        return self.total.runs == 0


def review(
    session: Session,
    week: Week,
    now: float,
    *,
    target: Decimal,
    default_rate: float | None = None,
    project: str | None = None,
) -> Review:
    """Return the review of a week as it is known at `now` (Unix seconds), of all projects or of one.

    `target` is the objective's share of ended runs that succeed, and `default_rate` the cost of a device hour for runs
    without a tag that says it. It only reads, and the same rows and arguments give the same review.
    """
    until = min(int(now), week.end)
    first = min(until - PERIOD_SECONDS, week.before(TREND_WEEKS - 1).begin)
    found = lives(session, first, until, project, default_rate)
    counted = [life for life in found if life.counted_at is not None and week.begin <= life.counted_at < until]
    bad = [life for life in counted if life.run.status in BAD]
    projects = _projects(found, week, until)
    return Review(
        week=str(week),
        begin=week.begin,
        until=until,
        complete=until == week.end,
        project=project,
        objective=float(target),
        success=_success(found, week.begin, until, target),
        period=_success(found, until - PERIOD_SECONDS, until, target),
        outcomes={outcome: sum(life.run.status == outcome for life in counted) for outcome in OUTCOMES[:-1]},
        projects=projects,
        total=_sum(part.total for part in projects),
        wasted=_sum(part.wasted for part in projects),
        causes=_causes(bad, week, until),
        failures=sorted(map(_ended, bad), key=lambda run: (-run.device_seconds, run.id)),
        slowest=sorted(map(_ended, counted), key=lambda run: (-run.run_seconds, run.id))[:SLOWEST],
        paging=_paging(session, week.begin, until, project),
        trend=[_point(found, week.before(back), until, target) for back in reversed(range(TREND_WEEKS))],
    )


def _ratio(good: int, bad: int, target: Decimal) -> Ratio:
    if not good + bad:
        return Ratio(0, 0, None, None)
    spent = Decimal(bad) / ((1 - target) * (good + bad))
    return Ratio(good, bad, round(good / (good + bad), 6), round(float(spent), 6))


def _success(lives: Iterable[Life], begin: int, until: int, target: Decimal) -> Ratio:
    counted = Counter(
        life.run.status for life in lives if life.counted_at is not None and begin <= life.counted_at < until
    )
    return _ratio(counted["succeeded"], sum(counted[status] for status in BAD), target)


def _sum(parts: Iterable[Use]) -> Use:
    return sum(parts, Use())


def _projects(lives: Iterable[Life], week: Week, until: int) -> list[Project]:
    by_project: dict[str, dict[str, Use]] = defaultdict(lambda: {outcome: Use() for outcome in OUTCOMES})
    for life in lives:
        use = life.use(week.begin, until)
        if use.runs:
            parts = by_project[life.run.project]
            parts[life.outcome(until)] += use
    return [
        Project(name, parts, _sum(parts.values()), _sum(parts[outcome] for outcome in BAD))
        for name, parts in sorted(by_project.items())
    ]


def _causes(bad: Sequence[Life], week: Week, until: int) -> list[Cause]:
    by_cause: dict[str, list[Life]] = defaultdict(list)
    for life in bad:
        by_cause[accounting.failure_label(life.run)].append(life)
    causes = [
        Cause(
            cause,
            len(lives),
            _sum(life.use(week.begin, until) for life in lives),
            _sum(life.whole() for life in lives),
        )
        for cause, lives in by_cause.items()
    ]
    return sorted(causes, key=lambda cause: (-cause.in_all.device_seconds, cause.cause))


def _ended(life: Life) -> Ended:
    run, whole = life.run, life.whole()
    is_bad = run.status in BAD
    return Ended(
        run.id,
        run.name,
        run.project,
        run.team,
        run.status,
        accounting.failure_label(run) if is_bad else "",
        (run.lost_reason if run.status == "lost" else run.reason) if is_bad else "",
        life.counted_at or 0,
        whole.run_seconds,
        whole.device_seconds,
    )


def _point(lives: Sequence[Life], week: Week, until: int, target: Decimal) -> Point:
    end = min(week.end, until)
    projects = _projects(lives, week, end)
    return Point(
        str(week),
        _success(lives, week.begin, end, target),
        _sum(part.total for part in projects),
        _sum(part.wasted for part in projects),
    )


def _paging(session: Session, begin: int, until: int, project: str | None) -> Paging:
    """Return what pages took: from the event they tell of, or from their own begin where that is not known."""
    statement = (
        select(AlertRow, RunRow.lost_at)
        .join(RunRow, RunRow.id == AlertRow.run_id)
        .where(AlertRow.severity == "critical", AlertRow.received_at >= begin, AlertRow.received_at < until)
        .order_by(AlertRow.starts_at, AlertRow.fingerprint)
    )
    if project is not None:
        statement = statement.where(RunRow.project == project)
    took: list[float] = []
    by_alert: Counter[str] = Counter()
    for alert, lost_at in session.execute(statement):
        caused = lost_at if alert.alertname == LOST else _caused_at(session, alert)
        # A run may have been lost once more since: then its first loss is not known any longer.
        if caused is None or not alert.starts_at - BEFORE_SECONDS <= caused <= alert.received_at:
            caused = alert.starts_at
        began = min(caused, alert.starts_at)
        took.append(max(0.0, alert.received_at - began))
        by_alert[alert.alertname] += 1
    took.sort()
    in_time = sum(seconds <= PAGE_SECONDS for seconds in took)
    return Paging(len(took), in_time, _quantile(took, 50), _quantile(took, 99), dict(sorted(by_alert.items())))


def _caused_at(session: Session, alert: AlertRow) -> float | None:
    """Return when the latest critical event of the alert's kind before it was told occurred, or None."""
    return session.scalars(
        select(func.max(EventRow.occurred_at)).where(
            EventRow.run_id == alert.run_id,
            EventRow.kind == KINDS.get(alert.alertname),
            EventRow.severity == "critical",
            EventRow.occurred_at <= alert.received_at,
        )
    ).one()


def _quantile(ordered: Sequence[float], percent: int) -> float | None:
    """Return the value that `percent` of all do not exceed, one of them, to the millisecond."""
    return round(ordered[-(-len(ordered) * percent // 100) - 1], 3) if ordered else None
