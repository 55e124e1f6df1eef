"""Rules about hyper-parameters: what a group asks for that its optimizer, type or device makes something else of."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

import torch
from torch import nn, optim

from .rule import Rules, Said
from .subject import Group, Subject

RULES: Rules[Subject] = Rules()
rule = RULES.rule

HALF = (torch.bfloat16, torch.float16)
LARGEST_ADAM_RATE = 0.1
LARGEST_LION_RATE = 1e-3
STRONGEST_DECAY = 0.01
MANY_TENSORS = 100


def _adam(group: Group) -> bool:
    kinds = (optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam)
    return isinstance(group.optimizer, kinds) or type(group.optimizer).__name__.startswith(("Adam", "FusedAdam"))


@rule("coupled-weight-decay", "warning")
def coupled_weight_decay(subject: Subject) -> Iterator[Said]:
    """Weight decay added to the gradient of Adam, NAdam or RAdam: it is divided by √v with the rest of it, so that
    weights with large gradients decay least.

    Source: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", section 2.
    """
    for group in subject.groups:
        decay = group.number("weight_decay") or 0.0
        coupled = type(group.optimizer) in (optim.Adam, optim.NAdam, optim.RAdam)
        if coupled and decay > 0 and not group.settings.get("decoupled_weight_decay", False):
            name = type(group.optimizer).__name__
            instead = "torch.optim.AdamW" if name == "Adam" else f"{name}(decoupled_weight_decay=True)"
            yield group.thing, f"weight_decay={decay:g} is part of the gradient", f"use {instead}"


@rule("epsilon-too-small", "warning")
def epsilon_too_small(subject: Subject) -> Iterator[Said]:
    """An ε that is 0 in the type in which the optimizer adds it: where a gradient never came, the update is 0/0.

    Source: IEEE 754 (half precision ends at 2⁻²⁴ ≈ 6e-8, and the usual 1e-8 rounds to 0); torch.optim keeps moments in
    the parameter's type.
    """
    for group in subject.groups:
        epsilon = group.number("eps")
        if epsilon is None or not group.from_torch:
            continue
        for dtype in sorted({dtype for dtype in group.seen.dtypes if dtype.is_floating_point}, key=str):
            if torch.tensor(epsilon, dtype=torch.float64).to(dtype).item() == 0:
                fix = "give 1e-8" if epsilon == 0 and dtype not in HALF else "keep the weights in float32, or give 1e-7"
                yield group.thing, f"eps={epsilon:g} is 0 in {_type(dtype)}", fix


@rule("half-precision-weights", "warning")
def half_precision_weights(subject: Subject) -> Iterator[Said]:
    """Weights in bfloat16 or float16 that a torch optimizer updates in place, with no float32 masters: an update below
    about 1/512 (bfloat16) or 1/4096 (float16) of its weight is rounded away.

    Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.1; Zamirai et al. 2020, "Revisiting BFloat16
    Training".
    """
    for group in subject.groups:
        if not group.from_torch or group.seen.dtypes.isdisjoint(HALF):
            continue
        half = [p for p in group.parameters if p.dtype in HALF and p.requires_grad]
        if half:
            yield (
                group.thing,
                f"{subject.listed(half)} in {_type(half[0].dtype)} without float32 masters",
                "keep the weights in float32 and compute under torch.autocast, or take an optimizer with masters or "
                "stochastic rounding",
            )


@rule("beta1-too-large", "warning")
def beta1_too_large(subject: Subject) -> Iterator[Said]:
    """β₁ of at least √β₂, as when the two are swapped: the condition under which Adam is known to converge is broken.

    Source: Kingma & Ba 2015, "Adam", theorem 4.1 (β₁²/√β₂ < 1); Zhang et al. 2022, "Adam Can Converge Without Any
    Modification on Update Rules", theorem 3.1 (β₁ < √β₂).
    """
    for group in subject.groups:
        if _adam(group) and (betas := group.betas) and betas[0] >= sqrt(betas[1]):
            yield group.thing, f"betas=({betas[0]:g}, {betas[1]:g})", "the first is the momentum's: give (0.9, 0.999)"


@rule("lion-rate", "warning")
def lion_rate(subject: Subject) -> Iterator[Said]:
    """Lion at a rate that suits AdamW: every entry of its update is ±1 times the rate, so that it needs a rate that is
    3 to 10 times smaller.

    Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", section 5.
    """
    for group in subject.groups:
        rate = _rate(group)
        if type(group.optimizer).__name__.startswith(("Lion", "PagedLion")) and rate and rate >= LARGEST_LION_RATE:
            yield group.thing, f"lr={rate:g}", "give a third to a tenth of AdamW's rate, and as much more weight decay"


@rule("adam-rate", "warning")
def adam_rate(subject: Subject) -> Iterator[Said]:
    """A rate of Adam's of 0.1 or more on a network's weights: its update of every entry is about the rate, whatever the
    gradient, and weights themselves are about that large.

    Source: Kingma & Ba 2015, "Adam", section 2.1 (|Δ| ≲ α).
    """
    layers = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
    if not any(issubclass(kind, layers) for kind in subject.anatomy.kinds):
        return
    for group in subject.groups:
        rate = _rate(group)
        if _adam(group) and rate is not None and rate >= LARGEST_ADAM_RATE:
            yield group.thing, f"lr={rate:g}", "give 1e-3 or less; rates of 0.1 are SGD's"


@rule("decay-too-strong", "warning")
def decay_too_strong(subject: Subject) -> Iterator[Said]:
    """Rate times weight decay of 0.01 or more: weights are forgotten within 100 steps.

    Source: Loshchilov & Hutter 2019 (the weight is multiplied by 1 - ηλ each step); Wang & Aitchison 2024, "How to set
    AdamW's weight decay as you scale model and dataset size" (the time scale is 1/(ηλ) steps).
    """
    for group in subject.groups:
        rate, decay = _rate(group), group.number("weight_decay")
        if rate and decay and rate * decay >= STRONGEST_DECAY:
            yield group.thing, f"lr={rate:g} × weight_decay={decay:g} = {rate * decay:g} a step", "give less decay"


@rule("momentum-too-large", "warning")
def momentum_too_large(subject: Subject) -> Iterator[Said]:
    """A momentum of 1 or more: old gradients never fade, and the updates grow without bound.

    Source: Polyak 1964, "Some methods of speeding up the convergence of iteration methods" (0 ≤ μ < 1); torch.optim.SGD
    checks the lower bound only.
    """
    for group in subject.groups:
        momentum = group.number("momentum")
        if momentum is not None and momentum >= 1:
            yield group.thing, f"momentum={momentum:g}", "give less than 1, such as 0.9"


@rule("capturable-on-cpu", "warning")
def capturable_on_cpu(subject: Subject) -> Iterator[Said]:
    """``capturable=True`` with parameters on a CPU: the first step raises.

    Source: torch.optim's documentation of `capturable` (it is for CUDA graphs), and its assertion in `step`.
    """
    for group in subject.groups:
        if group.settings.get("capturable") is not True:
            continue
        on_cpu = [p for p in group.parameters if p.device.type == "cpu"]
        if on_cpu:
            yield group.thing, f"capturable=True, {subject.listed(on_cpu)} on the CPU", "leave it out"


@rule("differentiable", "warning")
def differentiable(subject: Subject) -> Iterator[Said]:
    """``differentiable=True``: the graph through each step is kept, and memory with it.

    Source: torch.optim's documentation of `differentiable`: leave it False unless autograd runs through the step.
    """
    for group in subject.groups:
        if group.settings.get("differentiable") is True and not any(p.grad_fn for p in group.parameters):
            yield group.thing, "differentiable=True, and the parameters are leaves", "leave it out"


@rule("slow-loop", "info")
def slow_loop(subject: Subject) -> Iterator[Said]:
    """``foreach=False`` without ``fused=True`` for many tensors on a GPU: a kernel is started for each tensor and each
    operation.

    Source: torch.optim's documentation, "Algorithms" (fused is fastest, then foreach, then the loop).
    """
    for group in subject.groups:
        if group.settings.get("foreach") is not False or group.settings.get("fused"):
            continue
        on_gpu = [p for p in group.parameters if p.device.type == "cuda"]
        if len(on_gpu) >= MANY_TENSORS:
            yield group.thing, f"foreach=False for {len(on_gpu)} tensors on a GPU", "leave it out, or give fused=True"


@rule("sgd-on-attention", "info")
def sgd_on_attention(subject: Subject) -> Iterator[Said]:
    """SGD on a model with attention, whose gradients have heavy tails and whose layers differ much in scale.

    Source: Zhang et al. 2020, "Why are Adaptive Methods Good for Attention Models?".
    """
    for name, optimizer in subject.optimizers.items():
        if type(optimizer) is optim.SGD and subject.has_attention:
            momentum = {group["momentum"] for group in optimizer.param_groups}
            yield name, f"SGD, momentum {', '.join(f'{m:g}' for m in sorted(momentum))}", "consider AdamW"


def _rate(group: Group) -> float | None:
    """The rate that the group is meant to reach: a scheduler's start may be 0."""
    start = group.number("initial_lr")
    return group.number("lr") if start is None else start


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
