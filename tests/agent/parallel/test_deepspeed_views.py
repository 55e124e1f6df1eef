"""What is watched of DeepSpeed's optimizers that are not known, with stand-ins; `test_deepspeed` runs the others."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from optwatch import Monitor, attach
from optwatch.parallel import deepspeed


@pytest.fixture
def base_class(monkeypatch: pytest.MonkeyPatch) -> type:
    """The class that DeepSpeed's optimizers derive from, where it is looked for."""
    module: Any = ModuleType(deepspeed.BASE)
    module.DeepSpeedOptimizer = type("DeepSpeedOptimizer", (), {})
    monkeypatch.setitem(sys.modules, deepspeed.BASE, module)
    return module.DeepSpeedOptimizer


def owner(base_class: type, optimizer: torch.optim.Optimizer, **attributes: Any) -> Any:
    """As versions of DeepSpeed before 0.18 have it: the loss is scaled within the optimizer's own ``backward``."""

    class Unheard(base_class):  # type: ignore[misc]
        def backward(self, loss: torch.Tensor) -> None:
            (loss.float() * 1024.0).backward()

        def step(self) -> None:
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    p.grad /= 1024
            self.optimizer.step()

    made = Unheard()
    vars(made).update({"optimizer": optimizer, "overflow": False, **attributes})
    return made


def test_a_class_that_is_not_known_has_losses_and_steps_and_one_error(
    base_class: type, net: torch.nn.Module, watch: Callable[..., Monitor], caplog: pytest.LogCaptureFixture
) -> None:
    made = owner(base_class, torch.optim.SGD(net.parameters(), lr=0.1))
    monitor = watch(made)
    loss = net(torch.ones(2, 4)).square().mean()
    for _ in range(2):
        made.backward(net(torch.ones(2, 4)).square().mean())
        made.step()
        made.optimizer.zero_grad()
    assert monitor.flush()
    snapshot = monitor.snapshot()
    assert snapshot["optwatch_steps_total"] == 2
    assert snapshot['optwatch_learning_rate{group="0"}'] == 0.1
    assert 0 < snapshot["optwatch_loss"] <= loss.item()
    assert not any("norm" in series for series in snapshot if not series.startswith("optwatch_spikes"))
    assert monitor.faults.counts == {"hook": 1}
    assert "parameters of DeepSpeed's Unheard: how it arranges parameters is not known" in caplog.text


@pytest.mark.parametrize("attribute", deepspeed.REFUSED)
def test_what_would_make_numbers_wrong_is_refused_by_name(
    attribute: str,
    base_class: type,
    net: torch.nn.Module,
    watch: Callable[..., Monitor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = owner(base_class, torch.optim.SGD(net.parameters(), lr=0.1), **{attribute: True})
    type(made).__name__ = "DeepSpeedZeroOptimizer"
    monitor = watch(made)
    made.backward(net(torch.ones(2, 4)).square().mean())
    made.step()
    assert monitor.flush()
    assert f"parameters of DeepSpeed's DeepSpeedZeroOptimizer: {deepspeed.REFUSED[attribute]};" in caplog.text
    assert monitor.snapshot()["optwatch_steps_total"] == 1
    assert not any(series.startswith("optwatch_grad_norm") for series in monitor.snapshot())


def test_state_that_is_not_arranged_as_the_master_is_belongs_to_no_piece() -> None:
    parameter, master = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(6))
    base = torch.optim.SGD([master], lr=0.1)
    base.state[master] = {"same": torch.arange(6.0), "factor": torch.ones(3), "blocks": [torch.ones(6)], "step": 3}
    piece = deepspeed._piece(parameter, master, (1, 5), 4, deepspeed.Part())
    found = deepspeed.State(base, [[piece]])[piece]
    assert set(found) == {"same", "step"}
    assert found["same"].tolist() == [1, 2, 3, 4]


def test_a_stand_in_that_is_read_instead_of_its_elements_is_no_number() -> None:
    parameter, master = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(6))
    piece = deepspeed._piece(parameter, master, (1, 5), 4, deepspeed.Part())
    assert piece.shape == (4,)
    assert piece.detach().sum().isnan()
    assert piece.to_local().sum() == 4
    assert piece.grad is None
    master.grad = torch.arange(6.0)
    assert piece.grad is not None
    assert piece.grad.tolist() == [1, 2, 3, 4]


def test_groups_added_behind_its_back_are_no_wrong_numbers_and_no_error_in_training(
    base_class: type, net: torch.nn.Module, watch: Callable[..., Monitor], caplog: pytest.LogCaptureFixture
) -> None:
    first, *others = net.parameters()
    made = owner(base_class, torch.optim.SGD([first], lr=0.1))
    monitor = watch(made)
    made.optimizer.add_param_group({"params": others, "lr": 0.2})
    made.backward(net(torch.ones(2, 4)).square().mean())
    made.step()
    assert monitor.flush()
    assert monitor.snapshot()['optwatch_learning_rate{group="1"}'] == 0.2
    assert "parameter groups have been added or removed since attach()" in caplog.text


def test_a_step_that_overflowed_is_counted_as_skipped(
    base_class: type, net: torch.nn.Module, watch: Callable[..., Monitor]
) -> None:
    made = owner(base_class, torch.optim.SGD(net.parameters(), lr=0.1), overflow=True)
    monitor = watch(made)
    made.backward(net(torch.ones(2, 4)).square().mean())
    made.step()
    assert monitor.flush()
    assert monitor.snapshot()['optwatch_skipped_steps_total{reason="overflow"}'] == 1
    assert monitor.snapshot()["optwatch_steps_total"] == 0


def test_an_optimizer_and_the_one_that_deepspeed_steps_it_in_are_one(
    base_class: type, net: torch.nn.Module, watch: Callable[..., Monitor]
) -> None:
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    made = owner(base_class, base)
    monitor = watch(made)
    assert attach(base) is monitor
    assert attach(made) is monitor


def test_detaching_puts_every_method_back(
    base_class: type, net: torch.nn.Module, watch: Callable[..., Monitor]
) -> None:
    made = owner(base_class, torch.optim.SGD(net.parameters(), lr=0.1))
    before = dict(vars(made))
    monitor = watch(made)
    assert vars(made) != before
    monitor.detach()
    assert vars(made) == before
    assert not made.optimizer._optimizer_step_pre_hooks


def test_an_optimizer_of_torch_is_itself_where_deepspeed_is_not_imported(net: torch.nn.Module) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    assert deepspeed.seen(optimizer) is optimizer
