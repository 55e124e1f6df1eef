"""What a run is: its names, where it runs and what it runs with. Read once, when attaching."""

from __future__ import annotations

import os
import platform
import re
import socket
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from optwatch.parallel import identity
from optwatch.settings import Target

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MAX_LABEL, MAX_TAG_NAME, MAX_TAGS = 256, 128, 63
"""Most characters of a name and of a tag's, and most tags, that the server takes (it takes one tag more: see
`Run.message`)."""


@dataclass(frozen=True)
class Run:
    """One run. Its fields are those of Run in docs/wire.md."""

    id: str
    name: str
    project: str
    team: str | None
    tags: dict[str, str]
    started_at: float
    optimizer: str
    hyperparameters: dict[str, Any]
    device: str
    world_size: int
    seed: int | None
    resumed_from: str | None
    target: dict[str, Any] | None
    versions: dict[str, str]
    code_version: str | None
    host: str
    pid: int
    heartbeat_interval_seconds: float
    rank: int = field(default=0, metadata={"wire": False})

    def message(self) -> dict[str, Any]:
        """The body of ``POST /api/v1/runs``."""
        body = asdict(self)
        del body["rank"]
        if self.resumed_from and not RUN_ID.fullmatch(self.resumed_from):
            # The path of a checkpoint: the wire has a field for the id of a run only.
            body["resumed_from"] = None
            body["tags"] = {**self.tags, "resume_from": self.resumed_from[-MAX_LABEL:]}
        return {"schema": 1, **body}

    def labels(self) -> dict[str, str]:
        """The labels of optwatch_run_info, by name."""
        return {
            "run": self.name,
            "project": self.project,
            "team": self.team or "",
            "optimizer": self.optimizer,
            "device": self.device,
            "world_size": str(self.world_size),
            "version": self.versions["optwatch"],
            "sweep": self.tags.get("sweep", ""),
        }


def describe(
    optimizers: Sequence[Optimizer],
    *,
    run: str | None,
    project: str | None,
    tags: Mapping[str, str] | None,
    seed: int | None,
    resume_from: str | None,
    target: Target | None,
    heartbeat_interval_seconds: float,
    environment: Mapping[str, str] | None = None,
) -> Run:
    """Put a run together from arguments, else from ``OPTWATCH_*`` variables, else from what the process is.

    Raises:
        ValueError: a name, tag or variable that the server would refuse; the message names it and says what fits.
    """
    env = os.environ if environment is None else environment
    name = str(run or env.get("OPTWATCH_RUN") or _script_name()[:MAX_LABEL])
    all_tags = _tags(env.get("OPTWATCH_TAGS", "")) | {str(key): str(value) for key, value in (tags or {}).items()}
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:100] or "run"
    rank, world_size = identity.place() or (_integer(env, "RANK", 0) or 0, _integer(env, "WORLD_SIZE", 1))
    own_id = f"{stem}-{uuid.uuid4().hex[:8]}"
    run_id = env.get("OPTWATCH_RUN_ID") or identity.shared_id(own_id, stem, rank, world_size, env)
    if not RUN_ID.fullmatch(run_id):
        raise ValueError(
            f"OPTWATCH_RUN_ID={run_id!r}: give at most 128 letters, digits, '.', '_' or '-', beginning with a letter "
            "or digit"
        )
    parameters = (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    described = Run(
        id=run_id,
        name=name,
        project=str(project or env.get("OPTWATCH_PROJECT") or "default"),
        team=env.get("OPTWATCH_TEAM") or all_tags.get("team"),
        tags=all_tags,
        started_at=time.time(),
        optimizer="+".join(type(optimizer).__name__ for optimizer in optimizers)[:MAX_LABEL],
        hyperparameters={
            name: _hyperparameters(optimizer)
            for name, optimizer in zip(optimizer_names(optimizers), optimizers, strict=True)
        },
        device=next((p.device.type for p in parameters), "cpu"),
        world_size=world_size,
        seed=seed if seed is not None else _integer(env, "OPTWATCH_SEED", None),
        resumed_from=resume_from or env.get("OPTWATCH_RESUME_FROM") or None,
        target=asdict(target) if target else None,
        versions={"optwatch": version("optwatch"), "torch": torch.__version__, "python": platform.python_version()},
        code_version=(env.get("OPTWATCH_CODE_VERSION") or "")[:MAX_LABEL] or None,
        host=socket.gethostname(),
        pid=os.getpid(),
        heartbeat_interval_seconds=heartbeat_interval_seconds,
        rank=rank,
    )
    _check(described)
    return described


def optimizer_names(optimizers: Sequence[Optimizer]) -> list[str]:
    """Class names, numbered where two are alike: the values of label ``optimizer``."""
    kinds = [type(optimizer).__name__ for optimizer in optimizers]
    return [kind if kinds.count(kind) == 1 else f"{kind}{kinds[:i].count(kind)}" for i, kind in enumerate(kinds)]


def _check(run: Run) -> None:
    """Refuse here what the server would refuse with everything that follows: a run that it never knew has no page."""
    texts = {"run": run.name, "project": run.project, "team": run.team or ""}
    texts |= {f"tag {key}": value for key, value in run.tags.items()}
    if run.target:
        texts["target.metric"] = run.target["metric"]
    for what, text in texts.items():
        if len(text) > MAX_LABEL:
            raise ValueError(f"{what}={text!r} has {len(text)} characters: give at most {MAX_LABEL}")
    for key in run.tags:
        if not 0 < len(key) <= MAX_TAG_NAME:
            raise ValueError(f"tag {key!r}: give a name of 1 to {MAX_TAG_NAME} characters")
    if len(run.tags) > MAX_TAGS:
        raise ValueError(f"{len(run.tags)} tags: give at most {MAX_TAGS}")
    if run.seed is not None and not -(2**63) <= run.seed < 2**64:
        raise ValueError(f"seed={run.seed}: give one that torch.manual_seed takes, from -2**63 to 2**64 - 1")
    if run.world_size < 1:
        raise ValueError(f"WORLD_SIZE='{run.world_size}': give the number of ranks, 1 or more")
    if run.rank < 0:
        raise ValueError(f"RANK='{run.rank}': give this process's rank, 0 or more")


def _script_name() -> str:
    script = Path(sys.argv[0] if sys.argv else "").stem
    return script if script and not script.startswith("-") else "interactive"


def _tags(text: str) -> dict[str, str]:
    tags = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise ValueError(f"OPTWATCH_TAGS={text!r}: {item!r} is no tag; give key=value,key=value")
        tags[key] = value
    return tags


def _integer(env: Mapping[str, str], variable: str, default: Any) -> Any:
    text = env.get(variable)
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{variable}={text!r}: give a whole number") from None


def _hyperparameters(optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's settings as JSON, for the run page: its defaults, and each group's rate, decay and size."""
    keys = ("lr", "weight_decay")
    return {
        **{key: _plain(value) for key, value in optimizer.defaults.items()},
        "groups": [
            {key: _plain(group[key]) for key in keys if key in group}
            | {"parameters": sum(p.numel() for p in group["params"])}
            for group in optimizer.param_groups[:64]
        ],
    }


def _plain(value: object) -> object:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return float(value)  # once, when attaching: a synchronisation here is no step's
    return str(value)[:200]
