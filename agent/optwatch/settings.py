"""What can be set: `Settings` for the agent, `Target` for what a run calls converged, and the OPTWATCH_* variables."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from .catalogue import AUDIT_RULES

ROTATION_STEPS, ROTATION_SECONDS = 10, 15.0
"""Of a rotation over weights and moments, where `Settings.sample_every` is not given."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the agent. Each can also be given as the variable ``OPTWATCH_`` + its name in capitals."""

    sample_every: int | None = None
    """Steps over which weights and moments are read once: at each step a part of the parameters, in rotation, so that
    an exported number is made of numbers at most this many steps old. None: 10, and where these pass in less than about
    fifteen seconds 2, 4, 8 or 16 times as many, since nobody sees more of them than is scraped; not where ranks add up
    what they hold. Gradients and loss are read at every step."""
    overhead_budget: float = 0.01
    """Share of step time that the agent may take, 1 for any. Above it weights and moments are read less often, and
    after that gradients where this brings it under the budget. Not where ranks add up what they hold: they read
    alike."""
    update_scratch_bytes: int = 32 * 2**20
    """Most bytes of copies of weights that updates are measured with, for each optimizer, on its device; 0: none.
    Weights that do not fit are measured in turn, a part at each step, all of them in four rotations."""
    max_skipped_steps: int = 50
    """Steps that a gradient scaler may skip in a row before that is an incident: no search takes as many."""
    kernel: Literal["auto", "off"] = "auto"
    """Whether statistics of tensors are read by a kernel that is compiled in the background: on a CPU by the machine's
    own C compiler, once, on CUDA by Triton. For 100 parameters and more its C++ compiler makes what finds them in
    memory, too, against torch's headers: ten seconds of a core at low priority, once. ``auto``: where that works;
    ``off``: by torch's operations and in Python only, which take several times as long on a CPU. The kernel for CUDA
    has run in Triton's interpreter only, never on a GPU yet."""
    skip_nonfinite_steps: bool = False
    """Whether a step whose gradient is not finite is left out, weights and moments staying as they were. For optimizers
    of torch's with ``fused=True``, and for any on a CPU: nothing waits for a device. It changes what is trained."""
    max_layers: int = 20
    """Most layers that per-layer metrics tell apart: four series a layer and rank."""
    activations: Literal["on", "off"] = "on"
    """Whether hooks on at most `max_layers` layers read the least and greatest entry of what they give out, which tells
    in which layer a forward pass that ends in NaN or Inf broke."""
    max_groups: int = 16
    """Most parameter groups whose learning rate and weight decay are exported; further ones are left out, and said."""
    loss_reduction: Literal["auto", "sum", "mean"] = "auto"
    """How the losses of accumulated micro-batches make one. ``auto``: their sum where the training code divided each by
    the number of micro-batches, which is read off the loss's graph, else their mean."""
    aggregation: Literal["ranks", "promql"] = "ranks"
    """How the parts of a model on several ranks become its statistics. ``ranks``: their host threads add them up and
    rank 0 exports the totals. ``promql``: nothing is exchanged at a step, and each rank exports sums over its part
    (optwatch_shard_contribution), to be added up in Prometheus."""
    rank_check_every: int = 100
    """Steps between two comparisons of ranks: bits of replicas, hyper-parameters, own time; 0: none. All ranks need the
    same. Checksums are read in turn, a part of the tensors at each step."""
    rank_timeout_seconds: float = 10.0
    """Seconds that the host thread waits for other ranks, before it goes on with what it knows itself. Training waits
    for nothing."""
    address: str = "0.0.0.0"  # noqa: S104 - an exporter is there to be scraped from another machine
    """Address that /metrics is served on."""
    advertise: str | None = None
    """Host name or IP that the server tells Prometheus to scrape; none: this machine's address towards the server."""
    heartbeat_interval_seconds: float = 10.0
    """Seconds between two heartbeats to the server. A run is lost when they stop for two and a half of them."""
    request_timeout_seconds: float = 5.0
    """Seconds after which a request to the server is given up and tried again later, on the reporter's own thread."""
    exit_timeout_seconds: float = 3.0
    """Most seconds that the end of the process waits for the last messages to be delivered. What is not stays in the
    spool, for the next run on this machine to deliver."""
    ring_rows: int = 256
    """Steps that may be under way from the device to the host thread before one is dropped, and counted."""
    spool_directory: Path | None = None
    """Folder of the messages the server has not had yet; none: ``$XDG_STATE_HOME/optwatch`` or its default."""
    spool_max_bytes: int = 16 * 2**20
    """Most bytes of undelivered messages kept on disk for a run; further ones are dropped, and counted."""
    blackbox_bytes: int = 4 * 2**20
    """Most bytes of the file in the spool's folder that holds the last 512 steps and outlives the process; 0: none."""
    spike_window: int = 20
    """Steps whose median is the level that a spike leaves."""
    spike_rarity: float = 1750.0
    """A spike is a value that the run's own noise, by its tail so far, reaches less than once in so many steps."""
    spike_min_increase: float = 0.02
    """Least relative increase of a loss over its level in a spike or drift: less does no harm on a quiet curve."""
    grad_spike_min_increase: float = 2.0
    """Least relative increase of a gradient norm in a spike; 2 is three times the level."""
    drift_deviations: float = 3.0
    """Robust standard deviations of its noise that the level of the loss is above its best when it drifts."""
    plateau_steps: int = 5000
    """Steps without a new best level of the loss that are a plateau, unless the learning rate is at its end."""
    stall_seconds: float = 600.0
    """Least time without a step that is a stall; ten usual intervals and twice the longest pause are needed as well."""
    validation_min_increase: float = 0.1
    """Least relative distance from its best at which a validation metric has regressed."""
    checkpoint_promise_seconds: float = 1800.0
    """How long a checkpoint may take before the server calls a run lost that sends no heartbeat meanwhile."""
    divergence_steps: int = 200
    """Steps after a spike or drift of the loss within which it has to be back, or training has diverged."""
    spike_warmup_steps: int = 30
    """Steps at the start of a run without spikes: the band is not known yet, and losses fall steeply."""
    audit_silenced: str = ""
    """Rules of the configuration's audit (docs/audit.md) that are not to be run, separated by commas; ``all`` for the
    whole audit."""

    @property
    def rotation_steps(self) -> int:
        """Steps that a rotation over weights and moments takes, unless it is stretched."""
        return ROTATION_STEPS if self.sample_every is None else self.sample_every

    @property
    def rotation_seconds(self) -> float:
        """Seconds that it takes at least, about; 0 where any will do."""
        return ROTATION_SECONDS if self.sample_every is None else 0.0

    def __post_init__(self) -> None:
        if self.spool_directory is not None:  # a text will do, as for any path
            object.__setattr__(self, "spool_directory", Path(self.spool_directory).expanduser())
        for field in fields(self):
            value = getattr(self, field.name)
            if fault := _fault(field, value):
                raise ValueError(f"Settings({field.name}={value!r}): {fault}")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """The defaults, overridden by ``OPTWATCH_SAMPLE_EVERY`` and its like. An empty variable counts as none.

        Raises:
            ValueError: a variable's text is not of its setting's type, or out of range; the message names it.
        """
        environment = os.environ if environment is None else environment
        given: dict[str, object] = {}
        for field in fields(cls):
            variable = f"OPTWATCH_{field.name.upper()}"
            if not (text := environment.get(variable)):
                continue
            kinds: dict[str, Callable[[str], object]] = {
                "int": int,
                "int | None": int,
                "float": float,
                "bool": lambda given: {"true": True, "1": True, "false": False, "0": False}.get(given.lower(), given),
                "Path | None": Path,
            }
            value: object = text
            with contextlib.suppress(ValueError):
                value = kinds.get(str(field.type), str)(text)
            if fault := _fault(field, value):
                raise ValueError(f"{variable}={text!r}: {fault}")
            given[field.name] = value
        return cls(**given)  # type: ignore[arg-type]  # each was checked against its field just above


_COUNTS = (
    "sample_every",
    "max_layers",
    "max_groups",
    "ring_rows",
    "spool_max_bytes",
    "spike_window",
    "divergence_steps",
    "plateau_steps",
    "max_skipped_steps",
)
_ABOVE_0 = (
    "overhead_budget",
    "rank_timeout_seconds",
    "heartbeat_interval_seconds",
    "request_timeout_seconds",
    "drift_deviations",
    "stall_seconds",
)
_SECONDS = (
    "rank_timeout_seconds",
    "heartbeat_interval_seconds",
    "request_timeout_seconds",
    "exit_timeout_seconds",
    "checkpoint_promise_seconds",
    "stall_seconds",
)
_LONGEST_SECONDS = 86_400


def _fault(field: Field[Any], value: Any) -> str | None:
    """What to give instead of `value`, or None where it fits."""
    name, kind = field.name, str(field.type)
    if name == "aggregation":
        return None if value in ("ranks", "promql") else "give 'ranks' or 'promql'"
    if name == "loss_reduction":
        return None if value in ("auto", "sum", "mean") else "give 'auto', 'sum' or 'mean'"
    if name == "activations":
        return None if value in ("on", "off") else "give 'on' or 'off'"
    if name == "kernel":
        return None if value in ("auto", "off") else "give 'auto' or 'off'"
    if name == "update_scratch_bytes" and value in range(1, 1024):
        return "give 0, or 1024 bytes or more"
    if kind == "bool":
        return None if isinstance(value, bool) else "give True or False (in a variable: true or false)"
    if kind == "int" or (kind == "int | None" and value is not None):
        least = 1 if name in _COUNTS else 0
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
        return None if fits else f"give a whole number of {least} or more"
    if kind == "float":
        number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
        if name == "spike_rarity" and not 1 < number < math.inf:
            return "give a number above 1"
        if name == "overhead_budget" and number > 1:
            return "give a share of step time, at most 1"
        if name in _SECONDS and number > _LONGEST_SECONDS:
            return f"give at most {_LONGEST_SECONDS} seconds"
        if not (number > 0 if name in _ABOVE_0 else number >= 0) or number == math.inf:
            return "give a number above 0" if name in _ABOVE_0 else "give a number of 0 or more"
        return None
    if name == "audit_silenced" and isinstance(value, str):
        unknown = set(listed(value)) - {"all", *AUDIT_RULES}
        return f"give ids of rules, such as {AUDIT_RULES[0]}, or all" if unknown else None
    if kind == "Path | None":
        return None  # whatever is none has not become a Path
    return None if isinstance(value, str) or (value is None and "None" in kind) else "give a text"


def listed(text: str) -> list[str]:
    """The parts of a text that are separated by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


@dataclass(frozen=True)
class Target:
    """What a run calls converged: ``metric`` reaches ``value`` within ``by_step`` optimizer steps."""

    metric: str
    """A name given to `Monitor.log`, or ``loss``."""
    value: float
    by_step: int
    mode: Literal["min", "max"] = "min"
    """Whether the metric falls to its target, as a loss, or rises to it, as an accuracy."""

    def __post_init__(self) -> None:
        if self.by_step < 1:
            raise ValueError(f"Target(by_step={self.by_step!r}): give the number of optimizer steps, 1 or more")
        if self.mode not in ("min", "max"):
            raise ValueError(f"Target(mode={self.mode!r}): give 'min' for a loss or 'max' for an accuracy")
