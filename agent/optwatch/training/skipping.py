"""Leaving out the steps whose gradient is not finite, which `Settings.skip_nonfinite_steps` asks for.

Weights and moments stay what they were, to the bit. That takes no synchronisation: a fused optimizer of torch's is told
on its device, by the attribute ``found_inf`` with which a GradScaler tells it, and its kernel writes nothing. Where the
parameters are on a CPU the gradient's sums can be read at once, and ``step()`` returns without having been run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optwatch.kernels.plain import PLAIN

from . import closures


class Skipping:
    """Skips steps of one optimizer.

    Args:
        optimizer: One of torch's with ``fused=True``, or one of which every parameter is on a CPU.
        name: What messages call it.
        refuse: Asked on a CPU, before each step, whether to leave it out.

    Raises:
        ValueError: steps of this optimizer cannot be left out without waiting for its device, or not alike on all
            ranks; the message says what to do.
    """

    def __init__(self, optimizer: Optimizer, name: str, refuse: Callable[[], bool]) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        option = f"Settings(skip_nonfinite_steps=True): {name}"
        if any(type(p) not in PLAIN for p in parameters):
            raise ValueError(f"{option} has sharded parameters, whose ranks would not skip alike: use a GradScaler")
        if closures.base_optimizer(optimizer) is not None:
            raise ValueError(f"{option} steps an optimizer of its own: give it, or leave the option out")
        self.on_device = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        """Whether it is told by ``found_inf``."""
        if not self.on_device and any(p.device.type != "cpu" for p in parameters):
            raise ValueError(
                f"{option} would wait for its device before each step: make it with fused=True (Adam, AdamW, SGD "
                "and Adagrad of torch.optim have it)"
            )
        self._optimizer = optimizer
        self._told = False
        self._active = True
        self._restore: Callable[[], None] = lambda: None
        if not self.on_device:
            self._wrap(refuse)

    def tell(self, squares: Tensor) -> Tensor | None:
        """Before a step: have the kernel skip it if any of these sums of squares of gradients is not finite.

        Returns:
            0-d, float32, on their device: 1 where it will be skipped, else 0; None where a GradScaler has told already.
        """
        self.stepped()
        if getattr(self._optimizer, "found_inf", None) is not None:
            return None
        found = (~torch.isfinite(squares)).any().to(torch.float32)
        self._optimizer.found_inf = found  # type: ignore[attr-defined]
        self._told = True
        return found

    def stepped(self) -> None:
        """After a step: what was told held for it only."""
        if self._told:
            self._told = False
            del self._optimizer.found_inf  # type: ignore[attr-defined]

    def remove(self) -> None:
        """Put the optimizer's ``step`` back."""
        self.stepped()
        self._restore()
        self._active = False  # a scheduler that has wrapped our step goes on calling it

    def _wrap(self, refuse: Callable[[], bool]) -> None:
        optimizer: Any = self._optimizer
        original = optimizer.step

        @functools.wraps(original)
        def function(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            # A closure makes its gradients within the step: nothing is known of them yet.
            if self._active and closures.given((optimizer, *args), kwargs) is None and refuse():
                return None
            return original(*args, **kwargs)

        step = MethodType(function, optimizer)  # schedulers wrap it, and want it bound
        own = vars(optimizer).get("step")

        def restore() -> None:
            if vars(optimizer).get("step") is step:  # and not somebody's wrapper around it
                if own is None:
                    del optimizer.step
                else:
                    optimizer.step = own

        optimizer.step = step
        self._restore = restore
