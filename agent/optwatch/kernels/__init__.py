"""The compiled CPU kernel: all statistics of many tensors in one call and one pass over each. CUDA's is in `device`.

It is compiled with the machine's own C compiler by a background thread (`prepare`), and until it is there, and where it
cannot be, `statistics` does the same in torch's own operations.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from array import array
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from . import device as devices
from .build import library

logger = logging.getLogger("optwatch")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""Codes of reduce.c."""
KINDS = {"products": 0, "nonnegative": 1, "changes": 2}
Kind = Literal["products", "nonnegative", "changes"]
_PLAIN = {Tensor, torch.nn.Parameter}
_dtype, _layout, _on_cpu = attrgetter("dtype"), attrgetter("layout"), attrgetter("is_cpu")


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


class Kernel:
    """A loaded library. Runs on the threads of torch's own OpenMP runtime, as many as torch uses, without the GIL."""

    def __init__(self, path: Path) -> None:
        pointer = ctypes.c_void_p
        library = ctypes.CDLL(str(path))
        self._reduce, self._largest = library.optwatch_reduce, library.optwatch_largest
        self._reduce.argtypes = [ctypes.c_int, ctypes.c_int64, *[pointer] * 7, ctypes.c_int, pointer]
        self._reduce.restype = ctypes.c_int
        self._largest.argtypes = [pointer, ctypes.c_int64, ctypes.c_uint8, ctypes.c_int, pointer]
        self._largest.restype = ctypes.c_double
        # The symbol of the runtime that torch has loaded: its threads are there already, and a second pool would
        # compete with them for the same cores. Without one (a torch without OpenMP, macOS) it is one thread.
        entry = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
        self._parallel = ctypes.cast(entry, pointer) if entry is not None else None

    def reduce(
        self,
        kind: Kind,
        xs: Sequence[Tensor],
        ys: Sequence[Tensor] = (),
        positions: Sequence[int] | None = None,
        thresholds: Tensor | None = None,
    ) -> Tensor | None:
        """Three numbers for each x: shape ``(3, n)``, float64, on the CPU. Releases the GIL meanwhile.

        ``products``: Σx², Σx·y and Σy², the last two 0 where there is no y. ``changes``: Σ(x − y)², Σx² and 0.
        ``nonnegative``: Σx, max x (0 of an empty tensor) and ``#{x < threshold}`` (0 without thresholds), of tensors
        without negative entries; ``thresholds`` has shape ``(n,)``. The y belong to the x at ``positions``, or to each.

        None where the kernel cannot read a tensor (see `readable`), or a pair is not of equal size.
        """
        if not readable(xs) or not readable(ys) or (thresholds is not None and thresholds.numel() != len(xs)):
            return None
        sizes = array("q", map(Tensor.numel, xs))
        others = array("Q", bytes(8 * len(xs))) if ys else None
        if others is not None:
            for position, y in zip(range(len(xs)) if positions is None else positions, ys, strict=True):
                if y.numel() != sizes[position]:
                    return None
                others[position] = y.data_ptr()
        pointers = array("Q", map(Tensor.data_ptr, xs))
        out = torch.empty(len(xs), 3, dtype=torch.float64)
        limits = None if thresholds is None else thresholds.to("cpu", torch.float64).contiguous()
        status = self._reduce(
            KINDS[kind],
            len(xs),
            pointers.buffer_info()[0],
            _codes(xs, None, len(xs)),
            None if others is None else others.buffer_info()[0],
            None if others is None else _codes(ys, positions, len(xs)),
            sizes.buffer_info()[0],
            None if limits is None else limits.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
            self._parallel,
        )
        return out.t() if status == 0 else None

    def largest(self, x: Tensor) -> float | None:
        """max |x| of one tensor, in a quarter of the time that its sums take: NaN where it holds a NaN, 0 for an empty
        one. None where the kernel cannot read it. Releases the GIL meanwhile."""
        code = DTYPES.get(x.dtype)
        plain = type(x) in _PLAIN and x.is_cpu and x.layout is torch.strided and x.is_contiguous()
        if code is None or not plain:
            return None
        result: float = self._largest(x.data_ptr(), x.numel(), code, torch.get_num_threads(), self._parallel)
        return None if result < 0 else result


def readable(tensors: Sequence[Tensor]) -> bool:
    """Whether the kernel may read these tensors' memory: plain dense CPU tensors, contiguous, of a dtype it knows."""
    return (
        _PLAIN.issuperset(map(type, tensors))
        and all(map(_on_cpu, tensors))
        and {torch.strided}.issuperset(map(_layout, tensors))
        and DTYPES.keys() >= set(map(_dtype, tensors))
        and all(map(Tensor.is_contiguous, tensors))
    )


def _codes(tensors: Sequence[Tensor], positions: Sequence[int] | None, count: int) -> bytes:
    """The dtype of each of `count` tensors, of which those at `positions` are given."""
    dtypes = list(map(_dtype, tensors))
    if dtypes.count(dtypes[0]) == len(dtypes):
        return bytes([DTYPES[dtypes[0]]]) * count
    codes = bytearray(count)
    for position, dtype in zip(range(count) if positions is None else positions, dtypes, strict=True):
        codes[position] = DTYPES[dtype]
    return bytes(codes)


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
    return _kernel if device.type == "cpu" else devices.kernel(device)


def cpu_kernel() -> Kernel | None:
    """The CPU's kernel, once it is there. Never waits."""
    return _kernel


def _make() -> None:
    global _kernel
    try:
        _kernel = Kernel(library())
        logger.debug("optwatch: statistics are read by the compiled kernel")
    except Exception as error:  # noqa: BLE001 - never hurt the run: torch's operations do the same
        logger.debug("optwatch: no compiled kernel, statistics are read by torch's operations: %s", error)
