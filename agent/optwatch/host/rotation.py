"""The numbers of one rotation put together, on the host thread: each step has measured a part of the parameters."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from optwatch.training.rows import HEADER, Layout, Row

BEFORE_STEP = ("dot", "dot_gradient", "moment_before")
"""Sections of a gradient, which a skipped step has none of worth."""
ROTATING = (*BEFORE_STEP, "weight", "first_moment", "second_sum", "second_max", "second_below", "step_count")
"""Sections of which a row holds only the parameters that were due."""


class Rotation:
    """Keeps the latest numbers of each parameter of one optimizer, and gives them out when a rotation is complete."""

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._latest: dict[str, Tensor] = {}
        self._unknown: dict[str, Tensor] = {}
        """Which have not been measured yet, while there are any."""
        self._second_sizes: dict[int, int] = {}

    def join(self, row: Row, skipped: bool) -> None:
        """Put the latest numbers of all parameters into a row that completes a rotation, and take those of a part out
        of any other. A row without a rotation stays as it is; ``skipped`` says that its step had no usable gradient."""
        if row.joined:
            return
        row.joined = True
        if row.layout is not self._layout:
            self._layout = row.layout
            self._latest, self._unknown, self._second_sizes = {}, {}, {}
        self._keep(row, skipped)
        for name in ROTATING:
            row.measured.pop(name, None)
        row.step_counts, row.second_sizes, row.sampled = None, [], row.completes
        if row.completes:
            self._give(row)

    def _keep(self, row: Row, skipped: bool) -> None:
        if "second_sum" in row.measured:
            indices = row.measured["second_sum"]
            everything = range(len(row.layout.names))
            self._second_sizes.update(zip(everything if indices is None else indices, row.second_sizes, strict=True))
        for name in ROTATING:
            if name == "step_count" and row.step_counts is not None:
                self._set(name, row, positions_of(row, "second_sum"), row.step_counts)
            elif name in row.measured and not (skipped and name in BEFORE_STEP):
                positions = positions_of(row, name)
                values = row.layout.section(row.values, name)[: len(positions)].to(torch.float64)
                if row.has_grad_scale and name in ("dot", "dot_gradient"):  # each step has a scale of its own
                    values = values / float(row.values[HEADER.index("grad_scale")]) ** (1 if name == "dot" else 2)
                self._set(name, row, positions, values)

    def _set(self, name: str, row: Row, positions: Tensor, values: Tensor) -> None:
        if name not in self._latest:
            self._latest[name] = torch.zeros(len(row.layout.names), dtype=torch.float64)
            self._unknown[name] = torch.ones(len(row.layout.names), dtype=torch.bool)
        self._latest[name].index_copy_(0, positions, values.to(torch.float64))
        if name in self._unknown:
            self._unknown[name].index_fill_(0, positions, False)

    def _give(self, row: Row) -> None:
        for name, latest in self._latest.items():
            unknown = self._unknown.get(name)
            if unknown is not None and not bool(unknown.any()):
                unknown = None
                del self._unknown[name]
            indices = None if unknown is None else (~unknown).nonzero().flatten().tolist()
            values = latest if unknown is None else latest[~unknown]
            if name == "step_count":
                row.step_counts = values.clone()
            else:
                row.layout.section(row.values, name)[: len(values)] = values
                row.measured[name] = indices
        row.second_sizes = [self._second_sizes[index] for index in sorted(self._second_sizes)]


def positions_of(row: Row, name: str) -> Tensor:
    """Positions of the parameters that a section measured: shape ``(k,)``, int64."""
    indices = row.measured[name]
    if indices is None:
        return row.layout.positions
    # Sections of one part share one list, and its positions with it; while it is kept here its id is no other's.
    if id(indices) not in row.positions:
        # Four times as fast as from a list.
        found = torch.frombuffer(array("q", indices), dtype=torch.int64) if indices else row.layout.positions[:0]
        row.positions[id(indices)] = (indices, found)
    return row.positions[id(indices)][1]
