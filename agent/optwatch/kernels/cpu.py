"""The compiled CPU kernel: all statistics of many tensors in one call and one pass over each (`reduce.c`)."""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor

from .plain import PLAIN, any_freed
from .request import Kind, Place, Request

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""Codes of reduce.c."""
KINDS = {"products": 0, "nonnegative": 1, "changes": 2}
_dtype, _layout, _on_cpu = attrgetter("dtype"), attrgetter("layout"), attrgetter("is_cpu")


class Kernel:
    """A loaded library. Runs on the threads of torch's own OpenMP runtime, as many as torch uses, without the GIL."""

    def __init__(self, path: Path) -> None:
        pointer = ctypes.c_void_p
        library = ctypes.CDLL(str(path))
        self._reduce, self._largest = library.optwatch_reduce, library.optwatch_largest
        self._reduce.argtypes = [pointer, ctypes.c_int64, *[pointer] * 6, ctypes.c_int, pointer]
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
        out = torch.empty(3, len(xs), dtype=torch.float64)
        return out if self.run([Request(kind, xs, Place(out), ys, positions, thresholds)]) else None

    def run(self, requests: Sequence[Request]) -> bool:
        """Read all of these in one go, and write their numbers to their places. Releases the GIL meanwhile.

        False, with nothing written, where the kernel cannot read a tensor, or a pair is not of equal size.

        Raises:
            ValueError: numbers do not fit into their place.
        """
        xs = list(chain.from_iterable(request.xs for request in requests))
        ys = list(chain.from_iterable(request.ys for request in requests))
        if not xs:
            return True
        x_types, y_types = readable(xs), readable(ys)
        if x_types is None or y_types is None:
            return False
        sizes = array("q", map(Tensor.numel, xs))
        table, limits, owners, places = array("q"), array("d"), array("q"), []
        limited = any(request.thresholds is not None for request in requests)
        first = 0
        for request in requests:
            count, paired = len(request.xs), len(request.ys)
            positions = array("q", range(paired) if request.positions is None else request.positions)
            owners.extend(positions if not first else [first + position for position in positions])
            if len(positions) != paired:
                return False
            if limited:
                known = [-math.inf] * count if request.thresholds is None else request.thresholds.tolist()
                if len(known) != count:
                    return False
                limits.extend(known)
            places.append(positions)  # kept until they have been read
            address = positions.buffer_info()[0]
            table.extend((KINDS[request.kind], count, *_where(request.out.numbers, count)))
            table.extend(_pairs(request.pairs, paired, address))
            first += count
        others = array("Q", bytes(8 * len(xs))) if ys else None
        pointers, y_pointers = array("Q", map(Tensor.data_ptr, xs)), array("Q", map(Tensor.data_ptr, ys))
        if any_freed(xs, pointers) or any_freed(ys, y_pointers):
            return False
        if others is not None:
            for owner, size, address in zip(owners, map(Tensor.numel, ys), y_pointers, strict=True):
                if size != sizes[owner]:
                    return False
                others[owner] = address
        status: int = self._reduce(
            table.buffer_info()[0],
            len(requests),
            pointers.buffer_info()[0],
            _codes(x_types, range(len(xs)), len(xs)),
            None if others is None else others.buffer_info()[0],
            None if others is None else _codes(y_types, owners, len(xs)),
            sizes.buffer_info()[0],
            limits.buffer_info()[0] if limited else None,
            torch.get_num_threads(),
            self._parallel,
        )
        return status == 0

    def largest(self, x: Tensor) -> float | None:
        """max |x| of one tensor, in a quarter of the time that its sums take: NaN where it holds a NaN, 0 for an empty
        one. None where the kernel cannot read it. Releases the GIL meanwhile."""
        # As `readable`, without sets and lists for one tensor.
        plain = type(x) in PLAIN and x.is_cpu and x.layout is torch.strided
        if not plain or x.dtype not in DTYPES or not x.is_contiguous():
            return None
        address, threads = x.data_ptr(), torch.get_num_threads()
        if any_freed((x,), (address,)):
            return None
        result: float = self._largest(address, x.numel(), DTYPES[x.dtype], threads, self._parallel)
        return None if result < 0 else result


def readable(tensors: Sequence[Tensor]) -> list[torch.dtype] | None:
    """The dtype of each tensor; None where one is not a plain dense CPU tensor, contiguous, of a dtype that the kernel
    knows, so that it may not read their memory."""
    dtypes = list(map(_dtype, tensors))
    plain = (
        PLAIN.issuperset(map(type, tensors))
        and all(map(_on_cpu, tensors))
        and {torch.strided}.issuperset(map(_layout, tensors))
        and DTYPES.keys() >= set(dtypes)
        and all(map(Tensor.is_contiguous, tensors))
    )
    return dtypes if plain else None


def _codes(dtypes: Sequence[torch.dtype], positions: Sequence[int], count: int) -> bytes:
    """The codes of `count` dtypes, of which those at `positions` are given."""
    if dtypes.count(dtypes[0]) == len(dtypes):
        return bytes([DTYPES[dtypes[0]]]) * count
    codes = bytearray(count)
    for position, dtype in zip(positions, dtypes, strict=True):
        codes[position] = DTYPES[dtype]
    return bytes(codes)


def _where(out: Tensor, count: int) -> tuple[int, int, int]:
    """How many numbers of each of `count` tensors are wanted, the address of the first, and elements from one to the
    next. Refuses what the kernel would write beyond."""
    rows = 1 if out.dim() == 1 else len(out)
    dense = out.dtype is torch.float64 and out.is_cpu and out.stride(-1) == 1
    if not dense or out.dim() > 2 or rows > 3 or out.shape[-1] != count:
        raise ValueError(
            f"the numbers of {count} tensors do not fit into {tuple(out.shape)} of {out.dtype} on {out.device} with "
            f"strides {out.stride()}: give float64 on the CPU, {count} in its last dimension, which is dense"
        )
    return rows, out.data_ptr(), 0 if out.dim() == 1 else out.stride(0)


def _pairs(pairs: Place | None, count: int, positions: int) -> tuple[int, int, int, int]:
    """How many tensors have all three numbers wanted elsewhere, the address of their positions, and where."""
    if pairs is None:
        return 0, 0, 0, 0
    _, address, stride = _where(pairs.numbers, count)
    return count, positions, address, stride
