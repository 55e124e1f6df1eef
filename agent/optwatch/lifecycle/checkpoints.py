"""Checkpoints as they are written: how long, how large, and whether they were."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType


@dataclass(frozen=True, slots=True)
class Written:
    """What became of one checkpoint."""

    path: str
    began: float
    """Unix seconds."""
    duration: float
    """Seconds."""
    size: int | None
    """Bytes of the file, or of all files of the folder; None where there is nothing to measure (a remote path)."""
    error: str | None
    """What failed, None for one that succeeded."""
    in_place: bool = False
    """Whether it was written over the checkpoint that stood there before, byte by byte: until it was whole there was
    none. A file that is renamed onto the path is another file (another inode), and the old one stands until then."""


class Checkpoint:
    """The block in which a checkpoint is written: ``with monitor.checkpoint(path) as checkpoint: torch.save(...)``.

    While it runs the server expects no heartbeat (`torch.save` can hold the interpreter for minutes). What the block
    raises is recorded and goes on its way; nothing else is raised. A path at which nothing stands afterwards counts as
    failed; one that is no local path (``s3://...``) is taken at the block's word.
    """

    def __init__(
        self, path: str | os.PathLike[str], began: Callable[[], None], ended: Callable[[Written], None]
    ) -> None:
        self.path = os.fspath(path)
        self._began_hook = began
        self._ended_hook = ended
        self._began = 0.0
        self._timer = 0.0
        self._stood_before: tuple[int, int] | None = None

    def __enter__(self) -> Checkpoint:
        self._began, self._timer = time.time(), time.perf_counter()
        self._stood_before = _identity(self.path)
        self._began_hook()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        duration = time.perf_counter() - self._timer
        size, missing = _measure(self.path)
        what = f"{kind.__name__}: {error}"[:500] if kind else missing
        in_place = self._stood_before is not None and _identity(self.path) == self._stood_before
        self._ended_hook(Written(self.path, self._began, duration, size, what, in_place and what is None))


def _identity(path: str) -> tuple[int, int] | None:
    """Which file stands at `path`; None where none does, or where files have no number (some network file systems)."""
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if found.st_ino and stat.S_ISREG(found.st_mode) else None


def _measure(path: str) -> tuple[int | None, str | None]:
    """Size in bytes of what stands at `path`, and what is wrong with it."""
    if "://" in path:
        return None, None
    try:
        place = Path(path)
        if place.is_dir():
            return sum(file.stat().st_size for file in place.rglob("*") if file.is_file()), None
        size = place.stat().st_size
    except OSError as error:
        return None, f"nothing can be read at {path}: {error.strerror}"
    return size, None if size else f"{path} is empty"
