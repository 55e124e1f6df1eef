"""The page of what was trained, as Markdown."""

from __future__ import annotations

from collections import Counter
from typing import Any

from cells import OPTIMIZERS, RANKS, Cell, every, excluded

COMMAND = "make matrix"


def page(results: dict[str, dict[str, Any]], machine: str) -> str:
    """How many cells of each optimizer and way were exact, of those trained, of those there are.

    Args:
        results: by a cell's name, what `run` kept of it.
        machine: what it was run on, in words.
    """
    cells = every()
    trainable = [cell for cell in cells if excluded(cell) is None]
    trained = [cell for cell in trainable if cell.name in results]
    exact = {cell for cell in trained if not results[cell.name]["problems"]}
    compared = sum(results[cell.name]["compared"] for cell in trained)
    lines = [
        "# The matrix of ways to train",
        "",
        f"Written by `{COMMAND}` (tests/agent/matrix). {machine}",
        "",
        "Optimizer × way and number of processes (gloo) × fp32, bf16, fp16 with a GradScaler that overflows once ×",
        "accumulation over 1 and 4 micro-batches × clipped or not × eager or compiled. Each cell is trained twice.",
        "Watched, every series about the model and the rank is compared to 1e-5 with a float64 oracle over the whole",
        "tensors, and a series too many is as wrong as one too few; losses and weights have to be those of the",
        "unwatched training, bit for bit.",
        "",
        f"{len(cells)} cells: {len(exact)} exact of {len(trained)} trained, {len(trainable) - len(trained)} not",
        f"trained, {len(cells) - len(trainable)} excluded. {compared} numbers were compared.",
        "",
        "Exact / trained / there are:",
        "",
        "| optimizer | " + " | ".join(f"{way} on {n}" for way, sizes in RANKS.items() for n in sizes) + " |",
        "| --- |" + " --- |" * sum(map(len, RANKS.values())),
    ]
    for optimizer in OPTIMIZERS:
        row = []
        for way, sizes in RANKS.items():
            for ranks in sizes:
                here = [c for c in trainable if (c.optimizer, c.way, c.ranks) == (optimizer, way, ranks)]
                row.append(_counts(here, trained, exact))
        lines.append(f"| {optimizer} | " + " | ".join(row) + " |")
    reasons = Counter(reason for cell in cells if (reason := excluded(cell)))
    lines += ["", "Excluded, which a cell of each kind proved by failing without us:", ""]
    lines += [f"- {count} cells: {reason}." for reason, count in sorted(reasons.items())]
    return "\n".join(lines) + "\n"


def _counts(here: list[Cell], trained: list[Cell], exact: set[Cell]) -> str:
    if not here:
        return "–"
    return f"{sum(c in exact for c in here)} / {sum(c in trained for c in here)} / {len(here)}"
