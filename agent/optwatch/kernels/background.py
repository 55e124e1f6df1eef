"""What a process makes once, on a thread in the background, and goes on without where it cannot be made."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
logger = logging.getLogger("optwatch")


class Background(Generic[T]):
    """Something that takes seconds to make. `made` is None until it is there, and for ever where making it raises.

    Args:
        name: of the thread, behind ``optwatch-``.
        make: makes it; may raise anything.
        without: what is done where there is none, for the log.
    """

    def __init__(self, name: str, make: Callable[[], T], without: str) -> None:
        self.made: T | None = None
        self._name, self._make, self._without = name, make, without
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def prepare(self) -> threading.Thread:
        """Begin to make it, the first time; the thread that does."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"optwatch-{self._name}", daemon=True)
                self._thread.start()
            return self._thread

    def _run(self) -> None:
        try:
            self.made = self._make()
            logger.debug("optwatch: compiled code is there: %s", self._name)
        except Exception as error:  # noqa: BLE001 - never hurt the run
            logger.debug("optwatch: no compiled code (%s), %s: %s", self._name, self._without, error)
