"""What the optimizers will allocate at their first step, against the memory that is free."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, prod

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer, SparseAdam

from optwatch.events import Event
from optwatch.state import state_bytes

from .families import ALTERNATIVES, FAMILIES, Shape
from .families import state_bytes as family_bytes
from .kinds import Kind, Sizes, kinds


@dataclass(frozen=True)
class Forecast:
    """What one optimizer's state comes to. Bytes on this rank."""

    optimizer: str
    total: int | None
    """Once all of it is allocated, with what is there already; None where it cannot be told."""
    held: int
    """There already: loaded, or made by the constructor."""
    unavailable: str | None = None
    """Why there is no total."""
    missing: dict[torch.device, int] = field(default_factory=dict)
    """To be allocated, by device."""
    gradients: dict[torch.device, int] = field(default_factory=dict)
    """Gradients that are not there yet, by device."""
    shapes: dict[torch.device, Counter[tuple[Shape, int]]] = field(default_factory=dict)
    """How often each (shape, bytes of an entry) occurs among the parameters, by device."""


def forecast(optimizer: Optimizer, name: str) -> Forecast:
    """What `optimizer` will keep, found by running its own ``step()`` on tensors without data (see `standin`).

    Reads shapes only: allocates nothing, waits for no device and changes nothing. Where the class does not run on such
    tensors and has no formula, ``unavailable`` says why.
    """
    held = sum(state_bytes(optimizer).values())
    of_kind = kinds(optimizer)
    gradients: Counter[torch.device] = Counter()
    shapes: dict[torch.device, Counter[tuple[Shape, int]]] = {}
    for kind, members in of_kind.items():
        gradients[kind.device] += kind.dtype.itemsize * prod(kind.shape) * sum(p.grad is None for p in members)
        shapes.setdefault(kind.device, Counter())[kind.shape, kind.dtype.itemsize] += len(members)
    missing: Counter[torch.device] = Counter()
    unavailable, total = None, 0
    try:
        # Here and not above: it is built on parts of torch that a version of torch may not have.
        from .standin import grown_state

        for sizes in _by_formula(optimizer, of_kind) or grown_state(optimizer):
            missing[sizes.kind.device] += max(0, sizes.total - sizes.held)
            total += sizes.total
    except Exception as error:  # noqa: BLE001 - whatever the class makes of tensors without data
        unavailable = f"{type(error).__name__}: {error}"[:300]
        missing.clear()
    return Forecast(name, None if unavailable else total, held, unavailable, missing, gradients, shapes)


def _by_formula(optimizer: Optimizer, of_kind: Mapping[Kind, list[Tensor]]) -> list[Sizes]:
    """For classes that do not run on tensors without data; empty for all others.

    SparseAdam takes sparse gradients only, and keeps two moments of the parameter's own shape. LBFGS looks at all
    parameters as one vector of n entries, and keeps ``history_size`` directions and gradient differences of it, the
    last gradient and the direction (Nocedal & Wright 2006, algorithm 7.5): what it has once its history is full.
    """
    copies = 0
    if isinstance(optimizer, SparseAdam):
        copies = 2
    elif isinstance(optimizer, LBFGS):
        copies = 2 * optimizer.param_groups[0]["history_size"] + 2
    held = sum(state_bytes(optimizer).values())
    size = {kind: len(members) * prod(kind.shape) * kind.dtype.itemsize for kind, members in of_kind.items()}
    whole = max(1, sum(size.values()))
    return [Sizes(kind, copies * size[kind], held * size[kind] // whole) for kind in of_kind if copies]


def shortage(forecasts: Sequence[Forecast], room: Callable[[torch.device], float | None], world: int) -> Event | None:
    """The event that says what will not fit, for the device that lacks most; None where all fits or nobody can tell.

    Args:
        forecasts: Of all optimizers of the run.
        room: Bytes that tensors may still take on a device; None where it does not tell.
        world: Ranks of the run, which could share the state.
    """
    lacking: dict[torch.device, tuple[float, float]] = {}
    for device in {device: None for each in forecasts for device in each.missing}:
        needed = sum(each.missing.get(device, 0) + each.gradients.get(device, 0) for each in forecasts)
        state = sum(each.missing.get(device, 0) for each in forecasts)
        free = room(device)
        # Without state to come there is nothing that this forecast is about.
        if free is not None and state > 0 and needed > free:
            lacking[device] = (needed - free, free)
    if not lacking:
        return None
    device = max(lacking, key=lambda each: lacking[each][0])
    return _event(forecasts, device, lacking[device][1], world)


def _event(forecasts: Sequence[Forecast], device: torch.device, free: float, world: int) -> Event:
    state = sum(each.missing.get(device, 0) for each in forecasts)
    gradients = sum(each.gradients.get(device, 0) for each in forecasts)
    shapes: Counter[tuple[Shape, int]] = Counter()
    for each in forecasts:
        shapes.update(each.shapes.get(device, {}))
    entries = sum(count * prod(shape) for (shape, _), count in shapes.items())
    weights = sum(count * prod(shape) * item for (shape, item), count in shapes.items())
    left = free - gradients
    others = [(name, _alternative(name, shapes)) for name in ALTERNATIVES]
    ranks = max(2, ceil(state / left)) if left > 0 else None
    names = " and ".join(each.optimizer for each in forecasts)
    told = [f"{FAMILIES[name].title} {_gib(size)}{' (fits)' if size <= left else ''}" for name, size in others]
    if ranks:
        told.append(f"ZeRO-1 or FSDP over {ranks} ranks {_gib(state / ranks)} each")
    return Event(
        kind="memory_forecast",
        step=0,
        occurred_at=time.time(),
        summary=f"{names} will not fit on {device}: {_gib(state)} of state and {_gib(gradients)} of gradients are "
        f"still to be allocated, and {_gib(free)} are free.",
        likely=f"{entries:.3g} parameters hold {_gib(weights)}; gradients {_gib(gradients)} + state {_gib(state)} - "
        f"free {_gib(free)} = {_gib(gradients + state - free)} too little, before any activation. State instead: "
        f"{'; '.join(told)}. `optwatch plan` has the whole table.",
        runbook="TrainingMemoryForecast",
        details={
            "optimizer": forecasts[0].optimizer,
            "device": str(device),
            "parameters": entries,
            "weight_bytes": weights,
            "gradient_bytes_to_come": gradients,
            "state_bytes_to_come": state,
            "state_bytes_held": sum(each.held for each in forecasts),
            "free_bytes": free,
            "short_bytes": gradients + state - free,
            "alternatives": {name: {"state_bytes": size, "fits": size <= left} for name, size in others},
            "ranks_that_could_share_it": ranks,
            "world_size": world,
        },
    )


def _alternative(name: str, shapes: Mapping[tuple[Shape, int], int]) -> float:
    return sum(family_bytes(name, [(shape, count)], item) for (shape, item), count in shapes.items())


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
