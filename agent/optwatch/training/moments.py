"""The moments of one set of an optimizer's parameters, and what their bias correction needs: on the training thread."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.optim import Optimizer

from optwatch import kernels, state
from optwatch.kernels.locate import States
from optwatch.parallel import placement
from optwatch.state.reader import Kept, Reader

from . import rows
from .transfer import numbers

Read = Callable[[States, list[Tensor], torch.device], Kept]
"""Reads a moment of some parameters in an optimizer's state."""


class Part:
    """Some of the parameters, which are read together. Kept for the steps to come: making a list of hundreds is one of
    the large allocations behind a step that locate.cpp avoids.

    Args:
        indices: of its parameters.
        of: all parameters.
        groups: the parameter group of each of all.
    """

    def __init__(self, indices: list[int], of: Sequence[Tensor], groups: Sequence[int]) -> None:
        self.indices = indices
        self._of = of
        self._groups = groups

    @cached_property
    def parameters(self) -> list[Tensor]:
        """Its parameters."""
        return [self._of[i] for i in self.indices]

    @cached_property
    def groups(self) -> list[int]:
        """The parameter group of each."""
        return [self._groups[i] for i in self.indices]

    @cached_property
    def at(self) -> array[int]:
        """The indices, as a kernel reads them."""
        return array("q", self.indices)


class Moments:
    """Finds the moments of a list of parameters. Waits for no device.

    Args:
        optimizer: whose parameters they are.
        reader: where it keeps its moments.
        parameters: all of them.
        groups: the parameter group of each.
        cut: whether this rank may hold but a part of some parameter.
        device: on which kernels read.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        reader: Reader,
        parameters: Sequence[Tensor],
        groups: Sequence[int],
        cut: bool,
        device: torch.device,
    ) -> None:
        self._optimizer = optimizer
        self._reader = reader
        self._parameters = parameters
        self._groups = groups
        self._cut = cut
        self._device = device
        self._parts: dict[int, Part] = {}

    def part(self, indices: list[int]) -> Part:
        """The part that a list of the schedule's stands for."""
        part = self._parts.get(id(indices))
        if part is None:  # which keeps the list, so that its id is no other's
            part = self._parts[id(indices)] = self._new_part(indices)
        return part

    def firsts(self, part: Part) -> tuple[Part, Sequence[state.Stored]]:
        """The parameters of a part that have a first moment, and what this rank holds of it."""
        return self._held(self._reader.firsts, part)

    def seconds(self, part: Part) -> tuple[Part, Sequence[state.Stored]]:
        """Likewise, the second moment."""
        return self._held(self._reader.seconds, part)

    def before(
        self, part: Part, present: Sequence[int], gradients: Sequence[Tensor]
    ) -> tuple[list[int], Sequence[int], Sequence[state.Stored]]:
        """The first moments of a part whose product with the gradient has a meaning: their parameters, the positions of
        their gradients, and themselves. ``gradients`` are those of the parameters that are ``present``."""
        all_present = len(present) == len(self._parameters)
        part, held = self.firsts(part)
        # A gradient that a kernel may read is dense and of its parameter's shape, as a moment that is one tensor is. It
        # becomes no Python object for that to be asked.
        plain = isinstance(gradients, kernels.Located)
        if plain and all_present and state.is_plain(held):
            return part.indices, part.at, held
        indices: list[int] = []
        positions: list[int] = []
        moments: list[state.Stored] = []
        for i, moment in zip(part.indices, held, strict=True):
            at = i if all_present else bisect_left(present, i)
            if at == len(present) or present[at] != i:
                continue
            if state.aligned(moment, self._parameters[i] if plain else gradients[at]):
                indices.append(i)
                positions.append(at)
                moments.append(moment)
        return indices, positions, moments

    def _held(self, read: Read, part: Part) -> tuple[Part, Sequence[state.Stored]]:
        positions, moments = read(state.holder(self._optimizer).state, part.parameters, self._device)
        if self._cut:
            held = map(placement.held, moments, (part.parameters[i] for i in positions))
            known = [(i, moment) for i, moment in zip(positions, held, strict=True) if moment is not None]
            positions, moments = [i for i, _ in known], [moment for _, moment in known]
        if len(positions) < len(part.indices):
            part = self._new_part([part.indices[i] for i in positions])
        return part, moments

    def _new_part(self, indices: list[int]) -> Part:
        return Part(indices, self._parameters, self._groups)

    def step_counts(self, row: rows.Row, part: Part) -> float | Tensor | None:
        """The steps t of the bias correction, where each of these parameters has one: shape ``(k,)``, float64, where
        they are kept, or the one that all share. They go into the row."""
        states = state.holder(self._optimizer).state
        each = self._reader.counts(states, part.parameters, self._optimizer.param_groups, part.groups)
        if isinstance(each, float):
            row.step_counts = torch.full((len(part.indices),), each, dtype=torch.float64, device="cpu")
            return each
        if any(count is None for count in each):
            return None
        if float in map(type, each):  # one at a time, a tensor takes ten times as long to make
            counts = torch.tensor(each, dtype=torch.float64, device="cpu")
        else:
            counts = torch.stack(each).to(torch.float64)  # type: ignore[arg-type]  # all are tensors
        if counts.device.type == "cpu":
            row.step_counts = counts
        else:
            row.place(("step_count",), part.indices).write(counts)
        return counts

    def thresholds(self, row: rows.Row, part: Part, counts: float | Tensor) -> Tensor | None:
        """The v below which the step's root is below its ε, for each parameter: float64, where the step counts are.

        √(v / (1 − β₂ᵗ)) < ε, or √v < ε where the bias is corrected after ε has been added.
        """
        groups = part.groups
        if any(row.betas2[group] is None or row.epsilons[group] is None for group in set(groups)):
            return None
        betas, epsilons = ([0.0 if x is None else x for x in values] for values in (row.betas2, row.epsilons))
        limits = [epsilon**2 for epsilon in epsilons]
        if isinstance(counts, float) and not row.late_correction:
            limits = [(1 - beta**counts) * limit for beta, limit in zip(betas, limits, strict=True)]
        device = counts.device if isinstance(counts, Tensor) else torch.device("cpu")
        if len(limits) == 1:
            each = torch.full((len(groups),), limits[0], dtype=torch.float64, device=device)
        else:
            each = numbers([limits[group] for group in groups], torch.float64, device)
        if row.late_correction or isinstance(counts, float):
            return each
        return (1 - numbers([betas[group] for group in groups], torch.float64, device) ** counts) * each
