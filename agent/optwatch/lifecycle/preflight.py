"""What is looked at once, when attaching: memory that will not do, and a configuration that looks wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.optim import Optimizer

from optwatch.audit import Audit, Subject
from optwatch.events import Event
from optwatch.export.devices import Device
from optwatch.export.table import Table
from optwatch.faults import Faults
from optwatch.memory.forecast import Forecast, forecast, shortage
from optwatch.parallel.deepspeed import in_whole
from optwatch.settings import Settings, listed
from optwatch.training import layers

logger = logging.getLogger("optwatch")


class Preflight:
    """Looks ahead on the thread that attaches, which is the only one that may change the optimizers.

    Everything here is on its own: what fails is counted as a fault, and costs neither the rest nor training anything.
    Waits for no device.
    """

    def __init__(
        self,
        optimizers: Mapping[str, Optimizer],
        table: Table,
        settings: Settings,
        faults: Faults,
        on_event: Callable[[Event], None],
    ) -> None:
        self._optimizers = optimizers
        self._table = table
        self._settings = settings
        self._faults = faults
        self._on_event = on_event

    def memory(self, world_size: int) -> None:
        """Forecast the optimizers' state, export it, and raise an event where it will not fit."""
        self._guarded(lambda: self._memory(world_size))

    def audit(self, model: nn.Module | None) -> Audit | None:
        """Audit the configuration. What is returned wants the records of the first steps; None where all is silent."""
        silent = frozenset(listed(self._settings.audit_silenced))
        if "all" in silent:
            return None
        audits: list[Audit] = []
        self._guarded(lambda: audits.append(self._audit(model, silent)))
        return audits[0] if audits else None

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - never hurt the run
            self._faults.record("hook", error)

    def _audit(self, model: nn.Module | None, silent: frozenset[str]) -> Audit:
        found = layers.find_model(layers.trained(self._optimizers.values())) if model is None else model
        subject = Subject(self._optimizers, found, model is not None)
        audit = Audit(
            subject,
            silent,
            self._settings.loss_reduction == "auto",
            self._table,
            self._on_event,
            lambda error: self._faults.record("detector", error),
        )
        audit.begin(subject)
        return audit

    def _memory(self, world_size: int) -> None:
        wholes = [(name, in_whole(optimizer)) for name, optimizer in self._optimizers.items()]
        forecasts = [forecast(whole, name) for name, whole in wholes if whole is not None]
        for each in forecasts:
            self._export(each)
        if forecasts and (event := shortage(forecasts, _room, world_size)) is not None:
            self._on_event(event)

    def _export(self, found: Forecast) -> None:
        if found.total is None:
            logger.info(
                "optwatch: what %s will keep is unavailable before its first step: %s",
                found.optimizer,
                found.unavailable,
            )
            return
        scope = (found.optimizer,) if len(self._optimizers) > 1 else ()
        self._table.set("optwatch_optimizer_state_forecast_bytes", found.total, scope=scope)


def _room(device: torch.device) -> float | None:
    """Bytes that tensors may still take: what is free, and what the allocator keeps without need."""
    memory = Device(device).memory()
    return memory["free"] + memory["reserved"] - memory["allocated"] if memory else None
