"""What a black box says: where training broke first, which layers were worst, and its form on the wire."""

from __future__ import annotations

import base64
import json
import math
import statistics
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optwatch.delivery.client import finite

from .ringfile import Column, Contents, Rows

MAX_MESSAGE_BYTES = 4 * 2**20
"""The largest recording that the server takes."""
MAX_NAME = 256
RECENT = 16
"""Steps before an incident whose largest gradient is set against the median of all."""
_NAMESPACE = uuid.UUID("6b0e1a52-5f0f-4a6a-9a86-1f1f0c9a4d7b")


@dataclass(frozen=True, slots=True)
class Incident:
    """What broke first in the steps that a black box holds."""

    kind: str
    """Of its event; ``left_behind`` where the process died without having said anything."""
    step: int | None
    layer: str | None = None
    source: str | None = None
    summary: str = ""


def optimizers(contents: Contents) -> list[str]:
    """The optimizers in it."""
    return [rows.table.optimizer for rows in contents.rows if rows.table.name == "steps"]


def last_step(contents: Contents) -> int | None:
    """The last step of any optimizer; None in an empty one."""
    steps = [rows.column("step")[-1] for rows in contents.rows if rows.table.name == "steps" and rows.payloads]
    return int(max(steps)) if steps else None


def notes(contents: Contents) -> list[dict[str, Any]]:
    """Events and beginnings of non-finite numbers, in order."""
    rows = contents.table("notes")
    return rows.texts() if rows else []


def first_nonfinite(contents: Contents) -> Incident | None:
    """Where the first number of the recorded steps that is not finite was.

    As the agent judged it; and a layer's gradient norm that is not finite although nothing was said, such as one that
    was broken after the clipping that the agent judges by.
    """
    found = []
    for rows in contents.rows:
        if rows.table.name != "steps":
            continue
        layers = next((c.members for c in rows.table.columns if c.name == "layer_grad_norm"), None) or ()
        norms = rows.column("layer_grad_norm") if layers else [None] * len(rows.payloads)
        columns = (rows.column("step"), rows.column("nonfinite_source"), rows.column("nonfinite_layer"), norms)
        for step, source, layer, values in zip(*columns, strict=True):
            broken = next((i for i, v in enumerate(values or ()) if v is not None and not math.isfinite(v)), None)
            if source is None and broken is None:
                continue
            kind = "gradient" if source is None else contents.header["sources"][int(source) - 1]
            at = broken if source is None else layer
            found.append(Incident("nonfinite", int(step), None if at is None else layers[int(at)], kind))
            break
    return min(found, key=lambda incident: incident.step or 0, default=None)


def incident(contents: Contents) -> Incident:
    """The first thing that broke: a critical event, or a number that is not finite and never became one."""
    first = first_nonfinite(contents)
    critical = [note for note in notes(contents) if note.get("severity") == "critical"]
    told = min(critical, key=lambda note: note["step"], default=None)
    if told is None or (first is not None and (first.step or 0) < told["step"]):
        return first or Incident("left_behind", None)
    if told["kind"] == "nonfinite" and first is not None and first.step == told["step"]:
        return Incident("nonfinite", first.step, first.layer, first.source, told.get("summary", ""))
    return Incident(told["kind"], told["step"], None, None, told.get("summary", ""))


@dataclass(frozen=True, slots=True)
class Guilt:
    """How bad a layer or parameter was: the first step at which its gradient norm was not finite, and how far the
    largest of the last steps before was above its own median."""

    name: str
    broken: int | None
    ratio: float


def worst(rows: Rows, series: str = "layer_grad_norm", step: int | None = None, count: int = 5) -> list[Guilt]:
    """The members of a series that broke first or rose furthest, up to a step (None: the last one), worst first."""
    members = next((column.members for column in rows.table.columns if column.name == series), None)
    if members is None:
        return []
    kept = [
        (int(at), values)
        for at, values in zip(rows.column("step"), rows.column(series), strict=True)
        if values is not None and (step is None or at <= step)
    ]
    found = [_guilt(name, [(at, values[i]) for at, values in kept]) for i, name in enumerate(members)]
    return sorted(found, key=lambda g: (math.inf if g.broken is None else g.broken, -g.ratio))[:count]


def _guilt(name: str, points: Sequence[tuple[int, float | None]]) -> Guilt:
    broken = next((at for at, value in points if value is not None and not math.isfinite(value)), None)
    values = [value for _, value in points if value is not None and math.isfinite(value)]
    middle = statistics.median(values) if values else 0.0
    return Guilt(name, broken, max(values[-RECENT:]) / middle if middle > 0 else 0.0)


def message(contents: Contents) -> dict[str, Any]:
    """The body of ``POST /api/v1/runs/{run_id}/recordings``. Its id follows from what is in it, so that a repeat of the
    same upload is seen as one, and a later one of the same process is not."""
    what = incident(contents)
    steps = [rows for rows in contents.rows if rows.table.name == "steps"]
    ends = [rows.sequences[-1] if rows.sequences else 0 for rows in contents.rows]
    began = contents.header["began_at"]
    body = {
        "schema": 1,
        "id": str(uuid.uuid5(_NAMESPACE, f"{contents.header['id']}-{ends}")),
        "rank": contents.header["rank"],
        "reason": what.kind,
        "step": what.step,
        "layer": what.layer and what.layer[:MAX_NAME],
        "recorded_at": max([rows.column("started")[-1] for rows in steps if rows.payloads], default=began),
        "tables": [_table(rows, parameters=True) for rows in contents.rows if rows.table.columns],
        "notes": [finite(note) for note in notes(contents)],
    }
    if len(json.dumps(body)) > MAX_MESSAGE_BYTES:
        body["tables"] = [_table(rows, parameters=False) for rows in contents.rows if rows.table.columns]
    return body


def _table(rows: Rows, *, parameters: bool) -> dict[str, Any]:
    columns = rows.table.columns
    return {
        "name": rows.table.name,
        "optimizer": rows.table.optimizer[:MAX_NAME],
        "rows": len(rows.payloads),
        "columns": {column.name: finite(rows.column(column.name)) for column in columns if column.members is None},
        "series": [
            _series(rows, column)
            for column in columns
            if column.members is not None and (parameters or not column.name.startswith("parameter_"))
        ],
    }


def _series(rows: Rows, column: Column) -> dict[str, Any]:
    """One series: member by member, and of each member's values first all first bytes, then all second ones, and so on:
    in this order what is alike stands together, and compresses. Parameters travel in two bytes."""
    members = column.members or ()
    stored = 4 if column.type == "float32" else 2
    kept = range(2, 4) if stored == 4 and column.name.startswith("parameter_") else range(stored)
    matrix, stride = rows.matrix(column.name), stored * len(members)
    planes = b"".join(matrix[stored * m + byte :: stride] for m in range(len(members)) for byte in kept)
    return {
        "name": column.name,
        "type": "float32" if len(kept) == 4 else "bfloat16",
        "members": [name[:MAX_NAME] for name in members],
        "data": base64.b64encode(zlib.compress(planes)).decode(),
    }
