"""The reporter: one thread that tells the server of the run, its heartbeats and events, and never holds training up."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from optwatch.events import MAX_TEXT, Event
from optwatch.faults import Faults
from optwatch.lifecycle.run import Run
from optwatch.settings import Settings

from .client import EVENTS_PATH, RUNS_PATH, Client, RefusedError, finite
from .retry import RETRY_SECONDS, Retry
from .spool import Message, Spool, default_directory, orphans

logger = logging.getLogger("optwatch")

BATCH = 200
"""Events in one request, at most."""
BACKLOG = 10_000
"""Events that may wait for the reporter's thread to put them on disk."""


class Reporter:
    """Reports one run to one server. `submit` only appends to a queue; everything else happens on its own thread.

    Messages (the run, its events, its end) are put on disk first and delivered in order when the server answers.
    Heartbeats are not kept, since an old one says nothing, and do not wait for messages that cannot be delivered.
    """

    def __init__(
        self,
        server: str,
        run: Run,
        settings: Settings,
        faults: Faults,
        latest: Callable[[], dict[str, Any]],
        metrics_port: int | None = None,
    ) -> None:
        self._server = server.rstrip("/")
        self._run = run
        self._settings = settings
        self._faults = faults
        self._latest = latest
        self._queue: deque[tuple[str, dict[str, Any]]] = deque()
        self._wake = threading.Event()
        self._pid = os.getpid()
        self._closing = False
        self._deadline = math.inf
        self._sequence = itertools.count(1)
        self._dropped_in_queue = 0
        self._dropped_in_spool = 0
        self._promise: tuple[float, str] | None = None
        self._beat_now = False
        self.undelivered = 0
        """Messages that wait for the server."""
        self._metrics_port = metrics_port
        self._target: str | None = None
        self._client = Client(server)
        self._directory = Path(settings.spool_directory or default_directory())
        if run.rank == 0:
            self.submit(RUNS_PATH, run.message())
        self._thread = threading.Thread(target=self._work, name="optwatch-reporter", daemon=True)
        self._thread.start()

    @property
    def run_url(self) -> str:
        """The run's page on the server."""
        return f"{self._server}/runs/{quote(self._run.id)}"

    @property
    def dropped(self) -> int:
        """Messages that the server will never have."""
        return self._dropped_in_queue + self._dropped_in_spool

    def event(self, event: Event) -> None:
        """Report one event. Returns at once."""
        self.submit(EVENTS_PATH, event.message(self._run.id, self._run.rank, next(self._sequence)))

    def promise(self, promise: tuple[float, str] | None) -> None:
        """Tell the server at once that the next heartbeat may take as many seconds, and why; None takes it back."""
        self._promise = promise
        self._beat_now = True
        self._wake.set()

    def finish(self, status: str, reason: str | None, final_step: int | None, cause: str | None = None) -> None:
        """Report the run's end. Returns at once. Only rank 0 speaks for the run."""
        reason = reason and reason[:MAX_TEXT]
        body = {
            "schema": 1,
            "status": status,
            "finished_at": time.time(),
            "reason": reason,
            "cause": cause,
            "final_step": final_step,
        }
        if self._run.rank == 0:
            self.submit(f"/api/v1/runs/{quote(self._run.id)}/finish", body)

    def submit(self, path: str, body: dict[str, Any]) -> None:
        """Queue one message. Returns at once, raises nothing; an event beyond the backlog is dropped and counted."""
        if os.getpid() != self._pid:
            return  # a forked child has no thread of ours, and its parent reports the run
        if path == EVENTS_PATH and len(self._queue) >= BACKLOG:
            self._dropped_in_queue += 1
            return
        self._queue.append((path, body))
        self._wake.set()

    def close(self, timeout: float) -> None:
        """Deliver what is left, for at most `timeout` seconds; the rest stays on disk for the next run to deliver."""
        if os.getpid() != self._pid:
            return
        self._deadline = time.monotonic() + timeout
        self._closing = True
        self._wake.set()
        self._thread.join(timeout + 0.5)

    def _work(self) -> None:
        try:
            name = f"{self._run.id}-{self._run.rank}-{uuid.uuid4().hex[:8]}.sqlite3"
            limit = self._settings.spool_max_bytes
            run = finite(self._run.message()) if self._run.rank == 0 else None
            spool = Spool(self._directory / name, self._server, limit, self._faults, run)
        except Exception as error:  # noqa: BLE001 - nothing is reported, and the count says so
            self._faults.record("reporter", error)
            return
        messages, beats = Retry(), Retry()
        inherited = closing = False
        while True:
            self._wake.clear()
            if self._closing and not closing:
                closing = inherited = True  # what others left is not worth the time of this process's end
                messages.due = 0.0  # the last chance is taken at once, however long the wait was to be
            left = self._fill(spool)
            if time.monotonic() >= messages.due and (left or not inherited):
                try:
                    self._deliver(spool)
                    if not inherited:
                        self._inherit(spool)
                        inherited = True
                    messages.succeeded()
                except Exception as error:  # noqa: BLE001 - the thread must go on
                    self._faults.record("reporter", error)
                    messages.failed(0.2 if closing else RETRY_SECONDS[1])
            if not closing and (self._beat_now or time.monotonic() >= beats.due):
                self._beat_now = False
                interval = self._settings.heartbeat_interval_seconds
                try:
                    self._beat()
                    beats.succeeded(interval)
                except RefusedError as error:
                    self._faults.record("reporter", error)
                    beats.succeeded(interval)
                except Exception as error:  # noqa: BLE001
                    self._faults.record("reporter", error)
                    beats.failed(interval)
            left = self._fill(spool)
            if closing and (not left or time.monotonic() >= self._deadline):
                break
            due = [messages.due] if left or not inherited else []
            due.append(self._deadline if closing else beats.due)
            self._wake.wait(max(0.0, min(due) - time.monotonic()))
        self._close(spool)

    def _fill(self, spool: Spool) -> int:
        """Put what is queued on disk; how many messages are due."""
        while self._queue:
            path, body = self._queue.popleft()
            try:
                spool.append(path, finite(body), vital=path != EVENTS_PATH)
            except Exception as error:  # noqa: BLE001 - one message that cannot be written must not stop the others
                self._faults.record("spool", error)
                self._dropped_in_spool += 1
        self._dropped_in_spool += spool.dropped
        spool.dropped = 0
        try:
            self.undelivered = len(spool)
            return self.undelivered
        except Exception as error:  # noqa: BLE001 - a disk that fails under an open file
            self._faults.record("spool", error)
            return 0

    def _close(self, spool: Spool) -> None:
        try:
            lost = spool.close()
        except Exception as error:  # noqa: BLE001
            self._faults.record("spool", error)
            return
        if lost:
            self._dropped_in_spool += lost
            logger.warning(
                "optwatch: %d messages for %s are lost: the server did not answer and %s could not be written",
                lost,
                self._server,
                self._directory,
            )

    def _deliver(self, spool: Spool) -> None:
        """Send everything in the spool, in order; neighbouring events go as one request."""
        while time.monotonic() < self._deadline and (messages := spool.first(BATCH)):
            self._send(spool, list(takewhile(lambda m: m.path == EVENTS_PATH, messages)) or messages[:1])
            if not spool.inherited:
                self._fill(spool)

    def _send(self, spool: Spool, messages: list[Message]) -> None:
        """Send one request's worth and acknowledge it.

        Raises:
            OSError: the server does not have them; they stay.
        """
        try:
            path, body = messages[0].path, messages[0].body
            if path == EVENTS_PATH:
                body = {"schema": 1, "events": [message.body for message in messages]}
            try:
                known = not self._post(path, body).get("unknown_runs")
            except FileNotFoundError:
                if path in (RUNS_PATH, EVENTS_PATH):
                    raise
                known = False
            if not known:
                # The server has lost its database, or never had this run: tell it, and say the rest again.
                self._make_known(spool)
                if self._post(path, body).get("unknown_runs"):
                    raise OSError(f"POST {path}: the server has forgotten run {self._run.id} at once")
        except RefusedError as error:
            if len(messages) > 1:  # one bad or too many: each by itself, so that one does not cost the others
                for message in messages:
                    self._send(spool, [message])
                return
            self._faults.record("reporter", error)
            self._dropped_in_spool += 1
        spool.acknowledge(messages)

    def _make_known(self, spool: Spool) -> None:
        if spool.run is not None:
            self._post(RUNS_PATH, spool.run)
        elif spool.inherited:
            raise RefusedError(f"{spool.path.name}: the server does not know this run, and nobody is left to tell it")
        else:
            raise OSError(f"the server does not know run {self._run.id}, of which rank 0 is to tell it")

    def _inherit(self, own: Spool) -> None:
        """Deliver what processes that died on this machine could not."""
        for spool in orphans(self._directory, self._server, self._settings.spool_max_bytes, self._faults):
            try:
                self._deliver(spool)
            finally:
                spool.close()
            self._deliver(own)

    def _beat(self) -> None:
        if self._target is None and self._metrics_port is not None:
            with contextlib.suppress(OSError):  # a name that only a proxy can resolve: the beat itself may arrive
                self._target = f"{self._settings.advertise or self._own_address()}:{self._metrics_port}"
        beat = {
            "run_id": self._run.id,
            "rank": self._run.rank,
            "sent_at": time.time(),
            "interval_seconds": self._settings.heartbeat_interval_seconds,
            "metrics_target": self._target,
            **self._latest(),
        }
        if self._promise is not None:
            beat["promise_seconds"], beat["promise_reason"] = self._promise
        body = {"schema": 1, "beats": [beat]}
        # Only rank 0 speaks for the run: until it has, the beats of other ranks tell nobody anything.
        if self._post("/api/v1/heartbeats", body).get("unknown_runs") and self._run.rank == 0:
            self._post(RUNS_PATH, self._run.message())
            self._post("/api/v1/heartbeats", body)

    def _own_address(self) -> str:
        """This machine's address towards the server. Connecting a datagram socket sends nothing."""
        url = urlsplit(self._server)
        family, kind, protocol, _, address = socket.getaddrinfo(
            url.hostname, url.port or (443 if url.scheme == "https" else 80), type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            host = str(probe.getsockname()[0])
        return f"[{host}]" if ":" in host else host

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Post one body, within the time that is left while closing. Raises as `Client.post`."""
        timeout = self._settings.request_timeout_seconds
        if self._closing:
            timeout = max(0.1, min(timeout, self._deadline - time.monotonic()))
        return self._client.post(path, body, timeout)
