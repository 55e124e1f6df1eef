"""The host thread: takes rows as they arrive, makes records, runs the detectors and hands on to the sinks."""

from __future__ import annotations

import atexit
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from torch import Tensor

from optwatch.events import Event
from optwatch.export.sinks import Sink
from optwatch.export.table import Table
from optwatch.faults import Faults
from optwatch.parallel import Ranks
from optwatch.parallel.replicas import Replicas
from optwatch.record import StepRecord
from optwatch.settings import Settings
from optwatch.threads import compute_alone
from optwatch.training.rows import Row
from optwatch.training.transfer import Arrival

from .batches import BATCH_ID, BatchIds
from .detection import Detection
from .restraint import Change, Pace, Restraint
from .unpack import Unpacker

MAX_REPORTED = 20
"""Different names that monitor.log() exports."""
IDLE_SECONDS = 1.0
"""Between two looks at whether steps still come."""
logger = logging.getLogger("optwatch")
LEAVE_SECONDS = 5.0
"""Beyond the timeout of ranks that the end of the process waits for a host thread."""
POLL_SECONDS = 0.0005
"""Between two looks at whether a row has come from the device."""


@dataclass(eq=False)
class Logged:
    """One value given to ``monitor.log``."""

    name: str
    value: float | Tensor | str
    arrival: Arrival | None = None


class Host(threading.Thread):
    """One thread for a run. Everything put into it is handled in order; nothing that fails there stops it."""

    def __init__(
        self,
        settings: Settings,
        faults: Faults,
        table: Table,
        sinks: Sequence[Sink],
        on_event: Callable[[Event], None],
        on_incident: Callable[[str, dict[str, tuple[int, str]]], None],
        on_value: Callable[[str, float], None],
        detection: Detection,
    ) -> None:
        super().__init__(name="optwatch-host", daemon=True)
        self.items: queue.SimpleQueue[Row | Logged | Event | Callable[[], None] | threading.Event | None] = (
            queue.SimpleQueue()
        )
        self.seconds = 0.0
        self.optimizers = 1
        """Watched by this run: they share one budget of overhead."""
        self.restraints: dict[str, Restraint] = {}
        self.on_pace: Callable[[str, Pace], None] = lambda optimizer, pace: None
        """Told of an optimizer's new pace."""
        self._settings = settings
        self._faults = faults
        self._table = table
        self._sinks = sinks
        self._on_event = on_event
        self._on_incident = on_incident
        self._on_value = on_value
        self.detection = detection
        self._unpacker = Unpacker(settings.loss_reduction, settings.max_skipped_steps)
        self.ranks = Ranks(settings, faults)
        """The other ranks, where training has several."""
        self._replicas = Replicas(self.ranks)
        self._loss_logged = False
        self._loss: float | None = None
        self._loss_given_to: set[str] = set()
        self._batches = BatchIds()
        self._reported: set[str] = set()
        self.last_step: int | None = None
        _hosts.add(self)

    def run(self) -> None:
        """Handle items until None comes."""
        compute_alone()
        try:
            self._handle()
        finally:
            self.ranks.close()
            self.detection.keep(now=True)

    def leave(self) -> None:
        """Wait until the thread has ended, having put None into it: for the end of the process.

        A wait for a lost rank that is under way goes on to its timeout, and no other one begins.
        """
        self.ranks.leave()
        self.join(self._settings.rank_timeout_seconds + LEAVE_SECONDS)

    def _handle(self) -> None:
        while (item := self._next()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            try:
                if isinstance(item, Row):
                    self._row(item)
                elif isinstance(item, Event):
                    self.hand_on_events([item])
                elif callable(item):
                    item()
                else:
                    self._logged(item)
            except Exception as error:  # noqa: BLE001 - the thread must go on
                self._faults.record("host", error)

    def _next(self) -> Row | Logged | Event | Callable[[], None] | threading.Event | None:
        """The next item; while there is none, look whether training stands still."""
        while True:
            try:
                return self.items.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                self.hand_on_events(self.detection.idle())
                self.detection.keep()

    def _row(self, row: Row) -> None:
        try:
            _wait(row.arrival)
            for arrival in row.trace.arrivals if row.trace else ():
                _wait(arrival)
            began, began_cpu = time.perf_counter(), time.thread_time()
            record = self._unpacker.unpack(row)
            self.ranks.complete(row, record)
            told = self._compared(row)
        finally:
            row.give_back()
        if self._loss_logged:
            # Optimizers that step after one loss (Muon and AdamW) all report it; none reports it twice.
            record.give_loss(None if record.optimizer in self._loss_given_to else self._loss)
            self._loss_given_to.add(record.optimizer)
        self.last_step = record.step
        record.batch_ids = self._batches.of(record.optimizer)
        self._hand_on(record)
        self.hand_on_events(told)
        self.seconds += time.perf_counter() - began
        self._restrain(row, time.thread_time() - began_cpu)

    def _compared(self, row: Row) -> list[Event]:
        """What ranks find out by comparing themselves at this row. A fault there costs the row nothing."""
        try:
            return self._replicas.observe(row)
        except Exception as error:  # noqa: BLE001
            self._faults.record("ranks", error)
            return []

    def _restrain(self, row: Row, seconds: float) -> None:
        """Judge what this step has cost, the host thread's own part of a core included."""
        if row.seconds is None or row.duration is None or self.ranks.read_alike(row.optimizer):
            return
        restraint = self.restraints.get(row.optimizer)
        if restraint is None:
            settings = self._settings
            budget = settings.overhead_budget / self.optimizers
            restraint = Restraint(budget, settings.rotation_steps, settings.rotation_seconds)
            self.restraints[row.optimizer] = restraint
        if change := restraint.observe(row.seconds[0] + seconds, row.seconds[1], row.duration):
            self._say(change)
            self.on_pace(row.optimizer, change.pace)

    def _say(self, change: Change) -> None:
        every = self._settings.rotation_steps * change.pace.stretch
        if not change.for_cost:
            logger.info(
                "optwatch: steps take %.3g s: from now on weights and moments are read over %d of them "
                "(Settings.sample_every=None)",
                change.step_seconds,
                every,
            )
            return
        logger.log(
            logging.WARNING if change.less else logging.INFO,
            "optwatch: the agent took %.2f%% of step time (Settings.overhead_budget=%s): from now on weights and "
            "moments are read over %d steps, gradients at every%s step",
            100 * change.share,
            self._settings.overhead_budget,
            every,
            {1: "", 2: " second"}.get(change.pace.gradient_interval, f" {change.pace.gradient_interval}th"),
        )

    def _hand_on(self, record: StepRecord) -> None:
        """Detectors, then sinks, then events: each on its own, so that one fault loses nothing else."""
        events = self.detection.observe(record)
        if (incident := self.detection.nonfinite(record.optimizer)).asks:
            self._guarded("sink", self._on_incident, record.optimizer, incident.first_steps)
        for sink in list(self._sinks):
            self._guarded("sink", sink.record, record)
        self.hand_on_events(events)
        if record.loss is not None:
            self._guarded("sink", self._on_value, "loss", record.loss)
        self.detection.keep()

    def hand_on_events(self, events: Sequence[Event]) -> None:
        """Give events to every sink and to the reporter. Raises nothing; for the host thread, and the end of a run."""
        for event in events:
            for sink in list(self._sinks):
                self._guarded("sink", sink.event, event)
            self._guarded("sink", self._on_event, event)

    def _guarded(self, where: str, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception as error:  # noqa: BLE001
            self._faults.record(where, error)

    def _logged(self, item: Logged) -> None:
        _wait(item.arrival)
        if item.name == BATCH_ID:
            self._batches.add(item.value)
            return
        value = float(item.value)
        if item.name == "loss":
            # The user says what the loss is: from now on what backward() saw is not asked.
            self._loss_logged = True
            self._loss = value
            self._loss_given_to.clear()
        elif item.name == "tokens":
            if not 0 <= value < math.inf:
                raise ValueError(f"monitor.log(tokens={value}): give the number of tokens since the last time")
            self._table.add("optwatch_tokens_total", value)
        elif item.name in self._reported or len(self._reported) < MAX_REPORTED:
            self._reported.add(item.name)
            self._table.set("optwatch_reported", value, item.name)
            self._guarded("sink", self._on_value, item.name, value)
            self.hand_on_events(self.detection.value(item.name, value))
        else:
            raise ValueError(
                f"monitor.log({item.name}=...): {MAX_REPORTED} different names are exported already; log fewer"
            )


def _wait(arrival: Arrival | None) -> None:
    """Wait on the host thread until a copy has come from its device."""
    while arrival is not None and not arrival.done():
        time.sleep(POLL_SECONDS)


_hosts: WeakSet[Host] = WeakSet()


@atexit.register
def _leave() -> None:
    """A thread that the interpreter's end meets inside torch's C++ takes the process with it (SIGABRT): one that waits
    for a lost rank, of a monitor that was detached long before, too. Runs after every monitor's own exit."""
    for host in list(_hosts):
        if host.is_alive():
            host.leave()
