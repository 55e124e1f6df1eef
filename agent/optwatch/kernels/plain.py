"""Tensors that may be read where they say they are, and those whose memory was given back meanwhile.

FSDP and offloading free the storage of a tensor that lives on. Neither a kernel nor most of torch's own operations
look: to read such a tensor ends the process.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import Parameter

PLAIN = frozenset({Tensor, Parameter})
"""Classes of tensors that are whole. An attribute that is not there takes a tensor a microsecond to miss."""
LOW = 1 << 38
"""Without memory the address of a tensor is its place in it, in bytes: below this."""


def any_freed(tensors: Sequence[Tensor], addresses: Sequence[int]) -> bool:
    """Whether one of these tensors, which have these addresses, is freed."""
    return min(addresses, default=LOW) < LOW and any(map(is_freed, tensors))


def is_freed(x: Tensor) -> bool:
    """Whether a plain dense tensor has elements and no memory that they are in. Never waits."""
    if type(x) not in PLAIN or x.is_meta or not x.numel():
        return False
    return x.data_ptr() == x.storage_offset() * x.element_size()


def require_memory(x: Tensor) -> None:
    """To be called before torch's operations read `x`. Never waits.

    Raises:
        FreedMemoryError: it is freed.
    """
    if is_freed(x):
        raise FreedMemoryError(x)


class FreedMemoryError(RuntimeError):
    """The memory of a tensor was given back."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(
            f"the memory of a tensor of shape {tuple(x.shape)}, {x.dtype} on {x.device}, was given back, so that its "
            "statistics cannot be read and are not exported: put it back before optimizer.step(), or take the "
            "parameter out of the optimizer"
        )
