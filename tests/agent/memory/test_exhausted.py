"""When memory runs out, what held it is told by part, and on a GPU as the allocation fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim

from optwatch.lifecycle.ending import Outcome
from optwatch.lifecycle.failures import run_failed
from optwatch.memory.exhausted import parts


def test_parts_are_weights_gradients_state_and_the_rest() -> None:
    net = nn.Linear(10, 10)
    optimizer = optim.AdamW(net.parameters())
    assert parts([optimizer], 1000) == {"weights": 440, "gradients": 0, "optimizer_state": 0, "rest": 560}
    net(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    held = {"weights": 440, "gradients": 440, "optimizer_state": 888}
    assert parts([optimizer], None) == held
    assert parts([optimizer], 2000) == {**held, "rest": 232}
    assert parts([optimizer], 1000)["rest"] == 0


def test_an_allocation_that_fails_is_kept_with_what_it_asked_for(watch: Callable[..., Any]) -> None:
    """As CUDA's allocator calls it; on this machine nothing else does."""
    net = nn.Linear(10, 10)
    monitor = watch(optim.AdamW(net.parameters()))
    monitor.out_of_memory(2**31)
    kept = monitor._exhausted
    assert kept is not None
    event = run_failed(Outcome("failed", "OutOfMemoryError: ...", "out_of_memory"), 7, kept, "AdamW")
    assert event.details["asked_bytes"] == 2**31
    assert event.details["held_bytes"]["weights"] == 440
    assert "An allocation of 2.00 GiB did not fit" in event.likely
    assert monitor.faults.counts == {}


@pytest.mark.gpu
def test_a_gpu_that_runs_out_is_seen_as_it_happens(watch: Callable[..., Any]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    net = nn.Linear(1024, 1024, device="cuda")
    monitor = watch(optim.AdamW(net.parameters()))
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    assert monitor._exhausted.asked >= 2**50
    assert monitor._exhausted.parts["weights"] == 4 * (1024 * 1024 + 1024)
