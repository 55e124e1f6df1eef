"""What the agent costs a training step, beside what a user would pick instead and the least that reading takes.

    python benchmarks/overhead.py [--seconds N] [--threads N] [--model NAME ...] [--write]

One model trains all the time, and the contenders take turns in blocks of steps, in an order that is shuffled each
round, so that whatever else the machine does falls on all alike; the agent is attached for its block and detached
behind it. A block's first step does not count, of the agent the first rotation over weights and moments: until then it
starts threads, makes what it keeps, and does not know yet how often it is to read. Blocks of the agent and of the plain
step count sixteen steps, the others' three. Two figures of each:

- *step longer by*: its steps of a round against the plain steps of the same round, their means divided, minus one: the
  median over rounds, with the quartiles. It has everything in it, and the noise of whole steps.
- *its own calls*: what they take, timed by themselves, divided by the plain step; the median. Of the agent what it
  exports as `optwatch_agent_overhead_seconds_total`: its hooks on the training thread and its host thread, added up;
  the hooks alone are what training waits for. Contenders that work in hooks of the passes have none.

The peers are in peers.py; those whose packages are not installed are left out and named (benchmarks/requirements.txt).
The floor is the time to read the bytes once, at the bandwidth that this run measured, and, as a contender of its own,
what its kernel takes to do that in the midst of a step. What the agent reads is counted in further steps: more than the
floor's bytes, since the moment before the step, the measured update and the outputs of layers are read too.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peers import Contender, installed, nothing
from torch import nn
from torch.nn import functional

from optwatch import Settings, attach, kernels
from optwatch.host.restraint import MAX_STRETCH
from optwatch.settings import ROTATION_STEPS
from optwatch.training.sampling import Schedule

RESULTS = Path(__file__).with_name("results") / "overhead.md"
TOKENS = 512
LEAST_ROUNDS = 4
"""That count, behind one that does not: what is first allocates, imports and makes its files."""
STEPS = MAX_STRETCH
"""Of a block of the agent, and of the plain step: a whole number of times as many as between two readings of a part."""
WARM_STEPS = ROTATION_STEPS + 1
"""Of the agent that do not count: with the last of them the first rotation has shown how long steps take."""
FEW_STEPS = 3
"""Of a block of a peer."""
PLAIN, DEFAULT, EVERYTHING = "plain step", "optwatch, default", "optwatch, everything each step"
BYTES = "its kernel alone on g and a tenth of p, m, v"
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


class Agent(Contender):
    """The agent, kept from reading less than it was asked to."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, sample_every: int | None) -> None:
        super().__init__(begin=self._attach, end=self._detach, hooked=True)
        self._model, self._optimizer = model, optimizer
        self.settings = Settings(
            address="127.0.0.1",
            sample_every=sample_every,
            overhead_budget=1.0,
            audit_silenced="decay-on-norms-and-biases,decay-on-embeddings,half-precision-weights",
        )

    def _attach(self) -> None:
        self.monitor = attach(self._optimizer, model=self._model, port=0, settings=self.settings)

    def _detach(self) -> None:
        self.monitor.flush(60)
        self.monitor.detach()
        if self.monitor.faults.counts:
            raise RuntimeError(f"the agent failed, and costs less than one that works: {self.monitor.faults.counts}")

    def seconds(self) -> tuple[float, float]:
        """What its hooks, and what all of it, has taken since it was attached."""
        seen = self._seen()
        hooks = seen[f'{OVERHEAD}{{where="hook"}}']
        return hooks, hooks + seen[f'{OVERHEAD}{{where="host"}}']

    def rotation(self) -> int:
        """Steps in which it reads weights and moments once."""
        return int(self._seen()['optwatch_agent_sampling_interval_steps{what="weights_and_moments"}'])

    def _seen(self) -> dict[str, float]:
        assert self.monitor.flush(60)
        return self.monitor.snapshot()


def kernel_alone(model: nn.Module, optimizer: torch.optim.Optimizer) -> Contender:
    """What has to be read at the default cadence, read once by the agent's kernel, and nothing done with it: the floor
    as it is in the midst of a step, where what training has left in the caches is to be written back first."""
    kernel, parameters = kernels.cpu_kernel(), list(model.parameters())
    assert kernel is not None
    schedule = Schedule([p.numel() for p in parameters], 10)
    known: dict[int, list[Sequence[torch.Tensor]]] = {}
    squares = torch.zeros(4, len(parameters), dtype=torch.float64)
    turn = 0

    def read() -> None:
        nonlocal turn
        turn = (turn + 1) % 10
        if turn not in known:
            some = [parameters[i] for i in schedule.part(turn)]
            each = [some, *([optimizer.state[p][key] for p in some] for key in ("exp_avg", "exp_avg_sq"))]
            known[turn] = list(map(kernels.located, each))
        lists = [kernels.gradients(parameters, kernels.CPU)[1], *known[turn]]
        places = [kernels.Place(row[: len(xs)]) for row, xs in zip(squares, lists, strict=True)]
        assert kernel.run([kernels.Request("products", xs, place) for xs, place in zip(lists, places, strict=True)])

    return Contender(read)


@dataclass
class Figures:
    """Of one contender."""

    longer: list[float] = field(default_factory=list)
    """By round."""
    own: list[float] = field(default_factory=list)
    """Seconds of a step."""
    hooks: list[float] = field(default_factory=list)
    """Of the agent, likewise; of the others none."""
    bytes_read: float = 0
    """By the agent, a step."""
    rotation: int = 0
    """Of the agent, in steps."""


class Training:
    """The model that trains all the time."""

    def __init__(self, make: Make) -> None:
        torch.manual_seed(0)
        self.model = make()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        kernels.prepare_addresses().join()  # each of these models has as many parameters as it takes
        self.step(nothing)  # which makes the moments that contenders read, whose turn comes at random

    def step(self, before_step: Callable[[], object]) -> tuple[float, float]:
        """Seconds of a step, and of what is called before it."""
        began = time.perf_counter()
        self.model.loss().backward()  # type: ignore[operator]
        before = time.perf_counter()
        before_step()
        read = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began, read - before

    def block(self, contender: Contender, steps: int, figures: Figures | None) -> list[float]:
        """Seconds of each step of a block; its own time goes into `figures`, where it counts."""
        contender.begin()
        for _ in range(WARM_STEPS if isinstance(contender, Agent) else 1):
            self.step(contender.before_step)
        earlier = contender.seconds() if isinstance(contender, Agent) else None
        taken = [self.step(contender.before_step) for _ in range(steps)]
        if figures is not None and isinstance(contender, Agent) and earlier is not None:
            hooks, own = (now - then for now, then in zip(contender.seconds(), earlier, strict=True))
            figures.hooks.append(hooks / steps)
            figures.own.append(own / steps)
        elif figures is not None and not contender.hooked:
            figures.own += [own for _, own in taken]
        contender.end()
        return [seconds for seconds, _ in taken]


def bandwidth() -> float:
    """Bytes a second that this many threads read: the best of some sums over a quarter of a gigabyte."""
    x = torch.ones(2**26)
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        x.sum()
        seconds.append(time.perf_counter() - began)
    return x.nbytes / min(seconds)


def bytes_read(training: Training, agent: Agent) -> tuple[float, int]:
    """Bytes that the agent reads and writes of tensors in a step, on average over four rotations, as updates take so
    many; and the steps of one."""
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

    agent.begin()
    for _ in range(WARM_STEPS):
        training.step(nothing)
    rotation = agent.rotation()
    with (
        counts(kernels.Kernel, "run", requested),
        counts(kernels.Kernel, "largest", lambda _, x: x.nbytes),
    ):
        for _ in range(4 * rotation):
            training.step(nothing)
    agent.end()
    return found / (4 * rotation), rotation


def measure(make: Make, seconds: float) -> tuple[Training, float, dict[str, Figures]]:
    """Train for about so long: the training, seconds of a plain step, and the figures of each contender."""
    training = Training(make)
    whole = training.model, training.optimizer
    agents = {DEFAULT: Agent(*whole, None), EVERYTHING: Agent(*whole, 1)}
    contenders: dict[str, Contender] = {PLAIN: Contender(), **agents, BYTES: kernel_alone(*whole)}
    contenders |= {name: peer(*whole) for name, peer in installed().items()}
    order = list(contenders)
    figures = {name: Figures() for name in contenders}
    plain: list[float] = []
    began, rounds = 0.0, -1
    while rounds < LEAST_ROUNDS or time.monotonic() - began < seconds:
        taken: dict[str, list[float]] = {name: [] for name in contenders}
        random.shuffle(order)
        for name in order:
            counted = figures[name] if rounds >= 0 else None
            many = name in (PLAIN, *agents)
            taken[name] += training.block(contenders[name], STEPS if many else FEW_STEPS, counted)
        if rounds < 0:
            began = time.monotonic()
        else:
            plain += taken[PLAIN]
            for name in contenders:
                figures[name].longer.append(statistics.mean(taken[name]) / statistics.mean(taken[PLAIN]) - 1)
        rounds += 1
    for name, agent in agents.items():
        figures[name].bytes_read, figures[name].rotation = bytes_read(training, agent)
    return training, statistics.median(plain), figures


def spread(shares: list[float]) -> str:
    low, middle, high = (100 * x for x in statistics.quantiles(shares, n=4))
    return f"{middle:+.2f}% ({low:+.2f} to {high:+.2f})"


def table(name: str, make: Make, seconds: float) -> list[str]:
    training, step, figures = measure(make, seconds)
    rounds = len(figures.pop(PLAIN).longer)
    speed = bandwidth()
    read = sum(p.nbytes for p in training.model.parameters()) / speed / step
    lines = [
        f"## {name}\n",
        f"Plain step {step * 1e3:.0f} ms, {rounds} rounds. Floor: gradients {100 * read:.2f}%, with a tenth "
        f"of weights and moments {130 * read:.2f}%, gradients, weights and both moments {400 * read:.2f}%.\n",
        *(
            f"- {contender}: hooks {100 * statistics.median(each.hooks) / step:.2f}%, {each.bytes_read / 1e6:.0f} MB a "
            f"step, which take {100 * each.bytes_read / speed / step:.2f}%; weights and moments in {each.rotation} "
            f"step{'s' * (each.rotation > 1)}."
            for contender, each in figures.items()
            if each.hooks
        ),
        "",
        "| | step longer by | its own calls |",
        "| --- | --- | --- |",
    ]
    for contender, each in figures.items():
        own = f"{100 * statistics.median(each.own) / step:.2f}%" if each.own else "in hooks"
        lines.append(f"| {contender} | {spread(each.longer)} | {own} |")
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
        "How it is measured is said at the top of overhead.py. *Longer by*: median (quartiles) over rounds of blocks "
        "that take turns, all noise of whole steps included; *its own calls*: median, timed by themselves; both "
        "against the plain step.\n",
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
