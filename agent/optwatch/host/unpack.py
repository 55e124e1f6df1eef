"""From an arrived row to a `StepRecord`: the last arithmetic, on the host thread, in float64 on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from optwatch.record import NonFinite, Source, StepRecord
from optwatch.training.rows import HEADER, Row
from optwatch.training.taps import MicroBatch

from .overflow import Overflows
from .passes import Reader
from .rotation import Rotation, positions_of

QUANTILES = (0.1, 0.5, 0.9)


class Unpacker:
    """Turns rows into records. Keeps how micro-batches add up to one loss, and the numbers of each rotation."""

    def __init__(self, loss_reduction: Literal["auto", "sum", "mean"], max_skipped_steps: int) -> None:
        self._reduction = loss_reduction
        self._overflows = Overflows(max_skipped_steps)
        self._accumulations: set[int] = set()
        self._rotations: dict[str, Rotation] = {}
        self._traces: dict[str, Reader] = {}

    def unpack(self, row: Row) -> StepRecord:
        """The record of a row that has arrived. Raises nothing for any values in it, NaN and Inf included."""
        layout = row.layout
        header = row.values[: len(HEADER) + layout.group_count].tolist()
        rates = header[len(HEADER) :]
        record = StepRecord(
            step=row.step,
            optimizer=row.optimizer,
            started=row.started,
            duration=row.duration,
            sampled=row.completes,
            skipped="overflow" if row.skipped or (row.has_found_inf and header[2] > 0) else None,
            micro_batches=len(row.micro_batches),
            learning_rates=[rate if rate is not None else rates[i] for i, rate in enumerate(row.learning_rates)],
            weight_decays=row.weight_decays,
            layers=layout.layer_names,
            parameters=layout.names,
            fresh_state=row.fresh_state,
            state_bytes=row.state_bytes,
        )
        if row.refuses and record.skipped is not None:
            record.skipped, record.refused = "nonfinite", True
        record.grad_scale = header[3] if row.has_scale else None
        self._overflows.judge(record, record.grad_scale, row.loads)
        if row.micro_batches:
            record.loss_reduction = self._how_losses_add(row.micro_batches)
            record.give_loss(header[0] / (len(row.micro_batches) if record.loss_reduction == "mean" else 1))
        if row.layout.names:
            found = _nonfinite_state(row)  # of what this step has read itself
            self._rotations.setdefault(row.optimizer, Rotation()).join(row, record.skipped is not None)
            _gradients(row, record, scale=header[1] if row.has_grad_scale else 1.0)
            record.nonfinite.extend([] if record.skipped == "overflow" else found)
            _moments(row, record)
            _weights(row, record)
            _updates(row, record)
        if record.skipped == "nonfinite" and not record.nonfinite:  # gradients that are not available
            record.nonfinite.append(NonFinite("gradient", "inf"))
        for source, positions, sums in row.broken_before:
            record.nonfinite_before += _nonfinite(row, source, torch.tensor(positions), sums.to(torch.float64))
        if row.trace is not None:
            reader = self._traces.setdefault(row.optimizer, Reader())
            if not record.nonfinite and record.skipped is None:
                reader.learn(row.trace)
            else:
                record.passes = reader.passes(row.trace)
        return record

    def _how_losses_add(self, batches: Sequence[MicroBatch]) -> Literal["sum", "mean"]:
        """Sum where each loss had been divided by the number of micro-batches, else mean.

        A window cut short by the end of an epoch is divided by the full number all the same, so any number of
        micro-batches seen before counts as well.
        """
        self._accumulations.add(len(batches))
        if self._reduction != "auto":
            return self._reduction
        divisors = {_divisor(batch) for batch in batches}
        divisor = divisors.pop() if len(divisors) == 1 else 1.0
        return "sum" if divisor > 1 and divisor in self._accumulations else "mean"


def _divisor(batch: MicroBatch) -> float:
    if batch.divisor is not None:
        return float(batch.divisor)
    if batch.factor is not None and float(batch.factor) != 0:
        # 0.1 * 10 is not 1 in floating point, and neither has to be 1 / 0.1.
        return round(1 / float(batch.factor), 6)
    return 1.0


def _section(row: Row, name: str) -> tuple[Tensor, Tensor] | None:
    """Positions of the measured parameters, shape ``(k,)``, and their numbers in float64; None if not measured."""
    if name not in row.measured:
        return None
    positions = positions_of(row, name)
    return positions, row.layout.section(row.values, name)[: len(positions)].to(torch.float64)


def _by_layer(row: Row, positions: Tensor, values: Tensor) -> Tensor:
    sums = torch.zeros(len(row.layout.layer_names), dtype=torch.float64)
    index = row.layout.layer_index
    return sums.index_add_(0, index if positions is row.layout.positions else index[positions], values)


def _root(x: float) -> float:
    """√x as torch has it: NaN of what is below 0."""
    return math.sqrt(x) if x >= 0 else math.nan


def _norm(squares: Tensor) -> float:
    return float(squares.sum().sqrt())


def _gradients(row: Row, record: StepRecord, scale: float) -> None:
    if (measured := _section(row, "gradient")) is None:
        return
    positions, squares = measured
    if scale != 1:
        squares = squares / scale**2
    if record.skipped:
        if record.skipped != "overflow":  # which is a scaler's search, no incident
            record.nonfinite.extend(_nonfinite(row, "gradient", positions, squares))
        return
    # Behind a step each operation on a tensor takes as long as a hundred of Python's: the layers' sums tell the rest.
    by_layer = _by_layer(row, positions, squares).tolist()
    record.layer_grad_norm = list(map(_root, by_layer))
    total = sum(by_layer)
    record.grad_norm = _root(total)
    norms = squares.sqrt()
    if positions is not row.layout.positions:
        norms = torch.full((len(row.layout.names),), -math.inf, dtype=torch.float64).index_copy_(0, positions, norms)
    record.parameter_grad_norm = norms.tolist()
    if (before := _section(row, "gradient_before_clip")) is not None:
        unclipped = torch.zeros(len(row.layout.names), dtype=torch.float64)
        unclipped[positions] = squares
        unclipped[before[0]] = before[1]
        record.grad_norm_before_clip = _norm(unclipped)
        # One NaN makes the clipping norm NaN and with it every clipped gradient: only those before it tell the culprit.
        positions, squares = row.layout.positions, unclipped
        total = math.nan
    if not math.isfinite(total):
        record.nonfinite.extend(_nonfinite(row, "gradient", positions, squares))
    dots, gradients, moments = (_section(row, name) for name in ("dot", "dot_gradient", "moment_before"))
    if dots is not None and gradients is not None and moments is not None:
        norms = (gradients[1].sum() * moments[1].sum()).sqrt()
        # Zero moments (before the first step) have no direction; the scale of g cancels in a cosine.
        record.grad_moment_cosine = float(dots[1].sum() / norms) if norms != 0 else None


def _moments(row: Row, record: StepRecord) -> None:
    if (firsts := _section(row, "first_moment")) is not None:
        record.first_moment_norm = _norm(firsts[1])
        record.layer_first_moment_norm = _by_layer(row, *firsts).sqrt_().tolist()
    if (seconds := _section(row, "second_sum")) is not None:
        positions, sums = seconds
        sizes = torch.as_tensor(row.second_sizes, dtype=torch.float64)
        layer_sizes = _by_layer(row, positions, sizes)
        record.second_moment_mean = float(sums.sum() / sizes.sum())
        record.layer_second_moment_mean = (_by_layer(row, positions, sums) / layer_sizes).tolist()
        largest = _section(row, "second_max")
        assert largest is not None  # noqa: S101 - written together with the sums
        record.second_moment_max = float(largest[1].max())
        _adaptivity(row, record, positions, sums, sizes)


def _adaptivity(row: Row, record: StepRecord, positions: Tensor, sums: Tensor, sizes: Tensor) -> None:
    """What needs the bias correction 1 − β₂ᵗ: epsilon-dominated share and effective learning rate (Adam, Kingma & Ba
    2015, algorithm 1). Unavailable where β₂ or ε is not a plain number."""
    counts = row.step_counts
    if counts is None:
        stored = _section(row, "step_count")
        counts = stored[1] if stored else None
    groups = row.layout.group_index[positions]
    betas, epsilons = _of_groups(row.betas2, groups), _of_groups(row.epsilons, groups)
    if counts is None or betas is None or epsilons is None:
        return
    below = _section(row, "second_below")
    assert below is not None  # noqa: S101 - written together with the sums
    record.epsilon_dominated_ratio = float(below[1].sum() / sizes.sum())
    if not row.exact_rate or not record.learning_rates:
        return
    rates = _of_groups(record.learning_rates, groups)
    assert rates is not None  # noqa: S101 - all have one, or none
    correction = 1 - betas**counts
    corrected = sums / correction
    bounds = epsilons
    if row.late_correction:  # η√(1 − β₂ᵗ) / (√v + ε) = η / (√v̂ + ε / √(1 − β₂ᵗ))
        bounds = bounds / correction.sqrt()
    layer_sizes = _by_layer(row, positions, sizes)
    root = (_by_layer(row, positions, corrected) / layer_sizes).sqrt_()
    epsilon = _by_layer(row, positions, bounds * sizes) / layer_sizes
    effective = _by_layer(row, positions, rates * sizes) / layer_sizes / (root + epsilon)
    effective = effective[layer_sizes > 0]
    quantiles = torch.quantile(effective, torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    record.effective_learning_rates = {str(q): value for q, value in zip(QUANTILES, quantiles, strict=True)}


def _of_groups(values: Sequence[float | None], groups: Tensor) -> Tensor | None:
    """What the group of each of some parameters has: shape ``(k,)``, float64; None where one of them has none."""
    each = torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)[groups]
    missing = [group for group, value in enumerate(values) if value is None]
    return None if missing and bool(torch.isin(groups, torch.tensor(missing)).any()) else each


def _weights(row: Row, record: StepRecord) -> None:
    weights = _section(row, "weight")
    if weights is None or len(weights[0]) < len(row.layout.names):  # one that cannot be read is no 0
        return
    record.weight_norm = _norm(weights[1])
    record.layer_weight_norm = _by_layer(row, *weights).sqrt_().tolist()


def _updates(row: Row, record: StepRecord) -> None:
    """Norms of the parameters whose update is known in full: of a layer, and of the run, once all of theirs are."""
    changes, weights = _section(row, "update"), _section(row, "update_weight")
    if record.skipped or changes is None or weights is None:
        return
    known = _by_layer(row, changes[0], (changes[1] < 0).to(torch.float64)) == 0
    moved, held = _by_layer(row, *changes), _by_layer(row, *weights)
    record.layer_update_ratio = [
        math.sqrt(change / weight) if whole and weight != 0 else None
        for whole, change, weight in zip(known.tolist(), moved.tolist(), held.tolist(), strict=True)
    ]
    if bool(known.all()):
        record.update_norm = _norm(moved)
        if (size := _norm(held)) != 0:
            record.update_ratio = record.update_norm / size


STATE = ("weight", "first_moment", "second_sum")
"""Sections side by side that tell whether weights and moments are finite."""


def _nonfinite_state(row: Row) -> list[NonFinite]:
    """NaN and Inf in the moments and weights that the row holds."""
    if all(name in row.measured and row.measured[name] is row.measured[STATE[0]] for name in STATE):
        numbers = row.layout.places(row.values, STATE, 0, len(positions_of(row, STATE[0])))
        if _is_finite(numbers.to(torch.float64)):  # the usual step: one sum instead of three
            return []
    found = []
    sources: tuple[tuple[Source, tuple[str, ...]], ...] = (
        ("moment", ("first_moment", "second_sum")),
        ("weight", ("weight",)),
    )
    for source, names in sources:
        measured = [section for name in names if (section := _section(row, name)) is not None]
        if all(map(_is_finite, (values for _, values in measured))):
            continue
        sums = torch.zeros(len(row.layout.names), dtype=torch.float64)
        for positions, values in measured:
            sums[positions] += values
        found += _nonfinite(row, source, row.layout.positions, sums)
    return found


def _is_finite(values: Tensor) -> bool:
    """Whether all of these are finite, which are far below what a float64 sum overflows at."""
    return math.isfinite(float(values.sum()))


def _nonfinite(row: Row, source: Source, positions: Tensor, values: Tensor) -> list[NonFinite]:
    """What is not finite, if anything: a float64 sum of squares is NaN or infinite exactly where the tensor holds such
    an element (see statistics)."""
    if _is_finite(values):
        return []
    broken = ~torch.isfinite(values)
    indices = sorted(set(positions[broken].tolist()))  # a parameter may have two moments
    first = values[positions == indices[0]]
    return [
        NonFinite(
            source,
            "nan" if bool(first.isnan().any()) else "inf",
            tuple(row.layout.names[i] for i in indices),
            tuple(row.layout.layers[i] for i in indices),
        )
    ]
