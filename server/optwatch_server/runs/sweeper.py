"""The sweeper: calls a run lost when a rank of it broke its promise to be heard again, and keeps the accounts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from sqlalchemy import select, update

from optwatch_server.database.engine import Database
from optwatch_server.database.models import RunRow
from optwatch_server.paging import due as paging
from optwatch_server.paging.pager import Pager

from . import accounting
from .recovery import Promise, promises

SWEEP_SECONDS = 2.0
"""Seconds from one sweep to the next: with a grace of 25 s at a 10 s interval, a lost run is seen within 30 s."""
ABSENCE_SECONDS = 15.0
"""A gap between two successful sweeps from which on the server counts as having been away itself."""

logger = logging.getLogger(__name__)


class Sweeper:
    """Judges all running runs, again and again.

    `clock` gives Unix seconds; `sweep` can be called without the thread, which is how tests move time.
    """

    def __init__(
        self,
        database: Database,
        clock: Callable[[], float],
        every_seconds: float = SWEEP_SECONDS,
        cost_per_device_hour: float | None = None,
        pager: Pager | None = None,
    ) -> None:
        self._database = database
        self._clock = clock
        self._cost_per_device_hour = cost_per_device_hour
        self._pager = pager if pager is not None and pager.enabled else None
        self._every_seconds = every_seconds
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.watching_since = clock()
        """Since when the server could have heard every agent without a break."""
        self.last_sweep_at = self.watching_since
        """When the last sweep that worked was, or when the server started."""
        self.errors = 0
        """Sweeps that failed since the start."""

    def sweep(self) -> list[str]:
        """Call lost what is lost, bring the totals up to date, and return the ids of the lost runs.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: the database did not answer; the time until it does counts as absence.
        """
        now = self._clock()
        # A stopped laptop, a database that was away or a clock that was set: nobody could be heard in that time either.
        if not 0 <= now - self.last_sweep_at <= ABSENCE_SECONDS:
            self.watching_since = now
        with self._database.read() as session:
            suspects = {p.run_id for p in promises(session, now) if p.broken(now, self.watching_since)}
        lost = self._judge(suspects, now) if suspects else []
        self.last_sweep_at = now
        for run_id in lost:
            logger.warning("run %s is lost", run_id)
        self._count(now)  # last: accounts that cannot be kept must not keep runs from being called lost
        return lost

    def _judge(self, suspects: set[str], now: float) -> list[str]:
        """Look at the suspects again with their rows locked: a beat may have come in between."""
        lost: dict[str, list[Promise]] = {}
        with self._database.write() as session:
            lock = select(RunRow.id).where(RunRow.id.in_(suspects)).order_by(RunRow.id)
            session.execute(lock.with_for_update(key_share=True)).all()
            for promise in promises(session, now, suspects):
                if promise.broken(now, self.watching_since):
                    lost.setdefault(promise.run_id, []).append(promise)
            for run_id, broken in lost.items():
                others = f"; {len(broken)} ranks are silent" if len(broken) > 1 else ""
                reason = broken[0].reason() + others
                session.execute(
                    update(RunRow)
                    .where(RunRow.id == run_id, RunRow.status == "running")
                    .values(status="lost", status_since=now, lost_at=now, lost_reason=reason)
                )
                if self._pager is not None:
                    paging.ask_for_lost(session, run_id, reason, now)
        if lost and self._pager is not None:
            self._pager.wake()
        return list(lost)

    def _count(self, now: float) -> None:
        """Bring the totals up to date with what became of runs."""
        with self._database.read() as session:
            if not accounting.is_uncounted(session):
                return
        with self._database.write() as session:  # at most a batch: the next sweep does the rest
            accounting.count(session, now, self._cost_per_device_hour)

    def start(self) -> None:
        """Start the thread that sweeps."""
        self._thread = threading.Thread(target=self._run, name="optwatch-sweeper", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread and wait for it, at most ten seconds; repeating it changes nothing."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._stop.wait(self._every_seconds):
            try:
                self.sweep()
            except Exception:  # a sweeper that died would call nothing lost, ever again
                self.errors += 1
                logger.exception("a sweep failed; the next one is in %g s", self._every_seconds)
