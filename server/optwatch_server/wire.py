"""The messages of wire version 1, as docs/wire.md describes them: what agents send and what the server answers.

`schemas/wire-v1.json` is generated from these models, and the agent's real messages are tested against it.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal
from uuid import UUID

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, field_validator

from .web.numbers import Number, clean_json, clean_text

SCHEMA = 1
RUN_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
MAX_BATCH = 1000
MAX_TAGS = 64
MAX_VALUES = 256
MAX_MEMBERS = 20_000
MAX_ROWS = 4096
_LAST_SECOND = 253_402_300_799  # the end of year 9999: beyond it no calendar can show a time
_LARGEST_INTEGER = 2**63 - 1

# PostgreSQL stores neither NUL nor half a surrogate pair, and one such character must not cost an agent its batch.
_Clean = BeforeValidator(clean_text)

RunId = Annotated[str, Field(pattern=RUN_ID_PATTERN)]
Label = Annotated[str, Field(max_length=256), _Clean]
Prose = Annotated[str, Field(max_length=4096), _Clean]
TagName = Annotated[str, Field(min_length=1, max_length=128), _Clean]
ValueName = Annotated[str, Field(min_length=1, max_length=128), _Clean]
Time = Annotated[float, Field(ge=0, le=_LAST_SECOND, allow_inf_nan=False, description="Unix seconds")]
Step = Annotated[int, Field(ge=0, le=_LARGEST_INTEGER)]
Rank = Annotated[int, Field(ge=0, le=2**31 - 1)]
Interval = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False, description="seconds")]
EventKind = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
JsonObject = Annotated[dict[str, JsonValue], BeforeValidator(clean_json)]
Status = Literal["running", "lost", "succeeded", "failed", "cancelled"]
STATUSES: tuple[Status, ...] = ("running", "lost", "succeeded", "failed", "cancelled")


def is_run_id(text: str) -> bool:
    """Return whether `text` could be the id of a run."""
    return re.fullmatch(RUN_ID_PATTERN, text) is not None and not text.endswith("\n")


class Message(BaseModel):
    """What every message has in common: unknown fields are ignored, so that a newer agent's messages are taken."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)


class Versioned(Message):
    """A message that names the schema it is written in; another version than ours is refused."""

    schema_version: Literal[1] = Field(alias="schema")

    @field_validator("schema_version", mode="before")
    @classmethod
    def _known(cls, value: object) -> object:
        if value != SCHEMA or isinstance(value, bool):
            raise ValueError(f"this server knows schema {SCHEMA} only: send {SCHEMA}, or upgrade the server")
        return value


class Target(Message):
    """What a run wants to reach: `metric` at `value` by step `by_step`."""

    metric: Label
    value: Number
    by_step: Step | None = None


class Run(Versioned):
    """A training run, made known before its first heartbeat."""

    id: RunId
    name: Label | None = None
    project: Label | None = None
    team: Label | None = None
    tags: dict[TagName, Label] = Field(default_factory=dict, max_length=MAX_TAGS)
    started_at: Time | None = None
    optimizer: Label | None = None
    hyperparameters: JsonObject = Field(default_factory=dict)
    device: Label | None = None
    world_size: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    resumed_from: RunId | None = None
    target: Target | None = None
    versions: dict[TagName, Label | None] = Field(default_factory=dict, max_length=MAX_TAGS)
    code_version: Label | None = None
    host: Label | None = None
    pid: Annotated[int, Field(ge=0, le=_LARGEST_INTEGER)] | None = None
    heartbeat_interval_seconds: Interval = 10.0


class Beat(Message):
    """One rank's sign of life, with the promise of the next one."""

    run_id: RunId
    rank: Rank = 0
    step: Step | None = None
    sent_at: Time | None = None
    interval_seconds: Interval | None = None
    promise_seconds: Annotated[float, Field(ge=0, le=604_800, allow_inf_nan=False)] | None = None
    promise_reason: Label | None = None
    metrics_target: Annotated[str, Field(pattern=r"^[A-Za-z0-9._\[\]:-]{1,255}:[0-9]{1,5}$")] | None = None
    values: dict[ValueName, Number] = Field(default_factory=dict, max_length=MAX_VALUES)


class Heartbeats(Versioned):
    """The beats of any number of runs and ranks."""

    beats: list[Beat] = Field(max_length=MAX_BATCH)


class Event(Message):
    """Something a detector saw."""

    id: UUID
    run_id: RunId
    rank: Rank = 0
    sequence: Annotated[int, Field(ge=0, le=_LARGEST_INTEGER)] = 0
    kind: EventKind
    severity: Literal["critical", "warning", "info"]
    step: Step | None = None
    occurred_at: Time
    summary: Prose
    likely: Prose | None = None
    runbook: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{0,128}$")] | None = None
    details: JsonObject = Field(default_factory=dict)


class Events(Versioned):
    """The events of any number of runs and ranks."""

    events: list[Event] = Field(max_length=MAX_BATCH)


class Series(Message):
    """Numbers of one kind for each layer or parameter, row by row; minus infinity where there was none.

    `data` is base64 of zlib of, member after member, the little-endian values of its rows with their bytes apart: first
    the first byte of each value, then the second of each, and so on.
    """

    name: ValueName
    type: Literal["float32", "bfloat16"]
    members: list[Label] = Field(max_length=MAX_MEMBERS)
    data: Annotated[str, Field(max_length=8 * 2**20)]


class RecordedTable(Message):
    """Rows of one optimizer, oldest first: `steps` has each step, `samples` those at which weights were read."""

    name: ValueName
    optimizer: Label
    rows: Annotated[int, Field(ge=0, le=MAX_ROWS)]
    columns: dict[ValueName, list[Number | None]] = Field(max_length=MAX_VALUES)
    """Each as long as there are rows; null where nothing was measured. ``step`` is among them."""
    series: list[Series] = Field(default_factory=list, max_length=64)


class Recording(Versioned):
    """A black box: what one rank of a run did in the steps before its incident or its end."""

    id: UUID
    rank: Rank = 0
    reason: EventKind
    """The kind of the event; ``left_behind`` where the process died and had said nothing."""
    step: Step | None = None
    """Of the incident."""
    layer: Label | None = None
    recorded_at: Time
    tables: list[RecordedTable] = Field(max_length=64)
    notes: list[JsonObject] = Field(default_factory=list, max_length=256)
    """Events, and where numbers began not to be finite, in order; each with `kind` or `type`, and `step`."""


class RecordingAccepted(Message):
    """Answer to a recording. One that is not kept is one too many of its run; sending it again changes nothing."""

    id: str
    kept: bool


class Finish(Versioned):
    """How a run ended."""

    status: Literal["succeeded", "failed", "cancelled"]
    finished_at: Time | None = None
    reason: Prose | None = None
    cause: EventKind | None = None
    """Of a failure: the kind of the event that tells it."""
    final_step: Step | None = None


class HeartbeatsAccepted(Message):
    """Answer to heartbeats; a run in `unknown_runs` has to be created first, and its beats sent again."""

    accepted: int
    unknown_runs: list[str]


class EventsAccepted(Message):
    """Answer to events; those of `unknown_runs` were not kept."""

    accepted: int
    duplicates: int
    unknown_runs: list[str]
