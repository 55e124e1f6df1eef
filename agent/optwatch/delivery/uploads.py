"""Uploads of black boxes: this process's after an incident, and what dead processes left, on a thread of their own.

A recording is large and a link may be slow, so that it must hold up neither heartbeats nor messages. It needs no
spool: the black box is on disk already, and whoever comes next finds it there.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from optwatch.blackbox import recording, ringfile
from optwatch.blackbox.box import BlackBox, boxes
from optwatch.faults import Faults
from optwatch.settings import Settings

from .client import RUNS_PATH, Client, RefusedError
from .retry import Retry
from .spool import default_directory

if TYPE_CHECKING:
    from optwatch.lifecycle.run import Run  # brings torch, which the supervisor needs not

STEPS_AFTER = 16
"""Steps after an incident that its recording shows as well."""
SECONDS_AFTER = 60.0
"""How long these steps are waited for."""
PAUSE_SECONDS = 600.0
"""Between two recordings of one process; the last one, at its end, does not wait."""
MAX_UPLOADS = 8
"""Recordings of one process, the one at its end aside."""
MAX_ATTEMPTS = 20
"""To deliver one recording, until it is left to whoever comes next."""


def upload(client: Client, path: Path, timeout: float) -> dict[str, object]:
    """Send one black box and return the server's answer.

    Raises:
        BlackBoxError: the file is none that can be read.
        RefusedError: the server will never take it.
        FileNotFoundError: the server does not know the run, or the file is gone.
        OSError: the server did not take it this time.
    """
    contents = ringfile.read(path)
    where = f"{RUNS_PATH}/{quote(contents.header['run_id'])}/recordings"
    return client.post(where, recording.message(contents), timeout)


@contextlib.contextmanager
def taken_over(path: Path) -> Iterator[None]:
    """Holds a dead process's black box, so that nobody else uploads it meanwhile. Raises as `ringfile.lock`."""
    descriptor = ringfile.lock(path)
    try:
        yield
    finally:
        os.close(descriptor)


def upload_dead(client: Client, path: Path, timeout: float) -> bool:
    """Upload what a dead process left, and delete it; False where its process lives or another one has taken it.

    Raises:
        BlackBoxError, RefusedError, FileNotFoundError, OSError: see `upload`; the file stays.
    """
    try:
        with taken_over(path):
            upload(client, path, timeout)
            path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    return True


class Recorder:
    """The black box of a run from attach to detach, uploaded where there is a server.

    Raises:
        ValueError: ``Settings.blackbox_bytes`` is too small.
    """

    def __init__(self, run: Run, server: str | None, settings: Settings, faults: Faults) -> None:
        directory = Path(settings.spool_directory or default_directory())
        server = server and server.rstrip("/")
        self._uploads = Uploads(server, directory, faults, settings.request_timeout_seconds) if server else None
        self.box = BlackBox(
            directory,
            run,
            settings.blackbox_bytes,
            settings.rotation_steps,
            server,
            self._uploads.incident if self._uploads else None,
        )
        """The sink."""

    def start(self) -> None:
        """Begin to upload."""
        if self._uploads:
            self._uploads.start(self.box)

    def finish(self, timeout: float) -> None:
        """The run ends: upload what is due, within as many seconds. Returns at once."""
        if self._uploads:
            self._uploads.finish(timeout)

    def close(self) -> None:
        """Wait for what `finish` began. The file stays where an incident is not on the server."""
        if self._uploads:
            self._uploads.close()
        self.box.close(keep=self._uploads.left if self._uploads else self.box.incidents > 0)


class Uploads:
    """Uploads this process's black box some steps after an incident and at its end, and at its start what dead
    processes left for the same server. Every method returns at once but `close`; none raises."""

    def __init__(self, server: str, directory: Path, faults: Faults, request_timeout: float) -> None:
        self._server = server
        self._client = Client(server)
        self._directory = directory
        self._faults = faults
        self._request_timeout = request_timeout
        self._box: BlackBox | None = None
        self._wake = threading.Event()
        self._pid = os.getpid()
        self._incidents = 0
        self._seen = 0
        """Incidents that the server has been told of."""
        self._due = (0, 0.0)
        """When the next upload is due: at so many steps, or at this time on the monotonic clock."""
        self._not_before = 0.0
        self._count = self._attempts = 0
        self._retry = Retry()
        self._orphans: list[Path] = []
        self._orphans_retry = Retry()
        self._orphans_attempts = 0
        self._searched = False
        self._closing = False
        self._deadline = math.inf
        self._thread = threading.Thread(target=self._work, name="optwatch-recordings", daemon=True)

    def start(self, box: BlackBox) -> None:
        """Begin with what dead processes left, then wait for incidents of this one."""
        self._box = box
        self._thread.start()

    def incident(self) -> None:
        """Something broke: upload a few steps later."""
        if not self.left and self._box is not None:
            self._due = (self._box.records + STEPS_AFTER, time.monotonic() + SECONDS_AFTER)
        self._incidents += 1
        self._wake.set()

    def finish(self, timeout: float) -> None:
        """The process ends: upload what has not been, within as many seconds."""
        self._deadline = time.monotonic() + timeout
        self._closing = True
        self._wake.set()

    @property
    def left(self) -> bool:
        """Whether the server has not been told of an incident."""
        return self._seen < self._incidents

    def close(self) -> None:
        """Wait until the deadline of `finish`, at most."""
        if os.getpid() == self._pid:
            self._thread.join(max(0.0, self._deadline - time.monotonic()) + 0.5)

    def _work(self) -> None:
        self._guarded(self._find_orphans)
        self._searched = True
        while not self._is_over():
            self._wake.clear()
            now = time.monotonic()
            if self._is_due(now):
                if now >= self._retry.due:
                    self._guarded(self._upload)
            elif self._orphans and now >= self._orphans_retry.due:
                self._guarded(self._inherit)
            if not self._is_over():
                self._wake.wait(self._pause())

    def _is_over(self) -> bool:
        return self._closing and (not self.left or time.monotonic() >= self._deadline)

    def _pause(self) -> float:
        """How long nothing can be due. Steps are not announced: while some are waited for, they are looked at often."""
        due = [self._deadline]
        if self.left:
            due.append(max(self._retry.due, time.monotonic() + (0.0 if self._closing else 0.5)))
        if self._orphans and not self._closing:
            due.append(self._orphans_retry.due)
        return max(0.0, min(*due, time.monotonic() + 3600.0) - time.monotonic())

    def _is_due(self, now: float) -> bool:
        if not self.left or self._box is None or self._closing:
            return self.left
        if self._count >= MAX_UPLOADS or now < self._not_before:
            return False
        return self._box.records >= self._due[0] or now >= self._due[1]

    def _upload(self) -> None:
        if self._box is None:
            return
        incidents = self._incidents
        try:
            upload(self._client, self._box.path, self._timeout())
        except RefusedError as error:  # it would be refused again
            self._faults.record("reporter", error)
        except Exception:
            self._attempts += 1
            self._retry.failed(0.2 if self._closing else math.inf)
            if self._attempts >= MAX_ATTEMPTS:
                self._attempts, self._not_before = 0, time.monotonic() + PAUSE_SECONDS
            raise
        self._seen = incidents
        self._due = (self._box.records + STEPS_AFTER, time.monotonic() + SECONDS_AFTER)
        self._count += 1
        self._attempts, self._not_before = 0, time.monotonic() + PAUSE_SECONDS
        self._retry.succeeded()

    def _timeout(self) -> float:
        return max(0.1, min(self._request_timeout, self._deadline - time.monotonic()))

    def _find_orphans(self) -> None:
        """What processes that died on this machine left for this server."""
        own = self._box.path if self._box else None
        for path in boxes(self._directory):
            with contextlib.suppress(OSError):
                if path == own or ringfile.is_alive(path):
                    continue
                try:
                    if ringfile.read(path).header.get("server") == self._server:
                        self._orphans.append(path)
                except ringfile.BlackBoxError as error:
                    self._faults.record("spool", error)
                    set_aside(path)

    def _inherit(self) -> None:
        """Try each of them once, for as long as nothing of this process's own is due."""
        for path in list(self._orphans):
            if self._closing or self._is_due(time.monotonic()):
                return
            try:
                upload_dead(self._client, path, self._timeout())
            except (ringfile.BlackBoxError, RefusedError) as error:
                self._faults.record("reporter", error)
                set_aside(path)
            except OSError:
                # The server is away, or the run is still on its way to it from the spool of the same dead process.
                if path.exists():
                    continue
            self._orphans.remove(path)
        self._orphans_attempts += 1
        self._orphans_retry.failed()
        if self._orphans_attempts >= MAX_ATTEMPTS:
            self._orphans.clear()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - the thread must go on
            self._faults.record("reporter", error)


def set_aside(path: Path) -> None:
    """Name a file that nobody will take so that nobody tries again; a person still finds it."""
    with contextlib.suppress(OSError), taken_over(path):
        path.replace(path.with_name(f"{path.name}.broken"))
