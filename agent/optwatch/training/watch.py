"""The watch on one optimizer: its hooks on the training thread, which launch reductions and enqueue one packed row.

Nothing here waits for the device, takes a contended lock, does input or output, or raises into training.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optwatch import state
from optwatch.faults import Faults
from optwatch.parallel import deepspeed
from optwatch.parallel.checksums import Checked, Checks
from optwatch.settings import Settings

from . import closures, compiling, rows
from .activations import Activations
from .losses import Losses
from .readings import Readings, first_parameter
from .skipping import Skipping
from .taps import MicroBatch
from .transfer import Moment
from .update import Update


class Watch:
    """Watches one optimizer. `enqueue` receives a finished `rows.Row` and must neither block nor raise."""

    def __init__(
        self,
        optimizer: Optimizer,
        name: str,
        model: nn.Module | None,
        losses: Losses,
        settings: Settings,
        faults: Faults,
        enqueue: Callable[[rows.Row], None],
        activations: Activations | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.name = name
        self.steps = 0
        self.dropped_rows = 0
        self.hook_seconds = 0.0
        self._guarded_seconds = 0.0
        self.sample_next = False
        """Set by the host thread: read weights and moments at the next step, whatever the cadence."""
        self.stretch = 1
        """Set by the host thread: steps between two readings of a part of the weights and moments."""
        self.gradient_interval = 1
        """Set by the host thread: steps between two readings of the gradients."""
        self._gradient_seconds = 0.0
        self._seconds_sent = (0.0, 0.0)
        self._model = model
        self._losses = losses
        self._activations = activations
        self._skipping = Skipping(optimizer, name, self._refuses) if settings.skip_nonfinite_steps else None
        self._settings = settings
        self._faults = faults
        self._enqueue = enqueue
        self._pid = os.getpid()
        self._reader = state.reader_for(optimizer)
        self._readings: Readings | None = None
        self._due: list[int] = []
        self._ended: Moment | None = None
        self._row: rows.Row | None = None
        self._reads: Readings
        """What reads into that row, also where parameters are added before it is sent."""
        self._written: Tensor
        self._place: Tensor
        self._clipped: tuple[list[int], Tensor] | None = None
        self._stepper: Optimizer | None = None
        self._stepped = False
        self._told: Tensor | None = None
        self._closure = False
        self._awaits_gradients = False
        self._unscaled = False
        self._said: set[type[Exception]] = set()
        self._loads = 0
        self.on_load: Callable[[], None] | None = None
        """Called after every load_state_dict."""
        self._first_pass: list[MicroBatch] = []
        self._began_empty = False
        self._last_started: float | None = None
        self._first_step = self._own_step()
        base = closures.base_optimizer(optimizer)
        self._has_base = base is not None
        self._view = optimizer if isinstance(optimizer, deepspeed.View) else None
        self._undo: list[Callable[[], None]] = []
        for stepping in filter(None, (optimizer, base)):
            hooks = map(self._measured, (self._before_step, self._after_step))
            before, after = (compiling.hook(work, self._left_out) for work in hooks)
            self._undo.append(stepping.register_step_pre_hook(before).remove)
            self._undo.append(stepping.register_step_post_hook(after).remove)
        # No hook: bitsandbytes and wrappers have a load_state_dict of their own, which runs none.
        self._undo.append(closures.after_method(optimizer, "load_state_dict", lambda: self._guarded(self._load)))
        if hasattr(optimizer, "first_step"):
            self._undo.append(closures.after_method(optimizer, "first_step", self._first_step_taken))

    def remove(self) -> None:
        """Take the hooks off the optimizer again."""
        for undo in self._undo:
            undo()
        if self._skipping is not None:
            self._skipping.remove()

    def _own_step(self) -> int:
        """The optimizer's own step count, 0 where it keeps none. Synchronises where the count is on a device: this is
        read when attaching and after load_state_dict, never in a step."""
        return self._reader.own_step(state.holder(self.optimizer))

    def _load(self) -> None:
        self._loads += 1
        self._first_step = self._own_step() - self.steps
        if self._readings is not None:
            self._readings.state_shape = ()
        if self.on_load is not None:
            self.on_load()

    def _guarded(self, work: Callable[..., None], *arguments: Any) -> None:
        """Run `work`, measure it, and count what it raises instead of letting training see it."""
        if os.getpid() != self._pid:
            return  # a forked child has none of our threads: watching there would only fill memory
        began = time.perf_counter()
        try:
            with torch.no_grad():
                work(*arguments)
        except Exception as error:  # noqa: BLE001 - never hurt the run
            self._faults.record("hook", error)
        finally:
            took = time.perf_counter() - began
            self._guarded_seconds += took
            self.hook_seconds += took

    def _measured(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """A hook whose own time is measured as well, beside that of the guarded work in it."""

        @functools.wraps(hook)
        def measured(*arguments: Any) -> Any:
            guarded, began = self._guarded_seconds, time.perf_counter()
            result = hook(*arguments)
            self.hook_seconds += time.perf_counter() - began - (self._guarded_seconds - guarded)
            return result

        return measured

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before ``step`` of the optimizer, or of the base optimizer that it steps. See `closures`."""
        if self._taken_over() or self._capturing():
            return None
        if self._stepper is not None and optimizer is not self._stepper:
            self._guarded(self._base_steps)
            return None
        closure = closures.given(args, kwargs)
        self._stepper, self._stepped = optimizer, True
        self._closure = self._awaits_gradients = closure is not None
        self.steps += 1
        if self._skipping is not None and self._skipping.on_device and closure is None:
            self._guarded(self._tell)
        # An optimizer that is handed the scaler itself takes scaled gradients and unscales them within its step.
        self._guarded(self._begin, closure is None and kwargs.get("grad_scaler") is None)
        if closure is None:
            return None
        return closures.replaced(args, kwargs, closures.followed(closure, lambda: self._guarded(self._evaluated)))

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if optimizer is self._stepper:
            self._stepper = None
            if self._skipping is not None:
                self._skipping.stepped()
            self._guarded(self._end)

    def clipping(self, parameters: list[Tensor]) -> None:
        """Read the gradients of ours among `parameters`, which are about to be clipped."""
        if self._taken_over() or self._capturing():
            return
        self._guarded(self._read_before_clip, parameters)

    def unscaled(self) -> None:
        """A GradScaler has divided the gradients by its scale."""
        self._unscaled = True

    def scaler_stepped(self) -> None:
        """A GradScaler has let the optimizer step, or has not."""
        if not self._stepped and not self._capturing():
            self._guarded(self._skip)
        self._stepped = self._unscaled = False

    def _first_step_taken(self) -> None:
        """SAM has moved the weights aside: the losses from here to its step are not those at the weights."""
        if self._stepper is None:
            self._first_pass = self._losses.take()

    def _left_out(self) -> None:
        """The step is compiled into one graph, which cannot hold the hooks."""
        self._say_once(compiling.WholeGraphError())

    def _say_once(self, error: Exception) -> None:
        """Count a reason for which something of this optimizer is not exported, the first time."""
        if type(error) not in self._said:
            self._said.add(type(error))
            self._faults.record("hook", error)

    def _taken_over(self) -> bool:
        """Whether DeepSpeed steps copies of these parameters: then this optimizer's own steps are none."""
        return self._readings is not None and self._readings.taken_over

    def _capturing(self) -> bool:
        """Whether this is being captured into a CUDA graph, which is to hold nothing of ours. Its replays run no
        Python: steps are not seen then, and what is exported is what needs no hook."""
        if first_parameter(self.optimizer).device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            return False
        self._say_once(CapturedStepError(self.name))
        return True

    def _begin(self, gradients: bool) -> None:
        """Before the step: losses, gradients and rates, as the step uses them. A step destroys some of them."""
        losses, self._first_pass = self._first_pass, []
        if losses:
            self._losses.drop()
        elif self._closure or self._has_base:  # it makes its losses itself, unless some came in before it
            losses = self._losses.take()
        else:
            losses = self._losses.claim()
        if self._closure:
            self._clipped = None  # of a gradient that this step does not use
        row = self._open_row(losses)
        if row is None:
            return
        readings = self._reads
        self._due, row.completes = readings.schedule.due(self.steps, self.stretch)
        if self.sample_next:
            self._due, row.completes = readings.schedule.everything, True
        row.sampled = bool(self._due) or row.completes
        self.sample_next = False
        self._began_empty = self.steps == 1 and state.is_empty(self.optimizer)
        scale, found_inf = getattr(self.optimizer, "grad_scale", None), getattr(self.optimizer, "found_inf", None)
        if isinstance(scale, Tensor):
            row.has_grad_scale = True
            self._written[1].copy_(scale.reshape(()), non_blocking=True)
        if isinstance(found_inf, Tensor):
            row.has_found_inf = True
            self._written[2].copy_(found_inf.reshape(()), non_blocking=True)
            row.refuses = found_inf is self._told
        # With a closure the gradients of this step do not exist yet; what is in .grad belongs to the step before.
        copying = readings.update if self._measures_update(row, readings) else None
        read = gradients and self._view is None and self._read_gradients(copying=copying)
        if readings.breaks(row):
            row.broken_before = readings.broken_state()
        if copying is not None and not read:
            with readings.reducer.together():
                copying.before()

    def _measures_update(self, row: rows.Row, readings: Readings) -> bool:
        update = readings.update
        return update is not None and (row.completes or (update.rotates and self.steps % self.stretch == 0))

    def _gradient_sums(self) -> Tensor:
        """Sums of squares of the gradients that the step is about to use: NaN or infinite where one of them is."""
        readings = self._current()
        return readings.reducer.square_sums(readings.gradients()[1])

    def _tell(self) -> None:
        self._told = None  # also where what follows fails
        assert self._skipping is not None  # noqa: S101 - the caller has asked
        self._told = self._skipping.tell(self._gradient_sums())

    def _refuses(self) -> bool:
        """Before a step on a CPU: whether it is to be left out; then its row is sent as that of a skipped one."""
        said: list[bool] = []
        self._guarded(lambda: said.append(not math.isfinite(self._gradient_sums().sum().reshape(1).tolist()[0])))
        if said != [True]:
            return False
        self._stepped = True
        self._guarded(self._skip, True)
        return True

    def _skip(self, refused: bool = False) -> None:
        """A GradScaler has found an overflow, and its optimizer has taken no step; or we have `refused` it."""
        self.steps += 1
        if (row := self._open_row(self._losses.claim())) is not None:
            row.skipped, row.refuses = True, refused
            self._read_gradients()
            self._send(row)

    def _base_steps(self) -> None:
        """The base optimizer is about to step with the gradients that are there now."""
        if self._row is not None and not self._row.micro_batches:
            self._give_losses(self._row, self._losses.claim()[:1])  # of the first pass, which is at the weights
        self._read_gradients(None if self._view is None else self._view.stepped_now())

    def _evaluated(self) -> None:
        """The closure has returned: its first evaluation has the gradient of this step, and the loss where none was
        known before."""
        if self._row is None or not self._awaits_gradients:
            return
        self._awaits_gradients = False
        if not self._row.micro_batches:
            self._give_losses(self._row, self._losses.take())
        self._read_gradients()

    def _open_row(self, micro_batches: list[MicroBatch]) -> rows.Row | None:
        """The row of this step with its rates and losses; None, and counted, where the host is too far behind."""
        if self._row is not None:  # the step before raised between its hooks
            self._reads.ring.give_back(self._place)
            self._row = None
        self._reads = readings = self._current()
        if readings.taken_over:
            return None
        taken = readings.ring.take()
        now, wall = time.perf_counter(), time.time()
        duration = None if self._last_started is None else now - self._last_started
        self._last_started = now
        if taken is None:
            self.dropped_rows += 1
            return None
        self._written, self._place = taken
        groups = self.optimizer.param_groups
        step = self._first_step + self.steps
        rates = [self._reader.learning_rate(group, step) for group in groups]
        self._row = row = rows.Row(
            layout=readings.layout,
            values=self._written,
            step=step,
            optimizer=self.name,
            count=self.steps,
            started=wall,
            duration=duration,
            ring=readings.ring,
            sampled=False,
            completes=False,
            loads=self._loads,
            learning_rates=[],
            weight_decays=[_number(group.get("weight_decay")) or 0.0 for group in groups],
            betas2=[self._reader.beta2(group) for group in groups],
            epsilons=[self._reader.epsilon(group) for group in groups],
            late_correction=self._reader.late_correction(),
            exact_rate=self._reader.rate_is_exact(groups),
        )
        self._write_rates(row, rates)
        self._give_losses(row, micro_batches)
        return row

    def _give_losses(self, row: rows.Row, batches: list[MicroBatch]) -> None:
        row.micro_batches = batches
        if self._activations is not None:
            row.trace = self._activations.claim()
            self.hook_seconds += self._activations.spent()
        self.hook_seconds += self._losses.spent()
        if batches:
            if len(batches) == 1:
                self._written[0].copy_(batches[0].loss, non_blocking=True)
            else:
                torch.sum(torch.stack([batch.loss.to(self._written) for batch in batches]), 0, out=self._written[0])
            if (scale := batches[-1].scale) is not None:
                row.has_scale = True
                self._written[3].copy_(scale, non_blocking=True)

    def _write_rates(self, row: rows.Row, rates: list[float | Tensor | None]) -> None:
        """Learning rates by group, those that are tensors by way of the device; none where any is unavailable."""
        row.learning_rates = [] if None in rates else [None if isinstance(x, Tensor) else x for x in rates]
        for i, rate in enumerate(rates):
            if isinstance(rate, Tensor):
                row.layout.learning_rates(self._written)[i].copy_(rate.detach(), non_blocking=True)

    def _read_gradients(self, wanted: set[int] | None = None, copying: Update | None = None) -> bool:
        """Read the gradients into the row that is open, if one is and they are due: see `Readings.read_gradients`."""
        row = self._row
        if row is None or self.steps % self.gradient_interval:
            return False
        began = time.perf_counter()
        if not self._reads.read_gradients(row, self._due, wanted, copying):
            return False
        if self._clipped is not None:
            present, sums = self._clipped
            row.place(("gradient_before_clip",), present).write(sums)
            self._clipped = None
        self._gradient_seconds += time.perf_counter() - began
        return True

    def _read_before_clip(self, parameters: list[Tensor]) -> None:
        if (self.steps + 1) % self.gradient_interval:
            return
        began = time.perf_counter()
        readings = self._current()
        present, gradients = readings.gradients({id(p) for p in parameters})
        if not present:
            return
        sums = readings.reducer.square_sums(gradients)
        if (scale := self._losses.scale) is not None and not self._unscaled:
            sums = sums / scale.to(sums).square()
        if self._clipped is not None:  # groups clipped one after the other
            present, sums = self._clipped[0] + present, torch.cat([self._clipped[1], sums])
        self._clipped = (present, sums)
        self._gradient_seconds += time.perf_counter() - began

    def _end(self) -> None:
        """After the step: weights and moments on sampled steps, then the row goes on its way."""
        row = self._row
        if self._closure or self._has_base:
            self._losses.drop()  # those of further evaluations, which are of this step
            self._clipped = None
        if row is None:
            return
        readings = self._reads
        try:
            self._read_state(row, readings)
            if readings.checks is not None:
                row.checked = self._checked(readings.checks, row)
            if self._reader.rate_after:
                self._write_rates(row, [self._reader.learning_rate(g, row.step) for g in self.optimizer.param_groups])
            row.fresh_state = self._began_empty and not state.is_empty(self.optimizer)
        finally:  # what could not be read loses nothing that was
            self._send(row)

    def _checked(self, checks: Checks, row: rows.Row) -> Checked:
        """What is to be compared with other ranks. Between a step and the backward pass whose gradients are exchanged a
        rank of whole replicas waits for no other; with shards it does, so that its own time cannot be told."""
        checked = checks.take(self.steps, self.optimizer)
        began = row.micro_batches[-1].began if row.micro_batches else None
        if self._ended is not None and began is not None and not self._reads.in_parts:
            checked.own = (self._ended, began)
        self._ended = Moment(row.layout.device)
        return checked

    def _send(self, row: rows.Row) -> None:
        self._row = None
        total = (self.hook_seconds, self._gradient_seconds)
        if not self._reads.in_parts and not row.layout.partitioned:
            row.seconds = (total[0] - self._seconds_sent[0], total[1] - self._seconds_sent[1])
        self._seconds_sent = total
        rows.send(row, self._written, self._place)
        self._enqueue(row)

    def _read_state(self, row: rows.Row, readings: Readings) -> None:
        """Read what the step has made of weights and moments."""
        try:
            with readings.reducer.together():
                if self._view is not None and self._view.skipped:
                    row.skipped = True
                elif readings.update is not None:
                    readings.update.after(self._written[2] if row.has_found_inf else None)
                if row.sampled:
                    readings.read_state(row, self._due)
        finally:  # a moment that cannot be read costs no update
            if row.completes:
                readings.complete(row)

    def _current(self) -> Readings:
        """What reads the parameters, made anew when groups or parameters have been added, or the parameters moved."""
        if self._readings is None or not self._readings.of(self.optimizer):
            self._readings = Readings(
                self.optimizer, self.name, self._model, self._reader, self._settings, self._say_once
            )
            self._clipped = None
        return self._readings


class CapturedStepError(RuntimeError):
    """A step is captured into a CUDA graph."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name}.step() is being captured into a CUDA graph. Its replays run no Python, so its steps, losses and "
            "norms are not exported; what is given to monitor.log(), the device's memory and its utilisation are. Take "
            "optimizer.step() out of the graph to have them all"
        )


def _number(value: object) -> float | None:
    """A hyper-parameter as a number; None for one that is absent or a tensor, which would have to be waited for."""
    return float(value) if isinstance(value, (int, float)) else None
