"""The pager: sends what is due in `pages` to Alertmanager, apart from every request, until one has taken it.

A row is claimed by moving its `due_at` ahead, in a transaction of its own: two replicas do not send the same page, and
what a process that died had claimed comes due again. Should a page be sent twice all the same, it is the same alert to
Alertmanager, and pages nobody twice.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from pydantic import JsonValue
from sqlalchemy import select
from sqlalchemy.orm import Session

from optwatch_server.catalogue import SENDS
from optwatch_server.database.engine import Database
from optwatch_server.database.models import PageRow, RunRow
from optwatch_server.metrics.fleet import RECENT_SECONDS, observe_time_to_page
from optwatch_server.runs import accounting
from optwatch_server.settings import Settings

from . import due as paging
from .alertmanager import AlertmanagerError, post

BATCH = 100
POLL_SECONDS = 2.0
"""Seconds between looks for what is due; an event that arrives here does not wait for the next one."""
CLAIM_SECONDS = 60.0
"""How long a claim holds: longer than a batch takes, one page at a time, at an Alertmanager that does not answer."""
LONGEST_BACKOFF_SECONDS = 30.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Claim:
    """A page this process sends: its key, which version of it, and the alert. Times are Unix seconds."""

    run_id: str
    alertname: str
    version: int
    attempts: int
    starts_at: float
    first: bool
    """Whether no Alertmanager has taken it yet."""
    alert: JsonValue


class Pager:
    """Sends pages to `settings.alertmanagers`. `clock` gives Unix seconds; `send` can be called without the thread."""

    def __init__(self, database: Database, clock: Callable[[], float], settings: Settings) -> None:
        self._database = database
        self._clock = clock
        self._settings = settings
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    @property
    def enabled(self) -> bool:
        """Whether there is an Alertmanager to send to; without one no page is asked for."""
        return bool(self._settings.alertmanagers)

    def send(self) -> int:
        """Send what is due now; return how many pages an Alertmanager took.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: the database did not answer; what was sent may be sent again.
        """
        taken = 0
        while True:
            with self._database.read() as session:
                if (
                    session.scalars(select(PageRow.run_id).where(PageRow.due_at <= self._clock()).limit(1)).first()
                    is None
                ):
                    return taken
            with self._database.write() as session:
                claims, looked_at = self._claim(session)
            if claims:
                taken += self._send(claims)
            if looked_at < BATCH:
                return taken

    def _claim(self, session: Session) -> tuple[list[Claim], int]:
        """Claim pages that are due; return them, and how many were looked at, some of which were over."""
        now = self._clock()
        due = select(PageRow).where(PageRow.due_at <= now).order_by(PageRow.due_at).limit(BATCH)
        pages = session.scalars(due.with_for_update(skip_locked=True)).all()
        ids = {page.run_id for page in pages}
        runs = {run.id: run for run in session.scalars(select(RunRow).where(RunRow.id.in_(ids)))}
        claims = []
        for page in pages:
            run = runs[page.run_id]
            if _is_over(page, run, now):
                # No word to Alertmanager: the page ends where it was said to, or where the rule says so before.
                session.delete(page)
                continue
            page.due_at = now + CLAIM_SECONDS
            claims.append(
                Claim(
                    page.run_id,
                    page.alertname,
                    page.version,
                    page.attempts,
                    page.starts_at,
                    page.accepted_at is None,
                    cast("JsonValue", paging.alert(page, run, self._settings, now)),
                )
            )
        return claims, len(pages)

    def _send(self, claims: Sequence[Claim]) -> int:
        """Send claimed pages together, and one by one where they were refused together; write down what came of it."""
        results: Counter[str] = Counter()
        accepted = self._post(claims, results)
        if not accepted and len(claims) > 1 and results["refused"]:
            taken = [claim for claim in claims if self._post([claim], results)]
        else:
            taken = list(claims) if accepted else []
        now = self._clock()
        with self._database.write() as session:
            for claim in sorted(claims, key=lambda claim: (claim.run_id, claim.alertname)):
                _settle(session, claim, claim in taken, now)
            # After the pages, as whoever holds a total must not wait for anything else.
            for claim in taken:
                if claim.first:
                    observe_time_to_page(session, "direct", now - claim.starts_at)
            accounting.add(session, {(accounting.SENDS, "", name): results[name] for name in SENDS if results[name]})
        return len(taken)

    def _post(self, claims: Sequence[Claim], results: Counter[str]) -> bool:
        """Send to every Alertmanager, as they share no alerts with each other; return whether one took them."""
        accepted = False
        for url in self._settings.alertmanagers:
            try:
                post(url, [claim.alert for claim in claims])
            except AlertmanagerError as error:
                results["failed"] += 1
                results["refused"] += error.refused
                logger.warning("%d pages were not sent and will be tried again: %s", len(claims), error)
            else:
                results["ok"] += 1
                accepted = True
        return accepted

    def wake(self) -> None:
        """Look for what is due at once; called where a page was asked for, after its transaction."""
        self._wake.set()

    def start(self) -> None:
        """Start the thread that sends, where there is an Alertmanager."""
        if self.enabled:
            self._thread = threading.Thread(target=self._run, name="optwatch-pager", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop the thread and wait for it, at most ten seconds; what is not sent yet is sent after the next start."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                self.send()
            except Exception:  # a pager that died would page nobody, ever again
                logger.exception("sending pages failed; the next try is in %g s", POLL_SECONDS)
            self._wake.wait(POLL_SECONDS)


def _is_over(page: PageRow, run: RunRow, now: float) -> bool:
    """Return whether there is nothing left to page: the lost run was heard of again, or was lost a day ago.

    The page of an event is never over before an Alertmanager has taken it, however late that is.
    """
    return page.alertname == paging.LOST and (run.status != "lost" or run.status_since <= now - RECENT_SECONDS)


def _settle(session: Session, claim: Claim, accepted: bool, now: float) -> None:
    """Write down whether a claimed page was taken, and when it is sent again."""
    key = (PageRow.run_id == claim.run_id, PageRow.alertname == claim.alertname)
    page = session.scalars(select(PageRow).where(*key).with_for_update()).one_or_none()
    if page is None:
        return
    if not accepted:
        page.attempts = claim.attempts + 1
        page.due_at = now + min(2.0**claim.attempts, LONGEST_BACKOFF_SECONDS)
        return
    page.attempts, page.accepted_at, page.ends_at = 0, now, now + paging.seconds(page)
    again = page.alertname == paging.LOST or page.version != claim.version
    page.due_at = now + paging.REPEAT_SECONDS if again else None
