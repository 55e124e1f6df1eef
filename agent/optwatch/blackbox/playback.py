"""``optwatch blackbox``: reads what a process recorded before it died, and uploads what dead ones left."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from optwatch.delivery.client import Client, RefusedError, finite
from optwatch.delivery.uploads import upload_dead
from optwatch.settings import Settings

from . import recording, ringfile
from .box import boxes
from .ringfile import Contents, Rows

SHOWN = ("loss", "grad_norm", "grad_norm_before_clip", "learning_rate", "weight_norm", "duration")
"""Columns of the table for people; all of them are in --csv and --json."""


def main(arguments: list[str]) -> int:
    """Read or upload black boxes, and return the exit status: 1 where one could not be."""
    parser = argparse.ArgumentParser(
        prog="optwatch blackbox",
        description="Show the last steps of a training process from its black box, whether it lives or was killed; "
        "or upload what dead processes left in a folder.",
    )
    parser.add_argument("path", type=Path, help="a black box (*.blackbox), or a folder with some")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="every step and column as CSV")
    form.add_argument("--json", action="store_true", help="one JSON object for each black box, with everything in it")
    form.add_argument(
        "--upload", action="store_true", help="send those of dead processes to the server, and delete them"
    )
    parser.add_argument("--server", help="URL of the server (default: $OPTWATCH_SERVER)")
    parser.add_argument("--last", type=int, default=10, metavar="N", help="steps in the table (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.last < 0:
        parser.error(f"--last {options.last}: give 0 or more")
    paths = boxes(options.path) if options.path.is_dir() else [options.path]
    if not paths:
        print(f"optwatch blackbox: there is no *.blackbox in {options.path}", file=sys.stderr)
        return 1
    if options.upload:
        server = options.server or os.environ.get("OPTWATCH_SERVER")
        if not server or not server.startswith(("http://", "https://")):
            parser.error("--upload needs --server or OPTWATCH_SERVER, such as http://optwatch:8000")
        return _upload(paths, Client(server))
    try:
        return _show(paths, options)
    except BrokenPipeError:  # `| head` has seen enough; what is still buffered must not fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _show(paths: Sequence[Path], options: argparse.Namespace) -> int:
    status = 0
    for path in paths:
        try:
            contents = ringfile.read(path)
        except (ringfile.BlackBoxError, OSError) as error:
            print(f"optwatch blackbox: {_reason(path, error)}", file=sys.stderr)
            status = 1
            continue
        if options.csv:
            _write_csv(contents)
        elif options.json:
            print(json.dumps(finite(_document(contents)), allow_nan=False))
        else:
            print("\n".join(_summary(contents, options.last)))
    sys.stdout.flush()
    return status


def _reason(path: Path, error: Exception) -> str:
    return f"{path} cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)


def _upload(paths: Sequence[Path], client: Client) -> int:
    status = 0
    timeout = Settings.from_environment().request_timeout_seconds
    for path in paths:
        try:
            done = upload_dead(client, path, timeout)
        except (ringfile.BlackBoxError, RefusedError, OSError) as error:
            print(f"optwatch blackbox: {path} stays: {error}", file=sys.stderr)
            status = 1
        else:
            print(f"{path}: {'uploaded' if done else 'left alone, its process lives'}")
    return status


def _summary(contents: Contents, last: int) -> Iterator[str]:
    """What a person asks first: which run, how far it came, what broke and where."""
    header, what = contents.header, recording.incident(contents)
    alive = "still running" if ringfile.is_alive(contents.path) else "not running any more"
    rank = f"rank {header['rank']} of {header['world_size']}"
    yield f"{contents.path}\nrun {header['run_id']} ({header['project']}), {rank}, {header['optimizer']}"
    yield f"pid {header['pid']} on {header['host']}: {alive}"
    times = [rows.column("started")[-1] for rows in contents.rows if rows.table.name == "steps" and rows.payloads]
    if not times:
        yield "no step was recorded"
        return
    at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(max(times)))
    yield f"last step {recording.last_step(contents)} at {at}"
    first = recording.first_nonfinite(contents)
    if first is None:
        yield "every number is finite"
    else:
        where = f", first in layer {first.layer}" if first.layer is not None else ""
        yield f"not finite from step {first.step}: the {first.source}{where}"
    for note in recording.notes(contents):
        if note["type"] == "event":
            yield f"{note['severity']} {note['kind']} at step {note['step']}: {note.get('summary', '')}"
        elif found := note.get("details", {}).get("found"):
            names = [name for entry in found for name in entry["parameters"]][:4]
            yield f"not finite at step {note['step']}: {', '.join(names) or 'no parameter'}"
    for rows in contents.rows:
        if rows.table.name == "steps":
            yield from _table(rows, last, what.step)


def _table(rows: Rows, last: int, step: int | None) -> Iterator[str]:
    torn = f", {rows.torn} torn" if rows.torn else ""
    yield f"\n{rows.table.optimizer}: {len(rows.payloads)} steps recorded{torn}"
    guilty = recording.worst(rows, step=step)
    for guilt in guilty:
        broken = f"not finite from step {guilt.broken}, " if guilt.broken is not None else ""
        yield f"  {guilt.name}: {broken}gradient norm {guilt.ratio:.3g} times its median"
    steps, columns = rows.column("step"), [rows.column(name) for name in SHOWN]
    head = ["step", *(name.replace("_", " ") for name in SHOWN)]
    lines = [head] + [
        [f"{int(steps[i])}", *("–" if column[i] is None else f"{column[i]:.4g}" for column in columns)]
        for i in range(max(0, len(steps) - last), len(steps))
    ]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for cells in lines if last else ():
        yield "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


def _write_csv(contents: Contents) -> None:
    """One line for each step and optimizer, with one column for each number of each layer and parameter."""
    writer = csv.writer(sys.stdout)
    for rows in contents.rows:
        if rows.table.name != "steps":
            continue
        columns: list[tuple[str, list[Any]]] = []
        for column in rows.table.columns:
            values = rows.column(column.name)
            if column.members is None:
                columns.append((column.name, values))
                continue
            for i, member in enumerate(column.members):
                columns.append((f"{column.name}/{member}", [None if row is None else row[i] for row in values]))
        writer.writerow(["optimizer", *(name for name, _ in columns)])
        for row in zip(*(values for _, values in columns), strict=True):
            writer.writerow([rows.table.optimizer, *("" if value is None else _plain(value) for value in row)])


def _plain(value: float) -> float | int:
    return int(value) if math.isfinite(value) and value == int(value) and abs(value) < 2**53 else value


def _document(contents: Contents) -> dict[str, Any]:
    first = recording.first_nonfinite(contents)
    what = recording.incident(contents)
    return {
        **contents.header,
        "path": str(contents.path),
        "last_step": recording.last_step(contents),
        "incident": {"kind": what.kind, "step": what.step, "layer": what.layer},
        "first_nonfinite": first and {"step": first.step, "source": first.source, "layer": first.layer},
        "notes": recording.notes(contents),
        "tables": [
            {
                "name": rows.table.name,
                "optimizer": rows.table.optimizer,
                "torn": rows.torn,
                "members": {c.name: c.members for c in rows.table.columns if c.members is not None},
                "columns": {column.name: rows.column(column.name) for column in rows.table.columns},
            }
            for rows in contents.rows
            if rows.table.columns
        ],
    }
