"""The measured update: how far a step really moved the weights, from copies of them taken just before it.

No formula of an optimizer is trusted: decay, clipping, momentum, orthogonalisation and rounding to bf16 are all in what
the weights became. A copy of every weight would double their memory, so the copies have a fixed budget of bytes, and
what it cannot hold at once is measured in turn: a *rotation* goes over all elements, one *window* of the budget's size
at a step. Each element's change is within one step and exact; those of different windows are of different steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from optwatch.kernels import Place, addresses, located
from optwatch.parallel.placement import local

from .blocks import flat
from .statistics import Reducer
from .transfer import numbers

ALIGNMENT = 16
"""Bytes: the copy of a slice begins at a multiple, as its dtype and vectorised kernels need."""
SPREAD = 4
"""Rotations over weights and moments in which one over updates is made where the copies have no room for all weights:
copying and comparing moves four bytes for each that a norm reads."""
NOT_MEASURED = -1.0
"""Stands for a sum of squares that is not known yet: no sum of squares is negative. NaN would be one that is."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of elements of one parameter, and the place of its copy."""

    parameter: int
    start: int
    stop: int
    offset: int
    """Of the copy, in bytes from the scratch's beginning."""


def plan(sizes: Sequence[int], item_bytes: Sequence[int], budget: int, spread: int) -> list[list[Slice]]:
    """Windows of slices that together hold every element once, in the order of the parameters.

    Everything is one window where it fits the budget. Otherwise a window has the size of an equal share of `spread`
    steps, or of the budget where that is smaller, so that measuring one at every step reads no more than measuring
    everything every `spread` steps would.

    Args:
        sizes: elements of each parameter.
        item_bytes: bytes of an element of each.
        budget: most bytes of copies at a time, ``ALIGNMENT`` or more.
        spread: steps over which a rotation is spread at least.
    """
    held = [_aligned(size * width) for size, width in zip(sizes, item_bytes, strict=True)]
    room = budget // ALIGNMENT * ALIGNMENT
    if sum(held) > room:
        room = min(room, _aligned(math.ceil(sum(held) / spread)))
    windows: list[list[Slice]] = [[]]
    used = 0
    for parameter, (size, width) in enumerate(zip(sizes, item_bytes, strict=True)):
        start = 0
        while start < size:
            if used == room:
                windows.append([])
                used = 0
            stop = min(size, start + (room - used) // width)
            windows[-1].append(Slice(parameter, start, stop, used))
            used += _aligned((stop - start) * width)
            start = stop
    return windows


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Window:
    """One window: its parameters, as they are now, and its copies.

    Args:
        slices: of the window.
        parameters: of all windows.
        latest: where its numbers are kept, shape ``(2, len(slices))``.
    """

    def __init__(self, slices: Sequence[Slice], parameters: Sequence[Tensor], reducer: Reducer, latest: Tensor) -> None:
        self.latest = latest
        self.plan = reducer.new_plan([piece.stop - piece.start for piece in slices])
        self._slices = slices
        self._device = reducer.device
        self._members = [parameters[piece.parameter] for piece in slices]
        self._dtypes = [_dtype(p) for p in self._members]
        self._where: tuple[bytes, ...] | None = None
        self._pieces: Sequence[Tensor] = ()
        self._copies: Sequence[Tensor] = ()

    def pieces(self) -> Sequence[Tensor] | None:
        """The slices, as the parameters are now: one-dimensional views; None where one has become another dtype. They
        are kept while the parameters stay where they are: making one takes ten times as long as asking for an
        address."""
        found = addresses(self._members, self._device)
        where = None if found is None else found.key()
        if where is None or where != self._where:
            self._where, self._pieces = where, located(list(map(self._piece, self._members, self._slices)))
            if [piece.dtype for piece in self._pieces] != self._dtypes:
                self._where = None
                return None
        return self._pieces

    def copies(self, scratch: Tensor) -> Sequence[Tensor]:
        """The places of the copies, one for each slice; made once: a view costs more than copying a small tensor."""
        if not self._copies:
            each = zip(self._slices, self._dtypes, strict=True)
            self._copies = located([self._place(scratch, piece, dtype) for piece, dtype in each])
        return self._copies

    @staticmethod
    def _piece(parameter: Tensor, piece: Slice) -> Tensor:
        elements = flat(local(parameter))
        whole = piece.stop - piece.start == elements.numel()
        return elements if whole else elements[piece.start : piece.stop]

    @staticmethod
    def _place(scratch: Tensor, piece: Slice, dtype: torch.dtype) -> Tensor:
        size = (piece.stop - piece.start) * dtype.itemsize
        return scratch[piece.offset : piece.offset + size].view(dtype)


class Update:
    """Measures the updates of one list of parameters. Never waits for the device.

    `before` is called ahead of a step and `after` behind it. Making one copies its plan to the device. The scratch is
    allocated at the first step, and is all that is kept: ``budget`` bytes at most, beside two numbers for each slice.

    Args:
        parameters: dense tensors on the reducer's device; of a DTensor its local shard is measured. Read at each step.
        budget: bytes.
        spread: see `plan`.
    """

    def __init__(self, parameters: Sequence[Tensor], reducer: Reducer, budget: int, spread: int) -> None:
        self._parameters = parameters
        self._reducer = reducer
        self._budget = budget
        self._spread = spread
        self._begin_rotation()

    def _begin_rotation(self) -> None:
        widths = [_dtype(p).itemsize for p in self._parameters]
        sizes = [local(p).numel() * (2 if p.is_complex() else 1) for p in self._parameters]
        planned = plan(sizes, widths, self._budget, self._spread)
        slices = [piece for window in planned for piece in window]
        owners = [piece.parameter for piece in slices]
        self._whole = owners == list(range(len(sizes)))
        device = self._reducer.device
        self._owners = numbers(owners, torch.int64, device)
        self._latest = torch.full((2, len(slices)), NOT_MEASURED, dtype=self._reducer.dtype, device=device)
        """By slice: the sum of the squares of its change, and of its weights after that step."""
        ends = [piece.offset + (piece.stop - piece.start) * widths[piece.parameter] for piece in slices]
        self._used = max(ends, default=0)
        each = zip(planned, torch.split(self._latest, [len(window) for window in planned], dim=1), strict=True)
        self.windows = [Window(window, self._parameters, self._reducer, latest) for window, latest in each]
        self._scratch: Tensor | None = None
        self._next = 0
        self._copies: Sequence[Tensor] | None = None

    @property
    def rotates(self) -> bool:
        """Whether the weights do not fit the budget, so that a window is to be measured at every step."""
        return len(self.windows) > 1

    @property
    def scratch_bytes(self) -> int:
        """Bytes held for copies."""
        return 0 if self._scratch is None else self._scratch.numel()

    def before(self) -> None:
        """Copy the weights of the next window. A copy whose step raised is forgotten, and a rotation begins anew where
        a parameter of the window has become another dtype."""
        self._copies = None
        if (pieces := self._window.pieces()) is None:
            self._begin_rotation()
            pieces = self._window.pieces()
            assert pieces is not None  # noqa: S101 - of the dtypes that it was made of
        if self._scratch is None:
            self._scratch = torch.empty(self._used, dtype=torch.uint8, device=self._reducer.device)
        copies = self._window.copies(self._scratch)
        self._reducer.copy(pieces, copies, partial(setattr, self, "_copies", copies))

    def after(self, skipped: Tensor | None = None) -> None:
        """Compare the weights with their copies, and go on to the next window. Nothing where no copy was taken, or a
        parameter has become another dtype.

        ``skipped`` is a 0-d tensor on the device, above 0 where the optimizer has skipped the step: then what was
        measured of this window before stays.
        """
        copies, self._copies = self._copies, None
        if copies is None:
            return
        window = self._window
        if (pieces := window.pieces()) is None:
            return
        if skipped is None:
            self._reducer.changes(copies, pieces, window.plan, out=Place(window.latest))
        else:
            changes = self._reducer.changes(copies, pieces, window.plan)
            window.latest.copy_(torch.where(skipped > 0, window.latest, changes))
        self._next = (self._next + 1) % len(self.windows)

    def sums(self) -> Tensor:
        """Sums of squares by parameter, of its change and of its weights after the step: shape ``(2, n)``, float64.

        `NOT_MEASURED` for a parameter of which some element has not been measured yet.
        """
        if self._whole:
            return self._latest
        result = torch.zeros(2, len(self._parameters), dtype=self._reducer.dtype, device=self._reducer.device)
        result.index_add_(1, self._owners, self._latest)
        missing = torch.zeros_like(result).index_add_(1, self._owners, (self._latest < 0).to(result))
        return result.masked_fill_(missing > 0, NOT_MEASURED)

    @property
    def _window(self) -> Window:
        return self.windows[self._next]


def _dtype(parameter: Tensor) -> torch.dtype:
    """Of its elements as they are copied: complex numbers are pairs of reals."""
    return parameter.dtype.to_real() if parameter.is_complex() else parameter.dtype
