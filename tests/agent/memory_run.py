"""Trains a tiny model for many steps with everything on. Prints now and then what the process holds, last its values.

By itself a process, since resident memory is a process's. Arguments: a folder, the steps, how often to measure in them,
and ``keep`` for a sink that never lets go of a record.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import socket
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optwatch import Monitor, Settings, attach

FLUSH_EVERY = 100
"""Fewer steps than the ring has rows: none is dropped, however slow the host thread is."""
LOG_EVERY = 5
SCRAPE_EVERY = 500
CHECKPOINT_EVERY = 2500
SPIKE_EVERY = 5000
READINGS = 5
"""What a thread holds while it sends a heartbeat, a megabyte now and then, is not in the least of so many."""
PAGE = os.sysconf("SC_PAGE_SIZE")


class Allocator(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    ]


class Keeping:
    """A sink that leaks."""

    def __init__(self) -> None:
        self.records: list[Any] = []

    def record(self, record: Any) -> None:
        self.records.append(record)

    def event(self, event: Any) -> None:
        pass


def resident() -> int:
    """Bytes of memory, after a rest in which the other threads go on."""
    time.sleep(0.2)
    # Freed memory goes back to the system first: what stays is what is held, and not how the allocator cut it.
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def allocated() -> int:
    """Bytes that the C allocator has given out and not got back. A chunk that a thread keeps for its next request, with
    GLIBC_TUNABLES=glibc.malloc.tcache_count at more than 0, counts as given out."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Allocator
    return int(mallinfo().uordblks)


def held(monitor: Monitor) -> dict[str, Any]:
    """What this process holds once nothing is under way: bytes that are resident, and those that C code has allocated;
    the interpreter's blocks of memory, and the objects that its garbage collector knows, by type."""
    assert monitor.flush(60)
    gc.collect()
    kinds = Counter(map(type, gc.get_objects()))
    objects = {sys.intern(f"{kind.__module__}.{kind.__qualname__}"): count for kind, count in kinds.items()}
    blocks = sys.getallocatedblocks()
    return {
        "resident": min(resident() for _ in range(READINGS)),
        "allocated": allocated(),
        "blocks": blocks,
        "objects": objects,
    }


def main() -> None:
    folder, steps, measures = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    nobody = socket.socket()  # bound and not listening: every connection is refused
    nobody.bind(("127.0.0.1", 0))
    # A budget that is never exceeded: how much is read must not depend on how busy the machine is.
    settings = Settings(
        address="127.0.0.1",
        spool_directory=folder / "spool",
        sample_every=10,
        overhead_budget=1.0,
        heartbeat_interval_seconds=1.0,
    )
    server = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    monitor = attach(optimizer, model=model, server=server, port=0, settings=settings)
    if "keep" in sys.argv[4:]:
        monitor.sinks.append(Keeping())
    inputs = torch.randn(997, 1, 1)
    data = list(zip(inputs, 2 * inputs + torch.randn(997, 1, 1), strict=True))
    for step in range(1, steps + 1):
        x, y = data[step % len(data)]
        loss = nn.functional.mse_loss(model(x), y)
        if step % SPIKE_EVERY == 0:
            loss = loss * 1000
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % LOG_EVERY == 0:
            monitor.log(tokens=512, val_loss=2 + step % 7 / 100, batch_id=f"shard-{step // 1000}/{step}")
        if step % FLUSH_EVERY == 0:
            assert monitor.flush(60)
        if step % SCRAPE_EVERY == 0:
            urllib.request.urlopen(monitor.url).read()
        if step % CHECKPOINT_EVERY == 0:
            with monitor.checkpoint(folder / f"{step}.pt") as checkpoint:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint.path)
        if step % (steps // measures) == 0:
            print(json.dumps(held(monitor)), flush=True)  # and kept here it would be what grows
    values = monitor.snapshot()
    monitor.detach()
    print(json.dumps(values))


if __name__ == "__main__":
    main()
