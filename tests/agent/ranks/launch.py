"""Runs scenarios on several real ranks: imports torch once, and forks the ranks of each scenario from there.

``python launch.py FOLDER NAME:RANKS:SCENARIO,SCENARIO ...`` writes ``FOLDER/NAME.rank.json``: by scenario what it gave,
or its traceback. The scenarios of one name share their processes.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard  # noqa: F401 - imported before the forks, since it takes long
from torch.distributed.tensor import parallel  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent))
import compared
import gone
import ways

import optwatch
import optwatch.monitor

MODULES = [ways, gone, compared]
if any(item.startswith("deepspeed") for item in sys.argv[2:]):
    os.environ["DS_ACCELERATOR"] = "cpu"
    import zero

    MODULES.append(zero)


def shared_store(port: Path, rank: int, size: int) -> dist.Store:
    """As torchrun makes it: rank 0 serves it, on a free port."""
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
        port.with_suffix(".part").write_text(str(store.port))
        port.with_suffix(".part").rename(port)
        return store
    while not port.exists():
        time.sleep(0.01)
    return dist.TCPStore("127.0.0.1", int(port.read_text()), size, is_master=False, wait_for_workers=False)


def rank_main(folder: Path, name: str, scenarios: list[str], rank: int, size: int) -> None:
    logging.basicConfig(level=logging.INFO, filename=folder / f"{name}.{rank}.log", force=True)
    torch.set_num_threads(1)
    store = shared_store(folder / f"{name}.port", rank, size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    results: dict[str, Any] = {}
    for scenario in scenarios:
        began = time.process_time()
        try:
            module = next(module for module in MODULES if hasattr(module, scenario))
            results[scenario] = getattr(module, scenario)(rank, size, folder)
        except BaseException:
            results[scenario] = {"traceback": traceback.format_exc()}
        results[scenario]["cpu_seconds"] = time.process_time() - began
        part = folder / f"{name}.{rank}.part"
        part.write_text(json.dumps(results))
        part.rename(folder / f"{name}.{rank}.json")
        if "traceback" in results[scenario]:
            return  # its peers may wait for it in vain: when this process is gone they know
    dist.destroy_process_group()


def warm() -> None:
    """Have everything imported before the forks that a step and its watch import late: it is half of their time."""
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    with tempfile.TemporaryDirectory() as spool:
        settings = optwatch.Settings(address="127.0.0.1", spool_directory=Path(spool))
        monitor = optwatch.attach(optimizer, port=0, settings=settings)
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        monitor.flush()
        monitor.detach()
    gc.collect()
    gc.freeze()


def ended(children: list[int]) -> list[int]:
    """How each rank has ended. One that still stands after the first has ended is killed: nobody is left to wake it."""
    statuses = [os.waitpid(children[0], 0)[1]]
    for pid in children[1:]:
        status = os.waitpid(pid, os.WUNTRACED)[1]
        if os.WIFSTOPPED(status):
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
        statuses.append(status)
    return [os.waitstatus_to_exitcode(status) for status in statuses]


def main() -> None:
    folder = Path(sys.argv[1])
    warm()
    for item in sys.argv[2:]:
        name, size, scenarios = item.split(":")
        children = []
        for rank in range(int(size)):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    rank_main(folder, name, scenarios.split(","), rank, int(size))
                    code = 0
                finally:
                    # As a process of its own would end: exit handlers run.
                    sys.exit(code)
            children.append(pid)
        codes = ended(children)
        (folder / f"{name}.codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
