"""What is read of one set of an optimizer's parameters, their gradients and moments: on the training thread.

It launches reductions and writes what they give into a row. Nothing here waits for a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optwatch import kernels, state
from optwatch.kernels.plain import PLAIN
from optwatch.parallel import deepspeed, placement, store
from optwatch.parallel.checksums import Checks
from optwatch.parallel.reducers import DeviceReducers
from optwatch.record import Source
from optwatch.settings import Settings
from optwatch.state.reader import Reader

from . import layers, rows
from .moments import Moments
from .sampling import Schedule
from .statistics import Reducer
from .update import SPREAD, Update

FEW = 500
"""Numbers up to which adding up a list of them takes less time than an operation of torch's."""


class Readings:
    """Reads one set of parameters, and is replaced by another when that set changes: see `of`.

    Args:
        optimizer: whose parameters they are, as they are now.
        name: what the run calls it.
        model: names the parameters, where it is known.
        reader: where the optimizer keeps its moments.
        say_once: told of a reason for which something is not exported.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        name: str,
        model: nn.Module | None,
        reader: Reader,
        settings: Settings,
        say_once: Callable[[Exception], None],
    ) -> None:
        self.shape = _shape(optimizer)
        self.taken_over = False
        """Whether DeepSpeed steps copies of these parameters instead of them."""
        self.state_shape: tuple[int, ...] = ()
        """What the bytes of the optimizer's state were last counted of; nothing where they are to be counted anew."""
        self._optimizer = optimizer
        self._name = name
        self._reader = reader
        self._say_once = say_once
        groups = optimizer.param_groups
        device = first_parameter(optimizer).device
        parameters = [p for group in groups for p in group["params"]]
        parts: list[placement.Part] = []
        try:
            if deepspeed.owner_of(optimizer) is not None:
                raise deepspeed.TakenOverError(name)
            parts = placement.describe(parameters)
        except NotImplementedError as error:  # their statistics would be wrong: then none are exported
            self.taken_over = isinstance(error, deepspeed.TakenOverError)
            say_once(error)
            parameters = []
        compiled = settings.kernel == "auto"
        if compiled and len(parameters) >= kernels.MANY:
            kernels.prepare_addresses()
        devices = list(dict.fromkeys(p.device for p in parameters)) or [device]
        self.reducer = Reducer(device, compiled) if len(devices) == 1 else DeviceReducers(devices, compiled)
        names = layers.parameter_names(optimizer, model)[: len(parameters)]
        self.layout = rows.Layout(
            names=names,
            layers=layers.group_layers(names, settings.max_layers),
            sizes=[placement.size(p) for p in parameters],
            groups=[g for g, group in enumerate(groups) for _ in group["params"]],
            group_count=len(groups),
            device=self.reducer.device,
            parts=parts,
            partitioned=state.is_sharded(optimizer),
        )
        self._parameters = parameters
        self._cut = [p for p in parameters if type(p) not in PLAIN]
        self._on_device = any(found.type != "cpu" for found in devices)
        self.schedule = Schedule(self.layout.sizes, settings.rotation_steps)
        self.ring = rows.Ring(self.layout, settings.ring_rows)
        budget = settings.update_scratch_bytes if len(devices) == 1 else 0
        spread = SPREAD * settings.rotation_steps
        self.update = Update(parameters, self.reducer, budget, spread) if budget else None
        every = settings.rank_check_every
        self.checks = Checks(self.layout, parameters, every) if every and store.world() is not None else None
        self._moments = Moments(optimizer, reader, parameters, self.layout.groups, bool(self._cut), self.reducer.device)
        self._was_finite = True

    def of(self, optimizer: Optimizer) -> bool:
        """Whether these are still the optimizer's parameters: none has been added, and they have not moved."""
        return self.shape == _shape(optimizer)

    @property
    def in_parts(self) -> bool:
        """Whether this rank may hold but a part of some parameter."""
        return bool(self._cut)

    def gradients(self, wanted: set[int] | None = None) -> tuple[list[int], Sequence[Tensor]]:
        """The parameters that have a gradient, ascending, and what this rank holds of it; only those whose ``id`` is
        `wanted` where that is given."""
        asked, parameters = self.schedule.everything, self._parameters
        if wanted is not None:
            asked = [i for i, p in enumerate(parameters) if id(p) in wanted]
            parameters = [parameters[i] for i in asked]
        positions, gradients = kernels.gradients(parameters, self.reducer.device)
        present = asked if len(positions) == len(asked) else [asked[i] for i in positions]
        return present, list(map(placement.local, gradients)) if self._cut else gradients

    def read_gradients(
        self, row: rows.Row, due: list[int], wanted: set[int] | None = None, copying: Update | None = None
    ) -> bool:
        """Reduce the gradients into the row, beside the first moments that are `due`; those read before for the same
        step are replaced. Whether they could be read without waiting.

        Where `wanted` is given, only those of the parameters with such an ``id`` are read, and join those read before.
        What is `copying` copies its weights in the same go.
        """
        present, gradients = self.gradients(wanted)
        plain = isinstance(gradients, kernels.Located)
        if self._on_device and not plain and any(map(_waits, gradients)):
            self._say_once(SparseGradientError(self._name))
            return False
        row.partial_gradients = not all(p.grad is None or placement.summable(p) for p in self._cut)
        indices, at, moments = self._moments.before(self._moments.part(due), present, gradients)
        behind = wanted is not None
        with self.reducer.together():
            squares = row.place(("gradient",), present, behind)
            if moments:
                pairs = row.place(("dot_gradient", "dot", "moment_before"), indices, behind)
                state.products(self.reducer, gradients, at, moments, (squares, pairs))
            else:
                self.reducer.square_sums(gradients, squares)
            if copying is not None:
                copying.before()
        return True

    def breaks(self, row: rows.Row) -> bool:
        """Whether loss or gradients are not finite for the first time, where reading them waits for no device."""
        if row.values.device.type != "cpu":
            return False
        start, count = row.layout.start("gradient"), _count(row, "gradient") if "gradient" in row.measured else 0
        # One view of both: behind a step, each takes as long as adding up a hundred numbers.
        front = row.values[: start + (count if count <= FEW else 0)].tolist()
        known = front[start:] + (front[:1] if row.micro_batches else [])
        if count > FEW:
            known.append(float(row.values[start : start + count].sum()))
        was_finite, self._was_finite = self._was_finite, math.isfinite(sum(known))
        return was_finite and not self._was_finite

    def broken_state(self) -> list[tuple[Source, list[int], Tensor]]:
        """Moments and weights that are not finite before the step: those that the forward pass was computed with. The
        step itself makes all of them NaN, so that nobody can tell afterwards."""
        weights = list(enumerate(map(placement.local, self._parameters)))
        everything = self._moments.part(self.schedule.everything)
        both = [find(everything) for find in (self._moments.firsts, self._moments.seconds)]
        known, moments = [i for part, _ in both for i in part.indices], [moment for _, held in both for moment in held]
        found: list[tuple[Source, list[int], Tensor]] = [
            ("moment", known, state.square_sums(self.reducer, moments)),
            ("weight", [i for i, _ in weights], self.reducer.square_sums(weight for _, weight in weights)),
        ]
        return [broken for broken in found if not bool(torch.isfinite(broken[2]).all())]

    def read_state(self, row: rows.Row, due: list[int]) -> None:
        """Reduce the weights and moments of the parameters that are `due` into the row, after the step."""
        part = self._moments.part(due)
        weights = list(map(placement.local, part.parameters)) if self._cut else part.parameters
        self.reducer.square_sums(weights, row.place(("weight",), due))
        having, firsts = self._moments.firsts(part)
        if firsts:
            state.square_sums(self.reducer, firsts, row.place(("first_moment",), having.indices))
        having, seconds = self._moments.seconds(part)
        if seconds:
            row.second_sizes = state.entries(seconds)
            counts = self._moments.step_counts(row, having)
            thresholds = None if counts is None else self._moments.thresholds(row, having, counts)
            place = row.place(("second_sum", "second_max", "second_below"), having.indices)
            state.nonnegative(self.reducer, seconds, thresholds, place)

    def complete(self, row: rows.Row) -> None:
        """What a row has of all parameters that completes a rotation."""
        if self.update is not None:
            row.place(("update", "update_weight"), self.schedule.everything).write(self.update.sums())
        if (shape := state.extent(self._optimizer, self._reader.grows)) != self.state_shape:
            self.state_shape = shape
            row.state_bytes = state.state_bytes(self._optimizer)


class SparseGradientError(RuntimeError):
    """The norm of a sparse gradient cannot be had without waiting for its device."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name} has sparse gradients on a device: adding up their duplicate rows would make training wait, so its "
            "gradient norms are not exported. Use Embedding(sparse=False) to have them"
        )


def _waits(gradient: Tensor) -> bool:
    """Whether reading it would wait for its device, which coalescing does to learn how many rows are left."""
    return gradient.is_sparse and gradient.device.type != "cpu" and not gradient.is_coalesced()


def first_parameter(optimizer: Optimizer) -> Tensor:
    """The first parameter of any group. An optimizer has at least one, but not in every group."""
    first: Tensor = next(p for group in optimizer.param_groups for p in group["params"])
    return first


def _shape(optimizer: Optimizer) -> tuple[object, ...]:
    """What changes when parameters are added, replaced, or moved."""
    first = first_parameter(optimizer)
    return first.device, id(first), *(len(group["params"]) for group in optimizer.param_groups)


def _count(row: rows.Row, section: str) -> int:
    """How many parameters a section of a row holds."""
    measured = row.measured[section]
    return len(row.layout.names) if measured is None else len(measured)
