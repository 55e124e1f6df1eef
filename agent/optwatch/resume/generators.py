"""States of the random generators, and whether one has been restored, however much was drawn since.

A first step comes after a first batch and its dropout: by then a restored generator is further on than it was saved. So
what is asked is whether its present state can be *reached* from the saved one. Mersenne Twisters (torch's on a CPU,
Python's, NumPy's legacy one) go from block to block of 624 words, and the present block is looked for among those that
follow the saved one; a CUDA generator counts its draws itself.
"""

from __future__ import annotations

import base64
import random
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

WORDS = 624
"""Words of a Mersenne Twister's block (Matsumoto & Nishimura 1998)."""
STATE_BYTES = 5056
"""Of torch's CPU generator: seed, words left, whether seeded, next word, 624 words of 64 bits, a cached normal."""
MOST_DRAWS = 2**27
"""How far a generator may have gone between its restoration and the first step: half a second of looking."""
CHUNK = 1024
"""Blocks looked at in one go."""
SIGNATURE = 4
"""Words that a block is recognised by."""


@dataclass(frozen=True, slots=True)
class State:
    """Where one generator is."""

    block: bytes
    """The 624 words, little-endian; of a CUDA generator its seed."""
    position: int
    """Words of the block used up; of a CUDA generator its offset."""

    def text(self) -> str:
        """The state as a sidecar holds it."""
        return f"{self.position}:{base64.b64encode(self.block).decode()}"

    @classmethod
    def from_text(cls, text: str) -> State:
        """The inverse of `text`.

        Raises:
            ValueError: the text is no state.
        """
        position, _, block = text.partition(":")
        return cls(base64.b64decode(block, validate=True), int(position))


def states() -> dict[str, State]:
    """The states of the generators that training draws from, by name: ``torch``, ``python``, ``numpy``, ``cuda:0``.

    Draws nothing and waits for no device. NumPy's only where it has been imported; the CUDA devices' only once they are
    in use. What has a form that is not known here is left out.
    """
    found = {}
    torch_state = bytes(torch.get_rng_state().tolist())
    if len(torch_state) == STATE_BYTES:
        left, _, position = struct.unpack_from("<iiQ", torch_state, 8)
        words = struct.unpack_from(f"<{WORDS}Q", torch_state, 24)
        # With one word left the next draw makes the next block.
        found["torch"] = State(struct.pack(f"<{WORDS}I", *words), WORDS if left == 1 else position)
    version, internal, _ = random.getstate()
    if version == 3:
        found["python"] = State(struct.pack(f"<{WORDS}I", *internal[:WORDS]), internal[WORDS])
    if (numpy := sys.modules.get("numpy")) is not None:
        kind, words, position, *_ = numpy.random.get_state()
        if kind == "MT19937":
            found["numpy"] = State(words.astype("<u4").tobytes(), int(position))
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch has no types for it
        for index in range(torch.cuda.device_count()):
            state = bytes(torch.cuda.get_rng_state(index).tolist())
            if len(state) == 16:
                found[f"cuda:{index}"] = State(state[:8], struct.unpack_from("<q", state, 8)[0])
    return found


def used(before: Mapping[str, State], now: Mapping[str, State]) -> dict[str, State]:
    """The present states of those generators that have moved: what nobody draws from, nobody has to restore."""
    return {name: state for name, state in now.items() if before.get(name) != state}


def reachable(saved: State, now: State, most_draws: int = MOST_DRAWS) -> bool:
    """Whether a generator at `saved` comes to `now` within about `most_draws` further draws. CPU only; no global
    generator is touched. Time is that of the draws: 4 ns each on one core.
    """
    if saved.block == now.block:
        return now.position >= saved.position
    if len(saved.block) != 4 * WORDS or len(now.block) != 4 * WORDS:
        return False  # a CUDA generator with another seed
    wanted = _generator(now.block, next_block=False)
    signature = _draws(wanted, SIGNATURE)
    generator = _generator(saved.block, next_block=True)
    for done in range(0, most_draws, CHUNK * WORDS):
        blocks = min(CHUNK, -(-(most_draws - done) // WORDS))
        first = _draws(generator, blocks * WORDS).view(-1, WORDS)[:, :SIGNATURE]
        if bool((first == signature).all(dim=1).any()):
            return True
    return False


def _generator(block: bytes, *, next_block: bool) -> torch.Generator:
    """A generator of its own that stands at the first word of this block, or of the one after it."""
    generator = torch.Generator()
    state = bytearray(generator.get_state().tolist())
    struct.pack_into("<iiQ", state, 8, 1 if next_block else WORDS, 1, 0)
    struct.pack_into(f"<{WORDS}Q", state, 24, *struct.unpack(f"<{WORDS}I", block))
    return generator.set_state(torch.frombuffer(state, dtype=torch.uint8))


def _draws(generator: torch.Generator, count: int) -> Tensor:
    """The next `count` words, without their highest bit: shape ``(count,)``, int32."""
    return torch.empty(count, dtype=torch.int32).random_(generator=generator)
