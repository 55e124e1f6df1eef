"""The resume audit of one run: a fingerprint with every checkpoint, and one comparison before the first step after a
resume. Between the two it costs nothing: its hook is on the optimizer only while a comparison is due."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from optwatch.events import Event
from optwatch.faults import Faults
from optwatch.lifecycle.run import Run
from optwatch.record import StepRecord
from optwatch.threads import compute_alone
from optwatch.training import layers
from optwatch.training.watch import Watch

from . import generators, sidecar
from .compare import Comparison, compare
from .findings import Finding, Item
from .fingerprint import Driver, Fingerprint, Subject, Taking, discover, hyperparameters, random_states

logger = logging.getLogger("optwatch")


class Audit:
    """Takes fingerprints of the optimizers of one run, and compares. Nothing that fails in it reaches training.

    ``watches`` are the run's watches by optimizer name; `raise_event` is called on a thread of the audit's own.
    """

    def __init__(
        self,
        watches: Mapping[str, Watch],
        model: nn.Module | None,
        run: Run,
        raise_event: Callable[[Event], None],
        faults: Faults,
    ) -> None:
        self._watches = watches
        self._optimizers = {name: watch.optimizer for name, watch in watches.items()}
        self._model = weakref.ref(model) if model is not None else None
        self._run = run
        self._raise_event = raise_event
        self._faults = faults
        self._generators = generators.states()
        self._begun_with = self._hyperparameters()
        self._expected: tuple[str, Fingerprint, bool] | None = None
        self._seen: list[dict[str, generators.State]] = []
        """States of the generators at moments at which they may just have been restored."""
        self._rates_used: dict[str, list[float]] = {}
        self._drivers: list[weakref.ref[Driver]] = []
        self._handles: list[Any] = []
        self._comparing: threading.Thread | None = None
        if run.resumed_from and self.resuming(run.resumed_from):
            self._arm()

    def record(self, record: StepRecord) -> None:
        """Called for every step, as a sink: keeps the rates that it used."""
        self._rates_used[record.optimizer] = record.learning_rates

    def event(self, event: Event) -> None:
        """Called for every event, as a sink: they are nothing to an audit."""

    def saved(self, path: str, step: int) -> None:
        """A checkpoint has been written: put its fingerprint beside it. Waits for the devices, as saving does.

        Does nothing for a path that is no local one. Costs about two fifths of what torch.save does, on a
        CPU (benchmarks/results/resume.md).
        """
        self._guarded(self._save, path, step)

    def resuming(self, path: str) -> bool:
        """Training reads this checkpoint; if it has a fingerprint, then what is loaded from now on should match it."""
        return bool(self._guarded(self._expect, path))

    def loaded(self) -> None:
        """An optimizer's state has been loaded: compare before the next step, if it is known with what."""
        self._guarded(self._arm)

    def wait(self, timeout: float) -> None:
        """Wait for a comparison under way, for at most `timeout` seconds."""
        if (thread := self._comparing) is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def close(self) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()

    def _guarded(self, work: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return work(*arguments)
        except Exception as error:  # noqa: BLE001 - never hurt the run
            self._faults.record("hook", error)
            return None

    def _save(self, path: str, step: int) -> None:
        if "://" in path:
            return
        fingerprint = self._take(step).result()
        for taken, (name, optimizer) in zip(fingerprint.optimizers, self._optimizers.items(), strict=True):
            begun_with = self._begun_with[name]
            taken.rates_used = self._rates_used.get(name, [])
            for g, (before, now) in enumerate(zip(begun_with, hyperparameters(optimizer), strict=False)):
                taken.scheduled[g] = [key for key, value in now.items() if before.get(key) != value]
        fingerprint.generators = random_states(self._generators)
        sidecar.write(path, fingerprint)

    def _take(self, step: int, *, rounding: bool = False) -> Taking:
        # What drives the optimizers is looked for once, and again when one of them is gone.
        if not self._drivers or not all(ref() for ref in self._drivers):
            self._drivers = [weakref.ref(driver) for driver in discover(self._optimizers.values())]
        subject = Subject(self._optimizers, self._found_model(), [d for ref in self._drivers if (d := ref())])
        run = self._run
        empty = Fingerprint(run.id, run.rank, run.world_size, step, taken_at=time.time())
        return Taking(subject, empty, rounding=rounding)

    def _found_model(self) -> nn.Module | None:
        model = self._model() if self._model is not None else None
        if model is None:
            model = layers.find_model(layers.trained(self._optimizers.values()))
            self._model = None if model is None else weakref.ref(model)
        return model

    def _expect(self, path: str) -> bool:
        if "://" in path or not Path(path).exists():
            return False
        found = sidecar.read(path, self._run.rank)
        if found is None:
            return False
        self._expected = (os.fspath(path), found[0], not found[1])
        return True

    def _arm(self) -> None:
        self._begun_with = self._hyperparameters()
        self._drivers = []
        if self._expected is None:
            return
        self._seen.append(generators.states())
        if not self._handles:
            # After the watch's own hook, so that the watch has counted the step.
            self._handles = [o.register_step_pre_hook(self._before_step) for o in self._optimizers.values()]

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.close()
        self._guarded(self._begin)

    def _begin(self) -> None:
        """On the training thread, once: read everything that the step will change, and leave the rest to a thread."""
        if self._expected is None:
            return
        (path, saved, changed_since), self._expected = self._expected, None
        self._seen.append(generators.states())
        seen, self._seen = self._seen, []
        step = max((watch.steps for watch in self._watches.values()), default=0)
        taking = self._take(step, rounding=True)
        # What a detector tells of at the same step is told once.
        told = [
            name
            for name, watch in self._watches.items()
            if self._run.resumed_from and watch.steps <= 1 and not any(watch.optimizer.state.values())
        ]
        arguments = (path, saved, changed_since, seen, taking, told)
        self._comparing = threading.Thread(
            target=self._guarded, args=(self._compare, *arguments), name="optwatch-resume", daemon=True
        )
        self._comparing.start()

    def _compare(
        self,
        path: str,
        saved: Fingerprint,
        changed_since: bool,
        seen: list[dict[str, generators.State]],
        taking: Taking,
        told: list[str],
    ) -> None:
        compute_alone()
        # Through JSON and back, as the saved one has been.
        found = Fingerprint.from_json(taking.result().as_json())
        outcome = compare(saved, found, changed_since=changed_since)
        if outcome.unrelated:
            logger.info("optwatch: %s has a fingerprint of another state, so nothing was compared with it", path)
            return
        if saved.rank == found.rank:
            outcome.findings += not_restored(saved, seen)
        findings = [f for f in outcome.findings if not (f.fault == "moments_missing" and f.optimizer in told)]
        self._say(path, outcome)
        for finding in findings:
            self._raise_event(finding.event(path, found.step, changed_since))

    def _say(self, path: str, outcome: Comparison) -> None:
        verdict = f"{len(outcome.findings)} faults" if outcome.findings else "all as saved"
        notes = "".join(f"; {note}" for note in outcome.notes[:5])
        logger.info("optwatch: compared %d tensors with %s: %s%s", outcome.compared, path, verdict, notes)

    def _hyperparameters(self) -> dict[str, list[dict[str, Any]]]:
        return {name: hyperparameters(optimizer) for name, optimizer in self._optimizers.items()}


def not_restored(saved: Fingerprint, seen: list[dict[str, generators.State]]) -> list[Finding]:
    """The generators that were at no seen moment where they were saved, or had come from there."""
    items = []
    for name, text in saved.generators.items():
        wanted = generators.State.from_text(text)
        states = {state.text(): state for moment in seen if (state := moment.get(name)) is not None}
        if states and not any(generators.reachable(wanted, state) for state in states.values()):
            what = "a state" if name.startswith("cuda") else f"a state that is not within {generators.MOST_DRAWS} draws"
            items.append(Item(f"generator of {name}", "its state", f"{what} of it"))
    return [Finding("generators_not_restored", tuple(items))] if items else []
