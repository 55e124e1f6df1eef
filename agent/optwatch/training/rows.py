"""Rows: everything that one step measured, packed into one tensor, on its way from the device to the host thread.

A row has a header, then one section for each statistic with one number for each parameter. Sections of every step come
first, those of sampled steps after them, so that a plain step copies only the front.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optwatch.kernels import Place

from .blocks import wide_dtype
from .taps import MicroBatch
from .transfer import Arrival, host_place

if TYPE_CHECKING:
    from optwatch.host.passes import Trace
    from optwatch.parallel.checksums import Checked
    from optwatch.parallel.placement import Part
    from optwatch.record import Source

HEADER = ("loss_sum", "grad_scale", "found_inf", "scale")
EVERY_STEP = ("gradient", "gradient_before_clip")
SAMPLED = (
    *(
        "dot_gradient",  # with the next two, in the order in which they are measured
        "dot",
        "moment_before",
        "weight",
        "first_moment",
        "second_sum",
        "second_max",
        "second_below",
        "step_count",
    ),
    "update",  # of a parameter whose update is not known yet: negative, as in update.py
    "update_weight",
)
_PLACES = {name: position for position, name in enumerate(EVERY_STEP + SAMPLED)}
RING_BYTES = 8 * 2**20
"""Most bytes of rows kept for a run, whatever ring_rows asks for."""


@dataclass(frozen=True)
class Layout:
    """What the positions of a row mean, for one set of parameters. Replaced, never changed, when that set changes."""

    names: list[str]
    layers: list[str]
    """The layer of each parameter."""
    sizes: list[int]
    groups: list[int]
    """The parameter group of each parameter."""
    group_count: int
    device: torch.device
    parts: list[Part] = field(default_factory=list)
    """What this rank holds of each parameter."""
    partitioned: bool = False
    """Whether the state of a parameter is on one of the ranks that hold it (ZeRO-1), not on each."""
    layer_names: list[str] = field(init=False)
    layer_index: Tensor = field(init=False)
    """Shape ``(n,)``, int64, CPU: position in `layer_names` of each parameter's layer."""
    group_index: Tensor = field(init=False)
    """Shape ``(n,)``, int64, CPU: `groups`."""
    positions: Tensor = field(init=False)
    """Shape ``(n,)``, int64, CPU: 0 to n - 1."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_names", list(dict.fromkeys(self.layers)))
        position = {name: i for i, name in enumerate(self.layer_names)}
        index = torch.tensor([position[layer] for layer in self.layers], dtype=torch.int64)
        object.__setattr__(self, "layer_index", index)
        object.__setattr__(self, "group_index", torch.tensor(self.groups, dtype=torch.int64))
        object.__setattr__(self, "positions", torch.arange(len(self.names)))

    @property
    def front(self) -> int:
        """Length of the part that every step copies."""
        return len(HEADER) + self.group_count + len(EVERY_STEP) * len(self.names)

    @property
    def length(self) -> int:
        """Length of a whole row."""
        return self.front + len(SAMPLED) * len(self.names)

    def learning_rates(self, row: Tensor) -> Tensor:
        """The part for learning rates that are tensors, one a group."""
        return row[len(HEADER) : len(HEADER) + self.group_count]

    def section(self, row: Tensor, name: str) -> Tensor:
        """The part of `row` for one statistic: shape ``(n,)``, a view."""
        start = self.start(name)
        return row[start : start + len(self.names)]

    def places(self, row: Tensor, sections: Sequence[str], first: int, count: int) -> Tensor:
        """Some places of sections that follow one another, from the `first` on: shape ``(count,)`` for one section,
        ``(len(sections), count)`` for several, a view."""
        start, n = self.start(sections[0]) + first, len(self.names)
        if len(sections) == 1:
            return row[start : start + count]
        return row.as_strided((len(sections), count), (n, 1), row.storage_offset() + start)

    def start(self, name: str) -> int:
        """The place in a row where the section of one statistic begins."""
        return len(HEADER) + self.group_count + _PLACES[name] * len(self.names)


@dataclass(slots=True, eq=False)
class Row:
    """One step under way: its numbers on the device, and what the host knew already."""

    layout: Layout
    values: Tensor
    """Shape ``(length,)``, float64 (float32 on MPS). On the host it may be read once it has arrived."""
    step: int
    optimizer: str
    started: float
    """Unix seconds at which the step began."""
    duration: float | None
    """Seconds since the step before, None for the first."""
    sampled: bool
    """Whether it holds any of the sections of sampled steps."""
    learning_rates: list[float | None]
    """By group; None for one that is a tensor and travels in the row. Empty where they are unavailable."""
    weight_decays: list[float]
    betas2: list[float | None]
    epsilons: list[float | None]
    count: int = 0
    """Steps seen of this optimizer since attaching, this one included: the same for the same step on every rank."""
    late_correction: bool = False
    """Whether the step adds ε to √v before it corrects the bias."""
    exact_rate: bool = True
    """Whether η / (√v̂ + ε) is the rate of a weight's step."""
    second_sizes: list[int] | Tensor = field(default_factory=list)
    """Entries of each second moment that was measured, in the order of its section; put together they are a tensor of
    shape ``(k,)``, float64, on the CPU."""
    micro_batches: list[MicroBatch] = field(default_factory=list)
    measured: dict[str, list[int] | None] = field(default_factory=dict)
    """Sections that hold numbers, and of which parameters: None for all of them."""
    positions: dict[int, tuple[list[int], Tensor]] = field(default_factory=dict)
    """For the host thread: lists of `measured` and the same as tensors, by the list's ``id``."""
    has_grad_scale: bool = False
    """Whether the gradients were still scaled, so that grad_scale holds a number."""
    has_found_inf: bool = False
    """Whether a fused optimizer was told to skip the step or not, so that found_inf holds a number."""
    has_scale: bool = False
    """Whether the loss was scaled, so that scale holds a number."""
    skipped: bool = False
    """Whether a gradient scaler did not let the optimizer step."""
    refuses: bool = False
    """Whether the agent made the optimizer skip this step, or found_inf says whether it did: see `skipping`."""
    loads: int = 0
    """How often the optimizer's state has been loaded: see `overflow`."""
    partial_gradients: bool = False
    """Whether a gradient is only a summand of itself on this rank, so that it has no norm here (DTensor's Partial)."""
    step_counts: Tensor | None = None
    """Step counts that are kept on the CPU already."""
    fresh_state: bool = False
    """Whether the optimizer began its first step here without state and has some now."""
    state_bytes: dict[tuple[str, str], int] | None = None
    """Set on a step at which the optimizer's state changed its size."""
    completes: bool = True
    """Whether every parameter's weights and moments have been read since the last row that completed a rotation."""
    seconds: tuple[float, float] | None = None
    """What our hooks have taken since the last row, and of that what reading gradients has; None where ranks have to
    read alike, so that none may decide to read less."""
    joined: bool = False
    """Whether the host has put the numbers of the rotation together: see `rotation`."""
    trace: Trace | None = None
    """What the layers gave out since the step before, where they are watched."""
    broken_before: list[tuple[Source, list[int], Tensor]] = field(default_factory=list)
    """Moments and weights that were not finite before the forward pass: their positions and sums of squares."""
    ring: Ring | None = None
    """Where `values` is given back to."""
    arrival: Arrival | None = None
    """Set when the row has been sent; none of one that the host reads where it was written."""
    checked: Checked | None = None
    """What is to be compared with other ranks, where there are some."""

    def place(self, sections: Sequence[str], indices: list[int], behind: bool = False) -> Place:
        """Where numbers for some parameters go: shape ``(k,)``, or ``(len(sections), k)`` for several. It is the front
        of sections that follow one another, or `behind` those of other parameters that they hold already. For the
        training thread."""
        before = (self.measured.get(sections[0]) or []) if behind else []
        together = before + indices if before else indices
        measured = None if len(together) == len(self.layout.names) else together
        numbers = self.layout.places(self.values, sections, len(before), len(indices))
        return Place(numbers, lambda: self.measured.update(dict.fromkeys(sections, measured)))

    def give_back(self) -> None:
        """The host has read the row: its place is free again."""
        if self.ring is not None:
            self.ring.give_back(self.values)


class Ring:
    """Preallocated rows. The training thread takes one, the host thread gives it back; neither waits for the other."""

    def __init__(self, layout: Layout, rows: int) -> None:
        device = layout.device
        dtype = wide_dtype(device)
        count = max(8, min(rows, RING_BYTES // max(1, layout.length * dtype.itemsize)))
        self._free = deque(host_place(layout.length, dtype, device) for _ in range(count))
        # On a CPU the row is written where the host reads it. Elsewhere one device row serves all steps: what the next
        # step writes is ordered behind this step's copy on the same stream.
        self._device_row = None if device.type == "cpu" else torch.zeros(layout.length, dtype=dtype, device=device)

    def take(self) -> tuple[Tensor, Tensor] | None:
        """A row to write on the device and its place on the host (the same one on a CPU); None when all are taken."""
        try:
            place = self._free.popleft()
        except IndexError:
            return None
        return (place if self._device_row is None else self._device_row), place

    def give_back(self, place: Tensor) -> None:
        """Return a row that the host has read, or that was never sent."""
        self._free.append(place)


def send(row: Row, written: Tensor, place: Tensor) -> None:
    """Start the one copy of a row to the host, without waiting; a row of the CPU's is there already."""
    row.values = place
    if written is not place:
        used = row.layout.length if row.sampled else row.layout.front
        row.arrival = Arrival(written[:used], place[:used])
