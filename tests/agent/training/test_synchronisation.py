"""The training thread never waits for a device because of the agent."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from optwatch.training.transfer import host_place, numbers


class Counted(TorchDispatchMode):
    """Counts what would wait for a device: reading a value into Python, and copies towards the CPU."""

    WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::item")

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        name = func._schema.name
        if name in self.WAITS:
            self.waits[name] += 1
        result = func(*args, **(kwargs or {}))
        if name in ("aten::_to_copy", "aten::copy_") and _goes_to_host(name, args, result):
            self.waits[name] += 1
        return result


def _goes_to_host(name: str, args: Any, result: Any) -> bool:
    source = args[1] if name == "aten::copy_" else args[0]
    target = args[0] if name == "aten::copy_" else result
    return bool(source.device.type != "cpu" and target.device.type == "cpu")


OPTIMIZERS = {
    "AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    "SGD Nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
}


def count(name: str, attach: Any, steps: int = 25) -> Counted:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 300), nn.Tanh(), nn.Linear(300, 300), nn.Linear(300, 1))
    optimizer = OPTIMIZERS[name](net.parameters())
    attach(optimizer)
    with Counted() as counted:
        for _ in range(steps):
            for _ in range(2):
                (net(torch.randn(8, 16)).square().mean() / 2).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    return counted


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_agent_adds_no_wait_to_a_step(name: str, watch: Any) -> None:
    without = count(name, lambda optimizer: None)
    monitors: list[Any] = []
    with_agent = count(name, lambda optimizer: monitors.append(watch(optimizer, sample_every=5)))
    assert with_agent.calls > without.calls  # the mode does see what the agent launches
    assert with_agent.waits == without.waits
    assert monitors[0].flush()
    assert monitors[0].snapshot()["optwatch_steps_total"] == 25
    assert not monitors[0].faults.counts


def test_logging_a_tensor_adds_no_wait(watch: Any) -> None:
    parameter = nn.Parameter(torch.ones(3))
    monitor = watch(torch.optim.SGD([parameter], lr=0.1))
    with Counted() as counted:
        monitor.log(val_loss=(parameter * 2).sum(), tokens=5)
    assert not counted.waits
    monitor.flush()
    assert monitor.snapshot()['optwatch_reported{name="val_loss"}'] == 6
    assert monitor.snapshot()["optwatch_tokens_total"] == 5


def test_numbers_for_a_device_are_made_on_the_host_whatever_the_default_device_is() -> None:
    with torch.device("meta"):  # with "cuda" the copy would be made, and waited for, within torch.tensor
        assert numbers([1, 2], torch.int64, torch.device("cpu")).tolist() == [1, 2]
        assert host_place(2, torch.float64, torch.device("cpu")).tolist() == [0, 0]


def test_the_count_can_fail() -> None:
    with Counted() as counted:
        float(torch.ones(1).sum())
    assert counted.waits == {"aten::_local_scalar_dense": 1}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_step_never_synchronises(watch: Any) -> None:
    net = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 1)).cuda()
    optimizer = torch.optim.AdamW(net.parameters())
    monitor = watch(optimizer, sample_every=5)
    x = torch.randn(32, 64, device="cuda")
    for step in range(1005):
        if step == 5:
            torch.cuda.set_sync_debug_mode("error")
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.set_sync_debug_mode("default")
    assert monitor.flush(30)
    assert not monitor.faults.counts
