"""The parts of one server, wired once and handed to the routes: nothing global, everything injectable."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from prometheus_client import CollectorRegistry

from optwatch_server.database import Database
from optwatch_server.fleet import Fleet
from optwatch_server.metrics import Requests, ServerCollector
from optwatch_server.pager import Pager
from optwatch_server.settings import Settings
from optwatch_server.shipped import shipped
from optwatch_server.store import Store, default_url
from optwatch_server.sweeper import Sweeper


class Service:
    """One server's database, store, clock (Unix seconds), settings, sweeper, pager, metrics and runbooks."""

    def __init__(
        self,
        database: Database,
        *,
        clock: Callable[[], float] = time.time,
        registry: CollectorRegistry | None = None,
        runbooks: Path | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.database = database
        self.clock = clock
        self.settings = Settings() if settings is None else settings
        rate = self.settings.cost_per_device_hour
        self.store = Store(self.settings.recordings_url or default_url(database))
        self.pager = Pager(database, clock, self.settings)
        self.sweeper = Sweeper(database, clock, cost_per_device_hour=rate, pager=self.pager)
        self.requests = Requests()
        self.registry = CollectorRegistry() if registry is None else registry
        self.registry.register(ServerCollector(Fleet(database, clock, rate), self.sweeper, self.requests))
        self.runbooks = shipped("runbooks") if runbooks is None else runbooks
