"""The digest of a tensor: a few numbers that change when any bit of it does, or when two of its elements change places.

The tensor's bytes are read as 32-bit words x_i in logical order (16- or 8-bit ones where their number does not divide),
and summed twice in 64-bit integers that wrap around: Σx_i and Σ(i+1)·x_i. Integer sums have no order, so the result is
the same on every device and for every block size. One flipped bit changes both. Of two flipped bits, the same bit in
two words changes the second sum (2^b·(i±j) is no multiple of 2^64 for b < 32 and fewer than 2^32 words), and different
bits change the first; `torch.hash_tensor`, an XOR, misses the former.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optwatch.kernels.plain import require_memory
from optwatch.training.statistics import Reducer

CPU_BLOCK = 65_536
"""Words of a block on a CPU: half a megabyte of int64, which stays in a core's cache."""
DEVICE_BLOCK = 4_194_304
"""Words of a block elsewhere."""
NUMBERS = 4
"""Numbers of a reading: the two sums, the squared norm's bits, and whether 16 bits would hold every element."""
ROUNDED_BITS = 0x1FFF
"""Bits of a float32 that are 0 where the number came out of a float16 or bfloat16."""


@dataclass(frozen=True, slots=True)
class Digest:
    """What a tensor was."""

    dtype: str
    """As in ``float32``."""
    shape: tuple[int, ...]
    """Of the local shard where the tensor is sharded."""
    norm: float
    """L2 norm; 0 where the dtype has none."""
    total: int
    """Σx_i of its words, modulo 2^64."""
    weighted: int
    """Σ(i+1)·x_i, modulo 2^64."""
    rounded: bool = False
    """A float32 tensor, of which every element is one that a 16-bit dtype holds."""

    @property
    def contents(self) -> tuple[object, ...]:
        """Equal for two tensors exactly where dtype, shape and, but for a collision, all bits are."""
        return (self.dtype, self.shape, self.total, self.weighted)


def parts(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a value of optimizer state consists of, each with its path below `name`.

    Goes into mappings and sequences (Shampoo, SOAP), takes the local shard of a DTensor, and the inner tensors of
    subclasses such as torchao's 8-bit states.
    """
    if isinstance(value, Tensor):
        if hasattr(value, "to_local"):
            yield from parts(value.to_local(), name)
        elif hasattr(value, "__tensor_flatten__"):
            for inner in value.__tensor_flatten__()[0]:
                yield from parts(getattr(value, inner), f"{name}.{inner}")
        elif value.is_sparse:
            coalesced = value.detach().coalesce()
            yield f"{name}.indices", coalesced.indices()
            yield f"{name}.values", coalesced.values()
        else:
            yield name, value.detach()
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from parts(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from parts(item, f"{name}.{i}")


class Digester:
    """Digests tensors of one device. Launches only: nothing waits for the device until the readings are looked at."""

    def __init__(self, device: torch.device, *, rounding: bool = False, block: int | None = None) -> None:
        """``rounding`` also looks whether float32 tensors have been through 16 bits: one more read of them. ``block``:
        words read at once, for which 16 bytes each are held on the device."""
        self._rounding = rounding
        self._block = block or (CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK)
        self._reducer = Reducer(device)
        self._weights = torch.arange(1, self._block + 1, dtype=torch.int64, device=device)
        self._scratch = torch.empty(self._block, dtype=torch.int64, device=device)

    def readings(self, tensors: Sequence[Tensor]) -> Tensor:
        """The numbers of the digests of dense tensors: shape ``(n, 4)``, int64, on their device; see `digest`.

        Costs two reads of each, and a copy of one that is not contiguous. Allocates a few numbers a block otherwise.
        """
        device = self._scratch.device
        found = torch.zeros(len(tensors), NUMBERS, dtype=torch.int64, device=device)
        for row, tensor in zip(found, tensors, strict=True):
            self._sum(tensor, row)
        floating = [i for i, tensor in enumerate(tensors) if tensor.is_floating_point() or tensor.is_complex()]
        if floating:
            squares = self._reducer.square_sums([tensors[i] for i in floating]).double().view(torch.int64)
            for i, square in zip(floating, squares, strict=True):  # an index from the host would be waited for
                found[i, 2] = square
        return found

    def sums(self, tensors: Sequence[Tensor]) -> Tensor:
        """The two sums of each tensor alone: shape ``(n, 2)``, int64, on their device. Costs what `readings`
        does, without its norms."""
        found = torch.zeros(len(tensors), NUMBERS, dtype=torch.int64, device=self._scratch.device)
        for row, tensor in zip(found, tensors, strict=True):
            self._sum(tensor, row)
        return found[:, :2]

    def _sum(self, tensor: Tensor, row: Tensor) -> None:
        words = _words(tensor)
        starts = range(0, words.numel(), self._block)
        sums = torch.zeros(2, len(starts), dtype=torch.int64, device=tensor.device)
        look = self._rounding and tensor.dtype == torch.float32
        longer = torch.zeros((), dtype=torch.int64, device=tensor.device)
        for i, start in enumerate(starts):
            chunk = words[start : start + self._block]
            scratch = self._scratch[: chunk.numel()].copy_(chunk)
            torch.sum(scratch, dim=0, out=sums[0, i])
            torch.sum(scratch.mul_(self._weights[: chunk.numel()]), dim=0, out=sums[1, i])
            if look:
                longer += torch.bitwise_and(chunk, ROUNDED_BITS).count_nonzero()
        torch.sum(sums[0], dim=0, out=row[0])
        if len(starts) > 1:  # position start + i + 1 in the whole is i + 1 in the block
            sums[1] += sums[0] * torch.arange(len(starts), dtype=torch.int64, device=tensor.device) * self._block
        torch.sum(sums[1], dim=0, out=row[1])
        if look:
            row[3] = longer == 0


def digest(dtype: torch.dtype, shape: tuple[int, ...], reading: list[int]) -> Digest:
    """The digest of a tensor from its reading, which has been copied to the host."""
    total, weighted, bits, rounded = reading
    square = torch.tensor(bits, dtype=torch.int64).view(torch.float64)
    return Digest(
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        norm=float(square.sqrt()),
        total=total % 2**64,
        weighted=weighted % 2**64,
        rounded=bool(rounded),
    )


def _words(tensor: Tensor) -> Tensor:
    """All bytes as signed integers, in logical order; how wide they are depends on the number of bytes only."""
    require_memory(tensor)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.contiguous().reshape(-1)
    size = flat.numel() * flat.element_size()
    word = torch.int32 if size % 4 == 0 else torch.int16 if size % 2 == 0 else torch.int8
    ratio = max(1, word.itemsize // flat.element_size())
    # A view of words has to begin at one, and to be dense even where it has one element.
    if flat.storage_offset() % ratio or flat.stride(0) != 1:
        flat = flat.clone(memory_format=torch.contiguous_format).as_strided(flat.shape, (1,))
    return flat.view(word)
