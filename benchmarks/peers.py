"""What a user would pick instead, each as its own documentation says to use it: contenders for `overhead.py`.

Each takes a model and its AdamW. A peer whose package is not installed is left out and named; they go into an
environment of their own (benchmarks/requirements.txt), since their pins have nothing to do with ours.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


def nothing() -> None: ...


@dataclass
class Contender:
    """One way to watch the steps of a block."""

    before_step: Callable[[], object] = nothing
    """Called after ``backward()`` and before the step, and timed."""
    begin: Callable[[], object] = nothing
    end: Callable[[], object] = nothing
    hooked: bool = False
    """Whether it works in hooks of the forward and backward pass, so that its own time cannot be told."""


Peer = Callable[[nn.Module, torch.optim.Optimizer], Contender]
VALUES = 200
"""Values that loggers write each step: as many as the agent exports of a rank."""


def gradients_of(model: nn.Module) -> list[torch.Tensor]:
    """The gradients that there are."""
    return [p.grad for p in model.parameters() if p.grad is not None]


def naive(model: nn.Module, optimizer: torch.optim.Optimizer) -> Contender:
    """`.norm().item()` of gradient, weight and both moments of every parameter."""

    def read() -> object:
        tensors = [*gradients_of(model), *model.parameters()]
        tensors += [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        return [x.norm().item() for x in tensors]

    return Contender(read)


def clip(model: nn.Module, optimizer: torch.optim.Optimizer) -> Contender:
    """`clip_grad_norm_`, whose result is the gradient norm."""
    return Contender(lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())


def total_norm(model: nn.Module, optimizer: torch.optim.Optimizer) -> Contender:
    """`get_total_norm` of the gradients."""
    return Contender(lambda: nn.utils.get_total_norm(gradients_of(model)).item())


def foreach(model: nn.Module, optimizer: torch.optim.Optimizer) -> Contender:
    """`_foreach_norm` of the gradients, one read."""
    return Contender(lambda: torch.stack(torch._foreach_norm(gradients_of(model))).norm().item())


def foreach_all(model: nn.Module, optimizer: torch.optim.Optimizer) -> Contender:
    """`_foreach_norm` of gradients, weights and both moments, one read."""

    def read() -> object:
        tensors = [*gradients_of(model), *model.parameters()]
        tensors += [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        return torch.stack(torch._foreach_norm([x.detach() for x in tensors])).tolist()

    return Contender(read)


def composer(model: nn.Module, optimizer: torch.optim.Optimizer) -> Contender:
    """MosaicML Composer's OptimizerMonitor at every step, with the optimizer that reports to it."""
    sys.meta_path.insert(0, _Absent())
    from composer.callbacks import OptimizerMonitor
    from composer.optim import DecoupledAdamW

    reporter = DecoupledAdamW(model.parameters(), lr=1e-4)
    reporter.state, reporter.param_groups = optimizer.state, optimizer.param_groups
    for group in reporter.param_groups:
        group.setdefault("initial_lr", group["lr"])
    batch = types.SimpleNamespace(value=0)
    state = types.SimpleNamespace(
        timestamp=types.SimpleNamespace(batch=batch), model=model, optimizers=[reporter], fsdp_enabled=False
    )
    logger = types.SimpleNamespace(log_metrics=lambda metrics: None)
    monitor = OptimizerMonitor(batch_log_interval=1)
    return Contender(lambda: optimizer.state and monitor.batch_end(state, logger))


def wandb_watch(log_freq: int) -> Peer:
    """`wandb.watch(model, log="all")` offline, with the loss logged each step."""

    def make(model: nn.Module, optimizer: torch.optim.Optimizer) -> Contender:
        import wandb

        settings = wandb.Settings(console="off", silent=True, x_disable_stats=True)
        run = wandb.run or wandb.init(mode="offline", dir=tempfile.mkdtemp(), settings=settings)
        return Contender(
            lambda: run.log({"loss": 1.0}),
            begin=lambda: run.watch(model, log="all", log_freq=log_freq),
            end=lambda: run.unwatch(model),
            hooked=True,
        )

    return make


def lightning(model: nn.Module, optimizer: torch.optim.Optimizer) -> Contender:
    """Lightning's `grad_norm(module, 2)`, with each value read as its `log_dict` does."""
    from lightning.pytorch.utilities import grad_norm

    return Contender(lambda: {name: float(value) for name, value in grad_norm(model, 2).items()})


def tensorboard(model: nn.Module, optimizer: torch.optim.Optimizer) -> Contender:
    """Gradient norms to TensorBoard, as many scalars as the agent exports."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(tempfile.mkdtemp())

    def read() -> object:
        for i, value in enumerate(_values(model)):
            writer.add_scalar(f"norm/{i}", value, 0)
        return None

    return Contender(read)


def mlflow(model: nn.Module, optimizer: torch.optim.Optimizer) -> Contender:
    """Gradient norms to MLflow on SQLite, as many metrics as the agent exports, in one call."""
    import mlflow as library

    logging.getLogger("alembic").setLevel(logging.ERROR)
    library.end_run()  # of the model before
    library.set_tracking_uri(f"sqlite:///{tempfile.mkdtemp()}/mlflow.db")
    library.start_run()
    return Contender(
        lambda: library.log_metrics({f"norm_{i}": value for i, value in enumerate(_values(model))}, step=0)
    )


def _values(model: nn.Module) -> Sequence[float]:
    norms: list[float] = torch.stack(torch._foreach_norm(gradients_of(model))).tolist()
    return (norms * (VALUES // len(norms) + 1))[:VALUES]


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands for packages that Composer imports at its top and that its monitor never calls."""

    names = ("torchvision", "mcli", "streaming", "gql")

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name.split(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


class _Empty(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


PEERS: dict[str, tuple[str | None, Peer]] = {
    "naive norms of g, p, m, v, each read": (None, naive),
    "clip_grad_norm_": (None, clip),
    "get_total_norm of g": (None, total_norm),
    "_foreach_norm of g, one read": (None, foreach),
    "_foreach_norm of g, p, m, v, one read": (None, foreach_all),
    "Composer OptimizerMonitor, every step": ("composer", composer),
    "wandb.watch, all, every step": ("wandb", wandb_watch(1)),
    "wandb.watch, all, every 1000th (its default)": ("wandb", wandb_watch(1000)),
    "Lightning grad_norm": ("lightning", lightning),
    f"TensorBoard, {VALUES} scalars": ("tensorboard", tensorboard),
    f"MLflow on SQLite, {VALUES} metrics": ("mlflow", mlflow),
}
"""The package that each needs, and how it is used."""


def installed() -> dict[str, Peer]:
    """The peers whose packages are here; the others are named on stderr."""
    warnings.simplefilter("ignore")  # those of other people's packages
    here = {}
    for name, (package, contender) in PEERS.items():
        if package is None or importlib.util.find_spec(package):
            here[name] = contender
        else:
            print(f"left out: {name} ({package} is not installed)", file=sys.stderr)
    return here
