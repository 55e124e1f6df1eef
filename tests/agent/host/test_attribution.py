"""The phase and layer of a NaN or Inf, by faults put into real training: a sample of `benchmarks/attribution.py`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def proof(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))  # where the processes that it starts look for it as well
    return importlib.import_module("attribution")


def test_faults_are_told_with_their_phase_and_layer_at_most_two_steps_late(proof: Any) -> None:
    """Each phase in each model."""
    outcomes = proof.score(0, len(proof.PHASES) * len(proof.MODELS))
    assert {(o.fault.phase, o.fault.model) for o in outcomes} == {(p, m) for p in proof.PHASES for m in proof.MODELS}
    assert [o for o in outcomes if not o.right] == []
    assert [o for o in outcomes if not o.in_time] == []


@pytest.mark.slow
def test_only_the_rank_with_the_fault_names_it_and_the_other_one_says_that_it_came_from_there(proof: Any) -> None:
    faults = 2 * len(proof.SHARED)
    ranks = proof.score_ranks(faults)
    assert [len(rank) for rank in ranks] == [faults, faults]
    assert [one for rank in ranks for one in rank if not one[4]] == []
    assert {one[2] for one in ranks[1] if not one[1]} == {"communication"}
