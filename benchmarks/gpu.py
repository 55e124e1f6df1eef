"""What the agent costs on a GPU: share of a step, distance to the memory's bandwidth, launches, waits and memory.

    python benchmarks/gpu.py [--rounds N] [--rehearse] [--write]

Needs a CUDA device and torch, and skips with the reason elsewhere. `--rehearse` runs the same code on a small model on
whatever device there is, without what only CUDA can tell: it shows that the suite works, not what the agent costs.

One model trains all the time; plain, default and full cadence take turns in blocks of steps, in an order that is
shuffled each round. A block is timed from the device's idle to its idle; a figure is the median over rounds of a block
over the plain block of its round, minus one, and the spread is the quartiles.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from optwatch import Monitor, Settings, attach, kernels
from optwatch.kernels import device as kernels_of_devices

RESULTS = Path(__file__).with_name("results") / "gpu.md"
CADENCES = {"default": 10, "all statistics every step": 1}


@dataclass(frozen=True)
class Size:
    """A model and how many tokens a step sees."""

    vocabulary: int
    width: int
    blocks: int
    sequence: int
    micro_batch: int
    accumulation: int
    steps: int
    """Steps of a block."""

    @property
    def tokens(self) -> int:
        return self.sequence * self.micro_batch * self.accumulation


FULL = Size(vocabulary=50_304, width=2048, blocks=24, sequence=2048, micro_batch=4, accumulation=4, steps=20)
SMALL = Size(vocabulary=512, width=128, blocks=2, sequence=64, micro_batch=4, accumulation=2, steps=10)


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 128)
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        shape = (batch, length, 3, self.heads, width // self.heads)
        q, k, v = self.mixed(self.before_attention(x)).view(shape).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.down(functional.gelu(self.up(self.before_mlp(x))))


class Trainer:
    """A decoder with fp32 weights under bf16 autocast, AdamW, accumulation and clipping: what is common."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.device = size, device
        torch.manual_seed(0)
        with device:
            self.model = nn.Sequential(
                nn.Embedding(size.vocabulary, size.width),
                *(Block(size.width) for _ in range(size.blocks)),
                nn.LayerNorm(size.width),
                nn.Linear(size.width, size.vocabulary, bias=False),
            )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=device.type == "cuda")
        self.batch = torch.randint(size.vocabulary, (size.micro_batch, size.sequence + 1), device=device)
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def step(self) -> None:
        for _ in range(self.size.accumulation):
            with torch.autocast(self.device.type, torch.bfloat16):
                logits = self.model(self.batch[:, :-1])
                loss = functional.cross_entropy(logits.flatten(0, 1), self.batch[:, 1:].flatten())
            (loss / self.size.accumulation).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self, steps: int) -> float:
        """Time of a block of steps, from idle to idle."""
        self.wait()
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        self.wait()
        return (time.perf_counter() - began) / steps

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def attach(self, sample_every: int) -> Monitor:
        # Kept from reading less than it is asked to: figures are of this cadence.
        settings = Settings(address="127.0.0.1", sample_every=sample_every, overhead_budget=1.0)
        return attach(self.optimizer, model=self.model, port=0, settings=settings)


def shares(trainer: Trainer, rounds: int) -> tuple[float, dict[str, list[float]]]:
    """Seconds of a plain step, and by cadence the share that the agent adds, round by round."""
    added: dict[str, list[float]] = {name: [] for name in CADENCES}
    plain = []
    for _ in range(rounds):
        taken = {}
        order = ["plain", *CADENCES]
        random.shuffle(order)
        for name in order:
            monitor = trainer.attach(CADENCES[name]) if name in CADENCES else None
            for _ in range(3):  # plans are made at the first step
                trainer.step()
            taken[name] = trainer.seconds(trainer.size.steps)
            if monitor:
                leave(monitor)
        plain.append(taken["plain"])
        for name in CADENCES:
            added[name].append(taken[name] / taken["plain"] - 1)
    return statistics.median(plain), added


def leave(monitor: Monitor) -> None:
    """Detach; what the agent counted as a fault of its own makes every figure wrong."""
    monitor.flush(60)
    monitor.detach()
    if monitor.faults.counts:
        sys.exit(f"the agent failed: {dict(monitor.faults.counts)}")


def paths() -> list[str]:
    """Which path reads the statistics on CUDA."""
    return list(map(str, kernels_of_devices.all_of_them())) or ["no CUDA device has a kernel"]


def compile_kernels(trainer: Trainer) -> list[str]:
    """Step until every form of the kernel that a step asks for is there, and say which path reads the statistics."""
    monitor = trainer.attach(1)
    kernels.prepare_addresses().join()  # each of these models has as many parameters as it takes
    end = time.monotonic() + 120
    for step in range(10_000):
        trainer.step()
        trainer.wait()
        waiting = [each for each in kernels_of_devices.all_of_them() if each.waiting]
        if (step > 10 and not waiting) or time.monotonic() > end:
            break
    leave(monitor)
    return paths()


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes read a second by a sum over one large tensor: the best of ten."""
    tensor = torch.ones(size, device=device)
    best = float("inf")
    for _ in range(10):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        tensor.sum()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return tensor.numel() * tensor.element_size() / best


def device_operations(trainer: Trainer, steps: int) -> Counter[str]:
    """Kernels and copies on the device in some steps, by name."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        for _ in range(steps):
            trainer.step()
        trainer.wait()
    return Counter(event.name for event in profiled.events() if event.device_type.name == "CUDA")


def cuda_only(trainer: Trainer) -> list[str]:
    """Launches a step, device memory, and a thousand steps in which a synchronisation is an error."""
    lines = []
    plain = sum(device_operations(trainer, 10).values())
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    monitor = trainer.attach(1)
    for _ in range(5):
        trainer.step()
    trainer.wait()
    tensors = len(list(trainer.model.parameters()))
    extra = torch.cuda.memory_allocated() - held
    lines.append(f"- device memory: {extra / 2**20:.2f} MiB more, {tensors} tensors")
    added = (sum(device_operations(trainer, 10).values()) - plain) / 10
    lines.append(f"- kernels and copies added a step, all statistics: {added:.0f}")
    leave(monitor)
    small = Trainer(SMALL, trainer.device)
    monitor = small.attach(10)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(1000):
            small.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    leave(monitor)  # a hook does not raise into training: its error is counted
    lines.append("- synchronisations in 1000 steps: 0 (each would have been an error)")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--rehearse", action="store_true", help="a small model on whatever device there is")
    parser.add_argument("--write", action="store_true", help=f"write the table to {RESULTS.name}")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not options.rehearse:
        sys.exit(print("skipped: torch finds no CUDA device (--rehearse runs the suite's code without one)"))
    device = torch.device("cuda" if cuda else "cpu")
    trainer = Trainer(SMALL if options.rehearse else FULL, device)
    before = compile_kernels(trainer)
    plain, added = shares(trainer, options.rounds)
    speed = bandwidth(device, 2**28 if cuda else 2**24)
    name = torch.cuda.get_device_name() if cuda else platform.machine()
    lines = [
        "# Cost of a step on a GPU\n",
        f"`python benchmarks/gpu.py --rounds {options.rounds}{' --rehearse' if options.rehearse else ''} --write` · "
        f"{name} · torch {torch.__version__} · {trainer.parameters / 1e6:.0f}M parameters, fp32 under bf16 autocast, "
        f"fused AdamW, clipping, {trainer.size.tokens} tokens a step\n",
        f"A plain step takes {plain * 1e3:.1f} ms; memory is read at {speed / 1e9:.0f} GB/s.\n",
        "| cadence | added, median (quartiles) | floor | times the floor |",
        "| --- | --- | --- | --- |",
    ]
    for cadence, every in CADENCES.items():
        low, middle, high = statistics.quantiles(added[cadence], n=4)
        # g at each step, and p, m and v at one step in `every`: four bytes each.
        floor = trainer.parameters * 4 * (1 + 3 / every) / speed / plain
        lines.append(f"| {cadence} | {middle:+.2%} ({low:+.2%} to {high:+.2%}) | {floor:.2%} | {middle / floor:.1f} |")
    lines += ["", "Before the first figure:", *(f"- {path}" for path in before)]
    lines += ["", *(cuda_only(trainer) if cuda else ["Launches, waits and device memory need CUDA."])]
    lines += ["", "After the last one:", *(f"- {path}" for path in paths())]
    print("\n".join(lines))
    if options.write:
        RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
