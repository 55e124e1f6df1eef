"""Training with DeepSpeed on real ranks: what is exported is exact or called unavailable, and training is unchanged.

Scenarios are in `ranks/zero.py`, each trained watched and unwatched by processes of `ranks/launch.py`.
"""

from __future__ import annotations

from typing import Any

import pytest

from optwatch.catalogue import WHOLE_MODEL

Ranks = dict[str, dict[str, list[Any]]]
pytestmark = pytest.mark.slow

RELATIVE = 1e-5
SCENARIOS = {
    "deepspeed on two": (
        *("zero_0", "zero_0_bf16", "zero_1", "zero_1_bf16", "zero_1_bf16_summed_in_fp32", "zero_2", "zero_2_bf16"),
        *("zero_2_accumulated", "zero_2_offloaded"),
        *("zero_3", "zero_3_bf16", "zero_3_in_sub_groups", "zero_3_offloaded"),
    ),
    "deepspeed on one": ("zero_0", "zero_1", "zero_1_bf16_summed_in_fp32", "zero_2_bf16", "zero_3"),
}
ALL = [(name, scenario) for name, scenarios in SCENARIOS.items() for scenario in scenarios]
IN_FP32 = [x for x in ALL if not any(word in x[1] for word in ("bf16", "accumulated", "offloaded"))]
OVERFLOWING = ("overflowing_1", "overflowing_3")
TAKEN_OVER = ("attached_before", "attached_before_zero_3")


def whole_model(snapshot: dict[str, float]) -> dict[str, float]:
    return {series: value for series, value in snapshot.items() if series.partition("{")[0] in WHOLE_MODEL}


@pytest.mark.parametrize(("name", "scenario"), ALL)
def test_every_statistic_is_what_an_oracle_finds_in_whole_tensors(
    name: str, scenario: str, deepspeed_ranks: Ranks
) -> None:
    first = deepspeed_ranks[name][scenario][0]
    assert not first["faults"]
    assert len(first["steps"]) == 2
    for step in first["steps"]:
        got = whole_model(step["got"])
        assert len(step["want"]) > 20
        for series, want in step["want"].items():
            assert got[series] == pytest.approx(want, rel=RELATIVE, abs=1e-300), series


@pytest.mark.parametrize(("name", "scenario"), IN_FP32)
def test_norms_and_moments_are_those_of_training_in_float64_in_one_process(
    name: str, scenario: str, deepspeed_ranks: Ranks
) -> None:
    first = deepspeed_ranks[name][scenario][0]
    for step, alone in zip(first["steps"], first["alone"], strict=True):
        assert {series: step["got"][series] for series in alone} == pytest.approx(alone, rel=RELATIVE)


@pytest.mark.parametrize(("name", "scenario"), ALL)
def test_losses_and_weights_are_bit_identical_and_no_collective_is_added(
    name: str, scenario: str, deepspeed_ranks: Ranks
) -> None:
    for rank in deepspeed_ranks[name][scenario]:
        for what in ("losses", "weights", "calls", "sequence"):
            assert rank[what]["True"] == rank[what]["False"], what


@pytest.mark.parametrize(("name", "scenario"), ALL)
def test_every_rank_exports_its_own_loss_steps_and_rates(name: str, scenario: str, deepspeed_ranks: Ranks) -> None:
    given = deepspeed_ranks[name][scenario]
    for number, rank in enumerate(given):
        for step, loss in zip(rank["steps"], rank["losses"]["True"], strict=True):
            assert step["got"]["optwatch_loss"] == pytest.approx(loss, rel=1e-6)
            assert step["got"]['optwatch_learning_rate{group="0"}'] == 1e-3
            assert step["got"]['optwatch_learning_rate{group="1"}'] == 2e-3
        assert rank["steps"][-1]["got"]["optwatch_steps_total"] == 2
        assert not (number and whole_model(rank["steps"][-1]["got"]))
    assert len({rank["run_id"] for rank in given}) == 1


@pytest.mark.parametrize(("name", "scenario"), ALL)
def test_detaching_leaves_deepspeeds_optimizer_as_it_was(name: str, scenario: str, deepspeed_ranks: Ranks) -> None:
    for rank in deepspeed_ranks[name][scenario]:
        assert rank["left"] == []


@pytest.mark.parametrize(
    ("scenario", "kind"),
    [
        ("zero_0", "AdamW"),
        ("zero_0_bf16", "FP16_UnfusedOptimizer"),
        ("zero_1", "DeepSpeedZeroOptimizer"),
        ("zero_1_bf16_summed_in_fp32", "BF16_Optimizer"),
        ("zero_2", "DeepSpeedZeroOptimizer"),
        ("zero_3", "DeepSpeedZeroOptimizer_Stage3"),
    ],
)
def test_each_of_deepspeeds_classes_that_is_read_is_run_here(scenario: str, kind: str, deepspeed_ranks: Ranks) -> None:
    assert deepspeed_ranks["deepspeed on two"][scenario][0]["class"] == kind


@pytest.mark.parametrize("scenario", OVERFLOWING)
def test_a_scaled_loss_is_exported_unscaled_and_overflows_are_counted_as_skipped_steps(
    scenario: str, deepspeed_ranks: Ranks
) -> None:
    for rank in deepspeed_ranks["deepspeed otherwise"][scenario]:
        assert 0 < rank["skipped"] < len(rank["scaled"])
        assert not rank["faults"]
        last = rank["scaled"][-1]["got"]
        assert last['optwatch_skipped_steps_total{reason="overflow"}'] == rank["skipped"]
        assert last["optwatch_steps_total"] == len(rank["scaled"]) - rank["skipped"]
        assert last['optwatch_nonfinite_total{source="gradient"}'] == 0
        for step in rank["scaled"]:
            assert step["got"]["optwatch_loss"] == pytest.approx(step["loss"], rel=1e-6)
    for step in deepspeed_ranks["deepspeed otherwise"][scenario][0]["scaled"]:
        series = 'optwatch_grad_norm{stage="at_step"}'
        if step["norm"] is None:
            assert series not in step["got"]
        else:  # DeepSpeed adds 1e-6 to the norm that it clips to 0.05 by, and has both in float32
            clipped = step["norm"] / max(1.0, (step["norm"] + 1e-6) / 0.05)
            assert step["got"][series] == pytest.approx(clipped, rel=RELATIVE)


@pytest.mark.parametrize("scenario", TAKEN_OVER)
def test_attached_before_deepspeed_took_the_optimizer_over_there_are_no_numbers_and_one_error(
    scenario: str, deepspeed_ranks: Ranks
) -> None:
    for rank in deepspeed_ranks["deepspeed otherwise"][scenario]:
        assert rank["faults"] == {"hook": 1}
        assert "AdamW was given to deepspeed.initialize() after attach()" in rank["log"]
        assert "Call attach(optimizer) with the optimizer that deepspeed.initialize() returns" in rank["log"]
        assert rank["got"]["optwatch_steps_total"] == 0
        assert not whole_model(rank["got"])
        assert rank["state"]["True"] == rank["state"]["False"]


def test_what_is_not_known_of_deepspeed_has_losses_and_steps_and_says_why_it_has_no_norms(
    deepspeed_ranks: Ranks,
) -> None:
    for rank in deepspeed_ranks["deepspeed otherwise"]["without_zero_in_fp16"]:
        assert rank["faults"] == {"hook": 1}
        assert "parameters of DeepSpeed's FP16_UnfusedOptimizer: float16 without ZeRO" in rank["log"]
        assert "norms and moments are unavailable, losses, steps and learning rates are not" in rank["log"]
        assert rank["got"]["optwatch_steps_total"] == 3
        assert rank["got"]["optwatch_loss"] == pytest.approx(rank["loss"], rel=1e-6)
        assert not whole_model(rank["got"])
        assert rank["state"]["True"] == rank["state"]["False"]


@pytest.mark.parametrize("scenario", ["resumed_1", "resumed_3"])
def test_a_checkpoint_of_deepspeeds_is_recorded_and_steps_go_on_from_it(scenario: str, deepspeed_ranks: Ranks) -> None:
    for rank in deepspeed_ranks["deepspeed otherwise"][scenario]:
        assert rank["saved"]["got"]['optwatch_checkpoints_total{result="succeeded"}'] == 1
        assert (rank["saved"]["step"], rank["loaded"]["step"]) == (2, 4)
        for part in ("saved", "loaded"):
            assert rank[part]["step"] == rank[part]["count"]
            assert not rank[part]["faults"]


@pytest.mark.parametrize("scenario", ["zero_1", "zero_3"])
def test_the_state_that_was_forecast_is_the_state_that_is_kept_padding_included(
    scenario: str, deepspeed_ranks: Ranks
) -> None:
    for rank in deepspeed_ranks["deepspeed on two"][scenario]:
        got = rank["steps"][-1]["got"]
        kept = sum(value for series, value in got.items() if series.startswith("optwatch_optimizer_state_bytes"))
        assert got["optwatch_optimizer_state_forecast_bytes"] == kept


def test_all_ranks_end_well(deepspeed_ranks: Ranks) -> None:
    assert {name: set(results["codes"]) for name, results in deepspeed_ranks.items()} == {
        name: {0} for name in (*SCENARIOS, "deepspeed otherwise")
    }
