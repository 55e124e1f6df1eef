"""torch.optim, and torch's ZeroRedundancyOptimizer by the optimizer inside it (see `wrappers`)."""

from __future__ import annotations

from .reader import NO_MOMENTUM, NO_SECOND, Denominator, Rate, Reader, RowsAndColumns, Unavailable, keys

ADAM = Reader(keys("exp_avg"), keys("max_exp_avg_sq", "exp_avg_sq"), Denominator(), step="step")
"""Kingma & Ba 2015, https://arxiv.org/abs/1412.6980, with AMSGrad's running maximum where there is one."""

READERS: dict[str, Reader] = {
    "torch.Adam": ADAM,
    "torch.AdamW": ADAM,
    "torch.NAdam": ADAM,
    "torch.SparseAdam": Reader(keys("exp_avg"), keys("exp_avg_sq"), Denominator(late_correction=True), step="step"),
    "torch.RAdam": Reader(
        keys("exp_avg"),
        keys("exp_avg_sq"),
        Denominator(rate=Unavailable("the step is rectified: early on it does not divide by the second moment at all")),
        step="step",
    ),
    "torch.Adamax": Reader(
        keys("exp_avg"), Unavailable("keeps an infinity norm instead of a second moment"), step="step"
    ),
    "torch.SGD": Reader(keys("momentum_buffer"), NO_SECOND),
    "torch.Muon": Reader(keys("momentum_buffer"), Unavailable("orthogonalises the momentum; keeps no second moment")),
    "torch.Adagrad": Reader(
        NO_MOMENTUM,
        keys("sum"),
        Denominator(beta2=None),
        step="step",
        unless={"lr_decay": "lr_decay divides the learning rate further"},
    ),
    "torch.RMSprop": Reader(
        keys("momentum_buffer"),
        keys("square_avg"),
        Denominator(beta2=None),
        step="step",
        unless={
            "centered": "the square of the mean gradient is taken off",
            "momentum": "a momentum multiplies the rate",
        },
    ),
    "torch.Adadelta": Reader(
        NO_MOMENTUM,
        keys("square_avg"),
        Unavailable("the rate is a ratio of two running averages, with epsilon inside both roots"),
        step="step",
    ),
    "torch.Adafactor": Reader(
        NO_MOMENTUM,
        RowsAndColumns("row_var", "col_var", "variance"),
        Unavailable("the update is clipped by its own root mean square, and epsilon bounds the variance from below"),
        step="step",
        rate=Rate(cap=True),
    ),
    "torch.ASGD": Reader(
        NO_MOMENTUM, NO_SECOND, step="step", rate=Unavailable("each tensor's rate eta decays by itself from lr")
    ),
    "torch.Rprop": Reader(
        NO_MOMENTUM, NO_SECOND, step="step", rate=Unavailable("each weight has a step size of its own, begun at lr")
    ),
    "torch.LBFGS": Reader(
        Unavailable("keeps a history of steps and gradients of all parameters in one flat vector"),
        NO_SECOND,
        grows=True,
    ),
}
