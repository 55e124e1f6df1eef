"""How the tensors of one call of the CUDA kernel are cut into the work of its programs: a table on the host."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

BLOCK = 1024
"""Elements that a program reads at once."""
CHUNK = 64 * BLOCK
"""Fewest elements of a chunk, which is the work of one program."""
MOST_CHUNKS = 8192
"""Chunks of a call's large tensors, but for one more each."""
HEADER = 5
"""Numbers that a table begins with."""


@dataclass(frozen=True, slots=True)
class Form:
    """One compiled form of the kernels."""

    kind: str
    x_type: torch.dtype
    y_type: torch.dtype | None
    limited: bool
    aligned: bool


@dataclass(frozen=True, slots=True)
class Part:
    """The tensors of a call that one form reads: two launches at most."""

    form: Form
    members: tuple[int, ...]
    """Their positions in the list, those of several chunks first; empty tensors are in no part."""
    start: int
    """Of its table, in the call's."""
    programs: int
    several: int
    """Tensors of several chunks."""


class Cut:
    """How the tensors of a call are cut into chunks, on the host: the call's table, but for the addresses.

    Nothing of it stays on the device. A call over n tensors holds there, until its launches are through, a table of 32
    bytes a tensor and a result of 24; 8 and 24 for each chunk of the tensors that have several (S of them) and 8 for
    each of these. A chunk has at least ``1 / MOST_CHUNKS`` of all elements, hence S < ``MOST_CHUNKS`` and there are
    fewer than ``MOST_CHUNKS + S`` such chunks: 32 · 2 · 8192 + 8 · 8192 bytes are 576 KiB. In all that is at most
    1 MiB and 64 bytes a tensor.

    Args:
        sizes: elements of each tensor of the call.
        forms: of each.
        chunk: elements of a chunk, a multiple of ``BLOCK``; none: as above.
    """

    def __init__(self, sizes: Sequence[int], forms: Sequence[Form], chunk: int | None = None) -> None:
        chunk = chunk or max(CHUNK, BLOCK * -(-sum(sizes) // (MOST_CHUNKS * BLOCK)))
        groups: dict[Form, list[int]] = {}
        for i, form in enumerate(forms):
            if sizes[i]:
                groups.setdefault(form, []).append(i)
        self.parts: list[Part] = []
        self.table = array("q")
        self.rows = 0
        """Of three numbers each, for chunks."""
        for form, listed in groups.items():
            large = [i for i in listed if sizes[i] > chunk]
            members = large + [i for i in listed if sizes[i] <= chunk]
            counts = [-(-sizes[i] // chunk) for i in large]
            cut = sum(counts)
            self.parts.append(Part(form, tuple(members), len(self.table), cut + len(members) - len(large), len(large)))
            self.table.extend((len(members), len(sizes), chunk, cut, len(large)))
            self.table.extend([0] * (2 * len(members)))
            self.table.extend(sizes[i] for i in members)
            self.table.extend(members)
            for owner, count in enumerate(counts):
                self.table.extend(range(owner << 32, (owner << 32) + count))
            self.table.extend(sum(counts[:owner]) for owner in range(len(counts)))
            self.rows = max(self.rows, cut)
        self.forms = frozenset(groups)

    @property
    def device_bytes(self) -> int:
        """Most bytes on the device during a call, its result included."""
        return 8 * len(self.table) + 24 * self.rows + (24 * self.table[1] if self.parts else 0)

    def filled(self, xs: Sequence[int], ys: Sequence[int]) -> array[int]:
        """The table with these addresses, in the order of the list."""
        table = self.table[:]
        for part in self.parts:
            at = part.start + HEADER
            for addresses in (xs, ys) if part.form.y_type is not None else (xs,):
                table[at : at + len(part.members)] = array("q", [addresses[i] for i in part.members])
                at += len(part.members)
        return table
