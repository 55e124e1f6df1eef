"""The cases of each package, by class name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from . import cases as c
from .cases import Case, Trace, adam, corrected, momentum, own, split, uncorrected
from .definitions import (
    about_the_mean,
    centralised,
    debiased,
    ema,
    from_first,
    heavy_ball,
    largest,
    last_update,
    squares,
    total,
)

ADAMW = torch.optim.AdamW


def around(kind: type, module: nn.Module) -> Any:
    """A wrapper around AdamW."""
    return kind(ADAMW(module.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0))


def perturbed(kind: type, module: nn.Module) -> Any:
    """A SAM around AdamW."""
    return kind(module.parameters(), base_optimizer=ADAMW, lr=1e-2, eps=1e-3, weight_decay=0.0)


def weighted(kind: type, module: nn.Module) -> Any:
    """A WSAM around AdamW."""
    return kind(module, module.parameters(), base_optimizer=ADAMW, lr=1e-2, eps=1e-3, weight_decay=0.0)


def scheduled(trace: Trace, t: int) -> float:
    """The warmed-up rate: lr·t/warmup."""
    return trace.hyper("lr") * min(1.0, t / trace.hyper("warmup_steps"))


def rectified(trace: Trace, t: int) -> float:
    """RAdam's rectified rate, 0 while its variance is not known (Liu et al. 2020)."""
    b2 = trace.hyper("betas.1")
    most = 2 / (1 - b2) - 1
    length = most - 2 * t * b2**t / (1 - b2**t)
    if length <= 4:
        return 0.0
    inner = (length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)
    return trace.hyper("lr") * inner**0.5


def corrected_rate(trace: Trace, t: int) -> float:
    """The warmed-up rate times √(1 − β₂ᵗ)."""
    return scheduled(trace, t) * (1 - trace.hyper("betas.1") ** t) ** 0.5


def capped(trace: Trace, t: int) -> float:
    """min(lr, 1/√t)."""
    return min(trace.hyper("lr"), t**-0.5)


def searched_rate(trace: Trace, t: int) -> float:
    """d·lr, d as the step began."""
    return float(trace.groups[t - 1]["d"]) * float(trace.groups[t - 1]["lr"])


BARE = Case()
SECOND_ONLY = Case(None, squares(), root=corrected())
RAW = {"root": uncorrected}
WARM = {"warmup_steps": 3}

TORCH: dict[str, Case] = {
    "Adam": adam(),
    "AdamW": adam(),
    "NAdam": adam(numerator=c.nadam),
    "RAdam": adam(numerator=None),
    "SparseAdam": adam(sparse=True, root=uncorrected),
    "Adamax": momentum(ema("betas.0")),
    "SGD": momentum(from_first("momentum"), options={"momentum": 0.9, "lr": 0.1}),
    "Muon": momentum(ema("momentum"), matrices_only=True),
    "Adagrad": Case(None, total(), root=uncorrected),
    "RMSprop": Case(heavy_ball("momentum", of=lambda t: rms_steps(t)), squares("alpha"), {"momentum": 0.9}, **RAW),
    "Adadelta": Case(None, squares("rho")),
    "Adafactor": Case(None, c.TORCH_FACTORS, {"lr": 0.6}, rate=capped),
    "ASGD": Case(rate=None),
    "Rprop": Case(rate=None),
    "LBFGS": Case(closure=True),
}


def rms_steps(trace: Trace) -> list[torch.Tensor]:
    """RMSprop's normalised gradients, which its momentum averages."""
    v, result = torch.zeros_like(trace.gradients[0]), []
    for g in trace.gradients:
        v = trace.hyper("alpha") * v + (1 - trace.hyper("alpha")) * g**2
        result.append(g / (v.sqrt() + trace.hyper("eps")))
    return result


# The momentum buffer of SGD begins with the first gradient and then adds whole ones.
TORCH["SGD"] = momentum(heavy_ball("momentum"), options={"momentum": 0.9, "lr": 0.1})

SCHEDULEFREE: dict[str, Case] = {
    "AdamWScheduleFree": Case(None, squares(), WARM, rate=scheduled, root=corrected()),
    "AdamWScheduleFreeClosure": Case(None, squares(), WARM, rate=scheduled, root=corrected(), closure=True),
    "AdamWScheduleFreePaper": Case(None, squares(), WARM, rate=corrected_rate, root=uncorrected),
    "AdamWScheduleFreeReference": Case(None, squares(), WARM, rate=scheduled, root=corrected()),
    "RAdamScheduleFree": replace(SECOND_ONLY, rate=rectified, options={"betas": (0.9, 0.9)}),
    "RAdamScheduleFreeClosure": replace(SECOND_ONLY, rate=rectified, options={"betas": (0.9, 0.9)}, closure=True),
    "SGDScheduleFreeClosure": Case(None, None, WARM, rate=scheduled, closure=True),
    "SGDScheduleFree": Case(None, None, WARM, rate=scheduled),
    "SGDScheduleFreeReference": Case(None, None, WARM, rate=scheduled),
}

LION_PYTORCH = {"Lion": momentum(ema("betas.1"))}

TRANSFORMERS = {
    "Adafactor": Case(
        last_update,
        c.HF_FACTORS,
        {"lr": 1e-2, "beta1": 0.9, "relative_step": False, "scale_parameter": False},
    ),
}


def vectors_only(trace: Trace) -> torch.Tensor | None:
    """Adam's average of squares for the parameters that are not matrices."""
    return squares()(trace) if trace.gradients[0].dim() < 2 else None


def muon(kind: type, module: nn.Module, **options: Any) -> Any:
    """Matrices by Muon, the rest by its AdamW."""
    return kind(split(module, use_muon=(True, False)), **options)


def adam_part(first: Any) -> Any:
    """`first` for matrices, Adam's average for the rest."""
    return lambda trace: (first if trace.gradients[0].dim() > 1 else ema("betas.0"))(trace)


MUON = Case(adam_part(ema("momentum")), vectors_only, make=muon, root=corrected())

DEBIASED = adam(
    first=debiased("betas.0"),
    second=debiased("betas.1", power=2),
    root=uncorrected,
    numerator=c.as_it_is(debiased("betas.0")),
)


def agreeing(trace: Trace) -> torch.Tensor:
    """AdaTAM's momentum."""
    return c.damped(trace, "betas.0", trace.hyper("eps"))


PYTORCH_OPTIMIZER: dict[str, Case] = {
    "A2Grad": Case(total(1, mean=True), rate=None),
    "ADOPT": Case(c.adopt, from_first("betas.1", power=2)),
    "AccSGD": BARE,
    "AdEMAMix": adam(numerator=c.with_slow),
    "AdaBelief": adam(second=about_the_mean(epsilon=True)),
    "AdaBound": adam(root=uncorrected),
    "AdaDelta": Case(None, squares("rho")),
    "AdaGC": adam(first=ema("betas.0", c.clipped_to("lambda_abs")), second=squares(of=c.clipped_to("lambda_abs"))),
    "AdaMax": momentum(ema("betas.0")),
    "AdaMod": adam(root=uncorrected, numerator=None),
    "AdaNorm": adam(first=ema("betas.0", c.adanorm), root=uncorrected),
    "AdaPNM": adam(first=None, second=largest(), root=uncorrected, numerator=None),
    "AdaShift": momentum(c.adashift, options={"keep_num": 3}),
    "AdaSmooth": Case(None, c.smooth_square),
    "AdaTAM": adam(first=agreeing, root=uncorrected, numerator=c.as_it_is(agreeing)),
    "AdamC": adam(root=uncorrected),
    "AdamG": adam(first=c.golden, rate=capped),
    "AdamP": adam(root=uncorrected),
    "AdamS": adam(),
    "AdamWSN": adam(root=uncorrected),
    "Adan": adam(second=c.adan_square, root=corrected("betas.2"), numerator=c.adan),
    "AggMo": BARE,
    "AliG": Case(rate=None, closure=True),
    "Amos": Case(None, c.one_square("beta")),
    "Ano": adam(second=c.ano, numerator=lambda t, _: t.gradients[-1].abs() * ema("betas.0")(t).sign()),
    "APOLLO": adam(root=uncorrected),
    "ApolloDQN": momentum(debiased("beta")),
    "AvaGrad": adam(),
    "BCOS": momentum(from_first("beta")),
    "DAdaptAdaGrad": Case(rate=searched_rate),
    "DAdaptAdam": adam(
        first=c.searched("betas.0"),
        rate=searched_rate,
        root=uncorrected,
        numerator=c.as_it_is(c.searched("betas.0")),
    ),
    "DAdaptAdan": adam(first=c.searched("betas.0"), second=None, rate=searched_rate),
    "DAdaptLion": momentum(c.searched("betas.1"), rate=searched_rate),
    "DAdaptSGD": Case(rate=None),
    "DiffGrad": adam(root=uncorrected, numerator=c.diffgrad),
    "DualAdam": adam(numerator=None),
    "EXAdam": adam(),
    "EmoLynx": momentum(ema("betas.1")),
    "EmoNavi": adam(root=uncorrected, numerator=c.as_it_is(ema("betas.0"))),
    "FOCUS": momentum(ema("betas.0")),
    "FTRL": Case(None, total()),
    "Fira": adam(root=uncorrected),
    "Fromage": BARE,
    "GaLore": adam(root=uncorrected),
    "Grams": adam(numerator=lambda t, n: c.own(ema("betas.0"))(t, n).abs() * t.gradients[-1].sign()),
    "GrokFastAdamW": adam(
        first=ema("betas.0", c.grokfast), second=squares(of=c.grokfast), options={"grokfast_after_step": 0}
    ),
    "Kate": BARE,
    "Kron": momentum(ema("momentum")),
    "LARS": momentum(heavy_ball("momentum", c.lars)),
    "LaProp": adam(first=c.laprop),
    "Lamb": adam(first=ema("betas.0", c.clipped_to("max_grad_norm")), root=uncorrected),
    "Lion": momentum(ema("betas.1")),
    "MADGRAD": BARE,
    "MARS": Case(c.mars_average(1), c.mars_average(2)),
    "MSVAG": Case(ema("beta"), squares("beta")),
    "Muon": MUON,
    "MuonClip": replace(MUON, first=adam_part(heavy_ball("momentum"))),
    "AdaGO": MUON,
    "NorMuon": MUON,
    "AdaMuon": replace(MUON, first=ema("betas.0")),
    "Nero": Case(None, c.one_square("beta", of_rows=True), root=corrected("beta")),
    "NovoGrad": momentum(c.novograd),
    "PAdam": adam(root=uncorrected, numerator=None),
    "PNM": BARE,
    "Prodigy": adam(
        first=c.searched("betas.0", step=False), second=c.searched("betas.1", False, 2), rate=searched_rate
    ),
    "QHAdam": DEBIASED,
    "QHM": momentum(ema("momentum"), options={"momentum": 0.9}),
    "RAdam": adam(root=uncorrected, numerator=None),
    "ROSE": BARE,
    "Ranger": adam(first=ema("betas.0", centralised), second=squares(of=centralised), root=uncorrected, numerator=None),
    "RACS": BARE,
    "SCION": momentum(ema(0.9)),
    "SCIONLight": BARE,
    "SGDP": momentum(heavy_ball("momentum"), options={"momentum": 0.9}),
    "SGDSaI": momentum(ema("momentum")),
    "SGDW": momentum(heavy_ball("momentum"), options={"momentum": 0.9}),
    "SPlus": momentum(ema("betas.0")),
    "SRMM": momentum(c.srmm),
    "SWATS": adam(root=uncorrected),
    "ScalableShampoo": momentum(heavy_ball("betas.0")),
    "ScheduleFreeAdamW": SECOND_ONLY,
    "ScheduleFreeRAdam": Case(None, squares(), rate=None, root=corrected()),
    "ScheduleFreeSGD": BARE,
    "SignSGD": momentum(ema("momentum")),
    "SimplifiedAdEMAMix": adam(),
    "SophiaH": momentum(ema("betas.0"), create_graph=True),
    "AdaHessian": momentum(ema("betas.0"), create_graph=True),
    "StableAdamW": DEBIASED,
    "TAM": momentum(lambda trace: c.damped(trace, "momentum", trace.hyper("eps"))),
    "Tiger": momentum(ema("beta")),
    "Yogi": adam(first=c.begun_at(1e-6, "betas.0"), second=c.amsgrad_like_signs(1e-6)),
    "ASGD": Case(rate=lambda trace, t: float(last_update(trace).norm() / trace.gradients[-1].norm()), double=True),
    "AdaFactor": Case(
        last_update,
        c.PO_FACTORS,
        {"relative_step": False, "scale_parameter": False, "momentum_dtype": torch.float64},
        double=True,
    ),
    "CAME": Case(c.came, c.CAME_FACTORS),
    "Adai": adam(first=c.adai, second=squares()),
    "Adalite": BARE,
    "AdamMini": adam(second=c.one_square("betas.1"), make=lambda kind, module: kind(module, lr=1e-3)),
    "Aida": adam(second=c.aida, root=uncorrected),
    "Alice": Case(
        ema("betas.0", c.in_basis("U")), squares("betas.1", c.in_basis("U")), also=lambda held: {"U": held["U"]}
    ),
    "Conda": Case(ema("betas.0"), None),
    "DASH": momentum(ema("betas.0")),
    "EmoFact": momentum(c.vectors(ema("betas.0"))),
    "FAdam": Case(c.fadam, debiased("betas.1", power=2)),
    "FlashAdamW": adam(options={"quantize": False}),
    "Gravity": Case(c.per_rate, double=True),
    "LoRARite": BARE,
    "PID": momentum(heavy_ball("momentum"), options={"momentum": 0.9}),
    "Ranger21": Case(rate=None, options={"num_iterations": 100}),
    "SM3": Case(c.per_rate, options={"momentum": 0.9}, double=True),
    "SOAP": Case(
        ema("betas.0", c.after_the_first),
        squares("betas.1", c.rotated),
        also=lambda held: {f"Q{i}": q for i, q in enumerate(held["Q"]) if len(q)},
    ),
    "SPAM": adam(
        first=ema("betas.0", c.in_basis("mask")),
        second=squares(of=c.in_basis("mask")),
        root=uncorrected,
        numerator=None,
        also=lambda held: {k: v for k, v in held.items() if k == "mask"},
    ),
    "SaRA": Case(
        ema("betas.0", c.in_basis("mask")),
        squares(of=c.in_basis("mask")),
        {"threshold": 0.3},
        also=lambda held: {"mask": held["mask"]},
    ),
    "Shampoo": Case(c.per_rate, options={"momentum": 0.9}, double=True),
    "StableSPAM": adam(first=ema("betas.0", c.stable_spam), second=squares(of=c.stable_spam)),
    "VSGD": BARE,
    "SpectralSphere": momentum(ema("momentum"), matrices_only=True),
    "SAM": adam(make=perturbed, closure=True, backward_first=True),
    "LookSAM": adam(make=perturbed, closure=True, backward_first=True, inner=True),
    "WSAM": adam(make=weighted, closure=True, backward_first=True, inner=True, numerator=None),
    "FriendlySAM": adam(make=perturbed, closure=True, backward_first=True),
    "ScheduleFreeWrapper": adam(make=around, numerator=None),
    "Lookahead": adam(make=around),
    "TRAC": adam(make=around, numerator=None),
    "Magma": adam(make=around, numerator=None),
    "OrthoGrad": adam(
        first=ema("betas.0", c.orthogonal_to_weights), second=squares(of=c.orthogonal_to_weights), make=around
    ),
}


def decode_blocks(held: dict[str, Any], which: str) -> torch.Tensor:
    """bitsandbytes' own decoding."""
    from bitsandbytes import functional

    n = 1 if which == "first" or "state2" not in held else 2
    codes = held[f"state{n}"]
    if codes.is_floating_point():
        return codes
    quantized = functional.dequantize_blockwise(codes, absmax=held[f"absmax{n}"], code=held[f"qmap{n}"], blocksize=256)
    return quantized.to(torch.float32)


def decode_low_bit(held: dict[str, Any], which: str) -> torch.Tensor:
    """torchao's own decoding."""
    value = held["exp_avg" if which == "first" else "exp_avg_sq"]
    return value.dequantize() if hasattr(value, "dequantize") and type(value) is not torch.Tensor else value


BLOCKS = {"big": True, "decode": decode_blocks, "numerator": None}
EIGHT_BIT = adam(**BLOCKS)
_ADAGRAD = Case(None, total(), big=True, decode=decode_blocks, root=uncorrected)
_LION = Case(ema("betas.1"), big=True, decode=decode_blocks)
BITSANDBYTES: dict[str, Case] = {
    # What an 8-bit step divides by it quantizes only afterwards: its formula is proved in 32 bits.
    paged + kind + bits: replace(case, numerator=own(ema("betas.0")))
    if bits != "8bit" and case.second and case.first
    else case
    for kind, case in (("Adam", EIGHT_BIT), ("AdamW", EIGHT_BIT), ("Adagrad", _ADAGRAD), ("Lion", _LION))
    for paged in ("", "Paged")
    for bits in ("", "8bit", "32bit")
    if not (paged and kind == "Adagrad")
} | {
    "LAMB": EIGHT_BIT,
    "LAMB32bit": EIGHT_BIT,
    "RMSprop": Case(None, squares("betas.0"), big=True, decode=decode_blocks, root=uncorrected),
    "RMSprop32bit": Case(None, squares("betas.0"), big=True, decode=decode_blocks, root=uncorrected),
}
LOW_BIT = adam(big=True, decode=decode_low_bit, numerator=None)
TORCHAO: dict[str, Case] = dict.fromkeys(
    ("Adam8bit", "Adam4bit", "AdamW8bit", "AdamW4bit", "AdamFp8", "AdamWFp8", "_AdamW"), LOW_BIT
)

TABLES: dict[str, dict[str, Case]] = {
    "torch.optim": TORCH,
    "pytorch_optimizer": PYTORCH_OPTIMIZER,
    "schedulefree": SCHEDULEFREE,
    "lion_pytorch": LION_PYTORCH,
    "transformers.optimization": TRANSFORMERS,
    "bitsandbytes.optim": BITSANDBYTES,
    "torchao.optim": TORCHAO,
}

BITSANDBYTES_NOT_RUN: dict[str, str] = {
    **{
        f"{paged}{kind}{bits}": "does not run on a CPU in all its forms; read by its recorded layout"
        for kind in ("AdEMAMix", "LARS", "SGD")
        for paged in ("", "Paged")
        for bits in ("", "8bit", "32bit")
    },
    "LAMB8bit": "takes 8 bits on CUDA only; read by its recorded layout",
    "RMSprop8bit": "takes 8 bits on CUDA only; read by its recorded layout",
    "PytorchLARS": "raises inside its own step(); read by its recorded layout",
    "_ReferenceAdEMAMix": "a reference for the package's own tests; not known to optwatch",
    "Optimizer1State": "the base class",
    "Optimizer2State": "the base class",
    "Optimizer8bit": "the base class",
}
NOT_RUN: dict[str, dict[str, str]] = {
    "torch.optim": {"Optimizer": "the base class"},
    "pytorch_optimizer": {
        "AdaLOMO": "updates weights inside backward() and never runs step()",
        "LOMO": "updates weights inside backward() and never runs step()",
        "BSAM": "its step() raises where parameters differ in size; nothing of its state is read",
        "BaseOptimizer": "the base class",
        "MuonBase": "the base class",
        "DeMo": "needs a package that it does not install (einops) and a process group; nothing of its state is read",
        "DistributedMuon": "needs a process group; read as Muon",
        "GSAM": "needs a scheduler of its radius; read as the optimizer inside",
        "PCGrad": "is no step of an optimizer but a projection of several losses; read as the optimizer inside",
        "SafeFP16Optimizer": "needs float16 weights; read as the optimizer inside",
    },
    "torchao.optim": {
        "_AdamBase": "the base class",
        "CPUOffloadOptimizer": "needs a CUDA or XPU device; nothing of its state is read",
    },
    "transformers.optimization": {"LayerWiseDummyOptimizer": "holds no parameters and does nothing"},
    "bitsandbytes.optim": BITSANDBYTES_NOT_RUN,
}
"""Classes without a case, and why."""
