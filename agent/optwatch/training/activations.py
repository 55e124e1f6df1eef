"""Where a pass stops being finite: whether what each layer gives out is, in execution order.

A loss that is NaN makes every gradient NaN, so nothing that is read at the step itself tells which layer made it. A
forward hook on each layer does. On a CPU the compiled kernel looks for the largest magnitude. Elsewhere `torch.aminmax`
passes NaN and Inf on, overflows in no dtype and reads at the speed of memory; its two numbers stay on the device and
travel with the step's row.

What a hook must not do, and how it does not: it launches one reduction and waits for nothing; a graph that is compiled,
traced or captured holds nothing of it; it raises nothing; it is off while a model is only evaluated, since torch takes
another path through an ``nn.TransformerEncoderLayer`` that has hooks; a copy of a model, pickled or not, has none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from optwatch import kernels
from optwatch.faults import Faults
from optwatch.host.passes import BACKWARD, Trace
from optwatch.kernels.plain import PLAIN, is_freed
from optwatch.parallel import placement
from optwatch.record import INPUT

from .layers import probe_points
from .taps import capturing
from .transfer import Arrival, host_place

MAX_PENDING = 1024
"""Outputs whose numbers are kept as they are until they are put together."""
MAX_CHUNKS = 64
"""Most such tensors and lists between two steps: of a process that trains without stepping, the first are kept."""
_READABLE = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)  # type: ignore[attr-defined]
_graph_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)
_functorch: Any = getattr(torch._C, "_functorch", None)
_is_transformed: Callable[[Tensor], bool] = getattr(_functorch, "is_functorch_wrapped_tensor", lambda tensor: False)
"""Whether a tensor belongs to a torch.func transform, which may not be left with it."""


class Activations:
    """Hooks on the layers of the models of one run. For the training thread.

    Args:
        faults: counts what goes wrong in a hook.
        gradients: whether to read the gradients of outputs too, which tell on a rank whether a gradient that is not
            finite is its own: for training on several ranks.
        compiled: whether the compiled kernel may read what is on the CPU, once it is there.
    """

    def __init__(self, faults: Faults, gradients: bool = False, compiled: bool = False) -> None:
        self._faults = faults
        self._gradients = gradients
        self._compiled = compiled
        self._probes: list[_Probe] = []
        self._inputs: list[Any] = []
        self._models: set[int] = set()
        self._on = False
        self._labels: list[str] = []
        self._largest: list[float] = []
        self._pending: list[Tensor] = []
        self._chunks: list[Tensor | list[float]] = []
        self._claimed: Trace | None = None
        self._seconds = 0.0

    def watch(self, model: nn.Module, max_layers: int) -> None:
        """Put hooks on the layers of `model`, at most `max_layers`, as `layers.probe_points` chooses them."""
        if id(model) in self._models:
            return
        self._models.add(id(model))
        for label, module in probe_points(model, max_layers):
            self._probes.append(_Probe(self._output, module, label))
        self._inputs.append(model.register_forward_pre_hook(_Inert(self._begins), with_kwargs=True))
        self._switch(True)

    def remove(self) -> None:
        """Take all hooks off again."""
        self._switch(False)
        for handle in self._inputs:
            handle.remove()

    def claim(self) -> Trace | None:
        """What came in since the last claim, which starts on its way to the host; where nothing did, as before."""
        if self._labels:
            self._fold()
            on_host, arrivals = list(self._chunks), []
            for i, chunk in enumerate(self._chunks):
                if isinstance(chunk, Tensor) and chunk.device.type != "cpu":
                    on_host[i] = place = host_place(chunk.numel(), chunk.dtype, chunk.device).view(chunk.shape)
                    with torch.cuda.device_of(chunk):  # type: ignore[no-untyped-call]  # on whose stream it was made
                        arrivals.append(Arrival(chunk, place))
            self._claimed = Trace(self._labels, on_host, arrivals, self._gradients)
            self._labels, self._chunks = [], []
        return self._claimed

    def spent(self) -> float:
        """Seconds that the hooks have taken of the training thread since this was last asked."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _switch(self, on: bool) -> None:
        if on != self._on:
            self._on = on
            for probe in self._probes:
                probe.switch(on)

    def _begins(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or _tracing():
            return
        began = time.perf_counter()
        try:
            self._switch(model.training or torch.is_grad_enabled())
            if self._on and _graph_task() == -1:
                for tensor in _tensors((args, kwargs), 2):
                    self._read(INPUT, tensor)
        except Exception as error:  # noqa: BLE001 - never hurt the run
            self._faults.record("hook", error)
        self._seconds += time.perf_counter() - began

    def _output(self, module: nn.Module, label: str, output: Any) -> None:
        # During a backward pass a checkpointed layer is computed anew, in the order of the backward pass.
        if _graph_task() != -1 or not (module.training or torch.is_grad_enabled()):
            return
        began = time.perf_counter()
        try:
            tensor = output if isinstance(output, Tensor) else next(_tensors(output, 2), None)
            if tensor is not None and self._read(label, tensor) and self._gradients and tensor.requires_grad:
                tensor.register_hook(lambda gradient: self._gradient(label, gradient))
        except Exception as error:  # noqa: BLE001
            self._faults.record("hook", error)
        self._seconds += time.perf_counter() - began

    def _gradient(self, label: str, gradient: Tensor) -> None:
        began = time.perf_counter()
        try:
            self._read(label + BACKWARD, gradient)
        except Exception as error:  # noqa: BLE001
            self._faults.record("hook", error)
        self._seconds += time.perf_counter() - began

    def _read(self, label: str, tensor: Tensor) -> bool:
        """Launch the reduction of one tensor; whether it is of a kind that can be read."""
        if len(self._chunks) >= MAX_CHUNKS or _is_transformed(tensor):
            return False
        kernel = kernels.cpu_kernel() if self._compiled and tensor.is_cpu else None
        if kernel is not None and tensor.numel() and (largest := kernel.largest(tensor)) is not None:
            if self._pending:
                self._fold()
            self._keep(label, self._largest, largest)
            return True
        if capturing(tensor):
            return False
        with torch.no_grad():
            if type(tensor) not in PLAIN:
                if not hasattr(tensor, "to_local"):
                    return False  # a fake tensor, or another that only stands for one
                tensor = placement.local(tensor)
            readable = tensor.dtype in _READABLE and tensor.layout is torch.strided and not tensor.is_meta
            if not readable or not tensor.numel() or is_freed(tensor):
                return False
            # Of another device or dtype: in a tensor of its own.
            other = self._pending and (self._pending[0].device, self._pending[0].dtype) != (tensor.device, tensor.dtype)
            if self._largest or other:
                self._fold()
            self._keep(label, self._pending, *torch.aminmax(tensor.detach()))
        return True

    def _keep(self, label: str, numbers: list[Any], *values: Any) -> None:
        numbers += values
        self._labels.append(label)
        if len(numbers) >= MAX_PENDING * len(values):
            self._fold()

    def _fold(self) -> None:
        """Put what is pending together: magnitudes as they are, or pairs of one device and dtype, never both."""
        if self._largest:
            self._chunks.append(self._largest)
        if self._pending:
            with torch.no_grad():
                self._chunks.append(torch.stack(self._pending).view(-1, 2))
        self._largest, self._pending = [], []


class _Inert:
    """A hook that does nothing in a copy: whoever copies or saves a model with its hooks gets none of ours."""

    def __init__(self, work: Callable[..., None]) -> None:
        self._work = work

    def __call__(self, *args: Any) -> None:
        return self._work(*args)

    def __reduce__(self) -> Any:
        return getattr, (nullcontext(), "__exit__")  # of the standard library: takes anything and returns None


class _Probe(_Inert):
    """The hook on one module, which can be switched off."""

    def __init__(self, work: Callable[[nn.Module, str, Any], None], module: nn.Module, label: str) -> None:
        super().__init__(work)
        self._module = module
        self._label = label
        self._handle: Any = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and not _tracing():
            self._work(module, self._label, output)

    def switch(self, on: bool) -> None:
        if on:
            self._handle = self._module.register_forward_hook(self)
        elif self._handle is not None:
            self._handle.remove()


def _tensors(value: Any, depth: int) -> Iterator[Any]:
    """The floating tensors of an argument or output, which may be in lists and mappings."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif depth >= 0 and isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item, depth - 1)
    elif depth >= 0 and isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item, depth - 1)
