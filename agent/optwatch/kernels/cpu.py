"""The compiled CPU kernel: all statistics of many tensors in one call and one pass over each (`reduce.c`)."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .locate import addresses, pairs, place
from .request import Kind, Place, Request

KINDS = {"products": 0, "nonnegative": 1, "changes": 2, "copy": 3}
"""Codes of reduce.c."""


class Kernel:
    """A loaded library. Runs on the threads of torch's own OpenMP runtime, as many as torch uses, without the GIL."""

    def __init__(self, path: Path) -> None:
        pointer = ctypes.c_void_p
        library = ctypes.CDLL(str(path))
        self._reduce, self._largest = library.optwatch_reduce, library.optwatch_largest
        self._reduce.argtypes = [pointer, ctypes.c_int64, ctypes.c_int, pointer]
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

        None where the kernel cannot read a tensor (see `addresses`), or a pair is not of equal size and order.
        """
        out = torch.empty(3, len(xs), dtype=torch.float64)
        return out if self.run([Request(kind, xs, Place(out), ys, positions, thresholds)]) else None

    def run(self, requests: Sequence[Request]) -> bool:
        """Read all of these in one go, and write their numbers to their places. Releases the GIL meanwhile.

        False, with nothing written, where the kernel cannot read a tensor, or a pair is not of equal size and order.

        Raises:
            ValueError: numbers do not fit into their place.
        """
        known = []
        for each in requests:
            limits = None if each.thresholds is None else each.thresholds.to(torch.float64).contiguous()
            if limits is not None and (limits.numel() != len(each.xs) or not limits.is_cpu):
                return False
            places = _where(each.out, len(each.xs)), _where(each.pairs, len(each.ys))
            if (found := _list(KINDS[each.kind], each.xs, each.ys, each.positions, limits, *places)) is None:
                return False
            known.append(found)
        table = array("q", chain.from_iterable(each.row for each in known))
        status: int = self._reduce(_start(table), len(known), torch.get_num_threads(), self._parallel)
        return status == 0

    def largest(self, x: Tensor) -> float | None:
        """max |x| of one tensor, in a quarter of the time that its sums take: NaN where it holds a NaN, 0 for an empty
        one. None where the kernel cannot read it. Releases the GIL meanwhile."""
        if (found := place(x)) is None:
            return None
        result: float = self._largest(*found, torch.get_num_threads(), self._parallel)
        return None if result < 0 else result


class List(NamedTuple):
    """One list of the kernel's."""

    row: tuple[int, ...]
    """``struct list`` of reduce.c."""
    kept: tuple[object, ...]
    """What its addresses are in."""


def _list(
    kind: int,
    xs: Sequence[Tensor],
    ys: Sequence[Tensor],
    positions: Sequence[int] | None,
    limits: Tensor | None,
    out: tuple[int, int, int],
    pairs_out: tuple[int, int, int],
) -> List | None:
    """The list; None where the kernel may not read a tensor, or the elements of a pair are not in one order."""
    x, y = addresses(xs), addresses(ys)
    if x is None or y is None:
        return None
    at = _first(y.count) if positions is None else positions if isinstance(positions, array) else array("q", positions)
    if not pairs(xs, at, ys, x, y):
        return None
    left = kind, x.count, x.where, x.sizes, x.dtypes, 0 if limits is None else limits.data_ptr()
    right = y.count, y.where, y.sizes, y.dtypes, _start(at)
    return List((*left, *right, *out, *pairs_out), (x, y, at, limits))


@lru_cache(64)
def _first(count: int) -> array[int]:
    """So many positions, kept for the next call: see locate.cpp for what a large allocation costs behind a step."""
    return array("q", range(count))


def _start(numbers: array[int]) -> int:
    """The address of the first of them."""
    return numbers.buffer_info()[0]


def _where(place: Place | None, count: int) -> tuple[int, int, int]:
    """How many numbers of each of `count` tensors are wanted, the address of the first, and elements from one to the
    next. Refuses what the kernel would write beyond."""
    if place is None:
        return 0, 0, 0
    out = place.numbers
    rows = 1 if out.dim() == 1 else len(out)
    fits = out.dtype is torch.float64 and out.is_cpu and out.stride(-1) == 1
    if not fits or out.dim() > 2 or rows > 3 or out.shape[-1] != count:
        raise ValueError(
            f"the numbers of {count} tensors do not fit into {tuple(out.shape)} of {out.dtype} on {out.device} with "
            f"strides {out.stride()}: give float64 on the CPU, {count} in its last dimension, which is dense"
        )
    return rows, out.data_ptr(), 0 if out.dim() == 1 else out.stride(0)
