"""Where tensors lie, and of which of them the memory may be read: what a kernel has to know before it reads.

Asking a tensor for its address, size, dtype and layout takes Python microseconds, and its gradient becomes a Python
object first: of 2000 tensors that is more than reading them. `locate.cpp` asks them all in one call. It is compiled in
the background against the torch that is there, where an optimizer has as many parameters as make that worth it
(`prepare`); until then, and where it cannot be, Python asks.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from ctypes import string_at
from dataclasses import dataclass
from functools import partial
from itertools import compress
from operator import attrgetter
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from .background import Background
from .build import library, locate_recipe
from .plain import PLAIN, any_freed

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""Codes of the dtypes that kernels know, as in reduce.c and locate.cpp."""
MANY = 50
"""Parameters from which compiling, which takes a core ten seconds once for a machine and torch, is worth it: of 75,
Python asks in half a millisecond, at every step."""
CPU = torch.device("cpu")
States = Mapping[Any, Mapping[str, Any]]
"""An optimizer's state: an entry for each parameter."""
_dtype, _layout, _device, _on_cpu = map(attrgetter, ("dtype", "layout", "device", "is_cpu"))


@dataclass(frozen=True, slots=True, eq=False)
class Addresses:
    """Where some tensors lie whose memory may be read, until anything else is done to them."""

    count: int
    where: int
    """The address of ``uint64`` each: the address of its first element."""
    sizes: int
    """The address of ``int64`` each: elements."""
    dtypes: int
    """The address of ``uint8`` each: the code of its dtype, see `DTYPES`."""
    in_order: bool
    """Whether all are contiguous, so that two tensors of one shape have their elements in one order: see `pairs`."""
    keeper: object
    """What all these addresses are in."""

    def key(self) -> tuple[bytes, bytes, bytes]:
        """Address, size and code of each, to compare with those of another time."""
        long = 8 * self.count
        return string_at(self.where, long), string_at(self.sizes, long), string_at(self.dtypes, self.count)

    def numbers(self) -> list[int]:
        """Elements of each."""
        return array("q", string_at(self.sizes, 8 * self.count)).tolist()

    def lists(self) -> tuple[list[int], list[int], list[int]]:
        """Address, size and code of each."""
        where, sizes, dtypes = self.key()
        return array("Q", where).tolist(), array("q", sizes).tolist(), list(dtypes)


class Located(Sequence[Tensor]):
    """Tensors whose addresses are known: gradients or moments of parameters, each of which becomes a Python object when
    asked for, or tensors that stay where they are (see `located`).

    Args:
        parameters: whose they are.
        addresses: of the tensors.
        of: the tensor of a parameter, None where it is gone.
        what: they are, for the error that says so.
    """

    def __init__(
        self, parameters: Sequence[Tensor], addresses: Addresses, of: Callable[[Tensor], Tensor | None], what: str
    ) -> None:
        self.addresses = addresses
        self._parameters = parameters
        self._of = of
        self._what = what

    def __len__(self) -> int:
        return len(self._parameters)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return [self._tensor(p) for p in self._parameters[index]]
        return self._tensor(self._parameters[index])

    def __iter__(self) -> Iterator[Tensor]:
        return map(self._tensor, self._parameters)

    def _tensor(self, parameter: Tensor) -> Tensor:
        if (found := self._of(parameter)) is None:
            shape = tuple(parameter.shape)
            raise RuntimeError(f"the {self._what} of a parameter of shape {shape} is gone while it is read")
        return found


def addresses(tensors: Sequence[Tensor], device: torch.device = CPU) -> Addresses | None:
    """Where these lie. None where one is not a plain tensor, dense (see `dense`), on the device (any, of CPUs), of a
    dtype that kernels know, whose memory was not given back: reading it could end the process. Waits for no device."""
    if isinstance(tensors, Located):
        return tensors.addresses
    if (code := compiled.made) is None:
        return _plainly(tensors, device)
    found = code.locate(tensors if type(tensors) is list else list(tensors), False, device)
    return None if found is None else _addresses(found)


def located(tensors: list[Tensor]) -> Sequence[Tensor]:
    """These, with their addresses if they can be told, for as long as nothing happens to their memory."""
    found = addresses(tensors, tensors[0].device) if tensors else None
    return tensors if found is None else Located(tensors, found, _itself, "slice")


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def place(x: Tensor) -> tuple[int, int, int] | None:
    """The address of one tensor on a CPU, its elements and the code of its dtype; None as for `addresses`."""
    if (code := compiled.made) is not None:
        return code.place(x)
    plain = type(x) in PLAIN and x.is_cpu and x.layout is torch.strided
    if not plain or x.dtype not in DTYPES or not dense(x):
        return None
    address = x.data_ptr()
    return None if any_freed((x,), (address,)) else (address, x.numel(), DTYPES[x.dtype])


def dense(x: Tensor) -> bool:
    """Whether its elements fill a stretch of memory, each once, in any order of its dimensions."""
    if x.is_contiguous():
        return True
    filled = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != filled:
            return False
        filled *= size
    return True


def pairs(xs: Sequence[Tensor], positions: Sequence[int], ys: Sequence[Tensor], *found: Addresses) -> bool:
    """Whether each y has its elements in the order of the x at its position, and as many. Both have been `found`."""
    if len(positions) != len(ys):
        return False
    in_order = all(each.in_order for each in found)
    return in_order or all(xs[i].stride() == y.stride() for i, y in zip(positions, ys, strict=True))


def gradients(parameters: list[Tensor], device: torch.device) -> tuple[Sequence[int], Sequence[Tensor]]:
    """The positions of the parameters that have a gradient, ascending, and these gradients. Waits for no device."""
    found = None if (code := compiled.made) is None else code.locate(parameters, True, device)
    if found is None:
        each = [p.grad for p in parameters]
        there = [gradient is not None for gradient in each]
        return list(compress(range(len(each)), there)), [gradient for gradient in each if gradient is not None]
    return _located(found, parameters, _gradient, "gradient")


def moments(
    states: States, parameters: list[Tensor], names: tuple[str, ...], device: torch.device
) -> tuple[Sequence[int], Located] | None:
    """The positions of the parameters for which an optimizer's state has a moment, ascending, and these: what their
    entry has under the first of these names that is there. None where one is not plain, dense, on the device (any, of
    CPUs), of its parameter's shape and a dtype that kernels know, or where nothing compiled is there."""
    found = None if (code := _for(states)) is None else code.moments(states, parameters, names, device)
    return None if found is None else _located(found, parameters, partial(_moment, states, names), "moment")


def shared_count(states: States, parameters: list[Tensor], name: str) -> float | None:
    """The step count under this name, where it is on the CPU and the same for all of these parameters. None where they
    share none, or where nothing compiled is there."""
    return None if (code := _for(states)) is None else code.shared_count(states, parameters, (name,))


def _for(states: States) -> Compiled | None:
    """What is compiled, where it can look into such a mapping as Python would."""
    return compiled.made if type(states) in (dict, defaultdict) else None


def _gradient(parameter: Tensor) -> Tensor | None:
    return parameter.grad


def _moment(states: States, names: tuple[str, ...], parameter: Tensor) -> Tensor | None:
    entry = states.get(parameter, {})
    return next((entry[name] for name in names if name in entry), None)


def _plainly(tensors: Sequence[Tensor], device: torch.device) -> Addresses | None:
    """As `addresses`, in Python."""
    dtypes = list(map(_dtype, tensors))
    plain = (
        PLAIN.issuperset(map(type, tensors))
        and (all(map(_on_cpu, tensors)) if device.type == "cpu" else {device}.issuperset(map(_device, tensors)))
        and {torch.strided}.issuperset(map(_layout, tensors))
        and DTYPES.keys() >= set(dtypes)
    )
    in_order = plain and all(map(Tensor.is_contiguous, tensors))
    if not plain or not (in_order or all(map(dense, tensors))):
        return None
    where = array("Q", map(Tensor.data_ptr, tensors))
    if any_freed(tensors, where):
        return None
    sizes, codes = array("q", map(Tensor.numel, tensors)), array("B", map(DTYPES.__getitem__, dtypes))
    at = where.buffer_info()[0], sizes.buffer_info()[0], codes.buffer_info()[0]
    return Addresses(len(dtypes), *at, in_order, keeper=(where, sizes, codes))


Found = tuple[int, int, int, int, int, bool, object]
"""How many; where their addresses, sizes, dtypes and positions are; whether all are contiguous; what keeps these."""


def _addresses(found: Found) -> Addresses:
    count, where, sizes, dtypes, _, in_order, keeper = found
    return Addresses(count, where, sizes, dtypes, in_order, keeper)


def _located(
    found: Found, parameters: list[Tensor], of: Callable[[Tensor], Tensor | None], what: str
) -> tuple[Sequence[int], Located]:
    """What was found, and the positions of the parameters that have it."""
    if found[0] == len(parameters):
        return range(len(parameters)), Located(parameters, _addresses(found), of, what)
    positions = array("q", string_at(found[4], 8 * found[0])).tolist()
    return positions, Located([parameters[i] for i in positions], _addresses(found), of, what)


class Compiled(NamedTuple):
    """The functions of `locate.cpp`."""

    locate: Callable[[list[Tensor], bool, torch.device], Found | None]
    place: Callable[[Tensor], tuple[int, int, int] | None]
    moments: Callable[[States, list[Tensor], tuple[str, ...], torch.device], Found | None]
    shared_count: Callable[[States, list[Tensor], tuple[str, ...]], float | None]


def _load() -> Compiled:
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        raise RuntimeError("it is for a Python with a GIL")
    loaded, thing = ctypes.PyDLL(str(library(locate_recipe()))), ctypes.py_object  # keeps the GIL
    found = Compiled(*(getattr(loaded, f"optwatch_{name}") for name in Compiled._fields))
    takes: tuple[list[Any], ...] = [thing, ctypes.c_int, thing], [thing], [thing] * 4, [thing] * 3
    for function, arguments in zip(found, takes, strict=True):
        function.argtypes, function.restype = arguments, thing  # type: ignore[attr-defined]
    return found


compiled = Background("locate", _load, "tensors are found by Python, which does the same")


def prepare() -> threading.Thread:
    """Begin to compile or load `locate.cpp` on a background thread, once for a process; that thread."""
    return compiled.prepare()
