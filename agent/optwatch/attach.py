"""`attach`: the one line in training code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from .settings import Settings, Target

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from .monitor import Monitor

DEFAULT_PORT = 9464


def attach(
    optimizer: Optimizer,
    *more_optimizers: Optimizer,
    model: nn.Module | None = None,
    run: str | None = None,
    project: str | None = None,
    tags: Mapping[str, Any] | None = None,
    seed: int | None = None,
    resume_from: str | None = None,
    server: str | None = None,
    port: int | None = None,
    target: Target | None = None,
    settings: Settings | None = None,
) -> Monitor:
    """Watch an optimizer, or several as one run, and export what they do.

    This line alone captures the loss (from ``backward()``), gradient and weight norms, learning rates, moments and
    events. It changes nothing that training computes and synchronises with no device after it has returned. Each
    argument can also come from a variable: ``OPTWATCH_RUN``, ``OPTWATCH_PROJECT``, ``OPTWATCH_TAGS``
    (``key=value,...``), ``OPTWATCH_SEED``, ``OPTWATCH_RESUME_FROM``, ``OPTWATCH_SERVER``, ``OPTWATCH_PORT``; settings
    from the variables that `Settings` lists; the team from ``OPTWATCH_TEAM``, the run's id from ``OPTWATCH_RUN_ID``.

    Attaching again to an optimizer that is watched returns its monitor and changes nothing.

    Args:
        optimizer: The optimizer, before or after ``load_state_dict``; of DeepSpeed the one that
            ``deepspeed.initialize`` returns.
        more_optimizers: Others of the same run, told apart by the label ``optimizer``.
        model: Names the layers. Without it names come from the optimizer's ``param_names`` or from the module in this
            process that holds its parameters.
        run: The run's name for people; by default the script's.
        project: What the run belongs to.
        tags: Free labels of the run; ``sweep`` and ``team`` are known to dashboards and alerts.
        seed: Kept with the run.
        resume_from: Id of the run or path of the checkpoint that this one goes on from.
        server: Base URL of an optwatch server; none: export only.
        port: Port of /metrics, by default 9464; 0 for any free one. A taken port falls back to a free one.
        target: What converged means for this run.
        settings: Everything else.

    Returns:
        The monitor, for `Monitor.log`, `Monitor.url` and `Monitor.detach`.

    Raises:
        ModuleNotFoundError: torch is not installed.
        TypeError: something given is no ``torch.optim.Optimizer``, or the model no ``torch.nn.Module``.
        ValueError: an argument or variable is out of range or of the wrong form, or the optimizers given are watched by
            different monitors already.
        OSError: ``Settings.address`` is no address of this machine.
    """
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "optwatch.attach needs PyTorch, which is not installed here: pip install 'optwatch[torch]', or torch as "
            "https://pytorch.org says for your machine",
            name="torch",
        ) from error
    from torch.nn import Module
    from torch.optim import Optimizer as TorchOptimizer

    from .lifecycle import run as runs
    from .monitor import Monitor, attached
    from .parallel import deepspeed
    from .state.wrappers import hookable

    optimizers = tuple(deepspeed.seen(given) for given in (optimizer, *more_optimizers))
    for given in optimizers:
        if not isinstance(given, TorchOptimizer):
            raise TypeError(f"attach({type(given).__name__}): give a torch.optim.Optimizer")
    if model is not None and not isinstance(model, Module):
        raise TypeError(f"attach(model={type(model).__name__}): give the torch.nn.Module that is trained")
    optimizers = tuple({id(o): o for o in map(hookable, optimizers)}.values())
    known = {id(attached[id(o)]): attached[id(o)] for o in optimizers if id(o) in attached}
    if len(known) == 1 and all(id(o) in attached for o in optimizers):
        return next(iter(known.values()))
    if known:
        raise ValueError(
            "attach: some of these optimizers are watched already; give all optimizers of a run to one attach(), or "
            "call monitor.detach() first"
        )
    settings = settings or Settings.from_environment()
    server = _server(server)
    port = _port(port)
    description = runs.describe(
        optimizers,
        run=run,
        project=project,
        tags=tags,
        seed=seed,
        resume_from=resume_from,
        target=target,
        heartbeat_interval_seconds=settings.heartbeat_interval_seconds,
    )
    monitor = Monitor(
        optimizers, model=model, run=description, target=target, server=server, port=port, settings=settings
    )
    attached.update((id(o), monitor) for o in optimizers)
    return monitor


def _server(given: str | None) -> str | None:
    text = given or os.environ.get("OPTWATCH_SERVER")
    if not text:
        return None
    try:
        url = urlsplit(text)
        fits = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # a port or an IPv6 address that is none
        fits = False
    if not fits:
        name = f"attach(server={text!r})" if given else f"OPTWATCH_SERVER={text!r}"
        raise ValueError(f"{name}: give a URL such as http://optwatch:8000")
    return text


def _port(given: int | None) -> int:
    text = os.environ.get("OPTWATCH_PORT") or str(DEFAULT_PORT)
    if text.startswith("tcp://"):
        # Kubernetes puts OPTWATCH_PORT=tcp://10.0.0.7:8000 into every pod beside a Service called `optwatch`.
        text = str(DEFAULT_PORT)
    if given is None and text.isdecimal() and int(text) <= 65535:
        return int(text)
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given <= 65535:
        return given
    name = f"OPTWATCH_PORT={text!r}" if given is None else f"attach(port={given!r})"
    raise ValueError(f"{name}: give a port from 0 to 65535")
