"""The monitor: what `attach` returns, and the one place where the agent's parts are wired together."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from .delivery.reporter import Reporter
from .delivery.uploads import Recorder
from .events import Event
from .export.devices import Device
from .export.exporter import Exporter
from .export.sinks import Latest, Sink, TableSink
from .export.table import Table
from .faults import Faults
from .host.batches import BATCH_ID
from .host.detection import Detection
from .host.restraint import Pace
from .host.targets import TargetWatch
from .host.thread import Host, Logged
from .lifecycle import failures
from .lifecycle.checkpoints import Checkpoint, Written
from .lifecycle.ending import ENDING, Outcome
from .lifecycle.preflight import Preflight
from .lifecycle.run import Run, optimizer_names
from .memory import exhausted
from .resume.audit import Audit
from .settings import Settings, Target
from .training import taps
from .training.activations import Activations
from .training.layers import found_models
from .training.losses import Losses
from .training.readings import first_parameter
from .training.taps import MicroBatch
from .training.transfer import Arrival, host_place
from .training.watch import Watch

logger = logging.getLogger("optwatch")
Status = Literal["succeeded", "failed", "cancelled"]


class Monitor:
    """Watches the optimizers of one run from `attach` to `detach`. Made by `optwatch.attach`."""

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        *,
        model: nn.Module | None,
        run: Run,
        target: Target | None,
        server: str | None,
        port: int,
        settings: Settings,
    ) -> None:
        self.run = run
        self.faults = Faults()
        self._finished = False
        self._in_place_told = False
        self._attached = True
        self._pid = os.getpid()
        self._stop_lock = threading.Lock()
        names = optimizer_names(optimizers)
        scoped = len(optimizers) > 1
        self._table = Table({"run_id": run.id, "rank": str(run.rank)})
        self._table.begin([(name,) for name in names] if scoped else [()])
        self._table.set("optwatch_run_info", 1, *run.labels().values())
        self._table_sink = TableSink(self._table, scoped, settings.max_groups)
        self._latest = Latest()
        self.sinks: list[Sink] = [self._table_sink, self._latest]
        """Who gets every record and event, on the host thread. Further sinks may be appended."""
        self._recorder = Recorder(run, server, settings, self.faults) if settings.blackbox_bytes else None
        if self._recorder:
            self.sinks.append(self._recorder.box)
        self._losses = Losses()
        compiled = settings.kernel == "auto"
        watches_layers = settings.activations == "on"
        self._activations = Activations(self.faults, run.world_size > 1, compiled) if watches_layers else None
        models = found_models(optimizers, model) if self._activations else []
        self._watches: dict[int, Watch] = {}
        self._host = Host(
            settings,
            self.faults,
            self._table,
            self.sinks,
            on_event=self._raise,
            on_incident=self._incident,
            on_value=TargetWatch(target, self._table).value,
            detection=Detection(settings, run.id, run.rank, run.resumed_from, target, self.faults),
        )
        self._settings = settings
        self._optimizer = names[0]
        self._device = Device(first_parameter(optimizers[0]).device)
        self._exhausted: failures.Exhausted | None = None
        self._reporter: Reporter | None = None
        # Where attach() raises it leaves nothing behind: no hook, no port, and no run that the server waits for.
        with ExitStack() as undo:
            for optimizer, name in zip(optimizers, names, strict=True):
                watch = Watch(
                    optimizer, name, model, self._losses, settings, self.faults, self._host.items.put, self._activations
                )
                undo.callback(watch.remove)
                self._watches[id(optimizer)] = watch
            if self._activations is not None:
                undo.callback(self._activations.remove)
                for found in models:
                    self._activations.watch(found, settings.max_layers)
            self._exporter = Exporter(self._table, self._refresh, settings.address, port, self.faults)
            undo.callback(self._exporter.close)
            if server:
                self._reporter = Reporter(server, run, settings, self.faults, self._latest.beat, self._exporter.port)
            undo.pop_all()
        if self._recorder:
            self._recorder.start()
        self._audit = Audit(
            {watch.name: watch for watch in self._watches.values()}, model, run, self._host.items.put, self.faults
        )
        self.sinks.append(self._audit)
        for watch in self._watches.values():
            watch.on_load = self._audit.loaded
        taps.listen(self)
        exhausted.listen(self)
        self._host.optimizers, self._host.on_pace = len(optimizers), self._set_pace
        self._host.start()
        atexit.register(self._at_exit)
        ENDING.watch()
        by_name = dict(zip(names, optimizers, strict=True))
        preflight = Preflight(by_name, self._table, settings, self.faults, self._host.items.put)
        preflight.memory(run.world_size)
        # Every rank has the same configuration: one tells of it.
        if run.rank == 0 and (configuration := preflight.audit(model)) is not None:
            self.sinks.append(configuration)
        where = f"{self.url}, run page {self._reporter.run_url}" if self._reporter else self.url
        logger.info("optwatch: run %s, metrics on %s", run.id, where)

    @property
    def url(self) -> str:
        """Where /metrics is served, seen from this machine."""
        return self._exporter.url

    @property
    def run_url(self) -> str | None:
        """The run's page on the server; None without a server."""
        return self._reporter.run_url if self._reporter else None

    def log(self, **values: float | Tensor | str) -> None:
        """Export values of your own: numbers, or tensors with one element on any device.

        Never synchronises: a tensor is copied on its device and read when it has arrived. ``tokens`` adds to a counter;
        ``loss`` replaces the captured loss (log it before ``optimizer.step()``, after which it counts for the next
        step); ``batch_id``, a number or a text, likewise names the batch for the events of its step and is no metric;
        any other name becomes ``optwatch_reported{name=...}``, for at most 20 names. A value that is no number is
        counted as a fault and left out; nothing is raised.
        """
        for name, value in values.items():
            try:
                self._host.items.put(_logged(name, value))
            except Exception as error:  # noqa: BLE001 - never hurt the run
                self.faults.record("hook", error)

    def snapshot(self) -> dict[str, float]:
        """Latest values by series, such as ``optwatch_loss`` or ``optwatch_grad_norm{stage="at_step"}``.

        What the host thread has handled so far; `flush` first for everything up to now.
        """
        self._refresh()
        return self._table.snapshot()

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until every step so far has arrived on the host and been handled; False if `timeout` seconds passed."""
        deadline = time.monotonic() + timeout
        self._audit.wait(timeout)
        done = threading.Event()
        self._host.items.put(done)
        return done.wait(max(0.0, deadline - time.monotonic()))

    def finish(self, status: Status = "succeeded", reason: str | None = None) -> None:
        """Tell the server that the run has ended, once; later calls do nothing. Training may go on being exported.

        Without it a run ends with its process: ``succeeded``, ``failed`` with the exception that ended it, or
        ``cancelled`` by a keyboard interrupt.

        Raises:
            ValueError: the status is none of the three.
        """
        if status not in ("succeeded", "failed", "cancelled"):
            raise ValueError(f"finish({status!r}): give 'succeeded', 'failed' or 'cancelled'")
        self._finish(Outcome(status, reason, "crashed" if status == "failed" else None))

    def _finish(self, outcome: Outcome) -> None:
        if self._finished or os.getpid() != self._pid:  # a forked child speaks for no run
            return
        self._finished = True
        self._host.detection.finished()
        self.flush(self._settings.exit_timeout_seconds)
        if outcome.cause is not None:
            held = self._exhausted or self._memory_held()
            # On this thread: the event goes before the run's end, whatever the host thread is busy with.
            self._host.hand_on_events([failures.run_failed(outcome, self._step(), held, self._optimizer)])
        if self._reporter:
            self._reporter.finish(outcome.status, outcome.reason, self._host.last_step, outcome.cause)

    def out_of_memory(self, asked: int) -> None:
        """Called by CUDA's allocator as an allocation fails: see `memory.exhausted.Listener`.

        Kept for the end of the run, if this ends it: training may catch it, and try with less.
        """
        try:
            self._exhausted = self._memory_held(asked)
            logger.warning("optwatch: out of memory: %s", failures.told(self._exhausted.parts))
        except Exception as error:  # noqa: BLE001 - never hurt the run
            self.faults.record("hook", error)

    def _memory_held(self, asked: int | None = None) -> failures.Exhausted:
        memory = self._device.memory()
        optimizers = [watch.optimizer for watch in self._watches.values()]
        return failures.Exhausted(exhausted.parts(optimizers, memory.get("allocated")), memory, asked)

    def _step(self) -> int:
        return self._host.last_step or 0

    def checkpoint(self, path: str | os.PathLike[str]) -> Checkpoint:
        """Record a checkpoint: ``with monitor.checkpoint(path) as checkpoint: torch.save(state, checkpoint.path)``.

        Its success goes to metrics, a failure to the server as an event as well, and for the time of the block the
        server waits longer for heartbeats (``Settings.checkpoint_promise_seconds``). What the block raises goes on its
        way. A fingerprint of model, optimizers, schedulers, scalers and random generators is put beside a checkpoint
        that succeeded, as ``<path>.optwatch-rank0.json`` or within a folder: a run that resumes from it is compared
        with that before its first step, and ``optwatch checkpoint verify PATH`` with no run at all. Like saving, it
        reads every tensor and waits for the device.
        """
        return Checkpoint(path, self._checkpoint_began, self._checkpoint_ended)

    def _checkpoint_began(self) -> None:
        self._host.detection.announce(True)
        if self._reporter:
            self._reporter.promise((self._settings.checkpoint_promise_seconds, "writing a checkpoint"))

    def _checkpoint_ended(self, written: Written) -> None:
        self._host.detection.announce(False)
        if not written.error:
            self.flush()
            self._audit.saved(written.path, self._step())
            # On the host thread, whose the detectors are.
            self._host.items.put(lambda: self._host.detection.keep_with(written.path))
        if self._reporter:
            self._reporter.promise(None)
        result = "failed" if written.error else "succeeded"
        self._table.add("optwatch_checkpoints_total", 1, result)
        self._table.set("optwatch_last_checkpoint_timestamp_seconds", time.time(), result)
        if written.error:
            self._host.items.put(failures.checkpoint_failed(written, self._step(), self._optimizer))
        elif written.in_place and not self._in_place_told:  # a habit, told once
            self._in_place_told = True
            self._host.items.put(failures.checkpoint_in_place(written, self._step(), self._optimizer))

    def detach(self) -> None:
        """Stop watching: hooks, wrapped functions, threads and the port are given back, as if never attached.

        A run not finished by then is reported as succeeded. Waits for undelivered messages for at most
        ``Settings.exit_timeout_seconds``; what is left stays in the spool.
        """
        with self._stop_lock:
            if not self._attached:
                return
            self._attached = False
        self.finish()
        taps.unlisten(self)
        exhausted.unlisten(self)
        self._audit.close()
        for watch in self._watches.values():
            watch.remove()
        if self._activations is not None:
            self._activations.remove()
        self._host.items.put(None)
        self._host.join(self._settings.exit_timeout_seconds)
        if self._recorder:
            self._recorder.finish(self._settings.exit_timeout_seconds)
        if self._reporter:
            self._reporter.close(self._settings.exit_timeout_seconds)
        if self._recorder:
            self._recorder.close()
        self._exporter.close()
        atexit.unregister(self._at_exit)
        for key in self._watches:
            attached.pop(key, None)

    def backward_done(self, batches: list[MicroBatch], seconds: float) -> None:
        """Called by the taps: see `taps.Listener`."""
        self._losses.add(batches, seconds)

    def clipping(self, parameters: list[Tensor]) -> None:
        """Called by the taps: see `taps.Listener`."""
        for watch in self._watches.values():
            watch.clipping(parameters)

    def unscaled(self, optimizer: Optimizer) -> None:
        """Called by the taps: see `taps.Listener`."""
        if (watch := self._watches.get(id(optimizer))) is not None:
            watch.unscaled()

    def reading(self, path: str) -> None:
        """Called by the taps: see `taps.Listener`."""
        self._audit.resuming(path)

    def scaler_stepped(self, optimizer: Optimizer) -> None:
        """Called by the taps: see `taps.Listener`."""
        if (watch := self._watches.get(id(optimizer))) is not None:
            watch.scaler_stepped()

    def _raise(self, event: Event) -> None:
        """An event from the detectors: it is on the log at once, and on its way to the server."""
        logger.warning("optwatch: %s %s Runbook: %s", event.summary, event.likely, event.runbook)
        if self._reporter:
            self._reporter.event(event)

    def _incident(self, optimizer: str, first_steps: dict[str, tuple[int, str]]) -> None:
        self._table_sink.incident(optimizer, first_steps)
        # Weights tell more of a non-finite loss than anything else: read them at the next step already. Not where other
        # ranks would have to read theirs at the same step.
        for watch in self._watches.values():
            watch.sample_next = not self._host.ranks.read_alike(watch.name)

    def _set_pace(self, optimizer: str, pace: Pace) -> None:
        for watch in self._watches.values():
            if watch.name == optimizer:
                watch.stretch, watch.gradient_interval = pace.stretch, pace.gradient_interval

    def _refresh(self) -> None:
        """Bring what the agent knows of itself into the table: called before a scrape or snapshot is answered."""
        table, watches, reporter = self._table, self._watches.values(), self._reporter
        table.set("optwatch_agent_overhead_seconds_total", sum(watch.hook_seconds for watch in watches), "hook")
        table.set("optwatch_agent_overhead_seconds_total", self._host.seconds, "host")
        restraints = list(self._host.restraints.values())
        stretch = max((restraint.pace.stretch for restraint in restraints), default=1)
        interval = max((restraint.pace.gradient_interval for restraint in restraints), default=1)
        table.set("optwatch_agent_overhead_ratio", sum(restraint.share for restraint in restraints))
        table.set(
            "optwatch_agent_sampling_interval_steps", self._settings.rotation_steps * stretch, "weights_and_moments"
        )
        table.set("optwatch_agent_sampling_interval_steps", interval, "gradients")
        for where, count in list(self.faults.counts.items()):
            table.set("optwatch_agent_errors_total", count, where)
        table.set("optwatch_agent_dropped_total", sum(watch.dropped_rows for watch in watches), "rows")
        table.set("optwatch_agent_dropped_total", reporter.dropped if reporter else 0, "messages")
        table.set("optwatch_agent_undelivered_messages", reporter.undelivered if reporter else 0)
        for kind, size in self._device.memory().items():
            table.set("optwatch_device_memory_bytes", size, kind)
        if (busy := self._device.utilization()) is not None:
            table.set("optwatch_device_utilization_ratio", busy)

    def _at_exit(self) -> None:
        """The process ends: report how, and leave with what could not be delivered on disk."""
        if os.getpid() != self._pid:
            return
        try:
            self._finish(ENDING.result())
            self.detach()
        except Exception as error:  # noqa: BLE001
            self.faults.record("hook", error)


attached: dict[int, Monitor] = {}
"""The monitor of each watched optimizer, by the optimizer's ``id``; an entry holds its optimizer alive."""


def _logged(name: str, value: object) -> Logged:
    """A value on its way to the host thread, copied on its device where it is a tensor."""
    if not isinstance(value, Tensor):
        if name == BATCH_ID and isinstance(value, (str, int)):
            return Logged(name, value)
        if isinstance(value, (str, bytes)):
            raise TypeError(f"monitor.log({name}={value!r}): give a number or a tensor with one element")
        return Logged(name, float(value))  # type: ignore[arg-type]
    if value.numel() != 1:
        raise ValueError(f"monitor.log({name}=tensor of shape {tuple(value.shape)}): give a tensor with one element")
    copied = value.detach().clone().reshape(1)
    place = copied if copied.device.type == "cpu" else host_place(1, copied.dtype, copied.device)
    return Logged(name, place, Arrival(copied, place))
