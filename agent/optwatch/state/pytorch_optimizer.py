"""The package pytorch-optimizer (https://pypi.org/project/pytorch-optimizer), version 4: each of its optimizers.

Wrappers of it (Lookahead, SAM and the like) are in `wrappers`: what is read is the optimizer inside.
"""

from __future__ import annotations

from .reader import (
    NO_MOMENTUM,
    NO_SECOND,
    Broadcast,
    Companded,
    Denominator,
    Either,
    Nested,
    Rate,
    Reader,
    RowsAndColumns,
    Subspace,
    Unavailable,
    keys,
)

FIRST = keys("exp_avg")
SECOND = keys("max_exp_avg_sq", "exp_avg_sq")
EARLY = Denominator()
LATE = Denominator(late_correction=True)
PLAIN = Denominator(beta2=None)
RECTIFY = {"rectify": "the step is rectified"}
STABLE = {"stable_adamw": "the rate is divided by the root mean square of the update"}
SIGN = Unavailable("steps along the sign of the momentum; keeps no second moment")
ORTHOGONAL = Unavailable("orthogonalises the momentum")
SEARCHED = Rate(("d", "lr"))
"""The distance estimate d that the step began with, times lr."""


def scaled(reason: str, late: bool = False, beta2: str | None = "betas.1", epsilon: str = "eps") -> Denominator:
    """A denominator whose step has further factors: the share below ε is exact, the rate of a weight's step is not."""
    return Denominator(beta2, epsilon, late, Unavailable(reason))


def adam(denominator: Denominator | Unavailable = EARLY, **more: object) -> Reader:
    """exp_avg and exp_avg_sq (or its running maximum), with the step count in the group."""
    return Reader(FIRST, SECOND, denominator, step="step", **more)  # type: ignore[arg-type]


def momentum(key: str, second: Unavailable = NO_SECOND, **more: object) -> Reader:
    """One momentum and no second moment."""
    return Reader(keys(key), second, step="step", **more)  # type: ignore[arg-type]


LOW_RANK = Reader(
    Either((FIRST, Subspace("exp_avg"))),
    Either((SECOND, Subspace("exp_avg_sq"))),
    LATE,
    step="step",
    unless={"rank": "the step is projected back from a subspace of low rank"},
)
MUON = Reader(
    keys("momentum_buffer", "exp_avg"),
    keys("exp_avg_sq"),
    EARLY,
    step="step",
)
"""Parameters of groups with use_muon keep a momentum only, the others are AdamW's."""

_TABLE: dict[str, Reader] = {
    "A2Grad": Reader(
        keys("avg_grad"),
        Unavailable("keeps one number a tensor for the gradient's noise"),
        step="step",
        rate=Unavailable("takes no learning rate: its step comes from a Lipschitz constant"),
        averages="all gradients so far",
    ),
    "ADOPT": adam(
        Unavailable("divides by the second moment of the steps before, and at least by epsilon"),
        averages="normalised gradients",
    ),
    "ASGD": Reader(NO_MOMENTUM, NO_SECOND, rate=Rate(after=True)),
    "AccSGD": Reader(Unavailable("keeps an average of weights, not of gradients"), NO_SECOND, step="step"),
    "AdEMAMix": adam(EARLY, unless=STABLE),
    "AdaBelief": Reader(
        FIRST, keys("max_exp_avg_var", "exp_avg_var"), EARLY, step="step", unless=RECTIFY | {"ams_bound": "bounded"}
    ),
    "AdaBound": adam(scaled("the rate is clipped between two bounds", late=True)),
    "AdaDelta": Reader(
        NO_MOMENTUM,
        keys("square_avg"),
        Unavailable("the rate is a ratio of two running averages, with epsilon inside both roots"),
        step="step",
    ),
    "AdaFactor": Reader(
        FIRST,
        RowsAndColumns("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"),
        Unavailable("the update is clipped by its own root mean square, and epsilon is added to the squared gradient"),
        step="step",
        averages="updates",
        rate_unless={
            "relative_step": "derived in the step from its number",
            "scale_parameter": "scaled by each weight",
        },
    ),
    "AdaGC": adam(EARLY, averages="clipped gradients"),
    "AdaGO": MUON,
    "AdaHessian": Reader(
        FIRST, Unavailable("keeps an average of squared estimates of the Hessian's diagonal"), step="step"
    ),
    "AdaLOMO": Reader(
        Unavailable("updates weights inside backward() and keeps no moving average"),
        Unavailable("its factors are attributes of the optimizer, not state, and it never runs step()"),
        rate=Unavailable("the rate is an argument of fused_backward()"),
    ),
    "AdaMax": Reader(FIRST, Unavailable("keeps an infinity norm instead of a second moment"), step="step"),
    "AdaMod": adam(scaled("each weight's rate is bounded by its own average", late=True)),
    "AdaMuon": Reader(keys("m", "exp_avg"), keys("exp_avg_sq"), EARLY, step="step"),
    "AdaNorm": Reader(FIRST, keys("max_exp_avg_var", "exp_avg_var"), LATE, step="step"),
    "AdaPNM": Reader(
        Unavailable("two moving averages take turns, and the step combines them"),
        SECOND,
        scaled("the step amplifies two momenta", late=True),
        step="step",
    ),
    "AdaShift": Reader(
        FIRST,
        Unavailable("the second moment lags by keep_num steps and is reduced over each tensor"),
        step="step",
        grows=True,
        averages="the last keep_num gradients",
    ),
    "AdaSmooth": Reader(
        NO_MOMENTUM,
        keys("exp_avg_sq"),
        Unavailable("epsilon is added inside the root, and the decay rate is another one for each weight"),
        step="step",
    ),
    "AdaTAM": adam(PLAIN, averages="damped gradients"),
    "Adai": adam(
        Unavailable("the second moment sets each weight's momentum; it does not divide the step"),
    ),
    "Adalite": Reader(
        Unavailable("the momentum is a product of three factors"),
        Unavailable("the second moment is a product of factors of another kind than Adafactor's"),
        step="step",
    ),
    "AdamC": adam(LATE),
    "AdamG": Reader(keys("m"), keys("v"), EARLY, step="step", rate=Rate(cap=True), averages="golden-step gradients"),
    "AdamMini": Reader(
        keys("m"),
        Either((keys("v"), Broadcast("v_mean"))),
        EARLY,
        step="step",
    ),
    "AdamP": adam(LATE),
    "AdamS": adam(EARLY),
    "AdamWSN": adam(scaled("the second moment is of norms over subsets", late=True)),
    "Adan": Reader(FIRST, keys("exp_avg_sq"), Denominator("betas.2"), step="step"),
    "AggMo": Reader(Unavailable("keeps several momenta, one for each beta"), NO_SECOND, step="step"),
    "Aida": Reader(FIRST, keys("max_exp_avg_var", "exp_avg_var"), LATE, step="step", unless=RECTIFY),
    "Alice": Reader(
        Subspace("m"), Subspace("v"), Unavailable("divides in a subspace, and adds a compensation"), step="step"
    ),
    "AliG": Reader(
        keys("momentum_buffer"),
        NO_SECOND,
        step="step",
        rate=Unavailable("the step size is the loss over the squared gradient norm, and the group holds a bound only"),
    ),
    "Amos": Reader(
        FIRST,
        Broadcast("exp_avg_sq"),
        Unavailable("the step is scaled by the size of each tensor and by a decay of its own"),
        step="step",
        averages="updates",
    ),
    "Ano": adam(EARLY),
    "APOLLO": Reader(
        Either((FIRST, Subspace("exp_avg"))),
        Either((SECOND, Subspace("exp_avg_sq"))),
        LATE,
        step="step",
        unless={"rank": "the step is the gradient, scaled by what a random subspace shows"},
    ),
    "ApolloDQN": Reader(
        keys("exp_avg_grad"), Unavailable("keeps an estimate of the Hessian's diagonal, which has signs"), step="step"
    ),
    "AvaGrad": adam(Unavailable("divides by the second moment of the step before")),
    "BCOS": Reader(
        keys("m"),
        Unavailable("the second moment is derived from the momentum in the step"),
        step="step",
    ),
    "BSAM": Reader(
        Unavailable("its momentum includes a prior and is of gradients at perturbed weights"),
        Unavailable("keeps a precision of the posterior, not a second moment"),
        step="step",
    ),
    "CAME": Reader(
        FIRST,
        RowsAndColumns("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"),
        Unavailable("the update is clipped by its own root mean square, and epsilon is added to the squared gradient"),
        step="step",
        averages="updates",
    ),
    "Conda": Reader(FIRST, Unavailable("is in a rotated basis, kept in a helper object"), step="step"),
    "DAdaptAdaGrad": Reader(
        Unavailable("keeps a weighted sum of gradients for dual averaging"),
        Unavailable("keeps a weighted sum of squares"),
        step="k",
        rate=SEARCHED,
    ),
    "DAdaptAdam": adam(
        scaled("the learning rate is a factor of the first moment already", late=True, beta2=None),
        rate=SEARCHED,
        averages="gradients times the learning rate",
    ),
    "DAdaptAdan": Reader(
        FIRST,
        Unavailable("the package averages fourth powers under exp_avg_sq"),
        step="step",
        rate=SEARCHED,
        averages="gradients times the learning rate",
    ),
    "DAdaptLion": momentum("exp_avg", SIGN, rate=SEARCHED, averages="gradients times the learning rate"),
    "DAdaptSGD": Reader(
        Unavailable("keeps averaged weights instead of a moving average of gradients"),
        NO_SECOND,
        step="step",
        rate=Unavailable("d times lr over the norm of the first gradient"),
    ),
    "DASH": Reader(
        Nested("blocks", "exp_avg"),
        Unavailable("preconditions with matrices; exp_avg_sq serves grafting only"),
        step="step",
        grows=True,
    ),
    "DeMo": Reader(Unavailable("keeps what its compression has left out"), NO_SECOND, step="step"),
    "DiffGrad": adam(LATE, unless=RECTIFY),
    "DistributedMuon": MUON,
    "DualAdam": adam(scaled("early steps also multiply by the denominator")),
    "EXAdam": adam(Unavailable("corrects the second moment by the first")),
    "EmoFact": Reader(
        FIRST,
        Unavailable("its factors are of rows and columns of another kind than Adafactor's"),
        step="step",
    ),
    "EmoLynx": momentum("exp_avg", SIGN),
    "EmoNavi": adam(scaled("a measure of the loss scales the rate", beta2=None)),
    "FAdam": Reader(
        keys("momentum"),
        keys("fim"),
        Unavailable("epsilon follows the size of the gradient, and the update is clipped"),
        step="step",
        averages="normalised gradients",
    ),
    "FOCUS": momentum("exp_avg", SIGN),
    "FTRL": Reader(
        NO_MOMENTUM, keys("n"), Unavailable("follows the regularised leader: the step is not a rate times a gradient")
    ),
    "Fira": LOW_RANK,
    "FlashAdamW": Reader(
        Companded("exp_avg", root=False),
        Companded("exp_avg_sq", root=True),
        EARLY,
        step="step",
    ),
    "Fromage": Reader(NO_MOMENTUM, NO_SECOND, step="step"),
    "GaLore": LOW_RANK,
    "Grams": adam(EARLY),
    "Gravity": momentum("v", averages="bounded gradients"),
    "GrokFastAdamW": adam(
        Unavailable("divides by the root of the second moment, but at least by epsilon"),
        averages="gradients with their slow part amplified",
    ),
    "Kate": Reader(
        NO_MOMENTUM,
        Unavailable("keeps the root of a sum of squares and a sum of its ratios"),
        step="step",
    ),
    "Kron": momentum("momentum_buffer", Unavailable("preconditions with Kronecker factors; keeps no second moment")),
    "LARS": momentum("momentum_buffer", averages="gradients times a trust ratio"),
    "LOMO": Reader(
        Unavailable("updates weights inside backward() and keeps no state"),
        NO_SECOND,
        rate=Unavailable("the rate is an argument of fused_backward()"),
    ),
    "LaProp": Reader(
        FIRST,
        SECOND,
        Unavailable("the gradient is divided before it is averaged"),
        step="step",
        averages="normalised gradients times the learning rate",
    ),
    "Lamb": adam(
        scaled("a trust ratio scales each tensor's step", late=True, beta2=None), averages="clipped gradients"
    ),
    "Lion": momentum("exp_avg", SIGN),
    "LoRARite": Reader(
        Unavailable("the moments are in a basis of the low-rank pair"),
        Unavailable("keeps matrices of second moments in a basis of the low-rank pair"),
        step="step",
    ),
    "MADGRAD": Reader(
        Unavailable("keeps a weighted sum of gradients for dual averaging"),
        Unavailable("keeps a weighted sum of squares, of which it takes the cube root"),
    ),
    "MARS": adam(
        Unavailable("matrices and vectors have other rates and decay rates in one group"),
        averages="gradients with their change amplified",
    ),
    "MSVAG": adam(Unavailable("the second moment scales a variance correction; it does not divide the step")),
    "Muon": MUON,
    "MuonClip": MUON,
    "Nero": Reader(
        NO_MOMENTUM,
        Broadcast("exp_avg_sq"),
        Denominator("beta", rate=Unavailable("the step is scaled by the size of each neuron's weights")),
        step="step",
    ),
    "NorMuon": MUON,
    "NovoGrad": Reader(
        keys("moments"),
        Unavailable("keeps one squared norm a tensor"),
        step="step",
        averages="normalised gradients",
    ),
    "PAdam": adam(scaled("the denominator is raised to the power partial", late=True)),
    "PID": momentum("i_buffer"),
    "PNM": Reader(Unavailable("two moving averages take turns, and the step combines them"), NO_SECOND, step="step"),
    "Prodigy": adam(
        Unavailable("moments and epsilon carry the distance estimate, which changes with each step"),
        rate=SEARCHED,
        averages="gradients times the distance estimate",
    ),
    "QHAdam": adam(PLAIN, averages="gradients, corrected for its bias"),
    "QHM": momentum("momentum_buffer"),
    "RACS": Reader(
        NO_MOMENTUM,
        Unavailable("keeps row and column means that scale, not a second moment of each weight"),
        step="step",
    ),
    "RAdam": adam(scaled("the step is rectified: early on it does not divide by the second moment", late=True)),
    "ROSE": Reader(NO_MOMENTUM, NO_SECOND, step="step"),
    "Ranger": adam(
        scaled("the step is rectified: early on it does not divide by the second moment", late=True),
        averages="centralised gradients",
    ),
    "Ranger21": Reader(
        Unavailable("two moving averages take turns, and the step combines them"),
        Unavailable("it is of gradients that the step has clipped, centralised and normalised"),
        step="step",
        rate=Unavailable("the step warms the rate up and down by itself"),
    ),
    "SCION": momentum("d", ORTHOGONAL),
    "SCIONLight": Reader(Unavailable("keeps its momentum in the gradients"), NO_SECOND, step="step"),
    "SGDP": momentum("momentum"),
    "SGDSaI": momentum("momentum_buffer"),
    "SGDW": momentum("momentum_buffer"),
    "SM3": Reader(
        keys("momentum_buffer"),
        Unavailable("keeps the largest sum of squares of each row and column, a bound on the second moment"),
        step="step",
        averages="updates",
    ),
    "SOAP": Reader(
        FIRST,
        Subspace("exp_avg_sq"),
        Unavailable("divides in a rotated basis"),
        step="step",
        grows=True,
    ),
    "SPAM": Reader(
        Either((FIRST, Subspace("exp_avg"))),
        Either((SECOND, Subspace("exp_avg_sq"))),
        scaled("the step is warmed up again after each reset", late=True),
        step="step",
        averages="clipped gradients",
    ),
    "SPlus": momentum("momentum", Unavailable("preconditions with matrices and steps along a sign")),
    "SRMM": momentum("mov_avg_grad"),
    "SWATS": Reader(
        keys("momentum_buffer", "exp_avg"),
        SECOND,
        scaled("the optimizer switches to SGD", late=True),
        step="step",
    ),
    "SaRA": Reader(
        Subspace("exp_avg"), Subspace("exp_avg_sq"), Unavailable("trains the masked entries only"), step="step"
    ),
    "ScalableShampoo": momentum("momentum", Unavailable("preconditions with matrices in helper objects"), grows=True),
    "ScheduleFreeAdamW": Reader(
        Unavailable("keeps averaged weights instead of a moving average of gradients"),
        keys("exp_avg_sq"),
        EARLY,
        step="step",
        unless={"ams_bound": "the running maximum is of corrected second moments"},
        rate_unless={"warmup_steps": "the step warms the rate up by itself"},
    ),
    "ScheduleFreeRAdam": Reader(
        Unavailable("keeps averaged weights instead of a moving average of gradients"),
        keys("exp_avg_sq"),
        scaled("the step is rectified: early on it does not divide by the second moment"),
        step="step",
        rate=Unavailable("the step rectifies the rate by itself"),
    ),
    "ScheduleFreeSGD": Reader(
        Unavailable("keeps averaged weights instead of a moving average of gradients"),
        NO_SECOND,
        step="step",
        rate_unless={"warmup_steps": "the step warms the rate up by itself"},
    ),
    "Shampoo": momentum(
        "momentum_buffer", Unavailable("preconditions with matrices; keeps no second moment"), averages="updates"
    ),
    "SignSGD": momentum("momentum_buffer", SIGN),
    "SimplifiedAdEMAMix": adam(
        scaled("the bias is corrected by running sums of its own"),
    ),
    "SophiaH": Reader(
        keys("momentum"),
        Unavailable("keeps an estimate of the Hessian's diagonal, not a second moment"),
        step="step",
    ),
    "SpectralSphere": momentum("momentum_buffer", ORTHOGONAL),
    "StableAdamW": adam(
        scaled("the rate is divided by the root mean square of the update", beta2=None),
        averages="gradients, corrected for its bias",
    ),
    "StableSPAM": adam(EARLY, averages="clipped and normalised gradients"),
    "TAM": momentum("momentum_buffer", averages="damped gradients"),
    "Tiger": momentum("exp_avg", SIGN),
    "VSGD": Reader(
        Unavailable("infers the gradient from a model of its noise, instead of an average"),
        Unavailable("keeps rates of two Gamma distributions, not a second moment"),
        step="step",
    ),
    "Yogi": adam(EARLY),
}

READERS: dict[str, Reader] = {f"pytorch_optimizer.{name}": reader for name, reader in _TABLE.items()}
