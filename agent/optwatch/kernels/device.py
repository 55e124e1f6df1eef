"""The kernel of each CUDA device: made in the background, and switched off where it fails.

Nothing here imports Triton but a thread of its own, which compiles as well: until a form is there, and where there is
no Triton, `statistics` does the same in torch's operations.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .triton_reduce import TritonKernel

logger = logging.getLogger("optwatch")
EXIT_SECONDS = 60
"""Most that the interpreter's end waits for a form that is being compiled."""


class DeviceKernel:
    """One device's kernel: it answers once a thread has made it. A fault switches it off for the process, said once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.answered = 0
        """Calls that it has answered."""
        self.off: str | None = None
        """Why it answers none any more."""
        self._made: TritonKernel | None = None
        self._closed = False
        self.thread = threading.Thread(target=self._make, name="optwatch-triton", daemon=True)

    def __str__(self) -> str:
        state = f"off: {self.off}" if self.off else "on" if self._made else "not there yet"
        return f"Triton kernel of {self.device} ({state}), {self.answered} calls answered"

    @property
    def there(self) -> bool:
        """Whether it is worth asking."""
        return self._made is not None and self.off is None

    @property
    def waiting(self) -> bool:
        """Whether Triton or a form that was asked for is still to come."""
        return self.off is None and (self._made is None or self._made.waiting)

    def reduce(
        self,
        kind: str,
        xs: Sequence[Tensor],
        ys: Sequence[Tensor] = (),
        positions: Sequence[int] | None = None,
        thresholds: Tensor | None = None,
    ) -> Tensor | None:
        """See `TritonKernel.reduce`. Raises nothing: what fails is None, as are all calls after it."""
        made = self._made
        if made is None or self.off is not None:
            return None
        try:
            result = made.reduce(kind, xs, ys, positions, thresholds)
        except Exception as error:  # noqa: BLE001 - never hurt the run: torch's operations do the same
            self._stop(logging.WARNING, error)
            return None
        self.answered += result is not None
        return result

    def close(self) -> None:
        """Compile no more, and wait for the form that is being compiled."""
        self._closed = True
        if (made := self._made) is not None:
            made.wanted.put(None)
        self.thread.join(EXIT_SECONDS)

    def _make(self) -> None:
        """Import Triton, compile what is asked for and try it, for as long as the process lives."""
        try:
            from .triton_reduce import TritonKernel

            self._made = made = TritonKernel(self.device)
            logger.debug(
                "optwatch: statistics on %s are read by the Triton kernel as its forms are compiled", self.device
            )
            while not self._closed and self.off is None and (form := made.wanted.get()) is not None:
                made.compile(form)
        except Exception as error:  # noqa: BLE001 - an import, a compiler or a driver may raise anything
            self._stop(logging.DEBUG, error)

    def _stop(self, level: int, error: Exception) -> None:
        if self.off is None:
            self.off = f"{type(error).__name__}: {error}"
            logger.log(level, "optwatch: no Triton kernel on %s, torch's operations do it: %s", self.device, self.off)


_lock = threading.Lock()
_kernels: dict[torch.device, DeviceKernel] = {}


def prepare(device: torch.device) -> threading.Thread:
    """Begin to make the device's kernel on a background thread, once for a process; that thread."""
    with _lock:
        if device not in _kernels:
            _kernels[device] = DeviceKernel(device)
            _kernels[device].thread.start()
        return _kernels[device].thread


def kernel(device: torch.device) -> DeviceKernel | None:
    """The device's kernel, once it is there and for as long as it has not failed. Never waits."""
    found = _kernels.get(device)
    return found if found is not None and found.there else None


def all_of_them() -> list[DeviceKernel]:
    """The kernel of each device that was asked for one; each says as a string what has become of it."""
    return list(_kernels.values())


@atexit.register
def _leave() -> None:
    """A thread that the interpreter's end meets inside of C++ takes the process with it (SIGABRT)."""
    for each in all_of_them():
        each.close()
