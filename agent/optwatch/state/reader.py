"""What a reader is: plain data that says where one optimizer keeps its moments and what they mean in its step.

A signal that makes no sense for an optimizer is `Unavailable`, with the reason. A place that is declared but does not
hold what it should (a missing key, another shape, another dtype) yields nothing: never a number under a wrong name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Any, Literal, Protocol, TypeGuard

import torch
from torch import Tensor
from torch.optim import Optimizer

from optwatch import kernels
from optwatch.kernels.locate import States

from .stored import Compact, Factored, Parts, Quantized, Shared, Softsign, Stored

Group = Mapping[str, Any]
Entry = Mapping[str, Any]
"""The state of one parameter."""
Kept = tuple[Sequence[int], Sequence[Stored]]
"""Positions of parameters, ascending, and a moment of each."""


@dataclass(frozen=True, slots=True)
class Unavailable:
    """A signal that an optimizer does not have, or that cannot be read exactly."""

    reason: str


class Place(Protocol):
    """Where a moment is."""

    def read(self, state: Entry, parameter: Tensor) -> Stored | None:
        """The moment, or None where it is not (yet) there in the form declared. Reads no tensor's contents."""
        ...


@dataclass(frozen=True, slots=True)
class Keys:
    """A tensor of the parameter's shape, under the first of these keys that exists."""

    names: tuple[str, ...]

    def read(self, state: Entry, parameter: Tensor) -> Stored | None:
        """See `Place`. torchao's quantized tensors are recognised where they stand for a plain one."""
        value = None
        for name in self.names:
            if name in state:
                value = state[name]
                break
        if not isinstance(value, Tensor) or value.shape != parameter.shape:
            return None
        if type(value) is not Tensor and (quantized := _low_bit(value)) is not None:
            return quantized
        return value if value.is_floating_point() or value.is_complex() else None


def keys(*names: str) -> Keys:
    """`Keys` of these names, the one that the update uses first."""
    return Keys(names)


@dataclass(frozen=True, slots=True)
class Subspace:
    """A tensor in a subspace or another order than the parameter's: as stored, its norm is what is reported."""

    name: str

    def read(self, state: Entry, parameter: Tensor) -> Stored | None:
        """See `Place`."""
        value = state.get(self.name)
        return Parts((value,)) if _is_float(value) and value.numel() else None


@dataclass(frozen=True, slots=True)
class Either:
    """The first of several places that holds something."""

    places: tuple[Place, ...]

    def read(self, state: Entry, parameter: Tensor) -> Stored | None:
        """See `Place`."""
        return next((found for place in self.places if (found := place.read(state, parameter)) is not None), None)


@dataclass(frozen=True, slots=True)
class Broadcast:
    """A tensor with one entry for several weights; its shape broadcasts to the parameter's."""

    name: str

    def read(self, state: Entry, parameter: Tensor) -> Stored | None:
        """See `Place`."""
        value = state.get(self.name)
        if not _is_float(value) or not value.numel():
            return None
        sizes = zip(reversed(value.shape), reversed(parameter.shape), strict=False)
        if value.numel() != 1 and (value.dim() > parameter.dim() or any(x not in (1, y) for x, y in sizes)):
            return None
        return value if value.shape == parameter.shape else Shared(value, parameter.numel() // value.numel())


@dataclass(frozen=True, slots=True)
class RowsAndColumns:
    """Row and column means of a matrix (or of each matrix of a stack), or a plain tensor for what is not factored."""

    rows: str
    columns: str
    plain: str

    def read(self, state: Entry, parameter: Tensor) -> Stored | None:
        """See `Place`. Rows are ``(..., m)`` or ``(..., m, 1)``, columns ``(..., n)`` or ``(..., 1, n)``."""
        if self.plain in state:
            return Keys((self.plain,)).read(state, parameter)
        rows, columns = state.get(self.rows), state.get(self.columns)
        if parameter.dim() < 2 or not _is_float(rows) or not _is_float(columns):
            return None
        *outer, m, n = parameter.shape
        if rows.numel() != prod(outer) * m or columns.numel() != prod(outer) * n:
            return None
        return Factored(rows.reshape(*outer, m), columns.reshape(*outer, n))


@dataclass(frozen=True, slots=True)
class Nested:
    """One tensor under `key` in each block of a list of blocks."""

    name: str
    key: str

    def read(self, state: Entry, parameter: Tensor) -> Stored | None:
        """See `Place`. Blocks that do not add up to the parameter are refused."""
        blocks = state.get(self.name)
        if not isinstance(blocks, (list, tuple)):
            return None
        found = tuple(b.get(self.key) for b in blocks if isinstance(b, Mapping))
        tensors = tuple(x for x in found if _is_float(x))
        if len(tensors) != len(blocks) or sum(x.numel() for x in tensors) != parameter.numel():
            return None
        return Parts(tensors)


@dataclass(frozen=True, slots=True)
class BlockWise:
    """bitsandbytes: a float32 tensor, or uint8 codes with their table ``qmap`` and a largest entry for each block."""

    number: Literal[1, 2]
    layer: int | None = None
    """Which of several moments that share one tensor, along its first dimension."""
    block: int = 256

    def read(self, state: Entry, parameter: Tensor) -> Stored | None:
        """See `Place`."""
        codes = state.get(f"state{self.number}")
        scales, table = state.get(f"absmax{self.number}"), state.get(f"qmap{self.number}")
        if self.layer is not None and isinstance(codes, Tensor) and codes.dim() == parameter.dim() + 1:
            codes = codes[self.layer]
            scales = scales[self.layer] if isinstance(scales, Tensor) and scales.dim() == 2 else None
        if not isinstance(codes, Tensor) or codes.shape != parameter.shape:
            return None
        if codes.is_floating_point():
            return codes
        if codes.dtype != torch.uint8 or not _is_float(scales) or not _is_float(table) or table.numel() != 256:
            return None
        if scales.numel() != -(-codes.numel() // self.block):
            return None
        return Quantized(codes, scales, table, self.block, tuple(parameter.shape))


@dataclass(frozen=True, slots=True)
class Companded:
    """FlashAdamW: codes and scales under ``name::quantized`` and ``name::scales``, or a plain tensor under the name."""

    name: str
    root: bool
    group: int = 32

    def read(self, state: Entry, parameter: Tensor) -> Stored | None:
        """See `Place`."""
        codes, scales = state.get(f"{self.name}::quantized"), state.get(f"{self.name}::scales")
        if codes is None:
            return Keys((self.name,)).read(state, parameter)
        if not isinstance(codes, Tensor) or codes.shape != parameter.shape or not _is_float(scales):
            return None
        if codes.dtype != (torch.uint8 if self.root else torch.int8) or scales.numel() != -(
            -codes.numel() // self.group
        ):
            return None
        return Softsign(codes, scales, self.group, self.root, tuple(parameter.shape))


@dataclass(frozen=True, slots=True)
class Denominator:
    """How a step divides by the second moment v: by √v̂ + ε with v̂ = v / (1 − β₂ᵗ) (Kingma & Ba 2015, algorithm 1)."""

    beta2: str | None = "betas.1"
    """Where the group holds β₂, as ``key`` or ``key.index``; None where v is not corrected for its bias."""
    epsilon: str = "eps"
    """Where the group holds ε."""
    late_correction: bool = False
    """Whether ε is added to √v before the bias is corrected, as at the end of section 2 of Kingma & Ba: √v + ε."""
    rate: Unavailable | None = None
    """Why η / (√v̂ + ε) is not the rate of a weight's step, where it is not."""


@dataclass(frozen=True, slots=True)
class Rate:
    """The learning rate of a group, as the step uses it: the product of some of the group's numbers."""

    names: tuple[str, ...] = ("lr",)
    after: bool = False
    """Whether the step itself sets it, so that it is known after the step only."""
    cap: bool = False
    """Whether the step takes at most 1/√t (relative step size of Adafactor)."""

    def read(self, group: Group, step: int) -> float | Tensor | None:
        """A number, a 0-d tensor (which is not waited for), or None where it is not there."""
        result: float | Tensor = 1.0
        for name in self.names:
            value = group.get(name)
            if not isinstance(value, (int, float, Tensor)):
                return None
            result = result * value
        if self.cap:
            limit = 1 / sqrt(max(step, 1))
            result = result.clamp(max=limit) if isinstance(result, Tensor) else min(result, limit)
        return result.detach().reshape(()) if isinstance(result, Tensor) else float(result)


NO_MOMENTUM = Unavailable("keeps no moving average of gradients")
NO_SECOND = Unavailable("keeps no second moment")
NOT_ADAPTIVE = Unavailable("does not divide by a second moment")


@dataclass(frozen=True, slots=True)
class Reader:
    """One row of a table. The defaults are those of an optimizer that is not known."""

    first_moment: Place | Unavailable
    second_moment: Place | Unavailable
    denominator: Denominator | Unavailable = NOT_ADAPTIVE
    step: str | None = None
    """Key of the optimizer's own count of its steps, in a parameter's state or in the group."""
    rate: Rate | Unavailable = field(default_factory=Rate)
    grows: bool = False
    """Whether tensors come and go inside the entries of its state, so that its bytes are counted at every sample."""
    unless: Mapping[str, str] = field(default_factory=dict)
    """Switches of a group that, when on, make the rate of a weight's step another one than η / (√v̂ + ε), and how."""
    rate_unless: Mapping[str, str] = field(default_factory=dict)
    """Switches of a group that, when on, make the learning rate unavailable, and why."""
    averages: str = "gradients"
    """What the first moment averages."""

    def firsts(self, states: States, parameters: list[Tensor], device: torch.device) -> Kept:
        """The first moments, raw as stored, of those of these parameters that have one."""
        return _read(self.first_moment, states, parameters, device)

    def seconds(self, states: States, parameters: list[Tensor], device: torch.device) -> Kept:
        """Likewise the second moments that the update divides by."""
        return _read(self.second_moment, states, parameters, device)

    def counts(
        self, states: States, parameters: list[Tensor], groups: Sequence[Group], of: Sequence[int]
    ) -> float | list[float | Tensor | None]:
        """The steps t of each parameter's bias correction, by its own state or the group at the place ``of`` it: a
        number or a 0-d tensor, as it is kept; 1 where nothing is corrected, None where it is not there. One number
        where all are known to share it."""
        if isinstance(self.denominator, Unavailable):
            return [None] * len(parameters)
        if self.denominator.beta2 is None:
            return 1.0
        if self.step is None:
            return [None] * len(parameters)
        if (shared := kernels.shared_count(states, parameters, self.step)) is not None:
            return shared
        each = zip(parameters, of, strict=True)
        return [step_count(states.get(p, {}).get(self.step, groups[group].get(self.step))) for p, group in each]

    def beta2(self, group: Group) -> float | None:
        """β₂ of a group, 0 where the bias is not corrected, None where it is not a plain number."""
        if isinstance(self.denominator, Unavailable):
            return None
        return 0.0 if self.denominator.beta2 is None else _number(group, self.denominator.beta2)

    def epsilon(self, group: Group) -> float | None:
        """ε of a group, None where it is not a plain number."""
        return None if isinstance(self.denominator, Unavailable) else _number(group, self.denominator.epsilon)

    def late_correction(self) -> bool:
        """Whether ε is added before the bias of the second moment is corrected."""
        return isinstance(self.denominator, Denominator) and self.denominator.late_correction

    def rate_is_exact(self, groups: Iterable[Group]) -> bool:
        """Whether η / (√v̂ + ε) is the rate of a weight's step in these groups."""
        if isinstance(self.denominator, Unavailable) or self.denominator.rate is not None:
            return False
        return not any(group.get(switch) for group in groups for switch in self.unless)

    def own_step(self, optimizer: Optimizer) -> int:
        """The optimizer's own step count, 0 where it keeps none. Synchronises where the count is on a device: this is
        read when attaching and after load_state_dict, never in a step."""
        if self.step is None:
            return 0
        for holder in (*optimizer.state.values(), *optimizer.param_groups):
            if isinstance(holder, Mapping) and (value := holder.get(self.step)) is not None:
                return int(value)
        return 0

    def learning_rate(self, group: Group, step: int) -> float | Tensor | None:
        """The group's learning rate at this step, None where it is unavailable. A tensor is not waited for."""
        if isinstance(self.rate, Unavailable) or any(group.get(switch) for switch in self.rate_unless):
            return None
        return self.rate.read(group, step)

    @property
    def rate_after(self) -> bool:
        """Whether the learning rate has to be read again after the step."""
        return isinstance(self.rate, Rate) and self.rate.after

    def unavailable(self) -> dict[str, str]:
        """Each signal that this optimizer does not have, with the reason."""
        rate, first, second = (
            signal.reason if isinstance(signal, Unavailable) else None
            for signal in (self.rate, self.first_moment, self.second_moment)
        )
        ratio: str | None
        effective: str | None
        aligned = isinstance(self.first_moment, (Keys, Either, BlockWise, Companded))
        if isinstance(self.denominator, Unavailable):
            ratio = effective = second or self.denominator.reason
        else:
            ratio = second
            effective = second or rate or (self.denominator.rate.reason if self.denominator.rate else None)
        reasons = {
            "learning_rate": rate,
            "first_moment": first,
            "gradient_moment_cosine": first or (None if aligned else "the first moment has another basis or order"),
            "second_moment": second,
            "epsilon_dominated_ratio": ratio,
            "effective_learning_rate": effective,
        }
        return {signal: reason for signal, reason in reasons.items() if reason}


def _read(place: Place | Unavailable, states: States, parameters: list[Tensor], device: torch.device) -> Kept:
    """What is kept of each parameter; of plain tensors all at once, where something compiled does it."""
    if isinstance(place, Unavailable):
        return (), ()
    if isinstance(place, Keys) and (found := kernels.moments(states, parameters, place.names, device)) is not None:
        return found
    each = [(i, place.read(states.get(p, {}), p)) for i, p in enumerate(parameters)]
    return [i for i, moment in each if moment is not None], [moment for _, moment in each if moment is not None]


def step_count(value: object) -> float | Tensor | None:
    """A step count as a number, or as a 0-d tensor where it is kept (host or device), whose value is not read."""
    if isinstance(value, Tensor):
        return value if value.dim() == 0 else value.reshape(())
    return None if value is None else float(value)  # type: ignore[arg-type]  # an int in many optimizers


def _number(group: Group, path: str) -> float | None:
    name, _, index = path.partition(".")
    value = group.get(name)
    if index:
        value = value[int(index)] if isinstance(value, (tuple, list)) and len(value) > int(index) else None
    return float(value) if isinstance(value, (int, float)) else None


def _is_float(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_floating_point()


def _low_bit(value: Tensor) -> Compact | None:
    """torchao's OptimState8bit, OptimState4bit and OptimStateFp8, known by their class without importing torchao."""
    kind = type(value).__name__
    if not type(value).__module__.startswith("torchao.") or not kind.startswith("OptimState"):
        return None
    codes, scale = value.codes, value.scale  # type: ignore[attr-defined]
    table = None if kind == "OptimStateFp8" else value.qmap  # type: ignore[attr-defined]
    return Quantized(codes, scale, table, value.block_size, tuple(value.shape), packed=kind == "OptimState4bit")  # type: ignore[attr-defined]
