"""``optwatch run -- COMMAND``: runs training as a child and tells the server how it ended, whatever killed it.

A process that is killed says nothing any more: by its heartbeats it is lost within half a minute, but not why. Its
parent is told its exit status or signal by the kernel at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import quote

from optwatch.blackbox import ringfile
from optwatch.blackbox.box import boxes
from optwatch.delivery.client import EVENTS_PATH, RUNS_PATH, Client, RefusedError
from optwatch.delivery.spool import Spool, default_directory
from optwatch.delivery.uploads import upload_dead
from optwatch.faults import Faults
from optwatch.settings import Settings

from .ending import Outcome
from .failures import Exhausted, run_failed

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
DELIVERY_SECONDS = 15.0
"""How long the end of a run is offered to the server before it is left in the spool for the next run to deliver."""
HAND_IN_SECONDS = 5.0
"""How long its black boxes are offered."""


def main(arguments: list[str]) -> int:
    """Run the command and return its exit status, 128 + n where signal n killed it, as a shell does."""
    parser = argparse.ArgumentParser(
        prog="optwatch run",
        description="Run training and tell the server at once how it ended: by which signal, or by the kernel for want "
        "of memory. Needs OPTWATCH_SERVER; sets OPTWATCH_RUN_ID for the command where it is not set.",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    command = parser.parse_args(arguments).command
    command = command[1:] if command[:1] == ["--"] else command
    if not command:
        parser.error("give the command to run: optwatch run -- python train.py")
    run_id = os.environ.get("OPTWATCH_RUN_ID") or f"run-{uuid.uuid4().hex[:12]}"
    killed_before = oom_kills()
    try:
        child = subprocess.Popen(command, env={**os.environ, "OPTWATCH_RUN_ID": run_id})
    except OSError as error:
        print(f"optwatch run: {command[0]!r} cannot be run: {error.strerror}", file=sys.stderr)
        return 127
    for number in FORWARDED:
        signal.signal(number, lambda got, _frame: child.send_signal(got))
    status = child.wait()
    outcome = judge(status, out_of_memory=oom_kills() > killed_before)
    server = os.environ.get("OPTWATCH_SERVER")
    if outcome is not None and server:
        report(server.rstrip("/"), run_id, outcome)
    hand_in(server, run_id, died=outcome is not None)
    return status if status >= 0 else 128 - status


def judge(status: int, *, out_of_memory: bool) -> Outcome | None:
    """How a child ended of which the kernel says `status` (negative: the signal), where it could not say so itself.

    None for a child that ended by itself: whatever its status, the agent in it has reported it. 137 and its like are
    what a shell or container in between makes of a signal.
    """
    number = -status if status < 0 else status - 128
    if status >= 0 and number not in (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS):
        return None
    if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return Outcome("cancelled", f"killed by {signal.Signals(number).name}")
    if number == signal.SIGKILL and out_of_memory:
        reason = "killed by the kernel for want of memory (SIGKILL, and the count of such kills has risen)"
        return Outcome("failed", reason, "out_of_memory")
    return Outcome("failed", f"killed by {signal.Signals(number).name}", "crashed")


def oom_kills() -> int:
    """Processes that the kernel has killed for want of memory, of this container where its cgroup tells, else of the
    machine; 0 where nothing tells."""
    for path in (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat")):
        try:
            fields = dict(line.split()[:2] for line in path.read_text().splitlines())
            return int(fields["oom_kill"])
        except (OSError, KeyError, ValueError):
            continue
    return 0


def report(server: str, run_id: str, outcome: Outcome) -> None:
    """Tell the server of a run's end, unless the run has done so itself; what it does not take stays in the spool."""
    settings = Settings.from_environment()
    client = Client(server)
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError, RefusedError):
        known = client.get(f"{RUNS_PATH}/{quote(run_id)}", settings.request_timeout_seconds)
    if known.get("status") in ("succeeded", "failed", "cancelled"):
        return
    step = max((rank.get("step") or 0 for rank in known.get("ranks", ())), default=0)
    spool = Spool(
        (settings.spool_directory or default_directory()) / f"{run_id}-end-{uuid.uuid4().hex[:8]}.sqlite3",
        server,
        settings.spool_max_bytes,
        Faults(),
        None,
    )
    if outcome.cause is not None:
        event = run_failed(outcome, step, Exhausted(), "")
        # A sequence beyond any that the run's own events have.
        spool.append(EVENTS_PATH, event.message(run_id, 0, int(event.occurred_at)), vital=True)
    finish = {
        "schema": 1,
        "status": outcome.status,
        "finished_at": time.time(),
        "reason": outcome.reason,
        "cause": outcome.cause,
        "final_step": step or None,
    }
    spool.append(f"{RUNS_PATH}/{quote(run_id)}/finish", finish, vital=True)
    deadline = time.monotonic() + DELIVERY_SECONDS
    while time.monotonic() < deadline and (messages := spool.first(1)):
        body = messages[0].body
        if messages[0].path == EVENTS_PATH:
            body = {"schema": 1, "events": [body]}
        try:
            client.post(messages[0].path, body, settings.request_timeout_seconds)
        except (RefusedError, FileNotFoundError) as error:
            print(f"optwatch run: {error}", file=sys.stderr)
        except OSError:
            time.sleep(0.5)
            continue
        spool.acknowledge(messages)
    spool.close()


def hand_in(server: str | None, run_id: str, *, died: bool) -> None:
    """Upload the black boxes that the run's processes left on this machine. Without a server, or where it does not take
    them in time, they stay for the next run; of a run that `died`, it is said where."""
    settings = Settings.from_environment()
    deadline = time.monotonic() + HAND_IN_SECONDS
    folder = settings.spool_directory or default_directory()
    left = [path for path in boxes(folder) if path.name.startswith(f"{run_id}-") and _run_of(path) == run_id]
    waiting = list(left) if server else []
    while server and waiting:
        for path in list(waiting):
            try:
                if upload_dead(Client(server), path, settings.request_timeout_seconds):
                    left.remove(path)
                waiting.remove(path)
            except (RefusedError, ringfile.BlackBoxError) as error:
                print(f"optwatch run: {error}", file=sys.stderr)
                waiting.remove(path)
            except OSError:
                if time.monotonic() >= deadline:
                    waiting.remove(path)
        if waiting:
            time.sleep(0.5)
    for path in left if died else ():
        print(f"optwatch run: the last steps are in {path}: optwatch blackbox {path}", file=sys.stderr)


def _run_of(path: Path) -> str | None:
    """The run of a black box; None where it cannot be read."""
    try:
        return str(ringfile.read(path).header.get("run_id"))
    except (OSError, ringfile.BlackBoxError):
        return None
