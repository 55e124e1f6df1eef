"""What differs between ranks that ought to be equal: the rank that is alone, and what it has. Plain functions of data.

A rank is named where more than half of those that can be compared agree without it; else all of them are.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SLOWER = 1.3
"""Times the median of the other ranks' own time that a straggler takes."""
SHARE = 0.1
"""Least share of a step by which a straggler is slower: what it costs the others."""
LEAST_SECONDS = 0.001
"""Least seconds a step by which it is slower."""


def outliers(values: Mapping[int, Hashable]) -> tuple[int, ...]:
    """The ranks, ascending, whose value is not that of more than half; all where no value is. None where all agree."""
    counts = Counter(values.values())
    if len(counts) < 2:
        return ()
    value, number = counts.most_common(1)[0]
    return tuple(sorted(rank for rank, own in values.items() if 2 * number <= len(values) or own != value))


def tensors(
    mine: Mapping[int, tuple[int, ...]], by_rank: Sequence[Mapping[int, int]]
) -> dict[tuple[int, ...], list[int]]:
    """The tensors that differ, by the ranks that are named for it.

    Args:
        mine: the ranks that have to have the same, by the key of a tensor that this rank has read.
        by_rank: of every rank, the checksum by the key of a tensor. One that a rank has not read is not compared.
    """
    found: dict[tuple[int, ...], list[int]] = {}
    for key, peers in mine.items():
        if named := outliers({rank: by_rank[rank][key] for rank in peers if key in by_rank[rank]}):
            found.setdefault(named, []).append(key)
    return found


@dataclass(frozen=True)
class Mismatch:
    """A hyper-parameter that ranks do not agree on."""

    ranks: tuple[int, ...]
    group: int | None
    """None for what is not of a group: the step."""
    name: str
    values: dict[int, Any]
    """By rank."""


def hyperparameters(said: Mapping[int, Mapping[str, Any]]) -> list[Mismatch]:
    """Where ranks disagree, exactly.

    Args:
        said: by rank ``step`` and ``groups``, a list of hyper-parameters by name. Of ranks that have the same
            parameters, at the same step since attaching.
    """
    found = []
    steps = {rank: own["step"] for rank, own in said.items()}
    if named := outliers(steps):
        found.append(Mismatch(named, None, "step", steps))
    for group in range(min((len(own["groups"]) for own in said.values()), default=0)):
        names = dict.fromkeys(name for own in said.values() for name in own["groups"][group])
        for name in names:
            values = {rank: own["groups"][group].get(name) for rank, own in said.items()}
            if named := outliers({rank: repr(value) for rank, value in values.items()}):
                found.append(Mismatch(named, group, name, values))
    return found


def slowdowns(own: Mapping[int, float]) -> dict[int, float]:
    """Each rank's own time relative to the median of the others'. Empty for fewer than two ranks."""
    ratios = {}
    for rank, seconds in own.items():
        others = [x for other, x in own.items() if other != rank]
        if others and (median := statistics.median(others)) > 0:
            ratios[rank] = seconds / median
    return ratios


def stragglers(own: Mapping[int, float], step_seconds: float) -> dict[int, float]:
    """Ranks that hold the others up, each with how many times slower it is: by `SLOWER`, and by enough to matter in a
    step of `step_seconds`."""
    least = max(SHARE * step_seconds, LEAST_SECONDS)
    return {
        rank: ratio for rank, ratio in slowdowns(own).items() if ratio > SLOWER and own[rank] * (1 - 1 / ratio) >= least
    }
