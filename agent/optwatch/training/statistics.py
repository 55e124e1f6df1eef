"""Reductions over lists of tensors: each element is read once, in float64.

On a CPU a compiled kernel does it, on CUDA one of Triton (see `kernels`), in one pass for all numbers of a tensor.
Everywhere else, until the kernel is there, and for what it cannot read, torch's own operations do, in blocks of one
fixed scratch.

Why blocks of float64: torch's own CPU norms keep one running float32 sum, which is off by 8e-5 at 4M elements and 5e-3
at 64M, and round bf16 results to bf16; and a float32 sum of squares overflows on entries above 1.8e19 whose norm is
finite. In float64 a sum of squares of float32 numbers is infinite only where an element is, so a non-finite norm *is* a
non-finite element. Nothing of the size of a parameter is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from optwatch import kernels
from optwatch.kernels import Place

from .blocks import Plan, flat, segments, wide_dtype
from .transfer import numbers, sent


class Reducer:
    """Reduces lists of tensors on one device. Never waits for the device and never copies to the host.

    Results are new tensors, or are written to the place ``out`` where it is given: its numbers are of the result's
    shape and dtype, on its device, the last dimension dense.

    With ``compiled`` the device's kernel reads what is on a CPU or on CUDA, from when it is there. Torch's operations
    need a scratch of two blocks of float64: 1 MiB on a CPU, 16 MiB elsewhere, since with less the number of launches
    would grow, to 16 times with 1 MiB. It is made when they first need it, and given back when CUDA's kernel answers,
    which holds at most 1 MiB and 64 bytes a tensor while it does (see `cuts.Cut`) and nothing afterwards.
    """

    def __init__(self, device: torch.device, compiled: bool = False) -> None:
        self.device = device
        self.dtype = wide_dtype(device)
        self._compiles = compiled and device.type in ("cpu", "cuda")
        if self._compiles:
            kernels.prepare(device)
        self._scratch: tuple[Tensor, Tensor] | None = None
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._waiting: list[tuple[kernels.Request, Callable[[], object]]] | None = None

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is asked for in here with an ``out`` is there when this ends: a CPU's kernel reads it in one go."""
        kernel = kernels.cpu_kernel() if self._compiles and self.device.type == "cpu" else None
        self._waiting = None if kernel is None else []
        try:
            yield
        finally:
            waiting, self._waiting = self._waiting, None
            if kernel is not None and waiting:
                _answer(kernel, waiting)

    def plan(self, flats: Sequence[Tensor]) -> Plan:
        """The plan for tensors of these sizes, kept for the next call with the same ones (at most 16 are)."""
        sizes = tuple(x.numel() for x in flats)
        plan = self._plans.get(sizes)
        if plan is None:
            if len(self._plans) >= 16:
                self._plans.clear()
            plan = self._plans[sizes] = self.new_plan(sizes)
        return plan

    def new_plan(self, sizes: Sequence[int]) -> Plan:
        """A plan for tensors of these sizes, which the caller keeps. Copies to the device, and does not wait for it."""
        return Plan(sizes, self.device)

    def _blocks(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """The scratch: two blocks that hold the plan's largest."""
        if self._scratch is None or self._scratch[0].numel() < plan.largest:
            self._scratch = None  # given back before the larger one is taken
            first, second = (torch.empty(plan.largest, dtype=self.dtype, device=self.device) for _ in range(2))
            self._scratch = first, second
        return self._scratch

    def square_sums(self, tensors: Iterable[Tensor], out: Place | None = None) -> Tensor:
        """Σx² of each tensor: shape ``(n,)``, float64, on the tensors' device, for tensors of any floating dtype.

        NaN exactly where a tensor holds a NaN, and infinite exactly where it holds an infinity and no NaN. One read.
        """
        listed = tensors if isinstance(tensors, Sequence) else list(tensors)
        if out is None:
            return self._square_sums(listed)
        self._write(kernels.Request("products", listed, out), lambda: out.write(self._square_sums(listed)))
        return out.numbers

    def _square_sums(self, listed: Sequence[Tensor]) -> Tensor:
        if (result := self._kernel("products", listed)) is not None:
            return result[0]
        flats = [flat(x) for x in listed]
        if self.device.type == "cuda" and flats:
            # A tree reduction in float64, a handful of launches for any number of tensors.
            return torch.stack(torch._foreach_norm(flats, 2, dtype=torch.float64)).square_()
        return self._products(flats, None)

    def dot_products(self, lefts: Iterable[Tensor], rights: Iterable[Tensor]) -> Tensor:
        """Σx·y of each pair of tensors of equal shape and layout: shape ``(n,)``, float64, on their device."""
        return self._dot_products(list(lefts), list(rights))

    def _dot_products(self, xs: list[Tensor], ys: list[Tensor]) -> Tensor:
        if (result := self._kernel("products", xs, ys)) is not None:
            return result[1]
        pairs = [_aligned(x, y) for x, y in zip(xs, ys, strict=True)]
        return self._products([flat(x) for x, _ in pairs], [flat(y) for _, y in pairs])

    def products(
        self,
        lefts: Sequence[Tensor],
        positions: Sequence[int],
        rights: Sequence[Tensor],
        out: tuple[Place, Place] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Σx² of each left tensor, shape ``(n,)``, and Σx², Σx·y and Σy² of the pairs, shape ``(3, k)``.

        float64, on their device. The i-th right tensor makes a pair with the left one at ``positions[i]``, which has
        its shape. One read of each where a compiled kernel does it.
        """
        if out is None:
            return self._both_products(lefts, positions, rights)

        def alone() -> None:
            for place, found in zip(out, self._both_products(lefts, positions, rights), strict=True):
                place.write(found)

        self._write(kernels.Request("products", lefts, out[0], rights, positions, pairs=out[1]), alone)
        return out[0].numbers, out[1].numbers

    def _both_products(
        self, lefts: Sequence[Tensor], positions: Sequence[int], rights: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        if (result := self._kernel("products", lefts, rights, positions)) is not None:
            # A list as an index takes tens of microseconds.
            return result[0], result.index_select(1, numbers(positions, torch.int64, self.device))
        squares = self.square_sums(lefts)
        if not positions:
            return squares, squares.new_zeros(3, 0)
        each = squares.unbind()
        dots = self.dot_products([lefts[i] for i in positions], rights)
        return squares, torch.stack([torch.stack([each[i] for i in positions]), dots, self.square_sums(rights)])

    def _products(self, flats: list[Tensor], others: list[Tensor] | None) -> Tensor:
        plan = self.plan(flats)
        sums = torch.zeros(len(flats), dtype=self.dtype, device=self.device)
        partial = torch.empty(len(plan.single_owners), dtype=self.dtype, device=self.device)
        slots = iter(partial.unbind())
        first, second = self._blocks(plan)
        for block in plan.blocks:
            x = block.load(flats, first)
            y = x if others is None else block.load(others, second)
            if block.pack is None:
                torch.dot(x, y, out=next(slots))
            else:
                sums.index_copy_(0, block.pack.positions, segments(x.mul_(y), "sum", block.pack.sizes))
        return sums.index_add_(0, plan.single_owners, partial)

    def changes(
        self, before: Sequence[Tensor], after: Sequence[Tensor], plan: Plan, out: Place | None = None
    ) -> Tensor:
        """Σ(after − before)² and Σafter² of each pair of one-dimensional tensors, whose sizes are the plan's: shape
        ``(2, n)``, float64, on their device. The difference is taken in float64: two numbers of bf16 differ by more
        digits than bf16 has. One read of each."""
        if out is None:
            return self._changes(before, after, plan)
        request = kernels.Request("changes", after, out, before)
        self._write(request, lambda: out.write(self._changes(before, after, plan)))
        return out.numbers

    def _changes(self, before: Sequence[Tensor], after: Sequence[Tensor], plan: Plan) -> Tensor:
        if (compiled := self._kernel("changes", after, before)) is not None:
            return compiled[:2]
        result = torch.zeros(2, len(after), dtype=self.dtype, device=self.device)
        partial = torch.zeros(2, len(plan.single_owners), dtype=self.dtype, device=self.device)
        slots = iter(zip(*(row.unbind() for row in partial), strict=True))
        first, second = self._blocks(plan)
        for block in plan.blocks:
            x = block.load(after, first)
            change = block.load(before, second).sub_(x)
            if block.pack is None:
                slot = next(slots)
                torch.dot(change, change, out=slot[0])
                torch.dot(x, x, out=slot[1])
            else:
                for sums, squares in zip(result, (change.mul_(change), x.mul_(x)), strict=True):
                    sums.index_copy_(0, block.pack.positions, segments(squares, "sum", block.pack.sizes))
        return result.index_add_(1, plan.single_owners, partial)

    def copy(self, sources: Sequence[Tensor], targets: Sequence[Tensor], done: Callable[[], object]) -> None:
        """Copy each tensor to its target, which has its shape and dtype and is on its device. Waits for no device.
        ``done`` is called once that has been, on its device, enqueued."""

        def alone() -> None:
            if targets:
                torch._foreach_copy_(list(targets), list(sources), non_blocking=True)
            done()

        self._write(kernels.Request("copy", sources, None, targets, done=done), alone)

    def nonnegative(self, tensors: Iterable[Tensor], thresholds: Tensor | None, out: Place | None = None) -> Tensor:
        """Sum, largest entry and number of entries below a threshold, of tensors without negative entries.

        ``thresholds`` has shape ``(n,)``, float64, on the tensors' device or the CPU. The result has shape ``(3, n)``,
        float64, on the tensors' device: Σx, max x (0 for an empty tensor) and ``#{x < threshold}`` (0 without
        thresholds). One read.
        """
        listed = tensors if isinstance(tensors, Sequence) else list(tensors)
        if out is None:
            return self._nonnegative(listed, thresholds)
        request = kernels.Request("nonnegative", listed, out, thresholds=thresholds)
        self._write(request, lambda: out.write(self._nonnegative(listed, thresholds)))
        return out.numbers

    def _nonnegative(self, listed: Sequence[Tensor], thresholds: Tensor | None) -> Tensor:
        if (compiled := self._kernel("nonnegative", listed, thresholds=thresholds)) is not None:
            return compiled
        flats = [flat(x) for x in listed]
        plan = self.plan(flats)
        result = torch.zeros(3, len(flats), dtype=self.dtype, device=self.device)
        sums, largest, below = result.unbind()
        partial = torch.zeros(3, len(plan.single_owners), dtype=self.dtype, device=self.device)
        slots = iter(zip(*(row.unbind() for row in partial), strict=True))
        limits = None if thresholds is None else sent(thresholds.to(self.dtype), self.device)
        first, _ = self._blocks(plan)
        for block in plan.blocks:
            x = block.load(flats, first)
            if block.pack is None:
                slot = next(slots)
                torch.sum(x, dim=0, out=slot[0])
                torch.amax(x, dim=0, out=slot[1])
                if limits is not None:
                    # In place, as 1.0 and 0.0: a fifth of the time of a mask and its count.
                    torch.sum(torch.lt(x, limits[block.members[0]], out=x), dim=0, out=slot[2])
            else:
                sums.index_copy_(0, block.pack.positions, segments(x, "sum", block.pack.sizes))
                largest.index_copy_(0, block.pack.positions, segments(x, "max", block.pack.sizes))
                if limits is not None:
                    each = limits[block.pack.positions].repeat_interleave(block.pack.sizes, output_size=block.stop)
                    torch.lt(x, each, out=x)
                    below.index_copy_(0, block.pack.positions, segments(x, "sum", block.pack.sizes))
        sums.index_add_(0, plan.single_owners, partial[0])
        largest.scatter_reduce_(0, plan.single_owners, partial[1], "amax")
        below.index_add_(0, plan.single_owners, partial[2])
        return result

    def _write(self, request: kernels.Request, alone: Callable[[], object]) -> None:
        """Have a request answered when `together` ends, where we are in it, else now: by what does it `alone`."""
        if self._waiting is None:
            alone()
        else:
            self._waiting.append((request, alone))

    def _kernel(
        self,
        kind: kernels.Kind,
        xs: Sequence[Tensor],
        ys: Sequence[Tensor] = (),
        positions: Sequence[int] | None = None,
        thresholds: Tensor | None = None,
    ) -> Tensor | None:
        """What the device's kernel makes of the tensors; None where there is none, or where it cannot read them."""
        kernel = kernels.kernel(self.device) if self._compiles else None
        if kernel is None or not xs:
            return None
        result = kernel.reduce(kind, xs, ys, positions, thresholds)
        if result is None:
            lefts, rights = list(xs), list(ys)
            for i, position in enumerate(range(len(ys)) if positions is None else positions):
                lefts[position], rights[i] = _aligned(lefts[position], rights[i])
            result = kernel.reduce(kind, [flat(x) for x in lefts], [flat(y) for y in rights], positions, thresholds)
        if result is not None and self.device.type == "cuda":
            self._scratch = None
        return result


def _answer(kernel: kernels.Kernel, waiting: Sequence[tuple[kernels.Request, Callable[[], object]]]) -> None:
    """Answer all requests by the kernel or, where it cannot read something, each on its own: a fault costs no other."""
    if kernel.run([request for request, _ in waiting]):
        for request, _ in waiting:
            for place in (request.out, request.pairs):
                if place is not None:
                    place.written()
            request.done()
        return
    with ExitStack() as each:
        for _, alone in reversed(waiting):
            each.callback(alone)


def _aligned(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The pair with its elements in one order."""
    return (x, y) if x.stride() == y.stride() else (x.contiguous(), y.contiguous())
