"""bitsandbytes: float32 state, or 8-bit codes in blocks of 256 for parameters of 4096 entries and more."""

from __future__ import annotations

from .reader import NO_MOMENTUM, NO_SECOND, BlockWise, Denominator, Reader, Unavailable

ADAM = Reader(BlockWise(1), BlockWise(2), Denominator(), step="step")
ADEMAMIX = Reader(BlockWise(1, layer=0), BlockWise(2), Denominator(), step="step")
"""state1 holds the fast moving average, then the slow one."""
ADAGRAD = Reader(NO_MOMENTUM, BlockWise(1), Denominator(beta2=None), step="step")
RMSPROP = Reader(NO_MOMENTUM, BlockWise(1), Denominator(beta2=None), step="step")
MOMENTUM = Reader(BlockWise(1), NO_SECOND, step="step")
LAMB = Reader(
    BlockWise(1),
    BlockWise(2),
    Denominator(rate=Unavailable("a trust ratio scales each tensor's step")),
    step="step",
)

_KINDS: dict[str, Reader] = {
    "Adam": ADAM,
    "AdamW": ADAM,
    "AdEMAMix": ADEMAMIX,
    "Adagrad": ADAGRAD,
    "LAMB": LAMB,
    "LARS": MOMENTUM,
    "Lion": MOMENTUM,
    "RMSprop": RMSPROP,
    "SGD": MOMENTUM,
}

READERS: dict[str, Reader] = {
    f"bitsandbytes.{paged}{kind}{bits}": reader
    for kind, reader in _KINDS.items()
    for paged in ("", "Paged")
    for bits in ("", "8bit", "32bit")
} | {"bitsandbytes.PytorchLARS": Reader(BlockWise(1), NO_SECOND)}
