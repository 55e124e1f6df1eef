"""DeepSpeed's optimizers, which step another one on this rank's part of copies of the model's parameters.

`seen` makes a `View` of what ``deepspeed.initialize`` returns: an optimizer of the class that DeepSpeed steps, whose
parameters are *pieces*. A piece is what this rank holds of one parameter of the model, without the padding around it,
so that its numbers add up over ranks as those of any shard do. Nothing is imported of DeepSpeed, and nothing copied.

Read off DeepSpeed 0.19.8. Whatever is arranged otherwise is refused: its norms and moments are unavailable, while
losses, steps and rates are not.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from optwatch.training import closures, taps
from optwatch.training.living import living

from .placement import Part

BASE = "deepspeed.runtime.base_optimizer"
"""Where DeepSpeed has the class that its optimizers derive from."""


class Piece(Tensor):
    """What this rank holds of one parameter of the model, in the copy that the optimizer steps.

    Only a stand-in for it in lists of parameters, of its shape, dtype and device: its one element is NaN, so that
    whoever does not ask for `to_local` has no number. `grad` is the gradient that the step uses, while there is one.
    """

    origin: Tensor
    """The model's parameter."""
    master: Tensor
    """The copy that is stepped: of one parameter, or of parts of several and padding, and then of shape ``(n,)``."""
    start: int
    stop: int
    whole_size: int
    """Elements of the model's parameter."""
    part: Part
    refusal: str | None

    def to_local(self) -> Tensor:
        """The elements as they are now: a view, on the master's device."""
        return self.cut(self.master.detach())

    def cut(self, tensor: Tensor) -> Tensor:
        """The part of a tensor that is arranged as the master is: a view."""
        return tensor if tensor.numel() == self.stop - self.start else tensor[self.start : self.stop]

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        """The part of the master's gradient, which is there within a step only."""
        gradient = self.master.grad
        return None if gradient is None else self.cut(gradient)


def _piece(origin: Tensor, master: Tensor, place: tuple[int, int] | None, size: int, part: Part) -> Piece:
    """``place`` is where the piece is in the master: its start and its stop; None where it is all of it."""
    start, stop = place or (0, master.numel())
    if stop > master.numel():
        raise NotImplementedError("a master copy is not in memory (swapped out to NVMe?)")
    shape = master.shape if place is None else (stop - start,)
    filler = torch.full((1,) * len(shape), float("nan"), dtype=master.dtype, device=master.device).expand(shape)
    piece = torch.Tensor._make_subclass(Piece, filler, True)
    piece.origin, piece.master, piece.start, piece.stop = origin, master, start, stop
    piece.whole_size, piece.part, piece.refusal = size, part, None
    return piece


Groups = list[list[Piece]]


def _part(process_group: Any) -> Part:
    """Of what the ranks of a process group hold together."""
    import torch.distributed as dist

    ranks = tuple(dist.get_process_group_ranks(process_group))
    return Part(ranks=ranks) if len(ranks) > 1 else Part()


def _flat(models: str, masters: str, offsets: str = "") -> Callable[[Any], Groups]:
    """The parameters of each group one behind the other, cut into equal parts, one master a rank; ZeRO-1, ZeRO-2.

    Named are the attributes with each group's parameters in that order, with its master, and, where there may be gaps
    between parameters, with their offsets. (``_hp_mapping`` of a parameter is wrong under ``round_robin_gradients``.)
    """

    def pieces(optimizer: Any) -> Groups:
        import torch.distributed as dist

        groups: Groups = []
        columns = (getattr(optimizer, models), getattr(optimizer, masters), optimizer.real_dp_process_group)
        for index, (parameters, master, process_group) in enumerate(zip(*columns, strict=True)):
            sizes = [p.numel() for p in parameters]
            known = getattr(optimizer, offsets, None) if offsets else None
            starts = [0, *accumulate(sizes[:-1])] if known is None else known[index]
            part, length = _part(process_group), master.numel()
            before = dist.get_rank(process_group) * length
            groups.append([])
            for p, size, start in zip(parameters, sizes, starts, strict=True):
                first, last = (min(max(at - before, 0), length) for at in (start, start + size))
                groups[-1].append(_piece(p, master, (first, last), size, part))
        return groups

    return pieces


def _each_cut(optimizer: Any) -> Groups:
    """Each parameter cut over the ranks by itself and filled up, several in one flat master: ZeRO-3."""
    import torch.distributed as dist

    groups: Groups = [[] for _ in optimizer.optimizer.param_groups]
    masters = optimizer.fp32_partitioned_groups_flat
    for index, (parameters, master) in enumerate(zip(optimizer.fp16_groups, masters, strict=True)):
        start = 0
        for p in parameters:
            cut = p.partition_numel()
            rank = dist.get_rank(p.ds_process_group)
            own = max(0, min(cut, p.ds_numel - rank * cut))
            place, part = (start, start + own), _part(p.ds_process_group)
            groups[optimizer.sub_group_to_group_id[index]].append(_piece(p, master, place, p.ds_numel, part))
            start += cut
    return groups


def _copies(optimizer: Any) -> Groups:
    """A copy of each parameter, all of them on every rank: no ZeRO."""
    if optimizer.loss_scale_config.use_grad_scaling:
        raise NotImplementedError("float16 without ZeRO has not been compared with anything")
    return [
        [_piece(p, master, None, p.numel(), Part()) for p, master in zip(parameters, masters, strict=True)]
        for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    ]


KINDS: dict[str, Callable[[Any], Groups]] = {
    "DeepSpeedZeroOptimizer": _flat(
        "round_robin_bit16_groups", "single_partition_of_fp32_groups", "round_robin_bit16_offsets"
    ),
    "BF16_Optimizer": _flat("bf16_groups", "fp32_groups_flat_partition"),
    "DeepSpeedZeroOptimizer_Stage3": _each_cut,
    "FP16_UnfusedOptimizer": _copies,
}
"""How each of DeepSpeed's classes arranges what it steps. Those that derive from them arrange it otherwise."""


REFUSED = {
    "backup_optimizer": "a part of the parameters is stepped by another optimizer (offload ratio)",
    "has_moe_layers": "of a mixture of experts each rank may have experts of its own, under the same names",
    "swap_optimizer": "masters and state are swapped out of memory between steps (offload to NVMe)",
    "torch_autocast_gradscaler": "gradients are still scaled by torch.autocast's scaler when they are stepped",
    "zenflow": "ZenFlow steps parts of the parameters at times of their own",
}
"""Attributes of DeepSpeed's optimizers that, when on, make numbers wrong, and why."""


def _pieces(optimizer: Any) -> Groups:
    """By parameter group. Where they cannot be told, one for each group that says why it has no numbers."""
    name = type(optimizer).__name__
    base = optimizer.optimizer
    try:
        if name not in KINDS:
            raise NotImplementedError("how it arranges parameters is not known")
        for attribute, reason in REFUSED.items():
            if getattr(optimizer, attribute, None):
                raise NotImplementedError(reason)
        if any(group.get("use_muon") for group in base.param_groups):
            raise NotImplementedError("what its Muon steps with is no gradient")
        groups = KINDS[name](optimizer)
        if any(getattr(piece.origin, "tensor_model_parallel", False) for group in groups for piece in group):
            raise NotImplementedError("parameters are cut by hand (tensor_model_parallel)")
        return groups
    except (NotImplementedError, AttributeError, ValueError) as error:
        return _refused(optimizer, error)


def _refused(optimizer: Any, reason: object) -> Groups:
    """One piece for each group, which has nothing and says why."""
    groups: Groups = [[] for _ in optimizer.optimizer.param_groups]
    for group in groups:
        nothing = torch.zeros(0, device=getattr(optimizer, "device", "cpu"), requires_grad=True)
        group.append(_piece(nothing, nothing, None, 0, Part()))
        group[0].refusal = (
            f"parameters of DeepSpeed's {type(optimizer).__name__}: {reason}; norms and moments are unavailable, "
            "losses, steps and learning rates are not. ZeRO-1, 2 and 3 of DeepSpeed 0.19 with an optimizer of "
            "torch.optim have them"
        )
    return groups


class State(Mapping[Tensor, dict[str, Any]]):
    """By piece, the state that the optimizer keeps for it: views of what it keeps for the master. What is not arranged
    as the master is (factors, blocks of 8-bit codes) cannot be told apart by piece, and is left out."""

    def __init__(self, base: Optimizer, groups: Groups) -> None:
        self.base = base
        self._pieces = [piece for group in groups for piece in group]

    @property
    def kept(self) -> Mapping[Any, Any]:
        """The state as the optimizer itself has it, with what its padding has."""
        return self.base.state

    def __getitem__(self, piece: Tensor) -> dict[str, Any]:
        if not isinstance(piece, Piece) or piece.master not in self.base.state:
            raise KeyError(piece)
        entry, master = self.base.state[piece.master], piece.master
        if piece.stop - piece.start == master.numel():
            return dict(entry)
        found: dict[str, Any] = {}
        for key, value in entry.items():
            if isinstance(value, Tensor) and value.shape == master.shape and not value.is_sparse:
                found[key] = piece.cut(value)
            elif isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
                found[key] = value
        return found

    def __iter__(self) -> Iterator[Tensor]:
        return (piece for piece in self._pieces if piece.master in self.base.state)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class View(Optimizer):
    """What is watched of one of DeepSpeed's optimizers. `seen` makes it of the class that DeepSpeed steps as well, so
    that it is read as that one.

    Its hooks are called around the ``step`` of DeepSpeed's optimizer, which is patched while there are any; within it
    the base optimizer steps, once or once for each group.
    """

    # Not in its __dict__, which a forecast of memory copies.
    __slots__ = ("_undo", "base_optimizer", "groups", "owner")
    owner: Any
    base_optimizer: Optimizer
    """The one that DeepSpeed steps."""
    groups: Groups

    def __init__(self, optimizer: Any) -> None:  # and not that of Optimizer, which would take parameters of its own
        self.owner = optimizer
        self.base_optimizer = optimizer.optimizer
        self.defaults = self.base_optimizer.defaults
        self.groups = _pieces(optimizer)
        self.state = State(self.base_optimizer, self.groups)  # type: ignore[assignment]
        self._optimizer_step_pre_hooks: OrderedDict[int, Any] = OrderedDict()
        self._optimizer_step_post_hooks: OrderedDict[int, Any] = OrderedDict()
        self._undo: list[Callable[[], None]] = []
        self.refresh()

    def refresh(self) -> None:
        """Take over the numbers of the groups, which schedulers change."""
        groups = self.owner.optimizer.param_groups
        if len(groups) != len(self.groups):
            self.groups = _refused(self.owner, "parameter groups have been added or removed since attach()")
        self.param_groups = [{**group, "params": own} for group, own in zip(groups, self.groups, strict=True)]

    @property
    def skipped(self) -> bool:
        """Whether the last step was none, since a gradient had overflowed."""
        return bool(getattr(self.owner, "overflow", False))

    def in_whole(self) -> Optimizer | None:
        """An optimizer over the masters, as they are with their padding, which is not to be stepped; None where they
        are not known."""
        if any(piece.refusal for group in self.groups for piece in group):
            return None
        whole = object.__new__(type(self.base_optimizer))
        masters = [list({id(piece.master): piece.master for piece in group}.values()) for group in self.groups]
        groups = [{**group, "params": own} for group, own in zip(self.param_groups, masters, strict=True)]
        vars(whole).update(vars(self.base_optimizer) | {"param_groups": groups})
        return whole

    def stepped_now(self) -> set[int]:
        """``id`` of the pieces that the base optimizer is stepping."""
        masters = {id(p) for group in self.base_optimizer.param_groups for p in group["params"]}
        return {id(piece) for group in self.groups for piece in group if id(piece.master) in masters}

    def register_step_pre_hook(self, hook: Any) -> Any:
        """Call ``hook(view, args, kwargs)`` before each step."""
        return self._register(super().register_step_pre_hook(hook))

    def register_step_post_hook(self, hook: Any) -> Any:
        """Call ``hook(view, args, kwargs)`` after each step that succeeded."""
        return self._register(super().register_step_post_hook(hook))

    def load_state_dict(self, state_dict: Any = None) -> None:
        """For those who listen: DeepSpeed's optimizer has loaded a state."""

    def _register(self, handle: Any) -> Any:
        if not self._undo:
            self._patch()

        def remove() -> None:
            handle.remove()
            if not self._optimizer_step_pre_hooks and not self._optimizer_step_post_hooks:
                while self._undo:
                    self._undo.pop()()

        return SimpleNamespace(remove=remove)

    def _patch(self) -> None:
        owner = self.owner
        self._undo.append(closures.around_method(owner, "step", self._step))
        if hasattr(owner, "load_state_dict"):
            self._undo.append(closures.after_method(owner, "load_state_dict", lambda: self.load_state_dict()))
        for name, around in (("scale_if_loss", self._scale), ("backward", self._backward)):
            if hasattr(owner, name):
                self._undo.append(closures.around_method(owner, name, around))

    def _step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.refresh()
        for hook in list(self._optimizer_step_pre_hooks.values()):
            hook(self, (self, *args), kwargs)
        result = original(*args, **kwargs)
        self.refresh()
        for hook in list(self._optimizer_step_post_hooks.values()):
            hook(self, (self, *args), kwargs)
        return result

    def _scale(self, original: Callable[..., Any], loss: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(loss, *args, **kwargs)
        scale = getattr(self.owner, "loss_scale", 1.0)
        if isinstance(scale, (int, float)):
            scale = None if scale == 1 else torch.tensor(float(scale))
        if isinstance(loss, Tensor) and isinstance(result, Tensor) and isinstance(scale, Tensor):
            taps.scaled(loss, result, scale)
        return result

    def _backward(self, original: Callable[..., Any], loss: Any, *args: Any, **kwargs: Any) -> Any:
        with taps.of_loss(loss):
            return original(loss, *args, **kwargs)


_views: WeakValueDictionary[int, View] = WeakValueDictionary()


def seen(optimizer: Any) -> Any:
    """A `View` of DeepSpeed's optimizer, or of the one that DeepSpeed steps this optimizer in; else the optimizer.

    Walks the garbage collector's objects once where DeepSpeed is imported and `optimizer` is none of its own.
    """
    owner = optimizer if _is_deepspeeds(optimizer) else owner_of(optimizer)
    if owner is None:
        return optimizer
    view = _views.get(id(owner))  # which keeps its owner alive: no other one can have its id
    if view is None:
        kind = type(owner.optimizer)
        view = type(kind.__name__, (View, kind), {"__module__": __name__, "step": kind.step})(owner)
        _views[id(owner)] = view
    return view


def in_whole(optimizer: Optimizer) -> Optimizer | None:
    """What a `View` is of, to forecast what it keeps; any other optimizer itself."""
    return optimizer.in_whole() if isinstance(optimizer, View) else optimizer


def owner_of(optimizer: Optimizer) -> Any:
    """DeepSpeed's optimizer that steps this one, if any does."""
    base = getattr(sys.modules.get(BASE), "DeepSpeedOptimizer", None)
    if base is None or isinstance(optimizer, View):
        return None
    return next((owner for owner in living(base) if getattr(owner, "optimizer", None) is optimizer), None)


def _is_deepspeeds(optimizer: Any) -> bool:
    base = getattr(sys.modules.get(BASE), "DeepSpeedOptimizer", None)
    return base is not None and isinstance(optimizer, base) and isinstance(optimizer.optimizer, Optimizer)


class TakenOverError(NotImplementedError):
    """DeepSpeed has taken over an optimizer after it was attached to."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name} was given to deepspeed.initialize() after attach(): DeepSpeed steps it in parts now, whose steps "
            "and norms are nobody's, so that nothing more is exported of it. Call attach(optimizer) with the optimizer "
            "that deepspeed.initialize() returns"
        )
