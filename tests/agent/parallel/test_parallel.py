"""Training on several real ranks: what rank 0 exports is exact, and training is as it would be without us.

Every scenario is trained twice by processes of `ranks/launch.py`, watched and unwatched; see `conftest.ranks`.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from optwatch.catalogue import WHOLE_MODEL

Ranks = dict[str, dict[str, list[Any]]]

RELATIVE = 1e-5
UNAVAILABLE = ("stages_that_look_like_replicas", "sequence_parallel")
EXACT = [
    ("four", "distributed_data_parallel"),
    ("four", "replicated_by_hand"),
    ("four", "fully_sharded"),
    ("four", "hybrid_sharded"),
    ("four", "tensor_sharded"),
    ("four", "tensor_and_fully_sharded"),
    ("four", "pipeline"),
    ("four", "pipeline_with_equal_names"),
    ("four", "zero_redundancy"),
    ("two", "fully_sharded"),
    ("two", "zero_redundancy"),
]
ALL = [*EXACT, *(("four", scenario) for scenario in (*UNAVAILABLE, "added_up_in_prometheus"))]


def of(ranks: Ranks, name: str, scenario: str) -> list[dict[str, Any]]:
    return ranks[name][scenario]


def whole_model(snapshot: dict[str, float]) -> dict[str, float]:
    return {series: value for series, value in snapshot.items() if series.partition("{")[0] in WHOLE_MODEL}


@pytest.mark.parametrize(("name", "scenario"), EXACT)
def test_rank_0_exports_what_an_oracle_finds_in_the_whole_tensors(name: str, scenario: str, ranks: Ranks) -> None:
    first = of(ranks, name, scenario)[0]
    assert not first["faults"]
    assert len(first["steps"]) == 2
    for step in first["steps"]:
        got = whole_model(step["got"])
        assert not set(step["want"]) - set(got)
        for series, want in step["want"].items():
            assert got[series] == pytest.approx(want, rel=RELATIVE, abs=1e-300), series


@pytest.mark.parametrize(("name", "scenario"), ALL)
def test_losses_and_weights_are_bit_identical_with_and_without(name: str, scenario: str, ranks: Ranks) -> None:
    for rank in of(ranks, name, scenario):
        assert rank["losses"]["True"] == rank["losses"]["False"]
        assert rank["weights"]["True"] == rank["weights"]["False"]


@pytest.mark.parametrize(("name", "scenario"), ALL)
def test_no_collective_of_the_trainers_is_added(name: str, scenario: str, ranks: Ranks) -> None:
    for rank in of(ranks, name, scenario):
        assert rank["calls"]["True"] == rank["calls"]["False"]
        assert rank["sequence"]["True"] == rank["sequence"]["False"]
        assert set(rank["own_calls"]) <= {"optwatch-host"}


@pytest.mark.parametrize(("name", "scenario"), ALL)
def test_every_rank_exports_its_own_loss_and_rates_and_only_rank_0_the_model(
    name: str, scenario: str, ranks: Ranks
) -> None:
    given = of(ranks, name, scenario)
    for number, rank in enumerate(given):
        for step, loss in zip(rank["steps"], rank["losses"]["True"], strict=True):
            assert step["got"]["optwatch_loss"] == pytest.approx(loss, rel=1e-6)
            assert step["got"]['optwatch_learning_rate{group="0"}'] == 1e-3
        assert rank["steps"][-1]["got"]["optwatch_steps_total"] == 2
        if number:
            assert not whole_model(rank["steps"][-1]["got"])
    assert len({rank["run_id"] for rank in given}) == 1


def test_only_what_is_cut_costs_calls_at_a_step(ranks: Ranks) -> None:
    """DistributedDataParallel says that its copies are equal: nothing is left to be asked."""
    assert not of(ranks, "four", "distributed_data_parallel")[0]["own_calls"]
    sharded = of(ranks, "four", "hybrid_sharded")[0]["own_calls"]["optwatch-host"]
    in_prometheus = of(ranks, "four", "added_up_in_prometheus")[0]["own_calls"]["optwatch-host"]
    assert 0 < in_prometheus < sharded


def test_every_scenario_is_looked_at(ranks: Ranks) -> None:
    run = {(name, scenario) for name in ("four", "two") for scenario in ranks[name] if scenario != "codes"}
    others = {("four", "nonfinite_on_one_rank"), ("two", "checks_done_together")}
    assert run == {*ALL, *others, ("two", "two_optimizers_one_of_which_steps_less")}
    assert ranks["four"]["codes"] == [0] * 4
    assert ranks["two"]["codes"] == [0] * 2


def test_runs_of_one_process_have_ids_of_their_own(ranks: Ranks) -> None:
    ids = [of(ranks, name, scenario)[0]["run_id"] for name, scenario in ALL]
    assert len(set(ids)) == len(ids)


def test_sums_over_parts_add_up_to_the_whole_model(ranks: Ranks) -> None:
    given = of(ranks, "four", "added_up_in_prometheus")
    for index, step in enumerate(given[0]["steps"]):
        want = step["want"]
        parts = [rank["steps"][index]["got"] for rank in given]
        assert not any(map(whole_model, parts))

        def added(quantity: str, layer: str = "", parts: list[dict[str, float]] = parts) -> float:
            name = f'layer_shard_contribution{{layer="{layer}",' if layer else "shard_contribution{"
            return sum(part.get(f'optwatch_{name}quantity="{quantity}"}}', 0.0) for part in parts)

        def norm(quantity: str, layer: str = "") -> float:
            return math.sqrt(added(quantity, layer))

        got = {
            'optwatch_grad_norm{stage="at_step"}': norm("gradient_squares"),
            'optwatch_grad_norm{stage="before_clip"}': norm("gradient_before_clip_squares"),
            "optwatch_weight_norm": norm("weight_squares"),
            "optwatch_first_moment_norm": norm("first_moment_squares"),
            "optwatch_second_moment_mean": added("second_moment") / added("second_moment_entries"),
            "optwatch_epsilon_dominated_ratio": added("epsilon_dominated_entries") / added("second_moment_entries"),
            'optwatch_layer_grad_norm{layer="first.up"}': norm("gradient_squares", "first.up"),
            'optwatch_layer_weight_norm{layer="head"}': norm("weight_squares", "head"),
        }
        assert got == pytest.approx({series: want[series] for series in got}, rel=RELATIVE)


def test_different_weights_under_one_name_are_said_instead_of_taken_for_replicas(ranks: Ranks) -> None:
    for rank in of(ranks, "four", "stages_that_look_like_replicas"):
        assert rank["faults"] == {"ranks": 1}
        assert not any(whole_model(step["got"]) for step in rank["steps"])
        assert "hold different weights under the name" in rank["log"]
        assert "give the stages of a model names of their own" in rank["log"]


def test_a_partial_gradient_has_no_norm_and_everything_else_is_exact(ranks: Ranks) -> None:
    first = of(ranks, "four", "sequence_parallel")[0]
    assert "gradient norms are unavailable" in first["log"]
    for step in first["steps"]:
        missing = {series for series in step["want"] if series not in step["got"]}
        assert missing
        assert all("grad_norm" in series or "grad_moment_cosine" in series for series in missing)
        for series in set(step["want"]) - missing:
            assert step["got"][series] == pytest.approx(step["want"][series], rel=RELATIVE, abs=1e-300), series


def test_the_rank_that_made_a_nan_says_so_and_the_whole_model_has_no_finite_norm(ranks: Ranks) -> None:
    snapshots = [rank["snapshot"] for rank in of(ranks, "four", "nonfinite_on_one_rank")]
    for rank, snapshot in enumerate(snapshots):
        for source in ("loss", "gradient", "moment", "weight"):
            assert snapshot[f'optwatch_nonfinite_total{{source="{source}"}}'] == (rank == 2), (rank, source)
    assert snapshots[2]['optwatch_nonfinite_first_step{source="gradient",layer="layer2.norm"}'] == 2
    assert math.isnan(snapshots[0]['optwatch_grad_norm{stage="at_step"}'])
    assert math.isnan(snapshots[0]['optwatch_layer_weight_norm{layer="layer2.up"}'])
    assert math.isfinite(snapshots[0]['optwatch_layer_grad_norm{layer="layer1.up"}'])


def test_the_optimizers_of_one_run_are_added_up_each_by_itself(ranks: Ranks) -> None:
    first, second = of(ranks, "two", "two_optimizers_one_of_which_steps_less")
    assert len(first["want"]) == 2
    for series, want in first["want"].items():
        assert first["got"][series] == pytest.approx(want, rel=RELATIVE), series
    weights = {series for series in first["got"] if series.startswith("optwatch_weight_norm")}
    assert weights == {f'optwatch_weight_norm{{optimizer="{name}"}}' for name in ("AdamW", "SGD")}
    assert not whole_model(second["got"])
    assert not first["faults"]


def test_ranks_that_need_no_sums_can_still_do_things_together(ranks: Ranks) -> None:
    for rank in of(ranks, "two", "checks_done_together"):
        assert rank["gathered"] == {"2": ["0:2", "1:2"], "4": ["0:4", "1:4"]}
