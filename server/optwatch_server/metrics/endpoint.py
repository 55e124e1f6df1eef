"""/metrics: the server's own health, and the fleet as it is when Prometheus asks."""

from __future__ import annotations

import bisect
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import version

from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from optwatch_server.catalogue import DURATION_BUCKETS, METHODS
from optwatch_server.runs.sweeper import Sweeper

from .families import counter, cumulative, gauge, histogram
from .fleet import Fleet

logger = logging.getLogger(__name__)


class Requests:
    """Counts and durations of requests; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._buckets = [0] * (len(DURATION_BUCKETS) + 1)
        self._seconds = 0.0

    def observe(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one request that took `seconds`."""
        with self._lock:
            self._counts[route, method if method in METHODS else "other", str(status)] += 1
            self._buckets[bisect.bisect_left(DURATION_BUCKETS, seconds)] += 1
            self._seconds += seconds

    def collect(self) -> Iterator[Family]:
        """Give the two families as they are now."""
        with self._lock:
            counts, buckets, seconds = dict(self._counts), list(self._buckets), self._seconds
        total = counter("optwatch_server_requests_total")
        for labels, count in sorted(counts.items()):
            total.add_metric(labels, count)
        yield total
        durations = histogram("optwatch_server_request_duration_seconds")
        durations.add_metric([], cumulative(DURATION_BUCKETS, buckets), seconds)
        yield durations


class RequestMetrics:
    """ASGI middleware that observes every request under its route template: a raw path would make endless series."""

    def __init__(self, app: ASGIApp, requests: Requests) -> None:
        self._app = app
        self._requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102 - ASGI
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 500  # what the client gets where an exception ends the request

        async def observe(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, observe)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._requests.observe(route, scope["method"], status, time.perf_counter() - began)


class ServerCollector(Collector):
    """Everything in `optwatch_server.catalogue`, for one registry. The database is read at each scrape."""

    def __init__(self, fleet: Fleet, sweeper: Sweeper, requests: Requests) -> None:
        self._fleet = fleet
        self._sweeper = sweeper
        self._requests = requests

    def describe(self) -> Iterable[Family]:
        """Give nothing, so that registering does not read the database."""
        return ()

    def collect(self) -> Iterator[Family]:
        """Give the families; without a database those of the server's own health remain."""
        info = gauge("optwatch_server_info")
        info.add_metric([version("optwatch")], 1)
        yield info
        yield from self._requests.collect()
        swept = gauge("optwatch_server_last_sweep_timestamp_seconds")
        swept.add_metric([], self._sweeper.last_sweep_at)
        yield swept
        errors = counter("optwatch_server_sweep_errors_total")
        errors.add_metric([], self._sweeper.errors)
        yield errors
        try:
            fleet = self._fleet.families()
        except SQLAlchemyError:
            logger.exception("the fleet's metrics are left out of this scrape: the database does not answer")
            return
        yield from fleet
