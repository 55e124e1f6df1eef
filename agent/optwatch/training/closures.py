"""Steps that make their gradients themselves: closures (LBFGS) and optimizers that step another one inside (SAM).

What counts as *the* gradient and *the* loss of such a step:

- of ``step(closure)``: those of the closure's first evaluation, which is at the weights before the step; what came in
  before the step is the loss where something did;
- of SAM, given a closure or stepped as ``first_step()`` and ``second_step()``: the gradient its base optimizer steps
  with, and the loss of the pass before ``first_step()``, which is at the weights and not beside them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

Closure = Callable[[], Any]


def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Closure | None:
    """The closure among the arguments of ``Optimizer.step``, the optimizer included as the first of them."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    return closure if callable(closure) else None


def replaced(args: tuple[Any, ...], kwargs: dict[str, Any], closure: Closure) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with another closure."""
    if len(args) > 1:
        return (args[0], closure, *args[2:]), kwargs
    return args, kwargs | {"closure": closure}


def followed(closure: Closure, after: Callable[[], None]) -> Closure:
    """A closure that does and returns what `closure` does, and calls `after` behind each evaluation that succeeded."""

    @functools.wraps(closure, updated=())
    def evaluate() -> Any:
        result = closure()
        after()
        return result

    return evaluate


def base_optimizer(optimizer: Optimizer) -> Optimizer | None:
    """The optimizer that this one steps with gradients of its own making, as the family of SAM does."""
    base = getattr(optimizer, "base_optimizer", None)
    return base if isinstance(base, Optimizer) and base is not optimizer else None


def after_method(owner: Any, name: str, after: Callable[[], None]) -> Callable[[], None]:
    """Call `after` behind each call of this instance's method that succeeded. Returns what puts the method back."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        after()
        return result

    return _replace(owner, name, method)


def around_method(owner: Any, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Call ``around(original, ...)`` instead of this instance's method. Returns what puts the method back."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    return _replace(owner, name, method)


def _replace(owner: Any, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    def restore() -> None:
        if vars(owner).get(name) is method:  # and not somebody's wrapper around it
            delattr(owner, name)

    setattr(owner, name, method)
    return restore
