"""Bytes of an optimizer's state, where they really lie: inner tensors, nested containers, wrapped optimizers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .wrappers import chain


def state_bytes(optimizer: Optimizer) -> dict[tuple[str, str], int]:
    """Exact bytes of the optimizer's state by (key, dtype). Reads no tensor's contents.

    Counts what is inside quantized tensors (codes, scales, tables), in nested lists, dicts and helper objects, of
    sharded tensors what this process holds, and the state of an optimizer that is wrapped. A tensor that several
    entries share counts once; parameters do not count. ``dtype`` is written as in ``float32``. Step counters count too:
    they are state, and on the device where capturable.
    """
    total: dict[tuple[str, str], int] = {}
    seen = {_identity(p) for group in optimizer.param_groups for p in group["params"] for p in _storage(p)}
    for part in chain(optimizer):
        for owner, state in getattr(part.state, "kept", part.state).items():
            items = state.items() if isinstance(state, Mapping) else ((owner, state),)
            for key, value in items:
                for tensor in _tensors(value, set()):
                    identity = _identity(tensor)
                    if identity in seen:
                        continue
                    seen.add(identity)
                    entry = (str(key), str(tensor.dtype).removeprefix("torch."))
                    total[entry] = total.get(entry, 0) + tensor.numel() * tensor.element_size()
    return total


def extent(optimizer: Optimizer, nested: bool) -> tuple[int, ...]:
    """Changes when the state has got or lost tensors: counts of entries, and of what nested containers hold."""
    counts = [0, 0, 0]
    for part in chain(optimizer):
        counts[0] += len(part.state)
        for state in part.state.values():
            if isinstance(state, Mapping):
                counts[1] += len(state)
                if nested:
                    counts[2] += sum(_length(value) for value in state.values())
    return tuple(counts)


def _length(value: object) -> int:
    if isinstance(value, Tensor):
        return value.numel()
    return len(value) if isinstance(value, (list, tuple, deque, Mapping)) else 0


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """The same for tensors that are the same bytes. Reads no address, which a fake tensor does not have."""
    return (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.numel(), tensor.dtype)


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield from _storage(value)
    elif isinstance(value, (str, bytes, int, float, type, nn.Module, Optimizer)) or value is None or id(value) in seen:
        return
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, (list, tuple, set, deque)):
        for item in value:
            yield from _tensors(item, seen)
    elif hasattr(value, "__dict__") and not callable(value):
        # A helper object, such as a projector or a preconditioner, which keeps tensors of its own.
        seen.add(id(value))
        for item in vars(value).values():
            yield from _tensors(item, seen)


def _storage(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that hold a tensor's numbers: itself, or the inner ones of a subclass."""
    if tensor.is_sparse:
        yield from (tensor._indices(), tensor._values())
    elif hasattr(tensor, "__tensor_flatten__"):
        inner = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        for part in inner:
            if isinstance(part, Tensor):  # a DTensor lists its mesh as well
                yield from _storage(part)
    else:
        yield tensor


def is_empty(optimizer: Optimizer) -> bool:
    """Whether no parameter has any state (yet), here or in an optimizer that is wrapped."""
    return not any(state for part in chain(optimizer) for state in part.state.values() if isinstance(state, Mapping))
