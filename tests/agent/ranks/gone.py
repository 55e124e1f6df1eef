"""Ranks that go missing: killed, stopped, lagging, never attached. What the other rank does is what it does without us.

Each scenario trains the same model twice on two ranks, watched and unwatched, and returns what its rank saw.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from ways import Net, adamw, batch

from optwatch import Monitor, Settings, attach

TIMEOUT = 1.0
STEPS = 4
LOST_AT = 2


def model_and_optimizer() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(5)
    model = Net()
    fully_shard(model)
    return model, adamw(model.parameters())


def watch(optimizer: torch.optim.Optimizer, rank: int, folder: Path) -> Monitor:
    settings = Settings(
        address="127.0.0.1", spool_directory=folder / f"spool{rank}", sample_every=1, rank_timeout_seconds=TIMEOUT
    )
    return attach(optimizer, port=0, settings=settings)


def pids(rank: int) -> list[int]:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, os.getpid())
    return every


def until(condition: Callable[[], Any], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def steps(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    rank: int,
    count: int,
    before_step: Callable[[int], None] = lambda step: None,
    after_step: Callable[[int], None] = lambda step: None,
) -> list[float]:
    losses = []
    for step in range(count):
        loss = model(batch(rank, step)).square().mean()
        loss.backward()
        before_step(step)
        optimizer.step()
        after_step(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights(model: torch.nn.Module) -> list[list[float]]:
    return [p.detach().to_local().flatten().tolist() for p in model.parameters()]  # type: ignore[attr-defined]


def seen(monitor: Monitor) -> dict[str, Any]:
    monitor.flush(60)
    return {"snapshot": monitor.snapshot(), "faults": monitor.faults.counts, "run_id": monitor.run.id}


def back_together(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, monitor: Monitor, rank: int
) -> dict[str, Any]:
    """Train on until rank 0 has statistics of the whole model again, and compare the gradient norm with the whole."""
    norm = math.nan
    for step in range(2000):
        model(batch(rank, step)).square().mean().backward()
        gradients = [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]  # type: ignore[attr-defined]
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
        optimizer.step()
        optimizer.zero_grad()
        monitor.flush(60)
        exported = monitor.snapshot().get('optwatch_grad_norm{stage="at_step"}')
        found = torch.tensor([float(exported is not None)])
        dist.broadcast(found, 0)
        if found.item():
            return {"exported": exported, "norm": norm, "steps": step}
        time.sleep(0.01)
    return {"exported": None, "norm": norm}


def lagging(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Rank 1's host thread stands still from one row on, for longer than the timeout; its training does not."""
    model, optimizer = model_and_optimizer()
    result: dict[str, Any] = {"losses": {"False": steps(model, optimizer, rank, STEPS)}}
    result["weights"] = {"False": weights(model)}
    model, optimizer = model_and_optimizer()
    monitor = watch(optimizer, rank, folder)
    released = threading.Event()

    class Lag:
        def record(self, record: Any) -> None:
            if record.step == LOST_AT and rank == 1:
                released.wait(60)

        def event(self, event: Any) -> None:
            pass

    monitor.sinks.append(Lag())
    began = time.monotonic()
    result["losses"]["True"] = steps(model, optimizer, rank, STEPS)
    result["weights"]["True"] = weights(model)
    result["trained_seconds"] = time.monotonic() - began
    if rank == 0:
        result["lost"] = until(lambda: monitor.faults.counts.get("ranks"))
        result["while_lost"] = seen(monitor)
    dist.barrier()
    released.set()
    result |= back_together(model, optimizer, monitor, rank)
    result |= seen(monitor)
    dist.barrier()
    monitor.detach()
    return result


def stopping(who: int) -> Callable[[int, int, Path], dict[str, Any]]:
    """Rank `who` stops as a whole between backward and step, until the other has given it up. With rank 0 stops the
    store of the process group."""

    def scenario(rank: int, size: int, folder: Path) -> dict[str, Any]:
        model, optimizer = model_and_optimizer()
        result: dict[str, Any] = {"losses": {"False": steps(model, optimizer, rank, STEPS)}}
        result["weights"] = {"False": weights(model)}
        model, optimizer = model_and_optimizer()
        monitor = watch(optimizer, rank, folder)
        stopped_pid = pids(rank)[who]

        def stop(step: int) -> None:
            if step == LOST_AT and rank == who:
                monitor.flush(60)
                os.kill(os.getpid(), signal.SIGSTOP)

        def wake() -> None:
            result["lost"] = until(lambda: monitor.faults.counts.get("ranks"))
            os.kill(stopped_pid, signal.SIGCONT)

        waker = threading.Thread(target=wake)
        if rank != who:
            waker.start()
        result["losses"]["True"] = steps(model, optimizer, rank, STEPS, before_step=stop)
        result["weights"]["True"] = weights(model)
        if rank != who:
            waker.join(60)
        result |= back_together(model, optimizer, monitor, rank)
        result |= seen(monitor)
        dist.barrier()
        monitor.detach()
        return result

    return scenario


stopped = stopping(1)
stopped_with_the_store = stopping(0)


def killed_unwatched(rank: int, size: int, folder: Path) -> dict[str, Any]:
    return _killed(rank, None)


def killed(rank: int, size: int, folder: Path) -> dict[str, Any]:
    return _killed(rank, folder)


def _killed(rank: int, folder: Path | None) -> dict[str, Any]:
    """Rank 1 is killed between backward and step: training on rank 0 ends with torch's own error."""
    model, optimizer = model_and_optimizer()
    monitor = watch(optimizer, rank, folder) if folder else None
    done: list[int] = []

    def kill(step: int) -> None:
        if monitor is not None:
            monitor.flush(60)
        if step == LOST_AT and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    result: dict[str, Any] = {}
    try:
        steps(model, optimizer, rank, STEPS, before_step=kill, after_step=done.append)
    except RuntimeError as error:
        result["error"] = type(error).__name__
    result["steps"] = done
    if monitor is not None:
        began = time.monotonic()
        result |= seen(monitor)
        monitor.detach()
        result["ending_seconds"] = time.monotonic() - began
    return result


def alone(who: int) -> Callable[[int, int, Path], dict[str, Any]]:
    """Only rank `who` attaches."""

    def scenario(rank: int, size: int, folder: Path) -> dict[str, Any]:
        model, optimizer = model_and_optimizer()
        result: dict[str, Any] = {"losses": {"False": steps(model, optimizer, rank, STEPS)}}
        result["weights"] = {"False": weights(model)}
        model, optimizer = model_and_optimizer()
        monitor = watch(optimizer, rank, folder) if rank == who else None
        result["losses"]["True"] = steps(model, optimizer, rank, STEPS)
        result["weights"]["True"] = weights(model)
        if monitor is not None:
            squares = sum(p.detach().to_local().double().square().sum().item() for p in model.parameters())  # type: ignore[attr-defined]
            result |= seen(monitor) | {"own_weight_squares": squares}
            monitor.detach()
        dist.barrier()
        return result

    return scenario


only_first = alone(0)
only_second = alone(1)


class LongEnd:
    """Freed when the interpreter ends, for longer than other ranks are waited for: as what CUDA and torch's process
    groups hold, which takes seconds."""

    def __del__(self, sleep: Callable[[float], None] = time.sleep, seconds: float = 4 * TIMEOUT) -> None:
        sleep(seconds)  # by then this module's own names are gone


at_the_end: list[LongEnd] = []


def left_behind(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Rank 1 stands still for good after the last step, before its host thread has handled it. Rank 0 detaches and
    ends, while its host thread still waits for that rank."""
    model, optimizer = model_and_optimizer()
    settings = Settings(
        address="127.0.0.1",
        spool_directory=folder / f"left{rank}",
        sample_every=1,
        rank_timeout_seconds=2 * TIMEOUT,
        exit_timeout_seconds=0.1,
    )
    monitor = attach(optimizer, port=0, settings=settings)
    handled = threading.Event()

    class Stuck:
        def record(self, record: Any) -> None:
            handled.set()
            if rank == 1:
                threading.Event().wait(60)

        def event(self, event: Any) -> None:
            pass

    monitor.sinks.append(Stuck())
    steps(model, optimizer, rank, 2)
    handled.wait(60)
    stat = Path(f"/proc/{pids(rank)[1]}/stat")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    stopped = until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
    at_the_end.append(LongEnd())
    monitor.detach()
    return {"stopped": stopped, "waits": monitor._host.is_alive(), "faults": monitor.faults.counts}
