"""What an optimizer will allocate is known before its first step, for every class that is installed here."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import lion_pytorch
import numpy
import pytest
import pytorch_optimizer
import schedulefree
import torch
from torch import nn, optim
from torch.optim.optimizer import register_optimizer_step_pre_hook

from optwatch.export.devices import Device
from optwatch.memory.families import FAMILIES
from optwatch.memory.families import state_bytes as family_bytes
from optwatch.memory.forecast import forecast
from optwatch.state import state_bytes

WIDTH, HEIGHT = 24, 16


def _classes() -> dict[str, type[optim.Optimizer]]:
    """Every optimizer class of the packages that are installed here, by name."""
    found = {"lion.Lion": lion_pytorch.Lion}
    for package in (optim, schedulefree):
        for name, kind in vars(package).items():
            if isinstance(kind, type) and issubclass(kind, optim.Optimizer) and kind is not optim.Optimizer:
                found[f"{package.__name__}.{name}"] = kind
    for name in pytorch_optimizer.get_supported_optimizers():
        if name != "demo":  # wants einops before it can even be imported
            found[f"pytorch_optimizer.{name}"] = pytorch_optimizer.load_optimizer(name)
    return found


CLASSES = _classes()
NOT_TRAINED_LIKE_THIS = {
    "pytorch_optimizer.adalomo": "updates inside backward()",
    "pytorch_optimizer.lomo": "updates inside backward()",
    "pytorch_optimizer.alig": "takes the loss from a closure that is no tensor",
    "pytorch_optimizer.distributedmuon": "needs a process group",
    "pytorch_optimizer.lorarite": "takes pairs of LoRA factors",
}
UNAVAILABLE = {
    "pytorch_optimizer.adahessian": "does not require grad",  # differentiates the gradients again
    "pytorch_optimizer.sophiah": "does not require grad",
    "pytorch_optimizer.bsam": "requires closure",
    "pytorch_optimizer.sara": "nonzero",  # how much it keeps depends on what the gradients hold
    "pytorch_optimizer.spam": "nonzero",
}
"""Classes that do not run on tensors without data, and a word of the reason that is given."""
OPTIONS: dict[str, dict[str, Any]] = {
    "torch.optim.LBFGS": {"history_size": 5, "max_iter": 4, "tolerance_grad": 0, "tolerance_change": 0},
    "pytorch_optimizer.lbfgs": {"history_size": 5, "max_iter": 4, "tolerance_grad": 0, "tolerance_change": 0},
    "pytorch_optimizer.bsam": {"num_data": 100},
    "pytorch_optimizer.ranger21": {"num_iterations": 100},
}
MATRICES_ONLY = {"torch.optim.Muon", "pytorch_optimizer.spectralsphere"}


STEPS = {"pytorch_optimizer.adashift": 11, "torch.optim.LBFGS": 6, "pytorch_optimizer.lbfgs": 6}
"""Steps until a class that keeps a history has all of it; three for the others."""


def _net(sparse: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(50, HEIGHT, sparse=sparse),
        nn.Linear(HEIGHT, WIDTH),
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, WIDTH),
        nn.Linear(WIDTH, WIDTH),
    )


def _make(name: str, net: nn.Module) -> optim.Optimizer:
    kind, options = CLASSES[name], OPTIONS.get(name, {})
    parameters: Any = [p for p in net.parameters() if p.ndim == 2 or name not in MATRICES_ONLY]
    if name.rpartition(".")[2] == "adammini":
        parameters = net
    try:
        optimizer = kind(parameters, **options)
    except (RuntimeError, TypeError, KeyError):  # some tell matrices from the rest by a key of the group
        matrices = [p for p in parameters if p.ndim == 2]
        rest = [p for p in parameters if p.ndim != 2]
        groups = [{"params": matrices, "use_muon": True}, {"params": rest, "use_muon": False}]
        optimizer = kind(groups, **options)
    if callable(train := getattr(optimizer, "train", None)):
        train()
    return optimizer


def _train(net: nn.Module, optimizer: optim.Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randint(50, (4, 5), generator=generator)

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            net.zero_grad()
            with torch.enable_grad():
                loss = (net(x) - 1).square().mean()
            loss.backward()
            return loss.detach()

        needs_closure = type(optimizer).__name__.endswith(("LBFGS", "Closure", "SAM"))
        if needs_closure:
            optimizer.step(closure)  # type: ignore[arg-type]
        else:
            closure()
            optimizer.step()


def _close(told: int | None, allocated: int) -> bool:
    """Within 3%; single bytes of a state that is next to nothing do not count."""
    return told is not None and abs(told - allocated) <= max(0.03 * allocated, 4)


@pytest.mark.parametrize("name", sorted(set(CLASSES) - set(NOT_TRAINED_LIKE_THIS)))
@pytest.mark.filterwarnings("ignore")
def test_the_forecast_is_what_is_then_allocated(name: str) -> None:
    net = _net(sparse=name == "torch.optim.SparseAdam")
    if name == "torch.optim.SparseAdam":
        net = nn.Sequential(net[0])
    optimizer = _make(name, net)
    told = forecast(optimizer, name)
    if name in UNAVAILABLE:
        assert told.total is None
        assert UNAVAILABLE[name] in (told.unavailable or "")
        return
    assert told.unavailable is None
    _train(net, optimizer, STEPS.get(name, 3))
    allocated = sum(state_bytes(optimizer).values())
    assert _close(told.total, allocated), (told.total, allocated)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["torch.optim.AdamW", "torch.optim.Adafactor", "lion.Lion", "pytorch_optimizer.came"])
def test_state_of_half_precision_weights_is_forecast_in_the_type_that_it_will_have(
    name: str, dtype: torch.dtype
) -> None:
    net = _net().to(dtype)
    optimizer = _make(name, net)
    told = forecast(optimizer, name)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert _close(told.total, sum(state_bytes(optimizer).values()))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (optim.AdamW, {"amsgrad": True}),
        (optim.AdamW, {"lr": torch.tensor(1e-3), "foreach": False}),
        (optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (optim.RMSprop, {"momentum": 0.9, "centered": True}),
        (optim.AdamW, {"fused": True}),
    ],
    ids=["amsgrad", "a rate that is a tensor", "momentum", "centered", "fused"],
)
def test_the_groups_own_settings_decide(kind: type[optim.Optimizer], options: dict[str, Any]) -> None:
    net = _net()
    extra = [{"params": net[3].parameters(), **options}]
    optimizer = kind([{"params": net[1].parameters()}, *extra])  # type: ignore[call-arg]
    told = forecast(optimizer, "it")
    _train(net, optimizer, 2)
    assert _close(told.total, sum(state_bytes(optimizer).values()))


def test_a_gigantic_model_costs_no_memory_to_forecast() -> None:
    weight = nn.Parameter(torch.zeros(1).expand(10**12))
    told = forecast(optim.AdamW([weight]), "AdamW")
    assert told.total == 2 * 4 * 10**12 + 4
    assert sum(told.gradients.values()) == 4 * 10**12


def test_parameters_that_are_alike_are_run_once() -> None:
    taken = []

    class Counting(optim.SGD):
        def step(self, closure: Any = None) -> Any:
            taken.append(sum(len(group["params"]) for group in self.param_groups))
            return super().step(closure)

    alike = [nn.Parameter(torch.ones(3, 3)) for _ in range(2000)]
    told = forecast(Counting(alike, momentum=0.9), "Counting")
    assert told.total == 2000 * 9 * 4
    assert set(taken) == {2}


def test_state_that_is_there_already_counts_as_held() -> None:
    net = _net()
    optimizer = optim.AdamW(net.parameters())
    _train(net, optimizer, 2)
    fresh = optim.AdamW(net.parameters())
    told = forecast(fresh, "AdamW")
    assert (told.held, sum(told.missing.values())) == (0, told.total)
    fresh.load_state_dict(optimizer.state_dict())
    told = forecast(fresh, "AdamW")
    assert told.held == told.total == sum(state_bytes(fresh).values())
    assert sum(told.missing.values()) == 0
    fresh.add_param_group({"params": [nn.Parameter(torch.ones(10))]})
    assert sum(forecast(fresh, "AdamW").missing.values()) == 2 * 40 + 4


def test_state_of_an_optimizer_that_another_wraps_counts_as_well() -> None:
    net = _net()
    optimizer = pytorch_optimizer.Lookahead(optim.AdamW(net.parameters()), k=2)
    told = forecast(optimizer, "Lookahead")
    _train(net, optimizer, 3)
    allocated = sum(state_bytes(optimizer).values())
    assert allocated > 3 * sum(4 * p.numel() for p in net.parameters())
    assert _close(told.total, allocated)


@pytest.mark.filterwarnings("ignore")  # of what bitsandbytes cannot do on a CPU
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "Lion8bit", "AdEMAMix8bit", "AdamW"])
def test_state_in_8_bit_is_forecast_with_its_scales_and_tables(name: str) -> None:
    from bitsandbytes import optim as bnb

    shapes = [(64, 128), (64, 128), (128, 100), (60,)]
    parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = getattr(bnb, name)(parameters)
    told = forecast(optimizer, name)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert _close(told.total, sum(state_bytes(optimizer).values()))


def test_nothing_of_the_users_is_changed() -> None:
    """Hooks, schedulers, wrapped optimizers and random numbers: all are as if nobody had looked."""

    class Drawing(optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            random.random(), numpy.random.rand(), torch.rand(1)
            return super().step(closure)

    net = _net()
    inner = Drawing(net.parameters())
    scheduler = optim.lr_scheduler.LambdaLR(inner, lambda step: 0.5**step)
    called: list[object] = []
    inner.register_step_pre_hook(lambda *given: called.append(given))
    wrapping = pytorch_optimizer.Lookahead(optim.SGD(net.parameters(), momentum=0.9))
    weights = [p.detach().clone() for p in net.parameters()]
    states = (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    for optimizer in (inner, wrapping):
        before = {id(p): dict(state) for p, state in optimizer.state.items()}
        assert forecast(optimizer, "it").total
        assert {id(p): dict(state) for p, state in optimizer.state.items()} == before
    assert not any(inner.state.values())
    assert not any(wrapping.optimizer.state.values())
    assert states == (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert not called
    assert all(torch.equal(p, weight) and p.grad is None for p, weight in zip(net.parameters(), weights, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a scheduler that saw no step would say so
        _train(net, inner, 1)
        scheduler.step()
    assert called  # by the real step only


def test_global_hooks_are_never_called_with_a_stand_in() -> None:
    class Own(optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    called: list[object] = []
    handle = register_optimizer_step_pre_hook(lambda *given: called.append(given))
    try:
        assert forecast(optim.AdamW(_net().parameters()), "AdamW").total
        told = forecast(Own(_net().parameters()), "Own")
    finally:
        handle.remove()
    assert not called
    assert told.total is None
    assert "global optimizer hooks" in (told.unavailable or "")


def test_a_class_that_cannot_be_run_is_unavailable_with_the_reason() -> None:
    class Reading(optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return self.param_groups[0]["params"][0].detach().numpy().sum()

    told = forecast(Reading(_net().parameters()), "Reading")
    assert told.total is None
    assert "RuntimeError" in (told.unavailable or "")


REAL: dict[str, Callable[[Iterable[nn.Parameter]], optim.Optimizer]] = {
    "adamw": optim.AdamW,
    "adam": optim.Adam,
    "adamw-amsgrad": lambda ps: optim.AdamW(ps, amsgrad=True),
    "adafactor": optim.Adafactor,
    "lion": lion_pytorch.Lion,
    "muon": optim.Muon,
    "soap": pytorch_optimizer.SOAP,
    "schedule-free-adamw": schedulefree.AdamWScheduleFree,
    "schedule-free-sgd": schedulefree.SGDScheduleFree,
    "nadam": optim.NAdam,
    "radam": optim.RAdam,
    "adamax": optim.Adamax,
    "adadelta": optim.Adadelta,
    "adagrad": optim.Adagrad,
    "rmsprop": optim.RMSprop,
    "sgd-momentum": lambda ps: optim.SGD(ps, momentum=0.9),
    "sgd": optim.SGD,
}


def test_every_family_is_held_against_a_class() -> None:
    assert set(FAMILIES) - set(REAL) == {"adamw-8bit", "adamw-8bit-paged", "lion-8bit"}


@pytest.mark.parametrize("family", REAL)
def test_the_arithmetic_of_a_family_is_what_its_class_keeps(family: str) -> None:
    shapes = [(300, 200), (64, 128)]
    optimizer = REAL[family](nn.Parameter(torch.empty(shape)) for shape in shapes)
    if callable(train := getattr(optimizer, "train", None)):
        train()
    told = forecast(optimizer, family)
    counts = 8 * len(shapes)  # steps, and what NAdam multiplies over them
    assert 0 <= (told.total or 0) - family_bytes(family, [(shape, 1) for shape in shapes], 4) <= counts


def huge(factor: float) -> nn.Parameter:
    """A weight of so many times what this machine has free, which takes four bytes."""
    return nn.Parameter(torch.zeros(1).expand(int(factor * Device(torch.device("cpu")).memory()["free"] / 4)))


FORECAST = "optwatch_optimizer_state_forecast_bytes"
RAISED = 'optwatch_events_total{kind="memory_forecast",severity="warning"}'


def test_state_that_will_not_fit_is_an_event_with_the_arithmetic_and_the_alternatives(
    watch: Callable[..., Any], stand_in: Callable[[], Any], eventually: Callable[..., Any]
) -> None:
    server, weight = stand_in(), huge(0.5)
    monitor = watch(optim.AdamW([weight]), server=server.url)
    size = 4 * weight.numel()
    assert monitor.snapshot()[FORECAST] == 2 * size + 4
    (event,) = eventually(server.events)
    assert (event["kind"], event["severity"], event["step"]) == ("memory_forecast", "warning", 0)
    assert event["runbook"] == "TrainingMemoryForecast"
    details = event["details"]
    assert (details["weight_bytes"], details["gradient_bytes_to_come"]) == (size, size)
    assert details["state_bytes_to_come"] == 2 * size + 4
    assert details["short_bytes"] == pytest.approx(3 * size - details["free_bytes"], rel=1e-6)
    needs = {name: each["state_bytes"] / size for name, each in details["alternatives"].items()}
    assert needs["lion"] == 1
    assert needs["adamw-8bit"] == pytest.approx(2 * (1 + 4 / 256) / 4, rel=1e-6)
    left = details["free_bytes"] - details["gradient_bytes_to_come"]
    # The gradient takes half of what is free: an eighth more for 8-bit Lion fits, another half for momentum may not.
    assert details["alternatives"]["lion-8bit"]["fits"]
    fits = {name: each["fits"] for name, each in details["alternatives"].items()}
    assert fits == {name: need * size <= left for name, need in needs.items()}
    shares = [details["state_bytes_to_come"] / (details["ranks_that_could_share_it"] + i) for i in (-1, 0)]
    assert shares[0] > left >= shares[1] or details["ranks_that_could_share_it"] == 2
    assert "AdamW will not fit on cpu" in event["summary"]
    assert "ZeRO-1 or FSDP over" in event["likely"]


@pytest.mark.parametrize(("factor", "raised"), [(0.3, 0), (0.4, 1)])  # gradient and two moments: three times as much
def test_only_what_does_not_fit_is_told_of(factor: float, raised: int, watch: Callable[..., Any]) -> None:
    monitor = watch(optim.AdamW([huge(factor)]))
    assert monitor.flush(60)
    assert monitor.snapshot()[RAISED] == raised


def test_optimizers_of_one_run_share_the_memory(watch: Callable[..., Any]) -> None:
    monitor = watch(optim.AdamW([huge(0.2)]), optim.SGD([huge(0.25)], momentum=0.9))
    assert monitor.flush(60)
    values = monitor.snapshot()
    assert sum(size for name, size in values.items() if name.startswith(RAISED[:-1])) == 1
    assert {name for name in values if name.startswith(FORECAST)} == {
        f'{FORECAST}{{optimizer="AdamW"}}',
        f'{FORECAST}{{optimizer="SGD"}}',
    }


def test_an_optimizer_that_keeps_nothing_is_not_told_of(watch: Callable[..., Any]) -> None:
    monitor = watch(optim.SGD([huge(2.0)]))
    assert monitor.flush(60)
    assert (monitor.snapshot()[FORECAST], monitor.snapshot()[RAISED]) == (0, 0)


def test_a_forecast_that_is_unavailable_is_no_number_and_no_fault(watch: Callable[..., Any]) -> None:
    monitor = watch(pytorch_optimizer.AdaHessian(_net().parameters()))
    assert FORECAST not in monitor.snapshot()
    assert monitor.faults.counts == {}


@pytest.mark.gpu
def test_the_forecast_is_what_a_gpu_then_allocates() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    net = nn.Linear(1024, 1024, device="cuda")
    optimizer = optim.AdamW(net.parameters(), fused=True)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    told = forecast(optimizer, "AdamW").total
    before = torch.cuda.memory_allocated()
    assert told is not None
    optimizer.step()
    assert torch.cuda.memory_allocated() - before == pytest.approx(told, rel=0.03)
