"""What the detectors of a run know, kept on disk so that a resumed run goes on from it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

FORMAT = "optwatch-detectors/1"
KEPT_SECONDS = 30 * 86_400.0
"""After so long nobody resumes a run; its file is deleted by the next one."""


class Remembered:
    """Files of what detectors know: one for each run and rank in `directory`, one beside each checkpoint."""

    def __init__(self, directory: Path, run_id: str, rank: int) -> None:
        self._directory = directory
        self._rank = rank
        self._own = self._of_run(run_id)

    def save(self, state: dict[str, Any]) -> None:
        """Keep what the detectors of this run know now, in place of what was kept before.

        Raises:
            OSError: it cannot be written.
            ValueError: the state holds a number that JSON has no name for.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        _write(self._own, state)

    def save_with(self, checkpoint: str, state: dict[str, Any]) -> None:
        """Keep it beside a checkpoint as well; nothing for one that is at no local path. Raises as `save`."""
        if "://" not in checkpoint and Path(checkpoint).exists():
            _write(self._of_checkpoint(checkpoint), state)

    def find(self, resumed_from: str | None) -> dict[str, Any] | None:
        """What was kept with the checkpoint or run that this run goes on from, else by this run under its id; None
        where there is nothing.

        Raises:
            OSError: it is there and cannot be read.
            ValueError: it is no such file, or of another version; the message names it.
        """
        places = [self._own]
        if resumed_from:
            places = [self._of_checkpoint(resumed_from), self._of_run(resumed_from), *places]
        for path in places:
            if path.is_file():
                return _read(path)
        return None

    def forget_old(self) -> None:
        """Delete what runs of long ago have left. Raises nothing."""
        with contextlib.suppress(OSError):
            for path in self._directory.glob("*.json"):
                if time.time() - path.stat().st_mtime > KEPT_SECONDS:
                    path.unlink(missing_ok=True)

    def _of_run(self, run_id: str) -> Path:
        # An id may be a path (of a checkpoint) here, and long: its hash is a file's name.
        return self._directory / f"{hashlib.sha256(run_id.encode()).hexdigest()[:32]}-{self._rank}.json"

    def _of_checkpoint(self, checkpoint: str) -> Path:
        path, name = Path(checkpoint), f"optwatch-rank{self._rank}-detectors.json"
        return path / name if path.is_dir() else path.with_name(f"{path.name or 'checkpoint'}.{name}")


def _write(path: Path, state: dict[str, Any]) -> None:
    text = json.dumps({"format": FORMAT, "detectors": state}, separators=(",", ":"), allow_nan=False)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text())
        if body["format"] != FORMAT:
            raise ValueError(f"its format is {body['format']!r}, this version reads {FORMAT!r}")
        return dict(body["detectors"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is nothing that detectors can go on from, delete it: {error}") from error
