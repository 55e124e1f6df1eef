"""What is read off torch's own functions, with no line in training code: losses, clipping and gradient scaling.

Functions of torch are wrapped while anything listens, and put back when nothing does. A wrapper tells its
listeners and calls the original with exactly its arguments; what a listener raises is its own to count.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad
from torch.optim import Optimizer

from .transfer import Moment


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """One call of ``backward()`` on a scalar."""

    loss: Tensor
    """0-d, detached, unscaled, the root's dtype and device; a copy, so that nothing done to the root later shows."""
    divisor: Tensor | None
    """0-d on the CPU: what the training code divided the loss by, where the graph says so."""
    factor: Tensor | None
    """0-d on the CPU: what it multiplied the loss with instead."""
    scale: Tensor | None = None
    """0-d on its device: the GradScaler's scale of that moment, where it multiplied the loss."""
    began: Moment | None = None
    """When the pass began."""


class Listener(Protocol):
    """Who is told. Calls come on whichever thread made them, and must not raise or wait for a device."""

    def backward_done(self, batches: list[MicroBatch], seconds: float) -> None:
        """A backward pass from scalar roots has returned; looking at these has taken so many seconds."""

    def clipping(self, parameters: list[Tensor]) -> None:
        """Gradients of these parameters are about to be clipped by norm."""

    def unscaled(self, optimizer: Optimizer) -> None:
        """``GradScaler.unscale_(optimizer)`` has returned: gradients are no longer scaled."""

    def reading(self, path: str) -> None:
        """``torch.load`` is about to read the file at `path`."""

    def scaler_stepped(self, optimizer: Optimizer) -> None:
        """``GradScaler.step(optimizer)`` has returned, whether or not it let the optimizer step."""


_listeners: WeakSet[Any] = WeakSet()
_undo: list[Callable[[], None]] = []
_lock = threading.Lock()
_thread = threading.local()


def listen(listener: Listener) -> None:
    """Tell `listener` from now on. Held weakly: one that is gone is not told."""
    with _lock:
        _listeners.add(listener)
        if not _undo:
            _install()


def unlisten(listener: Listener) -> None:
    """Stop telling `listener`; with the last one torch's functions are put back."""
    with _lock:
        _listeners.discard(listener)
        if not _listeners:
            while _undo:
                _undo.pop()()


def _install() -> None:
    _wrap(Tensor, "backward", _tap_backward)
    _wrap(torch.autograd, "backward", _tap_backward)
    for scaler in _scalers(torch.amp.GradScaler):
        for name, tap in (("scale", _tap_scale), ("unscale_", _tap_unscale)):
            if name in vars(scaler):
                _wrap(scaler, name, tap)
    _wrap(torch.amp.GradScaler, "step", _tap_scaler_step)
    _wrap(torch, "load", _tap_load)
    # clip_grad_norm_ looks this up in its module when called, so `from ... import clip_grad_norm_` is seen as well.
    # Before torch 2.6 there was no such function: there the norm before clipping is not available.
    if hasattr(clip_grad, "_clip_grads_with_norm_"):
        _wrap(clip_grad, "_clip_grads_with_norm_", _tap_clip)
        # The same function under its public name, for those who make the norm themselves, as over pipeline stages.
        _wrap(nn.utils, "clip_grads_with_norm_", _tap_clip)


def _scalers(known: type[Any]) -> Iterator[type[Any]]:
    """GradScaler and every class made of it so far: that of FSDP has a `scale` of its own."""
    yield known
    for made in known.__subclasses__():
        yield from _scalers(made)


def _wrap(owner: Any, name: str, tap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(owner, name)
    wrapper = functools.wraps(original)(tap(original))
    setattr(owner, name, wrapper)

    def restore() -> None:
        # Somebody may have wrapped it after us; taking theirs away would be worse than leaving an idle wrapper.
        if getattr(owner, name) is wrapper:
            setattr(owner, name, original)

    _undo.append(restore)


def _tap_backward(original: Callable[..., Any]) -> Callable[..., Any]:
    def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(_thread, "depth", 0) or not _listeners or capturing(tensors):
            return original(tensors, *args, **kwargs)
        # Read before the pass frees the graph, told after it succeeded: a backward that raised trained nothing.
        began = time.perf_counter()
        batches = _micro_batches(tensors)
        seconds = time.perf_counter() - began
        _thread.depth = 1
        try:
            result = original(tensors, *args, **kwargs)
        finally:
            _thread.depth = 0
        if batches:
            for listener in list(_listeners):
                listener.backward_done(batches, seconds)
        return result

    return backward


def capturing(tensors: Any) -> bool:
    """Whether what is done to these tensors is being captured into a CUDA graph, which is to hold nothing of ours."""
    first = next(iter(tensors), None) if isinstance(tensors, (list, tuple)) else tensors
    on_cuda = isinstance(first, Tensor) and first.is_cuda
    return on_cuda and torch.cuda.is_current_stream_capturing()


def _micro_batches(tensors: Any) -> list[MicroBatch]:
    try:
        roots: Iterable[Any] = (tensors,) if isinstance(tensors, Tensor) else tensors
        return [_micro_batch(root) for root in roots if isinstance(root, Tensor) and root.numel() == 1]
    except Exception:  # noqa: BLE001 - an odd root is torch's to complain about, not ours
        return []


def _micro_batch(root: Tensor) -> MicroBatch:
    # Everything here is detached: switching gradients off costs more than all that is done.
    loss = root.detach().clone().reshape(())
    known: Tensor | None = getattr(_thread, "loss", None)
    if known is not None:
        return MicroBatch(known.clone().reshape(()), None, None, None, Moment(loss.device))
    scale: Tensor | None = getattr(_thread, "scale", None)
    divisor = factor = scaled_by = None
    node: Any = root.grad_fn
    # The last operations on the loss are scaling by a GradScaler and division by the number of micro-batches, in either
    # order. What they used is saved in the graph as a tensor: reading its pointer or keeping it waits for nothing.
    for _ in range(3):
        name = type(node).__name__
        if name not in ("DivBackward0", "MulBackward0"):
            break
        other = node._saved_other
        if not isinstance(other, Tensor) or other.numel() != 1:
            break
        if scale is not None and name == "MulBackward0" and other.data_ptr() == scale.data_ptr():
            scaled_by = scale.detach().clone().reshape(())
            # A loss that is finite may be infinite once it is scaled: what it was before tells.
            loss = _thread.unscaled.clone().reshape(()) if _is_scaled(root) else loss / scaled_by
        elif other.device.type == "cpu" and name == "DivBackward0":
            divisor = other.detach().reshape(())
        elif other.device.type == "cpu":
            factor = other.detach().reshape(())
        node = node.next_functions[0][0]
    if scaled_by is None and scale is not None and _is_scaled(root):  # by a number, which leaves no tensor of ours
        loss, scaled_by = _thread.unscaled.clone().reshape(()), scale.detach().clone().reshape(())
    return MicroBatch(loss, divisor, factor, scaled_by, Moment(loss.device))


def _is_scaled(root: Tensor) -> bool:
    """Whether this is what the last GradScaler returned, as it is."""
    scaled = getattr(_thread, "scaled", None)
    return scaled is not None and scaled() is root


def scaled(loss: Tensor, result: Tensor, scale: Tensor) -> None:
    """Somebody else's scaler has made `result` of `loss`, as GradScaler's `scale` does. Waits for no device."""
    _thread.scale = scale
    # Weakly: the scaled loss holds the whole graph.
    _thread.scaled, _thread.unscaled = ref(result), loss.detach()


@contextmanager
def of_loss(loss: Any) -> Iterator[None]:
    """Take `loss` for the loss of the backward passes in here, whatever is made of it before they begin."""
    _thread.loss = loss.detach() if isinstance(loss, Tensor) and loss.numel() == 1 else None
    try:
        yield
    finally:
        _thread.loss = None


def _tap_clip(original: Callable[..., Any]) -> Callable[..., Any]:
    def clip_grads_with_norm_(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        for listener in list(_listeners):
            listener.clipping(listed)
        return original(listed, *args, **kwargs)

    return clip_grads_with_norm_


def _tap_scale(original: Callable[..., Any]) -> Callable[..., Any]:
    def scale(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        _thread.scale = getattr(self, "_scale", None)
        outputs = args[0] if args else kwargs.get("outputs")
        if isinstance(outputs, Tensor) and isinstance(result, Tensor):
            # Weakly: the scaled loss holds the whole graph.
            _thread.scaled, _thread.unscaled = ref(result), outputs.detach()
        return result

    return scale


def _tap_unscale(original: Callable[..., Any]) -> Callable[..., Any]:
    def unscale_(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, optimizer, *args, **kwargs)
        for listener in list(_listeners):
            listener.unscaled(optimizer)
        return result

    return unscale_


def _tap_load(original: Callable[..., Any]) -> Callable[..., Any]:
    def load(f: Any, *args: Any, **kwargs: Any) -> Any:
        path = f if isinstance(f, (str, os.PathLike)) else getattr(f, "name", None)
        if isinstance(path, (str, os.PathLike)):
            for listener in list(_listeners):
                listener.reading(os.fspath(path))
        return original(f, *args, **kwargs)

    return load


def _tap_scaler_step(original: Callable[..., Any]) -> Callable[..., Any]:
    def step(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, optimizer, *args, **kwargs)
        for listener in list(_listeners):
            listener.scaler_stepped(optimizer)
        return result

    return step
