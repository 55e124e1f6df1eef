"""Train a small transformer on Python's own standard library, as anybody would. The line that optwatch needs is marked.

python examples/train_transformer.py --steps 300
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from optwatch import attach

CONTEXT, WIDTH, HEADS, BLOCKS = 64, 128, 4, 4


class Block(nn.Module):
    """Attention and a multilayer perceptron, each behind a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention, self.norm_perceptron = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query_key_value, self.projection = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.expand, self.contract = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.query_key_value(self.norm_attention(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).reshape(batch, length, WIDTH))
        hidden: Tensor = functional.gelu(self.expand(self.norm_perceptron(x)))
        out: Tensor = x + self.contract(hidden)
        return out


class Transformer(nn.Module):
    """A decoder over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def corpus(limit: int = 4_000_000) -> Tensor:
    """The source text of the standard library, as bytes: real text that every machine with Python has."""
    library = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(library.glob("*.py")))[:limit]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--warmup", type=int, default=40)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--pause", type=float, default=0.0, help="seconds to wait after each step, to watch it in peace"
    )
    parser.add_argument(
        "--break-at", type=int, help="set the learning rate to 1e20 from this step on, which ends in NaN"
    )
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    data = corpus()
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)

    def factor(step: int) -> float:
        if options.break_at is not None and step + 1 >= options.break_at:
            return 1e20 / float(options.learning_rate)
        if step < options.warmup:
            return (step + 1) / float(options.warmup)
        done = (step - options.warmup) / max(1, options.steps - options.warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    attach(optimizer)  # <- the one line

    began = time.perf_counter()
    for step in range(1, options.steps + 1):
        total = 0.0
        for _ in range(options.accumulate):
            starts = torch.randint(len(data) - CONTEXT - 1, (options.batch, 1))
            tokens = data[starts + torch.arange(CONTEXT + 1)]
            logits = model(tokens[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / options.accumulate
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        time.sleep(options.pause)
        if step % 25 == 0 or step == 1:
            rate = step / (time.perf_counter() - began)
            print(f"step {step:4d}  loss {total:.4f}  {rate:.1f} steps/s", flush=True)


if __name__ == "__main__":
    main()
