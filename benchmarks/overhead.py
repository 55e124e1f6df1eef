"""What the agent costs a training step, beside what a user would pick instead and the least that reading takes.

    python benchmarks/overhead.py [--seconds N] [--threads N] [--model NAME ...] [--write]

Each contender trains its own copy of the same model on the same batches; they take turns, in an order that is shuffled
each round, so that whatever else the machine does falls on all alike. A turn is a few steps, the first of which does
not count: it finds the caches as the others have left them, which no step of a training does. Two figures of each:

- *step longer by*: the median of its steps divided by the plain steps of the same round, minus one, with the
  quartiles. It has everything in it, and all the noise of a whole step. The agent's step waits until its host thread
  has handled the row, which training never does.
- *its own calls*: what they take, timed by themselves, divided by the plain step. Of the agent what it exports as
  `optwatch_agent_overhead_seconds_total`: its hooks on the training thread and its host thread, added up; the hooks
  alone are what training waits for. Contenders that work in hooks of the backward pass have none.

The peers are in peers.py; those whose packages are not installed are left out and named (benchmarks/requirements.txt).
The floor is the time to read the bytes once, at the bandwidth that this run measured. What the agent reads is counted
in further steps: more than the floor's bytes, since the moment before the step and the measured update are read too.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peers import Contender, installed
from torch import nn
from torch.nn import functional

from optwatch import Settings, attach, kernels
from optwatch.training.update import Update

RESULTS = Path(__file__).with_name("results") / "overhead.md"
TOKENS = 512
WARM_UP = 12
"""Steps that are not counted: the first allocate, and weights and moments are read in rotations of ten."""
LEAST_ROUNDS = 5
STEPS = 3
"""Of a turn."""
OVERHEAD = "optwatch_agent_overhead_seconds_total"


class Transformer(nn.Module):
    """A decoder over bytes, of `width` and `blocks`."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def loss(self) -> torch.Tensor:
        tokens = torch.randint(256, (TOKENS // 64, 65))
        logits = self.head(self.blocks(self.embedding(tokens[:, :-1])))
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Many(nn.Module):
    """2000 small tensors: what costs there is the number of calls, not of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(48, 48) for _ in range(1000))

    def loss(self) -> torch.Tensor:
        x = torch.randn(16, 48)
        for layer in self.layers:
            x = x + 0.01 * layer(x)
        return x.square().mean()


Make = Callable[[], nn.Module]
MODELS: dict[str, Make] = {
    "transformer, 10M parameters, fp32": lambda: Transformer(384, 6),
    "transformer, 10M parameters, bf16": lambda: Transformer(384, 6).bfloat16(),
    "transformer, 50M parameters, fp32": lambda: Transformer(704, 8),
    "transformer, 50M parameters, bf16": lambda: Transformer(704, 8).bfloat16(),
    "2000 small tensors, fp32": Many,
}


def nothing() -> None: ...


@dataclass
class Trainer:
    """One contender's copy of the model: what it calls before the step, and what it says of its own time."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    before_step: Callable[[], object]
    after_step: Callable[[], object]
    own_seconds: Callable[[], tuple[float, float]] | None
    """In all so far, and of that in hooks; None where its calls are to be timed here, or cannot be."""
    timed: bool
    """Whether all it does is in `before_step`."""
    close: Callable[[], object] = nothing
    """Called once its steps are over."""
    steps: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    hooks: list[float] = field(default_factory=list)
    bytes_read: float = 0
    """By the agent, a step."""

    def step(self, count: bool) -> None:
        began_own = self.own_seconds() if self.own_seconds else (0.0, 0.0)
        began = time.perf_counter()
        self.model.loss().backward()  # type: ignore[operator]
        before = time.perf_counter()
        self.before_step()
        read = time.perf_counter()
        self.optimizer.step()
        self.after_step()
        self.optimizer.zero_grad()
        ended = time.perf_counter()
        if count:
            self.steps.append(ended - began)
            if self.own_seconds:
                own, hooks = self.own_seconds()
                self.own.append(own - began_own[0])
                self.hooks.append(hooks - began_own[1])
            elif self.timed:
                self.own.append(read - before)


def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> Trainer:
    return Trainer(model, optimizer, nothing, nothing, None, timed=False)


def optwatch(sample_every: int) -> Callable[[nn.Module, torch.optim.Optimizer], Trainer]:
    """The agent, kept from reading less than it was asked to."""

    def make(model: nn.Module, optimizer: torch.optim.Optimizer) -> Trainer:
        settings = Settings(address="127.0.0.1", sample_every=sample_every, overhead_budget=1.0)
        monitor = attach(optimizer, model=model, port=0, settings=settings)

        def seconds() -> tuple[float, float]:
            seen = monitor.snapshot()
            hooks = seen[f'{OVERHEAD}{{where="hook"}}']
            return hooks + seen[f'{OVERHEAD}{{where="host"}}'], hooks

        return Trainer(model, optimizer, nothing, monitor.flush, seconds, timed=False, close=monitor.detach)

    return make


def peer(name: str, contender: Contender) -> Callable[[nn.Module, torch.optim.Optimizer], Trainer]:
    hooked = name.startswith("wandb")

    def make(model: nn.Module, optimizer: torch.optim.Optimizer) -> Trainer:
        return Trainer(model, optimizer, contender(model, optimizer), nothing, None, timed=not hooked)

    return make


def bandwidth() -> float:
    """Bytes a second that this many threads read: the best of some sums over a quarter of a gigabyte."""
    x = torch.ones(2**26)
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        x.sum()
        seconds.append(time.perf_counter() - began)
    return x.nbytes / min(seconds)


def bytes_read(trainer: Trainer) -> float:
    """Bytes that the agent reads and writes of tensors in a step: the mean over four rotations of ten steps."""
    found = 0

    def counts(owner: type, name: str, size: Callable[..., int]) -> Any:
        original = getattr(owner, name)

        def counted(self: Any, *arguments: Any) -> Any:
            nonlocal found
            result = original(self, *arguments)
            found += size(self, *arguments)
            return result

        return patch.object(owner, name, counted)

    def requested(_: Any, requests: Any) -> int:
        return sum(x.nbytes for request in requests for x in (*request.xs, *request.ys))

    def copied(update: Any) -> int:
        return 2 * sum(x.nbytes for x in update._copies or ())

    with (
        counts(kernels.Kernel, "run", requested),
        counts(kernels.Kernel, "largest", lambda _, x: x.nbytes),
        counts(Update, "before", copied),
    ):
        for _ in range(40):
            trainer.step(count=False)
    return found / 40


def measure(make: Make, seconds: float) -> dict[str, Trainer]:
    """Train all contenders in turn for about so long."""
    makers = {"plain step": plain, "optwatch, default": optwatch(10), "optwatch, everything each step": optwatch(1)}
    trainers: dict[str, Trainer] = {}
    for name, maker in {**makers, **{name: peer(name, found) for name, found in installed().items()}}.items():
        torch.manual_seed(0)
        model = make()
        trainers[name] = maker(model, torch.optim.AdamW(model.parameters(), lr=1e-4))
    order = list(trainers)
    began, rounds = 0.0, 0
    warm = WARM_UP // STEPS
    while rounds < warm + LEAST_ROUNDS or time.monotonic() - began < seconds:
        if rounds == warm:
            began = time.monotonic()
        random.shuffle(order)
        for name in order:
            for step in range(STEPS):
                torch.manual_seed(rounds * STEPS + step)
                trainers[name].step(count=rounds >= warm and step > 0)
        rounds += 1
    for trainer in trainers.values():
        if trainer.hooks:
            trainer.bytes_read = bytes_read(trainer)
        trainer.close()
    return trainers


def spread(shares: list[float]) -> str:
    low, middle, high = (100 * x for x in statistics.quantiles(shares, n=4))
    return f"{middle:+.2f}% ({low:+.2f} to {high:+.2f})"


def table(name: str, make: Make, seconds: float) -> list[str]:
    trainers = measure(make, seconds)
    base = trainers.pop("plain step")
    step = statistics.median(base.steps)
    speed = bandwidth()
    read = sum(p.nbytes for p in base.model.parameters()) / speed / step
    lines = [
        f"## {name}\n",
        f"Plain step {step * 1e3:.0f} ms, {len(base.steps)} steps. Floor: gradients {100 * read:.2f}%, with a tenth "
        f"of weights and moments {130 * read:.2f}%, gradients, weights and both moments {400 * read:.2f}%.\n",
        *(
            f"- {contender}: hooks {100 * statistics.median(trainer.hooks) / step:.2f}%, "
            f"{trainer.bytes_read / 1e6:.0f} MB a step, which take {100 * trainer.bytes_read / speed / step:.2f}%."
            for contender, trainer in trainers.items()
            if trainer.hooks
        ),
        "",
        "| | step longer by | its own calls |",
        "| --- | --- | --- |",
    ]
    for contender, trainer in trainers.items():
        longer = [one / other - 1 for one, other in zip(trainer.steps, base.steps, strict=True)]
        own = f"{100 * statistics.median(trainer.own) / step:.2f}%" if trainer.own else "in hooks"
        lines.append(f"| {contender} | {spread(longer)} | {own} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="for each model, after a warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", action="append", choices=MODELS, help="one of the models; may be repeated")
    parser.add_argument("--write", action="store_true", help=f"write the tables to {RESULTS.name}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kernels.prepare().join()
    models = options.model or list(MODELS)
    chosen = "".join(f" --model '{name}'" for name in options.model or [])
    lines = [
        "# Cost of a step\n",
        f"`python benchmarks/overhead.py --seconds {options.seconds:g} --threads {options.threads}{chosen} --write` · "
        f"torch {torch.__version__} · Python {platform.python_version()} · {platform.machine()}, {options.threads} "
        f"threads, {bandwidth() / 1e9:.0f} GB/s · AdamW, {TOKENS} tokens a step (16 of the small tensors)\n",
        "How it is measured is said at the top of overhead.py. *Longer by*: median (quartiles) over interleaved turns,"
        " all noise of a whole step included; *its own calls*: median, timed by themselves; both against the plain "
        "step.\n",
    ]
    for name in models:
        found = table(name, MODELS[name], options.seconds)
        print("\n".join(found), flush=True)
        lines += found
    if options.write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
