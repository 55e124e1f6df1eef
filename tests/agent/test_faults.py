"""Whatever breaks inside the agent, training computes the same, and the fault is counted and said once."""

from __future__ import annotations

import logging
import socket
import threading
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch

from optwatch import kernels
from optwatch.delivery.reporter import Reporter
from optwatch.detectors import NonFiniteDetector, SpikeDetector
from optwatch.faults import Faults

STEPS = 250


class InjectedError(Exception):
    pass


def broken(*_: Any, **__: Any) -> Any:
    raise InjectedError("injected")


class BrokenSink:
    record = event = staticmethod(broken)


def train(attach: Any, at_step: Any) -> list[bytes]:
    torch.manual_seed(5)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    monitor = attach(optimizer)
    losses = []
    for number in range(1, STEPS + 1):
        at_step(monitor, number)
        optimizer.zero_grad()
        loss = net(torch.randn(16, 8)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(bytes(loss.detach().reshape(1).view(torch.uint8).tolist()))
    return losses


def test_a_thousand_faults_fail_no_step_change_no_loss_and_are_each_counted(
    watch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dead_server = f"http://127.0.0.1:{listener.getsockname()[1]}"
    (tmp_path / "file").write_text("")
    injected: Counter[str] = Counter()
    monitors: list[Any] = []
    post = Reporter._post

    def counted(*arguments: Any) -> Any:
        try:
            return post(*arguments)
        except OSError:
            injected["reporter"] += 1
            raise

    monkeypatch.setattr(Reporter, "_post", counted)

    def attach(optimizer: Any) -> Any:
        # The server is dead and the spool's folder cannot be made; weights are read in the first steps only.
        # A budget of 1 is none: gradients are read at every step.
        settings = {"sample_every": 10_000, "overhead_budget": 1, "update_scratch_bytes": 0, "kernel": "off"}
        monitor = watch(optimizer, server=dead_server, spool_directory=tmp_path / "file" / "spool", **settings)
        injected["spool"] += 2  # nor that of what the detectors know, at the end
        injected["sink"] += 1  # nor the black box
        monitor.sinks.append(BrokenSink())
        monitors.append(monitor)
        return monitor

    def at_step(monitor: Any, number: int) -> None:
        (watched,) = monitor._watches.values()
        assert monitor.flush(30)
        if number == 5:  # from now on gradients cannot be reduced
            monkeypatch.setattr(watched._current().reducer, "square_sums", broken)
            monkeypatch.setattr(monitor._table, "read", broken)
            monkeypatch.setattr(NonFiniteDetector, "observe", broken)
        if number >= 5:
            injected["hook"] += 2  # before clipping and at the step
            injected["detector"] += 1
            assert urlopen(monitor.url).read() == b""
            injected["exporter"] += 1
        monitor.log(val_loss="a text")
        injected["hook"] += 1
        injected["sink"] += 1

    caplog.set_level(logging.WARNING, "optwatch")
    with_faults = train(attach, at_step)
    (monitor,) = monitors
    monitor.detach()
    monkeypatch.undo()
    assert with_faults == train(lambda optimizer: None, lambda monitor, number: None)
    assert monitor.faults.counts == dict(injected)
    assert sum(injected.values()) >= 1000
    shown = monitor.snapshot()
    for where, count in injected.items():
        assert shown[f'optwatch_agent_errors_total{{where="{where}"}}'] == count
    said = [record.message for record in caplog.records if "which training does not notice" in record.message]
    # One line for each place and kind of error: besides the injected one the hook has seen a TypeError from log(), and
    # the sinks a folder that is none.
    places = Counter(message.split("a fault in its ")[1].split(",")[0] for message in said)
    assert places == {"spool": 1, "reporter": 1, "sink": 2, "detector": 1, "exporter": 1, "hook": 2}


def test_a_fault_in_what_the_agent_says_of_itself_costs_the_scrape_nothing(
    watch: Any, net: Any, step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = watch(optimizer)
    step(optimizer)
    assert monitor.flush(30)
    monkeypatch.setattr(monitor._exporter, "_refresh", broken)
    assert "optwatch_steps_total{" in urlopen(monitor.url).read().decode()
    assert monitor.faults.counts == {"exporter": 1}


def test_one_raising_sink_or_detector_loses_neither_the_other_sinks_nor_the_nans_event(
    watch: Any, net: Any, step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SpikeDetector, "observe", broken)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = watch(optimizer)
    monitor.sinks.insert(0, BrokenSink())
    step(optimizer, float("nan"))
    assert monitor.flush(30)
    shown = monitor.snapshot()
    assert shown['optwatch_events_total{kind="nonfinite",severity="critical"}'] == 1
    assert shown["optwatch_steps_total"] == 1
    # Both signals have a spike detector; the sink failed on the record and on the event.
    assert monitor.faults.counts == {"detector": 2, "sink": 2}


@pytest.mark.parametrize("kernel", ["auto", "off"])
@pytest.mark.parametrize("at", [1, 25])
def test_a_parameter_whose_memory_is_given_back_costs_its_own_statistics_and_not_the_process(
    watch: Any, kernel: str, at: int
) -> None:
    kernels.prepare().join()
    buffer = torch.ones(3000)
    net = torch.nn.Linear(8, 1)
    net.register_parameter("offloaded", torch.nn.Parameter(torch.zeros(1)))
    net.offloaded.data = buffer[1000:2000]
    optimizer = torch.optim.AdamW(net.parameters())
    monitor = watch(optimizer, model=net, kernel=kernel, update_scratch_bytes=2048)
    for step in range(1, 51):
        if step == at:
            buffer.untyped_storage().resize_(0)
        net(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert monitor.flush(10)
    values = monitor.snapshot()
    assert values["optwatch_steps_total"] == 50
    assert values['optwatch_grad_norm{stage="at_step"}'] > 0
    assert values["optwatch_first_moment_norm"] > 0
    assert values['optwatch_agent_errors_total{where="hook"}'] > 0
    # Not 0 where it was never read; else what it was when it was there.
    assert values.get('optwatch_layer_weight_norm{layer="offloaded"}') == (
        None if at == 1 else pytest.approx(1000**0.5)
    )


def test_counts_from_many_threads_add_up() -> None:
    faults = Faults()
    threads = [
        threading.Thread(target=lambda: [faults.record("sink", InjectedError()) for _ in range(2000)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults.counts == {"sink": 16_000}


def test_an_error_that_cannot_even_be_printed_is_counted(caplog: Any) -> None:
    class UnprintableError(Exception):
        def __repr__(self) -> str:
            raise InjectedError

        __str__ = __repr__

    class RaisingHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise InjectedError

    faults, handler = Faults(), RaisingHandler()
    logging.getLogger("optwatch").addHandler(handler)
    try:
        faults.record("hook", UnprintableError())
    finally:
        logging.getLogger("optwatch").removeHandler(handler)
    assert faults.counts == {"hook": 1}


def test_the_log_says_where_what_and_where_it_is_counted_once(caplog: Any) -> None:
    faults = Faults()
    for _ in range(1000):
        faults.record("sink", InjectedError("disk is full"))
    faults.record("sink", KeyError("x"))
    assert [record.message for record in caplog.records] == [
        "optwatch: a fault in its sink, which training does not notice: InjectedError('disk is full') (said once; all "
        "are counted in optwatch_agent_errors_total)",
        "optwatch: a fault in its sink, which training does not notice: KeyError('x') (said once; all are "
        "counted in optwatch_agent_errors_total)",
    ]
