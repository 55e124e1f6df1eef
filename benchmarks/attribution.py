"""Whether the agent names the right phase and layer of a NaN or Inf: faults put into real training, one a run.

    python benchmarks/attribution.py [--faults N] [--ranks N] [--write]

Each fault is drawn by a seed: a model, a phase, a layer, NaN or Inf, one element or all of a tensor, and the step. A
run trains to some steps behind it with the agent's default settings. It counts as right where the event's phase is the
fault's and its layer is the one that the fault was put into, and in time where it is at most two steps behind.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn import functional

from optwatch import Monitor, Settings, attach
from optwatch.events import Event
from optwatch.record import StepRecord

RESULTS = Path(__file__).with_name("results") / "attribution.md"
PHASES = ("input", "forward", "loss", "backward", "moments", "weights")
SHARED = ("input", "forward", "loss", "backward")
"""Those whose gradient reaches the other ranks."""
MOST_LATE = 2


class Mixer(nn.Module):
    """Attention and a feed-forward block with residuals, of torch's own encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(6, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.lift(x.view(-1, 2, 6))).mean(1))


class Backwards(nn.Module):
    """Declares its layers in the opposite of the order in which it runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 1)
        self.middle = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.stem = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        for layer in reversed(self.middle):
            x = x + functional.silu(layer(x))
        return self.head(x)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 12)),
        *(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 4, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32, 1)),
    )


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "attention": Mixer,
    "convolutions": convolutions,
    "perceptron": perceptron,
    "declared backwards": Backwards,
}


@dataclass(frozen=True)
class Fault:
    """One fault, drawn by its seed."""

    seed: int
    model: str
    phase: str
    value: float
    whole: bool
    """Whether every element of the tensor is replaced, or one."""
    step: int

    @classmethod
    def draw(cls, seed: int, phases: tuple[str, ...] = PHASES) -> Fault:
        """The fault of a seed: phases and models in turn, the rest at random."""
        choose = random.Random(seed)
        return cls(
            seed=seed,
            model=list(MODELS)[seed // len(phases) % len(MODELS)],
            phase=phases[seed % len(phases)],
            value=math.inf if phases == ("frozen",) else choose.choice((math.nan, math.inf)),
            whole=choose.random() < 0.5,
            step=choose.randint(2 if phases[seed % len(phases)] in ("moments", "frozen") else 1, 6),
        )


@dataclass(frozen=True)
class Outcome:
    """What the agent said of a fault."""

    fault: Fault
    layer: str
    """Where the fault was put."""
    event: Event | None

    @property
    def told(self) -> str:
        return self.event.details["phase"] if self.event else "nothing"

    @property
    def late(self) -> int | None:
        return self.event.step - self.fault.step if self.event else None

    @property
    def right(self) -> bool:
        """Phase and layer. A layer's own part (self_attn.out_proj of self_attn) is the layer."""
        told = self.event.details["layer"] if self.event else ""
        same = told == self.layer or (bool(self.layer) and told.startswith(f"{self.layer}."))
        return self.told == {"frozen": "moments"}.get(self.fault.phase, self.fault.phase) and same

    @property
    def in_time(self) -> bool:
        return self.late is not None and 0 <= self.late <= MOST_LATE


class Sink:
    """Keeps the events of non-finite numbers."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def record(self, record: StepRecord) -> None: ...

    def event(self, event: Event) -> None:
        if event.kind == "nonfinite":
            self.events.append(event)


def spoil(tensor: Tensor, fault: Fault) -> Tensor:
    """The tensor with the fault's value in all or one of its elements."""
    spoilt = tensor.detach().clone(memory_format=torch.contiguous_format)
    spoilt.view(-1)[slice(None) if fault.whole else fault.seed % spoilt.numel()] = fault.value
    return spoilt


@contextmanager
def hooked(fault: Fault, module: nn.Module) -> Iterator[None]:
    """The module spoils what it gives out, or the gradient of that, once."""

    def forward(_: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        if fault.phase == "forward":
            # Where the loss is infinite or NaN through it, and not only a copy that nothing reads.
            first = first + torch.where(torch.isfinite(spoil(first, fault)), 0.0, fault.value)
            return (first, *output[1:]) if isinstance(output, tuple) else first
        first.register_hook(lambda gradient: spoil(gradient, fault))
        return None

    # As if the module computed it: before any other hook sees the output.
    handle = module.register_forward_hook(forward, prepend=True)
    yield
    handle.remove()


def layers(model: nn.Module) -> list[str]:
    """The layers that run as modules of their own: those that hold parameters, without what attention calls itself."""
    names = dict.fromkeys(name.rpartition(".")[0] for name, _ in model.named_parameters())
    return [name for name in names if not name.endswith("out_proj")]


def monitored(optimizer: torch.optim.Optimizer, model: nn.Module, folder: str) -> tuple[Monitor, Sink]:
    settings = Settings(
        address="127.0.0.1", spool_directory=Path(folder), sample_every=10, overhead_budget=1.0, blackbox_bytes=0
    )
    monitor = attach(optimizer, model=model, port=0, settings=settings)
    monitor.sinks.append(sink := Sink())
    return monitor, sink


def inject(fault: Fault, folder: str, closing: Executor | None, rank: int = 0, culprit: int = 0) -> Outcome:
    """Train with this fault on rank `culprit`, and say what the agent made of it on this one."""
    steps = 12 if fault.phase == "frozen" else MOST_LATE
    torch.manual_seed(fault.seed)
    model = MODELS[fault.model]()
    layer = random.Random(-fault.seed).choice(layers(model))
    module = model.get_submodule(layer)
    trained = nn.parallel.DistributedDataParallel(model) if distributed.is_initialized() else model
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    monitor, sink = monitored(optimizer, trained, folder)
    torch.manual_seed(fault.seed + rank)
    for step in range(1, fault.step + steps + 1):
        x, y = torch.randn(4, 12), torch.randn(4, 1)
        at = step == fault.step and rank == culprit
        parameter = next(module.parameters(recurse=False))
        if at and fault.phase == "input":
            x = spoil(x, fault)
        if at and fault.phase == "weights":
            parameter.data.copy_(spoil(parameter, fault))
        if at and fault.phase in ("forward", "backward"):
            with hooked(fault, module):
                loss = (trained(x) - y).square().mean()
                optimizer.zero_grad()
                loss.backward()
        else:
            loss = (trained(x) - y).square().mean()
            if at and fault.phase == "loss":
                loss = loss * fault.value
            optimizer.zero_grad()
            loss.backward()
        if at and fault.phase in ("moments", "frozen"):
            state = optimizer.state[parameter]
            state["exp_avg_sq" if fault.phase == "frozen" else "exp_avg"].copy_(spoil(state["exp_avg"], fault))
        optimizer.step()
    assert monitor.flush(60)
    if closing is None:
        distributed.barrier()  # the agents of all ranks leave together
        monitor.detach()
    else:  # it waits for its HTTP server, in half a second's steps
        closing.submit(monitor.detach)
    named = layer if fault.phase not in ("input", "loss") else ""
    return Outcome(fault, named, sink.events[0] if sink.events else None)


def score(first: int, faults: int, phases: tuple[str, ...] = PHASES) -> list[Outcome]:
    """Inject these faults, each into a run of its own, in one process."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(4) as closing:
        return [inject(Fault.draw(seed, phases), folder, closing) for seed in range(first, first + faults)]


def one_rank(rank: int, size: int, port: int, faults: int, folder: str) -> None:
    """Train data-parallel with each fault on one of the ranks in turn; what this rank was told goes to a file."""
    logging.disable(logging.CRITICAL)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
    distributed.init_process_group("gloo", rank=rank, world_size=size)
    outcomes = []
    for seed in range(faults):
        fault = Fault.draw(seed, SHARED)
        outcome = inject(fault, folder, None, rank, seed % size)
        # What the others get of it comes in their gradients.
        wanted = outcome.right if rank == seed % size else outcome.told == "communication"
        outcomes.append((asdict(fault), rank == seed % size, outcome.told, outcome.late, wanted and outcome.in_time))
    Path(folder, f"{rank}.json").write_text(json.dumps(outcomes))
    distributed.destroy_process_group()


def score_ranks(faults: int, size: int = 2) -> list[list[list[Any]]]:
    """By rank and fault: the fault, whether it is this rank's, the phase it told of, how late, and whether that is
    right."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        multiprocessing.spawn(one_rank, (size, port, faults, folder), nprocs=size)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]


def table(outcomes: list[Outcome]) -> str:
    """The confusion table of phases."""
    phases = list(dict.fromkeys(outcome.fault.phase for outcome in outcomes))
    told = Counter((outcome.fault.phase, outcome.told) for outcome in outcomes)
    columns = [*PHASES, *sorted({outcome.told for outcome in outcomes} - set(PHASES))]
    head = f"| put into | faults | {' | '.join(f'said {name}' for name in columns)} | phase and layer right | in time |"
    lines = [head, "| --- |" + " ---: |" * (len(columns) + 3)]
    for phase in phases:
        of = [outcome for outcome in outcomes if outcome.fault.phase == phase]
        cells = [str(told[phase, name] or "") for name in columns]
        right, in_time = sum(o.right for o in of), sum(o.in_time for o in of)
        lines.append(f"| {phase} | {len(of)} | {' | '.join(cells)} | {right} | {in_time} |")
    right, in_time = sum(o.right for o in outcomes), sum(o.in_time for o in outcomes)
    return "\n".join([*lines, f"| all | {len(outcomes)} |{'  |' * len(columns)} {right} | {in_time} |"])


def main() -> None:
    """Inject, print the tables, and write them down if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=60, help="faults among two data-parallel processes")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    outcomes = score(0, options.faults)
    frozen = score(0, max(1, options.faults // 25), ("frozen",))
    ranks = score_ranks(options.ranks)
    shared = Counter((one[0]["phase"], one[1], one[4]) for rank in ranks for one in rank)
    wrong = [f"{o.fault.phase} {o.fault.value} in {o.layer} ({o.fault.model})" for o in outcomes if not o.right]
    text = f"""# Attribution of NaN and Inf

`python benchmarks/attribution.py --faults {options.faults} --ranks {options.ranks} --write`, torch {torch.__version__},
on a CPU; default settings.

## {len(outcomes)} faults in one process

{table(outcomes)}

In time: at most {MOST_LATE} steps late. Not right: {", ".join(wrong) or "none"}.

An infinite second moment freezes its weight and makes nothing else bad. It is found when its turn in the rotation over
`Settings.sample_every` steps comes, so it has a table of its own:

{table(frozen).replace("frozen", "second moment, Inf")}

## {options.ranks} faults among two data-parallel processes

The rank that has the fault is to name its phase and layer, the other one to say `communication`.

| put into | rank with the fault: right | other rank: right |
| --- | ---: | ---: |
"""
    for phase in SHARED:
        of = [(shared[phase, own, True], shared[phase, own, False]) for own in (True, False)]
        cells = [f"{right} of {right + missed}" for right, missed in of]
        text += f"| {phase} | {cells[0]} | {cells[1]} |\n"
    print(text)
    if options.write:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
