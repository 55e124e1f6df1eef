"""The optwatch server as a process of its own on a free loopback port, for demos and tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

READY = "optwatch server: http"


@contextmanager
def serving(directory: Path, *, port: int = 0, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """Run ``optwatch server`` with its database and log in `directory`, and give its URL once it answers.

    `environment` is added to this process's. The server is stopped, by its pid, when the block ends.

    Raises:
        RuntimeError: it ended before it was ready; the message is its log.
    """
    directory.mkdir(parents=True, exist_ok=True)
    database = f"sqlite:///{directory / 'optwatch.sqlite3'}"
    command = [sys.executable, "-m", "optwatch", "server", "--port", str(port), "--database-url", database]
    log = directory / "server.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **(environment or {})}
        )
    try:
        assert process.stdout is not None  # noqa: S101 - asked for just above
        ready = next((line for line in process.stdout if line.startswith(READY)), None)
        if ready is None:
            raise RuntimeError(f"the optwatch server did not start:\n{log.read_text()}")
        yield ready.split()[2]
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
