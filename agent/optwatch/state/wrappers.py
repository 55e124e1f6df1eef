"""Optimizers that hold another one: which attribute it is under, and the chain from the outermost to the one inside."""

from __future__ import annotations

from collections.abc import Iterator

from torch.optim import Optimizer

INNER: dict[str, str] = {
    "accelerate.AcceleratedOptimizer": "optimizer",
    "pytorch_optimizer.FriendlySAM": "base_optimizer",
    "pytorch_optimizer.GSAM": "base_optimizer",
    "pytorch_optimizer.LookSAM": "base_optimizer",
    "pytorch_optimizer.Lookahead": "optimizer",
    "pytorch_optimizer.Magma": "optimizer",
    "pytorch_optimizer.OrthoGrad": "optimizer",
    "pytorch_optimizer.PCGrad": "optimizer",
    "pytorch_optimizer.SAM": "base_optimizer",
    "pytorch_optimizer.SafeFP16Optimizer": "optimizer",
    "pytorch_optimizer.ScheduleFreeWrapper": "optimizer",
    "pytorch_optimizer.TRAC": "optimizer",
    "pytorch_optimizer.WSAM": "base_optimizer",
    "schedulefree.ScheduleFreeWrapper": "base",
    "schedulefree.ScheduleFreeWrapperReference": "base",
    "torch.ZeroRedundancyOptimizer": "optim",
}
"""Attribute of the optimizer that a wrapper steps, by the wrapper's package and class."""


RESCALED: dict[str, str] = {
    "pytorch_optimizer.Magma": "each tensor's step is damped or left out",
    "pytorch_optimizer.ScheduleFreeWrapper": "the step moves averaged weights too",
    "pytorch_optimizer.TRAC": "each step is scaled towards the weights that training began with",
    "pytorch_optimizer.WSAM": "the step is corrected by a measure of sharpness",
    "schedulefree.ScheduleFreeWrapper": "the step moves averaged weights too",
    "schedulefree.ScheduleFreeWrapperReference": "the step moves averaged weights too",
}
"""Wrappers that change how far the step inside goes, and how."""


def class_names(kind: type) -> Iterator[str]:
    """``package.Class`` of a class and of each class that it derives from, most derived first.

    The top-level package and the class name: where a package keeps the module changes with its versions.
    """
    for base in kind.__mro__:
        yield f"{base.__module__.partition('.')[0]}.{base.__qualname__}"


def inner(optimizer: Optimizer) -> Optimizer | None:
    """The optimizer inside a known wrapper, or None."""
    attribute = next((INNER[name] for name in class_names(type(optimizer)) if name in INNER), None)
    held = getattr(optimizer, attribute, None) if attribute else None
    return held if held is not optimizer and hasattr(held, "state") and hasattr(held, "param_groups") else None


def hookable(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself, or the first inside it that can be hooked: Accelerate's passes `step` on and runs none."""
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and (held := inner(optimizer)) is not None:
        optimizer = held
    return optimizer


def chain(optimizer: Optimizer) -> Iterator[Optimizer]:
    """The optimizer and those inside it, from the outside in; each whose state is its own, once."""
    states: set[int] = set()
    current: Optimizer | None = optimizer
    while current is not None:
        if id(current.state) not in states:
            states.add(id(current.state))
            yield current
        current = inner(current)


def holder(optimizer: Optimizer) -> Optimizer:
    """The innermost optimizer: the one whose state holds the moments."""
    while (held := inner(optimizer)) is not None:
        optimizer = held
    return optimizer


def rescaled(optimizer: Optimizer) -> str | None:
    """How a wrapper changes the length of the step inside, if it does."""
    reasons = (RESCALED[name] for part in chain(optimizer) for name in class_names(type(part)) if name in RESCALED)
    return next(reasons, None)
