"""Real ranks that ought to be equal and are not (`ranks/compared.py`): what is told, by whom, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest

from optwatch.parallel import differences

Ranks = dict[str, dict[str, list[Any]]]
EVERY, FLIPPED_AFTER = 10, 13


def events(given: list[dict[str, Any]], but: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """What the ranks told, a straggler aside unless it is asked for: a busy machine has some."""
    return [event for rank in given for event in rank["events"] if event["kind"] not in but]


TIMES = ("straggler", "loss_spike", "grad_spike")


@pytest.mark.parametrize(
    ("scenario", "tensor"),
    [
        ("bit_flipped", {"parameter": "first.up.weight", "of": "weight"}),
        ("equal_bits_flipped", {"parameter": "first.up.weight", "of": "weight"}),
        ("moment_flipped", {"parameter": "first.down.bias", "of": "exp_avg_sq"}),
    ],
)
@pytest.mark.parametrize("name", ["compared by two", "compared by four"])
def test_a_flipped_bit_is_told_of_within_one_check(
    name: str, scenario: str, tensor: dict[str, str], ranks: Ranks
) -> None:
    given = ranks[name][scenario]
    (event,) = events(given, TIMES)
    assert (event["kind"], event["severity"]) == ("replica_divergence", "critical")
    first = event["details"]["tensors"][0]
    assert {key: first[key] for key in tensor} == tensor
    assert FLIPPED_AFTER < event["step"] <= FLIPPED_AFTER + EVERY
    named = [2] if len(given) == 4 else [0, 1]
    assert event["details"]["ranks"] == named
    assert event["rank"] == named[0]
    assert f"Rank{'s' * (len(named) > 1)} {', '.join(map(str, named))} " in event["summary"]
    assert all(rank["checks"] == 4 and not rank["faults"] for rank in given)


def test_a_shard_is_compared_with_its_replica_only(ranks: Ranks) -> None:
    (event,) = events(ranks["compared by four"]["shard_flipped"], TIMES)
    assert event["details"]["ranks"] == event["details"]["replicas"] == [1, 3]
    assert event["details"]["tensors"][0]["parameter"] == "first.up.weight"


def test_only_ranks_that_are_added_up_have_to_read_alike(ranks: Ranks) -> None:
    assert [rank["read_alike"] for rank in ranks["compared by four"]["shard_flipped"]] == [True] * 4
    assert [rank["read_alike"] for rank in ranks["compared by four"]["bit_flipped"]] == [False] * 4


def test_2000_clean_steps_tell_nothing(ranks: Ranks) -> None:
    given = ranks["compared by two"]["clean"]
    assert not events(given, TIMES)
    assert all(rank["checks"] == 200 and not rank["faults"] for rank in given)


def test_a_rate_that_one_rank_has_otherwise_is_named_with_its_values(ranks: Ranks) -> None:
    event = next(x for x in events(ranks["compared by four"]["rate_differs"]) if x["kind"] == "rank_mismatch")
    assert (event["severity"], event["rank"], event["details"]["ranks"]) == ("warning", 1, [1])
    assert event["details"]["differences"] == [{"group": 1, "name": "lr", "values": {"0": 2e-3, "1": 3e-3}}]
    assert "lr of group 1 is 0.003 on rank 1, 0.002 on rank 0" in event["summary"]
    assert event["step"] == 20  # the second check that finds it


def test_a_step_count_that_one_rank_has_otherwise_is_told_of(ranks: Ranks) -> None:
    event = next(x for x in events(ranks["compared by two"]["step_differs"]) if x["kind"] == "rank_mismatch")
    assert event["details"]["ranks"] == [0, 1]
    assert event["details"]["differences"] == [{"group": None, "name": "step", "values": {"0": 23, "1": 21}}]


def test_a_rank_that_sleeps_is_the_straggler_and_no_other_is(ranks: Ranks) -> None:
    (event,) = events(ranks["compared by four"]["sleeps"])
    assert (event["kind"], event["severity"], event["rank"]) == ("straggler", "warning", 3)
    assert event["details"]["ratio"] > differences.SLOWER


def test_the_rank_without_a_majority_is_named_and_all_are_where_there_is_none() -> None:
    assert differences.outliers({0: 1, 1: 1, 2: 1}) == ()
    assert differences.outliers({0: 1, 1: 2, 2: 1}) == (1,)
    assert differences.outliers({0: 1, 1: 2}) == (0, 1)
    assert differences.outliers({0: 1, 1: 2, 2: 1, 3: 2}) == (0, 1, 2, 3)
    assert differences.outliers({0: 1, 1: 2, 2: 3}) == (0, 1, 2)


def test_a_tensor_that_a_rank_has_not_read_is_not_compared() -> None:
    mine = {7: (0, 1, 2), 8: (0, 1)}
    assert differences.tensors(mine, [{7: 1, 8: 5}, {7: 1}, {7: 1, 8: 6}]) == {}
    assert differences.tensors(mine, [{7: 1, 8: 5}, {7: 2, 8: 5}, {7: 1}]) == {(1,): [7]}


@pytest.mark.parametrize(
    ("own", "step", "slow"),
    [
        ([0.10, 0.10, 0.10, 0.1301], 0.2, [3]),
        ([0.10, 0.10, 0.10, 0.1299], 0.2, []),
        ([0.10, 0.1301], 0.2, [1]),  # one of two, by the other
        ([0.10, 0.10, 0.15], 0.49, [2]),  # a tenth of a step
        ([0.10, 0.10, 0.15], 0.51, []),
        ([0.001, 0.001, 0.00201], 0.002, [2]),
        ([0.001, 0.001, 0.00199], 0.002, []),  # less than a millisecond
        ([0.10], 0.2, []),
        ([0.0, 0.0, 0.5], 0.2, []),  # nothing to compare with
    ],
)
def test_a_straggler_is_slower_than_the_others_by_enough_to_matter(
    own: list[float], step: float, slow: list[int]
) -> None:
    assert list(differences.stragglers(dict(enumerate(own)), step)) == slow


def test_hyperparameters_are_compared_exactly() -> None:
    same = {"step": 5, "groups": [{"lr": 0.1, "betas": [0.9, 0.99]}]}
    assert differences.hyperparameters({0: same, 1: same, 2: same}) == []
    other = {"step": 5, "groups": [{"lr": math.nextafter(0.1, 1), "betas": [0.9, 0.99]}]}
    (found,) = differences.hyperparameters({0: same, 1: other, 2: same})
    assert (found.ranks, found.group, found.name) == ((1,), 0, "lr")
