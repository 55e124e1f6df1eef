"""The tables: runs, tags, latest beats of ranks, events, totals, pages, alerts, recordings. Times are Unix seconds."""

from __future__ import annotations

from pydantic import JsonValue
from sqlalchemy import JSON, BigInteger, Double, ForeignKey, Index, String, Text, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from optwatch_server.web.numbers import NonFinite

RUN_ID_LENGTH = 128
_UNCOUNTED = text("status <> counted_status")


class Base(DeclarativeBase):
    """What Alembic compares the database with."""

    type_annotation_map = {float: Double(), dict[str, JsonValue]: JSON()}  # noqa: RUF012 - SQLAlchemy's own idiom


class RunRow(Base):
    """A run. `created_at`, `status_since` and `lost_at` are the server's clock, the other times are the agent's."""

    __tablename__ = "runs"

    id: Mapped[str] = mapped_column(String(RUN_ID_LENGTH), primary_key=True)
    name: Mapped[str] = mapped_column(Text)
    project: Mapped[str] = mapped_column(Text)
    team: Mapped[str] = mapped_column(Text)
    started_at: Mapped[float]
    created_at: Mapped[float]
    optimizer: Mapped[str] = mapped_column(Text)
    hyperparameters: Mapped[dict[str, JsonValue]]
    device: Mapped[str] = mapped_column(Text)
    world_size: Mapped[int | None] = mapped_column(BigInteger)
    seed: Mapped[str | None] = mapped_column(String(24))
    """Text, because torch's seeds reach 2**64 - 1 and no integer column does."""
    resumed_from: Mapped[str | None] = mapped_column(String(RUN_ID_LENGTH))
    target: Mapped[dict[str, JsonValue] | None] = mapped_column(JSON(none_as_null=True))
    versions: Mapped[dict[str, JsonValue]]
    code_version: Mapped[str] = mapped_column(Text)
    host: Mapped[str] = mapped_column(Text)
    pid: Mapped[int | None] = mapped_column(BigInteger)
    heartbeat_interval_seconds: Mapped[float]
    status: Mapped[str] = mapped_column(String(16))
    status_since: Mapped[float]
    lost_at: Mapped[float | None]
    """When the run was called lost, the last time; it stays when the run comes back or ends."""
    lost_reason: Mapped[str] = mapped_column(Text)
    finished_at: Mapped[float | None]
    reason: Mapped[str] = mapped_column(Text)
    final_step: Mapped[int | None] = mapped_column(BigInteger)
    cause: Mapped[str] = mapped_column(String(64), server_default="")
    """Why it failed, as it was told or inferred; empty where it did not fail."""
    counted_status: Mapped[str] = mapped_column(String(16), server_default="running")
    """The last status that the totals took in; the sweeper counts a run where it differs from `status`."""
    counted_seconds: Mapped[float] = mapped_column(server_default="0")
    """Wall time that the totals took in already: of a run that was lost, before it came back."""

    __table_args__ = (
        Index("runs_uncounted", "id", sqlite_where=_UNCOUNTED, postgresql_where=_UNCOUNTED),
        Index("runs_by_change", "status_since"),
        Index("runs_newest", "created_at", "id"),
        Index("runs_by_status", "status", "created_at", "id"),
        Index("runs_by_project", "project", "created_at", "id"),
        Index("runs_by_team", "team", "created_at", "id"),
    )


class TagRow(Base):
    """One tag of a run: a row of its own, so that a filter by tag is an index lookup on both databases."""

    __tablename__ = "run_tags"

    run_id: Mapped[str] = mapped_column(String(RUN_ID_LENGTH), ForeignKey("runs.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    value: Mapped[str] = mapped_column(Text)

    __table_args__ = (Index("run_tags_by_name", "name", "value", "run_id"),)


class RankRow(Base):
    """The latest beat of one rank of a run, and until when it promised the next."""

    __tablename__ = "ranks"

    run_id: Mapped[str] = mapped_column(String(RUN_ID_LENGTH), ForeignKey("runs.id"), primary_key=True)
    rank: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    step: Mapped[int | None] = mapped_column(BigInteger)
    sent_at: Mapped[float | None]
    received_at: Mapped[float]
    """By the server's clock, which alone decides who is late."""
    interval_seconds: Mapped[float]
    promise_seconds: Mapped[float | None]
    promise_reason: Mapped[str] = mapped_column(Text)
    due_at: Mapped[float]
    """From this moment on, without another beat, the promise is broken: grace included."""
    metrics_target: Mapped[str | None] = mapped_column(String(300))
    latest: Mapped[dict[str, float | NonFinite]] = mapped_column(JSON)
    """Latest values by name, as the wire carries numbers."""


class EventRow(Base):
    """One event. Its id is made by the agent: a second delivery of it changes nothing."""

    __tablename__ = "events"

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    run_id: Mapped[str] = mapped_column(String(RUN_ID_LENGTH), ForeignKey("runs.id"))
    rank: Mapped[int] = mapped_column(BigInteger)
    sequence: Mapped[int] = mapped_column(BigInteger)
    kind: Mapped[str] = mapped_column(String(64))
    severity: Mapped[str] = mapped_column(String(16))
    step: Mapped[int | None] = mapped_column(BigInteger)
    occurred_at: Mapped[float]
    received_at: Mapped[float]
    summary: Mapped[str] = mapped_column(Text)
    likely: Mapped[str] = mapped_column(Text)
    runbook: Mapped[str] = mapped_column(String(128))
    details: Mapped[dict[str, JsonValue]]

    __table_args__ = (
        Index("events_in_order", "run_id", "occurred_at", "rank", "sequence", "id"),
        Index("events_by_kind", "run_id", "kind", "received_at"),
    )


class TotalRow(Base):
    """The value of one counter: `name` is the metric's, `label` its label besides the project, both as exported."""

    __tablename__ = "totals"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    project: Mapped[str] = mapped_column(Text, primary_key=True)
    label: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[float]


class PageRow(Base):
    """A page for Alertmanager: one row for each alert of a run, however many events ask for it.

    The row is written in the transaction that brings its cause, so that no page is lost with the process.
    """

    __tablename__ = "pages"

    run_id: Mapped[str] = mapped_column(String(RUN_ID_LENGTH), ForeignKey("runs.id"), primary_key=True)
    alertname: Mapped[str] = mapped_column(String(128), primary_key=True)
    starts_at: Mapped[float]
    description: Mapped[str] = mapped_column(Text)
    due_at: Mapped[float | None]
    """When it is to be sent, or, while a sender has claimed it, when another one may; None where nothing is to do."""
    attempts: Mapped[int] = mapped_column(BigInteger)
    """Sends that failed since the last one that worked."""
    version: Mapped[int] = mapped_column(BigInteger)
    """Goes up with every cause, so that a sender sees that another one came while it was sending."""
    accepted_at: Mapped[float | None]
    """When an Alertmanager took it last; None for a page that none has taken yet."""
    ends_at: Mapped[float | None]
    """Until when the Alertmanager that took it lets it fire."""

    __table_args__ = (Index("pages_due", "due_at"),)


class AlertRow(Base):
    """An alert about a run, as Alertmanager's webhook told it: one row for each time it fired."""

    __tablename__ = "alerts"

    fingerprint: Mapped[str] = mapped_column(String(64), primary_key=True)
    starts_at: Mapped[float] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(String(RUN_ID_LENGTH), ForeignKey("runs.id"))
    alertname: Mapped[str] = mapped_column(String(128))
    severity: Mapped[str] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(String(16))
    """``firing`` or ``resolved``."""
    ends_at: Mapped[float | None]
    received_at: Mapped[float]
    summary: Mapped[str] = mapped_column(Text)
    description: Mapped[str] = mapped_column(Text)

    __table_args__ = (Index("alerts_of_run", "run_id", "starts_at", "fingerprint"),)


class RecordingRow(Base):
    """Where a recording is: the numbers are in the store, under `path`."""

    __tablename__ = "recordings"

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    run_id: Mapped[str] = mapped_column(String(RUN_ID_LENGTH), ForeignKey("runs.id"))
    rank: Mapped[int] = mapped_column(BigInteger)
    reason: Mapped[str] = mapped_column(String(64))
    step: Mapped[int | None] = mapped_column(BigInteger)
    """Of the incident."""
    layer: Mapped[str] = mapped_column(Text)
    first_step: Mapped[int | None] = mapped_column(BigInteger)
    last_step: Mapped[int | None] = mapped_column(BigInteger)
    recorded_at: Mapped[float]
    received_at: Mapped[float]
    size: Mapped[int] = mapped_column(BigInteger)
    """Bytes in the store."""
    path: Mapped[str] = mapped_column(Text)

    __table_args__ = (Index("recordings_of_run", "run_id", "received_at", "id"),)
