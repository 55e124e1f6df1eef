"""A rank that is killed, stopped, lags or never attaches: the other goes on as it would without us, and says so."""

from __future__ import annotations

from typing import Any

import pytest

from optwatch.catalogue import WHOLE_MODEL

Gone = dict[str, list[Any]]


@pytest.fixture
def gone(ranks: dict[str, Gone]) -> Gone:
    """By scenario, what each of two ranks gave; a killed one gave nothing."""
    names = ("gone", "unwatched", "left", "first", "second")
    return {scenario: given for name in names for scenario, given in ranks[name].items()} | {
        f"codes of {name}": ranks[name]["codes"] for name in names
    }


def whole_model(snapshot: dict[str, float]) -> dict[str, float]:
    return {series: value for series, value in snapshot.items() if series.partition("{")[0] in WHOLE_MODEL}


@pytest.mark.parametrize("scenario", ["lagging", "stopped", "stopped_with_the_store", "only_first", "only_second"])
def test_training_of_both_ranks_is_what_it_is_without_us(scenario: str, gone: Gone) -> None:
    for rank in gone[scenario]:
        assert rank["losses"]["True"] == rank["losses"]["False"]
        assert rank["weights"]["True"] == rank["weights"]["False"]


@pytest.mark.parametrize("scenario", ["lagging", "stopped", "stopped_with_the_store"])
def test_a_rank_that_stands_still_is_given_up_and_comes_back(scenario: str, gone: Gone) -> None:
    first, second = gone[scenario]
    assert first.get("lost") or second.get("lost")
    for rank in (first, second):
        assert set(rank["faults"]) == {"ranks"}
    assert first["exported"] == pytest.approx(first["norm"], rel=1e-5)
    assert not any("shard_contribution" in series for series in first["snapshot"])
    assert not any("shard_contribution" in series for series in second["snapshot"])


def test_while_a_rank_is_away_its_part_is_missing_from_nothing(gone: Gone) -> None:
    """What was of the whole model is gone, and each rank tells of its own part."""
    snapshot = gone["lagging"][0]["while_lost"]["snapshot"]
    assert not whole_model(snapshot)
    assert snapshot['optwatch_shard_contribution{quantity="weight_squares"}'] > 0
    assert snapshot['optwatch_agent_errors_total{where="ranks"}'] >= 1


def test_a_killed_rank_ends_training_as_it_does_without_us(gone: Gone) -> None:
    watched, unwatched = gone["killed"][0], gone["killed_unwatched"][0]
    assert (watched["error"], watched["steps"]) == (unwatched["error"], unwatched["steps"])
    assert set(watched["faults"]) == {"ranks"}
    assert gone["codes of gone"] == gone["codes of unwatched"] == [0, -9]


def test_a_process_that_detached_and_still_waits_for_a_lost_rank_ends_as_it_would_without_us(gone: Gone) -> None:
    """A thread that waits in torch's C++ when the interpreter ends would end the process by SIGABRT."""
    first = gone["left_behind"][0]
    assert (first["stopped"], first["waits"], first["faults"]) == (True, True, {})
    assert gone["codes of left"] == [0, -9]


@pytest.mark.parametrize(("scenario", "who"), [("only_first", 0), ("only_second", 1)])
def test_a_rank_that_attaches_alone_exports_its_own(scenario: str, who: int, gone: Gone) -> None:
    rank = gone[scenario][who]
    assert rank["faults"] == {"ranks": 1}
    assert rank["snapshot"]["optwatch_loss"] == pytest.approx(rank["losses"]["True"][-1], rel=1e-6)
    assert rank["snapshot"]["optwatch_steps_total"] == len(rank["losses"]["True"])
    assert not whole_model(rank["snapshot"])
    squares = rank["snapshot"]['optwatch_shard_contribution{quantity="weight_squares"}']
    assert squares == pytest.approx(rank["own_weight_squares"], rel=1e-9)
