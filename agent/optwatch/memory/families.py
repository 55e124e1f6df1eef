"""What optimizers keep for a parameter, as arithmetic: the alternatives of a forecast, and `optwatch plan`.

Formulas follow the classes named; tests hold each against the state that the class really allocates. Only the standard
library is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import ceil, prod

Shape = tuple[int, ...]

ITEM_BYTES: Mapping[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of one number by the name of its type."""

BLOCK = 256
"""Entries that share one scale in 8-bit state (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization",
as bitsandbytes has it)."""
SMALLEST_IN_8_BIT = 4096
"""bitsandbytes keeps state of tensors with fewer entries in float32."""
LARGEST_SOAP_SIDE = 10_000
"""SOAP keeps no preconditioner for a side longer than this."""


@dataclass(frozen=True, slots=True)
class Family:
    """Optimizers whose state has one size."""

    title: str
    state: Callable[[Shape, int], float]
    """Bytes of state of one tensor of this shape, whose entries as the optimizer sees them have that many bytes."""
    note: str = ""


def _copies(count: int) -> Callable[[Shape, int], float]:
    return lambda shape, item: count * prod(shape) * item


def _eight_bit(count: int) -> Callable[[Shape, int], float]:
    def state(shape: Shape, item: int) -> float:
        entries = prod(shape)
        return count * (4 * entries if entries < SMALLEST_IN_8_BIT else entries + 4 * ceil(entries / BLOCK))

    return state


def _adafactor(shape: Shape, item: int) -> float:
    """Shazeer & Stern 2018, section 3: means over rows and over columns in place of the matrix."""
    if len(shape) < 2:
        return prod(shape) * item
    return item * prod(shape[:-2]) * (shape[-2] + shape[-1])


def _muon(shape: Shape, item: int) -> float:
    return _copies(1 if len(shape) >= 2 else 2)(shape, item)


def _soap(shape: Shape, item: int) -> float:
    """Vyas et al. 2024: two moments, and for each side of a matrix its covariance and that one's eigenvectors."""
    sides = [side for side in shape if side <= LARGEST_SOAP_SIDE] if len(shape) >= 2 else []
    return item * (2 * prod(shape) + 2 * sum(side * side for side in sides))


FAMILIES: Mapping[str, Family] = {
    "adamw": Family("AdamW", _copies(2)),
    "adam": Family("Adam", _copies(2)),
    "adamw-amsgrad": Family("AdamW with AMSGrad", _copies(3)),
    "adamw-8bit": Family("AdamW, 8-bit state", _eight_bit(2), "bitsandbytes; keep embeddings in 32 bit"),
    "adamw-8bit-paged": Family(
        "AdamW, 8-bit state, paged", _eight_bit(2), "bitsandbytes; moves to host memory when the device is full"
    ),
    "adafactor": Family("Adafactor", _adafactor, "no first moment"),
    "lion": Family("Lion", _copies(1), "at a third to a tenth of AdamW's rate"),
    "lion-8bit": Family("Lion, 8-bit state", _eight_bit(1), "bitsandbytes"),
    "muon": Family("Muon", _muon, "matrices; the rest as AdamW"),
    "soap": Family("SOAP", _soap, "sides up to 10 000"),
    "schedule-free-adamw": Family("Schedule-Free AdamW", _copies(2)),
    "schedule-free-sgd": Family("Schedule-Free SGD", _copies(1)),
    "nadam": Family("NAdam", _copies(2)),
    "radam": Family("RAdam", _copies(2)),
    "adamax": Family("Adamax", _copies(2)),
    "adadelta": Family("Adadelta", _copies(2)),
    "adagrad": Family("Adagrad", _copies(1)),
    "rmsprop": Family("RMSprop", _copies(1)),
    "sgd-momentum": Family("SGD with momentum", _copies(1)),
    "sgd": Family("SGD", _copies(0)),
}
"""By the name that `optwatch plan` takes."""

ALTERNATIVES = ("adamw-8bit", "adamw-8bit-paged", "lion", "lion-8bit", "adafactor", "sgd-momentum")
"""What is offered in place of an optimizer that does not fit."""


def state_bytes(family: str, shapes: Iterable[tuple[Shape, int]], item: int) -> float:
    """Bytes of state over ``(shape, count)`` pairs, where entries have `item` bytes. Step counters are left out."""
    state = FAMILIES[family].state
    return sum(count * state(shape, item) for shape, count in shapes)


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that training holds all the time: everything but activations and buffers."""

    weights: float
    gradients: float
    masters: float
    state: float

    @property
    def total(self) -> float:
        """Without any sharding."""
        return self.weights + self.gradients + self.masters + self.state

    def per_rank(self, world: int) -> dict[str, float]:
        """By way of sharding over `world` ranks (Rajbhandari et al. 2020, "ZeRO", section 5): what each rank holds.

        ``ddp`` shards nothing, ``zero1`` state and masters, ``zero2`` gradients too, ``fsdp`` (ZeRO-3) all; the layer
        at work is gathered on top of the last.
        """
        whole, kept = self.total, self.weights
        return {
            "ddp": whole,
            "zero1": kept + self.gradients + (self.masters + self.state) / world,
            "zero2": kept + (whole - kept) / world,
            "fsdp": whole / world,
        }
