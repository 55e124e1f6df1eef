"""Rules about how training goes: what only its first steps tell, judged once, on the host thread."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import optim
from torch.nn.utils import clip_grad
from torch.optim import Optimizer

from optwatch.record import StepRecord

from .rule import Rules, Said
from .subject import Subject

STEPS = 100
"""Steps that are looked at."""
LEAST_RATE_FOR_WARM_UP = 1e-4
TOKENS_REMEMBERED = (1e5, 1e9)
"""Half-lives of the second moment, in tokens, between which nothing is said: two decades around what tuning finds."""


@dataclass
class FirstSteps:
    """The first `STEPS` steps of one optimizer. Bounded: a few numbers a step."""

    name: str
    optimizer: Optimizer
    subject: Subject
    losses_are_told_apart: bool
    """Whether the agent itself finds out if losses of micro-batches were divided, rather than being told."""
    tokens: float = 0.0
    """Given to monitor.log() so far."""
    first: int | None = None
    """The optimizer's own count at the first of them: above 1 where it goes on from a checkpoint."""
    rates: list[list[float]] = field(default_factory=list)
    """By step, then by group."""
    norms: int = 0
    clipped: int = 0
    micro_batches: list[int] = field(default_factory=list)
    undivided: int = 0
    evaluating: int = 0
    """Steps that the host thread handled while the model was in evaluation mode."""
    layers: dict[str, float] = field(default_factory=dict)
    """Largest gradient norm of each layer."""

    def add(self, record: StepRecord) -> None:
        """Take one step."""
        self.first = record.step if self.first is None else self.first
        self.rates.append(list(record.learning_rates))
        self.norms += record.grad_norm is not None
        self.clipped += record.grad_norm_before_clip is not None
        self.micro_batches.append(record.micro_batches)
        self.undivided += record.micro_batches > 1 and record.loss_reduction == "mean"
        self.evaluating += self.subject.model is not None and not self.subject.model.training
        for layer, norm in zip(record.layers, record.layer_grad_norm or (), strict=False):
            self.layers[layer] = max(norm, self.layers.get(layer, 0.0))

    @property
    def complete(self) -> bool:
        """Whether all of them have been taken."""
        return len(self.rates) >= STEPS

    @property
    def peaks(self) -> list[float]:
        """The largest rate of any group, by step."""
        return [max(rates, default=0.0) for rates in self.rates]


RULES: Rules[FirstSteps] = Rules()
rule = RULES.rule


@rule("learning-rate-zero", "warning")
def learning_rate_zero(steps: FirstSteps) -> Iterator[Said]:
    """A group whose rate was 0 at each of the first 100 steps: it does not train.

    Source: torch.optim's documentation; a warm-up begins at 0 and leaves it at once.
    """
    for group in range(min(map(len, steps.rates))):
        if all(rates[group] == 0 for rates in steps.rates):
            fix = "give a rate, or leave the parameters out of the optimizer"
            yield f"group {group} of {steps.name}", f"lr=0 at each of {len(steps.rates)} steps", fix


@rule("no-warm-up", "info")
def no_warm_up(steps: FirstSteps) -> Iterator[Said]:
    """An Adam on a model with attention whose rate is constant from the first step on, when v is an average over one
    gradient.

    Source: Ma & Yarats 2021, "On the adequacy of untuned warmup for adaptive optimization" (2/(1-β₂) steps); Xiong et
    al. 2020, "On Layer Normalization in the Transformer Architecture".
    """
    if _wants_warm_up(steps) and min(steps.peaks) == max(steps.peaks):
        yield steps.name, f"lr={steps.peaks[0]:g} at each of {len(steps.peaks)} steps", "warm up over 2/(1-beta2) steps"


@rule("peak-rate-from-step-1", "info")
def peak_rate_from_step_1(steps: FirstSteps) -> Iterator[Said]:
    """An Adam on a model with attention whose schedule begins at its highest rate and only falls.

    Source: Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 2.2; Ma & Yarats 2021.
    """
    falls = all(later <= earlier for earlier, later in zip(steps.peaks, steps.peaks[1:], strict=False))
    if _wants_warm_up(steps) and falls and min(steps.peaks) < max(steps.peaks):
        yield (
            steps.name,
            f"lr falls from {steps.peaks[0]:g} at step 1 to {steps.peaks[-1]:g} at step {len(steps.peaks)}",
            "put a warm-up of 2/(1-beta2) steps before it",
        )


@rule("clipping-absent", "info")
def clipping_absent(steps: FirstSteps) -> Iterator[Said]:
    """A model with attention or recurrence whose gradients clip_grad_norm_ did not clip at any of the first 100 steps.

    Source: Pascanu et al. 2013, "On the difficulty of training recurrent neural networks", section 3.2; Zhang et al.
    2020, "Why gradient clipping accelerates training".
    """
    heavy = steps.subject.has_attention or steps.subject.has_recurrence
    sharded = any("FullySharded" in kind.__name__ for kind in steps.subject.anatomy.kinds)  # it clips by itself
    seen = hasattr(clip_grad, "_clip_grads_with_norm_")  # what clipping is read off, since torch 2.6
    ours = type(steps.optimizer).__module__.startswith("torch.optim") and not isinstance(
        steps.optimizer, optim.Adafactor
    )
    if heavy and ours and seen and not sharded and not steps.clipped and steps.norms == len(steps.rates):
        yield steps.name, f"no clip_grad_norm_ in {len(steps.rates)} steps", "clip to a norm of 1"


@rule("accumulation-undivided", "warning")
def accumulation_undivided(steps: FirstSteps) -> Iterator[Said]:
    """Several micro-batches to a step whose losses are not divided by their number, with an optimizer or clipping to
    which the gradient's size matters: the gradient is that many times too large.

    Source: torch's documentation, "Automatic Mixed Precision examples", gradient accumulation (the loss is
    divided by iters_to_accumulate).
    """
    counts = set(steps.micro_batches)
    several = len(counts) == 1 and min(counts) > 1
    scale_matters = isinstance(steps.optimizer, optim.SGD) or steps.clipped == len(steps.rates)
    if several and scale_matters and steps.losses_are_told_apart and steps.undivided == len(steps.rates):
        count = min(counts)
        yield (
            steps.name,
            f"{count} backward() to a step, no loss divided by {count}",
            f"call (loss / {count}).backward()",
        )


@rule("second-moment-memory", "info")
def second_moment_memory(steps: FirstSteps) -> Iterator[Said]:
    """β₂ that does not go with the batch: v forgets half of a gradient within fewer than 1e5 or after more than 1e9
    tokens, where tokens are logged. Large batches want a smaller β₂, small ones a larger one.

    Source: Marek et al. 2025, "Small Batch Size Training for Language Models" (keep the half-life in tokens, about
    1e7); Brown et al. 2020 (β₂ = 0.95 at 3.2M tokens).
    """
    least, most = TOKENS_REMEMBERED
    a_step = steps.tokens / len(steps.rates)
    for index, group in enumerate(steps.optimizer.param_groups):
        betas = group.get("betas")
        if a_step <= 0 or not isinstance(betas, (tuple, list)) or len(betas) != 2 or not isinstance(betas[1], float):
            continue
        if not 0 < betas[1] < 1:
            continue
        remembered = a_step * math.log(2) / -math.log(betas[1])
        if not least <= remembered <= most:
            fitting = 0.5 ** (a_step / 1e7)
            yield (
                f"group {index} of {steps.name}",
                f"beta2={betas[1]:g} at {a_step:.3g} tokens a step forgets half within {remembered:.2g} tokens",
                f"give about {max(0.9, min(0.9999, fitting)):.4g}",
            )


@rule("model-in-evaluation-mode", "warning")
def model_in_evaluation_mode(steps: FirstSteps) -> Iterator[Said]:
    """A model with dropout or batch normalisation that was in evaluation mode throughout the first 100 steps.

    Source: torch's documentation of `Module.eval`: it turns dropout off and freezes batch statistics.
    """
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.modules.dropout import _DropoutNd

    affected = [kind.__name__ for kind in steps.subject.anatomy.kinds if issubclass(kind, (_BatchNorm, _DropoutNd))]
    if affected and steps.evaluating == len(steps.rates):
        yield "the model", f"training=False, and it has {', '.join(sorted(affected))}", "call model.train()"


@rule("layer-without-gradient", "warning")
def layer_without_gradient(steps: FirstSteps) -> Iterator[Said]:
    """A layer that wants gradients and had none, or only zeros, at each of the first 100 steps: it is not part of the
    loss, or detached from it.

    Source: torch's documentation, "Autograd mechanics" (detach and no_grad cut the graph).
    """
    if steps.norms < len(steps.rates):
        return
    trained = {name.rpartition(".")[0] for name, p in _named(steps.subject) if p}
    dead = [layer for layer, largest in steps.layers.items() if largest == 0 and layer in trained]
    if dead and len(dead) < len(steps.layers):
        some = ", ".join(dead[:3]) + (", ..." if len(dead) > 3 else "")
        fix = "look for detach(), no_grad() or a branch that the forward pass leaves out"
        yield steps.name, f"no gradient in {len(steps.rates)} steps: {some}", fix


@rule("schedule-free-with-scheduler", "warning")
def schedule_free_with_scheduler(steps: FirstSteps) -> Iterator[Said]:
    """A learning rate scheduler on a Schedule-Free optimizer, whose averaging takes its place.

    Source: Defazio et al. 2024, "The Road Less Scheduled"; the schedulefree package's README.
    """
    scheduled = [i for i, group in enumerate(steps.optimizer.param_groups) if "initial_lr" in group]
    if "ScheduleFree" in type(steps.optimizer).__name__ and scheduled and len({*steps.peaks}) > 1:
        yield steps.name, "its rate is scheduled", "drop the scheduler, and give warmup_steps"


def _named(subject: Subject) -> Iterator[tuple[str, bool]]:
    for name, p in () if subject.model is None else subject.model.named_parameters():
        yield name, p.requires_grad


def _wants_warm_up(steps: FirstSteps) -> bool:
    adam = isinstance(steps.optimizer, (optim.Adam, optim.AdamW, optim.NAdam))
    fresh = steps.first == 1
    return adam and fresh and steps.subject.has_attention and max(steps.peaks) >= LEAST_RATE_FOR_WARM_UP
