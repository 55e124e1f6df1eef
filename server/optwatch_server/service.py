"""The parts of one server, wired once and handed to the routes: nothing global, everything injectable."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from prometheus_client import CollectorRegistry

from .database.engine import Database
from .metrics.endpoint import Requests, ServerCollector
from .metrics.fleet import Fleet
from .paging.pager import Pager
from .runs.store import Store, default_url
from .runs.sweeper import Sweeper
from .settings import Settings
from .shipped import shipped


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
