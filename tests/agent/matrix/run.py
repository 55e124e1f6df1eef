"""Trains cells of the matrix, each with and without optwatch, and compares every number with the float64 oracle.

``python run.py --out FOLDER`` runs all of them, ``--covering`` a part that has every pair of factors' values,
``--slice 3/8`` the third eighth. One cell for each reason to exclude some is run too, and has to fail by itself.
torch is imported once; of each number of ranks one set of processes runs its cells one after the other. What was done
before is kept in FOLDER and not done again.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import random
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "ranks"))
import launch
import torch
import torch.distributed as dist
from cells import Cell, covering, every, excluded, excuses
from compare import SKIPPED, SKIPPED_IN_VAIN, difference
from oracle import Oracle
from report import page
from subjects import build

from optwatch import Settings, attach

STEPS = 2
"""That are taken; a scaler skips one more."""
TIMEOUT = timedelta(seconds=40)
"""After which ranks give up one that has failed in the middle of a cell."""
Result = dict[str, Any]


def warm() -> None:
    """Import and compile before the forks what each rank would otherwise do for itself."""
    launch.warm()
    layer = torch.nn.Linear(2, 2)
    torch.compile(layer, backend="aot_eager")(torch.ones(1, 2)).sum().backward()
    torch.compiler.reset()
    gc.collect()
    gc.freeze()


def train(cell: Cell, rank: int, spool: Path, watched: bool) -> Result:
    """Losses, this rank's weights and, where it is watched, what was exported wrongly."""
    torch.compiler.reset()  # else the ninth block of one class is left eager
    torch._dynamo.utils.counters.clear()
    training = build(cell, rank)
    monitor = None
    if watched:
        settings = Settings(address="127.0.0.1", spool_directory=spool, sample_every=1, overhead_budget=1.0)
        monitor = attach(training.optimizer, port=0, settings=settings)
    losses, problems, taken, skipped, compared = [], [], 0, 0, 0
    try:
        for step in range(STEPS + (training.scaler is not None)):
            oracle = Oracle(training)
            losses.append(sum(training.backward(step, micro) for micro in range(cell.accumulation)))
            if cell.clip:
                training.unscale()
                if watched:
                    oracle.before_clip()
                training.clip()
            if watched:
                oracle.before(unscaled=cell.clip)
                taken, skipped = taken + (not oracle.skipped), skipped + oracle.skipped
                oracle.want |= {"optwatch_steps_total": taken, "optwatch_loss": losses[-1]}
                oracle.want["optwatch_accumulation_steps"] = cell.accumulation
            training.step()
            if monitor is not None:
                oracle.after()
                oracle.want |= {SKIPPED: skipped, SKIPPED_IN_VAIN: 0}
                assert monitor.flush(60)
                got = monitor.snapshot()
                if not oracle.skipped:
                    compared += len(oracle.want) if rank == 0 else 0
                    problems += [f"step {step}: {said}" for said in difference(oracle.want, got, rank == 0)]
                elif got[SKIPPED] != skipped or got["optwatch_steps_total"] != taken or got[SKIPPED_IN_VAIN]:
                    problems.append(f"step {step}: {got[SKIPPED]} steps counted as skipped instead of {skipped}")
            training.optimizer.zero_grad()
        if monitor is not None and monitor.faults.counts:
            problems.append(f"faults: {monitor.faults.counts}")
    finally:
        if monitor is not None:
            monitor.detach()
    local = [p.to_local() if hasattr(p, "to_local") else p for p in training.named.values()]
    return {
        "losses": losses,
        "weights": [p.detach().clone() for p in local],
        "problems": problems,
        "compared": compared,
        "skipped": skipped,
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    }


def run(cell: Cell, rank: int, folder: Path) -> Result:
    """One cell on this rank: what is wrong in it, in words, and how much was compared."""
    began = time.process_time()
    without, within = (train(cell, rank, folder / f"spool{rank}", watched) for watched in (False, True))
    problems = within["problems"]
    if within["losses"] != without["losses"]:
        problems.append(f"losses are {within['losses']}, and {without['losses']} without us")
    if not all(map(torch.equal, within["weights"], without["weights"])):
        problems.append("weights differ with and without us")
    if bool(within["graphs"]) != cell.compiled or within["graphs"] != without["graphs"]:
        problems.append(f"{within['graphs']} graphs compiled, and {without['graphs']} without us")
    wanted = 1 if cell.precision == "fp16+scaler" else 0
    if within["skipped"] != wanted:
        problems.append(f"{within['skipped']} steps overflowed instead of {wanted}: nothing was shown")
    return {"problems": problems, "compared": within["compared"], "cpu_seconds": time.process_time() - began}


def rank_main(folder: Path, cells: list[Cell], rank: int, size: int) -> None:
    """Run cells until all are done or one fails; rank 0 keeps what all of them found."""
    logging.basicConfig(level=logging.INFO, filename=folder / f"{size}.{rank}.log", force=True)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if size > 1:
        store = launch.shared_store(folder / f"{size}.port", rank, size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    for cell in cells:
        failed = False
        try:
            mine = run(cell, rank, folder)
        except Exception:
            mine, failed = {"problems": [traceback.format_exc()], "compared": 0, "cpu_seconds": 0}, True
        results = [mine]
        if size > 1:
            results = [{}] * size
            try:
                dist.all_gather_object(results, mine)
            except RuntimeError:  # another rank is elsewhere: this one says what it knows
                results, failed = [mine], True
        if rank == 0:
            found = [f"rank {i}: {said}" for i, one in enumerate(results) for said in one["problems"]]
            line = {"cell": cell.name, "problems": found, "compared": results[0]["compared"]}
            line["cpu_seconds"] = sum(one["cpu_seconds"] for one in results)
            with (folder / "results.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        if failed and size > 1:
            os._exit(1)  # collectives may hang in threads of it
    if size > 1:
        dist.destroy_process_group()


def world(folder: Path, cells: list[Cell], size: int) -> None:
    """Fork the ranks of one world and wait for them."""
    (folder / f"{size}.port").unlink(missing_ok=True)
    children = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                rank_main(folder, cells, rank, size)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)


def done(folder: Path) -> dict[str, Result]:
    """Results so far, by cell."""
    path = folder / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {one["cell"]: one for one in map(json.loads, lines)}


def run_all(folder: Path, cells: list[Cell]) -> None:
    """Run those not done yet; a world that ended early is begun anew with what is left, a cell that ended it fails."""
    for size in sorted({cell.ranks for cell in cells}):
        while left := [cell for cell in cells if cell.ranks == size and cell.name not in done(folder)]:
            before = len(done(folder))
            world(folder, left, size)
            if len(done(folder)) == before:
                line = {"cell": left[0].name, "problems": ["its processes ended without a word"], "compared": 0}
                with (folder / "results.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of results.jsonl, made where it is missing")
    parser.add_argument("--covering", action="store_true", help="a part of the cells with every pair of values")
    parser.add_argument("--slice", default="1/1", help="PART/PARTS of the cells")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--report", type=Path, help="file to write the results to, all of FOLDER's")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    cells = [cell for cell in every() if excluded(cell) is None]
    cells = covering(cells) if options.covering else cells
    cells = [cell for cell in cells if options.only in cell.name]
    random.Random(0).shuffle(cells)  # so that each slice has something of everything
    part, parts = map(int, options.slice.split("/"))
    cells = cells[part - 1 :: parts]
    proofs = excuses(every())
    warm()
    run_all(options.out, [*cells, *proofs.values()])
    results = done(options.out)
    failed = {cell.name: said for cell in cells if (said := results[cell.name]["problems"])}
    for reason, cell in proofs.items():
        if not any("Traceback" in said for said in results[cell.name]["problems"]):
            failed[cell.name] = [f"is excluded, and it can be trained. The reason was: {reason}"]
    for name, said in failed.items():
        print(name, *(one if len(one) < 500 else f"... {one[-500:]}" for one in said[:4]), sep="\n    ")
    print(f"{len(cells)} cells, {len(failed)} failed; {len(proofs)} reasons of excluded cells tried")
    if options.report:
        machine = f"torch {torch.__version__} on {platform.machine()}, {os.cpu_count()} cores."
        options.report.write_text(page(results, machine), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
