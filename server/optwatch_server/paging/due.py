"""What is to be paged at once: rows of `pages`, written in the transaction that brings the cause, and what they say.

There is one row for each alert of a run, as Alertmanager has one alert for it: a thousand ranks that see the same NaN
ask for one page. `optwatch_server.paging.pager` sends what is due.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping

from pydantic import JsonValue
from sqlalchemy import select
from sqlalchemy.orm import Session

from optwatch_server.database.models import PageRow, RunRow
from optwatch_server.database.upsert import insert_into
from optwatch_server.settings import Settings
from optwatch_server.web.numbers import shown
from optwatch_server.wire import Event

LOST = "TrainingRunLost"
ALERTS = {
    "nonfinite": "TrainingNonFinite",
    "divergence": "TrainingDiverged",
    "out_of_memory": "TrainingOutOfMemory",
    "crashed": "TrainingCrashed",
    "resumed_without_state": "TrainingResumedWithoutState",
    "replica_divergence": "TrainingReplicaDivergence",
}
"""The alert that a critical event of each kind raises; other kinds are left to the rules."""
SUMMARIES = {
    "TrainingNonFinite": "A training run computes NaN or Inf.",
    "TrainingDiverged": "The loss of a training run rose and does not come back.",
    "TrainingOutOfMemory": "A training run ran out of memory.",
    "TrainingCrashed": "A training run crashed.",
    "TrainingResumedWithoutState": "A training run resumed without its optimizer's state.",
    "TrainingReplicaDivergence": "Replicas of a training run hold different weights.",
    LOST: "A training run stopped sending heartbeats without finishing.",
}
EVENT_SECONDS = 600.0
"""How long the page of an event fires in Alertmanager: what happened once does not end by itself. Not longer than the
rule does, which may then end it."""
LOST_SECONDS = 300.0
"""How long the page of a lost run outlives the last time it was found lost. It is never ended before that, since the
rule, which also waits five minutes for a server that is away, would raise it again, and page."""
REPEAT_SECONDS = 60.0
"""How often, at most, a page that fires is sent again."""


def ask_for_events(session: Session, events: Iterable[Event], now: float) -> None:
    """Ask for the pages of critical events that were not known before; warnings and other kinds are left alone."""
    asked: dict[tuple[str, str], Event] = {}
    for event in events:
        name = ALERTS.get(event.kind)
        if event.severity == "critical" and name is not None:
            key = (event.run_id, name)
            if key not in asked or event.occurred_at < asked[key].occurred_at:
                asked[key] = event
    # In one order for everyone: see `events.receive`.
    for (run_id, name), event in sorted(asked.items(), key=lambda item: item[0]):
        _ask(session, run_id, name, min(event.occurred_at, now), _told(event), now)


def ask_for_lost(session: Session, run_id: str, reason: str, now: float) -> None:
    """Ask for the page of a run that was found lost."""
    text = f"stopped sending heartbeats without finishing: {reason}. The process may be dead, hung, or alive behind a "
    _ask(session, run_id, LOST, now, text + "broken network: find out which before starting it again.", now)


def _told(event: Event) -> str:
    layer = event.details.get("layer")
    where = [
        "" if event.step is None else f"at step {event.step}",
        f"on rank {event.rank}",
        f"the layer to look at first is {shown(layer)}" if layer else "",
    ]
    likely = f" Likely: {event.likely.rstrip('.')}." if event.likely else ""
    return f"{event.summary.rstrip('.')} ({', '.join(part for part in where if part)}).{likely}"


def _ask(session: Session, run_id: str, name: str, starts_at: float, description: str, now: float) -> None:
    fields = {"starts_at": starts_at, "description": description, "due_at": now, "attempts": 0, "version": 0}
    insert = insert_into(session, PageRow).on_conflict_do_nothing().returning(PageRow.run_id)
    if session.execute(insert, {"run_id": run_id, "alertname": name, **fields}).first() is not None:
        return
    key = (PageRow.run_id == run_id, PageRow.alertname == name)
    page = session.scalars(
        select(PageRow).where(*key).with_for_update().execution_options(populate_existing=True)
    ).one()
    page.version += 1
    if page.accepted_at is None and page.due_at is not None:
        return  # still on its way: that page tells of this as well
    if name == LOST or page.ends_at is None or page.ends_at <= now:  # the one before is over: this is another incident
        page.starts_at, page.accepted_at, page.attempts = starts_at, None, 0
    page.description = description
    page.due_at = now if page.accepted_at is None else max(now, page.accepted_at + REPEAT_SECONDS)


def alert(page: PageRow, run: RunRow, settings: Settings, now: float) -> dict[str, JsonValue]:
    """Return a page as Alertmanager's API takes it.

    The labels are exactly those of the rule of that name, so that Alertmanager folds the two into one alert. A label
    that is empty does not exist for Prometheus, and is left out.
    """
    who = f"Run {run.name} ({run.id}, project {run.project or 'none'}, team {run.team or 'none'})"
    run_url = f"{settings.public_url}/runs/{run.id}"
    return {
        "labels": labels(page.alertname, run),
        "annotations": {
            "summary": SUMMARIES[page.alertname],
            "description": f"{who} {page.description}" if page.alertname == LOST else f"{who}: {page.description}",
            "runbook_url": f"{settings.public_url}/runbooks/{page.alertname}",
            "dashboard_url": f"{settings.grafana_url}/d/optwatch-debug?var-run_id={run.id}",
            "run_url": run_url,
        },
        "startsAt": rfc3339(page.starts_at),
        "endsAt": rfc3339(now + seconds(page)),
        "generatorURL": run_url,
    }


def labels(alertname: str, run: RunRow) -> dict[str, JsonValue]:
    """Return the labels of a page, without the empty ones."""
    named: Mapping[str, str] = {
        "alertname": alertname,
        "severity": "critical",
        "notify": "page",
        "run_id": run.id,
        "run": run.name,
        "project": run.project,
        "team": run.team,
    }
    return {name: value for name, value in named.items() if value}


def seconds(page: PageRow) -> float:
    """Return how long a page fires that is sent now."""
    return LOST_SECONDS if page.alertname == LOST else EVENT_SECONDS


def rfc3339(timestamp: float) -> str:
    """Return Unix seconds as Alertmanager reads them, to the microsecond."""
    moment = datetime.datetime.fromtimestamp(timestamp, datetime.timezone.utc)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
