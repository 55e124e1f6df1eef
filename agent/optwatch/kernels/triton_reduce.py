"""The CUDA kernel: all statistics of many tensors in two launches for each pair of dtypes, one pass over each tensor.

Importing this imports Triton, which takes seconds: `device` does so on a thread of its own. `TRITON_INTERPRET=1` runs
it on the CPU, which is how it is tested where there is no GPU. It has never run on one yet.
"""

from __future__ import annotations

import queue
import time
from array import array
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from optwatch.training.transfer import Arrival, host_place, sent

from .cuts import BLOCK, HEADER, Cut, Form
from .locate import DTYPES, addresses, pairs
from .triton_code import chunks, totals

ALIGNMENT = 16
"""Bytes that are loaded at once where all addresses are multiples."""
KINDS = {"products": 0, "nonnegative": 1, "changes": 2}
POINTED = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}
NONE = 255
"""The code of no dtype."""
_BY_CODE = {code: dtype for dtype, code in DTYPES.items()}


class TritonKernel:
    """All statistics of lists of tensors on one device. Never waits for the device, copies nothing to the host, and
    compiles nothing on the caller's thread: forms that it has not got are put into `wanted`, for `compile`.

    Raises:
        RuntimeError: Triton interprets where it should compile, or the other way around.
    """

    def __init__(self, device: torch.device) -> None:
        if isinstance(chunks, triton.JITFunction) != (device.type == "cuda"):
            raise RuntimeError(f"TRITON_INTERPRET is for the CPU, and compiled kernels are for CUDA: not for {device}")
        self.wanted: queue.SimpleQueue[Form | None] = queue.SimpleQueue()
        self._device = device
        self._cuts: dict[tuple[object, ...], Cut] = {}
        self._ready: set[Form] = set()
        self._asked: set[Form] = set()

    def reduce(
        self,
        kind: str,
        xs: Sequence[Tensor],
        ys: Sequence[Tensor] = (),
        positions: Sequence[int] | None = None,
        thresholds: Tensor | None = None,
    ) -> Tensor | None:
        """Three numbers for each x, as `kernels.Kernel.reduce`: shape ``(3, n)``, float64, on the device.

        ``thresholds`` has shape ``(n,)``, on the device or the CPU. On the current stream: one copy of a table from
        pinned memory, one of thresholds that are on the CPU, and for each form at most two launches.

        None where it cannot read a tensor, a pair is not of equal size and order, or a form is not compiled yet.
        """
        found, y_found = addresses(xs, self._device), addresses(ys, self._device)
        if found is None or y_found is None or (thresholds is not None and len(thresholds) != len(xs)):
            return None
        places = range(len(ys)) if positions is None else positions
        if not pairs(xs, places, ys, found, y_found):
            return None
        (where, sizes, types), (y_where, y_sizes, y_codes) = found.lists(), y_found.lists()
        others, y_types = [0] * len(sizes), bytearray([NONE]) * len(sizes)
        if y_sizes:
            for position, size, code, address in zip(places, y_sizes, y_codes, y_where, strict=True):
                if size != sizes[position]:
                    return None
                y_types[position], others[position] = code, address
        aligned = bytes(not (x | y) % ALIGNMENT for x, y in zip(where, others, strict=True))
        key = (kind, thresholds is not None, array("q", sizes).tobytes(), bytes(types), bytes(y_types), aligned)
        cut = self._cuts.get(key)
        if cut is None:
            each = zip(types, y_types, aligned, strict=True)
            forms = [
                Form(kind, _BY_CODE[x], _BY_CODE.get(y), thresholds is not None, bool(even)) for x, y, even in each
            ]
            if len(self._cuts) >= 64:
                self._cuts.clear()
            cut = self._cuts[key] = Cut(sizes, forms)
        if not self._ready.issuperset(cut.forms):
            for form in cut.forms - self._asked:
                self._asked.add(form)
                self.wanted.put(form)
            return None
        with self._current():
            limits = None if thresholds is None else sent(thresholds.to(torch.float64), self._device).contiguous()
            result = torch.zeros(3, len(xs), dtype=torch.float64, device=self._device)
            if cut.parts:
                table = sent(torch.frombuffer(cut.filled(where, others), dtype=torch.int64), self._device)
                partial = torch.empty(3 * max(cut.rows, 1), dtype=torch.float64, device=self._device)
                launch(cut, table, limits, partial, result)
        return result

    @property
    def waiting(self) -> bool:
        """Whether a form that was asked for is still to come."""
        return bool(self._asked - self._ready)

    def compile(self, form: Form) -> None:
        """Compile one form and trust it, once it has counted an example right. Not for the caller of `reduce`: takes
        seconds, and looks again and again whether the device has got there, which is no wait inside of CUDA.

        Raises:
            RuntimeError: it counted wrong, or a call would have compiled it once more. Whatever Triton raises.
        """
        count, skipped = BLOCK + 3, 0 if form.aligned else 1
        x = (torch.arange(count + skipped) % 5 / 2).to(form.x_type)
        y = None if form.y_type is None else (torch.arange(count + skipped) % 3 - 0.5).to(form.y_type)
        limits = torch.tensor([1.0, 0.25], dtype=torch.float64) if form.limited else None
        # A tensor of two chunks and one of one.
        cut = Cut([count, 3], [form] * 2, chunk=BLOCK)
        with self._current():
            on_device = [None if z is None else sent(z, self._device)[skipped:] for z in (x, y)]
            addresses = [[0, 0] if z is None else [z.data_ptr()] * 2 for z in on_device]
            table = array("q", [0, *cut.filled(*addresses)])
            limits = None if limits is None else sent(torch.cat([limits.new_zeros(1), limits]), self._device)
            held = sent(torch.frombuffer(table, dtype=torch.int64), self._device)
            partial = torch.zeros(3 * cut.rows + 1, dtype=torch.float64, device=self._device)
            result = torch.zeros(2, 8, dtype=torch.float64, device=self._device)
            used: list[tuple[object, ...]] = []
            # At addresses that are multiples of 16, and at others: it must be the same form that runs.
            for shift in (0, 1):
                moved = held[1:] if shift else held[1:].clone()
                shifted = None if limits is None else limits[1:] if shift else limits[1:].clone()
                out = result[shift, shift : shift + 6].view(3, 2)
                used.append(launch(cut, moved, shifted, partial[shift:], out))
            place = host_place(16, torch.float64, self._device)
            arrival = Arrival(result.flatten(), place)
            while not arrival.done():
                time.sleep(0.005)
        if any(one is not two for one, two in zip(*used, strict=True)):
            raise RuntimeError(f"Triton compiles {form} for every alignment: a call would have to wait for it")
        columns = [_right(form, [z[skipped:][:size] for z in (x, y) if z is not None]) for size in (count, 3)]
        right = [float(column[row]) for row in range(3) for column in columns]
        if form.limited:
            right[4:] = [float((x[skipped:].double() < 1.0).sum()), float((x[skipped:][:3].double() < 0.25).sum())]
        counted = place.tolist()
        if counted[:6] != right or counted[9:15] != right:
            raise RuntimeError(f"the Triton kernel made {counted} of an example whose result is {right}")
        self._ready.add(form)

    def _current(self) -> AbstractContextManager[object]:
        """Triton launches on the current device, which need not be that of the tensors."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()


def launch(cut: Cut, table: Tensor, limits: Tensor | None, partial: Tensor, result: Tensor) -> tuple[object, ...]:
    """Launch the kernels of all parts on the current stream; the compiled forms that ran (none in the interpreter).

    Shapes: ``table`` that of the cut's, int64; ``limits`` ``(n,)``; ``partial`` ``(3 * rows,)``; ``result`` ``(3, n)``,
    all float64.
    """
    used: list[object] = []
    for part in cut.parts:
        form, own = part.form, table[part.start :]
        used.append(
            chunks[(part.programs,)](
                own,
                result if limits is None else limits,
                partial,
                result,
                kind=KINDS[form.kind],
                paired=form.y_type is not None,
                limited=form.limited,
                x_type=POINTED[form.x_type],
                y_type=POINTED[form.y_type or form.x_type],
                aligned=form.aligned,
                header=HEADER,
                block=BLOCK,
            )
        )
        if part.several:
            used.append(totals[(part.several,)](own, partial, result, kind=KINDS[form.kind], header=HEADER, block=128))
    return tuple(used)


def _right(form: Form, pair: Sequence[Tensor]) -> list[Tensor]:
    """The three numbers by torch's operations on the CPU, but for the count below a threshold."""
    x, *rest = (z.double() for z in pair)
    none = torch.zeros((), dtype=torch.float64)
    if form.kind == "nonnegative":
        return [x.sum(), x.max(), none]
    if form.kind == "changes":
        return [(x - rest[0]).square().sum(), x.square().sum(), none]
    return [x.square().sum(), *((x @ rest[0], rest[0] @ rest[0]) if rest else (none, none))]
