"""Lists of tensors cut into blocks of one scratch, which torch's operations read one by one (see `statistics`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optwatch.kernels.plain import require_memory

from .transfer import numbers

CPU_BLOCK = 65_536
"""Elements of a block on a CPU: half a megabyte of float64, which stays in a core's cache."""
DEVICE_BLOCK = 1_048_576
"""Elements of a block elsewhere: large enough that a launch is not the cost."""


def block_size(device: torch.device) -> int:
    """Elements that are read at once on a device."""
    return CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK


def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest floating dtype that `device` computes in: float64, but float32 on Apple's GPUs, which have no more."""
    return torch.float32 if device.type == "mps" else torch.float64


def flat(tensor: Tensor) -> Tensor:
    """A one-dimensional real view of a dense tensor's elements, in storage order where that is possible.

    Shape ``(numel,)``, same dtype (complex numbers as pairs of reals) and device. No copy for tensors that are dense in
    memory in any order of dimensions; only a strided or expanded one is copied. The entries of a sparse tensor are its
    coalesced values, which is what a norm needs.

    Raises:
        FreedMemoryError: it has no memory to be read.
    """
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    require_memory(tensor)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_contiguous():
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        tensor = tensor.permute(order)
    return tensor.reshape(-1)


@dataclass(frozen=True, slots=True)
class Pack:
    """Several small tensors that share a block: their positions in the list and their sizes, shape ``(k,)``, int64."""

    positions: Tensor
    sizes: Tensor


@dataclass(frozen=True, slots=True)
class Block:
    """A run of at most one scratch of elements: a slice of one large tensor, or several small tensors whole."""

    members: tuple[int, ...]
    """Positions of its tensors in the list."""
    start: int
    stop: int
    """Slice of the only member; ``0`` and the sum of the sizes where there are several."""
    pack: Pack | None
    """Set where there are several."""

    def load(self, flats: Sequence[Tensor], scratch: Tensor) -> Tensor:
        """The elements of the block, widened into the scratch."""
        view = scratch[: self.stop - self.start]
        if self.pack is None:
            return view.copy_(flats[self.members[0]][self.start : self.stop])
        # Joined in their own dtype first: joining and widening in one call is ten times slower for small tensors.
        return view.copy_(torch.cat([flats[position] for position in self.members]))


class Plan:
    """How one list of tensors, known by its sizes, is cut into blocks. Made once and kept while the sizes hold."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        most = block_size(device)
        self.sizes = tuple(sizes)
        self.blocks: list[Block] = []
        pack: list[int] = []
        packed = 0
        for position, size in enumerate(sizes):
            if packed + size > most:
                self._close(pack, device)
                pack, packed = [], 0
            if size > most:
                for start in range(0, size, most):
                    self.blocks.append(Block((position,), start, min(start + most, size), None))
            elif size:
                pack.append(position)
                packed += size
        self._close(pack, device)
        self.largest = max((block.stop - block.start for block in self.blocks), default=0)
        # Blocks with one member each leave one partial result; these are folded into their tensors by one index_add.
        single = [block.members[0] for block in self.blocks if block.pack is None]
        self.single_owners = numbers(single, torch.int64, device)

    def _close(self, pack: list[int], device: torch.device) -> None:
        if len(pack) == 1:
            self.blocks.append(Block((pack[0],), 0, self.sizes[pack[0]], None))
        elif pack:
            sizes = [self.sizes[position] for position in pack]
            packed = Pack(numbers(pack, torch.int64, device), numbers(sizes, torch.int64, device))
            self.blocks.append(Block(tuple(pack), 0, sum(sizes), packed))


def segments(x: Tensor, reduce: str, sizes: Tensor) -> Tensor:
    """Reduce consecutive segments of `x`. ``unsafe`` leaves out a check of the sizes, which would read them."""
    return torch.segment_reduce(x, reduce, lengths=sizes, unsafe=True)
