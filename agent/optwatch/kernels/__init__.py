"""Compiled kernels: all statistics of many tensors in one pass over each, on a CPU (`cpu`) and on CUDA (`device`).

The CPU's is compiled with the machine's own C compiler by a background thread (`prepare`), and until it is there, and
where it cannot be, `statistics` does the same in torch's own operations.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from . import device as devices
from .background import Background
from .build import library, reduce_recipe
from .cpu import Kernel
from .locate import CPU, MANY, Addresses, Located, addresses, gradients, located, moments, shared_count
from .locate import prepare as prepare_addresses
from .request import Kind, Place, Request

__all__ = [
    "CPU",
    "MANY",
    "Addresses",
    "Kernel",
    "Kind",
    "Located",
    "Place",
    "Reduces",
    "Request",
    "addresses",
    "cpu_kernel",
    "gradients",
    "kernel",
    "located",
    "moments",
    "prepare",
    "prepare_addresses",
    "shared_count",
]


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


_kernel = Background(
    "kernel", lambda: Kernel(library(reduce_recipe())), "statistics are read by torch's operations, which do the same"
)


def prepare(device: torch.device = CPU) -> threading.Thread:
    """Begin to compile or load the device's kernel on a background thread, once for a process; that thread."""
    return _kernel.prepare() if device.type == "cpu" else devices.prepare(device)


def kernel(device: torch.device = CPU) -> Reduces | None:
    """The device's kernel, once it is there. Never waits."""
    return cpu_kernel() if device.type == "cpu" else devices.kernel(device)


def cpu_kernel() -> Kernel | None:
    """The CPU's kernel, once it is there. Never waits."""
    return _kernel.made
