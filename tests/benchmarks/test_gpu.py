"""The GPU suite works where there is no GPU: what is rehearsed is its code, not a figure."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SUITE = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, str(SUITE), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_suite_measures_both_cadences() -> None:
    page = run("--rehearse", "--rounds", "2")
    for cadence in ("default", "all statistics every step"):
        assert re.search(rf"^\| {cadence} \| [+-][\d.]+% \(.*\) \| [\d.]+% \| -?[\d.]+ \|$", page, re.MULTILINE), page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_skips_and_says_why() -> None:
    assert "skipped: torch finds no CUDA device" in run()
