"""`optwatch replay`, the function behind it, and what the detectors make of real curves where those are there."""

from __future__ import annotations

import csv
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from optwatch import Settings
from optwatch.detectors import replay
from optwatch.replay import OPTIONS, main

CURVES = Path(__file__).parents[4] / "shared" / "curves"


def curve(seed: int = 1, count: int = 600) -> list[tuple[int, float, float]]:
    source = random.Random(seed)
    return [
        (step, 2 + 3 * math.exp(-step / 100) + source.gauss(0, 0.02), 1 + source.gauss(0, 0.05))
        for step in range(count)
    ]


def write(path: Path, rows: list[tuple[Any, ...]], head: str = "step,loss,grad_norm") -> Path:
    path.write_text("\n".join([head, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def test_it_prints_what_the_function_gives_one_json_line_an_event(tmp_path: Path) -> None:
    rows: list[tuple[Any, ...]] = list(curve())
    rows[300] = (300, 9.0, 1.0)
    rows[400] = (400, "nan", 1.0)
    rows[450] = (450, 2.0, "inf")
    rows[500] = (500, "", 40.0)
    path = write(tmp_path / "run.csv", rows)
    # As a person runs it: the command is found among the entry points.
    command = [sys.executable, "-m", "optwatch", "replay", str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    printed = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [(line["step"], line["kind"], line["signal"], line["severity"]) for line in printed] == [
        (300, "loss_spike", "loss", "warning"),
        (400, "nonfinite", "loss", "critical"),
        (450, "nonfinite", "grad_norm", "critical"),
        (500, "grad_spike", "grad_norm", "warning"),
    ]
    numbers = [(row[0], *(float(value) if value != "" else None for value in row[1:])) for row in rows]
    assert [(event.step, event.kind) for event in replay(numbers)] == [(line["step"], line["kind"]) for line in printed]


def test_thresholds_can_be_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(step, loss) for step, loss, _ in curve()]
    rows[500] = (500, rows[499][1] * 1.3)
    path = write(tmp_path / "run.csv", rows, "step,loss")

    def printed(*options: str) -> list[str]:
        assert main([str(path), *options]) == 0
        return [json.loads(line)["kind"] for line in capsys.readouterr().out.splitlines()]

    assert printed() == ["loss_spike"]
    assert printed("--spike-rarity", "1e9") == []
    assert printed("--spike-min-increase", "0.5") == []
    assert printed("--spike-rarity", "1e9", "--plateau-steps", "10")[0] == "plateau"
    assert set(OPTIONS) <= set(Settings.__dataclass_fields__)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("step;loss\n1;2\n", "line 1: no column 'step', only 'step;loss'; begin the file with step,loss[,grad_norm]"),
        ("", "line 1: no column 'step', only nothing; begin the file with step,loss[,grad_norm]"),
        ("step,train\n1,2\n", "line 1: no column 'loss', only 'step', 'train'"),
        (
            "step,loss\n1,2.0\n2,abc\n",
            "line 3: loss='abc'; give a number, nan, inf, or nothing where it was not logged",
        ),
        ("step,loss\n1.5,2.0\n", "line 2: step='1.5'; give a whole number"),
        ("step,loss\n,2.0\n", "line 2: step=''; give a whole number"),
        ("step,loss\n1,2,3\n", "line 2: more fields than the 2 columns; give one for each"),
        ("step,loss,grad_norm\n1,2,x\n", "line 2: grad_norm='x'; give a number"),
    ],
)
def test_a_file_that_is_no_curve_is_refused_with_its_line_and_what_to_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, told: str
) -> None:
    path = tmp_path / "run.csv"
    path.write_text(text)
    assert main([str(path)]) == 2
    assert f"optwatch replay: {path}, {told}" in capsys.readouterr().err


def test_a_file_that_is_not_there_or_no_text_and_an_option_out_of_range_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "none.csv")]) == 2
    assert "none.csv: No such file or directory; give the path of a CSV file" in capsys.readouterr().err
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x80")
    assert main([str(tmp_path / "binary.csv")]) == 2
    assert "give a CSV file in UTF-8" in capsys.readouterr().err
    assert main([str(write(tmp_path / "run.csv", [])), "--spike-rarity", "1"]) == 2
    assert "spike_rarity=1.0): give a number above 1" in capsys.readouterr().err


def test_other_columns_a_byte_order_mark_and_spaces_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    path.write_text("\ufeffstep, epoch, loss\n1, 1, 2.0\n2, 1, nan\n", encoding="utf-8")
    assert main([str(path)]) == 0


@pytest.mark.parametrize("spread", [0.005, 0.05, 0.2])
def test_jumps_of_ten_deviations_are_found_and_noise_is_not(spread: float) -> None:
    found = false = 0
    for seed in range(25):
        source = random.Random(seed)
        losses = [3 + 2 * math.exp(-step / 100) + source.gauss(0, spread) for step in range(700)]
        losses[600] += 10 * spread
        steps = [event.step for event in replay(enumerate(losses))]
        found += 600 in steps
        false += len(set(steps) - {600})
    # Ten deviations of the quietest curve are less than the least increase: that is no spike by definition.
    assert found == 0 if spread == 0.005 else found >= 24
    assert false <= 1


def test_ten_deviations_of_a_quiet_curve_are_found_where_less_is_asked_for() -> None:
    source = random.Random(1)
    losses = [3 + source.gauss(0, 0.005) for _ in range(700)]
    losses[600] += 0.05
    assert [event.step for event in replay(enumerate(losses), Settings(spike_min_increase=0.01))] == [600]


@pytest.mark.skipif(not CURVES.is_dir(), reason=f"the labelled curves are not at {CURVES}")
def test_on_labelled_real_curves_it_finds_what_has_to_be_found_and_little_else() -> None:
    must, found, false, points = 0, 0, {"smooth": 0, "hard_negative": 0}, {"smooth": 0, "hard_negative": 0}
    for label in json.loads((CURVES / "labels.json").read_text()):
        with (CURVES / label["file"]).open(newline="") as file:
            rows = [
                (int(row["step"]), float(row["loss"]), float(row["grad_norm"]) if row.get("grad_norm") else None)
                for row in csv.DictReader(file)
            ]
        events = list(replay(rows))
        steps = [event.step for event in events if event.details.get("signal") == "loss"]
        intervals = [(spike["start_step"], spike["end_step"]) for spike in label["spikes"] if spike["must"]]
        must += len(intervals)
        found += sum(any(start <= step <= end for step in steps) for start, end in intervals)
        if label["category"] in false:
            points[label["category"]] += len(rows)
            false[label["category"]] += sum(not any(s <= step <= e for s, e in intervals) for step in steps)
        broken = [event.step for event in events if event.kind == "nonfinite"]
        assert broken[:1] == ([] if label["first_nonfinite_step"] is None else [label["first_nonfinite_step"]])
    assert must >= 30
    assert found >= 0.9 * must
    assert 10_000 * false["smooth"] <= points["smooth"]
    assert false["hard_negative"] <= 4
