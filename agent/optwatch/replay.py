"""`optwatch replay FILE.csv`: the agent's detectors over a recorded curve, so that thresholds can be tried on it."""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from .detectors import replay
from .detectors.recorded import Row, signal
from .settings import Settings

OPTIONS = (
    "spike_window",
    "spike_rarity",
    "spike_min_increase",
    "spike_warmup_steps",
    "grad_spike_min_increase",
    "drift_deviations",
    "divergence_steps",
    "plateau_steps",
)
"""Settings that can be tried."""


class BadFileError(ValueError):
    """A file that is no curve: says which, where, what it holds and what to give instead."""


def read(path: Path) -> Iterator[Row]:
    """The rows of a CSV file with the columns ``step``, ``loss`` and, if there, ``grad_norm``; others are left alone.

    ``nan`` and ``inf`` are taken as such; an empty field is None: not logged at this step.

    Raises:
        BadFileError: the file cannot be read, lacks a column, or a field is no number.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True, strict=True)
            names = reader.fieldnames or []
            for needed in ("step", "loss"):
                if needed not in names:
                    found = ", ".join(map(repr, names)) or "nothing"
                    raise BadFileError(
                        f"{path}, line 1: no column {needed!r}, only {found}; begin the file with step,loss[,grad_norm]"
                    )
            for fields_ in reader:
                where = f"{path}, line {reader.line_num}"
                if None in fields_:
                    raise BadFileError(f"{where}: more fields than the {len(names)} columns; give one for each")
                step = _number(where, "step", fields_["step"])
                if step is None or not math.isfinite(step) or step != int(step):
                    raise BadFileError(f"{where}: step={fields_['step']!r}; give a whole number")
                loss = _number(where, "loss", fields_["loss"])
                yield int(step), loss, _number(where, "grad_norm", fields_.get("grad_norm"))
    except OSError as error:
        raise BadFileError(f"{path}: {error.strerror}; give the path of a CSV file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadFileError(f"{path}: {error}; give a CSV file in UTF-8") from error


def _number(where: str, column: str, text: str | None) -> float | None:
    if text is None or not text.strip():
        return None
    try:
        return float(text)
    except ValueError:
        raise BadFileError(
            f"{where}: {column}={text!r}; give a number, nan, inf, or nothing where it was not logged"
        ) from None


def main(arguments: list[str]) -> int:
    """Print one JSON line an event: step, kind, signal, severity, summary. 2 for a file or option that does not fit."""
    parser = argparse.ArgumentParser(prog="optwatch replay", description=__doc__)
    parser.add_argument("file", type=Path, help="CSV with the columns step, loss and, if logged, grad_norm")
    known = {field.name: field for field in fields(Settings)}
    for name in OPTIONS:
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=int if known[name].type == "int" else float,
            metavar="N",
            default=known[name].default,
            help="default %(default)s",
        )
    options = parser.parse_args(arguments)
    try:
        settings = Settings(**{name: getattr(options, name) for name in OPTIONS})
        for event in replay(read(options.file), settings):
            line = {"step": event.step, "kind": event.kind, "signal": signal(event), "severity": event.severity}
            print(json.dumps(line | {"summary": event.summary}), flush=True)
    except ValueError as error:
        print(f"optwatch replay: {error}", file=sys.stderr)
        return 2
    return 0
