"""What a cell trains: the model as its way of training wraps it, the optimizer, and how one micro-batch is run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import lion_pytorch
import pytorch_optimizer
import schedulefree
import torch
import ways
from cells import Cell
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

CLIP = 0.05
"""Below every gradient norm here: clipping always scales."""
FIRST_SCALE, BACKOFF = 2.0**40, 2.0**-30
"""The first scale overflows float16 with every batch here, and the next with none."""


@dataclass(frozen=True)
class Kind:
    """An optimizer, and what of its state has a meaning for us."""

    make: type[torch.optim.Optimizer]
    options: dict[str, Any]
    first: str | None
    """Key of its first moment."""
    second: tuple[str, ...] = ()
    """Key of its second moment, or of the rows and the columns of a factored one."""
    rotated: bool = False
    """Whether the second moment is in another basis than the weights."""
    adaptive: bool = False
    """Whether its step divides by √v̂ + ε."""
    matrices_only: bool = False


KINDS = {
    "AdamW foreach": Kind(
        torch.optim.AdamW, {"lr": 1e-3, "eps": ways.EPSILON, "foreach": True}, "exp_avg", ("exp_avg_sq",), adaptive=True
    ),
    "AdamW fused": Kind(
        torch.optim.AdamW, {"lr": 1e-3, "eps": ways.EPSILON, "fused": True}, "exp_avg", ("exp_avg_sq",), adaptive=True
    ),
    "SGD Nesterov": Kind(torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}, "momentum_buffer"),
    "Muon": Kind(torch.optim.Muon, {"lr": 1e-2}, "momentum_buffer", matrices_only=True),
    "Lion": Kind(lion_pytorch.Lion, {"lr": 1e-3}, "exp_avg"),
    "Schedule-Free": Kind(
        schedulefree.AdamWScheduleFree, {"lr": 1e-2, "eps": ways.EPSILON}, None, ("exp_avg_sq",), adaptive=True
    ),
    "SOAP": Kind(pytorch_optimizer.SOAP, {"lr": 1e-3}, "exp_avg", ("exp_avg_sq",), rotated=True),
    "Adafactor": Kind(torch.optim.Adafactor, {"lr": 1e-2}, None, ("row_var", "col_var")),
}


@dataclass
class Training:
    """A cell, ready to be trained."""

    cell: Cell
    kind: Kind
    model: nn.Module
    optimizer: torch.optim.Optimizer
    named: dict[str, Tensor]
    """The optimizer's parameters, by the name that they are to have."""
    scaler: torch.amp.GradScaler | None
    data: int
    """Which part of the data this rank has."""

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """This rank's optimizer state by parameter."""
        return dict(getattr(self.optimizer, "optim", self.optimizer).state)

    def backward(self, step: int, micro: int) -> float:
        """One micro-batch: its part of the step's loss, as this rank sees it."""
        last = micro == self.cell.accumulation - 1
        with self._synchronised(last), self._autocast():
            x = ways.batch(self.data, 10 * step + micro)
            if self.cell.precision == "bf16":
                x = x.bfloat16()
            loss = self.model(x).float().square().mean() / self.cell.accumulation
        with self._synchronised(last):
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return float(loss.item())

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients meet at the last micro-batch of a step only."""
        if self.cell.way in ("DDP", "ZeRO-1") and not last:
            return self.model.no_sync()  # type: ignore[operator]  # a DistributedDataParallel
        if self.cell.way in ("FSDP2", "HSDP"):
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def _autocast(self) -> AbstractContextManager[Any]:
        by_policy = self.cell.way in ("FSDP2", "HSDP")
        wanted = self.scaler is not None and not by_policy
        return torch.autocast("cpu", torch.float16) if wanted else nullcontext()

    def unscale(self) -> None:
        """As training code does before it clips."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)

    def clip(self) -> None:
        """By the norm over the whole model."""
        nn.utils.clip_grad_norm_(list(self.named.values()), CLIP)

    def step(self) -> None:
        """Take the step, or let the scaler skip it."""
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()


@functools.cache
def mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> Any:
    """Made once in a process: a mesh of two dimensions has process groups of its own."""
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def build(cell: Cell, rank: int) -> Training:
    """The same weights for every cell of one precision, on every rank."""
    kind = KINDS[cell.optimizer]
    torch.manual_seed(5)
    net: nn.Module = ways.Net()
    if cell.precision == "bf16":
        net.bfloat16()
    if kind.matrices_only:
        for p in net.parameters():
            p.requires_grad_(p.requires_grad and p.dim() == 2)
    model = WRAPPERS[cell.way](net, cell)
    named = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    if kind.matrices_only:
        named = {name: p for name, p in named.items() if p.dim() == 2}
    if cell.way == "ZeRO-1":  # takes parameters with gradients only
        named = {name: p for name, p in named.items() if p.requires_grad}
        optimizer: torch.optim.Optimizer = ZeroRedundancyOptimizer(list(named.values()), kind.make, **kind.options)
    else:
        optimizer = kind.make(list(named.values()), **kind.options)
    inside = getattr(optimizer, "optim", optimizer)
    if cell.optimizer == "Schedule-Free":
        inside.train()
        for group in optimizer.param_groups:  # those of ZeroRedundancyOptimizer are written over those inside
            group["train_mode"] = True
    scaler = None
    if cell.precision == "fp16+scaler":
        scaler = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE, backoff_factor=BACKOFF)
    return Training(cell, kind, model, optimizer, named, scaler, data=0 if cell.way == "TP" else rank)


def _compile(net: Any, cell: Cell) -> None:
    if cell.compiled:
        net.first.compile(backend="aot_eager")


def _plain(net: nn.Module, cell: Cell) -> nn.Module:
    _compile(net, cell)
    return net


def _replicated(net: nn.Module, cell: Cell) -> nn.Module:
    _compile(net, cell)
    return DistributedDataParallel(net)


def _sharded(*names: str) -> Callable[[nn.Module, Cell], nn.Module]:
    def wrap(net: Any, cell: Cell) -> nn.Module:
        _compile(net, cell)
        shape = (cell.ranks,) if len(names) == 1 else (2, cell.ranks // 2)
        policy = MixedPrecisionPolicy()
        if cell.precision == "fp16+scaler":
            policy = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32)
        for part in (net.first, net):
            fully_shard(part, mesh=mesh(shape, names), mp_policy=policy)
        return net

    return wrap


class Whole(ParallelStyle):
    """Every rank computes the same with parameters that are replicated DTensors: torch takes no norm, fused step or
    scaler over these and plain ones together."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def inputs(_: nn.Module, given: Any, mesh: DeviceMesh) -> DTensor:
            return DTensor.from_local(given[0], mesh, [Replicate()], run_check=False)

        def outputs(_: nn.Module, made: Any, mesh: DeviceMesh) -> Tensor:
            return made.to_local()  # type: ignore[no-any-return]

        return distribute_module(module, device_mesh, None, inputs, outputs)


def _tensor_parallel(net: nn.Module, cell: Cell) -> nn.Module:
    plan: dict[str, ParallelStyle] = {"first.up": ColwiseParallel(), "first.down": RowwiseParallel()}
    plan |= dict.fromkeys(("first.norm", "first.frozen", "head"), Whole())
    parallelize_module(net, mesh((cell.ranks,), ("tensor",)), plan)
    _compile(net, cell)
    return net


WRAPPERS: dict[str, Callable[[nn.Module, Cell], nn.Module]] = {
    "single": _plain,
    "DDP": _replicated,
    "FSDP2": _sharded("shard"),
    "HSDP": _sharded("replicate", "shard"),
    "TP": _tensor_parallel,
    "ZeRO-1": _replicated,
}
