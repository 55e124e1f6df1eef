"""Optimizer state: where each optimizer keeps its moments, what they mean in its step, and how many bytes there are.

A reader is found by the optimizer's class, or the known class that it derives from, by name: no package is imported for
it. A class that is not known has no moments for us, since a number read under a wrong name would be worse than none. To
add an optimizer, add a row to its package's table and a definition to ``tests/agent/state/optimizer_proof``.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from torch.optim import Optimizer

from . import bitsandbytes, pytorch_optimizer, small_packages, torch_optim
from .reader import Denominator, Entry, Reader, Unavailable
from .size import extent, is_empty, state_bytes
from .stored import Compact, Stored, aligned, dot_products, entries, is_plain, nonnegative, products, square_sums
from .wrappers import class_names, holder, rescaled

READERS: dict[str, Reader] = {
    **torch_optim.READERS,
    **pytorch_optimizer.READERS,
    **small_packages.SCHEDULEFREE,
    **small_packages.LION_PYTORCH,
    **small_packages.TRANSFORMERS,
    **small_packages.TORCHAO,
    **bitsandbytes.READERS,
}
"""By ``package.Class``."""

PACKAGES = frozenset(name.partition(".")[0] for name in READERS)
"""Packages whose classes are listed one by one."""


def reader_for(optimizer: Optimizer) -> Reader:
    """The reader of this optimizer, or of the one inside a known wrapper: what of its state can be read exactly.

    A class of one's own that derives from a known one is read as that one, unless it replaces its ``step`` without
    calling it: then, as for a class that is not known, every moment is unavailable and the reason says so.
    """
    inside = holder(optimizer)
    kind = type(inside)
    for base, name in zip(kind.__mro__, class_names(kind), strict=True):
        if name in READERS:
            if replaces_step(kind, base):
                return unknown(f"{kind.__qualname__} replaces step() of {base.__qualname__}")
            return _as_wrapped(READERS[name], rescaled(optimizer))
        if base is not kind and base is Optimizer:
            break
    return unknown(f"the state of {kind.__module__}.{kind.__qualname__} is not known")


def _as_wrapped(reader: Reader, reason: str | None) -> Reader:
    if reason is None or isinstance(reader.denominator, Unavailable):
        return reader
    return replace(reader, denominator=replace(reader.denominator, rate=Unavailable(reason)))


def is_sharded(optimizer: Optimizer) -> bool:
    """Whether the state is spread over the ranks, so that what this process holds is a part of each moment."""
    zero = "torch.ZeroRedundancyOptimizer" in class_names(type(optimizer))
    return zero and getattr(optimizer, "world_size", 1) > 1


def unknown(reason: str) -> Reader:
    """A reader that reads nothing, for this reason."""
    missing = Unavailable(reason)
    return Reader(missing, missing, missing, grows=True)


def replaces_step(kind: type, known: type) -> bool:
    """Whether `kind` has a ``step`` of its own that does not call the one of `known`."""
    own, original = _function(kind), _function(known)
    if own is original or own is None or original is None:
        return False
    # A method that uses super() holds the cell __class__; one that calls Base.step(self) names the base.
    code = own.__code__
    return "__class__" not in code.co_freevars and known.__name__ not in code.co_names


def _function(kind: type) -> Any:
    step = inspect.unwrap(kind.step)  # type: ignore[attr-defined]  # torch wraps it for hooks and profiles
    return step if hasattr(step, "__code__") else None


__all__ = [
    "PACKAGES",
    "READERS",
    "Compact",
    "Denominator",
    "Entry",
    "Reader",
    "Stored",
    "Unavailable",
    "aligned",
    "dot_products",
    "entries",
    "extent",
    "holder",
    "is_empty",
    "is_plain",
    "is_sharded",
    "nonnegative",
    "products",
    "reader_for",
    "square_sums",
    "state_bytes",
    "unknown",
]
