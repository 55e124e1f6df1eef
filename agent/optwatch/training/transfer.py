"""Between a device and the host without waiting: numbers, and when something was reached."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def host_place(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor on the host that numbers of `device` can be copied to: shape ``(length,)``, pinned where the device is a
    CUDA one, since a copy to pageable memory waits."""
    return torch.zeros(length, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on `device`: itself where it is there already, a copy under way otherwise. Never waits.

    A copy from the CPU to CUDA goes by way of pinned memory, since one from pageable memory may wait for the stream;
    torch uses that memory anew only behind an event that says the copy has been made.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def numbers(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host on `device`: shape ``(n,)``. Never waits."""
    return sent(torch.tensor(values, dtype=dtype, device="cpu"), device)


class Arrival:
    """One copy under way to the host; `done` says when it may be read. The CPU's own tensors are there at once."""

    def __init__(self, source: Tensor, place: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if source.data_ptr() == place.data_ptr() and source.device == place.device:
            return
        place.copy_(source, non_blocking=place.is_pinned())
        if place.is_pinned():
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types for it
            self._event.record()

    def done(self) -> bool:
        """Whether the copy has arrived. Never waits."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]


class Moment:
    """A moment of the training thread; where ranks train on CUDA, that at which the device gets there."""

    __slots__ = ("_event", "_seconds")

    def __init__(self, device: torch.device) -> None:
        self._seconds = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda" and dist.is_available() and dist.is_initialized():
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()

    def since(self, earlier: Moment) -> float:
        """Seconds from an earlier moment. On CUDA both have to have been reached, which is not waited for."""
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        return float(earlier._event.elapsed_time(self._event)) / 1000
