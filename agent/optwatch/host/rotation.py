"""The numbers of one rotation put together, on the host thread: each step has measured a part of the parameters."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from optwatch.training.rows import HEADER, Layout, Row

BEFORE_STEP = ("dot_gradient", "dot", "moment_before")
"""Sections of a gradient, which a skipped step has none of worth."""
ROTATING = (*BEFORE_STEP, "weight", "first_moment", "second_sum", "second_max", "second_below", "step_count")
"""Sections of which a row holds only the parameters that were due, in the order in which a row has them."""


SCALED = {"dot_gradient": 2, "dot": 1}
"""Powers of the gradient's scale that sections of it have."""


class Rotation:
    """Keeps the latest numbers of each parameter of one optimizer, and gives them out when a rotation is complete."""

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._latest: Tensor
        """Shape ``(len(ROTATING), n)``, float64."""
        self._known: Tensor
        """Which of them have been measured, bool."""
        self._met: dict[str, bool] = {}
        """Sections that have been measured of any parameter, and whether of all, as far as has been looked."""
        self._second_sizes: Tensor
        """Entries of each second moment: shape ``(n,)``, float64."""

    def join(self, row: Row, skipped: bool) -> None:
        """Put the latest numbers of all parameters into a row that completes a rotation, and take those of a part out
        of any other. A row without a rotation stays as it is; ``skipped`` says that its step had no usable gradient."""
        if row.joined:
            return
        row.joined = True
        if row.layout is not self._layout:
            self._layout = row.layout
            shape = len(ROTATING), len(row.layout.names)
            self._latest = torch.zeros(shape, dtype=torch.float64)
            self._known = torch.zeros(shape, dtype=torch.bool)
            self._second_sizes = torch.zeros(shape[1], dtype=torch.float64)
            self._met = {}
        self._keep(row, skipped)
        for name in ROTATING:
            row.measured.pop(name, None)
        row.step_counts, row.second_sizes, row.sampled = None, [], row.completes
        if row.completes:
            self._give(row)

    def _keep(self, row: Row, skipped: bool) -> None:
        if "second_sum" in row.measured:
            sizes = torch.as_tensor(row.second_sizes, dtype=torch.float64)
            self._second_sizes.index_copy_(0, positions_of(row, "second_sum"), sizes)
            if row.step_counts is not None:
                self._set(len(ROTATING) - 1, row, "second_sum", row.step_counts.view(1, -1))
        # Sections side by side of which the same parameters were measured are kept at once: each operation of torch's
        # takes longer than its numbers do.
        names = [name for name in ROTATING if name in row.measured and not (skipped and name in BEFORE_STEP)]
        while names:
            first = ROTATING.index(names[0])
            alike = 1
            while alike < len(names) and names[alike] == ROTATING[first + alike]:
                if row.measured[names[alike]] is not row.measured[names[0]]:
                    break
                alike += 1
            count = len(positions_of(row, names[0]))
            values = row.layout.places(row.values, names[:alike], 0, count).view(alike, count).to(torch.float64)
            if row.has_grad_scale and names[0] in SCALED:  # each step has a scale of its own
                scale = float(row.values[HEADER.index("grad_scale")])
                powers = torch.tensor([SCALED.get(name, 0) for name in names[:alike]], dtype=torch.float64)
                values = values / scale ** powers[:, None]
            self._set(first, row, names[0], values)
            del names[:alike]

    def _set(self, first: int, row: Row, name: str, values: Tensor) -> None:
        """Keep the numbers of some sections, from the `first` on, which were measured of the same parameters as `name`:
        shape ``(sections, k)``."""
        positions = positions_of(row, name)
        last = first + len(values)
        self._latest[first:last].index_copy_(1, positions, values)
        if not all(self._met.get(section, False) for section in ROTATING[first:last]):
            self._known[first:last].index_fill_(1, positions, True)
            for section in ROTATING[first:last]:
                self._met.setdefault(section, False)

    def _give(self, row: Row) -> None:
        for at, name in enumerate(ROTATING):
            if name not in self._met:
                continue
            latest, known = self._latest[at], self._known[at]
            self._met[name] = self._met[name] or bool(known.all())
            indices = None if self._met[name] else known.nonzero().flatten().tolist()
            values = latest if indices is None else latest[known]
            if name == "step_count":
                row.step_counts = values.clone()
            else:
                row.layout.section(row.values, name)[: len(values)] = values
                row.measured[name] = indices
                if name == "second_sum":
                    row.second_sizes = (self._second_sizes if indices is None else self._second_sizes[known]).clone()


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
