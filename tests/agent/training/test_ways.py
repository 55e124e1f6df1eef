"""Ways of training beyond one model and one plain step: each is read exactly, and none is changed by being read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

GRAD = 'optwatch_grad_norm{stage="at_step"}'
WEIGHT, UPDATE, LOSS = "optwatch_weight_norm", "optwatch_update_norm", "optwatch_loss"
RELATIVE = 1e-5
Make = Callable[[], tuple[nn.Module, torch.optim.Optimizer, Callable[[], torch.Tensor]]]


class Tied(nn.Module):
    """A language model in small: its embedding is its output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.tanh(self.hidden(self.embed(x))))
        return logits


def tied() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], torch.Tensor]]:
    net = Tied()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    return net, optimizer, lambda: net(torch.randint(20, (6, 4))).square().mean()


def sparse() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], torch.Tensor]]:
    net = nn.EmbeddingBag(30, 5, sparse=True)
    optimizer = torch.optim.SparseAdam(net.parameters(), lr=1e-2)
    # Row 3 is met twice: its two gradients are one.
    return net, optimizer, lambda: net(torch.tensor([[3, 3, 7], [3, 9, 11]])).square().sum()


def frozen() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], torch.Tensor]]:
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 1))
    net[0].requires_grad_(False)
    net.register_module("unused", nn.Linear(3, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    return net, optimizer, lambda: net[2](net[1](net[0](torch.randn(5, 6)))).square().mean()


def compiled_model() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], torch.Tensor]]:
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))
    forward = torch.compile(net, backend="aot_eager")
    return net, torch.optim.AdamW(net.parameters(), lr=1e-2), lambda: forward(torch.randn(5, 6)).square().mean()


def compiled_step() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], torch.Tensor]]:
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    optimizer.step = torch.compile(optimizer.step, backend="aot_eager")  # type: ignore[method-assign]
    return net, optimizer, lambda: net(torch.randn(5, 6)).square().mean()


def autocast() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], torch.Tensor]]:
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(torch.randn(5, 6)).float().square().mean()

    return net, torch.optim.AdamW(net.parameters(), lr=1e-2), loss


WAYS: dict[str, Make] = {
    "tied weights": tied,
    "sparse gradients": sparse,
    "frozen and unused parameters": frozen,
    "compiled model": compiled_model,
    "compiled step": compiled_step,
    "bf16 autocast": autocast,
}


def norm(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(x.detach().double().square().sum().item() for x in tensors))


def dense_gradients(net: nn.Module) -> list[torch.Tensor]:
    return [p.grad.to_dense() for p in net.parameters() if p.grad is not None]


def exported(monitor: Any) -> dict[str, float]:
    assert monitor.flush()
    return dict(monitor.snapshot())


def train(
    make: Make, attach: Callable[[Any], Any], to_none: bool, check: bool
) -> tuple[list[float], list[torch.Tensor]]:
    torch.manual_seed(2)
    torch.compiler.reset()
    net, optimizer, forward = make()
    monitor = attach(optimizer)
    losses = []
    for _ in range(4):
        loss = forward()
        loss.backward()
        losses.append(loss.item())
        gradient, before = norm(dense_gradients(net)), [p.detach().double().clone() for p in net.parameters()]
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
        if check:
            got = exported(monitor)
            assert got[LOSS] == pytest.approx(losses[-1], rel=RELATIVE)
            assert got[GRAD] == pytest.approx(gradient, rel=RELATIVE)
            assert got[WEIGHT] == pytest.approx(norm(list(net.parameters())), rel=RELATIVE)
            moved = norm([p.detach() - q for p, q in zip(net.parameters(), before, strict=True)])
            assert got[UPDATE] == pytest.approx(moved, rel=RELATIVE)
            assert moved > 0
    if check:
        assert got["optwatch_steps_total"] == 4
        assert not monitor.faults.counts
    return losses, list(net.parameters())


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own, within torch.compile
@pytest.mark.parametrize("name", WAYS)
def test_each_way_of_training_is_read_exactly_and_left_as_it_was(name: str, watch: Any) -> None:
    to_none = name != "frozen and unused parameters"  # zeros for them instead: a gradient that is there
    losses, weights = train(WAYS[name], lambda o: watch(o, sample_every=1), to_none, check=True)
    same_losses, same_weights = train(WAYS[name], lambda o: None, to_none, check=False)
    assert losses == same_losses
    assert all(torch.equal(p, q) for p, q in zip(weights, same_weights, strict=True))


class OneGraph(torch.optim.Optimizer):
    """An optimizer that torch.compile takes whole, which those of torch are not."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.add_(p.grad, alpha=-self.param_groups[0]["lr"])


def test_a_step_compiled_into_one_graph_trains_on_and_it_is_said_once_that_it_is_not_seen(
    watch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    torch.compiler.reset()
    weight = nn.Parameter(torch.ones(3))
    optimizer = OneGraph([weight])
    monitor = watch(optimizer)
    step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    for _ in range(3):
        weight.grad = torch.ones(3)
        step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.7))
    assert exported(monitor)["optwatch_steps_total"] == 0
    assert monitor.faults.counts == {"hook": 1}
    assert len([r for r in caplog.records if "fullgraph=True" in r.getMessage()]) == 1
    weight.grad = torch.ones(3)
    optimizer.step()
    assert exported(monitor)["optwatch_steps_total"] == 1


class OwnLoading(torch.optim.Adam):
    """Loads its state itself and runs no hooks, as the optimizers of bitsandbytes do."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, {"param_groups": self.param_groups})
        for p, entry in zip(self.param_groups[0]["params"], state_dict["state"].values(), strict=True):
            self.state[p] = {key: value.clone() for key, value in entry.items()}


@pytest.mark.parametrize("kind", [torch.optim.Adam, OwnLoading])
def test_state_loaded_after_attach_is_what_the_next_step_counts_from(
    kind: type[torch.optim.Adam], net: nn.Module, step: Callable[..., float], watch: Any
) -> None:
    trained = kind(net.parameters())
    for _ in range(7):
        step(trained)
    saved = trained.state_dict()
    optimizer = kind(net.parameters())
    monitor = watch(optimizer, sample_every=1)
    steps: list[int] = []
    monitor.sinks.append(type("Steps", (), {"record": staticmethod(lambda r: steps.append(r.step)), "event": print})())
    step(optimizer)
    optimizer.load_state_dict(saved)
    step(optimizer)
    got = exported(monitor)
    assert steps == [1, 8]
    moments = [entry["exp_avg"] for entry in optimizer.state.values()]
    assert got["optwatch_first_moment_norm"] == pytest.approx(norm(moments), rel=RELATIVE)


def test_two_optimizers_are_measured_each_on_its_own(watch: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    matrices = [p for p in net.parameters() if p.dim() == 2]
    vectors = [p for p in net.parameters() if p.dim() == 1]
    muon, adam = torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(vectors, lr=1e-2)
    monitor = watch(muon, adam, sample_every=1)
    for _ in range(3):
        loss = net(torch.randn(4, 6)).square().mean()
        loss.backward()
        before = {
            name: [p.detach().double().clone() for p in ps] for name, ps in (("Muon", matrices), ("AdamW", vectors))
        }
        gradients = {name: norm([p.grad for p in ps]) for name, ps in (("Muon", matrices), ("AdamW", vectors))}  # type: ignore[misc]
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        got = exported(monitor)
        for name, parameters in (("Muon", matrices), ("AdamW", vectors)):
            moved = norm([p.detach() - q for p, q in zip(parameters, before[name], strict=True)])
            assert got[f'optwatch_update_norm{{optimizer="{name}"}}'] == pytest.approx(moved, rel=RELATIVE)
            want = gradients[name]
            assert got[f'optwatch_grad_norm{{stage="at_step",optimizer="{name}"}}'] == pytest.approx(want, rel=RELATIVE)
            assert got[f'optwatch_loss{{optimizer="{name}"}}'] == pytest.approx(loss.item(), rel=RELATIVE)
    assert not monitor.faults.counts


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_captured_into_a_cuda_graph_is_said_once_and_holds_nothing_of_ours(
    watch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    net = nn.Linear(8, 1).cuda()
    optimizer = torch.optim.AdamW(net.parameters(), capturable=True)
    monitor = watch(optimizer, sample_every=1)
    x = torch.randn(4, 8, device="cuda")
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            net(x).square().mean().backward()
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        net(x).square().mean().backward()
        optimizer.step()
    before = net.weight.detach().clone()
    for _ in range(5):
        graph.replay()
    assert not torch.equal(before, net.weight)
    monitor.log(val_loss=1.5)
    got = exported(monitor)
    assert got["optwatch_steps_total"] == 3
    assert got['optwatch_reported{name="val_loss"}'] == 1.5
    assert monitor.faults.counts == {"hook": 1}
    assert len([r for r in caplog.records if "CUDA graph" in r.getMessage()]) == 1
