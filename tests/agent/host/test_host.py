"""The host thread: everything in order, values of the user's own, and nothing that stops it."""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any

import pytest
import torch

from optwatch.detectors.nonfinite import QUIET_STEPS
from optwatch.events import Event
from optwatch.host.thread import MAX_REPORTED


@pytest.fixture
def optimizer(net: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1)


@pytest.fixture
def monitor(watch: Any, optimizer: Any) -> Any:
    return watch(optimizer)


class Keeping:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def record(self, record: Any) -> None:
        self.seen.append(("record", record.step))

    def event(self, event: Event) -> None:
        self.seen.append((event.kind, event.step))


def test_records_come_in_the_order_of_the_steps_each_before_its_events(monitor: Any, optimizer: Any, step: Any) -> None:
    sink = Keeping()
    monitor.sinks.append(sink)
    for number in range(1, 21):
        step(optimizer, float("nan") if number == 20 else 1.0)
    assert monitor.flush(30)
    assert sink.seen == [*(("record", n) for n in range(1, 21)), ("nonfinite", 20)]


@pytest.mark.parametrize(
    "value", [1.5, 3, True, torch.tensor(1.5), torch.tensor([2]), torch.tensor(1.5, dtype=torch.bfloat16)]
)
def test_a_number_or_a_tensor_of_one_element_is_exported(value: Any, monitor: Any) -> None:
    monitor.log(val_loss=value)
    assert monitor.flush(30)
    assert monitor.snapshot()['optwatch_reported{name="val_loss"}'] == float(value)


def test_a_logged_tensor_is_copied_when_it_is_given(monitor: Any) -> None:
    value = torch.tensor(1.0)
    monitor.log(a=value)
    value.fill_(9.0)
    assert monitor.flush(30)
    assert monitor.snapshot()['optwatch_reported{name="a"}'] == 1.0


@pytest.mark.parametrize("value", ["1.5", b"1", None, [1.0, 2.0], torch.ones(2), torch.ones(0), object(), 1j])
def test_what_is_no_number_is_counted_and_left_out(value: Any, monitor: Any) -> None:
    monitor.log(bad=value, good=1.0)
    assert monitor.flush(30)
    assert monitor.faults.counts == {"hook": 1}
    assert [name for name in monitor.snapshot() if "reported" in name] == ['optwatch_reported{name="good"}']


def test_at_most_twenty_names_are_exported_and_those_go_on(monitor: Any, caplog: Any) -> None:
    for number in range(MAX_REPORTED + 3):
        monitor.log(**{f"value_{number}": number})
    monitor.log(value_0=100)
    assert monitor.flush(30)
    reported = {name: value for name, value in monitor.snapshot().items() if "reported" in name}
    assert len(reported) == MAX_REPORTED == 20
    assert reported['optwatch_reported{name="value_0"}'] == 100
    assert monitor.faults.counts == {"host": 3}
    assert "monitor.log(value_20=...): 20 different names are exported already; log fewer" in caplog.text


def test_tokens_add_up_and_only_to_more(monitor: Any) -> None:
    for tokens in (100, torch.tensor(50), -1, float("nan"), float("inf")):
        monitor.log(tokens=tokens)
    assert monitor.flush(30)
    assert monitor.snapshot()["optwatch_tokens_total"] == 150
    assert monitor.faults.counts == {"host": 3}


def test_a_logged_loss_replaces_the_captured_one_for_the_next_step_only(
    monitor: Any, optimizer: Any, step: Any
) -> None:
    losses: list[Any] = []
    sink = Keeping()
    sink.record = lambda record: losses.append(record.loss)  # type: ignore[method-assign]
    monitor.sinks.append(sink)
    captured = step(optimizer)
    monitor.log(loss=7.0)
    step(optimizer)
    step(optimizer)
    assert monitor.flush(30)
    assert losses == [pytest.approx(captured), 7.0, None]


def test_a_logged_loss_is_that_of_every_optimizer_that_steps_after_it(watch: Any, net: Any, step: Any) -> None:
    first, second = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in net)
    monitor = watch(first, second)
    monitor.log(loss=3.0)
    step(first)
    second.step()
    assert monitor.flush(30)
    shown = monitor.snapshot()
    assert (shown['optwatch_loss{optimizer="SGD0"}'], shown['optwatch_loss{optimizer="SGD1"}']) == (3.0, 3.0)


def test_a_logged_loss_that_is_nan_is_an_incident(monitor: Any, optimizer: Any, step: Any) -> None:
    monitor.log(loss=torch.tensor(float("nan")))
    step(optimizer)
    assert monitor.flush(30)
    assert monitor.snapshot()['optwatch_nonfinite_total{source="loss"}'] == 1


class Whole(Keeping):
    """A sink that keeps the steps at which the last of all weights and moments has been read."""

    def record(self, record: Any) -> None:
        if record.sampled:
            super().record(record)

    @property
    def steps(self) -> list[int]:
        return [number for what, number in self.seen if what == "record"]


def test_a_run_that_goes_on_with_its_nan_is_read_whole_for_each_source_and_then_as_ever(
    watch: Any, net: torch.nn.Module, step: Any
) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor, sink = watch(optimizer, sample_every=8), Whole()
    monitor.sinks.append(sink)
    for number in range(1, 33):
        step(optimizer, float("nan") if number == 3 else 1.0)
        assert monitor.flush(30)
    # Step 4 for the loss and the gradients of step 3, step 5 for the weights of step 4 if no part of step 3 had any.
    assert [number for number in sink.steps if number not in (4, 5)] == [1, 8, 16, 24, 32]
    assert 4 in sink.steps
    assert monitor.snapshot()['optwatch_nonfinite_total{source="loss"}'] == 30


def test_weights_alone_that_stay_nan_are_one_incident_although_few_steps_read_them_all(watch: Any, step: Any) -> None:
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]  # the second is used by nothing
    optimizer = torch.optim.SGD(weights, lr=0.1)
    monitor, sink = watch(optimizer, sample_every=40), Whole()
    monitor.sinks.append(sink)
    for number in range(1, 101):
        if number == 41:
            with torch.no_grad():
                weights[1].fill_(float("nan"))
        weights[0].square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert monitor.flush(30)
        if number == 95:
            with torch.no_grad():
                weights[1].fill_(1.0)
    events = [(kind, number) for kind, number in sink.seen if kind == "nonfinite"]
    assert len(events) == 1
    assert 41 <= events[0][1] <= 80
    # Read whole now and then: the steps between, which read nothing bad, would otherwise be taken for its end.
    whole = [number for number in sink.steps if events[0][1] < number < 95]
    assert 3 <= max(later - earlier for earlier, later in pairwise(whole)) < QUIET_STEPS


def test_values_from_many_threads_all_arrive(monitor: Any) -> None:
    threads = [threading.Thread(target=lambda: [monitor.log(tokens=1) for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert monitor.flush(30)
    assert monitor.snapshot()["optwatch_tokens_total"] == 2000


def test_a_row_that_cannot_be_unpacked_gives_its_place_back(
    monitor: Any, optimizer: Any, step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(row: Any) -> Any:
        raise OverflowError("no number")

    step(optimizer)
    assert monitor.flush(30)
    (watched,) = monitor._watches.values()
    free = len(watched._current().ring._free)
    monkeypatch.setattr(monitor._host._unpacker, "unpack", broken)
    for _ in range(5):
        step(optimizer)
    assert monitor.flush(30)
    assert len(watched._current().ring._free) == free
    assert monitor.faults.counts == {"host": 5}


def test_an_event_of_no_known_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Event\(kind='boom'\): give one of nonfinite, "):
        Event("boom", 1, 0.0, "", "", "")
