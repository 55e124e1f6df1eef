"""The host process holds no more after 100 000 steps than after 20 000, with all of it on and no server there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RESIDENT = 2**20
"""Bytes that the allocators may still cut otherwise: a float kept at each of 80 000 steps would be twice as many."""
ALLOCATED = 2**14
"""Bytes of C's: one kept in five steps is as many."""
BLOCKS = 1000
"""Blocks of the interpreter's own allocator, which come and go with its free lists: one kept in 80 steps is more."""
OBJECTS = 20
"""Objects of one type: one kept with each checkpoint is more."""
REFERENCES = 220
"""Dead references to cursors, of which the standard library's sqlite3 throws away every two hundred at once."""


def trained(folder: Path, steps: int, measures: int, *options: str) -> list[dict[str, Any]]:
    """What `memory_run.py` saw: its measurements, and last what it has exported."""
    command = [sys.executable, str(Path(__file__).with_name("memory_run.py")), str(folder), str(steps), str(measures)]
    # Each thread keeps freed memory of each size for its next request, and over tens of thousands of steps ever more
    # sizes: without that the allocator knows to the byte what is held.
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
    done = subprocess.run(
        [*command, *options], env=environment, capture_output=True, text=True, timeout=850, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def grown(measured: list[dict[str, Any]]) -> dict[str, int]:
    """What the process holds more of at the end than after the first measurement, by kind, beyond what is allowed."""
    first, last = measured[0], measured[-1]
    more = {name: last[name] - first[name] for name in ("resident", "allocated", "blocks")}
    more |= {kind: count - first["objects"].get(kind, 0) for kind, count in last["objects"].items()}
    allowed = {"resident": RESIDENT, "allocated": ALLOCATED, "blocks": BLOCKS, "weakref.ReferenceType": REFERENCES}
    return {kind: count for kind, count in more.items() if count > allowed.get(kind, OBJECTS)}


@pytest.mark.slow
@pytest.mark.timeout(900)  # two minutes on a machine that does nothing else
def test_memory_grows_by_nothing_over_a_hundred_thousand_steps(tmp_path: Path) -> None:
    *measured, values = trained(tmp_path, 100_000, 5)
    assert len(measured) == 5
    assert grown(measured) == {}
    assert values["optwatch_steps_total"] == 100_000
    # Every row has come, the spikes were told, and nobody took them.
    assert values['optwatch_agent_dropped_total{what="rows"}'] == 0
    assert values['optwatch_events_total{kind="loss_spike",severity="warning"}'] > 0
    assert values["optwatch_agent_undelivered_messages"] > 0
    faults = {series for series, count in values.items() if series.startswith("optwatch_agent_errors") and count}
    assert faults == {'optwatch_agent_errors_total{where="reporter"}'}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sink_that_keeps_every_record_is_seen_to_grow(tmp_path: Path) -> None:
    found = grown(trained(tmp_path, 8_000, 2, "keep")[:-1])
    assert {"resident", "allocated", "blocks", "optwatch.record.StepRecord"} <= set(found)
    assert found["optwatch.record.StepRecord"] == 4_000
