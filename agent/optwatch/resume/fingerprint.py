"""The fingerprint of a training state: what a checkpoint has to bring back, in a few numbers a tensor.

Taken when a checkpoint is saved, and again before the first step of a run that goes on from one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from optwatch.delivery.client import finite
from optwatch.training import layers
from optwatch.training.living import living
from optwatch.training.transfer import Arrival, host_place

from . import generators
from .digest import NUMBERS, Digest, Digester, digest, parts

STEP_KEYS = ("step", "steps")
"""Keys of optimizer state under which an optimizer counts its steps, for each parameter."""
Driver = LRScheduler | ReduceLROnPlateau | GradScaler
"""What changes an optimizer's rates, or scales its gradients."""
_SCHEDULERS = (LRScheduler, ReduceLROnPlateau)
NO_HYPERPARAMETERS = ("params", "param_names", "foreach", "fused", "capturable", "differentiable")
"""Keys of a group that say which parameters it has, or how they are computed with."""


@dataclass(slots=True)
class ParameterPrint:
    """One parameter of an optimizer."""

    name: str
    group: int
    weight: dict[str, Digest] = field(default_factory=dict)
    """By part; one of empty name for a plain tensor."""
    state: dict[str, Digest] = field(default_factory=dict)
    """By key of the optimizer's state, nested ones joined by dots; step counts apart."""
    step: float | None = None
    """How often the optimizer says that it has updated this parameter."""


@dataclass(slots=True)
class OptimizerPrint:
    """One optimizer."""

    name: str
    kind: str
    """Its class."""
    named: bool
    """Whether the names are those of a model's own parameters, and so hold whatever the order is."""
    groups: list[dict[str, Any]]
    """Hyper-parameters of each group, as JSON."""
    defaults: dict[str, Any]
    """What it was constructed with."""
    scheduled: list[list[str]]
    """Hyper-parameters of each group that had changed since the run began or was resumed."""
    rates_used: list[float]
    """Learning rates of the last step; empty where there was none yet."""
    parameters: list[ParameterPrint]


@dataclass(slots=True)
class Fingerprint:
    """All of it. Equal parts of two fingerprints mean equal bits."""

    run_id: str
    rank: int
    world_size: int
    step: int
    taken_at: float = 0.0
    """Unix seconds."""
    optimizers: list[OptimizerPrint] = field(default_factory=list)
    frozen: dict[str, Digest] = field(default_factory=dict)
    """The model's parameters that no optimizer has, by name."""
    buffers: dict[str, Digest] = field(default_factory=dict)
    """The model's buffers, by name. A forward pass may change them."""
    schedulers: list[dict[str, Any]] = field(default_factory=list)
    """``kind``, ``optimizer`` (its name), ``last_epoch``, ``base_lrs`` and ``last_lrs`` of each scheduler of rates."""
    scalers: list[float] = field(default_factory=list)
    """The scale of each gradient scaler in use."""
    generators: dict[str, str] = field(default_factory=dict)
    """States of random generators that were drawn from, as `generators.State.text`."""

    def as_json(self) -> dict[str, Any]:
        """The fingerprint as plain JSON; numbers that are not finite are texts, as on the wire."""
        body: dict[str, Any] = finite(asdict(self))
        return body

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Fingerprint:
        """The inverse of `as_json`.

        Raises:
            KeyError, TypeError, ValueError: this is no fingerprint.
        """
        known = {name: body[name] for name in cls.__dataclass_fields__}
        known["frozen"], known["buffers"] = _read(body["frozen"]), _read(body["buffers"])
        known["optimizers"] = [
            OptimizerPrint(
                **{
                    **entry,
                    "parameters": [
                        ParameterPrint(**{**p, "weight": _read(p["weight"]), "state": _read(p["state"])})
                        for p in entry["parameters"]
                    ],
                }
            )
            for entry in body["optimizers"]
        ]
        return cls(**known)

    def tensors(self) -> int:
        """How many tensors it covers."""
        return len(list(_digests(asdict(self))))


def _digests(body: Any) -> Iterator[dict[str, Any]]:
    if isinstance(body, dict) and "weighted" in body:
        yield body
    elif isinstance(body, (dict, list)):
        for item in body.values() if isinstance(body, dict) else body:
            yield from _digests(item)


def _read(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Digest]:
    return {
        name: Digest(**{**entry, "shape": tuple(entry["shape"]), "norm": float(entry["norm"])})
        for name, entry in found.items()
    }


@dataclass(frozen=True, slots=True)
class Subject:
    """What a fingerprint is taken of."""

    optimizers: Mapping[str, Optimizer]
    model: nn.Module | None
    drivers: Sequence[Driver]


Form = tuple[torch.dtype, tuple[int, ...]]


class Taking:
    """A fingerprint under way: everything is read and launched when this is made, `result` waits for the numbers.

    Reads every tensor twice (`digest.Digester`), on its device, and copies some bytes a tensor to the host at once. On
    a CPU the reading itself is what takes the time.
    """

    def __init__(self, subject: Subject, print_: Fingerprint, *, rounding: bool = False) -> None:
        self._print = print_
        self._rounding = rounding
        self._tensors: dict[torch.device, list[Tensor]] = {}
        self._numbers: dict[torch.device, list[Tensor]] = {}
        self._pending: list[tuple[Any, str, torch.device, int, Form | None]] = []
        self._arrivals: dict[torch.device, tuple[Tensor, Arrival]] = {}
        with torch.no_grad():
            self._take(subject)
            for device in {*self._tensors, *self._numbers}:
                packed = self._read(device)
                place = packed if device.type == "cpu" else host_place(packed.numel(), packed.dtype, device)
                self._arrivals[device] = (place, Arrival(packed.view(-1), place.view(-1)))

    def result(self) -> Fingerprint:
        """The fingerprint. Waits for the devices, on whichever thread asks."""
        values: dict[torch.device, list[list[int]]] = {}
        for device, (place, arrival) in self._arrivals.items():
            while not arrival.done():
                time.sleep(0.0005)
            values[device] = place.view(-1, NUMBERS).tolist()
        for target, key, device, at, form in self._pending:
            # Numbers lie behind the tensors.
            first = 0 if form is not None else len(self._tensors.get(device, ()))
            reading = values[device][first + at]
            value = float(torch.tensor(reading[0]).view(torch.float64)) if form is None else digest(*form, reading)
            if isinstance(target, (dict, list)):
                target[key] = value  # type: ignore[call-overload]
            else:
                setattr(target, key, value)
        self._pending.clear()
        return self._print

    def _take(self, subject: Subject) -> None:
        ours: set[int] = set()
        own = {id(p) for p in subject.model.parameters()} if subject.model is not None else set()
        for name, optimizer in subject.optimizers.items():
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            ours.update(map(id, parameters))
            taken = OptimizerPrint(
                name=name,
                kind=type(optimizer).__name__,
                named=bool(parameters) and all(id(p) in own for p in parameters),
                groups=[self._plain_group(group) for group in optimizer.param_groups],
                defaults=self._plain_group(optimizer.defaults),
                scheduled=[[] for _ in optimizer.param_groups],
                rates_used=[],
                parameters=[],
            )
            indices = [g for g, group in enumerate(optimizer.param_groups) for _ in group["params"]]
            names = layers.parameter_names(optimizer, subject.model)
            for parameter, of, group in zip(parameters, names, indices, strict=True):
                taken.parameters.append(self._parameter(parameter, optimizer.state.get(parameter, {}), of, group))
            self._print.optimizers.append(taken)
        if subject.model is not None:
            for of, parameter in subject.model.named_parameters():
                if id(parameter) not in ours:
                    self._digest(self._print.frozen, of, parameter)
            for of, buffer in subject.model.named_buffers():
                self._digest(self._print.buffers, of, buffer)
        names_by_id = {id(optimizer): name for name, optimizer in subject.optimizers.items()}
        for scheduler in subject.drivers:
            if isinstance(scheduler, GradScaler):
                self._print.scalers.append(0.0)
                self._number(self._print.scalers, len(self._print.scalers) - 1, scaler_scale(scheduler))
                continue
            self._print.schedulers.append(
                {
                    "kind": type(scheduler).__name__,
                    "optimizer": names_by_id[id(scheduler.optimizer)],
                    "last_epoch": getattr(scheduler, "last_epoch", None),
                    "base_lrs": [self._plain(rate) for rate in getattr(scheduler, "base_lrs", ())],
                    "last_lrs": [self._plain(rate) for rate in getattr(scheduler, "_last_lr", ())],
                }
            )

    def _parameter(self, parameter: Tensor, state: Mapping[str, Any], name: str, group: int) -> ParameterPrint:
        taken = ParameterPrint(name, group)
        self._digest(taken.weight, "", parameter)
        for key, value in state.items():
            if key in STEP_KEYS and (not isinstance(value, Tensor) or value.numel() == 1):
                self._number(taken, "step", value)
            else:
                self._digest(taken.state, str(key), value)
        return taken

    def _read(self, device: torch.device) -> Tensor:
        """Everything to be read of one device: a row for each tensor, then one for each number."""
        tensors, numbers = self._tensors.get(device, []), self._numbers.get(device, [])
        rows = Digester(device, rounding=self._rounding).readings(tensors)
        if not numbers:
            return rows
        bits = torch.stack(numbers).view(torch.int64)
        return torch.cat([rows, torch.nn.functional.pad(bits.unsqueeze(1), (0, NUMBERS - 1))])

    def _digest(self, target: dict[str, Digest], name: str, value: Any) -> None:
        for part, tensor in parts(value, name):
            if tensor.device.type == "meta":
                continue
            tensors = self._tensors.setdefault(tensor.device, [])
            self._pending.append((target, part, tensor.device, len(tensors), (tensor.dtype, tuple(tensor.shape))))
            tensors.append(tensor)

    def _number(self, target: Any, key: Any, value: Any) -> None:
        """A number, which may be on a device."""
        number = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
        numbers = self._numbers.setdefault(number.device, [])
        self._pending.append((target, key, number.device, len(numbers), None))
        numbers.append(number.reshape(()).to(torch.float64))

    def _plain_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        plain: dict[str, Any] = {}
        for key, value in group.items():
            if key in NO_HYPERPARAMETERS:
                continue
            if isinstance(value, Tensor) and value.numel() == 1:
                self._number(plain, key, value)
            else:
                plain[str(key)] = self._plain(value)
        return plain

    def _plain(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (list, tuple)):
            return [self._plain(item) for item in value]
        if isinstance(value, Tensor):
            return float(value) if value.numel() == 1 and value.device.type == "cpu" else f"tensor {list(value.shape)}"
        return type(value).__name__  # its repr may hold an address


def discover(optimizers: Iterable[Optimizer]) -> list[Driver]:
    """The schedulers of these optimizers, and the scalers, that are alive in this process.

    Walks the garbage collector's objects once, 0.1 s per million of them: training code need not hand them over.
    """
    wanted = {id(optimizer) for optimizer in optimizers}
    drivers: list[Driver] = []
    found: Any
    for found in living(*_SCHEDULERS, GradScaler):
        if isinstance(found, GradScaler):
            if found.is_enabled():
                drivers.append(found)
        elif id(getattr(found, "optimizer", None)) in wanted:
            drivers.append(found)
    return drivers


def scaler_scale(scaler: GradScaler) -> Tensor | float:
    """The scale of a gradient scaler, on its device; before its first use it is a number."""
    scale = scaler._scale
    return float(scaler._init_scale) if scale is None else scale


def hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What may be scheduled of each group, without reading a device: numbers, and tuples of them."""
    return [
        {key: value for key, value in group.items() if isinstance(value, (int, float, tuple)) and key != "params"}
        for group in optimizer.param_groups
    ]


def random_states(before: Mapping[str, generators.State]) -> dict[str, str]:
    """The generators that have moved since `before`, as a fingerprint holds them."""
    return {name: state.text() for name, state in generators.used(before, generators.states()).items()}
