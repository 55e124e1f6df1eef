"""Packages with a handful of optimizers: schedulefree, lion-pytorch, transformers, torchao."""

from __future__ import annotations

from .reader import NO_SECOND, Denominator, Rate, Reader, RowsAndColumns, Unavailable, keys
from .torch_optim import ADAM

AVERAGED = Unavailable("keeps averaged weights instead of a moving average of gradients")
SCHEDULED = Rate(("scheduled_lr",), after=True)
"""schedulefree sets the warmed-up rate in the step itself."""
SCHEDULE_FREE_ADAM = Reader(AVERAGED, keys("exp_avg_sq"), Denominator(), step="k", rate=SCHEDULED)
SCHEDULE_FREE_SGD = Reader(AVERAGED, NO_SECOND, step="k", rate=SCHEDULED)
RECTIFIED = Reader(
    AVERAGED,
    keys("exp_avg_sq"),
    Denominator(rate=Unavailable("the step is rectified: early on it does not divide by the second moment at all")),
    step="k",
    rate=SCHEDULED,
)

SCHEDULEFREE: dict[str, Reader] = {
    "schedulefree.AdamWScheduleFree": SCHEDULE_FREE_ADAM,
    "schedulefree.AdamWScheduleFreeClosure": SCHEDULE_FREE_ADAM,
    "schedulefree.AdamWScheduleFreePaper": Reader(
        # Its scheduled_lr has the correction of the bias in it already.
        AVERAGED,
        keys("exp_avg_sq"),
        Denominator(beta2=None),
        step="k",
        rate=SCHEDULED,
    ),
    "schedulefree.AdamWScheduleFreeReference": SCHEDULE_FREE_ADAM,
    "schedulefree.RAdamScheduleFree": RECTIFIED,
    "schedulefree.RAdamScheduleFreeClosure": RECTIFIED,
    "schedulefree.SGDScheduleFree": SCHEDULE_FREE_SGD,
    "schedulefree.SGDScheduleFreeClosure": SCHEDULE_FREE_SGD,
    "schedulefree.SGDScheduleFreeReference": SCHEDULE_FREE_SGD,
}
"""Defazio et al. 2024, https://arxiv.org/abs/2405.15682. The parameters hold y, not the averaged x."""

LION = Reader(keys("exp_avg"), Unavailable("steps along the sign of the momentum; keeps no second moment"))
LION_PYTORCH: dict[str, Reader] = {"lion_pytorch.Lion": LION}
"""Chen et al. 2023, https://arxiv.org/abs/2302.06675."""

TRANSFORMERS: dict[str, Reader] = {
    "transformers.Adafactor": Reader(
        keys("exp_avg"),
        RowsAndColumns("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"),
        Unavailable("the update is clipped by its own root mean square, and epsilon is added to the squared gradient"),
        step="step",
        rate=Rate(),
        averages="updates",
        rate_unless={"relative_step": "derived in the step from its number and the size of each weight"},
    ),
}

TORCHAO: dict[str, Reader] = dict.fromkeys(
    (
        "torchao.Adam8bit",
        "torchao.Adam4bit",
        "torchao.AdamFp8",
        "torchao.AdamW8bit",
        "torchao.AdamW4bit",
        "torchao.AdamWFp8",
        "torchao._AdamW",
    ),
    ADAM,
)
"""States of 4096 entries and more are quantized, and read block by block."""
