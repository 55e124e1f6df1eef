"""The matrix of ways to train, as data: its factors, which combinations cannot be trained and why, and a covering part.

Only the standard library is imported.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from itertools import combinations, product

OPTIMIZERS = (
    "AdamW foreach",
    "AdamW fused",
    "SGD Nesterov",
    "Muon",
    "Lion",
    "Schedule-Free",
    "SOAP",
    "Adafactor",
)
RANKS = {"single": (1,), "DDP": (2, 4), "FSDP2": (2, 4), "HSDP": (4,), "TP": (2, 4), "ZeRO-1": (2, 4)}
"""Numbers of processes by way of training; HSDP is on a mesh of 2×2."""
PRECISIONS = ("fp32", "bf16", "fp16+scaler")

NOT_SHARDED = {
    "SOAP": "pytorch_optimizer's SOAP mixes plain preconditioners with sharded gradients, which DTensor refuses",
    "Adafactor": "torch.optim.Adafactor squares a sharded norm in place, which DTensor refuses",
}
"""Optimizers whose own step() raises on DTensors, and why."""

FEWER_ROWS = "torch.optim.Muon adds a replicated update to a matrix of fewer rows than ranks, which DTensor refuses"


@dataclass(frozen=True, order=True)
class Cell:
    """One way to train."""

    optimizer: str
    way: str
    ranks: int
    precision: str
    """``bf16``: weights, gradients and moments are bfloat16. ``fp16+scaler``: weights are float32, the model computes
    in float16, and a GradScaler begins at a scale that overflows."""
    accumulation: int
    """Micro-batches of a step."""
    clip: bool
    compiled: bool
    """Whether torch.compile compiles the model's block, as far as AOTAutograd ("aot_eager": no C++ compiler)."""

    @property
    def name(self) -> str:
        """For people and for ``--only``."""
        clip, mode = "clipped" if self.clip else "unclipped", "compiled" if self.compiled else "eager"
        return f"{self.optimizer}, {self.way} on {self.ranks}, {self.precision}, ×{self.accumulation}, {clip}, {mode}"


def every() -> list[Cell]:
    """All cells, in a fixed order."""
    return [
        Cell(optimizer, way, ranks, precision, accumulation, clip, compiled)
        for way, sizes in RANKS.items()
        for optimizer, ranks, precision, accumulation, clip, compiled in product(
            OPTIMIZERS, sizes, PRECISIONS, (1, 4), (False, True), (False, True)
        )
    ]


def excluded(cell: Cell) -> str | None:
    """Why torch or the optimizer's package cannot train a cell, watched or not; None where it can."""
    if (cell.optimizer, cell.way, cell.ranks) == ("Muon", "FSDP2", 4):
        return FEWER_ROWS
    if cell.way in ("FSDP2", "HSDP", "TP"):
        return NOT_SHARDED.get(cell.optimizer)
    return None


def excuses(cells: list[Cell]) -> dict[str, Cell]:
    """By each reason of `excluded`, the plainest of these cells that it excludes."""
    plain = sorted(cells, key=lambda c: (c.ranks, c.compiled, c.clip, c.accumulation, PRECISIONS.index(c.precision)))
    return {reason: cell for cell in reversed(plain) if (reason := excluded(cell))}


Pair = tuple[tuple[int, object], tuple[int, object]]


def pairs(cell: Cell) -> frozenset[Pair]:
    """Every two factors' values of a cell, each with its factor's number."""
    return frozenset(combinations(enumerate(astuple(cell)), 2))


def covering(cells: list[Cell]) -> list[Cell]:
    """Some of the cells, such that every pair of values that is in some cell is in one of these.

    Greedy: the cell with the most new pairs for its cost comes next, the first of equals. Deterministic. A cell costs
    its processes, and about as much as four of them before they begin.
    """
    of = {cell: pairs(cell) for cell in cells}
    missing = set().union(*of.values())
    chosen = []
    while missing:
        best = max(cells, key=lambda cell: len(of[cell] & missing) / (cell.ranks + 4))
        chosen.append(best)
        missing -= of[best]
    return sorted(chosen)
