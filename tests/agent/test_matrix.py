"""Optimizers × ways of training × precision × accumulation × clipping × compilation, each against a float64 oracle.

Here a covering part of the matrix is trained, in which every pair of factors' values is; ``make matrix`` trains all.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent / "matrix"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"matrix_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


matrix, compare = load("cells"), load("compare")
TRAINABLE = [cell for cell in matrix.every() if matrix.excluded(cell) is None]
NORM, LOSS = "optwatch_weight_norm", "optwatch_loss"


@pytest.mark.slow
@pytest.mark.timeout(600)  # some forty trainings of several processes, on a machine that does other things
@pytest.mark.skipif(importlib.util.find_spec("pytorch_optimizer") is None, reason="needs the packages of the dev extra")
def test_every_cell_of_a_covering_part_is_exact_and_left_as_it_was(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "run.py"), "--out", str(tmp_path), "--covering"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=570, check=False)
    assert ended.returncode == 0, ended.stdout[-8000:] or ended.stderr[-4000:]
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    compared = {result["cell"]: result["compared"] for result in results}
    # Of the two steps or more of each that are taken, norms of each layer at the least.
    assert all(compared[cell.name] > 20 for cell in matrix.covering(TRAINABLE))


def test_the_covering_part_has_every_pair_that_can_be_trained_and_few_cells() -> None:
    chosen = matrix.covering(TRAINABLE)
    every_pair = set().union(*map(matrix.pairs, TRAINABLE))
    assert set().union(*map(matrix.pairs, chosen)) == every_pair
    assert set(chosen) <= set(TRAINABLE)
    assert len(chosen) < len(TRAINABLE) / 20
    assert matrix.covering(TRAINABLE) == chosen
    # Each optimizer with each way of training is a pair: with fewer cells one would be missing.
    assert len(chosen) >= len({(cell.optimizer, cell.way) for cell in TRAINABLE})


def test_a_cell_is_all_of_its_pairs() -> None:
    cell = TRAINABLE[0]
    assert len(matrix.pairs(cell)) == 7 * 6 / 2
    assert matrix.covering([cell]) == [cell]
    assert len({cell.name for cell in matrix.every()}) == len(matrix.every())


def test_every_value_is_trained_somewhere_and_every_reason_excludes_something() -> None:
    assert {cell.optimizer for cell in TRAINABLE} == set(matrix.OPTIMIZERS)
    assert {(cell.way, cell.ranks) for cell in TRAINABLE} == {
        (w, n) for w, sizes in matrix.RANKS.items() for n in sizes
    }
    assert {cell.precision for cell in TRAINABLE} == set(matrix.PRECISIONS)
    found = matrix.excuses(matrix.every())
    assert set(found) == {*matrix.NOT_SHARDED.values(), matrix.FEWER_ROWS}
    assert all(matrix.excluded(cell) == reason and cell.precision == "fp32" for reason, cell in found.items())


@pytest.mark.parametrize(
    ("got", "said"),
    [
        ({NORM: 3.0, LOSS: 1.0}, []),
        ({NORM: 3.0 * (1 + 0.9e-5), LOSS: 1.0}, []),
        ({NORM: 3.0 * (1 + 1.1e-5), LOSS: 1.0}, [f"{NORM} is 3.000033"]),
        ({NORM: float("nan"), LOSS: 1.0}, [f"{NORM} is nan, should be 3.0"]),
        ({LOSS: 1.0}, [f"{NORM} is missing, should be 3.0"]),
        (
            {NORM: 3.0, LOSS: 1.0, "optwatch_first_moment_norm": 0.0},
            ["optwatch_first_moment_norm is 0.0, should be unavailable"],
        ),
        ({NORM: 3.0, LOSS: 1.0, "optwatch_agent_overhead_ratio": 0.1}, []),
    ],
)
def test_a_wrong_number_a_missing_one_and_one_too_many_are_told(got: dict[str, float], said: list[str]) -> None:
    found = compare.difference({NORM: 3.0, LOSS: 1.0}, got, whole=True)
    assert len(found) == len(said)
    assert all(map(str.startswith, found, said))


def test_only_one_rank_is_to_export_the_whole_model() -> None:
    want = {NORM: 3.0, LOSS: 1.0}
    assert compare.difference(want, {LOSS: 1.0}, whole=False) == []
    assert compare.difference(want, want, whole=False) == [f"{NORM} is 3.0, should be unavailable"]
    assert compare.difference(want, {NORM: 3.0, LOSS: 2.0}, whole=True) == [f"{LOSS} is 2.0, should be 1.0"]
