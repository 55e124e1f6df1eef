"""Run optimizers for a few real steps and compare what the agent exports with the definitions.

Many optimizers share one monitor, each on a model of its own, since a monitor costs more than the steps do.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optwatch import Settings, attach, state

from .cases import Case
from .definitions import Trace

STEPS = 4
EPSILON = 1e-3
"""Large enough that it matters where it is added, and that some entries fall below it."""
QUANTILES = (0.1, 0.5, 0.9)
ROUNDING = 2e-3
"""How far, relative to its norm, a step may be from its formula: float32 weights move by few of their own digits."""
QUANTIZATION = 0.3
"""How far a quantized moment may be from its definition, relative to its norm; one of another kind is further."""


def classes(package: str) -> dict[str, type]:
    """Every optimizer class that a package has, by name, from all of its modules that can be imported."""
    root = importlib.import_module(package)
    names = [package, *(m.name for m in pkgutil.walk_packages(getattr(root, "__path__", ()), f"{package}."))]
    top, found = package.partition(".")[0], {}
    for name in names:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        for kind in vars(module).values():
            own = inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)
            if own and kind.__module__.partition(".")[0] == top and "<locals>" not in kind.__qualname__:
                found[kind.__qualname__] = kind
    return dict(sorted(found.items()))


@dataclass
class Subject:
    """One optimizer under test."""

    name: str
    case: Case
    module: nn.Sequential
    optimizer: torch.optim.Optimizer
    label: str = ""
    traces: dict[str, Trace] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    checked: set[str] = field(default_factory=set)

    def layers(self) -> dict[str, list[str]]:
        """Parameter names by layer."""
        layers: dict[str, list[str]] = {}
        for name in self.traces:
            layers.setdefault(name.rpartition(".")[0], []).append(name)
        return layers


def make_module(case: Case) -> nn.Sequential:
    """The same model for everyone, of two layers."""
    torch.manual_seed(0)
    if case.sparse:
        return nn.Sequential(nn.Embedding(6, 4, sparse=True))
    wide = (64, 72) if case.big else (6, 8)
    layers = nn.Linear(*wide, bias=not case.matrices_only), nn.Tanh(), nn.Linear(wide[1], 4, bias=False)
    return nn.Sequential(*layers).to(torch.float64 if case.double else torch.float32)


def build(name: str, kind: type, case: Case) -> Subject:
    """The optimizer on its model. Raises what its constructor raises."""
    module = make_module(case)
    optimizer = case.make(kind, module) if case.make is not None else kind(module.parameters(), **case.options)
    reader = state.reader_for(optimizer)
    for group in optimizer.param_groups:
        if isinstance(reader.denominator, state.Denominator) and isinstance(group.get("eps"), float):
            group["eps"] = EPSILON
        if isinstance(group.get("weight_decay"), float):
            group["weight_decay"] = 0.0
    if hasattr(optimizer, "train"):
        optimizer.train()
    return Subject(name, case, module, optimizer)


def _wide(value: Tensor) -> Tensor:
    return value.detach().clone() if value.dtype == torch.bool else value.detach().double().clone()


def numbers(group: dict[str, Any]) -> dict[str, Any]:
    """The group's numbers, copied."""
    return {k: (v.item() if isinstance(v, Tensor) and v.numel() == 1 else v) for k, v in group.items() if k != "params"}


def step(subject: Subject, t: int) -> None:
    """One real step, recorded."""
    case, module, optimizer = subject.case, subject.module, subject.optimizer
    torch.manual_seed(100 + t)
    dtype = torch.float64 if case.double else torch.float32
    if case.sparse:
        x, y = torch.arange(6).repeat(3)[:16], torch.randn(16, 4)
    else:
        x, y = torch.randn(16, module[0].in_features).to(dtype), torch.randn(16, 4).to(dtype)  # type: ignore[arg-type]

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = (module(x) - y).square().mean()
            loss.backward(create_graph=case.create_graph)
        seen.update((name, p.grad.detach().to_dense().double().clone()) for name, p in module.named_parameters())  # type: ignore[union-attr]
        return loss

    seen: dict[str, Tensor] = {}
    if not case.closure or case.backward_first:
        closure()
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in module.named_parameters():
        trace = subject.traces.setdefault(name, Trace())
        trace.before.append(parameter.detach().double().clone())
        trace.groups.append(numbers(group_of[id(parameter)]))
    for trace in subject.traces.values():
        trace.others = list(subject.traces.values())
    if case.inner:

        def look(*_: Any) -> None:
            seen.update((name, p.grad.detach().to_dense().double().clone()) for name, p in module.named_parameters())  # type: ignore[union-attr]

        handle = state.holder(optimizer).register_step_pre_hook(look)
    optimizer.step(closure) if case.closure else optimizer.step()
    if case.inner:
        handle.remove()
    for name, parameter in module.named_parameters():
        subject.traces[name].after.append(parameter.detach().double().clone())
        subject.traces[name].gradients.append(seen[name])  # with a closure, those of its last call
        if case.also is not None:
            entry = case.also(state.holder(optimizer).state.get(parameter, {}))
            subject.traces[name].recorded.append({key: _wide(value) for key, value in entry.items()})


def expected(subject: Subject, t: int) -> dict[str, float]:
    """What is to be exported after step t, by series without the label ``optimizer``."""
    case, traces = subject.case, subject.traces
    reader = state.reader_for(subject.optimizer)
    want = {"optwatch_weight_norm": norm(trace.after[-1] for trace in traces.values())}
    if not case.closure:
        want['optwatch_grad_norm{stage="at_step"}'] = norm(trace.gradients[-1] for trace in traces.values())
    first = next(iter(traces.values()))
    if case.rate is not None:
        want['optwatch_learning_rate{group="0"}'] = case.rate(first, t)
    if case.first is not None:
        want["optwatch_first_moment_norm"] = norm(moments(subject, "first").values())
    if case.second is not None:
        seconds = moments(subject, "second")
        size = sum(v.numel() for v in seconds.values())
        want["optwatch_second_moment_mean"] = sum(float(v.sum()) for v in seconds.values()) / size
        want["optwatch_second_moment_max"] = max(float(v.max()) for v in seconds.values())
        if isinstance(reader.denominator, state.Denominator):
            want |= adaptive(subject, seconds, t, reader)
    return want


def moments(subject: Subject, which: str) -> dict[str, Tensor]:
    """One kind of moment by parameter: by definition, or for quantized state as the package itself decodes it."""
    definition = getattr(subject.case, which)
    every = {name: definition(trace) for name, trace in subject.traces.items()}
    defined = {name: x for name, x in every.items() if x is not None}
    if subject.case.decode is None:
        return defined
    decoded = {}
    for name, parameter in subject.module.named_parameters():
        value = subject.case.decode(subject.optimizer.state[parameter], which).detach().double()
        far = float((value - defined[name]).norm() / defined[name].norm())
        if far > QUANTIZATION:
            subject.problems.append(f"{name}: the decoded {which} moment is {far:.3g} away from its definition")
        decoded[name] = value
    return decoded


def adaptive(subject: Subject, seconds: dict[str, Tensor], t: int, reader: state.Reader) -> dict[str, float]:
    """The share of entries below ε, and the quantiles over layers of the rate of a weight's step."""
    case = subject.case
    assert case.root is not None, f"{subject.name}: say where its step adds epsilon"
    assert isinstance(reader.denominator, state.Denominator)
    epsilon = subject.traces[next(iter(seconds))].hyper(reader.denominator.epsilon)
    roots = {name: case.root(subject.traces[name], v, t) for name, v in seconds.items()}
    size = sum(v.numel() for v in roots.values())
    below = sum(int((root < epsilon).sum()) for root in roots.values())
    want = {"optwatch_epsilon_dominated_ratio": below / size}
    if not reader.rate_is_exact(subject.optimizer.param_groups):
        return want
    assert case.rate is not None
    trace = subject.traces[next(iter(seconds))]
    rate, rates = case.rate(trace, t), []
    beta2 = reader.denominator.beta2
    correction = 1.0 if beta2 is None else 1 - trace.hyper(beta2) ** t
    late = reader.denominator.late_correction
    for layer in subject.layers().values():
        names = [name for name in layer if name in roots]
        if not names:
            continue
        mean = sum(float((roots[n] ** 2).sum()) for n in names) / sum(roots[n].numel() for n in names)
        # The root with the late correction is √v: the rate is η√(1 − β₂ᵗ) / (√v + ε).
        rates.append(rate * (math.sqrt(correction) if late else 1.0) / (math.sqrt(mean) + epsilon))
    for quantile in QUANTILES:
        value = float(torch.quantile(torch.tensor(rates, dtype=torch.float64), quantile))
        want[f'optwatch_effective_learning_rate{{quantile="{quantile}"}}'] = value
    return want


def formula(subject: Subject, t: int) -> None:
    """Note where the step is not along m̂ / (√v̂ + ε), or not as long as the learning rate says it is: this proves where
    the optimizer adds ε and corrects the bias, which the share below ε and the rate of a weight's step depend on."""
    case, reader = subject.case, state.reader_for(subject.optimizer)
    if not isinstance(reader.denominator, state.Denominator) or case.numerator is None:
        return
    exact = reader.rate_is_exact(subject.optimizer.param_groups)
    for name, v in moments(subject, "second").items():
        trace = subject.traces[name]
        assert case.root is not None
        beta2, epsilon = reader.denominator.beta2, trace.hyper(reader.denominator.epsilon)
        correction = 1.0 if beta2 is None else 1 - trace.hyper(beta2) ** t
        late = math.sqrt(correction) if reader.denominator.late_correction else 1.0
        along = late * case.numerator(trace, t) / (case.root(trace, v, t) + epsilon)
        moved = trace.before[-1] - trace.after[-1]
        if exact:
            assert case.rate is not None
            factor = case.rate(trace, t)
        else:
            factor = float((moved * along).sum() / along.square().sum())
        far = float((moved - factor * along).norm() / moved.norm())
        if not far < ROUNDING:
            subject.problems.append(f"step {t}: {name} moved otherwise than m / (√v + ε) says, by {far:.3g}")
    subject.checked.add("formula")


MOMENTS = (
    "optwatch_first_moment_norm",
    "optwatch_second_moment_mean",
    "optwatch_second_moment_max",
    "optwatch_epsilon_dominated_ratio",
    "optwatch_effective_learning_rate",
    "optwatch_learning_rate",
)


def compare(subject: Subject, snapshot: dict[str, float], t: int) -> None:
    """Note every number that is missing, different, or exported although nothing defines it."""
    label = f'optimizer="{subject.label}"'
    got = {_without(series, label): value for series, value in snapshot.items() if not subject.label or label in series}
    want = expected(subject, t)
    for series, value in want.items():
        if series not in got:
            subject.problems.append(f"step {t}: {series} is not exported, expected {value:.9g}")
        elif not math.isclose(got[series], value, rel_tol=subject.case.tolerance, abs_tol=1e-30):
            subject.problems.append(f"step {t}: {series} is {got[series]:.9g}, expected {value:.9g}")
        else:
            subject.checked.add(series.partition("{")[0])
    for series in got:
        name = series.partition("{")[0]
        if name in MOMENTS and name not in {s.partition("{")[0] for s in want}:
            subject.problems.append(f"step {t}: {series} is exported, and no definition says what it is")


def _without(series: str, label: str) -> str:
    return series.replace(f",{label}", "").replace(f"{label},", "").replace(f"{{{label}}}", "")


def norm(tensors: Iterator[Tensor] | Any) -> float:
    """√Σx² over all of them."""
    return math.sqrt(sum(float(x.square().sum()) for x in tensors))


def prove(subjects: list[Subject], folder: Path) -> None:
    """Run them side by side under one monitor and note what differs."""
    torch.manual_seed(0)
    settings = Settings(address="127.0.0.1", spool_directory=folder, sample_every=1, blackbox_bytes=0)
    monitor = attach(*(s.optimizer for s in subjects), port=0, settings=settings)
    try:
        for subject in subjects:
            subject.label = monitor._watches[id(subject.optimizer)].name if len(subjects) > 1 else ""
        failed: set[int] = set()
        for t in range(1, STEPS + 1):
            for subject in subjects:
                if id(subject) in failed:
                    continue
                try:
                    step(subject, t)
                except Exception as error:
                    failed.add(id(subject))
                    subject.problems.append(f"step {t} raised {type(error).__name__}: {error}")
            assert monitor.flush(60)
            snapshot = monitor.snapshot()
            for subject in subjects:
                if id(subject) in failed:
                    continue
                try:
                    compare(subject, snapshot, t)
                    if t == STEPS:
                        formula(subject, t)
                except Exception as error:
                    failed.add(id(subject))
                    subject.problems.append(f"step {t}: its definition raised {type(error).__name__}: {error}")
        if monitor.faults.counts:
            raise AssertionError(f"the agent had faults: {monitor.faults.counts}")
    finally:
        monitor.detach()
