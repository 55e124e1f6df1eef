import pytest

from optwatch_server.runs.recovery import Promise

PROMISE = Promise("run-1", 0, 7, heard_at=100.0, due_at=125.0, interval_seconds=10.0)


@pytest.mark.parametrize(("now", "broken"), [(124.9, False), (125.0, True)])
def test_a_promise_is_broken_when_it_is_due(now: float, broken: bool) -> None:
    assert PROMISE.broken(now, watching_since=100.0) is broken


@pytest.mark.parametrize(("now", "broken"), [(359.9, False), (360.0, True)])
def test_who_was_heard_before_an_outage_has_a_minute_after_it(now: float, broken: bool) -> None:
    assert PROMISE.broken(now, watching_since=300.0) is broken


@pytest.mark.parametrize(("now", "broken"), [(549.9, False), (550.0, True)])
def test_who_beats_slowly_has_its_own_intervals_after_an_outage(now: float, broken: bool) -> None:
    slow = Promise("run-1", 0, 7, heard_at=100.0, due_at=350.0, interval_seconds=100.0)
    assert slow.broken(now, watching_since=300.0) is broken


def test_a_longer_promise_outlives_the_grace_after_an_outage() -> None:
    long = Promise("run-1", 0, 7, heard_at=100.0, due_at=1915.0, interval_seconds=10.0, promise_seconds=1800.0)
    assert not long.broken(1914.0, watching_since=300.0)
    assert long.broken(1915.0, watching_since=300.0)
