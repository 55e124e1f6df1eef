"""From the rows of all ranks to one row of the whole model.

Almost everything in a row is a sum over elements, so ranks' sums add up: squares, products, entries, counts. Two
sections are largest values. A parameter counts in a section only where every rank that counts has measured it: a sum
with a part missing would be a wrong number.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from optwatch.host.rotation import ROTATING
from optwatch.training.rows import EVERY_STEP, HEADER, SAMPLED, Row

from .group import Group
from .world import World

SECTIONS = EVERY_STEP + SAMPLED
LARGEST = ("second_max", "step_count")
SUMMED = tuple(name for name in SECTIONS if name not in LARGEST)
STATE = tuple(name for name in ROTATING if name != "weight")
"""Sections read off the optimizer's state, which may be on another rank than the rank whose weights count."""
UNKNOWN_BELOW_0 = ("update", "update_weight")
"""Sections of squares in which a negative number stands for one that is not known yet (see update.py)."""


def sections(row: Row) -> int:
    """The sections that the row holds, as bits."""
    return sum(1 << i for i, name in enumerate(SECTIONS) if name in row.measured)


def named(bits: int) -> list[str]:
    """The sections of such bits."""
    return [name for i, name in enumerate(SECTIONS) if bits >> i & 1]


def own(row: Row, name: str) -> tuple[Tensor, Tensor]:
    """A section by parameter: numbers in float64, 0 where there is none, and whether there is one; both ``(n,)``."""
    count = len(row.layout.names)
    values, present = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.bool)
    if name == "step_count" and name not in row.measured and row.step_counts is not None:
        numbers, indices = row.step_counts, row.measured.get("second_sum")
    elif name in row.measured:
        numbers, indices = row.layout.section(row.values, name), row.measured[name]
    else:
        return values, present
    at = torch.arange(count) if indices is None else torch.tensor(indices, dtype=torch.int64)
    values[at] = numbers[: len(at)].to(torch.float64)
    present[at] = True
    if name in UNKNOWN_BELOW_0:
        present &= ~(values < 0)
        values.masked_fill_(~present, 0)
    return values, present


def second_sizes(row: Row) -> Tensor:
    """Entries of the second moments that this rank has measured, by parameter: shape ``(n,)``, float64."""
    values = torch.zeros(len(row.layout.names), dtype=torch.float64)
    if "second_sum" in row.measured:
        indices = row.measured["second_sum"]
        at = torch.arange(len(values)) if indices is None else torch.tensor(indices, dtype=torch.int64)
        values[at] = torch.as_tensor(row.second_sizes, dtype=torch.float64)
    return values


def counted(row: Row, world: World, name: str) -> tuple[Tensor, Tensor]:
    """What this rank adds to a section's sum, and which parameters it counts for: both ``(n,)``."""
    values, present = own(row, name)
    if not (world.partitioned and name in STATE):
        present = present & world.counts
    # Chosen, not multiplied: 0 times a NaN that does not count would be NaN.
    return torch.where(present, values, 0.0), present


def total(row: Row, world: World, names: list[str], group: Group) -> Row:
    """The row of the whole model, from every rank's row of the same step. One sum, and one maximum on sampled steps.

    Args:
        row: this rank's, arrived on the host.
        world: what the ranks have agreed on.
        names: sections that any rank holds; the same on every rank.
        group: called by every rank alike.

    Raises:
        LostError: a rank did not take part.
    """
    width = len(world.layout.names)
    summed = [name for name in names if name in SUMMED]
    values = torch.zeros(len(summed) * 2 + 1, width, dtype=torch.float64)
    for i, name in enumerate(summed):
        numbers, present = counted(row, world, name)
        values[2 * i, world.positions] = numbers
        values[2 * i + 1, world.positions] = present.to(torch.float64)
    if "second_sum" in names:
        _, present = counted(row, world, "second_sum")
        values[-1, world.positions] = torch.where(present, second_sizes(row), 0.0)
    rates = _rates(row, world)
    packed = group.sum(torch.cat([values.reshape(-1), rates.reshape(-1)]))
    values = packed[: values.numel()].reshape(values.shape)
    rates = packed[values.numel() :].reshape(rates.shape)

    result = _empty(row, world, rates)
    for i, name in enumerate(summed):
        number = values[2 * i + 1]
        if (positions := _complete(name, number, world)) is not None:
            numbers = values[2 * i] / _copies(name, number, world)
            _put(result, name, positions, numbers.where(number > 0, -1.0) if name in UNKNOWN_BELOW_0 else numbers)
    if "second_sum" in names:
        number = values[2 * summed.index("second_sum") + 1]
        _largest(row, world, group, result, values[-1] / _copies("second_sum", number, world))
    return result


def _complete(name: str, number: Tensor, world: World) -> Tensor | None:
    """Positions at which a section holds the whole parameter; None where a part of any is missing."""
    if name in EVERY_STEP:
        return (number > 0).nonzero().flatten()  # a shard without a gradient moves by nothing
    if name in UNKNOWN_BELOW_0:
        number.masked_fill_(number < world.expected, 0)
        return torch.arange(len(number))
    whole = number > 0 if world.partitioned and name in STATE else number == world.expected
    return None if bool((~whole & (number > 0)).any()) else whole.nonzero().flatten()


def _copies(name: str, number: Tensor, world: World) -> Tensor:
    """By parameter, how many copies of the numbers have been added up, where that is not one."""
    partitioned = world.partitioned and name in STATE
    return number.clamp(min=1) if partitioned else torch.ones_like(number)


def _largest(row: Row, world: World, group: Group, result: Row, sizes: Tensor) -> None:
    """Maxima and step counts of second moments, by one maximum over the ranks."""
    largest = torch.full((2, len(world.layout.names)), -math.inf, dtype=torch.float64)
    for i, name in enumerate(LARGEST):
        numbers, present = own(row, name)
        # A maximum may lose a NaN; the sum beside it does not.
        largest[i, world.positions] = torch.where(present & ~numbers.isnan(), numbers, -math.inf)
    group.maximum(largest)
    if "second_sum" not in result.measured:
        return
    positions = torch.tensor(result.measured["second_sum"], dtype=torch.int64)
    sums = result.layout.section(result.values, "second_sum")[: len(positions)]
    _put(result, "second_max", positions, largest[0].masked_fill(largest[0].isinf(), 0.0))
    result.layout.section(result.values, "second_max")[: len(positions)].masked_fill_(sums.isnan(), math.nan)
    result.second_sizes = [int(size) for size in sizes[positions].tolist()]
    if not bool(largest[1, positions].isinf().any()):
        result.step_counts = largest[1, positions]


def _rates(row: Row, world: World) -> Tensor:
    """By group of all ranks: learning rate, β₂ and ε where this rank says them, else 0. Shape ``(groups, 3)``."""
    rates = torch.zeros(world.layout.group_count, 3, dtype=torch.float64)
    mine = rates[world.groups]
    if len(mine):
        sent = row.layout.learning_rates(row.values).tolist()
        known = [sent[i] if rate is None else rate for i, rate in enumerate(row.learning_rates)] or [None] * len(mine)
        for i, numbers in enumerate(zip(known, row.betas2, row.epsilons, strict=True)):
            mine[i] = torch.tensor([math.nan if x is None else x for x in numbers], dtype=torch.float64)
    return rates


def _empty(row: Row, world: World, rates: Tensor) -> Row:
    layout = world.layout
    values = torch.zeros(layout.length, dtype=torch.float64)
    values[: len(HEADER)] = row.values[: len(HEADER)].to(torch.float64)
    learning, betas2, epsilons = ([None if math.isnan(x) else x for x in column] for column in rates.T.tolist())
    return replace(
        row,
        layout=layout,
        values=values,
        learning_rates=[] if None in learning else learning,
        betas2=betas2,
        epsilons=epsilons,
        micro_batches=[],
        measured={},
        second_sizes=[],
        step_counts=None,
        ring=None,
    )


def _put(row: Row, name: str, positions: Tensor, values: Tensor) -> None:
    row.layout.section(row.values, name)[: len(positions)] = values[positions]
    row.measured[name] = positions.tolist()
