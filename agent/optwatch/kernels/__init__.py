"""Compiled kernels: all statistics of many tensors in one pass over each, on a CPU (`cpu`) and on CUDA (`device`).

The CPU's is compiled with the machine's own C compiler by a background thread (`prepare`), and until it is there, and
where it cannot be, `statistics` does the same in torch's own operations.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from . import device as devices
from .build import library, reduce_recipe
from .cpu import Kernel
from .locate import MANY, Addresses, Gradients, addresses, counts, gradients, moments
from .locate import prepare as prepare_addresses
from .request import Kind, Place, Request

__all__ = [
    "CPU",
    "MANY",
    "Addresses",
    "Gradients",
    "Kernel",
    "Kind",
    "Place",
    "Reduces",
    "Request",
    "addresses",
    "counts",
    "cpu_kernel",
    "gradients",
    "kernel",
    "moments",
    "prepare",
    "prepare_addresses",
]

logger = logging.getLogger("optwatch")


class Reduces(Protocol):
    """A kernel. None where it cannot read the tensors, or is not there yet: torch's operations do the same."""

    def reduce(
        self,
        kind: Kind,
        xs: Sequence[Tensor],
        ys: Sequence[Tensor] = (),
        positions: Sequence[int] | None = None,
        thresholds: Tensor | None = None,
    ) -> Tensor | None:
        """See `Kernel.reduce`."""


CPU = torch.device("cpu")
_lock = threading.Lock()
_maker: threading.Thread | None = None
_kernel: Kernel | None = None


def prepare(device: torch.device = CPU) -> threading.Thread:
    """Begin to compile or load the device's kernel on a background thread, once for a process; that thread."""
    global _maker
    if device.type != "cpu":
        return devices.prepare(device)
    with _lock:
        if _maker is None:
            _maker = threading.Thread(target=_make, name="optwatch-kernel", daemon=True)
            _maker.start()
        return _maker


def kernel(device: torch.device = CPU) -> Reduces | None:
    """The device's kernel, once it is there. Never waits."""
    return cpu_kernel() if device.type == "cpu" else devices.kernel(device)


def cpu_kernel() -> Kernel | None:
    """The CPU's kernel, once it is there. Never waits."""
    return _kernel


def _make() -> None:
    global _kernel
    try:
        _kernel = Kernel(library(reduce_recipe()))
        logger.debug("optwatch: statistics are read by the compiled kernel")
    except Exception as error:  # noqa: BLE001 - never hurt the run: torch's operations do the same
        logger.debug("optwatch: no compiled kernel, statistics are read by torch's operations: %s", error)
