"""The black box: the last 512 steps of every layer, on disk as they happen, for whoever asks why a process died."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from optwatch.events import Event
from optwatch.record import NonFinite, Source, StepRecord

from . import ringfile
from .ringfile import Column, RingFile, Table, Type, Value

if TYPE_CHECKING:
    from optwatch.lifecycle.run import Run  # brings torch, which a reader of black boxes needs not

STEPS = 512
SUFFIX = ".blackbox"
MIN_BYTES = 64 * 2**10
NOTE_BYTES = 2048
NOTES = 64
SPARE_SAMPLES = 16
"""Readings of weights and moments beyond those of the cadence: an incident asks for one at once."""
MAX_LAYOUTS = 64
"""Changes of layers or parameters that rewrite the file; what is new after them is left out."""
KEPT_SECONDS = 14 * 86_400
KEPT_BYTES = 512 * 2**20
"""What dead processes left is deleted when it is older, or more: the oldest first."""

SOURCES: tuple[str, ...] = get_args(Source)
_NUMBERS = tuple(f.name for f in fields(StepRecord) if str(f.type) in ("float | None", "float", "int", "bool"))
_DERIVED = ("learning_rate", "weight_decay", "skipped", "nonfinite_source", "nonfinite_layer")
SCALARS = tuple(name for name in _NUMBERS if name != "fresh_state") + _DERIVED
"""Columns of a step: the numbers of `StepRecord`; the largest learning rate and weight decay of any group; whether a
scaler skipped it; and of the first that was not finite, its kind of tensor (1 + the index in `SOURCES`) and its layer
(the index in the members of ``layer_grad_norm``)."""
_LAYER_SERIES = tuple(f.name for f in fields(StepRecord) if f.name.startswith("layer_") and f.name != "layer_grad_norm")


@dataclass(slots=True)
class _Track:
    """What the black box knows of one optimizer."""

    layers: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    shown: tuple[list[str], list[str]] | None = None
    """The very lists of names that the last record came with: one look tells that nothing has changed."""
    steps: int = -1
    samples: int = -1
    """Where its two rings are in the file."""
    finite: bool = True


class BlackBox:
    """Writes every record and event into one file of a bounded size; a sink. Safe to call from several threads.

    The file is made at the first record and made anew when the layers change. It is kept when the process dies or
    `close` is told to, and else deleted. ``rotation_steps`` is that of the settings.

    Raises:
        ValueError: `max_bytes` is less than 64 KiB.
    """

    def __init__(
        self,
        directory: Path,
        run: Run,
        max_bytes: int,
        rotation_steps: int,
        server: str | None = None,
        on_incident: Callable[[], None] | None = None,
    ) -> None:
        if max_bytes < MIN_BYTES:
            raise ValueError(f"Settings(blackbox_bytes={max_bytes}): give {MIN_BYTES} or more, or 0 for no black box")
        self.path = directory / f"{run.id}-{run.rank}-{uuid.uuid4().hex[:8]}{SUFFIX}"
        self.records = 0
        """Steps written so far."""
        self.incidents = 0
        """Critical events so far."""
        self.failed = False
        self._max_bytes = max_bytes
        self._samples = STEPS // rotation_steps + SPARE_SAMPLES
        self._on_incident = on_incident
        self._lock = threading.Lock()
        self._tracks: dict[str, _Track] = {}
        self._file: RingFile | None = None
        self._layouts = 0
        self._pid = os.getpid()
        self._header: dict[str, Any] = {
            "id": str(uuid.uuid4()),
            "run_id": run.id,
            "run": run.name,
            "project": run.project,
            "rank": run.rank,
            "world_size": run.world_size,
            "optimizer": run.optimizer,
            "host": run.host,
            "pid": run.pid,
            "server": server,
            "began_at": time.time(),
            "versions": run.versions,
            "sources": list(SOURCES),
        }

    def record(self, record: StepRecord) -> None:
        """Write one step: some ten microseconds and one system call, two for a step that reads weights and moments.

        Raises:
            OSError: the disk took it not.
        """
        with self._lock:
            track = self._tracks.get(record.optimizer)
            names = track.shown if track is not None else None
            if track is None or names is None or names[0] is not record.layers or names[1] is not record.parameters:
                track = self._learn(record)
            file = self._file
            if file is None:
                return
            file.write(track.steps, _step(record, track, file.tables[track.steps].columns))
            samples = file.tables[track.samples].columns if track.samples >= 0 else ()
            if any(getattr(record, column.name) is not None for column in samples[1:]):
                file.write(track.samples, _sample(record, track, samples))
            if record.nonfinite and track.finite:
                self._note(_nonfinite_note(record))
            track.finite = not record.nonfinite
            self.records += 1

    def event(self, event: Event) -> None:
        """Write one event; a critical one is an incident."""
        with self._lock:
            self._note(
                {
                    "type": "event",
                    "kind": event.kind,
                    "severity": event.severity,
                    "step": event.step,
                    "occurred_at": event.occurred_at,
                    "optimizer": event.details.get("optimizer", ""),
                    "summary": event.summary,
                    "likely": event.likely,
                    "details": event.details,
                }
            )
        if event.severity == "critical":
            self.incidents += 1
            if self._on_incident is not None:
                self._on_incident()

    def close(self, *, keep: bool) -> None:
        """Stop writing; the file stays, unlocked, or is deleted. Repeating it changes nothing."""
        if os.getpid() != self._pid:  # a forked child: the file is its parent's, and so may the lock be
            return
        with self._lock:
            file, self._file = self._file, None
            self.failed = True  # what comes now is not written, and makes no new file
            if file is not None:
                (file.abandon if keep else file.remove)()

    def _learn(self, record: StepRecord) -> _Track:
        """Take in a layout that is new, and make the file anew where its columns do not hold it."""
        track = self._tracks.setdefault(record.optimizer, _Track())
        layers = [*record.layers, *(name for name in track.layers if name not in set(record.layers))]
        parameters = [*record.parameters, *(name for name in track.parameters if name not in set(record.parameters))]
        new = track.steps < 0 or set(layers) != set(track.layers) or set(parameters) != set(track.parameters)
        if new and not self.failed and self._layouts < MAX_LAYOUTS:
            self._layouts += 1
            track.layers, track.parameters = layers, parameters
            self._make()
        track.shown = (record.layers, record.parameters)
        return track

    def _make(self) -> None:
        before, self._file = self._file, None
        carried: list[ringfile.Rows] = []
        if before is not None:
            with contextlib.suppress(OSError, ringfile.BlackBoxError):  # deleted or damaged by others: begin anew
                carried = ringfile.read(self.path).rows
        try:
            tables = plan(self._tracks, self._header, self._max_bytes, self._samples)
            self._file = RingFile(self.path, self._header, tables, carried)
        except BaseException:
            self.failed = True
            raise
        finally:
            if before is not None:
                before.abandon()
            else:
                prune(self.path.parent)
        for index, table in enumerate(tables):
            if table.name == "steps":
                self._tracks[table.optimizer].steps = index
            elif table.name == "samples":
                self._tracks[table.optimizer].samples = index

    def _note(self, note: dict[str, Any]) -> None:
        if self._file is None:
            return
        for left_out in (None, "details", "likely", "summary"):  # what is too long loses what matters least
            note = {name: value for name, value in note.items() if name != left_out}
            with contextlib.suppress(ValueError):
                self._file.write_text(0, note)
                return


def plan(tracks: dict[str, _Track], header: dict[str, Any], max_bytes: int, samples: int) -> list[Table]:
    """The rings that fit into `max_bytes`: the most exact ones that hold 512 steps, else as many steps as there is room
    for. Parameters go first, then digits, then steps.

    Raises:
        ValueError: not even eight steps fit.
    """
    exact: Type = "float32"
    levels: list[tuple[Type | None, Type]] = [(exact, exact), ("bfloat16", exact), (None, exact), (None, "bfloat16")]
    for steps in (STEPS >> shift for shift in range(7)):
        for parameters, layers in levels if steps == STEPS else levels[-1:]:
            tables = list(_tables(tracks, max_bytes, steps, max(2, samples * steps // STEPS), parameters, layers))
            size = len(ringfile.header_bytes(header, tables)) + sum(t.slots * t.slot_bytes for t in tables)
            if size <= max_bytes:
                return tables
    names = sum(len(track.layers) for track in tracks.values())
    raise ValueError(f"{names} layers need more than {max_bytes} bytes: raise Settings.blackbox_bytes")


def _tables(
    tracks: dict[str, _Track], max_bytes: int, steps: int, samples: int, parameters: Type | None, layers: Type
) -> Iterator[Table]:
    yield Table("notes", "", max(1, min(NOTES, max_bytes // 16 // NOTE_BYTES)), text_bytes=NOTE_BYTES)
    for optimizer, track in tracks.items():
        columns = [Column(name) for name in SCALARS]
        if track.layers:
            columns.append(Column("layer_grad_norm", layers, tuple(track.layers)))
        if track.parameters and parameters:
            columns.append(Column("parameter_grad_norm", parameters, tuple(track.parameters)))
        yield Table("steps", optimizer, steps, tuple(columns))
        if track.layers:
            series = (Column(name, layers, tuple(track.layers)) for name in _LAYER_SERIES)
            yield Table("samples", optimizer, samples, (Column("step"), *series))


def _step(record: StepRecord, track: _Track, columns: Sequence[Column]) -> list[Value]:
    values: list[Value] = [getattr(record, name) for name in SCALARS[: -len(_DERIVED)]]
    values += [
        max(record.learning_rates, default=None),
        max(record.weight_decays, default=None),
        record.skipped is not None,
        None,
        None,
    ]
    for column in columns[len(values) :]:
        values.append(_series(record, column, record.layers if column.name[0] == "l" else record.parameters))
    if record.nonfinite:
        values[len(SCALARS) - 2] = 1 + SOURCES.index(record.nonfinite[0].source)
        layer = first_layer(record.nonfinite)
        if layer in track.layers:
            values[len(SCALARS) - 1] = track.layers.index(layer)
    return values


def _sample(record: StepRecord, track: _Track, columns: Sequence[Column]) -> list[Value]:
    return [record.step, *(_series(record, column, record.layers) for column in columns[1:])]


def _series(record: StepRecord, column: Column, names: Sequence[str]) -> Value:
    """A series of the record in the order of the column's members."""
    values: Sequence[float | None] | None = getattr(record, column.name)
    members = column.members or ()
    if values is None or (len(values) == len(members) and len(names) == len(members) and tuple(names) == members):
        return values
    known = dict(zip(names, values, strict=False))
    return [known.get(name) for name in members]


def first_layer(nonfinite: Sequence[NonFinite]) -> str | None:
    """The layer of the first tensor that was not finite; None where only the loss is known not to be."""
    return next((found.layers[0] for found in nonfinite if found.layers), None)


def _nonfinite_note(record: StepRecord) -> dict[str, Any]:
    found = [
        {"source": n.source, "value": n.value, "parameters": n.parameters[:4], "layers": n.layers[:4]}
        for n in record.nonfinite
    ]
    # The details are the first to go where a note is too long.
    first = {"source": found[0]["source"], "layer": first_layer(record.nonfinite)}
    return {
        "type": "nonfinite",
        "step": record.step,
        "occurred_at": record.started,
        "optimizer": record.optimizer,
        **first,
        "details": {"found": found},
    }


def boxes(directory: Path) -> list[Path]:
    """The black boxes in a folder, of living processes and of dead ones, the oldest first."""
    return sorted(directory.glob(f"*{SUFFIX}"), key=_modified)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # gone since it was listed
        return 0.0


def prune(directory: Path, kept_seconds: float = KEPT_SECONDS, kept_bytes: int = KEPT_BYTES) -> list[Path]:
    """Delete what dead processes left in a folder beyond an age or a total size; returns what was deleted."""
    left = kept_bytes
    deleted = []
    candidates = [*boxes(directory), *directory.glob(f".*{SUFFIX}.new"), *directory.glob(f"*{SUFFIX}.broken")]
    for path in sorted(candidates, key=_modified, reverse=True):
        with contextlib.suppress(OSError):
            status = path.stat()
            left -= status.st_size
            if (left < 0 or status.st_mtime < time.time() - kept_seconds) and not ringfile.is_alive(path):
                path.unlink()
                deleted.append(path)
    return deleted
