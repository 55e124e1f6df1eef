"""All detectors over the steps of one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from optwatch.events import Event
from optwatch.record import StepRecord
from optwatch.settings import Settings

from . import explain
from .divergence import DivergenceDetector
from .drift import DriftDetector
from .nonfinite import NonFiniteDetector
from .plateau import PlateauDetector
from .schedule import ScheduleDetector
from .spike import SpikeDetector


class Detectors:
    """All detectors over the records of one optimizer, in the order in which their events should be read.

    Each is on its own: what one raises is handed to `on_fault`, and costs neither the others' events nor its own next
    ones. ``resumed_from`` is what the run says it goes on from, if it does.
    """

    def __init__(self, settings: Settings, resumed_from: str | None, on_fault: Callable[[Exception], None]) -> None:
        self._on_fault = on_fault
        self._resumed_from = resumed_from
        self.nonfinite = NonFiniteDetector()
        window, rarity, warmup = settings.spike_window, settings.spike_rarity, settings.spike_warmup_steps
        self._loss = SpikeDetector(window, rarity, settings.spike_min_increase, warmup)
        self._grad_norm = SpikeDetector(window, rarity, settings.grad_spike_min_increase, warmup)
        self._drift = DriftDetector(settings.drift_deviations)
        self._divergence = DivergenceDetector(settings.divergence_steps)
        self._plateau = PlateauDetector(settings.plateau_steps)
        self._schedule = ScheduleDetector(warmup)

    def observe(self, record: StepRecord) -> list[Event]:
        """Take the next record; the events that begin with it."""
        events: list[Event] = []
        for detect in (
            self._fresh_state,
            self.nonfinite.observe,
            self._rates,
            self._losses,
            self._grad_norms,
        ):
            try:
                events.extend(detect(record))
            except Exception as error:  # noqa: BLE001 - a NaN's page must not be lost to a fault elsewhere
                self._on_fault(error)
        return events

    def _fresh_state(self, record: StepRecord) -> Iterator[Event]:
        if self._resumed_from is not None and record.fresh_state:
            yield explain.fresh_state(record, self._resumed_from)

    def _rates(self, record: StepRecord) -> Iterator[Event]:
        if jump := self._schedule.observe(record.learning_rates):
            yield explain.schedule_jump(record, jump)

    def _losses(self, record: StepRecord) -> Iterator[Event]:
        step, loss = record.step, record.loss
        if loss is None:
            return
        watched = self._divergence.open
        if spike := self._loss.observe(step, loss):
            self._divergence.begin(step, spike.level, spike.limit)
            yield explain.spike(record, spike, "loss")
        # One rise is told once: while a spike or drift is being watched, the level may do as it likes.
        if drift := self._drift.observe(step, loss, self._loss, silent=self._divergence.open):
            self._divergence.begin(step, drift.best, drift.limit)
            yield explain.drift(record, drift)
        if divergence := self._divergence.observe(step, loss):
            yield explain.divergence(record, divergence)
        if watched and not self._divergence.open:
            self._drift.accept(step)
        rate = max(record.learning_rates, default=None)
        if plateau := self._plateau.observe(step, loss, rate):
            yield explain.plateau(record, plateau)

    def _grad_norms(self, record: StepRecord) -> Iterator[Event]:
        # Clipping hides a gradient spike at the step: what was there before it is what jumped.
        norm = record.grad_norm if record.grad_norm_before_clip is None else record.grad_norm_before_clip
        if norm is not None and (spike := self._grad_norm.observe(record.step, norm)):
            yield explain.spike(record, spike, "grad_norm")

    def _kept(self) -> dict[str, Any]:
        return {
            "loss": self._loss,
            "grad_norm": self._grad_norm,
            "drift": self._drift,
            "divergence": self._divergence,
            "plateau": self._plateau,
        }

    def state_dict(self) -> dict[str, Any]:
        """What they know of the run so far, in plain numbers that JSON can carry: a resumed run goes on from it.

        Learning rates and incidents of NaN are not in it: a resume begins those anew."""
        return {name: detector.state_dict() for name, detector in self._kept().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave; parts that it does not have begin anew.

        Raises:
            KeyError, TypeError, ValueError: it is of another form. Do not use these detectors any further then.
        """
        for name, detector in self._kept().items():
            if name in state:
                detector.load_state_dict(state[name])
