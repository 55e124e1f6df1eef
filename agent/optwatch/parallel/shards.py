"""Sums over this rank's part of the model, such that a sum over ranks in PromQL is that of the whole model."""

from __future__ import annotations

from torch import Tensor

from optwatch.training.rows import HEADER, Row

from . import totals
from .world import World

QUANTITIES = {
    "gradient_squares": "gradient",
    "gradient_before_clip_squares": "gradient_before_clip",
    "weight_squares": "weight",
    "first_moment_squares": "first_moment",
    "second_moment": "second_sum",
    "epsilon_dominated_entries": "second_below",
}
"""Values of label ``quantity`` by section of a row; ``second_moment_entries`` is beside them."""

Sums = dict[tuple[str, str], float]
"""By quantity and layer; the layer is empty for the whole part."""


def shard_sums(row: Row, world: World, skipped: bool) -> Sums:
    """The sums of one row, of what counts on this rank: every element of the model counts on one rank.

    A quantity that the row has not measured is absent; gradients are unscaled, and absent where a scaler has skipped
    the step.
    """
    sums: Sums = {}
    scale = float(row.values[HEADER.index("grad_scale")]) if row.has_grad_scale else 1.0
    for quantity, section in QUANTITIES.items():
        unusable = skipped or row.partial_gradients
        if section not in row.measured or (unusable and quantity.startswith("gradient")):
            continue
        values, _ = totals.counted(row, world, section)
        _add(sums, quantity, row, values / scale**2 if section == "gradient" else values)
        if section == "second_sum":
            _, present = totals.counted(row, world, section)
            _add(sums, "second_moment_entries", row, totals.second_sizes(row) * present)
    return sums


def _add(sums: Sums, quantity: str, row: Row, values: Tensor) -> None:
    by_layer = values.new_zeros(len(row.layout.layer_names)).index_add_(0, row.layout.layer_index, values)
    sums[quantity, ""] = float(values.sum())
    sums.update(((quantity, name), x) for name, x in zip(row.layout.layer_names, by_layer.tolist(), strict=True))
