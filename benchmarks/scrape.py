"""What a scrape costs: its time, what it allocates, and a training step in which it happens, beside the library's.

    python benchmarks/scrape.py [--rounds N] [--write]

Both renderers serve the same table. A scrape is timed as the process that trains sees it (the whole answer, without a
network), and once more over HTTP from another process while a small model trains, where the step that it falls into
is compared with the steps around it.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry, generate_latest, make_wsgi_app
from prometheus_client.core import Metric as Family
from torch import nn

from optwatch.export.exporter import Exporter
from optwatch.export.exposition import Exposition
from optwatch.export.table import Table
from optwatch.faults import Faults

RESULTS = Path(__file__).with_name("results") / "scrape.md"
SERIES = (200, 2000, 20_000)
CLIENT = "import sys, urllib.request; [urllib.request.urlopen(sys.argv[1]).read() for _ in sys.stdin]"


class Collector:
    """The table, for the library's renderer."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def collect(self) -> Iterator[Family]:
        return self.table.collect()


def table_of(series: int) -> Table:
    table = Table({"run_id": "gpt-small-20261122-101500-7e1b0c", "rank": "0"})
    table.begin([()])
    table.observe_duration(0.1)
    for i in range(series - len(table.snapshot())):
        table.set("optwatch_layer_grad_norm", 1 / (i + 3), f"transformer.blocks.{i}.attention")
    return table


def renderers(table: Table) -> dict[str, Callable[[], object]]:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector(table))  # type: ignore[arg-type]
    exposition = Exposition(table)
    # As a server sends it: a block at a time, none of which is kept.
    return {
        "prometheus-client": lambda: generate_latest(registry),
        "optwatch": lambda: sum(len(block) for block in exposition.blocks()),
    }


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def allocated(work: Callable[[], object]) -> int:
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def longer(table: Table, rounds: int, library: bool) -> list[float]:
    """Seconds by which a step with a scrape in it is longer than the median of the steps around it."""
    exporter = Exporter(table, lambda: None, "127.0.0.1", 0, Faults())
    if library:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(Collector(table))  # type: ignore[arg-type]
        exporter._server.set_app(make_wsgi_app(registry, disable_compression=True))
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(24)))
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(512, 256)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    client = subprocess.Popen([sys.executable, "-c", CLIENT, exporter.url], stdin=subprocess.PIPE, text=True, bufsize=1)
    assert client.stdin
    found = []
    try:
        for _ in range(rounds):
            around = [timed(step) for _ in range(6)]
            client.stdin.write("scrape\n")
            client.stdin.flush()
            # The steps in which the answer is being made: the next ones, together, less what they would have taken.
            within = [timed(step) for _ in range(6)]
            around += [timed(step) for _ in range(6)]
            found.append(sum(within) - 6 * statistics.median(around))
    finally:
        client.stdin.close()
        client.wait(10)
        exporter.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--write", action="store_true", help=f"write the table to {RESULTS.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Cost of a scrape\n",
        f"`python benchmarks/scrape.py --rounds {options.rounds} --write` · Python {platform.python_version()} · "
        f"{platform.machine()}, median (quartiles) over {options.rounds} rounds\n",
        "| series | renderer | time | peak of what it allocates | training longer by |",
        "| --- | --- | --- | --- | --- |",
    ]
    for series in SERIES:
        table = table_of(series)
        works = renderers(table)
        times: dict[str, list[float]] = {name: [] for name in works}
        for work in works.values():
            work()
        for _ in range(options.rounds):
            for name, work in works.items():
                times[name].append(timed(work))
        for name, work in works.items():
            low, middle, high = (1e3 * t for t in statistics.quantiles(times[name], n=4))
            later = [1e3 * t for t in statistics.quantiles(longer(table, options.rounds, name != "optwatch"), n=4)]
            memory = allocated(work) / 2**20
            lines.append(
                f"| {series} | {name} | {middle:.2f} ms ({low:.2f} to {high:.2f}) | {memory:.2f} MiB | "
                f"{later[1]:.1f} ms ({later[0]:.1f} to {later[2]:.1f}) |"
            )
            print(lines[-1], flush=True)
    print("\n".join(lines))
    if options.write:
        RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
