"""Several devices in one optimizer: each reduces its own, and the numbers meet on one of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from optwatch import Monitor
from optwatch.parallel.reducers import DeviceReducers
from optwatch.training.statistics import Reducer

CPU = torch.device("cpu")


def test_one_device_is_reduced_as_by_its_own_reducer() -> None:
    tensors = [torch.arange(6.0).reshape(2, 3), torch.empty(0), torch.full((5,), 1e-3)]
    limits = torch.tensor([2.5, 1.0, 1e-2], dtype=torch.float64)
    several, one = DeviceReducers([CPU]), Reducer(CPU)
    assert several.square_sums(tensors).tolist() == one.square_sums(tensors).tolist()
    assert several.dot_products(tensors, tensors).tolist() == one.dot_products(tensors, tensors).tolist()
    assert several.nonnegative(tensors, limits).tolist() == one.nonnegative(tensors, limits).tolist()
    assert several.nonnegative(tensors, None).tolist() == one.nonnegative(tensors, None).tolist()
    assert several.square_sums([]).shape == (0,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_parameters_on_host_and_device_make_one_norm_without_waiting(watch: Callable[..., Monitor]) -> None:
    parameters = [torch.nn.Parameter(torch.ones(4, device=device)) for device in ("cpu", "cuda", "cpu")]
    optimizer = torch.optim.AdamW(parameters, foreach=False)
    monitor = watch(optimizer, sample_every=1)
    for step in range(2):
        for scale, p in enumerate(parameters, start=1 + step):
            p.grad = torch.full_like(p, scale)
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
        monitor.flush()
        squares = sum(4 * scale**2 for scale in range(1 + step, 4 + step))
        snapshot = monitor.snapshot()
        assert snapshot['optwatch_grad_norm{stage="at_step"}'] == pytest.approx(math.sqrt(squares))
        weights = sum(p.detach().double().square().sum().item() for p in parameters)
        assert snapshot["optwatch_weight_norm"] == pytest.approx(math.sqrt(weights))
        assert snapshot["optwatch_second_moment_mean"] > 0
    assert not monitor.faults.counts
