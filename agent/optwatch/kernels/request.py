"""What is asked of a kernel: which tensors are to be read, how, and where their numbers go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Kind = Literal["products", "nonnegative", "changes", "copy"]


@dataclass(slots=True, eq=False)
class Place:
    """Where the numbers of a reduction go."""

    numbers: Tensor
    written: Callable[[], object] = lambda: None
    """Called once they are there, and never if they could not be had."""

    def write(self, numbers: Tensor) -> None:
        """Write them."""
        self.numbers.copy_(numbers, non_blocking=True)
        self.written()


@dataclass(slots=True, eq=False)
class Request:
    """Tensors that are to be read alike, and where their numbers go: see `Kernel.reduce` for what they are. Or to be
    copied, each to its y, of its size and dtype: of these there are no numbers."""

    kind: Kind
    xs: Sequence[Tensor]
    out: Place | None
    """Shape ``(n,)`` for the first number of each x, or ``(k, n)`` for the first k: float64, on the CPU, its last
    dimension dense."""
    ys: Sequence[Tensor] = ()
    positions: Sequence[int] | None = None
    """Of the x that have a y; each has where it is None."""
    thresholds: Tensor | None = None
    pairs: Place | None = None
    """Shape ``(3, len(ys))``, likewise: all three numbers of the x that have a y, once more."""
    done: Callable[[], object] = lambda: None
    """Called once it has been answered, and never if it could not be."""
