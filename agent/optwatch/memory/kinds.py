"""Parameters that an optimizer treats alike, and what their state comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True, slots=True)
class Kind:
    """Parameters that an optimizer treats alike: one of them is run for all."""

    group: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    held: tuple[str, ...]
    """Keys of the state that each has already."""


@dataclass(frozen=True)
class Sizes:
    """What the state of one kind of parameters comes to once all of it is there."""

    kind: Kind
    total: int
    """Bytes of all of them together."""
    held: int
    """Bytes that they have already."""


def kinds(optimizer: Optimizer) -> dict[Kind, list[Tensor]]:
    """The optimizer's parameters that take part in a step, by kind. Reads no contents and waits for no device."""
    found: dict[Kind, list[Tensor]] = {}
    for index, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if p.requires_grad or p.grad is not None:
                mine = local(p)
                held = tuple(map(str, optimizer.state.get(p, ())))
                kind = Kind(index, tuple(mine.shape), mine.dtype, mine.device, held)
                found.setdefault(kind, []).append(p)
    return found


def local(parameter: Tensor) -> Tensor:
    """The part of a parameter that this rank holds: the tensor itself, or the local shard of a DTensor."""
    whole: Any = parameter
    shard: Tensor = whole.to_local() if type(parameter).__name__ == "DTensor" else parameter
    return shard.detach()
