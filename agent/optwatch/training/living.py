"""Objects of some class that are alive in this process, whoever holds them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")
_NO_SWITCH_SECONDS = 3600.0


def living(*kinds: type[T]) -> list[T]:
    """Every object that the garbage collector knows of one of these classes, or of one derived from it.

    Takes about 0.1 s for a million objects, in which no other thread runs: some of what the collector knows is still
    being made by them (a tuple half filled), and Python refuses to go on with it while anybody else holds it.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_NO_SWITCH_SECONDS)
    try:
        # Nothing here runs code of anybody's: type() and not isinstance(), which asks a proxy for its __class__.
        wanted = _derived(kinds)
        objects = gc.get_objects()
        found = [candidate for candidate in objects if type(candidate) in wanted]
        del objects
    finally:
        sys.setswitchinterval(interval)
    return found


def _derived(kinds: Iterable[type]) -> set[type]:
    """These classes and all that are derived from them, which takes no look at every object."""
    derived: set[type] = set()
    waiting = list(kinds)
    while waiting:
        kind = waiting.pop()
        if kind not in derived:
            derived.add(kind)
            waiting += type.__subclasses__(kind)
    return derived
