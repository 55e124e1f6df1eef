"""Faults of the agent itself: counted, logged once for each place and kind, and never raised into training."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter

logger = logging.getLogger("optwatch")


class Faults:
    """Counts faults by the part that failed. Safe to call from any thread; a call never raises and never waits."""

    def __init__(self) -> None:
        # By part and thread: each entry is written by one thread only, so that no count is lost and no lock is needed
        # (one that another thread holds at a fork would hang the child).
        self._counts: dict[tuple[str, int], int] = {}
        self._logged: set[tuple[str, str]] = set()

    @property
    def counts(self) -> dict[str, int]:
        """Faults so far by the part that failed; parts without any are absent."""
        total: Counter[str] = Counter()
        for (where, _), count in list(self._counts.items()):
            total[where] += count
        return dict(total)

    def record(self, where: str, error: BaseException) -> None:
        """Count one fault of part `where` (a value of label ``where`` of optwatch_agent_errors_total)."""
        key = (where, threading.get_ident())
        self._counts[key] = self._counts.get(key, 0) + 1
        kind = (where, type(error).__name__)
        if kind in self._logged or len(self._logged) >= 1000:
            return
        self._logged.add(kind)
        # A broken log handler or repr of the user's must not reach training either.
        with contextlib.suppress(Exception):
            logger.warning(
                "optwatch: a fault in its %s, which training does not notice: %r (said once; all are counted in "
                "optwatch_agent_errors_total)",
                where,
                error,
                exc_info=error,
            )
