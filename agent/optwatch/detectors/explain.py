"""What each finding of a detector says to a person: what was seen, what is likely, and the runbook."""

from __future__ import annotations

from optwatch.events import Event
from optwatch.record import StepRecord

from .divergence import Divergence
from .drift import Drift
from .plateau import Plateau
from .schedule import Jump
from .spike import Spike
from .stall import Stall
from .validation import Regression


def fresh_state(record: StepRecord, resumed_from: str) -> Event:
    """A run that resumes with an optimizer that has forgotten everything."""
    return Event(
        kind="resumed_without_state",
        step=record.step,
        occurred_at=record.started,
        summary=f"The run resumes from {resumed_from}, but {record.optimizer} took step {record.step} with "
        "empty state: its moments and step count start from nothing.",
        likely="optimizer.load_state_dict() was not called, was called on another optimizer, or the checkpoint "
        "holds no optimizer state. Expect a loss spike: stop, load the state, start again from the checkpoint.",
        runbook="TrainingResumedWithoutState",
        details={"resumed_from": resumed_from, "optimizer": record.optimizer},
    )


def schedule_jump(record: StepRecord, jump: Jump) -> Event:
    """A learning rate that no schedule makes."""
    return Event(
        kind="schedule_jump",
        step=record.step,
        occurred_at=record.started,
        summary=f"The learning rate of group {jump.group} went from {jump.before:.3g} to {jump.after:.3g} "
        f"within one step, step {record.step}: more than it has ever been.",
        likely="A scheduler restored at the wrong step, stepped in the wrong unit, or a value off by powers of "
        "ten. If it is not meant, stop before the weights follow.",
        runbook="TrainingScheduleJump",
        details={"group": jump.group, "before": jump.before, "after": jump.after, "optimizer": record.optimizer},
    )


def spike(record: StepRecord, found: Spike, signal: str) -> Event:
    """A jump of the loss or the gradient norm (`signal`)."""
    words = {"loss": "Loss", "grad_norm": "Gradient norm"}[signal]
    rate = max(record.learning_rates, default=0.0)
    at_rate = f"; learning rate {rate:.3g}" if record.learning_rates else ""
    how = "has been too high for several steps" if found.lasting else "jumped"
    odds = f"as this run's own noise does once in {found.rarity:.2g} steps, " if not found.lasting else ""
    return Event(
        kind={"loss": "loss_spike", "grad_norm": "grad_spike"}[signal],
        step=record.step,
        occurred_at=record.started,
        summary=f"{words} {how}: {found.value:.4g} at step {record.step}, from a level of {found.level:.4g} "
        f"({odds}{found.deviations:.1f} robust standard deviations){at_rate}.",
        likely="A bad batch, or a learning rate or beta2 too high for where training is. It often recovers within some "
        "tens of steps; if not, roll back to a checkpoint before it and skip the batches.",
        runbook={"loss": "TrainingLossSpike", "grad_norm": "TrainingGradientSpike"}[signal],
        details={
            "signal": signal,
            "value": found.value,
            "level": found.level,
            "deviations": found.deviations,
            "rarity": found.rarity,
            "lasting": found.lasting,
            "learning_rate": rate,
            "optimizer": record.optimizer,
        },
    )


def drift(record: StepRecord, found: Drift) -> Event:
    """A loss that rises slowly."""
    return Event(
        kind="drift",
        step=record.step,
        occurred_at=record.started,
        summary=f"The level of the loss has risen from its best, {found.best:.4g} at step {found.began}, to "
        f"{found.level:.4g} at step {found.step} ({found.deviations:.1f} robust standard deviations of its noise), and "
        "no single step stood out.",
        likely="The beginning of a slow divergence (a rate too high for where training is, beta2 too high), or data "
        "that has become harder. Protect the newest checkpoint from before it; validation on a fixed set decides.",
        runbook="TrainingLossDrift",
        details={
            "signal": "loss",
            "began": found.began,
            "best": found.best,
            "level": found.level,
            "deviations": found.deviations,
            "learning_rate": max(record.learning_rates, default=0.0),
            "optimizer": record.optimizer,
        },
    )


def divergence(record: StepRecord, found: Divergence) -> Event:
    """A rise of the loss that has not come back."""
    return Event(
        kind="divergence",
        step=record.step,
        occurred_at=record.started,
        summary=f"The loss has not come back from its rise at step {found.began}: median {found.now:.4g} at "
        f"step {found.step}, {found.before:.4g} before it.",
        likely="Training has left the region it was in: a learning rate too high, a resume without optimizer state, or "
        "corrupt data. Steps from here on are wasted: roll back to a checkpoint before the rise.",
        runbook="TrainingDiverged",
        details={
            "signal": "loss",
            "began": found.began,
            "before": found.before,
            "now": found.now,
            "learning_rate": max(record.learning_rates, default=0.0),
            "optimizer": record.optimizer,
        },
    )


def plateau(record: StepRecord, found: Plateau) -> Event:
    """A loss that has stopped falling."""
    return Event(
        kind="plateau",
        step=record.step,
        occurred_at=record.started,
        summary=f"The loss has stopped falling: its level was at its best, {found.best:.4g}, at step {found.since}, "
        f"and has not been lower up to step {found.step}.",
        likely="The learning rate is too low or too high to get further, epsilon dominates the update, or there is no "
        "more to learn from this data. Going on unchanged buys nothing.",
        runbook="TrainingPlateau",
        details={"signal": "loss", "since": found.since, "best": found.best, "optimizer": record.optimizer},
    )


def validation_regression(step: int, at: float, found: Regression) -> Event:
    """A validation metric well behind its best; `at` in Unix seconds."""
    return Event(
        kind="validation_regression",
        step=step,
        occurred_at=at,
        summary=f"{found.metric} is {found.value:.4g} at step {step}, and its best was {found.best:.4g} at step "
        f"{found.best_step}: twice in a row well behind it.",
        likely="Overfitting where the training loss goes on falling; instability where it rises as well; a change of "
        "the evaluation itself where it does neither. Keep the checkpoint from the best evaluation.",
        runbook="TrainingValidationRegressed",
        details={"signal": found.metric, "value": found.value, "best": found.best, "best_step": found.best_step},
    )


def stall(step: int, at: float, found: Stall) -> Event:
    """No step for far longer than usual; `at` in Unix seconds."""
    usual = "no second step was seen" if found.usual is None else f"the usual interval is {found.usual:.3g} s"
    return Event(
        kind="stall",
        step=step,
        occurred_at=at,
        summary=f"No optimizer step for {found.seconds:.0f} s after step {step}; {usual}.",
        likely="A collective that waits for a rank which has stopped, a data loader that hangs, or a long evaluation. "
        "Take the stacks of all ranks before ending any.",
        runbook="TrainingStalled",
        details={"signal": "steps", "seconds": found.seconds, "usual_seconds": found.usual},
    )
