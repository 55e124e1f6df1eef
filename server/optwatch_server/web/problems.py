"""Errors as RFC 9457 problem details: each names the field, the value received and the fix."""

from __future__ import annotations

import json
from collections.abc import Sequence
from http import HTTPStatus
from typing import TypedDict

from fastapi.exceptions import RequestValidationError
from pydantic import JsonValue
from starlette.requests import Request
from starlette.responses import Response

MEDIA_TYPE = "application/problem+json"
_MAX_ERRORS = 20
_MAX_SHOWN = 120


class FieldError(TypedDict):
    """One field that was refused."""

    field: str
    value: JsonValue
    problem: str


class Problem(Exception):  # noqa: N818 - RFC 9457 calls it a problem
    """Raised anywhere below a route to answer with a problem document."""

    def __init__(self, status: int, detail: str, errors: Sequence[FieldError] = ()) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.errors = tuple(errors)

    def body(self) -> bytes:
        """Return the problem document as JSON."""
        document: dict[str, object] = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
        }
        if self.errors:
            document["errors"] = self.errors
        return json.dumps(document, allow_nan=False).encode()

    def response(self) -> Response:
        """Return the answer that carries this problem."""
        headers = {"Retry-After": "5"} if self.status == HTTPStatus.SERVICE_UNAVAILABLE else None
        return Response(self.body(), self.status, headers, MEDIA_TYPE)


def unknown_run(run_id: str) -> Problem:
    """Return the problem of a run that nobody created."""
    return Problem(404, f"no run {run_id!r} is known here: create it with POST /api/v1/runs, or check the id")


def _path(location: Sequence[int | str]) -> str:
    """Return ``beats[0].rank`` for ``("body", "beats", 0, "rank")``."""
    text = ""
    for part in location[1:] if location and location[0] in ("body", "query", "path") else location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "the body"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"


def from_validation(error: RequestValidationError) -> Problem:
    """Return the problem for a request that is not what the wire contract says."""
    fields: list[FieldError] = []
    for entry in error.errors():
        if entry["type"] == "json_invalid":
            reason = entry.get("ctx", {}).get("error", "it cannot be parsed")
            return Problem(400, f"the body is not JSON ({reason}): send one JSON object")
        if isinstance(entry.get("input"), bytes):
            return Problem(422, "the body is not marked as JSON: send it with Content-Type: application/json")
        problem = str(entry["msg"]).removeprefix("Value error, ")
        fields.append({"field": _path(entry["loc"]), "value": _shown(entry.get("input")), "problem": problem})
    first = fields[0]
    missing = first["problem"] == "Field required"
    detail = (
        f"{first['field']} is missing: send it, as docs/wire.md says"
        if missing
        else f"{first['field']} is {first['value']}: {first['problem']}"
    )
    if len(fields) > 1:
        detail += f" (and {len(fields) - 1} more)"
    return Problem(422, detail, fields[:_MAX_ERRORS])


def wants_page(request: Request) -> bool:
    """Return whether a person asked: an address outside the API, by something that reads HTML."""
    path = request.url.path
    machine = path.startswith("/api/") or path in ("/metrics", "/healthz", "/readyz")
    return not machine and "text/html" in request.headers.get("accept", "")
