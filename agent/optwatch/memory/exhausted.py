"""What held the memory when there was no more: by part, and on a GPU at the moment of the allocation that failed."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch.optim import Optimizer

from optwatch.state import state_bytes

from .kinds import local


class Listener(Protocol):
    """Who is told of a failed allocation on a GPU, on the thread that made it."""

    def out_of_memory(self, asked: int) -> None:
        """An allocation of `asked` bytes has failed, and its error is about to be raised. Must not raise."""


def parts(optimizers: Iterable[Optimizer], allocated: float | None) -> dict[str, int]:
    """What the optimizers' weights, gradients and state hold on this rank, and what is left of `allocated`.

    Reads shapes only, and waits for no device. ``rest`` is absent where `allocated` is None.
    """
    weights = gradients = state = 0
    for optimizer in optimizers:
        state += sum(state_bytes(optimizer).values())
        for group in optimizer.param_groups:
            for p in group["params"]:
                weights += local(p).nbytes
                gradients += 0 if p.grad is None else local(p.grad).nbytes
    held = {"weights": weights, "gradients": gradients, "optimizer_state": state}
    return held if allocated is None else {**held, "rest": max(0, int(allocated) - sum(held.values()))}


_listeners: WeakSet[Any] = WeakSet()
_lock = threading.Lock()
_attached = False


def listen(listener: Listener) -> None:
    """Tell `listener` of failed allocations on GPUs, where torch is built for them. Held weakly.

    torch has no way to take an observer off again: one stays for as long as the process lives, and tells nobody when
    nobody is left.
    """
    global _attached
    attach = getattr(torch._C, "_cuda_attach_out_of_memory_observer", None)
    if attach is None or not torch.cuda.is_available():
        return
    with _lock:
        _listeners.add(listener)
        if not _attached:
            attach(_observe)
            _attached = True


def unlisten(listener: Listener) -> None:
    """Tell `listener` no more."""
    _listeners.discard(listener)


def _observe(device: int, asked: int, allowed: int, free: int) -> None:
    """Called by CUDA's caching allocator, which holds no lock of its own by then."""
    for listener in list(_listeners):
        listener.out_of_memory(asked)
