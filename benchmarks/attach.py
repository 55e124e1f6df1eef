"""What attaching costs: the audit of the configuration and the forecast of the optimizer's state, once a run.

    python benchmarks/attach.py [--repeats N] [--write]

Medians over attaches in one process, after one that imports; each with the model given, as the search for a model that
was not is the same one that used to come with the first step.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn, optim

from optwatch.audit import AT_ATTACH, Subject
from optwatch.memory.forecast import forecast
from optwatch.training.layers import find_model

RESULTS = Path(__file__).with_name("results") / "attach.md"


def transformer(width: int, blocks: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, batch_first=True)
    return nn.Sequential(nn.Embedding(256, width), nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "transformer, 10M parameters": lambda: transformer(384, 6),
    "transformer, 50M parameters": lambda: transformer(704, 8),
    "transformer, 1000 blocks": lambda: transformer(64, 1000),
    "2000 small tensors": lambda: nn.Sequential(*(nn.Linear(48, 48) for _ in range(1000))),
}


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` runs after one."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def audit(model: nn.Module, optimizer: optim.Optimizer) -> None:
    subject = Subject({type(optimizer).__name__: optimizer}, model, model_given=True)
    for rules in AT_ATTACH:
        rules.findings(subject, frozenset(), _fail)


def _fail(error: Exception) -> None:
    raise error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS}")
    given = parser.parse_args()
    lines = [
        "# What attaching costs",
        "",
        f"`python benchmarks/attach.py --write`: median of {given.repeats}, milliseconds, once a run. "
        f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} thread(s).",
        "",
        "| model | tensors | audit | forecast, AdamW | forecast, SGD | finding the model, where it is not given |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, make in MODELS.items():
        model = make()
        adamw, sgd = optim.AdamW(model.parameters()), optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        wanted = {id(p) for p in model.parameters()}
        figures = [
            milliseconds(lambda m=model, o=adamw: audit(m, o), given.repeats),
            milliseconds(lambda o=adamw: forecast(o, "AdamW"), given.repeats),
            milliseconds(lambda o=sgd: forecast(o, "SGD"), given.repeats),
            milliseconds(lambda w=wanted: find_model(w), given.repeats),
        ]
        lines.append(f"| {name} | {len(wanted)} | " + " | ".join(f"{figure:.1f}" for figure in figures) + " |")
    text = "\n".join(lines) + "\n"
    print(text)
    if given.write:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
