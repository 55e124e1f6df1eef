"""A stand-in of an optimizer: the same class with the same hyper-parameters over tensors that hold no data.

Its own ``step()`` runs on them, so that what it keeps for each parameter is known without a formula and before the
first byte is allocated. The user's optimizer is read and never called.
"""

from __future__ import annotations

import copy
import inspect
import logging
import random
import sys
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeCopyMode, FakeTensorMode
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from optwatch.state import state_bytes
from optwatch.state.wrappers import chain, class_names

from .kinds import Kind, Sizes, kinds, local

LEAST_STEPS, MOST_STEPS = 2, 32
"""Steps taken: until the state grows no more. Some (SOAP) allocate most in the second, some keep the last gradients."""


def grown_state(optimizer: Optimizer) -> list[Sizes]:
    """The state of every kind of parameters once the optimizer's own ``step()`` allocates no more.

    Nothing is allocated on any device and nothing of the user's is changed: not the optimizer, not the random number
    generators, and no hook is called. To be called on the thread that attaches, since torch's dispatch modes leave a
    mark on the whole process while they last. Costs a few steps over two parameters of each kind: milliseconds, for
    `attach` and not for a step (benchmarks/results/attach.md).

    Raises:
        Exception: whatever the class raises on tensors without data: it needs a closure, reads values, or has kernels
            of its own.
    """
    _refuse_compiled(optimizer)
    _refuse_global_hooks(optimizer)
    of_kind = kinds(optimizer)
    mode = FakeTensorMode()
    with _nothing_left_behind():
        # Two of each: state that belongs to the group as a whole and lies with its first parameter counts once.
        chosen = {kind: members[:2] for kind, members in of_kind.items()}
        copied = _copy(optimizer, mode, chosen)
        stand_ins = {kind: [copied.fakes[id(p)] for p in members] for kind, members in chosen.items()}
        step = _plain_step(type(optimizer))
        closure = inspect.signature(step).parameters.get("closure")
        arguments = [] if closure is None or closure.default is None else [lambda: torch.zeros(())]
        with mode, _ValuesAssumed(), torch.no_grad():  # type: ignore[no-untyped-call]
            size = -1
            for taken in range(1, MOST_STEPS + 1):
                for p in copied.fakes.values():
                    p.grad = torch.zeros_like(p)
                step(copied.optimizer, *arguments)
                before, size = size, sum(state_bytes(copied.optimizer).values())
                if size == before and taken >= LEAST_STEPS:
                    break
        sizes = []
        for kind, members in of_kind.items():
            first, *second = stand_ins[kind]
            one = _bytes_of(copied.optimizer, first)
            # What the second adds: not what it shares with the first, nor what lies with the first for its whole group.
            more = _bytes_of(copied.optimizer, first, *second) - one
            held = len(members) * _bytes_of(optimizer, members[0]) if kind.held else 0
            sizes.append(Sizes(kind, one + more * (len(members) - 1), held))
        # State of no parameter in particular, less what kinds share with each other.
        common = sum(state_bytes(copied.optimizer).values())
        common -= sum(_bytes_of(copied.optimizer, *members) for members in stand_ins.values())
        sizes[:1] = [replace(each, total=each.total + common) for each in sizes[:1]]
    return sizes


class _ValuesAssumed(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Answers a step that asks for a tensor's value (a norm, a ratio, whether there is a NaN): 1, or False."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if func is not torch.ops.aten._local_scalar_dense.default:
                raise
            dtype = args[0].dtype
            return False if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1


@dataclass(frozen=True)
class _Copied:
    optimizer: Optimizer
    fakes: dict[int, Tensor]
    """The stand-in of each chosen parameter, by the parameter's ``id``."""


def _copy(optimizer: Optimizer, mode: FakeTensorMode, chosen: Mapping[Kind, list[Tensor]]) -> _Copied:
    mine = {id(p): local(p) for members in chosen.values() for p in members}
    with mode:
        fakes = {key: _fake(p) for key, p in mine.items()}
    memo: dict[int, Any] = dict(fakes)
    counts = {id(count): count.item() for count in _counts(optimizer)}
    with mode:
        memo |= {key: torch.tensor(count) for key, count in counts.items()}
    with FakeCopyMode(mode):
        return _Copied(_copy_one(optimizer, memo, set(fakes)), fakes)


def _fake(p: Tensor) -> Tensor:
    fake = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=p.device)
    return torch.nn.Parameter(fake, requires_grad=p.is_floating_point() or p.is_complex())


def _copy_one(optimizer: Optimizer, memo: dict[int, Any], chosen: set[int]) -> Optimizer:
    """The optimizer over its chosen parameters only, with everything else it holds copied without data."""
    twin = object.__new__(type(optimizer))
    memo[id(optimizer)] = twin
    attributes = dict(vars(optimizer))
    # A scheduler's wrapper of `step`, and hooks (ours among them), belong to the real one.
    attributes.pop("step", None)
    for name in [name for name in attributes if name.startswith("_optimizer_") and name.endswith("_hooks")]:
        attributes[name] = OrderedDict()
    for inner in [value for value in attributes.values() if isinstance(value, Optimizer)]:
        _copy_one(inner, memo, chosen)  # a wrapper, such as Lookahead, keeps the one it wraps
    groups, state = attributes.pop("param_groups", None), attributes.pop("state", None)
    vars(twin).update(copy.deepcopy(attributes, memo))
    if isinstance(groups, list):
        vars(twin)["param_groups"] = [_copy_group(group, memo, chosen) for group in groups]
    if isinstance(state, Mapping):
        kept = {key: value for key, value in state.items() if not isinstance(key, Tensor) or id(key) in chosen}
        vars(twin)["state"] = defaultdict(dict, copy.deepcopy(kept, memo))
    return twin


def _copy_group(group: Mapping[str, Any], memo: dict[int, Any], chosen: set[int]) -> dict[str, Any]:
    settings = {
        # A rate that is a tensor may be on a device; no state depends on its value.
        key: 1e-3 if isinstance(value, Tensor) and value.numel() == 1 else copy.deepcopy(value, memo)
        for key, value in group.items()
        if key not in ("params", "param_names")
    }
    return {**settings, "params": [memo[id(p)] for p in group["params"] if id(p) in chosen]}


def _counts(optimizer: Optimizer) -> Iterator[Tensor]:
    """Step counts on the CPU: ``step()`` reads their values, so the copies need them."""
    for state in optimizer.state.values():
        for value in state.values() if isinstance(state, Mapping) else ():
            if isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu":
                yield value


def _plain_step(kind: type[Optimizer]) -> Any:
    """The class's ``step`` without torch's wrapper, which would call global hooks and profile."""
    step = kind.step
    return getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step


def _refuse_compiled(optimizer: Optimizer) -> None:
    """A step that compiles itself leaves the code made for the stand-in behind, and training would run that: torchao's
    moments then differed from an unwatched run's."""
    if any(name.startswith("torchao.") for part in chain(optimizer) for name in class_names(type(part))):
        raise NotImplementedError("its step compiles itself, and training would run what was compiled for a stand-in")


def _refuse_global_hooks(optimizer: Optimizer) -> None:
    """A ``step`` that calls its parent's goes through that one's wrapper."""
    hooks = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)
    # torch puts its wrapper into whichever class is made first: AdamW has Adam's own step, wrapped or inherited.
    own = {
        inspect.unwrap(vars(kind)["step"])
        for kind in type(optimizer).__mro__
        if "step" in vars(kind) and kind is not Optimizer
    }
    inner = any(isinstance(value, Optimizer) for value in vars(optimizer).values())
    if any(hooks) and (len(own) > 1 or inner):
        raise RuntimeError("global optimizer hooks are registered, and would be called with a stand-in")


def _bytes_of(optimizer: Optimizer, *parameters: Tensor) -> int:
    """What these parameters have, in the optimizer and in those that it wraps."""
    # An optimizer of torch's base class carries it to `state_bytes`.
    view = object.__new__(Optimizer)
    parts = list(chain(optimizer))
    state = {p: {i: part.state[p] for i, part in enumerate(parts) if p in part.state} for p in parameters}
    vars(view).update(state=state, param_groups=[{"params": list(parameters)}])
    return sum(state_bytes(view).values())


@contextmanager
def _nothing_left_behind() -> Iterator[None]:
    """Training's random numbers are the same with and without us, whatever an optimizer's step draws."""
    numpy = sys.modules.get("numpy")
    python, arrays = random.getstate(), numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=[]):
        log = logging.getLogger(torch._subclasses.fake_tensor.__name__)  # it tells of every failure by itself
        disabled, log.disabled = log.disabled, True
        try:
            with warnings.catch_warnings():  # said again, to the user, by the real step
                warnings.simplefilter("ignore")
                yield
        finally:
            log.disabled = disabled
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(arrays)
