"""What ranks compare with each other, read in the hooks: checksums of replicated tensors, hyper-parameters, own time.

Nothing here waits for a device or another rank. A check goes over all replicated parameters once in `every` steps, each
step reading a part of about the same cost; ranks read the same tensors at the same steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optwatch import state
from optwatch.resume.digest import CPU_BLOCK, Digester, parts
from optwatch.training.rows import Layout
from optwatch.training.sampling import Schedule
from optwatch.training.transfer import Arrival, Moment, host_place

from . import placement

DEVICE_BLOCK = 1_048_576
"""Words that are read at once on a device: 16 MiB are held there for it."""
SWITCHES = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})
"""Entries of a parameter group that do not change what a step computes."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Checksums on their way from one device."""

    tensors: list[tuple[int, str]]
    """Of which: the parameter's index, and ``weight`` or the path of an entry of its optimizer state."""
    sums: Tensor
    """Shape ``(2 * len(tensors),)``, int64, on the host: the two sums of each (`digest`)."""
    arrival: Arrival


@dataclass(eq=False, slots=True)
class Checked:
    """What one step has for the comparison of ranks."""

    every: int
    readings: list[Reading] = field(default_factory=list)
    groups: list[dict[str, Any]] | None = None
    """Hyper-parameters by group, at steps at which they are compared. Those that are tensors are not among them."""
    own: tuple[Moment, Moment] | None = None
    """Since when this rank has worked without waiting for another, and until when."""


class Checks:
    """Reads what is to be compared, for one layout. For the training thread, without gradients.

    Args:
        layout: says which ranks hold the same of a parameter.
        parameters: in the layout's order.
        every: steps between two comparisons.
    """

    def __init__(self, layout: Layout, parameters: Sequence[Tensor], every: int) -> None:
        self.every = every
        self._parameters = parameters
        self._partitioned = layout.partitioned
        self._replicated = [i for i, part in enumerate(layout.parts) if part.peers is not None]
        self._schedule = Schedule([layout.sizes[i] for i in self._replicated], every)
        self._digesters: dict[torch.device, Digester] = {}

    def take(self, count: int, optimizer: Optimizer) -> Checked:
        """Start reading what is due at a step, after it. Launches on the parameters' devices; one copy a device.

        Each tensor is read twice in `every` steps: a weight, and what the optimizer keeps for it on the same device.
        """
        checked = Checked(self.every)
        if count % self.every == 0:
            checked.groups = [_numbers(group) for group in optimizer.param_groups]
        by_device: dict[torch.device, list[tuple[tuple[int, str], Tensor]]] = {}
        for i in (self._replicated[at] for at in self._schedule.part(count)):
            for name, tensor in self._tensors(i, optimizer):
                by_device.setdefault(tensor.device, []).append(((i, name), tensor))
        for device, found in by_device.items():
            sums = self._digester(device).sums([tensor for _, tensor in found]).reshape(-1)
            place = sums if device.type == "cpu" else host_place(len(sums), torch.int64, device)
            checked.readings.append(Reading([of for of, _ in found], place, Arrival(sums, place)))
        return checked

    def _tensors(self, index: int, optimizer: Optimizer) -> list[tuple[str, Tensor]]:
        parameter = self._parameters[index]
        found = [("weight", placement.local(parameter).detach())]
        if not self._partitioned:  # else its state is on one of the ranks only
            kept = parts(state.holder(optimizer).state.get(parameter, {}))
            # Step counts are compared as numbers, and may be on another device.
            found += [(name, x) for name, x in kept if x.device == found[0][1].device and x.numel() > 1]
        return found

    def _digester(self, device: torch.device) -> Digester:
        if device not in self._digesters:
            self._digesters[device] = Digester(device, block=CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK)
        return self._digesters[device]


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    """Hyper-parameters of a group that are known without waiting for a device."""
    plain = (bool, int, float, str, type(None))
    return {
        name: value
        for name, value in group.items()
        if name not in SWITCHES
        and (
            isinstance(value, plain) or (isinstance(value, (tuple, list)) and all(isinstance(x, plain) for x in value))
        )
    }
