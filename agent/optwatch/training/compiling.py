"""Hooks in a step that torch.compile traces: outside the graph where it may be broken, nowhere where it may not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

Hook = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


class WholeGraphError(RuntimeError):
    """A step is compiled into one graph."""

    def __init__(self) -> None:
        super().__init__(
            "optimizer.step() is compiled with fullgraph=True, whose one graph holds no Python: its steps, losses and "
            "norms are not exported. Compile it with fullgraph=False to have them; the break costs nothing more than "
            "the hook"
        )


def hook(work: Hook, whole_graph: Callable[[], None]) -> Hook:
    """`work` as a hook of ``Optimizer.step`` that no compiled graph holds.

    Called in Python where the step is not compiled, and where its graph may be broken. With ``fullgraph=True`` a break
    is an error, and a graph of torch's writes weights back at its end, so that nothing in it could read them either:
    then the hook is left out, and `whole_graph` is called while the step is traced.
    """
    disable: Callable[[Hook], Hook] = torch.compiler.disable
    constant: Callable[[Callable[[], bool]], Callable[[], bool]] = torch.compiler.assume_constant_result
    outside = disable(work)

    def within_whole_graph() -> bool:
        if whole := not _may_break():
            whole_graph()
        return whole

    left_out = constant(within_whole_graph)  # asked while tracing; the graph holds the answer

    @functools.wraps(work)
    def traced(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_dynamo_compiling() and left_out():
            return None
        return outside(optimizer, args, kwargs)

    return traced


def _may_break() -> bool:
    """Whether the graph that is being traced may be broken. Torch has no public name for it: where it cannot be told
    it may not, since a lost statistic is better than a training run that ends."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        tracer = InstructionTranslator.current_tx()
        return not (tracer.one_graph or tracer.error_on_graph_break)
    except Exception:  # noqa: BLE001
        return False
