"""The agent's way of speaking to a server: JSON over HTTP, with every failure told apart that has to be."""

from __future__ import annotations

import http.client
import json
import math
import urllib.error
import urllib.request
from importlib.metadata import version
from typing import Any

RUNS_PATH = "/api/v1/runs"
EVENTS_PATH = "/api/v1/events"
REFUSALS = (400, 413, 422)
"""Answers that speak about the message, which sending it again would not change. Any other one that is no 2xx speaks
about the server or what is in front of it (a login, an ingress without a backend), and that changes."""
MAX_ANSWER_BYTES = 2**20


class RefusedError(Exception):
    """The server refused a message for good: sending it again would not help."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would follow a redirected POST with a GET, and the answer to that looks like success."""

    def redirect_request(self, *arguments: Any) -> None:
        """Follow nothing."""


class Client:
    """Speaks to the server at one base URL. Keeps no connection; each call blocks for at most its timeout."""

    def __init__(self, server: str) -> None:
        self.server = server.rstrip("/")
        self._open = urllib.request.build_opener(_NoRedirect).open
        self._headers = {"Content-Type": "application/json", "User-Agent": f"optwatch/{version('optwatch')}"}

    def post(self, path: str, body: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Post one body and return the answer. `timeout` is in seconds; what is not finite travels as text.

        Raises:
            RefusedError: the server refused this body (`REFUSALS`).
            FileNotFoundError: it answered 404.
            OSError: it did not answer in time, or not with 2xx and a JSON object.
        """
        return self._ask("POST", path, timeout, json.dumps(finite(body), allow_nan=False).encode())

    def get(self, path: str, timeout: float) -> dict[str, Any]:
        """Get one object. Raises as `post`."""
        return self._ask("GET", path, timeout)

    def _ask(self, method: str, path: str, timeout: float, data: bytes | None = None) -> dict[str, Any]:
        request = urllib.request.Request(  # noqa: S310 - attach() takes http and https only
            self.server + path, data=data, headers=self._headers, method=method
        )
        what = f"{method} {path}"
        try:
            with self._open(request, timeout=timeout) as response:
                answer = json.loads(response.read(MAX_ANSWER_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                text = f"{what}: the server answered {error.code}"
                if error.code in REFUSALS:
                    raise RefusedError(f"{text}: {_text(error)}") from None
                if 300 <= error.code < 400:
                    text += f", to go to {error.headers.get('Location')}: give attach(server=...) that address"
                raise (FileNotFoundError if error.code == 404 else OSError)(text) from None
        except http.client.HTTPException as error:
            raise OSError(f"{what}: the answer is no HTTP: {error!r}") from None
        except ValueError as error:
            raise OSError(f"{what}: the answer is no JSON: {error}") from None
        if not isinstance(answer, dict):
            raise OSError(f"{what}: the answer is no JSON object: {str(answer)[:200]}")
        return answer


def _text(error: urllib.error.HTTPError) -> str:
    """What the server says of an error; nothing where the connection breaks before it has."""
    try:
        return error.read(2000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


def finite(value: Any) -> Any:
    """The same JSON value with NaN and Inf as the strings that the wire has for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
