"""The sidecar: the small file beside a checkpoint that holds its fingerprint, one for each rank that saved."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from .fingerprint import Fingerprint

FORMAT = "optwatch-fingerprint/1"
ENDS = 2**20
"""Bytes of a file's beginning and end that its stamp covers. The end of what torch.save writes is the list of all
records with their CRC-32, so that a checkpoint written anew has another stamp though it has the same size."""


def sidecar_path(checkpoint: str | os.PathLike[str], rank: int) -> Path:
    """Where a rank's sidecar is: within a checkpoint that is a folder, so that it moves with it, else beside it."""
    path = Path(checkpoint)
    return (
        path / f"optwatch-rank{rank}.json" if path.is_dir() else path.with_name(f"{path.name}.optwatch-rank{rank}.json")
    )


def write(checkpoint: str | os.PathLike[str], fingerprint: Fingerprint) -> Path:
    """Write the sidecar of a checkpoint that has been written, and put it in place of the last one at once.

    Raises:
        OSError: nothing can be written there.
    """
    path = sidecar_path(checkpoint, fingerprint.rank)
    body = {"format": FORMAT, "stamp": stamp(checkpoint), "fingerprint": fingerprint.as_json()}
    written = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        written.write_text(json.dumps(body, separators=(",", ":"), allow_nan=False))
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)
    return path


def read(checkpoint: str | os.PathLike[str], rank: int) -> tuple[Fingerprint, bool] | None:
    """The fingerprint of a checkpoint, and whether the checkpoint is still as it was written; None where there is none.

    A rank without a sidecar of its own has that of rank 0, which saved for all.

    Raises:
        OSError: it cannot be read.
        ValueError: the file is no sidecar, or of a later format; the message names it.
    """
    for path in dict.fromkeys((sidecar_path(checkpoint, rank), sidecar_path(checkpoint, 0))):
        if not path.is_file():
            continue
        try:
            body = json.loads(path.read_text())
            if body["format"] != FORMAT:
                raise ValueError(f"its format is {body['format']!r}, this version reads {FORMAT!r}")
            return Fingerprint.from_json(body["fingerprint"]), body["stamp"] == stamp(checkpoint)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is no fingerprint that can be used: {error}") from error
    return None


def stamp(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """What tells this version of a checkpoint from others, without reading all of it: sizes, and a hash of the ends of
    each file. A bit that flips in between changes nothing here; the fingerprint finds it.

    Raises:
        OSError: it cannot be read.
    """
    path = Path(checkpoint)
    files = sorted(f for f in path.rglob("*") if f.is_file() and not _ours(f)) if path.is_dir() else [path]
    found = hashlib.sha256()
    total = 0
    for file in files:
        size = file.stat().st_size
        total += size
        found.update(f"{file.relative_to(path) if file != path else ''}:{size}:".encode())
        with file.open("rb") as stream:
            found.update(stream.read(ENDS))
            if size > ENDS:
                stream.seek(max(ENDS, size - ENDS))
                found.update(stream.read())
    return {"bytes": total, "files": len(files), "sha256": found.hexdigest()}


def _ours(path: Path) -> bool:
    return path.name.startswith(("optwatch-rank", ".optwatch-rank"))
