"""Alerts about runs as Alertmanager's webhook tells them: a history, one row for each time an alert fired."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from sqlalchemy import and_, or_, select, update
from sqlalchemy.orm import Session

from optwatch_server.database.models import AlertRow, EventRow, RunRow
from optwatch_server.database.upsert import insert_into
from optwatch_server.metrics.fleet import observe_time_to_page
from optwatch_server.runs import registry as runs
from optwatch_server.web.numbers import clean_text
from optwatch_server.wire import is_run_id

from .due import ALERTS, LOST

KINDS = {alertname: kind for kind, alertname in ALERTS.items()}
BEFORE_SECONDS = 600.0
"""How long before an alert began its event may have occurred: a rule looks back as far."""
_LONGEST = 4096


class Webhook(BaseModel):
    """The body of Alertmanager's webhook, version "4", as far as it is read; anything else in it is ignored."""

    model_config = ConfigDict(extra="ignore")

    alerts: list[JsonValue] = Field(max_length=10_000)


class _Alert(BaseModel):
    """One alert of the body."""

    model_config = ConfigDict(extra="ignore")

    status: str
    labels: dict[str, str]
    annotations: dict[str, str] = Field(default_factory=dict)
    startsAt: datetime.datetime  # noqa: N815 - Alertmanager's name
    endsAt: datetime.datetime | None = None  # noqa: N815
    generatorURL: str = ""  # noqa: N815
    fingerprint: str = ""

    @property
    def run_id(self) -> str:
        return self.labels.get("run_id", "")

    @property
    def key(self) -> str:
        """The fingerprint, or one of our own where a version of Alertmanager gives none."""
        text = repr(sorted(self.labels.items()))
        return self.fingerprint[:64] or hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()

    def text(self, value: str, longest: int = _LONGEST) -> str:
        return str(clean_text(value))[:longest]


class AlertsAccepted(BaseModel):
    """Answer to a webhook: alerts that told something new, those known already, and those about no known run."""

    accepted: int
    duplicates: int
    ignored: int


def receive(session: Session, webhook: Webhook, now: float, public_url: str) -> AlertsAccepted:
    """Keep what a webhook tells about known runs; repeating it changes nothing.

    One alert that cannot be read costs only itself: Alertmanager does not send again what was refused.
    `public_url` begins the links of this server's own pages, which tell them from those of Prometheus.
    """
    read: list[_Alert] = []
    for item in webhook.alerts:
        try:
            alert = _Alert.model_validate(item)
        except ValidationError:
            continue
        if alert.status in ("firing", "resolved") and is_run_id(alert.run_id):
            read.append(alert)
    known = runs.known(session, sorted({alert.run_id for alert in read}))
    accepted = duplicates = 0
    # In one order for everyone, as in `events.receive`.
    for alert in sorted(read, key=lambda alert: (alert.key, alert.startsAt.timestamp(), alert.status)):
        if alert.run_id not in known:
            continue
        if not (_begin(session, alert, now, public_url) if alert.status == "firing" else _end(session, alert, now)):
            duplicates += 1
        else:
            accepted += 1
    return AlertsAccepted(accepted=accepted, duplicates=duplicates, ignored=len(webhook.alerts) - accepted - duplicates)


def _insert(session: Session, alert: _Alert, now: float, ends_at: float | None) -> bool:
    """Store an alert; return False, and change nothing, where this firing of it is known."""
    row = {
        "fingerprint": alert.text(alert.key, 64),
        "starts_at": alert.startsAt.timestamp(),
        "run_id": alert.run_id,
        "alertname": alert.text(alert.labels.get("alertname", ""), 128),
        "severity": alert.text(alert.labels.get("severity", ""), 64),
        "status": alert.status,
        "ends_at": ends_at,
        "received_at": now,
        "summary": alert.text(alert.annotations.get("summary", "")),
        "description": alert.text(alert.annotations.get("description", "")),
    }
    insert = insert_into(session, AlertRow).on_conflict_do_nothing().returning(AlertRow.run_id)
    return session.execute(insert, row).first() is not None


def _begin(session: Session, alert: _Alert, now: float, public_url: str) -> bool:
    """Store an alert that fires; return whether it was not known to."""
    if not _insert(session, alert, now, None):
        return False
    # A page that the server sent itself was measured when Alertmanager took it.
    if not alert.generatorURL.startswith(f"{public_url}/runs/"):
        occurred_at = _cause(session, alert, now)
        if occurred_at is not None:
            observe_time_to_page(session, "prometheus", now - occurred_at)
    return True


def _cause(session: Session, alert: _Alert, now: float) -> float | None:
    """Return when what the alert tells of happened, where the server knows: an event of its kind, or being lost."""
    earliest = alert.startsAt.timestamp() - BEFORE_SECONDS
    name = alert.labels.get("alertname", "")
    if name == LOST:
        lost_at = session.scalars(select(RunRow.lost_at).where(RunRow.id == alert.run_id)).one()
        return lost_at if lost_at is not None and lost_at >= earliest else None
    kind = KINDS.get(name)
    if kind is None:
        return None
    fits = and_(EventRow.occurred_at >= earliest, EventRow.occurred_at <= now)
    return session.scalars(
        select(EventRow.occurred_at)
        .where(EventRow.run_id == alert.run_id, EventRow.kind == kind, EventRow.severity == "critical", fits)
        .order_by(EventRow.occurred_at.desc())
        .limit(1)
    ).first()


def _end(session: Session, alert: _Alert, now: float) -> bool:
    """Store that an alert is over; return whether that was not known."""
    starts_at = alert.startsAt.timestamp()
    # Alertmanager gives the time at which it ended; the year 1 stands for none.
    given = None if alert.endsAt is None else alert.endsAt.timestamp()
    ends_at = now if given is None or given < starts_at else given
    key = alert.text(alert.key, 64)
    # Whichever firing is open: where two paths raised it, the earlier beginning may have come in later.
    done = session.execute(
        update(AlertRow)
        .where(AlertRow.fingerprint == key, AlertRow.status == "firing", AlertRow.starts_at <= ends_at)
        .values(status="resolved", ends_at=ends_at)
        .returning(AlertRow.run_id)
    )
    return done.first() is not None or _insert(session, alert, now, ends_at)


def of_run(
    session: Session, run_id: str, limit: int, after: str | None = None
) -> tuple[Sequence[AlertRow], str | None]:
    """Return up to `limit` alerts of a run, newest first, and the cursor of the next page or None at the end.

    Raises:
        Problem: 422, `after` is no cursor that this server gave.
    """
    order = (AlertRow.starts_at, AlertRow.fingerprint)
    statement = select(AlertRow).where(AlertRow.run_id == run_id).order_by(*(column.desc() for column in order))
    if after is not None:
        starts_at, fingerprint = runs.decode_cursor(after, 2)
        same = and_(AlertRow.starts_at == starts_at, AlertRow.fingerprint < fingerprint)
        statement = statement.where(or_(AlertRow.starts_at < starts_at, same))
    rows = session.scalars(statement.limit(limit + 1)).all()
    if len(rows) <= limit:
        return rows, None
    return rows[:limit], runs.encode_cursor(rows[limit - 1].starts_at, rows[limit - 1].fingerprint)
