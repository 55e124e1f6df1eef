"""Our text is the library's, byte for byte, whatever values and labels are in the table; where there are hundreds of
series its numbers may have more digits, and are the same numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any
from urllib.request import Request, urlopen

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric as Family

from optwatch.export.exposition import CONTENT_TYPE, LINES_A_BLOCK, Exposition
from optwatch.export.table import Table

NUMBERS = (
    *(0.0, -0.0, 1.0, -1.5, 0.1, 1e-9, 5e-324, 999_999.0, 999_999.9, 1_000_000.0, 1_234_567.5, -1_234_567.5, -1e300),
    *(1e16, 1e22, 1.7976931348623157e308, float("inf"), float("-inf"), float("nan"), 3, 20_000_000),
)


class Collector:
    def __init__(self, table: Table) -> None:
        self.table = table

    def collect(self) -> Iterator[Family]:
        return self.table.collect()


def by_library(table: Table) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector(table))  # type: ignore[arg-type]
    return generate_latest(registry)


@pytest.fixture(params=[[()], [("Muon",), ('Adam "W"\\',)]], ids=["one optimizer", "two"])
def table(request: pytest.FixtureRequest) -> Table:
    table = Table({"run_id": 'näme "with" \\ and\nline', "rank": "0"})
    table.begin(request.param)
    for scope in request.param:
        for i, number in enumerate(NUMBERS):
            table.set("optwatch_reported", number, f"name-{i}")
            table.set("optwatch_layer_grad_norm", number, f'layer.{i}"\n\\ü%s%.17g', scope=scope)
        for seconds in (0.001, 0.2, 5.0, 1e9):
            table.observe_duration(seconds, scope=scope)
    return table


def test_it_is_what_the_library_writes_and_stays_so_as_values_and_series_come_and_go(table: Table) -> None:
    exposition = Exposition(table)
    scope = next(iter(table.read()[1]))
    for change in (
        lambda: None,
        lambda: table.set("optwatch_loss", 2.5, scope=scope),
        lambda: table.set("optwatch_loss", float("nan"), scope=scope),
        lambda: table.clear("optwatch_layer_grad_norm", scope),
        lambda: table.set("optwatch_layer_grad_norm", 1.0, "new", scope=scope),
        lambda: table.observe_duration(0.01, scope=scope),
    ):
        change()
        assert b"".join(exposition.blocks()) == by_library(table)


def test_it_comes_in_blocks_and_keeps_nothing_of_series_that_are_gone() -> None:
    table = Table({"run_id": "r", "rank": "0"})
    table.begin([()])
    for i in range(5 * LINES_A_BLOCK):
        table.set("optwatch_layer_grad_norm", i, f"layer.{i}")
    exposition = Exposition(table)
    blocks = list(exposition.blocks())
    assert len(blocks) > 5
    assert all(block.endswith(b"\n") for block in blocks)
    table.clear("optwatch_layer_grad_norm")
    assert b"layer.7" not in b"".join(exposition.blocks())
    kept = [lines for lines in exposition._lines.values() if lines.labels]
    assert sum(len(lines.labels) for lines in kept) < 100
    assert sum(len(template) for lines in kept for template in lines.templates) < 20_000


def test_numbers_of_a_full_block_are_the_librarys_to_the_last_bit_in_lines_of_the_same_series() -> None:
    table = Table({"run_id": "100%", "rank": "0"})
    table.begin([()])
    finite = [number for number in NUMBERS if abs(number) < 1e300]
    for i in range(3 * LINES_A_BLOCK + 7):
        number = math.nan if i == LINES_A_BLOCK + 3 else math.sin(i) * finite[i % len(finite)]
        table.set("optwatch_layer_grad_norm", number, f"layer.{i}%s%.17g")
    ours, theirs = (
        [line.rpartition(" ") for line in text.decode().splitlines() if line.startswith("optwatch_layer")]
        for text in (b"".join(Exposition(table).blocks()), by_library(table))
    )
    assert [series for series, _, _ in ours] == [series for series, _, _ in theirs]
    assert [float(number).hex() for _, _, number in ours] == [float(number).hex() for _, _, number in theirs]
    assert [number for _, _, number in ours] != [number for _, _, number in theirs]  # a block was written the fast way
    assert ours[LINES_A_BLOCK + 3][2] == theirs[LINES_A_BLOCK + 3][2] == "NaN"


def ask(monitor: Any, **headers: str) -> tuple[str, str]:
    with urlopen(Request(monitor.url, headers=headers)) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def test_prometheus_gets_the_text_and_who_asks_for_something_else_the_librarys_answer(
    watch: Any, net: Any, step: Any
) -> None:
    import torch

    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = watch(optimizer)
    step(optimizer)
    assert monitor.flush()
    prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1"
    for accepted in (prometheus, "*/*", "text/plain"):
        kind, text = ask(monitor, Accept=accepted)
        assert kind == CONTENT_TYPE
        assert "\noptwatch_steps_total{" in text
        assert not text.endswith("# EOF\n")
    kind, text = ask(monitor, Accept="application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")
