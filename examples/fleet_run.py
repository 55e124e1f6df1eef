"""One small real training run of the fleet, in which one thing goes wrong, or nothing.

python examples/fleet_run.py SCENE [--steps N]
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from optwatch import Target, attach

BREAK_AT = 150
"""Step at which a scene's fault begins: detectors know the run by then."""


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 16, generator=generator)
    return x, torch.sin(x.sum(1, keepdim=True)) + 0.1 * torch.randn(32, 1, generator=generator)


Fault = Callable[[int, Tensor, torch.optim.Optimizer], Tensor]


def nothing(step: int, y: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    return y


def spike(step: int, y: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """A few batches with targets off by far."""
    return y * 40 if BREAK_AT <= step < BREAK_AT + 4 else y


def divergence(step: int, y: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """Data that stays corrupt."""
    return torch.randn_like(y) * 40 if step >= BREAK_AT else y


def nan(step: int, y: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """A learning rate off by powers of ten."""
    if step == BREAK_AT:
        for group in optimizer.param_groups:
            group["lr"] = 1e20
    return y


def kill(step: int, y: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    if step == BREAK_AT:
        os.kill(os.getpid(), signal.SIGKILL)
    return y


def stall(step: int, y: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """A batch that never comes."""
    while step == BREAK_AT:
        time.sleep(1)
    return y


def out_of_memory(step: int, y: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    if step == BREAK_AT:
        torch.empty(10**14)
    return y


def crash(step: int, y: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    if step == BREAK_AT:
        raise KeyError(f"batch {step} is not in the index")
    return y


SCENES: dict[str, Fault] = {
    "healthy": nothing,
    "two-ranks": nothing,
    "spike": spike,
    "divergence": divergence,
    "nan": nan,
    "kill": kill,
    "stall": stall,
    "out-of-memory": out_of_memory,
    "crash": crash,
    "resume-without-state": nothing,
    "checkpoint-failure": nothing,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scene", choices=SCENES)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--pause", type=float, default=0.05, help="seconds between steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rank = int(os.environ.get("RANK", "0"))
    model = network()
    if options.scene == "two-ranks":
        torch.distributed.init_process_group("gloo")
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    monitor = attach(optimizer, target=Target("val_loss", 0.4, by_step=options.steps // 2))
    folder = Path(tempfile.mkdtemp(prefix="optwatch-fleet-"))
    generator = torch.Generator().manual_seed(rank)
    held_out = batch(torch.Generator().manual_seed(1234))
    break_run = SCENES[options.scene]
    for step in range(1, options.steps + 1):
        x, y = batch(generator)
        y = break_run(step, y, optimizer)
        loss: Tensor = nn.functional.mse_loss(model(x), y)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        monitor.log(tokens=len(x))
        if step % 50 == 0:
            with torch.no_grad():
                monitor.log(val_loss=nn.functional.mse_loss(model(held_out[0]), held_out[1]))
        if step == 10 and options.scene == "checkpoint-failure":
            monitor.log(note="a text, which is no number: a fault that is counted and that training does not notice")
        if step % 200 == 0 and rank == 0:
            missing = "missing/" if options.scene == "checkpoint-failure" else ""
            try:
                with monitor.checkpoint(folder / f"{missing}{step}.pt") as checkpoint:
                    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint.path)
            except RuntimeError as error:
                print(f"{options.scene}: {error}", flush=True)
        time.sleep(options.pause)
    if options.scene == "two-ranks":
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
