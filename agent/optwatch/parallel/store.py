"""The store of the default process group, over a connection of the agent's own.

A client of torch's stores serves one call at a time: a wait of ours on the trainer's client would hold up the trainer's
next use of it. So the agent clones it, and talks to the clone on threads whose end nobody waits for without a limit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
PREFIX = "optwatch"


def world() -> tuple[int, int] | None:
    """This process's rank and the number of ranks, where a default process group with several exists; else None."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    size = dist.get_world_size()
    return (dist.get_rank(), size) if size > 1 else None


def prefixed(prefix: str, store: Any) -> Any:
    """The same store with keys under a prefix."""
    return torch.distributed.PrefixStore(prefix, store)  # type: ignore[attr-defined]  # torch does not list it


def connect() -> Any:
    """A client of the default group's store with keys under ``optwatch/``. May wait for the store's server.

    Raises:
        RuntimeError: the store can not be connected to a second time.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    store: Any = _get_default_store()
    if hasattr(store, "clone"):
        return prefixed(PREFIX, store.clone())
    # Before torch 2.6 a connection is made by hand, with the prefixes that separate one process group from the next.
    prefixes = []
    while hasattr(store, "underlying_store"):
        prefixes.append(getattr(store, "prefix", ""))
        store = store.underlying_store
    if not hasattr(store, "port"):
        raise RuntimeError(f"torch {torch.__version__} cannot clone a {type(store).__name__}: use a TCPStore, or 2.6")
    clone: Any = type(store)(store.host, store.port, is_master=False, wait_for_workers=False)
    for prefix in reversed(prefixes):
        clone = prefixed(prefix, clone)
    return prefixed(PREFIX, clone)


def within(seconds: float, work: Callable[[], T]) -> T:
    """The result of `work`, or TimeoutError after `seconds`, however long `work` itself goes on on its thread.

    Raises:
        TimeoutError: it took longer.
        Exception: what `work` raised.
    """
    result: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            result.append(work())
        except Exception as error:  # noqa: BLE001 - raised below, on the thread that asked
            errors.append(error)

    thread = threading.Thread(target=run, name="optwatch-store", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not result:
        raise TimeoutError(f"the store of the process group has not answered for {seconds:g} s")
    return result[0]


def agree(key: str, proposal: str, seconds: float) -> str:
    """One text for all ranks: the proposal of whichever rank asks first. No rank waits for another.

    Raises:
        TimeoutError: the store did not answer in time.
        RuntimeError: it could not be reached.
    """

    def ask() -> str:
        answer: bytes | str = connect().compare_set(key, "", proposal)
        return answer.decode() if isinstance(answer, bytes) else answer

    return within(seconds, ask)
