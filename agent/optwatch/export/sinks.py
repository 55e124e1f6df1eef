"""What becomes of a record on the host thread: the exporter's table, and the latest values for heartbeats."""

from __future__ import annotations

import logging
from typing import Any, Protocol

from optwatch.catalogue import WHOLE_MODEL
from optwatch.events import Event
from optwatch.record import StepRecord

from .table import Table

logger = logging.getLogger("optwatch")


class Sink(Protocol):
    """Takes every record and the events it began. May raise: that is counted, and the other sinks go on."""

    def record(self, record: StepRecord) -> None:
        """Take one step."""

    def event(self, event: Event) -> None:
        """Take one event."""


class TableSink:
    """Writes records into the exporter's table. ``scoped`` adds the optimizer's name where a run watches several."""

    def __init__(self, table: Table, scoped: bool, max_groups: int) -> None:
        self._table = table
        self._scoped = scoped
        self._max_groups = max_groups
        self._groups_said = False
        self._in_parts: set[str] = set()
        """Optimizers of which sums over this rank's part are exported."""

    def record(self, record: StepRecord) -> None:
        """Set what the step measured; what it did not keeps its last value."""
        scope = (record.optimizer,) if self._scoped else ()
        table = self._table
        if record.skipped:
            table.add("optwatch_skipped_steps_total", 1, record.skipped, scope=scope)
        else:
            table.add("optwatch_steps_total", 1, scope=scope)
        table.set("optwatch_last_step_timestamp_seconds", record.started, scope=scope)
        if record.duration is not None:
            table.observe_duration(record.duration, scope)
        for name, value in (
            ("optwatch_loss", record.loss),
            ("optwatch_weight_norm", record.weight_norm),
            ("optwatch_first_moment_norm", record.first_moment_norm),
            ("optwatch_second_moment_mean", record.second_moment_mean),
            ("optwatch_second_moment_max", record.second_moment_max),
            ("optwatch_epsilon_dominated_ratio", record.epsilon_dominated_ratio),
            ("optwatch_grad_moment_cosine", record.grad_moment_cosine),
            ("optwatch_update_norm", record.update_norm),
            ("optwatch_update_ratio", record.update_ratio),
        ):
            if value is not None:
                table.set(name, value, scope=scope)
        if record.micro_batches:
            table.set("optwatch_accumulation_steps", record.micro_batches, scope=scope)
        if record.grad_norm is not None:
            table.set("optwatch_grad_norm", record.grad_norm, "at_step", scope=scope)
        if record.grad_norm_before_clip is not None:
            table.set("optwatch_grad_norm", record.grad_norm_before_clip, "before_clip", scope=scope)
        for quantile, value in record.effective_learning_rates.items():
            table.set("optwatch_effective_learning_rate", value, quantile, scope=scope)
        self._groups(record, scope)
        self._shards(record, scope)
        for name, values in (
            ("optwatch_layer_grad_norm", record.layer_grad_norm),
            ("optwatch_layer_weight_norm", record.layer_weight_norm),
            ("optwatch_layer_update_ratio", record.layer_update_ratio),
            ("optwatch_layer_first_moment_norm", record.layer_first_moment_norm),
            ("optwatch_layer_second_moment_mean", record.layer_second_moment_mean),
        ):
            for layer, value in zip(record.layers, values or (), strict=False):
                if value is not None:
                    table.set(name, value, layer, scope=scope)
        for found in record.nonfinite:
            table.add("optwatch_nonfinite_total", 1, found.source, scope=scope)
        if record.state_bytes is not None:
            table.clear("optwatch_optimizer_state_bytes", scope)
            for (key, dtype), size in record.state_bytes.items():
                table.set("optwatch_optimizer_state_bytes", size, key, dtype, scope=scope)

    def _shards(self, record: StepRecord, scope: tuple[str, ...]) -> None:
        """Either statistics of the whole model or sums over a part: what is no longer known is not left standing."""
        in_parts = record.shard_sums is not None
        if in_parts != (record.optimizer in self._in_parts):
            self._in_parts ^= {record.optimizer}
            for name in (
                WHOLE_MODEL if in_parts else ("optwatch_shard_contribution", "optwatch_layer_shard_contribution")
            ):
                self._table.clear(name, scope)
        for (quantity, layer), value in (record.shard_sums or {}).items():
            if layer:
                self._table.set("optwatch_layer_shard_contribution", value, layer, quantity, scope=scope)
            else:
                self._table.set("optwatch_shard_contribution", value, quantity, scope=scope)

    def _groups(self, record: StepRecord, scope: tuple[str, ...]) -> None:
        if len(record.learning_rates) > self._max_groups and not self._groups_said:
            self._groups_said = True
            logger.warning(
                "optwatch: %d parameter groups; learning rates of the first %d are exported (Settings.max_groups)",
                len(record.learning_rates),
                self._max_groups,
            )
        for group, rate in enumerate(record.learning_rates[: self._max_groups]):
            self._table.set("optwatch_learning_rate", rate, str(group), scope=scope)
        for group, decay in enumerate(record.weight_decays[: self._max_groups]):
            self._table.set("optwatch_weight_decay", decay, str(group), scope=scope)

    def incident(self, optimizer: str, first_steps: dict[str, tuple[int, str]]) -> None:
        """Say where the present non-finite incident began: step and layer by source."""
        scope = (optimizer,) if self._scoped else ()
        self._table.clear("optwatch_nonfinite_first_step", scope)
        for source, (step, layer) in first_steps.items():
            self._table.set("optwatch_nonfinite_first_step", step, source, layer, scope=scope)

    def event(self, event: Event) -> None:
        """Count the event, and the spike that it may be."""
        optimizer = event.details.get("optimizer", "")
        scope = (optimizer,) if self._scoped else ()
        self._table.add("optwatch_events_total", 1, event.kind, event.severity, scope=scope)
        if event.kind in ("loss_spike", "grad_spike"):
            self._table.add("optwatch_spikes_total", 1, event.details["signal"], scope=scope)


class Latest:
    """The values that a heartbeat carries."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.values: dict[str, float] = {}

    def record(self, record: StepRecord) -> None:
        """Keep what a list of runs shows."""
        values = {
            "loss": record.loss,
            "grad_norm": record.grad_norm,
            "learning_rate": max(record.learning_rates, default=None),
        }
        self.step = record.step
        self.values = self.values | {name: value for name, value in values.items() if value is not None}

    def event(self, event: Event) -> None:
        """Events travel as messages of their own."""

    def beat(self) -> dict[str, Any]:
        """The part of a heartbeat that this knows."""
        return {"step": self.step, "values": self.values}
