"""Training computes the same with and without the agent, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=3e-3, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
    "AdamW for-loop": lambda p: torch.optim.AdamW(p, lr=3e-3, foreach=False),
    "SGD Nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, foreach=True),
}


def train(make: Callable[[Any], torch.optim.Optimizer], attach: Callable[[torch.optim.Optimizer], Any]) -> list[bytes]:
    """200 steps with dropout, accumulation and clipping: the bits of every loss, and of the weights at the end."""
    torch.manual_seed(11)
    net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1), nn.LayerNorm(64), nn.Linear(64, 8))
    optimizer = make(net.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    attach(optimizer)
    bits = []
    for _ in range(200):
        for _ in range(2):
            loss = (net(torch.randn(16, 32)).square().mean() + 0.1) / 2
            loss.backward()
            bits.append(_bits(loss))
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return bits + [_bits(p) for p in net.parameters()]


def _bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().reshape(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize("sample_every", [1, 10])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_losses_and_weights_are_the_same_bits_over_200_steps(name: str, sample_every: int, watch: Any) -> None:
    without = train(OPTIMIZERS[name], lambda optimizer: None)
    monitors: list[Any] = []
    with_agent = train(OPTIMIZERS[name], lambda o: monitors.append(watch(o, sample_every=sample_every)))
    assert with_agent == without
    monitors[0].flush()
    assert monitors[0].snapshot()["optwatch_steps_total"] == 200
    assert not monitors[0].faults.counts
