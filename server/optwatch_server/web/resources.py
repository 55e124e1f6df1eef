"""What the API answers with: a run, its ranks, its events and alerts, and pages of them."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, JsonValue

from optwatch_server.database.models import AlertRow, EventRow, RankRow, RunRow

from .numbers import Number


class RunResource(BaseModel):
    """A run as it stands. `status_since`, `created_at` and `lost_at` are by the server's clock."""

    id: str
    name: str
    project: str
    team: str
    tags: dict[str, str]
    status: str
    status_since: float
    lost_at: float | None
    lost_reason: str
    started_at: float
    created_at: float
    finished_at: float | None
    reason: str
    cause: str
    final_step: int | None
    optimizer: str
    hyperparameters: dict[str, JsonValue]
    device: str
    world_size: int | None
    seed: int | None
    resumed_from: str | None
    target: dict[str, JsonValue] | None
    versions: dict[str, JsonValue]
    code_version: str
    host: str
    pid: int | None
    heartbeat_interval_seconds: float

    @classmethod
    def of(cls, run: RunRow, tags: dict[str, str]) -> RunResource:
        """Return the resource of a stored run."""
        columns = {name: getattr(run, name) for name in cls.model_fields if name not in ("tags", "seed")}
        return cls(**columns, tags=tags, seed=None if run.seed is None else int(run.seed))


class RankResource(BaseModel):
    """The latest beat of one rank. `received_at` and `due_at` are by the server's clock."""

    rank: int
    step: int | None
    sent_at: float | None
    received_at: float
    due_at: float
    interval_seconds: float
    promise_seconds: float | None
    promise_reason: str
    metrics_target: str | None
    values: dict[str, Number]

    @classmethod
    def of(cls, rank: RankRow) -> RankResource:
        """Return the resource of a stored rank."""
        columns = {name: getattr(rank, name) for name in cls.model_fields if name != "values"}
        return cls(**columns, values=rank.latest)


class RunDetail(RunResource):
    """A run with the latest beat of each of its ranks."""

    ranks: list[RankResource]

    @classmethod
    def with_ranks(cls, run: RunRow, tags: dict[str, str], ranks: Sequence[RankRow]) -> RunDetail:
        """Return the resource of a stored run and its ranks."""
        return cls(**RunResource.of(run, tags).model_dump(), ranks=[RankResource.of(rank) for rank in ranks])


class RunPage(BaseModel):
    """Runs, newest first; `next` goes into ``after`` to get the page that follows, and is null at the end."""

    runs: list[RunResource]
    next: str | None


class EventResource(BaseModel):
    """An event as it was sent, and when it was received by the server's clock."""

    id: str
    run_id: str
    rank: int
    sequence: int
    kind: str
    severity: str
    step: int | None
    occurred_at: float
    received_at: float
    summary: str
    likely: str
    runbook: str
    details: dict[str, JsonValue]

    @classmethod
    def of(cls, event: EventRow) -> EventResource:
        """Return the resource of a stored event."""
        return cls(**{name: getattr(event, name) for name in cls.model_fields})


class EventPage(BaseModel):
    """Events of a run in the order in which they occurred; `next` as in `RunPage`."""

    events: list[EventResource]
    next: str | None


class AlertResource(BaseModel):
    """An alert about a run, once for each time it fired; `ends_at` is null while it fires."""

    fingerprint: str
    alertname: str
    severity: str
    status: str
    starts_at: float
    ends_at: float | None
    received_at: float
    summary: str
    description: str

    @classmethod
    def of(cls, alert: AlertRow) -> AlertResource:
        """Return the resource of a stored alert."""
        return cls(**{name: getattr(alert, name) for name in cls.model_fields})


class AlertPage(BaseModel):
    """Alerts of a run, newest first; `next` as in `RunPage`."""

    alerts: list[AlertResource]
    next: str | None
