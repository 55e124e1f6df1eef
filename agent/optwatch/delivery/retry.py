"""When to try again what failed."""

from __future__ import annotations

import random
import time

RETRY_SECONDS = (0.5, 30.0)
"""First and longest wait after a request that failed; it doubles in between."""


class Retry:
    """When something that fails may be tried again: after waits that double, with jitter, so that a fleet does not come
    back in one breath."""

    def __init__(self) -> None:
        self.due = 0.0
        """On the monotonic clock."""
        self._failures = 0
        # Not the module's functions: their state is the user's, and drawing from it would change how training shuffles.
        self._random = random.Random()  # noqa: S311 - jitter protects nothing

    def succeeded(self, pause: float = 0.0) -> None:
        """Next time `pause` seconds from now."""
        self._failures = 0
        self.due = time.monotonic() + pause

    def failed(self, most: float = RETRY_SECONDS[1]) -> None:
        """Next time after a longer wait than before, of at most about `most` seconds."""
        first, longest = RETRY_SECONDS
        pause = min(longest, most, first * 2.0 ** min(self._failures, 10))
        self._failures += 1
        self.due = time.monotonic() + pause * self._random.uniform(0.7, 1.3)
