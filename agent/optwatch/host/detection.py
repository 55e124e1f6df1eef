"""Everything that judges one run on the host thread: the detectors of its optimizers, its validation and its pace."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from optwatch.delivery.spool import default_directory
from optwatch.detectors import Detectors, NonFiniteDetector, StallDetector, ValidationDetector, explain
from optwatch.events import Event
from optwatch.faults import Faults
from optwatch.record import StepRecord
from optwatch.settings import Settings, Target

from .remembered import Remembered

SAVE_SECONDS = 60.0
"""Between two times that what the detectors know is written to disk: a file of some 60 kB for an optimizer."""


class Detection:
    """Takes records and logged values, gives events. Used by one thread, except for `announce` and `finished`.

    What the detectors know is kept in the folder ``detectors`` of the spool, every minute and at the end, and with
    each checkpoint; a run that resumes (`resumed_from`, or the same id) goes on from it: no second warm-up, and a rise
    that was being watched goes on being watched. Where the files are not, as on another machine, it begins anew.
    """

    def __init__(
        self,
        settings: Settings,
        run_id: str,
        rank: int,
        resumed_from: str | None,
        target: Target | None,
        faults: Faults,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._resumed_from = resumed_from
        self._faults = faults
        self._clock = clock
        self._optimizers: dict[str, Detectors] = {}
        self._validation = ValidationDetector(
            settings.validation_min_increase, (target.metric, target.mode) if target else None
        )
        self._stall = StallDetector(settings.stall_seconds)
        self._announced = 0
        self._finished = False
        self._step = 0
        directory = (settings.spool_directory or default_directory()) / "detectors"
        self._remembered = Remembered(directory, run_id, rank)
        self._known: dict[str, Any] = {}
        self._saved_at = clock()
        self._remembered.forget_old()
        try:
            self._known = self._remembered.find(resumed_from) or {}
            self._validation.load_state_dict(self._known.get("validation", {}))
        except Exception as error:  # noqa: BLE001 - what cannot be read is not gone on from
            self._faults.record("spool", error)
            self._validation = ValidationDetector(
                settings.validation_min_increase, (target.metric, target.mode) if target else None
            )

    def observe(self, record: StepRecord) -> list[Event]:
        """Take the next record; the events that begin with it."""
        self._step = record.step
        self._stall.stepped(self._clock())
        return self._of(record.optimizer).observe(record)

    def nonfinite(self, optimizer: str) -> NonFiniteDetector:
        """What knows of the present incident, if there is one."""
        return self._of(optimizer).nonfinite

    def value(self, name: str, value: float) -> list[Event]:
        """Take a value given to ``monitor.log``; the event that begins with it."""
        try:
            found = self._validation.observe(name, value, self._step)
        except Exception as error:  # noqa: BLE001
            self._faults.record("detector", error)
            return []
        return [explain.validation_regression(self._step, time.time(), found)] if found else []

    def announce(self, pausing: bool) -> None:
        """A pause that is meant (writing a checkpoint) begins, or is over. From any thread."""
        if pausing:
            self._announced += 1
        else:
            self._announced -= 1
            self._stall.paused(self._clock())

    def finished(self) -> None:
        """The run has ended: no step is missing any more. From any thread."""
        self._finished = True

    def idle(self) -> list[Event]:
        """To be called now and then while no step comes: the event of a stall, once."""
        if self._announced > 0 or self._finished:
            return []
        found = self._stall.check(self._clock())
        return [explain.stall(self._step, time.time(), found)] if found else []

    def keep(self, now: bool = False) -> None:
        """Write what the detectors know, if it is time or `now`. A fault is counted; nothing is raised."""
        if not self._optimizers or not (now or self._clock() - self._saved_at >= SAVE_SECONDS):
            return
        self._saved_at = self._clock()
        self._guarded(lambda: self._remembered.save(self._state()))

    def keep_with(self, checkpoint: str) -> None:
        """Write it beside a checkpoint that has just been written. A fault is counted; nothing is raised."""
        if self._optimizers:
            self._guarded(lambda: self._remembered.save_with(checkpoint, self._state()))

    def _guarded(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # noqa: BLE001
            self._faults.record("spool", error)

    def _state(self) -> dict[str, Any]:
        optimizers = {name: detectors.state_dict() for name, detectors in self._optimizers.items()}
        return {"optimizers": optimizers, "validation": self._validation.state_dict()}

    def _of(self, optimizer: str) -> Detectors:
        detectors = self._optimizers.get(optimizer)
        if detectors is None:
            detectors = self._new()
            if known := self._known.get("optimizers", {}).get(optimizer):
                try:
                    detectors.load_state_dict(known)
                except Exception as error:  # noqa: BLE001 - half of it may have been taken over
                    self._faults.record("detector", error)
                    detectors = self._new()
            self._optimizers[optimizer] = detectors
        return detectors

    def _new(self) -> Detectors:
        return Detectors(self._settings, self._resumed_from, lambda error: self._faults.record("detector", error))
