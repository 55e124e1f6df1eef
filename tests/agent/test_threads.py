"""The agent's threads compute alone: a pool of theirs would be more threads than cores, and training would sleep."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys, threading
import torch
from optwatch import Settings, attach
from optwatch.threads import compute_alone

LARGE = torch.rand(200_000, dtype=torch.float64)

def tasks():
    return set(map(int, os.listdir("/proc/self/task")))

def compute():
    # A pool of OpenMP's, and MKL's own vectors, of 150 numbers already.
    return LARGE.add(1).sum(), LARGE[:500].sqrt()

def in_thread(*work):
    started = []
    def run():
        for each in work:
            each()
        started.extend(tasks() - before - {threading.get_native_id()})
    before = tasks()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return len(started)

torch.set_num_threads(2)
compute()
print(in_thread(compute), in_thread(compute_alone, compute), torch.get_num_threads())

# As many tensors as MKL shares out the roots of.
model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(500)))
optimizer = torch.optim.AdamW(model.parameters())
for step in range(25):
    if step == 2:
        before = tasks()
        monitor = attach(optimizer, model=model, port=0, settings=Settings(address="127.0.0.1", sample_every=10))
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    compute()
assert monitor.flush(60)
assert monitor.snapshot()["optwatch_steps_total"] == 23
print(len(tasks() - before - {thread.native_id for thread in threading.enumerate()}), torch.get_num_threads())
monitor.detach()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_thread_of_the_agent_starts_no_threads_to_compute_with_and_training_keeps_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        env=os.environ | {"OMP_NUM_THREADS": "2", "OPTWATCH_SPOOL_DIRECTORY": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    pools, agent = done.stdout.splitlines()
    assert pools == "1 0 2", "a thread makes a pool, one that computes alone does not, and the others stay as they are"
    assert agent == "0 2"
