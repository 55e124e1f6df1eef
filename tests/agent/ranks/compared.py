"""Ranks that ought to be equal and are not: what their agents tell. Each scenario gives what its rank told."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from ways import Net, adamw, batch, joined

from optwatch import Settings, attach

EVERY = 10
FLIPPED_AFTER = 13


def nothing(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    pass


Work = Callable[[int, nn.Module, torch.optim.Optimizer], None]


def told(
    rank: int,
    folder: Path,
    steps: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    before: Work = nothing,
    after: Work = nothing,
) -> dict[str, Any]:
    """Train; ``before`` is called before each forward pass, ``after`` after each step, with steps from 1."""
    events: list[dict[str, Any]] = []

    class Ears:
        def record(self, record: Any) -> None:
            pass

        def event(self, event: Any) -> None:
            events.append(event.message("run", rank, 0))

    settings = Settings(
        address="127.0.0.1", spool_directory=folder / f"spool{rank}", rank_check_every=EVERY, blackbox_bytes=0
    )
    monitor = attach(optimizer, port=0, settings=settings)
    monitor.sinks.append(Ears())
    joined(monitor)
    for step in range(1, steps + 1):
        before(step, model, optimizer)
        model(batch(rank, step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        after(step, model, optimizer)
        if step % 100 == 0:  # steps of a millisecond: the host threads must not fall behind by more rows than there are
            assert monitor.flush(60)
    assert monitor.flush(60)
    checks = monitor._host._replicas.checks
    alike = monitor._host.ranks.read_alike(type(optimizer).__name__)
    dist.barrier()
    monitor.detach()
    return {"events": events, "faults": monitor.faults.counts, "checks": checks, "read_alike": alike}


def replicated() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(5)
    model = DistributedDataParallel(Net())
    return model, adamw(model.parameters())


def flipping(name: str, elements: Sequence[int], culprit: int, rank: int, moment: bool = False) -> Work:
    """After one step the lowest mantissa bit of some elements of a tensor is flipped on one rank."""

    def flip(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if step == FLIPPED_AFTER and rank == culprit:
            parameter = dict(model.named_parameters())[name]
            tensor = (optimizer.state[parameter]["exp_avg_sq"] if moment else parameter).detach()
            words = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).view(-1).view(torch.int32)
            for element in elements:
                words[element] ^= 1

    return flip


def bit_flipped(rank: int, size: int, folder: Path) -> dict[str, Any]:
    flip = flipping("module.first.up.weight", [17], size - 2, rank)
    return told(rank, folder, 40, *replicated(), after=flip)


def equal_bits_flipped(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """A pair that an XOR over the tensor does not see."""
    flip = flipping("module.first.up.weight", [17, 40], size - 2, rank)
    return told(rank, folder, 40, *replicated(), after=flip)


def moment_flipped(rank: int, size: int, folder: Path) -> dict[str, Any]:
    flip = flipping("module.first.down.bias", [3], size - 2, rank, moment=True)
    return told(rank, folder, 40, *replicated(), after=flip)


def shard_flipped(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Rank 3 of a two by two mesh holds the same shard as rank 1 alone."""
    torch.manual_seed(5)
    model = Net()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)
    optimizer = adamw(model.parameters())
    return told(rank, folder, 40, model, optimizer, after=flipping("first.up.weight", [5], 3, rank))


def rate_differs(rank: int, size: int, folder: Path) -> dict[str, Any]:
    def change(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if step == 5 and rank == 1:
            optimizer.param_groups[1]["lr"] = 3e-3

    return told(rank, folder, 40, *replicated(), before=change)


def step_differs(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Rank 1 resumes from an older state than the others."""
    model, optimizer = replicated()
    for step in range(3):
        model(batch(rank, step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for state in optimizer.state.values():
        state["step"] -= 2 * (rank == 1)
    return told(rank, folder, 40, model, optimizer)


def sleeps(rank: int, size: int, folder: Path) -> dict[str, Any]:
    def sleep(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if rank == size - 1:
            time.sleep(0.02)

    return told(rank, folder, 80, *replicated(), before=sleep)


def clean(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """2000 steps of equal replicas whose learning rate moves at each."""
    torch.manual_seed(5)
    model = DistributedDataParallel(nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2000)
    return told(rank, folder, 2000, model, optimizer, after=lambda *_: schedule.step())
