"""What one step was, in plain numbers: what detectors judge and sinks hand on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

INPUT = "input"
"""Stands for what the model is given, among the names of layers."""
Source = Literal["loss", "gradient", "moment", "weight"]


@dataclass(frozen=True, slots=True)
class NonFinite:
    """NaN or Inf in one kind of tensor at one step."""

    source: Source
    value: Literal["nan", "inf"]
    """What the first bad tensor holds: ``nan`` where it holds any NaN."""
    parameters: tuple[str, ...] = ()
    """Names of the bad tensors in the model's order; empty for a loss."""
    layers: tuple[str, ...] = ()
    """The layer of each of them."""


@dataclass(frozen=True, slots=True)
class Passes:
    """What was seen of a step's forward and backward passes: see `activations`."""

    order: list[str]
    """Layers in the order in which they were executed, after ``input`` where the model was given numbers."""
    broken: str | None
    """The first of them whose output was not finite."""
    value: Literal["nan", "inf"] | None
    """What that output holds: ``nan`` where it holds any NaN."""
    own_gradients_finite: bool | None
    """Whether this rank's gradients of all outputs were finite; None where they were not read."""


@dataclass(slots=True)
class StepRecord:
    """One optimizer step. Numbers are float64; None means not measured at this step, or not available at all."""

    step: int
    optimizer: str
    started: float
    """Unix seconds."""
    duration: float | None = None
    """Seconds since the step before."""
    sampled: bool = False
    skipped: Literal["overflow", "nonfinite"] | None = None
    """Set where a gradient scaler made the optimizer skip the update: while it looks for a scale, or in vain."""
    refused: bool = False
    """Whether it was the agent that made it skip, as `Settings.skip_nonfinite_steps` asks for."""
    skipped_in_a_row: int = 0
    """Steps skipped up to this one, if this one was."""
    loss: float | None = None
    loss_reduction: Literal["sum", "mean"] | None = None
    micro_batches: int = 0
    grad_norm: float | None = None
    grad_norm_before_clip: float | None = None
    learning_rates: list[float] = field(default_factory=list)
    """By group; empty where the optimizer has none or derives it inside its step."""
    weight_decays: list[float] = field(default_factory=list)
    grad_moment_cosine: float | None = None
    update_norm: float | None = None
    update_ratio: float | None = None
    weight_norm: float | None = None
    first_moment_norm: float | None = None
    second_moment_mean: float | None = None
    second_moment_max: float | None = None
    epsilon_dominated_ratio: float | None = None
    effective_learning_rates: dict[str, float] = field(default_factory=dict)
    """By quantile over layers: ``"0.1"``, ``"0.5"``, ``"0.9"``."""
    layers: list[str] = field(default_factory=list)
    layer_grad_norm: list[float] | None = None
    """In the order of `layers`, as all that follow."""
    layer_weight_norm: list[float] | None = None
    layer_update_ratio: list[float | None] | None = None
    """None for a layer whose update is not known in full yet, or whose weights are all 0."""
    layer_first_moment_norm: list[float] | None = None
    layer_second_moment_mean: list[float] | None = None
    parameters: list[str] = field(default_factory=list)
    parameter_grad_norm: list[float] | None = None
    """At the step, in the order of `parameters`; minus infinity for one without a gradient."""
    nonfinite: list[NonFinite] = field(default_factory=list)
    """In the order in which a step meets them: loss, gradient, moment, weight."""
    grad_scale: float | None = None
    """The scale of the loss, where a GradScaler scaled it."""
    nonfinite_before: list[NonFinite] = field(default_factory=list)
    """Moments and weights that were not finite before the forward pass; looked for where a loss is not, on a CPU."""
    passes: Passes | None = None
    """Set at a step with anything that is not finite, where the layers of the model are watched."""
    batch_ids: list[str | int | float] = field(default_factory=list)
    """What was given to ``monitor.log(batch_id=...)`` for this step."""
    fresh_state: bool = False
    """Set at the first step if the optimizer began it without state and has some now: it was not restored."""
    state_bytes: dict[tuple[str, str], int] | None = None
    shard_sums: dict[tuple[str, str], float] | None = None
    """Sums over this rank's part of the model, by quantity and layer (empty for all of the part), where there are no
    statistics of the whole model: see `optwatch.parallel.shards`."""

    def give_loss(self, loss: float | None) -> None:
        """Set the loss, or say that there is none, and whether it is finite.

        One that is not finite says nothing while a scaler looks for its scale, which may have overflowed it.
        """
        self.loss = loss
        if self.skipped == "overflow" and loss is not None and loss - loss != 0:
            self.loss = loss = None
        self.nonfinite = [found for found in self.nonfinite if found.source != "loss"]
        if loss is not None and loss - loss != 0:
            self.nonfinite.insert(0, NonFinite("loss", "nan" if loss != loss else "inf"))
