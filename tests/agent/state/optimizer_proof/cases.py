"""One case for each optimizer that can be run: how it is made, and what its moments are by definition."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .definitions import (
    Definition,
    Trace,
    debiased,
    ema,
    factored,
    last_update,
    squares,
)

Make = Callable[[type, nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class Case:
    """How one optimizer is made and stepped, and its signals by definition. A signal without one must not be read."""

    first: Definition | None = None
    second: Definition | None = None
    options: dict[str, Any] = field(default_factory=dict)
    make: Make | None = None
    rate: Callable[[Trace, int], float] | None = lambda trace, t: float(trace.groups[t - 1]["lr"])
    """The learning rate of step t, from 1; None where it is unavailable."""
    root: Callable[[Trace, Tensor, int], Tensor] | None = None
    """The root of the second moment in the step, √v̂, in the form that ε is added to."""
    numerator: Callable[[Trace, int], Tensor] | None = None
    """What the step divides by √v̂ + ε; None where there is more to a step than that."""
    closure: bool = False
    """Whether step() is given a closure; its last call's gradients are what the optimizer saw."""
    inner: bool = False
    """Whether what the optimizer inside a wrapper saw are other gradients than those of the closure."""
    backward_first: bool = False
    """Whether it also wants gradients before."""
    create_graph: bool = False
    sparse: bool = False
    """Whether it takes sparse gradients only: its model is one embedding."""
    matrices_only: bool = False
    double: bool = False
    """Whether parameters are float64: where a moment is defined by how far the weights went."""
    also: Callable[[dict[str, Any]], dict[str, Tensor]] | None = None
    """What to record of a parameter's state after each step beside its moments: the basis or mask that they are in."""
    decode: Callable[[dict[str, Any], str], Tensor] | None = None
    """How the package itself turns its quantized ``first`` or ``second`` moment into numbers. These are what is to be
    exported; from the definition they may differ by the quantization."""
    big: bool = False
    """Whether parameters have 4096 entries and more, so that state is quantized."""
    tolerance: float = 1e-5


def corrected(beta: str = "betas.1") -> Callable[[Trace, Tensor, int], Tensor]:
    """√(v / (1 − βᵗ))."""
    return lambda trace, v, t: (v / (1 - trace.hyper(beta) ** t)).sqrt()


def uncorrected(trace: Trace, v: Tensor, t: int) -> Tensor:
    """√v."""
    return v.sqrt()


def own(first: Definition) -> Callable[[Trace, int], Tensor]:
    """m̂ = m / (1 − β₁ᵗ) of a first moment."""

    def compute(trace: Trace, t: int) -> Tensor:
        m = first(trace)
        assert m is not None
        return m / (1 - trace.hyper("betas.0") ** t)

    return compute


def as_it_is(first: Definition) -> Callable[[Trace, int], Tensor]:
    """m without a correction of its bias."""

    def compute(trace: Trace, t: int) -> Tensor:
        m = first(trace)
        assert m is not None
        return m

    return compute


def adam(**changes: Any) -> Case:
    """Adam by its definition."""
    first = changes.get("first", ema("betas.0"))
    return replace(Case(first, squares(), root=corrected(), numerator=first and own(first)), **changes)


def momentum(definition: Definition, **changes: Any) -> Case:
    """One momentum."""
    return replace(Case(definition), **changes)


def split(module: nn.Module, **flags: tuple[Any, Any]) -> list[dict[str, Any]]:
    """Two groups: matrices, then the rest, each with its own flags."""
    parts = ([p for p in module.parameters() if p.dim() > 1], [p for p in module.parameters() if p.dim() <= 1])
    return [{"params": part} | {k: v[i] for k, v in flags.items()} for i, part in enumerate(parts)]


def parameters(module: nn.Module) -> Iterable[nn.Parameter]:
    """What an optimizer gets by default."""
    return module.parameters()


# --- definitions that one optimizer alone has ---------------------------------------------------------------------


def damped(trace: Trace, key: str, eps: float) -> Tensor:
    """TAM: gradients damped by their running agreement with the momentum; momentum from the first gradient or 0."""
    m = trace.gradients[0].clone() if key == "momentum" else torch.zeros_like(trace.gradients[0])
    s = torch.zeros_like(m)
    beta = trace.hyper(key)
    for g in trace.gradients:
        agreement = nn.functional.normalize(m, dim=0) * nn.functional.normalize(g, dim=0)
        s = s.lerp(agreement, 1 - trace.hyper("decay_rate"))
        m = beta * m + ((1 + s) / 2 + eps) * g
    return m


def adopt(trace: Trace) -> Tensor:
    """ADOPT: gradients over the root of the second moment before, clipped at t^(1/4), averaged from the second on."""
    v = trace.gradients[0] ** 2
    m = torch.zeros_like(v)
    b1, b2 = trace.hyper("betas.0"), trace.hyper("betas.1")
    for t, g in enumerate(trace.gradients, start=1):
        if t > 1:
            x = g / v.sqrt().clamp(min=trace.hyper("eps"))
            m = b1 * m + (1 - b1) * x.clamp(-(t**0.25), t**0.25)
        v = b2 * v + (1 - b2) * g**2
    return m


def adan_square(trace: Trace) -> Tensor:
    """Adan: the moving average of (g + β₂(g − g before))²."""
    v, before = torch.zeros_like(trace.gradients[0]), trace.gradients[0]
    b2, b3 = trace.hyper("betas.1"), trace.hyper("betas.2")
    for g in trace.gradients:
        v = b3 * v + (1 - b3) * (g + b2 * (g - before)) ** 2
        before = g
    return v


def searched(beta: str, step: bool = True, power: int = 1) -> Definition:
    """Moving average of gradients times the distance estimate d that a step began with (and lr where `step`)."""

    def compute(trace: Trace) -> Tensor:
        b = trace.hyper(beta)
        m = torch.zeros_like(trace.gradients[0])
        for g, group in zip(trace.gradients, trace.groups, strict=True):
            factor = float(group["d"]) * (float(group["lr"]) if step else 1.0)
            m = b * m + (1 - b) * (factor * g) ** power
        return m

    return compute


def clipped_to(largest_norm: str) -> Callable[[Trace], list[Tensor]]:
    """Gradients scaled so that their global norm is at most a number of the group or the defaults."""

    def compute(trace: Trace) -> list[Tensor]:
        limit = float(trace.groups[0].get(largest_norm, 1.0))
        return [g * min(1.0, limit / trace.global_norm(i)) for i, g in enumerate(trace.gradients)]

    return compute


def adanorm(trace: Trace) -> list[Tensor]:
    """AdaNorm: gradients smaller than their running norm are scaled up to it."""
    running, result = 0.0, []
    for g in trace.gradients:
        norm = float(g.norm())
        running = trace.hyper("r") * running + (1 - trace.hyper("r")) * norm
        result.append(g * running / norm if running > norm > 0 else g)
    return result


def adashift(trace: Trace) -> Tensor:
    """AdaShift: a weighted mean of the last keep_num gradients."""
    keep, beta = int(trace.hyper("keep_num")), trace.hyper("betas.0")
    weights = [beta**i for i in range(keep)]
    recent = list(reversed(trace.gradients))[:keep]
    result = sum(w * g for w, g in zip(weights, recent, strict=False))
    assert isinstance(result, Tensor)
    return result / sum(weights)


def amsgrad_like_signs(initial: float = 0.0) -> Definition:
    """Yogi: v − (1 − β₂)·sign(v − g²)·g², from an initial number."""

    def compute(trace: Trace) -> Tensor:
        v = torch.full_like(trace.gradients[0], initial)
        for g in trace.gradients:
            v = v - (1 - trace.hyper("betas.1")) * torch.sign(v - g**2) * g**2
        return v

    return compute


def ano(trace: Trace) -> Tensor:
    """Ano: v ← β₂v + (1 − β₂)·sign(g² − v)·g²."""
    v = torch.zeros_like(trace.gradients[0])
    for g in trace.gradients:
        v = trace.hyper("betas.1") * v + (1 - trace.hyper("betas.1")) * torch.sign(g**2 - v) * g**2
    return v


def begun_at(value: float, beta: str) -> Definition:
    """A moving average of gradients from a number."""

    def compute(trace: Trace) -> Tensor:
        m = torch.full_like(trace.gradients[0], value)
        for g in trace.gradients:
            m = trace.hyper(beta) * m + (1 - trace.hyper(beta)) * g
        return m

    return compute


def golden(trace: Trace) -> Tensor:
    """AdamG: gradients times the running p·v^q, averaged (p = 0.2, q = 0.24)."""
    v, r, m = (torch.zeros_like(trace.gradients[0]) for _ in range(3))
    b1, b2, b3 = (trace.hyper(f"betas.{i}") for i in range(3))
    for g in trace.gradients:
        v = b2 * v + (1 - b2) * g**2
        r = b3 * r + (1 - b3) * 0.2 * v**0.24
        m = b1 * m + (1 - b1) * r * g
    return m


def one_square(beta: str, of_rows: bool = False, initial_first: bool = False) -> Definition:
    """One mean square for each tensor (or row norm), standing for all of its weights."""

    def compute(trace: Trace) -> Tensor:
        v = torch.zeros(())
        for g in trace.gradients:
            if of_rows:  # Nero: the squared norm of each neuron
                square = (g.flatten(1).square().sum(1) if g.dim() > 1 else g.square()).double()
                square = square.reshape(-1, *[1] * (g.dim() - 1))
            else:
                square = g.square().mean()
            v = trace.hyper(beta) * v + (1 - trace.hyper(beta)) * square
        return v.expand_as(trace.gradients[0])

    return compute


def grokfast(trace: Trace) -> list[Tensor]:
    """Gradients with their slow moving average (from the first gradient) added, after grokfast_after_step steps."""
    slow, result = trace.gradients[0], []
    for g in trace.gradients:
        slow = trace.hyper("grokfast_alpha") * slow + (1 - trace.hyper("grokfast_alpha")) * g
        result.append(g + trace.hyper("grokfast_lamb") * slow)
    return result


def laprop(trace: Trace) -> Tensor:
    """LaProp: lr·g/(√v + ε)·√(1 − β₂ᵗ), averaged."""
    b1, b2 = trace.hyper("betas.0"), trace.hyper("betas.1")
    m, v = (torch.zeros_like(trace.gradients[0]) for _ in range(2))
    for t, g in enumerate(trace.gradients, start=1):
        v = b2 * v + (1 - b2) * g**2
        root = ((v + 1e-15).sqrt() + trace.hyper("eps")) / (1 - b2**t) ** 0.5
        m = b1 * m + (1 - b1) * trace.hyper("lr") * g / root
    return m


def lars(trace: Trace) -> list[Tensor]:
    """LARS: gradients of matrices times trust·‖p‖/‖g‖."""
    trust = trace.hyper("trust_coefficient")
    return [
        g * trust * p.norm() / g.norm() if g.dim() > 1 else g
        for g, p in zip(trace.gradients, trace.before, strict=True)
    ]


def mars(trace: Trace) -> list[Tensor]:
    """MARS: g + γ·β₁/(1 − β₁)·(g − g before) of matrices, at most of norm 1; vectors as they are."""
    if trace.gradients[0].dim() < 2:
        return trace.gradients
    beta, before, result = trace.hyper("betas.0"), torch.zeros_like(trace.gradients[0]), []
    for g in trace.gradients:
        c = g + trace.hyper("gamma") * beta / (1 - beta) * (g - before)
        result.append(c / max(1.0, float(c.norm())))
        before = g
    return result


def mars_average(power: int) -> Definition:
    """Vectors have decay rates of their own."""

    def compute(trace: Trace) -> Tensor:
        name = "betas" if trace.gradients[0].dim() > 1 else "betas_1d"
        return ema(f"{name}.{power - 1}", mars, power)(trace)

    return compute


def novograd(trace: Trace) -> Tensor:
    """NovoGrad: gradients over the root of a running squared norm, with heavy ball."""
    square, m = None, torch.zeros_like(trace.gradients[0])
    for g in trace.gradients:
        norm = g.square().sum()
        square = norm if square is None else trace.hyper("betas.1") * square + (1 - trace.hyper("betas.1")) * norm
        m = trace.hyper("betas.0") * m + g / (square.sqrt() + trace.hyper("eps"))
    return m


def orthogonal_to_weights(trace: Trace) -> list[Tensor]:
    """OrthoGrad: the part of g orthogonal to p, with the norm of g."""
    result = []
    for g, p in zip(trace.gradients, trace.before, strict=True):
        w, flat = p.flatten(), g.flatten()
        part = flat - w * (w @ flat) / (w @ w + 1e-30)
        result.append((part * flat.norm() / (part.norm() + 1e-30)).view_as(g))
    return result


def srmm(trace: Trace) -> Tensor:
    """SRMM: a mean whose weight falls with the step."""
    m = torch.zeros_like(trace.gradients[0])
    for t, g in enumerate(trace.gradients, start=1):
        weight = (t % trace.hyper("memory_length") + 1) ** -trace.hyper("beta")
        m = m.lerp(g, weight)
    return m


def smooth_square(trace: Trace) -> Tensor:
    """AdaSmooth: the decay rate follows how straight each weight's path was."""
    s, n, v = (torch.zeros_like(trace.gradients[0]) for _ in range(3))
    b1, b2 = trace.hyper("betas.0"), trace.hyper("betas.1")
    for g, p, before in zip(trace.gradients, trace.before, [trace.before[0], *trace.before], strict=False):
        s, n = s + p - before, n + (p - before).abs()
        c = s.abs() / (n + trace.hyper("eps")) * (b2 - b1) + 1 - b2
        v = v.lerp(g**2, c**2)
    return v


def prefix(trace: Trace, steps: int) -> Trace:
    """The trace as it was after some steps."""
    return replace(trace, gradients=trace.gradients[:steps], before=trace.before[:steps], after=trace.after[:steps])


def came(trace: Trace) -> Tensor:
    """CAME: g/√v of the factored second moment, clipped at a root mean square of 1, averaged."""
    m = torch.zeros_like(trace.gradients[0])
    for t, g in enumerate(trace.gradients, start=1):
        v = CAME_FACTORS(prefix(trace, t))
        assert v is not None
        update = g / v.sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()))
        m = trace.hyper("betas.0") * m + (1 - trace.hyper("betas.0")) * update
    return m


def adai(trace: Trace) -> Tensor:
    """Adai: the momentum of each weight follows its second moment over the mean of all of them."""
    b0, b2 = trace.hyper("betas.0"), trace.hyper("betas.1")
    v = [torch.zeros_like(other.gradients[0]) for other in trace.others]
    mine, m = trace.others.index(trace), torch.zeros_like(trace.gradients[0])
    for t, g in enumerate(trace.gradients, start=1):
        v = [b2 * x + (1 - b2) * other.gradients[t - 1] ** 2 for x, other in zip(v, trace.others, strict=True)]
        mean = sum(float(x.sum()) for x in v) / (1 - b2**t) / sum(x.numel() for x in v)
        beta = (1 - v[mine] / (1 - b2**t) / max(mean, 1e-3) * b0).clamp(0, 1 - 1e-3)
        m = beta * m + (1 - beta) * g
    return m


def aida(trace: Trace) -> Tensor:
    """Aida: the moving average of the squared difference of mutual projections of g and m."""
    b1, b2 = trace.hyper("betas.0"), trace.hyper("betas.1")
    m, v = (torch.zeros_like(trace.gradients[0]) for _ in range(2))
    for g in trace.gradients:
        m = b1 * m + (1 - b1) * g
        x, y = g.clone(), m.clone()
        for _ in range(2):
            dot = (x * y).sum()
            x, y = x * dot / (x.square().sum() + 1e-20), y * dot / (y.square().sum() + 1e-20)
        v = b2 * v + (1 - b2) * (y - x) ** 2 + trace.hyper("eps")
    return v


def fadam(trace: Trace) -> Tensor:
    """FAdam: gradients over a power of the Fisher information, clipped at a root mean square, averaged."""
    m = torch.zeros_like(trace.gradients[0])
    p, eps = trace.hyper("p"), trace.hyper("eps")
    for t, g in enumerate(trace.gradients, start=1):
        fim = debiased("betas.1", power=2)(prefix(trace, t))
        assert fim is not None
        small = min(float(g.square().mean().sqrt()) * trace.hyper("eps_2"), eps)
        x = g / (fim**p + small ** (2 * p))
        x = x / max(1.0, float(x.square().mean().sqrt()) / trace.hyper("clip"))
        m = trace.hyper("betas.0") * m + (1 - trace.hyper("betas.0")) * x
    return m


def in_basis(name: str) -> Callable[[Trace], list[Tensor]]:
    """Gradients in a basis that was recorded: QᵀgQ' for a list of matrices, or the masked entries."""

    def compute(trace: Trace) -> list[Tensor]:
        if not trace.recorded or name not in trace.recorded[-1]:
            return trace.gradients
        basis = trace.recorded[-1][name]
        if basis.dtype == torch.bool:
            return [g[basis] for g in trace.gradients]
        return [basis.T @ g.reshape(len(basis), -1) for g in trace.gradients]

    return compute


def rotated(trace: Trace) -> list[Tensor]:
    """SOAP: gradients in the eigenbases as they are at each step; the first step makes them only."""
    result = []
    for g, bases in zip(trace.gradients[1:], trace.recorded[:-1], strict=True):
        x = g
        for axis in range(g.dim()):
            if (q := bases.get(f"Q{axis}")) is not None:
                x = torch.tensordot(x, q, dims=([axis], [0])).movedim(-1, axis)
        result.append(x)
    return result or [torch.zeros_like(trace.gradients[0])]


def after_the_first(trace: Trace) -> list[Tensor]:
    """Gradients from the second step on."""
    return trace.gradients[1:] or [torch.zeros_like(trace.gradients[0])]


def stable_spam(trace: Trace) -> list[Tensor]:
    """StableSPAM: spikes clipped at their running largest entry, then scaled by running norms."""
    gamma1, gamma2, theta = 0.7, 0.9, 0.999
    most = norm = square = 0.0
    result = []
    for t, g in enumerate(trace.gradients, start=1):
        largest_now = float(g.abs().max())
        most = theta * most + (1 - theta) * largest_now
        limit = most / (1 - theta**t)
        x = torch.where(g.abs() > limit, g / largest_now * limit, g)
        size = float(x.norm())
        norm = gamma1 * norm + (1 - gamma1) * size
        square = gamma2 * square + (1 - gamma2) * size**2
        scale = norm / (1 - gamma1**t) / ((square / (1 - gamma2**t)) ** 0.5 + trace.hyper("eps"))
        result.append(x / size * scale)
    return result


def per_rate(trace: Trace) -> Tensor:
    """The last update over the learning rate: a momentum that is the direction of the step."""
    return last_update(trace) / trace.hyper("lr")


def vectors(definition: Definition) -> Definition:
    """For parameters that are not matrices only."""
    return lambda trace: definition(trace) if trace.gradients[0].dim() < 2 else None


def nadam(trace: Trace, t: int) -> Tensor:
    """NAdam: g and m, each with its own correction (Dozat 2016)."""
    b1, decay = trace.hyper("betas.0"), trace.hyper("momentum_decay")
    mu = [b1 * (1 - 0.5 * 0.96 ** (i * decay)) for i in range(1, t + 2)]
    product = math.prod(mu[:t])
    m = ema("betas.0")(trace)
    assert m is not None
    return (1 - mu[t - 1]) / (1 - product) * trace.gradients[-1] + mu[t] / (1 - product * mu[t]) * m


def adan(trace: Trace, t: int) -> Tensor:
    """Adan: the averages of g and of its change."""
    b1, b2 = trace.hyper("betas.0"), trace.hyper("betas.1")
    changes = [y - x for x, y in zip([trace.gradients[0], *trace.gradients], trace.gradients, strict=False)]
    change = ema("betas.1", lambda _: changes)(trace)
    m = ema("betas.0")(trace)
    assert m is not None and change is not None  # noqa: PT018
    return m / (1 - b1**t) + b2 * change / (1 - b2**t)


def diffgrad(trace: Trace, t: int) -> Tensor:
    """diffGrad: m̂ times the sigmoid of how much the gradient has changed."""
    before = trace.gradients[-2] if t > 1 else torch.zeros_like(trace.gradients[0])
    return own(ema("betas.0"))(trace, t) * (trace.gradients[-1] - before).abs().sigmoid()


def with_slow(trace: Trace, t: int) -> Tensor:
    """AdEMAMix: m̂ and α times the slow average."""
    slow = ema("betas.2")(trace)
    assert slow is not None
    return own(ema("betas.0"))(trace, t) + trace.hyper("alpha") * slow


def po_decay(trace: Trace, t: int) -> float:
    """Decay rate of pytorch-optimizer's AdaFactor at step t."""
    return min(trace.hyper("betas.1"), 1 - t**-0.8)


TORCH_FACTORS = factored(lambda _, t: 1 - t**-0.8, lambda _: 0.0)
HF_FACTORS = factored(lambda _, t: 1 - t**-0.8, lambda trace: trace.hyper("eps.0"))
PO_FACTORS = factored(po_decay, lambda _: 1e-30)
CAME_FACTORS = factored(lambda trace, _: trace.hyper("betas.1"), lambda trace: trace.hyper("eps1"))
