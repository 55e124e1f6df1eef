"""What Prometheus scrapes, read from the real port."""

from __future__ import annotations

import logging
import math
import shutil
import socket
import subprocess
from itertools import product
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from optwatch import attach
from optwatch.catalogue import BY_NAME, METRICS, RUN_WIDE, severities


def scrape(monitor: Any) -> str:
    with urlopen(monitor.url) as answer:
        return str(answer.read().decode())


def samples(monitor: Any) -> list[Any]:
    return [sample for family in parse(scrape(monitor)) for sample in family.samples]


def lint(text: str) -> str:
    tool = shutil.which("promtool")
    assert tool, "promtool is not installed: apt-get install prometheus (or run scripts/packages)"
    done = subprocess.run([tool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    return f"{done.returncode} {done.stdout}{done.stderr}"


def counters(scopes: list[dict[str, str]]) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    """Every counter of the catalogue with every combination of its label values, as it must exist from the start."""
    return {
        (metric.name, tuple(sorted((dict(zip(metric.labels, values, strict=True)) | scope).items())))
        for metric in METRICS
        if metric.kind == "counter"
        for scope in ([{}] if metric.name in RUN_WIDE else scopes)
        for values in product(*metric.values)
        if metric.name != "optwatch_events_total" or values[1] in severities(values[0])
    }


@pytest.mark.parametrize("several", [False, True])
def test_every_counter_of_the_catalogue_is_0_before_the_first_step(several: bool, watch: Any, net: Any) -> None:
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in net.parameters()][: 2 if several else 1]
    found = {
        (s.name, tuple(sorted((k, v) for k, v in s.labels.items() if k not in ("run_id", "rank")))): s.value
        for s in samples(watch(*optimizers))
        if s.name in BY_NAME and BY_NAME[s.name].kind == "counter"
    }
    scopes = [{"optimizer": "SGD0"}, {"optimizer": "SGD1"}] if several else [{}]
    assert set(found) == counters(scopes)
    # Time spent attaching is the one thing that has been counted by then.
    assert {key[0] for key, value in found.items() if value} <= {"optwatch_agent_overhead_seconds_total"}


def test_every_sample_is_the_catalogues_and_carries_the_run_and_rank(
    watch: Any, net: Any, step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    monitor = watch(optimizer)
    for _ in range(12):
        step(optimizer)
    monitor.log(val_loss=1.0)
    assert monitor.flush(30)
    for family in parse(scrape(monitor)):
        metric = BY_NAME[family.name if family.name in BY_NAME else f"{family.name}_total"]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        for sample in family.samples:
            labels = dict(sample.labels)
            assert (labels.pop("run_id"), labels.pop("rank")) == (monitor.run.id, "3")
            labels.pop("le", None)
            assert tuple(sorted(labels)) == tuple(sorted(metric.labels))


def test_several_optimizers_are_told_apart_and_the_run_is_not(watch: Any, net: Any, step: Any) -> None:
    first, second = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in net)
    monitor = watch(first, second)
    step(first)
    second.step()
    second.step()
    assert monitor.flush(30)
    found = samples(monitor)
    steps = {s.labels["optimizer"]: s.value for s in found if s.name == "optwatch_steps_total"}
    assert steps == {"SGD0": 1, "SGD1": 2}
    for sample in found:
        base = next(n for n in (sample.name, sample.name.rpartition("_")[0]) if n in BY_NAME)
        has = sample.labels.get("optimizer")
        assert (has is None) == (base in RUN_WIDE and base != "optwatch_run_info")
    (info,) = [s for s in found if s.name == "optwatch_run_info"]
    assert info.labels["optimizer"] == "SGD+SGD"


def test_promtool_finds_nothing_to_complain_of(watch: Any, net: Any, step: Any) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    monitor = watch(optimizer, run='a "name"\\ with\nlines')
    before = lint(scrape(monitor))
    for scale in (1.0, 1.0, float("nan")):
        step(optimizer, scale)
    monitor.log(tokens=5, val_loss=float("inf"))
    assert monitor.flush(30)
    assert (before, lint(scrape(monitor))) == ("0 ", "0 ")


def test_the_linter_is_able_to_complain() -> None:
    assert lint("# TYPE optwatch_steps counter\noptwatch_steps 1\n")[0] != "0"


def test_openmetrics_is_served_to_those_who_ask_for_it(watch: Any, net: Any, step: Any) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    monitor = watch(optimizer)
    step(optimizer)
    assert monitor.flush(30)
    asked = Request(monitor.url, headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    with urlopen(asked) as answer:
        text = answer.read().decode()
    assert text.endswith("# EOF\n")
    assert {f.name for f in parse_openmetrics(text)} >= {"optwatch_steps", "optwatch_loss"}


def test_nan_and_inf_are_exported_as_they_are(watch: Any, net: Any, step: Any) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = watch(optimizer)
    step(optimizer, float("nan"))
    monitor.log(up=float("inf"), down=float("-inf"))
    assert monitor.flush(30)
    found = {s.labels.get("name", s.name): s.value for s in samples(monitor)}
    assert math.isnan(found["optwatch_loss"])
    assert (found["up"], found["down"]) == (math.inf, -math.inf)
    assert "optwatch_loss{" in scrape(monitor)


@pytest.mark.parametrize("layers", [3, 100])
def test_a_rank_has_at_most_200_series_by_default(layers: int, watch: Any, step: Any) -> None:
    net = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(layers)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    monitor = watch(optimizer)
    for _ in range(11):
        optimizer.zero_grad()
        net(torch.ones(2, 4)).mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    assert monitor.flush(30)
    found = samples(monitor)
    assert min(layers, 20) <= len({s.labels["layer"] for s in found if "layer" in s.labels}) <= 32
    assert len(found) <= 200


def test_a_taken_port_falls_back_to_a_free_one_and_says_so(settings: Any, net: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "optwatch")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monitor = attach(torch.optim.SGD(net.parameters(), lr=0.1), port=port, settings=settings())
        try:
            mine = int(monitor.url.removesuffix("/metrics").rpartition(":")[2])
            assert mine != port
            assert (
                f"optwatch: port {port} is taken; metrics are on port {mine} instead (attach(port=0) asks for any free "
                "one)"
            ) in caplog.messages
            assert f"optwatch: run {monitor.run.id}, metrics on http://127.0.0.1:{mine}/metrics" in caplog.messages
        finally:
            monitor.detach()


def test_the_port_is_free_again_after_detach_and_can_be_asked_for(settings: Any, net: Any) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    first = attach(optimizer, port=0, settings=settings())
    port = int(first.url.removesuffix("/metrics").rpartition(":")[2])
    first.detach()
    second = attach(optimizer, port=port, settings=settings())
    try:
        assert second.url == first.url
        assert second is not first
    finally:
        second.detach()
    with pytest.raises(URLError, match="refused"):
        urlopen(first.url)


def test_two_monitors_in_one_process_count_their_own(watch: Any, net: Any, step: Any) -> None:
    other = torch.nn.Linear(2, 1)
    mine, theirs = torch.optim.SGD(net.parameters(), lr=0.1), torch.optim.SGD(other.parameters(), lr=0.1)
    first, second = watch(mine), watch(theirs)
    for _ in range(3):
        step(mine)
    assert first.flush(30)
    assert second.flush(30)
    assert first.url != second.url
    counts = [
        {s.labels["run_id"]: s.value for s in samples(m) if s.name == "optwatch_steps_total"} for m in (first, second)
    ]
    assert counts == [{first.run.id: 3}, {second.run.id: 0}]


def test_an_address_of_another_machine_is_refused_by_name(settings: Any, net: Any) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(OSError, match=r"Settings\(address='192\.0\.2\.1'\): .*; give an address of this machine"):
        attach(optimizer, port=0, settings=settings(address="192.0.2.1"))


def test_the_url_of_an_ipv6_address_is_one(settings: Any, net: Any) -> None:
    monitor = attach(torch.optim.SGD(net.parameters(), lr=0.1), port=0, settings=settings(address="::1"))
    try:
        assert monitor.url.startswith("http://[::1]:")
        assert "optwatch_run_info" in scrape(monitor)
    finally:
        monitor.detach()


def test_a_client_that_leaves_in_the_middle_disturbs_nobody(watch: Any, net: Any, capfd: Any) -> None:
    monitor = watch(torch.optim.SGD(net.parameters(), lr=0.1))
    port = int(monitor.url.removesuffix("/metrics").rpartition(":")[2])
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    assert "optwatch_run_info" in scrape(monitor)
    assert monitor.faults.counts == {}
