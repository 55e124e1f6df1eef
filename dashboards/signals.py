"""Panels of what the optimizer sees: loss, gradients, weights, rates, updates and moments of a whole model."""

from __future__ import annotations

from dashboards.colours import GRADIENT, LOSS, MOMENT, RATE, WEIGHT
from dashboards.panels import RUN, SELECTED, Query, Size, extremes, graph, whole
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as model

_HALF, _SHORT, _THIRD = Size(12, 9), Size(12, 7), Size(8, 7)
_NAMED = "{{run_id}} {{optimizer}}"


def loss_and_gradients() -> list[Builder[model.Panel]]:
    """How training goes, and the gradients that drive it."""
    return [
        graph(
            201,
            "Loss",
            "Good: falls, steeply at first, then along a straight line of this logarithmic axis. A gap is a NaN. "
            "A jump that does not come back asks for a rollback to the checkpoint before it. Of several ranks each has "
            "the loss of its own batches: dashed the highest and the lowest, which stay close.",
            Query(f"optwatch_loss{{{SELECTED}}}"),
            *extremes(f"optwatch_loss{{{RUN}}}"),
            unit="sci",
            colour=LOSS,
            size=_HALF,
            log=2,
            dashed="est rank$",
        ),
        graph(
            202,
            "Gradient norm, before and after clipping",
            "Good: a level band, warm-up apart. Where the dashed line (before clipping) stays above the solid one, "
            "every step is clipped and the clip value is the learning rate in disguise.",
            Query(whole("grad_norm", 'stage="at_step"', roots="gradient_squares"), _NAMED),
            Query(
                whole("grad_norm", 'stage="before_clip"', roots="gradient_before_clip_squares"), _NAMED + " before clip"
            ),
            unit="sci",
            colour=GRADIENT,
            size=_HALF,
            log=2,
            dashed="before clip",
        ),
        graph(
            203,
            "Validation and other reported values",
            "What the script gives to monitor.log(), dashed where it is no loss. Good: val_loss falls along with the "
            "loss; when it turns while the loss goes on falling, the model overfits.",
            Query(f"optwatch_reported{{{SELECTED}}}", "{{run_id}}/{{rank}} {{name}}"),
            unit="short",
            colour=LOSS,
            size=_THIRD,
            dashed=r" (?!\S*loss$)\S+$",
            no_value="Nothing was reported with monitor.log()",
        ),
        graph(
            204,
            "Cosine of gradient and first moment",
            "Good: positive and level. Near 0 the gradient is mostly noise (a larger batch would help); "
            "negative over many steps, the optimizer turns round: the learning rate is too high.",
            Query(whole("grad_moment_cosine"), _NAMED),
            unit="none",
            colour=GRADIENT,
            size=_THIRD,
            no_value="This optimizer keeps no first moment",
        ),
        graph(
            205,
            "Weight norm",
            "Good: grows slowly, then levels out where weight decay balances the updates. "
            "A drop is a bad resume or decay that is too strong.",
            Query(whole("weight_norm", roots="weight_squares"), _NAMED),
            unit="short",
            colour=WEIGHT,
            size=_THIRD,
        ),
    ]


def rates() -> list[Builder[model.Panel]]:
    """The rates that were set, beside the rate that acts and what it did to the weights."""
    return [
        graph(
            301,
            "Learning rate by group",
            "Good: the schedule you meant; groups after the first are dashed. A jump is a resume into another one.",
            Query(
                f"max by (run_id, optimizer, group) (optwatch_learning_rate{{{SELECTED}}})",
                "{{run_id}} {{optimizer}} group {{group}}",
            ),
            unit="sci",
            colour=RATE,
            size=_THIRD,
            minimum=0,
            dashed="group (?!0$)",
        ),
        graph(
            302,
            "Effective learning rate, quantiles over layers",
            "Learning rate over the root of the second moment: median, and dashed the 10% and 90% layers. Good: within "
            "two decades of each other. A 90% line that runs away is a layer whose gradients died.",
            Query(
                f"max by (run_id, optimizer, quantile) (optwatch_effective_learning_rate{{{RUN}}})",
                "{{run_id}} {{optimizer}} q{{quantile}}",
            ),
            unit="sci",
            colour=RATE,
            size=_THIRD,
            log=10,
            dashed="q0.[19]$",
            no_value="This optimizer keeps no second moment",
        ),
        graph(
            303,
            "Weight decay by group",
            "Good: constant, and 0 for biases and norms.",
            Query(
                f"max by (run_id, optimizer, group) (optwatch_weight_decay{{{SELECTED}}})",
                "{{run_id}} {{optimizer}} group {{group}}",
            ),
            unit="short",
            colour=WEIGHT,
            size=_THIRD,
            minimum=0,
            dashed="group (?!0$)",
        ),
        graph(
            304,
            "Update over weights",
            "What a step changed in the weights, measured, over their norm. Good: near a thousandth, and falling with "
            "the learning rate. Above the red line at a tenth the model is rewritten at every step; below 1e-8 it "
            "stands still.",
            Query(whole("update_ratio"), _NAMED),
            unit="sci",
            colour=RATE,
            size=_SHORT,
            log=10,
            limit=0.1,
            no_value="No update was measured yet",
        ),
        graph(
            305,
            "Update norm",
            "L2 norm of what a step changed in the weights, measured. Good: the shape of the learning rate. It jumps "
            "with a bad step even where clipping hides it from the gradient norm.",
            Query(whole("update_norm"), _NAMED),
            unit="sci",
            colour=RATE,
            size=_SHORT,
            log=10,
            no_value="No update was measured yet",
        ),
    ]


def moments() -> list[Builder[model.Panel]]:
    """What the optimizer remembers."""
    return [
        graph(
            401,
            "First moment norm",
            "Good: follows the gradient norm, smoothed. A collapse to 0 is momentum that was lost, as in a resume "
            "without optimizer state.",
            Query(whole("first_moment_norm", roots="first_moment_squares"), _NAMED),
            unit="sci",
            colour=MOMENT,
            size=_THIRD,
            log=10,
            no_value="This optimizer keeps no first moment",
        ),
        graph(
            402,
            "Second moment, mean and largest entry",
            "Good: level, a constant distance apart. The dashed largest entry jumps with a spike and "
            "decays over 1/(1-beta2) steps, in which the layers it hit hardly learn.",
            Query(whole("second_moment_mean", share="second_moment"), _NAMED + " mean"),
            Query(whole("second_moment_max"), _NAMED + " max"),
            unit="sci",
            colour=MOMENT,
            size=_THIRD,
            log=10,
            dashed=" max$",
            no_value="This optimizer keeps no second moment",
        ),
        graph(
            403,
            "Epsilon-dominated entries",
            "Share of entries whose update is scaled by epsilon and not by their own history. Good: a few percent. "
            "Above half (red line) Adam has become SGD: lower epsilon, or look for dead layers.",
            Query(whole("epsilon_dominated_ratio", share="epsilon_dominated_entries"), _NAMED),
            unit="percentunit",
            colour=MOMENT,
            size=_THIRD,
            limit=0.5,
            minimum=0,
            reach=0.1,
            no_value="This optimizer keeps no second moment",
        ),
    ]
