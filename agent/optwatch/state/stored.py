"""Moments that are not one tensor of their parameter's shape, and reductions over them that allocate no such tensor.

Each form yields its numbers in pieces of at most one block (see `training.blocks`), or reduces what it keeps as it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeGuard

import torch
from torch import Tensor

from optwatch.kernels import Located, Place
from optwatch.training.blocks import block_size
from optwatch.training.statistics import Reducer


class Compact(ABC):
    """A moment kept in another form than a plain tensor."""

    shape: tuple[int, ...] = ()
    """The parameter's shape where element i belongs to weight i; ``()`` where there is no such order."""

    @property
    @abstractmethod
    def entries(self) -> int:
        """Number of entries that it stands for: the n of a mean over it."""

    @abstractmethod
    def pieces(self) -> Iterator[Tensor]:
        """Its entries in order, as flat floating tensors of at most one block each, on the state's device."""

    def square_sum(self, reducer: Reducer) -> Tensor:
        """Σx², 0-d, in the reducer's dtype. Reads it once and never waits for the device."""
        return torch.stack([reducer.square_sums([piece])[0] for piece in self.pieces()]).sum()

    def nonnegative(self, reducer: Reducer, threshold: Tensor | None) -> Tensor:
        """Σx, max x and #{x < threshold} as shape ``(3,)``; ``threshold`` has shape ``(1,)``. One read."""
        each = torch.stack([reducer.nonnegative([piece], threshold)[:, 0] for piece in self.pieces()])
        return torch.stack([each[:, 0].sum(), each[:, 1].amax(), each[:, 2].sum()])

    def dot_product(self, reducer: Reducer, other: Tensor) -> Tensor:
        """Σx·y with a contiguous tensor of the same shape, 0-d."""
        flat, start, parts = other.reshape(-1), 0, []
        for piece in self.pieces():
            parts.append(reducer.dot_products([piece], [flat[start : start + piece.numel()]])[0])
            start += piece.numel()
        return torch.stack(parts).sum()


def _stretches(entries: int, unit: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Where to begin and stop, so that as many whole units (the last may be cut) as may be read at once are."""
    size = max(block_size(device) // unit, 1) * unit
    for start in range(0, entries, size):
        yield start, min(start + size, entries)


@dataclass(frozen=True, eq=False)
class Quantized(Compact):
    """Block-wise quantized numbers: ``table[code] * scale of its block``, or ``code * scale`` without a table.

    Dettmers et al. 2022, https://arxiv.org/abs/2110.02861 (8 bits) and Li et al. 2023, https://arxiv.org/abs/2309.01507
    (4 bits, two codes a byte, the first one in the high half).
    """

    codes: Tensor
    """uint8, or float8 without a table; ``entries`` of them, half as many where two share a byte."""
    scales: Tensor
    """Shape ``(blocks,)``."""
    table: Tensor | None
    """Shape ``(256,)`` or ``(16,)``: the number of each code."""
    block: int
    """Entries of a block."""
    shape: tuple[int, ...]
    packed: bool = False
    """Whether two codes share a byte."""

    @property
    def entries(self) -> int:
        """Entries of the parameter."""
        return prod(self.shape)

    def pieces(self) -> Iterator[Tensor]:
        """Dequantized blocks, float32."""
        codes = self.codes.reshape(-1)
        for start, stop in _stretches(self.entries, self.block, codes.device):
            if self.packed:
                part = codes[start // 2 : (stop + 1) // 2]
                part = torch.stack([part >> 4, part & 15], dim=-1).reshape(-1)[: stop - start]
            else:
                part = codes[start:stop]
            values = part.float() if self.table is None else self.table[part.int()]
            scales = self.scales[start // self.block : -(-stop // self.block)].float()
            if len(values) % self.block:
                scales = scales.repeat_interleave(self.block, output_size=len(scales) * self.block)[: len(values)]
                yield values.mul_(scales)
            else:
                yield values.view(-1, self.block).mul_(scales[:, None]).view(-1)


@dataclass(frozen=True, eq=False)
class Softsign(Compact):
    """FlashAdamW's state: codes of softsign-companded numbers in groups, the second moment as its square root.

    Entry = x/(2 − |x|) · scale with x = code / 127 (first moment), (code / 255 · scale)² (second moment).
    """

    codes: Tensor
    """int8 (first moment) or uint8 (second moment)."""
    scales: Tensor
    """float16, shape ``(groups,)``."""
    group: int
    root: bool
    """Whether the codes are of the square root, without softsign."""
    shape: tuple[int, ...]

    @property
    def entries(self) -> int:
        """Entries of the parameter."""
        return prod(self.shape)

    def pieces(self) -> Iterator[Tensor]:
        """Decoded groups, float32."""
        codes = self.codes.reshape(-1)
        for start, stop in _stretches(self.entries, self.group, codes.device):
            scales = self.scales[start // self.group : -(-stop // self.group)].float()
            scales = scales.repeat_interleave(self.group, output_size=len(scales) * self.group)[: stop - start]
            x = codes[start:stop].float()
            if self.root:
                yield x.div_(255).mul_(scales).square_()
            else:
                x.div_(127)
                yield x.div_(2 - x.abs()).mul_(scales)


@dataclass(frozen=True, eq=False)
class Factored(Compact):
    """A second moment kept as row means r and column means c of each matrix: v = r·cᵀ / mean(r).

    Shazeer & Stern 2018, algorithm 4, https://arxiv.org/abs/1804.04235. Mean and maximum follow from the factors.
    """

    rows: Tensor
    """Shape ``(..., m)``."""
    columns: Tensor
    """Shape ``(..., n)`` with the same leading dimensions."""

    @property
    def entries(self) -> int:
        """Entries of the parameter."""
        return self.rows.numel() * self.columns.shape[-1]

    def pieces(self) -> Iterator[Tensor]:
        """The product of the factors is never formed."""
        raise NotImplementedError("a factored moment is reduced from its factors")

    def nonnegative(self, reducer: Reducer, threshold: Tensor | None) -> Tensor:
        """Σv, max v and 0: no optimizer with factors compares v with an epsilon."""
        rows, columns = self.rows.to(reducer.dtype), self.columns.to(reducer.dtype)
        mean = rows.mean(-1)
        sums = rows.sum(-1) * columns.sum(-1) / mean
        largest = rows.amax(-1) * columns.amax(-1) / mean
        # A matrix whose rows are all 0 is 0, not 0/0.
        sums, largest = (x.masked_fill(mean == 0, 0) for x in (sums, largest))
        return torch.stack([sums.sum(), largest.amax(), torch.zeros_like(sums.sum())])


@dataclass(frozen=True, eq=False)
class Shared(Compact):
    """One entry for several weights (a row, a tensor): it stands for each of them."""

    values: Tensor
    repeats: int

    @property
    def entries(self) -> int:
        """Weights that its entries stand for."""
        return self.values.numel() * self.repeats

    def pieces(self) -> Iterator[Tensor]:
        """What is kept, once."""
        yield self.values.reshape(-1)

    def square_sum(self, reducer: Reducer) -> Tensor:
        """Σx² over the weights."""
        return super().square_sum(reducer) * self.repeats

    def nonnegative(self, reducer: Reducer, threshold: Tensor | None) -> Tensor:
        """Σx, max x and count over the weights."""
        sums, largest, below = super().nonnegative(reducer, threshold)
        return torch.stack([sums * self.repeats, largest, below * self.repeats])


@dataclass(frozen=True, eq=False)
class Parts(Compact):
    """Several tensors that together are the moment: blocks of a matrix, or a subspace."""

    tensors: tuple[Tensor, ...]

    @property
    def entries(self) -> int:
        """Entries that are kept."""
        return sum(x.numel() for x in self.tensors)

    def pieces(self) -> Iterator[Tensor]:
        """The tensors; a reducer cuts them into blocks itself."""
        return iter(self.tensors)


Stored = Tensor | Compact


def is_plain(values: Sequence[Stored]) -> TypeGuard[Sequence[Tensor]]:
    """Whether all are tensors as they are."""
    return isinstance(values, Located) or not any(isinstance(x, Compact) for x in values)


def entries(values: Sequence[Stored]) -> list[int]:
    """The n of a mean over each moment."""
    if isinstance(values, Located):
        return values.addresses.numbers()
    return [x.numel() if isinstance(x, Tensor) else x.entries for x in values]


def square_sums(reducer: Reducer, values: Sequence[Stored], out: Place | None = None) -> Tensor:
    """Σx² of each moment: shape ``(n,)``, in the reducer's dtype and on its device. Never waits for the device."""
    if is_plain(values):
        return reducer.square_sums(values, out)
    plain = [x for x in values if isinstance(x, Tensor)]
    each = iter(reducer.square_sums(plain).unbind())
    sums = torch.stack([next(each) if isinstance(x, Tensor) else x.square_sum(reducer) for x in values])
    if out is not None:
        out.write(sums)
    return sums


def dot_products(reducer: Reducer, lefts: Sequence[Tensor], rights: Sequence[Stored]) -> Tensor:
    """Σx·y of each pair of a gradient and a moment of its shape: shape ``(n,)``."""
    plain = [(x, y) for x, y in zip(lefts, rights, strict=True) if isinstance(y, Tensor)]
    dots = reducer.dot_products([x for x, _ in plain], [y for _, y in plain])
    if len(plain) == len(rights):
        return dots
    each = iter(dots.unbind())
    pairs = zip(lefts, rights, strict=True)
    return torch.stack([next(each) if isinstance(y, Tensor) else y.dot_product(reducer, x) for x, y in pairs])


def products(
    reducer: Reducer,
    gradients: Sequence[Tensor],
    positions: Sequence[int],
    moments: Sequence[Stored],
    out: tuple[Place, Place],
) -> None:
    """Write Σg² of each gradient, shape ``(n,)``, and Σg², Σg·m and Σm² of those at ``positions`` with their moments,
    shape ``(3, k)``."""
    if is_plain(moments):
        reducer.products(gradients, positions, moments, out)
        return
    squares = reducer.square_sums(gradients)
    each = squares.unbind()
    own = torch.stack([each[i] for i in positions])
    dots = dot_products(reducer, [gradients[i] for i in positions], moments)
    others = square_sums(reducer, moments)
    out[0].write(squares)
    out[1].write(torch.stack([own, dots, others]))


def nonnegative(reducer: Reducer, values: Sequence[Stored], thresholds: Tensor | None, out: Place) -> None:
    """Write Σx, max x and #{x < threshold} of each moment: shape ``(3, n)``. ``thresholds`` has shape ``(n,)``,
    float64."""
    if is_plain(values):
        reducer.nonnegative(values, thresholds, out)
        return
    plain = [i for i, x in enumerate(values) if isinstance(x, Tensor)]
    chosen = None if thresholds is None else torch.stack([thresholds[i] for i in plain]) if plain else None
    each = iter(reducer.nonnegative([values[i] for i in plain], chosen).unbind(1))  # type: ignore[misc]
    limits = [None] * len(values) if thresholds is None else [x.reshape(1) for x in thresholds.unbind()]
    columns = [
        next(each) if isinstance(x, Tensor) else x.nonnegative(reducer, limit)
        for x, limit in zip(values, limits, strict=True)
    ]
    out.write(torch.stack(columns, dim=1))


def aligned(moment: Stored, gradient: Tensor) -> bool:
    """Whether entry i of the moment belongs to entry i of the gradient, so that their product has a meaning."""
    if gradient.is_sparse or moment.shape != gradient.shape:
        return False
    return isinstance(moment, Tensor) or gradient.is_contiguous()
