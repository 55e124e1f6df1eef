"""How a run failed is told by the process that failed, before it is gone: real processes, and a real server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TRAINING = """
import os, signal, sys, torch
from optwatch import attach
weight = torch.nn.Parameter(torch.ones(4))
optimizer = torch.optim.AdamW([weight])
monitor = attach(optimizer)
for step in range(1, 6):
    (weight ** 2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
monitor.flush()
"""


def run(server: Any, folder: Path, end: str, *, supervised: bool = False, **environment: str) -> int:
    script = folder / "training.py"
    script.write_text(TRAINING + end)
    command = [sys.executable, str(script)]
    if supervised:
        command = [sys.executable, "-m", "optwatch", "run", "--", *command]
    given = {
        "OPTWATCH_SERVER": server.url,
        "OPTWATCH_RUN_ID": "failing",
        "OPTWATCH_PORT": "0",
        "OPTWATCH_ADDRESS": "127.0.0.1",
        "OPTWATCH_SPOOL_DIRECTORY": str(folder / "spool"),
        "OPTWATCH_HEARTBEAT_INTERVAL_SECONDS": "0.2",
    }
    done = subprocess.run(command, env=os.environ | given | environment, capture_output=True, timeout=60, check=False)
    return done.returncode


def only_event(server: Any) -> dict[str, Any]:
    events = server.events("failing")
    assert len(events) == 1, events
    return dict(events[0])


def test_an_exception_that_ends_training_is_a_crash_with_its_frames(real_server: Any, tmp_path: Path) -> None:
    assert run(real_server, tmp_path, "def load():\n    raise KeyError('batch 7')\nload()\n") == 1
    event = only_event(real_server)
    assert (event["kind"], event["step"], event["severity"]) == ("crashed", 5, "critical")
    assert "KeyError: 'batch 7'" in event["summary"]
    assert event["details"]["frames"][-1].endswith("in load")
    run_page = real_server.get("/runs/failing")
    assert run_page["status"] == "failed"
    assert "batch 7" in run_page["reason"]


@pytest.mark.parametrize(
    "allocation",
    ["torch.empty(10**14)", "bytearray(10**15)", "raise torch.OutOfMemoryError('CUDA out of memory. Tried to')"],
    ids=["torch's allocator", "Python's own", "CUDA's error"],
)
def test_an_allocation_that_does_not_fit_is_out_of_memory(allocation: str, real_server: Any, tmp_path: Path) -> None:
    assert run(real_server, tmp_path, allocation + "\n") == 1
    event = only_event(real_server)
    assert event["kind"] == "out_of_memory"
    assert event["runbook"] == "TrainingOutOfMemory"
    assert event["details"]["memory_bytes"]["allocated"] > 10**7
    assert event["details"]["optimizer_state_bytes"] == 2 * 16 + 4
    held = event["details"]["held_bytes"]
    assert (held["weights"], held["gradients"], held["optimizer_state"]) == (16, 0, 36)
    assert held["rest"] == event["details"]["memory_bytes"]["allocated"] - 52
    assert "Held by weights 0.00 GiB, gradients 0.00 GiB, optimizer state" in event["likely"]


def test_a_clean_end_is_no_event(real_server: Any, tmp_path: Path) -> None:
    assert run(real_server, tmp_path, "", supervised=True) == 0
    assert real_server.events("failing") == []
    assert real_server.get("/runs/failing")["status"] == "succeeded"


def test_a_resume_with_empty_optimizer_state_is_told_at_its_first_step(real_server: Any, tmp_path: Path) -> None:
    assert run(real_server, tmp_path, "", OPTWATCH_RESUME_FROM="run-before") == 0
    event = only_event(real_server)
    assert (event["kind"], event["step"]) == ("resumed_without_state", 1)
    assert "run-before" in event["summary"]


def test_a_killed_process_is_told_by_its_parent(real_server: Any, tmp_path: Path) -> None:
    assert run(real_server, tmp_path, "os.kill(os.getpid(), signal.SIGSEGV)\n", supervised=True) == 128 + 11
    event = only_event(real_server)
    assert event["kind"] == "crashed"
    assert "SIGSEGV" in event["summary"]
    assert real_server.get("/runs/failing")["status"] == "failed"


def test_an_exception_under_a_parent_is_told_once(real_server: Any, tmp_path: Path) -> None:
    assert run(real_server, tmp_path, "raise ValueError('once')\n", supervised=True) == 1
    assert "once" in only_event(real_server)["summary"]


def test_the_kernel_killing_for_memory_is_out_of_memory(real_server: Any, tmp_path: Path) -> None:
    group = next(
        (path for path in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")) if os.access(path, os.W_OK)), None
    )
    if group is None:
        pytest.skip("needs a memory cgroup that this user may make")
    mine = group / f"optwatch-test-{os.getpid()}"
    mine.mkdir()
    try:
        limit = mine / ("memory.max" if (mine / "memory.max").exists() else "memory.limit_in_bytes")
        if not limit.exists():
            pytest.skip("needs the memory controller")
        limit.write_text(str(600 * 2**20))
        end = f"open({str(mine / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\nhold = []\n"
        end += "while True:\n    hold.append(bytearray(os.urandom(2**20)) * 16)\n"
        assert run(real_server, tmp_path, end, supervised=True) == 128 + 9
    finally:
        mine.rmdir()
    event = only_event(real_server)
    assert event["kind"] == "out_of_memory"
    assert "kernel" in event["summary"]
