"""Refuses bodies that are too large or encoded before anything parses them."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .problems import Problem

MAX_BODY_BYTES = 1024 * 1024
MAX_RECORDING_BYTES = 4 * 1024 * 1024
"""Of a body that is sent to ``.../recordings``: a black box is as large as it is, and cannot be sent in batches."""


class BodyLimit:
    """ASGI middleware that reads the body itself, and so holds the limit whatever length the client claimed."""

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102 - ASGI
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        most = MAX_RECORDING_BYTES if scope["path"].endswith("/recordings") else self._max_bytes
        headers = dict(scope["headers"])
        encoding = headers.get(b"content-encoding", b"identity").decode("latin-1")
        if encoding != "identity":
            problem = Problem(415, f"the content encoding {encoding!r} is not supported: send the body as it is")
            await problem.response()(scope, receive, send)
            return
        length = headers.get(b"content-length", b"")
        body = b"" if length.isdigit() and int(length) > most else await self._read(receive, most)
        if body is None:
            return  # the client has gone
        if len(body) > most or (not body and length.isdigit() and int(length) > most):
            said = f"{int(length)} bytes" if length.isdigit() else f"more than {most} bytes"
            detail = f"the body has {said}, and {most} is the limit: send smaller batches"
            await Problem(413, detail).response()(scope, receive, send)
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive, most: int) -> bytes | None:
        """Return the body, cut just beyond the limit, or None when the client went away in the middle of it."""
        body = bytearray()
        while len(body) <= most:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        return bytes(body)
