"""Every exported statistic equals a float64 oracle that is computed from the tensors themselves, step by step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from optwatch import Monitor, kernels
from optwatch.kernels import locate

RELATIVE = 1e-5


@pytest.fixture(params=["compiled", "kernel", "torch", "found by compiled code, read by torch"])
def watch(watch: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each way of finding and reading tensors, and each certainly: what is compiled is there before training begins."""
    kernels.prepare().join()
    assert kernels.kernel() is not None
    if "compiled" in request.param:
        kernels.prepare_addresses().join()
        assert locate.compiled.made is not None
    else:
        monkeypatch.setattr(locate.compiled, "made", None)
    return functools.partial(watch, kernel="off" if "torch" in request.param else "auto")


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "AdamW for-loop": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False),
    "Adam AMSGrad": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-3),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-3),
    "SGD Nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, foreach=True),
    "SGD plain": lambda p: torch.optim.SGD(p, lr=1e-2),
}


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Embedding(50, 24), nn.Flatten(), nn.Linear(24 * 8, 300), nn.Tanh(), nn.Linear(300, 300), nn.GELU()]
    return nn.Sequential(*layers, nn.LayerNorm(300), nn.Linear(300, 10)).to(dtype)


def square_sum(tensors: list[torch.Tensor]) -> float:
    return sum(x.detach().double().square().sum().item() for x in tensors)


class Oracle:
    """What a step's statistics are, in float64, from the tensors at the moment the definition names."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.net, self.optimizer = net, optimizer
        self.named = dict(net.named_parameters())
        self.want: dict[str, float] = {}

    def layer(self, tensors: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
        layers: dict[str, list[torch.Tensor]] = {}
        for name, tensor in tensors.items():
            layers.setdefault(name.rpartition(".")[0], []).append(tensor)
        return layers

    def before(self) -> None:
        gradients = {name: p.grad for name, p in self.named.items() if p.grad is not None}
        self.want['optwatch_grad_norm{stage="at_step"}'] = math.sqrt(square_sum(list(gradients.values())))
        for layer, tensors in self.layer(gradients).items():
            self.want[f'optwatch_layer_grad_norm{{layer="{layer}"}}'] = math.sqrt(square_sum(tensors))
        for i, group in enumerate(self.optimizer.param_groups):
            self.want[f'optwatch_learning_rate{{group="{i}"}}'] = float(group["lr"])
            self.want[f'optwatch_weight_decay{{group="{i}"}}'] = float(group["weight_decay"])
        moments = self.state("exp_avg") or self.state("momentum_buffer")
        if moments:
            dot = sum((gradients[n].double() * m.double()).sum().item() for n, m in moments.items())
            norms = math.sqrt(square_sum([gradients[n] for n in moments]) * square_sum(list(moments.values())))
            self.want["optwatch_grad_moment_cosine"] = dot / norms

    def state(self, key: str) -> dict[str, torch.Tensor]:
        state = {name: self.optimizer.state[p].get(key) for name, p in self.named.items() if p in self.optimizer.state}
        return {name: value.clone() for name, value in state.items() if value is not None}

    def after(self) -> None:
        weights = {name: p.detach() for name, p in self.named.items()}
        self.want["optwatch_weight_norm"] = math.sqrt(square_sum(list(weights.values())))
        for layer, tensors in self.layer(weights).items():
            self.want[f'optwatch_layer_weight_norm{{layer="{layer}"}}'] = math.sqrt(square_sum(tensors))
        moments = self.state("exp_avg") or self.state("momentum_buffer")
        if moments:
            self.want["optwatch_first_moment_norm"] = math.sqrt(square_sum(list(moments.values())))
            for layer, tensors in self.layer(moments).items():
                self.want[f'optwatch_layer_first_moment_norm{{layer="{layer}"}}'] = math.sqrt(square_sum(tensors))
        seconds = self.state("max_exp_avg_sq") or self.state("exp_avg_sq")
        if seconds:
            self.adaptive(seconds)

    def adaptive(self, seconds: dict[str, torch.Tensor]) -> None:
        count = sum(v.numel() for v in seconds.values())
        self.want["optwatch_second_moment_mean"] = sum(v.double().sum().item() for v in seconds.values()) / count
        self.want["optwatch_second_moment_max"] = max(v.double().max().item() for v in seconds.values())
        steps = self.state("step")
        group = self.optimizer.param_groups[0]
        epsilon, beta2 = group["eps"], group["betas"][1]
        corrected = {n: v.double() / (1 - beta2 ** steps[n].item()) for n, v in seconds.items()}
        dominated = sum((v.sqrt() < epsilon).sum().item() for v in corrected.values())
        self.want["optwatch_epsilon_dominated_ratio"] = dominated / count
        effective = []
        for layer, tensors in self.layer(seconds).items():
            size = sum(v.numel() for v in tensors)
            mean = sum(v.double().sum().item() for v in tensors) / size
            self.want[f'optwatch_layer_second_moment_mean{{layer="{layer}"}}'] = mean
        for tensors in self.layer(corrected).values():
            size = sum(v.numel() for v in tensors)
            root = math.sqrt(sum(v.sum().item() for v in tensors) / size)
            effective.append(float(group["lr"]) / (root + epsilon))
        if isinstance(self.optimizer, torch.optim.RAdam):
            return  # its step is rectified: no such rate
        for quantile in (0.1, 0.5, 0.9):
            value = torch.quantile(torch.tensor(effective, dtype=torch.float64), quantile).item()
            self.want[f'optwatch_effective_learning_rate{{quantile="{quantile}"}}'] = value


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, monitor: Monitor, steps: int, accumulate: int, clip: float | None
) -> list[dict[str, float]]:
    """Train, and after each step compare what was exported with the oracle. Returns the snapshots."""
    torch.manual_seed(7)
    oracle = Oracle(net, optimizer)
    snapshots = []
    for _ in range(steps):
        total = 0.0
        for _ in range(accumulate):
            loss = net(torch.randint(50, (16, 8))).double().square().mean() / accumulate
            loss.backward()
            total += loss.item()
        if clip is not None:
            gradients = [p.grad for p in net.parameters() if p.grad is not None]
            before_clip = math.sqrt(square_sum(gradients))
            nn.utils.clip_grad_norm_(net.parameters(), clip)
            oracle.want['optwatch_grad_norm{stage="before_clip"}'] = before_clip
        oracle.before()
        oracle.want["optwatch_loss"] = total
        oracle.want["optwatch_accumulation_steps"] = accumulate
        optimizer.step()
        oracle.after()
        optimizer.zero_grad()
        assert monitor.flush()
        got = monitor.snapshot()
        missing = set(oracle.want) - set(got)
        assert not missing
        for name, want in oracle.want.items():
            assert got[name] == pytest.approx(want, rel=RELATIVE, abs=1e-300), name
        snapshots.append(got)
    assert not monitor.faults.counts
    return snapshots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_statistic_equals_the_oracle(name: str, dtype: torch.dtype, watch: Any) -> None:
    net = model(dtype)
    optimizer = OPTIMIZERS[name](net.parameters())
    if dtype == torch.float16 and "eps" in optimizer.defaults:
        # 1e-8 is 0 in float16: Adam would divide 0 by 0 at its first step, and there would be nothing to compare.
        optimizer.param_groups[0]["eps"] = 1e-3
    monitor = watch(optimizer, sample_every=1)
    snapshots = train(net, optimizer, monitor, steps=4, accumulate=2, clip=0.05)
    exported = {series.partition("{")[0] for series in snapshots[-1]}
    adaptive = {"optwatch_second_moment_mean", "optwatch_epsilon_dominated_ratio"}
    has_second = name.startswith(("Adam ", "AdamW", "NAdam", "RAdam"))
    assert adaptive <= exported if has_second else not adaptive & exported
    assert ("optwatch_effective_learning_rate" in exported) == (has_second and name != "RAdam")
    assert ("optwatch_first_moment_norm" in exported) == (name != "SGD plain")


def test_statistics_hold_without_clipping_and_for_several_groups(watch: Any) -> None:
    net = model()
    decayed = [p for p in net.parameters() if p.dim() > 1]
    plain = [p for p in net.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}])
    snapshots = train(net, optimizer, watch(optimizer, sample_every=1), steps=3, accumulate=1, clip=None)
    assert 'optwatch_grad_norm{stage="before_clip"}' not in snapshots[-1]


def test_frozen_and_unused_parameters_are_left_out_of_gradients_only(watch: Any) -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    net[2].weight.requires_grad_(False)  # type: ignore[union-attr]  # a Linear
    monitor = watch(optimizer, sample_every=1)
    train(net, optimizer, monitor, steps=3, accumulate=1, clip=0.1)


def test_a_group_added_later_is_watched_from_its_first_step(watch: Any) -> None:
    net = model()
    parameters = list(net.parameters())
    optimizer = torch.optim.AdamW(parameters[:-2])
    monitor = watch(optimizer, sample_every=1)
    for parameter in parameters[-2:]:
        parameter.requires_grad_(False)
    net(torch.randint(50, (4, 8))).square().mean().backward()
    optimizer.step()
    for parameter in parameters[-2:]:
        parameter.requires_grad_(True)
    optimizer.zero_grad()
    optimizer.add_param_group({"params": parameters[-2:], "lr": 5e-4})
    net(torch.randint(50, (4, 8))).square().mean().backward()
    want = math.sqrt(square_sum([p.grad for p in parameters if p.grad is not None]))
    optimizer.step()
    monitor.flush()
    snapshot = monitor.snapshot()
    assert snapshot['optwatch_grad_norm{stage="at_step"}'] == pytest.approx(want, rel=RELATIVE)
    assert snapshot['optwatch_learning_rate{group="1"}'] == 5e-4


def test_groups_clipped_one_after_the_other_make_one_norm_before_clipping(watch: Any) -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    monitor = watch(optimizer)
    net(torch.randint(50, (4, 8))).square().mean().backward()
    parameters = list(net.parameters())
    want = math.sqrt(square_sum([p.grad for p in parameters if p.grad is not None]))
    for part in (parameters[:3], parameters[3:5]):  # the rest is not clipped at all
        nn.utils.clip_grad_norm_(part, 1e-3)
    optimizer.step()
    monitor.flush()
    assert monitor.snapshot()['optwatch_grad_norm{stage="before_clip"}'] == pytest.approx(want, rel=RELATIVE)


def test_state_bytes_are_those_that_the_state_holds(watch: Any) -> None:
    net = model(torch.bfloat16)
    optimizer = torch.optim.AdamW(net.parameters())
    monitor = watch(optimizer)
    net(torch.randint(50, (4, 8))).float().square().mean().backward()
    optimizer.step()
    monitor.flush()
    snapshot = monitor.snapshot()
    count = sum(p.numel() for p in net.parameters())
    assert snapshot['optwatch_optimizer_state_bytes{key="exp_avg",dtype="bfloat16"}'] == 2 * count
    held = sum(value.numel() * value.element_size() for state in optimizer.state.values() for value in state.values())
    assert sum(v for name, v in snapshot.items() if name.startswith("optwatch_optimizer_state_bytes")) == held


def test_weights_and_moments_are_read_at_the_first_step_and_then_at_the_sampling_cadence(watch: Any) -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    monitor = watch(optimizer, sample_every=4)
    norms = []
    for _ in range(9):
        net(torch.randint(50, (4, 8))).square().mean().backward()
        optimizer.step()
        monitor.flush()
        norms.append(monitor.snapshot()["optwatch_weight_norm"])
    changed = [step for step, (old, new) in enumerate(pairwise(norms), start=2) if old != new]
    assert changed == [4, 8]


def test_epsilon_dominates_where_the_second_moment_is_tiny(watch: Any) -> None:
    weight = nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 1.0]))
    optimizer = torch.optim.AdamW([weight], eps=1e-3)
    monitor = watch(optimizer)
    (weight * torch.tensor([1.0, 2e-3, 5e-4, 0.0])).sum().backward()
    optimizer.step()
    monitor.flush()
    assert monitor.snapshot()["optwatch_epsilon_dominated_ratio"] == 0.5
