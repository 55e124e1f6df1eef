"""Ways of training on several ranks, each a scenario: trained with and without optwatch, and compared with an oracle.

The oracle is given the whole tensors of each step, gathered over the trainer's own group, and computes every statistic
from them in float64 by its definition.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from optwatch import Settings, attach
from optwatch.parallel import Group

STEPS = 2
EPSILON = 1e-4
"""Large enough that some entries are dominated by it and others are not."""


class Block(nn.Module):
    """A norm, two matrices, a frozen layer; 12 and 8 are divisible by two ranks and not by all the shards made here."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.frozen = nn.Linear(8, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """A block and a head of 3 rows, so that with 4 ranks one holds nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Block()
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x))


@dataclass
class Way:
    """One way of training: what each rank trains, and with which loss."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[int], Tensor]
    clip: bool = True
    named: dict[str, Tensor] = field(default_factory=dict)
    """This rank's parameters by the name that they are to have."""
    rename: Callable[[str], str] = lambda name: name

    def __post_init__(self) -> None:
        if not self.named:
            named = self.model.named_parameters()
            self.named = {self.rename(name.removeprefix("module.")): p for name, p in named}


def adamw(parameters: Any) -> torch.optim.Optimizer:
    parameters = list(parameters)
    some, others = parameters[::2], parameters[1::2]
    groups = [{"params": some, "weight_decay": 0.1}, {"params": others, "lr": 2e-3, "betas": (0.9, 0.98)}]
    return torch.optim.AdamW(groups, lr=1e-3, eps=EPSILON)


def batch(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(4, 8, generator=generator)


def whole(tensor: Tensor | None) -> Tensor | None:
    """All of a tensor in float64: a collective where it is sharded."""
    if tensor is None:
        return None
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().double().clone()


def gathered(mine: dict[str, Any]) -> dict[str, Any]:
    """By name, from whichever rank has it: the lowest one."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    merged: dict[str, Any] = {}
    for one in every:
        for name, value in one.items():
            if merged.get(name) is None:
                merged[name] = value
    return merged


def square_sum(tensors: Any) -> float:
    return float(sum(x.square().sum().item() for x in tensors))


def layer_of(name: str) -> str:
    return name.rpartition(".")[0]


def by_layer(tensors: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    layers: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        layers.setdefault(layer_of(name), []).append(tensor)
    return layers


class Oracle:
    """What rank 0 is to export, from whole tensors."""

    def __init__(self, way: Way) -> None:
        self.way = way
        self.want: dict[str, float] = {}

    def tensors(self, read: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
        mine = {name: whole(read(p)) for name, p in self.way.named.items()}
        return {name: x for name, x in gathered(mine).items() if x is not None}

    def state(self, key: str) -> dict[str, Tensor]:
        optimizer = getattr(self.way.optimizer, "optim", self.way.optimizer)
        return self.tensors(lambda p: optimizer.state.get(p, {}).get(key))

    def gradients(self) -> dict[str, Tensor]:
        return self.tensors(lambda p: p.grad)

    def weights(self) -> dict[str, Tensor]:
        return self.tensors(lambda p: p)

    def before_clip(self) -> None:
        gradients = self.gradients()
        self.want['optwatch_grad_norm{stage="before_clip"}'] = math.sqrt(square_sum(gradients.values()))

    def before(self) -> None:
        gradients = self.gradients()
        self.want['optwatch_grad_norm{stage="at_step"}'] = math.sqrt(square_sum(gradients.values()))
        for layer, tensors in by_layer(gradients).items():
            self.want[f'optwatch_layer_grad_norm{{layer="{layer}"}}'] = math.sqrt(square_sum(tensors))
        if moments := self.state("exp_avg"):
            dot = sum((gradients[name] * m).sum().item() for name, m in moments.items())
            norms = math.sqrt(square_sum(gradients[n] for n in moments) * square_sum(moments.values()))
            self.want["optwatch_grad_moment_cosine"] = dot / norms
        self.weights_before = self.weights()

    def after(self) -> None:
        weights = self.weights()
        self.want["optwatch_weight_norm"] = math.sqrt(square_sum(weights.values()))
        moved = math.sqrt(square_sum(weights[name] - self.weights_before[name] for name in weights))
        self.want["optwatch_update_norm"] = moved
        self.want["optwatch_update_ratio"] = moved / self.want["optwatch_weight_norm"]
        for layer, tensors in by_layer(weights).items():
            self.want[f'optwatch_layer_weight_norm{{layer="{layer}"}}'] = math.sqrt(square_sum(tensors))
        firsts, seconds, steps = self.state("exp_avg"), self.state("exp_avg_sq"), self.state("step")
        self.want["optwatch_first_moment_norm"] = math.sqrt(square_sum(firsts.values()))
        for layer, tensors in by_layer(firsts).items():
            self.want[f'optwatch_layer_first_moment_norm{{layer="{layer}"}}'] = math.sqrt(square_sum(tensors))
        count = sum(v.numel() for v in seconds.values())
        self.want["optwatch_second_moment_mean"] = sum(v.sum().item() for v in seconds.values()) / count
        self.want["optwatch_second_moment_max"] = max(v.max().item() for v in seconds.values())
        mine = {}
        groups = self.way.optimizer.param_groups
        of_group = {id(p): group for group in groups for p in group["params"]}
        for name, p in self.way.named.items():
            mine[name] = (float(of_group[id(p)]["lr"]), of_group[id(p)]["betas"][1])
        rates = gathered(mine)
        corrected = {name: v / (1 - rates[name][1] ** steps[name].item()) for name, v in seconds.items()}
        dominated = sum((v.sqrt() < EPSILON).sum().item() for v in corrected.values())
        self.want["optwatch_epsilon_dominated_ratio"] = dominated / count
        effective = []
        for layer, tensors in by_layer(seconds).items():
            size = sum(v.numel() for v in tensors)
            mean = sum(v.sum().item() for v in tensors) / size
            self.want[f'optwatch_layer_second_moment_mean{{layer="{layer}"}}'] = mean
            names = [name for name in seconds if layer_of(name) == layer]
            root = math.sqrt(sum(corrected[name].sum().item() for name in names) / size)
            rate = sum(rates[name][0] * seconds[name].numel() for name in names) / size
            effective.append(rate / (root + EPSILON))
        for quantile in (0.1, 0.5, 0.9):
            value = torch.quantile(torch.tensor(effective, dtype=torch.float64), quantile).item()
            self.want[f'optwatch_effective_learning_rate{{quantile="{quantile}"}}'] = value


def counting(counts: Counter[str]) -> Callable[[], None]:
    """Count calls of torch.distributed's own collectives from here on; returns what stops it."""
    names = [
        *("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor", "broadcast"),
        *("barrier", "new_group", "all_gather_object", "send", "recv", "gather", "scatter", "all_to_all_single"),
    ]
    originals = {name: getattr(dist, name) for name in names}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counted(name))

    def stop() -> None:
        for name, original in originals.items():
            setattr(dist, name, original)

    return stop


def counting_own() -> tuple[Counter[str], Callable[[], None]]:
    """Count, by thread, the calls that the agent makes to its own group; and what stops it."""
    counts: Counter[str] = Counter()
    original = Group._finish

    def finish(self: Group, start: Callable[[], Any]) -> None:
        counts[threading.current_thread().name] += 1
        original(self, start)

    Group._finish = finish  # type: ignore[method-assign]

    def stop() -> None:
        Group._finish = original  # type: ignore[method-assign]

    return counts, stop


def train(build: Callable[[int, int], Way], rank: int, size: int, folder: Path, **settings: Any) -> dict[str, Any]:
    """Train twice, watched the second time: what was lost, what it exported and what it was to export."""
    result: dict[str, Any] = {"losses": {}, "weights": {}, "steps": [], "calls": {}, "sequence": {}}
    log = Log()
    logging.getLogger("optwatch").addHandler(log)
    result["own_calls"], stop_own = counting_own()
    for watched in (False, True):
        torch.manual_seed(5)
        way = build(rank, size)
        monitor = None
        if watched:
            options = {"address": "127.0.0.1", "spool_directory": folder / f"spool{rank}", "sample_every": 1}
            monitor = attach(way.optimizer, port=0, settings=Settings(**(options | settings)))
            result["run_id"] = monitor.run.id
        losses, counts = [], Counter[str]()
        default = dist.distributed_c10d._get_default_group()
        for step in range(STEPS):
            oracle = Oracle(way)
            before = default._get_sequence_number_for_group()
            stop = counting(counts)
            loss = way.loss(step)
            loss.backward()
            losses.append(loss.item())
            calls = default._get_sequence_number_for_group() - before
            stop()
            if way.clip:
                if watched:
                    oracle.before_clip()
                stop = counting(counts)
                clip(list(way.model.parameters()), size, everywhere=build in clipped_everywhere)
                stop()
            if watched:
                oracle.before()
            before = default._get_sequence_number_for_group()
            stop = counting(counts)
            way.optimizer.step()
            stop()
            calls += default._get_sequence_number_for_group() - before
            result["sequence"].setdefault(str(watched), []).append(calls)
            if monitor is not None:
                oracle.after()
                assert monitor.flush(60)
                result["steps"].append({"want": oracle.want, "got": monitor.snapshot()})
            way.optimizer.zero_grad()
        result["losses"][str(watched)] = losses
        result["calls"][str(watched)] = dict(counts)
        weights = [p.to_local() if hasattr(p, "to_local") else p for p in way.named.values()]
        result["weights"][str(watched)] = [w.detach().double().flatten().tolist() for w in weights]
        if monitor is not None:
            result["faults"] = monitor.faults.counts
            monitor.detach()
    stop_own()
    logging.getLogger("optwatch").removeHandler(log)
    result["log"] = "\n".join(log.lines)
    dist.barrier()
    return result


class Log(logging.Handler):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def clip(parameters: list[Tensor], size: int, everywhere: bool) -> None:
    """By the norm that this rank sees, or, as over the stages of a pipeline, by that of all ranks."""
    if not everywhere:
        nn.utils.clip_grad_norm_(parameters, 0.05)
        return
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norms = [torch.empty_like(norm) for _ in range(size)]
    dist.all_gather(norms, norm)
    nn.utils.clip_grads_with_norm_(parameters, 0.05, torch.stack(norms).norm())


clipped_everywhere: list[Any] = []


def distributed_data_parallel(rank: int, size: int, folder: Path) -> Any:
    def build(rank: int, size: int) -> Way:
        model = DistributedDataParallel(Net())
        return Way(model, adamw(model.parameters()), lambda step: model(batch(rank, step)).square().mean())

    return train(build, rank, size, folder)


def replicated_by_hand(rank: int, size: int, folder: Path) -> Any:
    """Nothing says that the ranks hold the same, except that they do."""

    def build(rank: int, size: int) -> Way:
        model = Net()

        def loss(step: int) -> Tensor:
            return model(batch(0, step)).square().mean()

        return Way(model, adamw(model.parameters()), loss)

    return train(build, rank, size, folder)


def fsdp(mesh_shape: tuple[int, ...], **settings: Any) -> Callable[[int, int, Path], Any]:
    def build(rank: int, size: int) -> Way:
        shape = tuple(size if n == -1 else n for n in mesh_shape)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        model = Net()
        for part in (model.first, model):
            fully_shard(part, mesh=mesh)
        return Way(model, adamw(model.parameters()), lambda step: model(batch(rank, step)).square().mean())

    return lambda rank, size, folder: train(build, rank, size, folder, **settings)


fully_sharded = fsdp((-1,))
"""FSDP2 on all ranks. On 4, shards of 12 rows are even, and of 3 leave one rank with nothing."""
hybrid_sharded = fsdp((2, 2))
added_up_in_prometheus = fsdp((2, 2), aggregation="promql")


def tensor_parallel(mesh_shape: tuple[int, ...], norms: bool) -> Callable[[int, int, Path], Any]:
    def build(rank: int, size: int) -> Way:
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("data", "tensor")[-len(mesh_shape) :])
        model = Net()
        rows, columns = RowwiseParallel(), ColwiseParallel()
        plan: dict[str, Any] = {}
        plan |= {"first.up": columns, "first.down": rows}
        if norms:
            plan |= {
                "first.norm": SequenceParallel(sequence_dim=0),
                "first.up": ColwiseParallel(input_layouts=Shard(0)),
            }
        parallelize_module(model, mesh["tensor"] if len(mesh_shape) > 1 else mesh, plan)
        data = rank
        if len(mesh_shape) > 1:
            data = mesh["data"].get_local_rank()
            for part in (model.first, model):
                fully_shard(part, mesh=mesh["data"])
        elif norms:
            data = rank  # each rank has its part of the sequence, which the norm takes as sharded
        else:
            data = 0

        def loss(step: int) -> Tensor:
            x = batch(data, step)
            if norms:
                return model.first(x).square().mean()
            return model(x).square().mean()

        return Way(model, adamw(model.parameters()), loss, clip=False)

    return lambda rank, size, folder: train(build, rank, size, folder)


tensor_sharded = tensor_parallel((4,), norms=False)
tensor_and_fully_sharded = tensor_parallel((2, 2), norms=False)
"""Frozen layers are sharded over the data dimension only: two meshes hold a copy of each."""
sequence_parallel = tensor_parallel((4,), norms=True)
"""Gradients of the norms stay partial sums."""


def stages(names: bool, known: bool) -> Callable[[int, int, Path], Any]:
    """Different parameters on each rank, passed on by hand as any schedule does. ``names``: whether they say so."""

    def build(rank: int, size: int) -> Way:
        torch.manual_seed(50 + rank)
        inner = Block() if rank < size - 1 else nn.Sequential(Block(), nn.Linear(8, 2))
        block: nn.Module = nn.ModuleDict({f"layer{rank}": inner}) if names else inner
        if known:
            from torch.distributed.pipelining import PipelineStage

            way_stage.append(PipelineStage(block, rank, size, torch.device("cpu")))

        def loss(step: int) -> Tensor:
            return inner(batch(rank, step)).square().mean()

        def rename(name: str) -> str:
            shared = rank < size - 1
            return f"stage{rank}.{name}" if known and shared else name

        return Way(block, adamw(block.parameters()), loss, rename=rename)

    if not known:
        clipped_everywhere.append(build)
    return lambda rank, size, folder: train(build, rank, size, folder)


way_stage: list[Any] = []
pipeline = stages(names=True, known=False)
pipeline_with_equal_names = stages(names=False, known=True)
stages_that_look_like_replicas = stages(names=False, known=False)


def zero_redundancy(rank: int, size: int, folder: Path) -> Any:
    def build(rank: int, size: int) -> Way:
        model = DistributedDataParallel(Net())
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = ZeroRedundancyOptimizer(trained, torch.optim.AdamW, lr=1e-3, eps=EPSILON)
        way = Way(model, optimizer, lambda step: model(batch(rank, step)).square().mean())
        way.named = {name: p for name, p in way.named.items() if p.requires_grad}
        return way

    return train(build, rank, size, folder)


def nonfinite_on_one_rank(rank: int, size: int, folder: Path) -> Any:
    """Rank 2's stage of a pipeline makes a NaN at the second step; no other tensor is touched by it."""
    torch.manual_seed(50 + rank)
    block = nn.ModuleDict({f"layer{rank}": Block()})
    optimizer = adamw(block.parameters())
    settings = Settings(address="127.0.0.1", spool_directory=folder / f"spool{rank}", sample_every=1)
    monitor = attach(optimizer, port=0, settings=settings)
    for step in range(2):
        x = batch(rank, step)
        if step == 1 and rank == 2:
            x[0, 0] = math.nan
        block[f"layer{rank}"](x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert monitor.flush(60)
    result = {"snapshot": monitor.snapshot()}
    dist.barrier()
    monitor.detach()
    return result


def two_optimizers_one_of_which_steps_less(rank: int, size: int, folder: Path) -> Any:
    """One run of two optimizers, as of a GAN or of Muon and AdamW: what each is to export at the last step."""
    torch.manual_seed(5)
    model = Net()
    fully_shard(model)
    some, others = list(model.parameters())[::2], list(model.parameters())[1::2]
    optimizers = [torch.optim.AdamW(some, lr=1e-3), torch.optim.SGD(others, lr=1e-2)]
    settings = Settings(address="127.0.0.1", spool_directory=folder / f"spool{rank}", sample_every=2)
    monitor = attach(*optimizers, port=0, settings=settings)
    want = {}
    for step in range(5):
        model(batch(rank, step)).square().mean().backward()
        for optimizer, every in zip(optimizers, (1, 2), strict=True):
            if step % every == 0:
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                squares = square_sum(whole(p.grad) for p in parameters if p.grad is not None)
                name = type(optimizer).__name__
                want[f'optwatch_grad_norm{{stage="at_step",optimizer="{name}"}}'] = math.sqrt(squares)
                optimizer.step()
                optimizer.zero_grad()
    assert monitor.flush(60)
    result = {"want": want, "got": monitor.snapshot(), "faults": monitor.faults.counts}
    dist.barrier()
    monitor.detach()
    return result


def joined(monitor: Any) -> None:
    """Wait until all ranks have met: checks wait for none of them, so that the first may be over before."""
    ranks = monitor._host.ranks
    while ranks.group is None:
        monitor._host.items.put(ranks.prepare)
        assert monitor.flush(60)
        time.sleep(0.01)


def checks_done_together(rank: int, size: int, folder: Path) -> Any:
    """What checks across replicas stand on: a gather at every second step, of ranks that need nothing else."""
    torch.manual_seed(5)
    model = DistributedDataParallel(Net())
    optimizer = adamw(model.parameters())
    monitor = attach(optimizer, port=0, settings=Settings(address="127.0.0.1", spool_directory=folder / f"spool{rank}"))
    ranks = monitor._host.ranks
    complete, gathered_at = ranks.complete, {}

    def and_check(row: Any, record: Any) -> None:
        complete(row, record)
        if row.step % 2 == 0:
            gathered_at[row.step] = ranks.together(row, 1, lambda group: group.gather(f"{rank}:{row.step}".encode()))

    ranks.complete = and_check  # type: ignore[method-assign]
    joined(monitor)
    for step in range(4):
        model(batch(rank, step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert monitor.flush(60)
    result = {"gathered": {step: [x.decode() for x in found or []] for step, found in gathered_at.items()}}
    dist.barrier()
    monitor.detach()
    return result
