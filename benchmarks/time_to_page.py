"""From a step that goes NaN to the pager, with the shipped configuration and real processes, through either path.

    python benchmarks/time_to_page.py [--rounds 20] [--write]

A round is one small training run that goes NaN by its learning rate; the runs of a path start a few seconds apart, so
that they fall anywhere within scrape and evaluation intervals. Time runs from the event's `occurred_at`, the beginning
of the step, to the notification's arrival at the receiver. Each run has to page exactly once. No more than four runs
share one Prometheus and Alertmanager: a fifth would make it a flood, which is one page for all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

from optwatch_server.local.everything import Local, local

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results") / "time_to_page.md"
SHARED = 4
"""Runs that share one Prometheus and Alertmanager."""
SPACING = 3.7
"""Seconds between two starts: no multiple of the 5 s that scrapes and evaluations take."""


def measure(direct: bool, rounds: int) -> tuple[list[float], int]:
    """Seconds from step to page, one a run, and how many pages came besides the first of each run."""
    with tempfile.TemporaryDirectory(prefix="optwatch-page-") as name, ExitStack() as running:
        folder = Path(name)
        count = math.ceil(rounds / SHARED)
        products = [running.enter_context(local(folder / str(i), direct=direct)) for i in range(count)]
        runs: dict[str, Local] = {}
        for i in range(rounds):
            runs[f"round-{i}"] = products[i % count]
            running.callback(_end, _train(folder, products[i % count].server, i))
        return _arrivals(runs)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _train(folder: Path, server: str, number: int) -> subprocess.Popen[bytes]:
    time.sleep(SPACING)
    environment = os.environ | {
        "OPTWATCH_SERVER": server,
        "OPTWATCH_RUN_ID": f"round-{number}",
        "OPTWATCH_PORT": "0",
        "OPTWATCH_ADDRESS": "127.0.0.1",
        "OPTWATCH_SPOOL_DIRECTORY": str(folder / "spool"),
        "OMP_NUM_THREADS": "1",
    }
    script = ROOT / "examples" / "fleet_run.py"
    command = [sys.executable, str(script), "nan", "--steps", "100000"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _pages(product: Local) -> list[tuple[str, float]]:
    """Run and time of each page for a NaN that arrived."""
    return [
        (alert["labels"]["run_id"], notification.arrived_at)
        for notification in product.receiver.notifications
        for alert in (notification.alerts if notification.receiver == "page" else ())
        if alert["labels"]["alertname"] == "TrainingNonFinite" and alert["status"] == "firing"
    ]


def _arrivals(runs: dict[str, Local]) -> tuple[list[float], int]:
    products = {id(product): product for product in runs.values()}.values()
    deadline = time.monotonic() + 120
    while {run for p in products for run, _ in _pages(p)} != set(runs) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(35)  # longer than a group's interval: a second page would have come
    pages = [page for product in products for page in _pages(product)]
    taken = []
    for run_id, product in runs.items():
        first = min((at for run, at in pages if run == run_id), default=None)
        if first is None:
            raise SystemExit(f"{run_id} did not page")
        with urllib.request.urlopen(f"{product.server}/api/v1/runs/{run_id}/events", timeout=10) as response:
            event = next(e for e in json.load(response)["events"] if e["kind"] == "nonfinite")
        taken.append(first - event["occurred_at"])
    return taken, len(pages) - len(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--write", action="store_true", help=f"write the table to {RESULTS.name}")
    options = parser.parse_args()
    lines = [
        "# Time to page\n",
        f"`python benchmarks/time_to_page.py --rounds {options.rounds} --write` · Python {platform.python_version()} · "
        f"{platform.machine()}, {os.cpu_count()} cores, {options.rounds} training processes at a time\n",
        "| path | median | p99 | worst | pages beyond one a run |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, direct in (("Prometheus alone", False), ("server at once, and Prometheus", True)):
        taken, more = measure(direct, options.rounds)
        p99 = statistics.quantiles(taken, n=100, method="inclusive")[98]
        lines.append(f"| {name} | {statistics.median(taken):.1f} s | {p99:.1f} s | {max(taken):.1f} s | {more} |")
        print(lines[-1], flush=True)
    if options.write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
