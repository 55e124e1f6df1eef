"""The fleet's metrics, read from the database at a scrape: runs alive or ended within a day, and the totals."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Callable, Iterable

from prometheus_client.metrics_core import Metric as Family
from sqlalchemy import Row, case, func, or_, select
from sqlalchemy.orm import Session, load_only

from optwatch_server.catalogue import BY_NAME, PAGE_BUCKETS, PATHS, SENDS, STATUSES
from optwatch_server.database.engine import Database
from optwatch_server.database.models import EventRow, RankRow, RunRow, TagRow, TotalRow
from optwatch_server.runs import accounting

from .families import counter, cumulative, gauge, histogram

RECENT_SECONDS = 24 * 3600.0
"""How long a lost or ended run has series; after that it is history, and the run page tells it."""
MAX_KINDS = 32
"""Kinds of events of one run that are exported, the latest ones: kinds are what agents call them."""

_RUN_COLUMNS = (
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
)
_RUN_GAUGES = (
    "optwatch_fleet_run_status",
    "optwatch_fleet_run_lost",
    "optwatch_fleet_run_failed",
    "optwatch_fleet_run_event_timestamp_seconds",
    "optwatch_fleet_run_started_timestamp_seconds",
    "optwatch_fleet_run_ended_timestamp_seconds",
    "optwatch_fleet_run_last_heartbeat_timestamp_seconds",
    "optwatch_fleet_run_last_step",
    "optwatch_fleet_run_promised_until_timestamp_seconds",
    "optwatch_fleet_run_cost",
    "optwatch_fleet_run_cost_budget",
)
_PROJECT_TOTALS = (
    accounting.RUNS_ENDED,
    accounting.RECOVERED,
    accounting.FAILURES,
    accounting.RUN_SECONDS,
    accounting.DEVICE_SECONDS,
    accounting.COST,
)


class Fleet:
    """Gives the fleet's metric families. `cost_per_device_hour` is the rate of runs that have no tag for it."""

    def __init__(
        self, database: Database, clock: Callable[[], float], cost_per_device_hour: float | None = None
    ) -> None:
        self._database = database
        self._clock = clock
        self._rate = cost_per_device_hour

    def families(self) -> list[Family]:
        """Return them all.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: the database does not answer.
        """
        with self._database.read() as session:
            return [_runs_by_status(session), *self._of_runs(session, self._clock()), *_totals(session)]

    def _of_runs(self, session: Session, now: float) -> Iterable[Family]:
        family = {name: gauge(name) for name in _RUN_GAUGES}
        recent = or_(RunRow.status == "running", RunRow.status_since > now - RECENT_SECONDS)
        ids = select(RunRow.id).where(recent)
        ranks = _ranks(session, ids)
        tags = select(TagRow).where(
            TagRow.run_id.in_(ids), TagRow.name.in_((accounting.RATE_TAG, accounting.BUDGET_TAG))
        )
        money = {(tag.run_id, tag.name): accounting.amount(tag.value) for tag in session.scalars(tags)}
        labels: dict[str, list[str]] = {}
        # Sorted here: SQLite would walk every run in the order of ids rather than look up the few and sort them.
        wanted = select(RunRow).where(RunRow.id.in_(ids)).options(load_only(*_RUN_COLUMNS))
        for run in sorted(session.scalars(wanted), key=lambda run: run.id):
            of_run = labels[run.id] = [run.id, run.name, run.project, run.team]
            heard = ranks.get(run.id)
            family["optwatch_fleet_run_status"].add_metric([*of_run, run.status], 1)
            family["optwatch_fleet_run_started_timestamp_seconds"].add_metric(of_run, run.started_at)
            if run.status in ("running", "lost"):
                family["optwatch_fleet_run_lost"].add_metric(of_run, int(run.status == "lost"))
            if run.status == "failed":
                label = accounting.failure_label(run)
                family["optwatch_fleet_run_failed"].add_metric([*of_run, label], 1)
            if run.finished_at is not None:
                family["optwatch_fleet_run_ended_timestamp_seconds"].add_metric(of_run, run.finished_at)
            elif heard is not None:
                family["optwatch_fleet_run_last_heartbeat_timestamp_seconds"].add_metric(of_run, heard.heard_at)
                if heard.step is not None:
                    family["optwatch_fleet_run_last_step"].add_metric(of_run, heard.step)
                if run.status == "running" and heard.promised_until is not None and heard.promised_until > now:
                    name = "optwatch_fleet_run_promised_until_timestamp_seconds"
                    family[name].add_metric(of_run, heard.promised_until)
            rate = money.get((run.id, accounting.RATE_TAG))
            rate = self._rate if rate is None else rate
            if rate is not None:
                wall = accounting.wall_seconds(run, None if heard is None else heard.heard_at, now)
                family["optwatch_fleet_run_cost"].add_metric(of_run, accounting.cost(run, wall, rate))
            budget = money.get((run.id, accounting.BUDGET_TAG))
            if budget is not None:
                family["optwatch_fleet_run_cost_budget"].add_metric(of_run, budget)
        events = (
            select(EventRow.run_id, EventRow.kind, func.max(EventRow.received_at).label("received_at"))
            .where(EventRow.run_id.in_(ids))
            .group_by(EventRow.run_id, EventRow.kind)
        )
        kinds: dict[str, list[tuple[float, str]]] = defaultdict(list)
        for event in session.execute(events):
            if event.run_id in labels:
                kinds[event.run_id].append((event.received_at, event.kind))
        for run_id, received in kinds.items():
            for received_at, kind in sorted(received, reverse=True)[:MAX_KINDS]:
                family["optwatch_fleet_run_event_timestamp_seconds"].add_metric([*labels[run_id], kind], received_at)
        return family.values()


def _runs_by_status(session: Session) -> Family:
    counted = {row[0]: row[1] for row in session.execute(select(RunRow.status, func.count()).group_by(RunRow.status))}
    family = gauge("optwatch_fleet_runs")
    for status in STATUSES:
        family.add_metric([status], counted.get(status, 0))
    return family


def _ranks(session: Session, ids: object) -> dict[str, Row[tuple[str, float, int | None, float | None]]]:
    """Return, by run id, the last beat of any rank, the highest step and the latest time a rank promised to be back."""
    promised = case((RankRow.promise_seconds > RankRow.interval_seconds, RankRow.received_at + RankRow.promise_seconds))
    statement = (
        select(
            RankRow.run_id,
            func.max(RankRow.received_at).label("heard_at"),
            func.max(RankRow.step).label("step"),
            func.max(promised).label("promised_until"),
        )
        .where(RankRow.run_id.in_(ids))  # type: ignore[arg-type]  # a select of one column, whose type says less
        .group_by(RankRow.run_id)
    )
    return {row.run_id: row for row in session.execute(statement)}


def _totals(session: Session) -> Iterable[Family]:
    """Give the counters: each label value of every known project is there, as 0 where nothing was counted yet."""
    values = {(row.name, row.project, row.label): row.value for row in session.scalars(select(TotalRow))}
    projects = sorted({project for name, project, _ in values if name == accounting.RECOVERED})
    for name in _PROJECT_TOTALS:
        family = counter(name)
        for project in projects:
            labels = BY_NAME[name].values[1] if len(BY_NAME[name].labels) > 1 else ("",)
            for label in labels:
                family.add_metric([project, label] if label else [project], values.get((name, project, label), 0.0))
        yield family
    sends = counter(accounting.SENDS)
    for result in SENDS:
        sends.add_metric([result], values.get((accounting.SENDS, "", result), 0.0))
    yield sends
    times = histogram(accounting.TIME_TO_PAGE)
    for path in PATHS:
        counts = [0.0] * len(BUCKETS)
        for (name, of_path, label), value in values.items():
            if (name, of_path) == (accounting.TIME_TO_PAGE, path) and label != "sum":
                counts[_bucket(float(label))] += value  # counted under a bound of its day, perhaps none of ours
        total = values.get((accounting.TIME_TO_PAGE, path, "sum"), 0.0)
        times.add_metric([path], cumulative(PAGE_BUCKETS, counts), total)
    yield times


BUCKETS = (*(str(bound) for bound in PAGE_BUCKETS), "+Inf")


def _bucket(seconds: float) -> int:
    """Return the index in `BUCKETS` of the bucket that `seconds` falls into."""
    return bisect.bisect_left(PAGE_BUCKETS, seconds)


def observe_time_to_page(session: Session, path: str, seconds: float) -> None:
    """Count one page that took `seconds`, never less than 0: the agent's clock may be ahead."""
    seconds = max(0.0, seconds)
    bucket = BUCKETS[_bucket(seconds)]
    name = accounting.TIME_TO_PAGE
    accounting.add(session, {(name, path, bucket): 1, (name, path, "sum"): seconds})
