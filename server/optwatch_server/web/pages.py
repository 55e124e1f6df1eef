"""The pages for people: rendered here, readable without scripts and without the internet."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Annotated
from urllib.parse import urlencode
from uuid import UUID

from fastapi import APIRouter, Query
from jinja2 import Environment, PackageLoader, StrictUndefined
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from starlette.responses import HTMLResponse

from optwatch_server import wire
from optwatch_server.database.models import RankRow, RunRow
from optwatch_server.paging import alerts
from optwatch_server.runs import events, heartbeats, recordings
from optwatch_server.runs import registry as runs
from optwatch_server.runs.store import StoreError
from optwatch_server.service import Service

from . import runbooks
from .charts import picture
from .incident import incidents, last_step
from .numbers import flat, shown
from .problems import Problem, unknown_run

RUNS_A_PAGE = 50
EVENTS_A_PAGE = 200
RANKS_A_PAGE = 256
ALERTS_A_PAGE = 50

# No script runs on a page, whatever a run calls itself: escaping is the first wall, and this is the second.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def ago(seconds: float) -> str:
    """Return a duration as ``12 s ago``, in the largest unit that keeps it honest; a future one is ``just now``."""
    if seconds < 1:
        return "just now"
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit} ago"
    return f"{int(seconds)} s ago"


def utc(timestamp: float) -> str:
    """Return Unix seconds as ``2026-01-31 03:12:45 UTC``."""
    moment = datetime.datetime.fromtimestamp(int(timestamp), datetime.timezone.utc)
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")


def iso(timestamp: float) -> str:
    """Return Unix seconds as the ``datetime`` attribute of a time element."""
    return datetime.datetime.fromtimestamp(int(timestamp), datetime.timezone.utc).isoformat()


class Pages:
    """Renders templates over one service."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._environment = Environment(
            loader=PackageLoader("optwatch_server"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        self._environment.filters.update(shown=shown, flat=flat, utc=utc, iso=iso)

    def render(self, template: str, status: int = 200, **values: object) -> HTMLResponse:
        """Return a page; every value is escaped unless the template says otherwise, which only runbooks do."""
        now = self.service.clock()
        html = self._environment.get_template(template).render(
            **values, now=now, ago=lambda timestamp: ago(now - timestamp)
        )
        return HTMLResponse(html, status, _HEADERS)

    def problem(self, problem: Problem) -> HTMLResponse:
        """Return the page for an error."""
        title = {404: "Not found", 422: "Cannot be shown"}.get(problem.status, "Something went wrong")
        return self.render("problem.html", problem.status, title=title, problem=problem)

    def run_list(self, filters: runs.Filters, after: str | None) -> HTMLResponse:
        """Return the list of runs, newest first."""
        with self.service.database.read() as session:
            page, following = runs.newest(session, filters, RUNS_A_PAGE, after)
            ids = [run.id for run in page]
            projects = session.scalars(select(RunRow.project).distinct().order_by(RunRow.project).limit(500)).all()
            by_status: dict[str, int] = dict.fromkeys(wire.STATUSES, 0)
            statement = select(RunRow.status, func.count()).group_by(RunRow.status)
            by_status.update({row[0]: row[1] for row in session.execute(statement)})
            beats, counts = _beats(session, ids), events.counts(session, ids)
        query = {"status": filters.status, "project": filters.project, "after": following}
        return self.render(
            "runs.html",
            runs=page,
            beats=beats,
            counts=counts,
            filters=filters,
            projects=[project for project in projects if project],
            by_status=by_status,
            next=following and "/?" + urlencode({name: value for name, value in query.items() if value}),
            first=after is None,
        )

    def run(self, run_id: str, recording_id: UUID | None = None) -> HTMLResponse:
        """Return the page of one run, with the charts of one recording, by default of the newest.

        Raises:
            Problem: 404, it is not known.
        """
        now = self.service.clock()
        with self.service.database.read() as session:
            run = runs.get(session, run_id)
            ranks = heartbeats.of_run(session, run_id)
            page = events.newest_of_run(session, run_id, EVENTS_A_PAGE)
            critical = events.newest_of_run(session, run_id, 1, "critical")
            told, more_alerts = alerts.of_run(session, run_id, ALERTS_A_PAGE)
            tags = runs.tags(session, [run_id])[run_id]
            count = sum(events.counts(session, [run_id]).get(run_id, {}).values())
            recorded = recordings.of_run(session, run_id)
            chosen = recordings.find(session, run_id, recording_id) if recording_id else next(iter(recorded), None)
        found = incidents(run, ranks, critical, now)
        drawn, problem = None, ""
        if chosen is not None:
            try:
                drawn = picture(recordings.load(self.service.store, chosen.path))
            except StoreError as error:  # the rest of the page is worth as much as ever
                problem = str(error)
        steps = {i.runbook: runbooks.load(self.service.runbooks, i.runbook) for i in found if i.runbook}
        return self.render(
            "run.html",
            run=run,
            ranks=ranks[:RANKS_A_PAGE],
            rank_count=len(ranks),
            latest=ranks[0].latest if ranks else {},
            heard_at=max((rank.received_at for rank in ranks), default=None),
            events=page,
            event_count=count,
            alerts=told,
            more_alerts=more_alerts is not None,
            promise=_promise(ranks, now) if run.status == "running" else None,
            tags=tags,
            incidents=found,
            runbooks=steps,
            known_runbooks=set(runbooks.names(self.service.runbooks)),
            last_step=last_step(run, ranks),
            recordings=recorded,
            recording=chosen,
            recording_problem=problem,
            picture=drawn,
        )

    def runbook_list(self) -> HTMLResponse:
        """Return the list of runbooks."""
        return self.render("runbooks.html", names=runbooks.names(self.service.runbooks))

    def runbook(self, name: str) -> HTMLResponse:
        """Return one runbook.

        Raises:
            Problem: 404, there is none of that name.
        """
        runbook = runbooks.load(self.service.runbooks, name)
        if runbook is None:
            raise Problem(404, f"no runbook {name[:128]!r} is shipped with this version: all of them are at /runbooks")
        return self.render("runbook.html", runbook=runbook)


def _promise(ranks: Sequence[RankRow], now: float) -> tuple[float, str] | None:
    """Return until when, by the latest promise that holds, a run may be silent, and why; None without one."""
    promised = [
        (rank.received_at + rank.promise_seconds, rank.promise_reason)
        for rank in ranks
        if rank.promise_seconds is not None and rank.promise_seconds > rank.interval_seconds
    ]
    return max((promise for promise in promised if promise[0] > now), default=None)


def _beats(session: Session, run_ids: list[str]) -> dict[str, tuple[float, int | None, object]]:
    """Return the last beat of any rank, the highest step and the loss of the lowest rank, by run id."""
    summary = (
        select(
            RankRow.run_id,
            func.max(RankRow.received_at).label("heard_at"),
            func.max(RankRow.step).label("step"),
            func.min(RankRow.rank).label("lowest"),
        )
        .where(RankRow.run_id.in_(run_ids))
        .group_by(RankRow.run_id)
        .subquery()
    )
    statement = select(summary.c.run_id, summary.c.heard_at, summary.c.step, RankRow.latest).join(
        RankRow, (RankRow.run_id == summary.c.run_id) & (RankRow.rank == summary.c.lowest)
    )
    return {row.run_id: (row.heard_at, row.step, row.latest.get("loss")) for row in session.execute(statement)}


def page_routes(pages: Pages) -> APIRouter:
    """Return the routes of the pages."""
    router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)

    @router.get("/")
    def run_list(
        status: Annotated[str, Query(max_length=16)] = "",
        project: wire.Label = "",
        after: Annotated[str | None, Query(max_length=500)] = None,
    ) -> HTMLResponse:
        chosen = next((known for known in wire.STATUSES if known == status), None)
        if status and chosen is None:
            raise Problem(422, f"status is {status!r}: choose one of {', '.join(wire.STATUSES)}")
        return pages.run_list(runs.Filters(project=project or None, status=chosen), after)

    @router.get("/runs/{run_id}")
    def run(run_id: str, recording: UUID | None = None) -> HTMLResponse:
        if not wire.is_run_id(run_id):
            raise unknown_run(run_id[:128])
        return pages.run(run_id, recording)

    @router.get("/runbooks")
    def runbook_list() -> HTMLResponse:
        return pages.runbook_list()

    @router.get("/runbooks/{name}")
    def runbook(name: str) -> HTMLResponse:
        return pages.runbook(name)

    return router
