"""The benchmark of a step's cost works, on a small model, and takes no figures of an agent that fails."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optwatch.training.readings import Readings

FOLDER = Path(__file__).parents[2] / "benchmarks"


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))

    def loss(self) -> torch.Tensor:
        return self.layers(torch.randn(4, 8)).square().mean()


@pytest.fixture
def overhead(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("overhead")
    module.kernels.prepare().join()
    ours = {name: peer for name, peer in module.installed().items() if "norm" in name and "Lightning" not in name}
    monkeypatch.setattr(module, "installed", lambda: ours)  # other packages are measured in an environment of their own
    return module


def test_each_contender_is_measured_against_the_plain_step(overhead: Any) -> None:
    page = "\n".join(overhead.table("small", Small, 0))
    number = r"[+-]\d+\.\d\d"
    rows = re.findall(rf"^\| (.+) \| {number}% \({number} to {number}\) \| \d+\.\d\d% \|$", page, re.MULTILINE)
    assert rows[:3] == [overhead.DEFAULT, overhead.EVERYTHING, overhead.BYTES]
    assert set(rows[3:]) == set(overhead.installed())
    assert len(rows) == 8
    read = r"hooks \d+\.\d\d%, 0 MB a step, which take \d+\.\d\d%; weights and moments in"
    rotation, *_ = re.findall(rf"- {overhead.DEFAULT}: {read} (\d+) steps\.", page)
    assert int(rotation) > 10  # ten such steps take no fifteen seconds
    assert re.search(rf"- {overhead.EVERYTHING}: {read} 1 step\.", page)


def test_bytes_are_counted_of_all_that_is_read_and_copied(overhead: Any) -> None:
    training = overhead.Training(Small)
    size = sum(p.nbytes for p in training.model.parameters())
    agent = overhead.Agent(training.model, training.optimizer, 1)
    # Gradients, weights, both moments and the first one before the step; a copy is read and written, and read again
    # beside the weights; three outputs of four times eight numbers.
    assert overhead.bytes_read(training, agent) == (5 * size + 4 * size + 3 * 4 * 8 * 4, 1)


def test_no_figure_is_of_an_agent_that_fails(overhead: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("broken on purpose")

    monkeypatch.setattr(Readings, "read_state", broken)
    with pytest.raises(RuntimeError, match=r"the agent failed.*hook"):
        overhead.table("small", Small, 0)
