"""The measured update equals the difference of the weights in float64, for any optimizer, and keeps to its scratch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_optimizer
import schedulefree
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optwatch.training.statistics import Reducer
from optwatch.training.update import ALIGNMENT, NOT_MEASURED, SPREAD, Update, plan

NORM, RATIO = "optwatch_update_norm", "optwatch_update_ratio"
RELATIVE = 1e-5
CPU = torch.device("cpu")
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "Muon": lambda p: torch.optim.Muon([x for x in p if x.dim() == 2], lr=1e-2),
    "SOAP": lambda p: pytorch_optimizer.SOAP(p, lr=1e-2, precondition_frequency=2),
    "Schedule-Free": lambda p: schedulefree.AdamWScheduleFree(p, lr=1e-2),
}


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 40), nn.LayerNorm(40), nn.Linear(40, 4)).to(dtype)


def one_step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameter = next(net.parameters())
    net(torch.randn(8, 16, dtype=parameter.dtype)).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def held(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p.detach().double().clone() for group in optimizer.param_groups for p in group["params"]]


def norm(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(x.square().sum().item() for x in tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_difference_of_the_weights(name: str, dtype: torch.dtype, watch: Any) -> None:
    net = model(dtype)
    optimizer = OPTIMIZERS[name](net.parameters())
    if name == "Schedule-Free":
        optimizer.train()  # type: ignore[attr-defined]
    monitor = watch(optimizer, sample_every=1)
    layers: list[str] = []
    moves: list[float] = []
    for _ in range(4):
        before = held(optimizer)
        one_step(net, optimizer)
        after = held(optimizer)
        moved = [y - x for x, y in zip(before, after, strict=True)]
        assert monitor.flush()
        got = monitor.snapshot()
        moves.append(norm(moved))
        assert got[NORM] == pytest.approx(norm(moved), rel=RELATIVE)
        assert got[RATIO] == pytest.approx(norm(moved) / norm(after), rel=RELATIVE)
        layers = [series for series in got if series.startswith("optwatch_layer_update_ratio")]
        if name != "Muon":  # which has the matrices only
            last = got['optwatch_layer_update_ratio{layer="4"}']
            assert last == pytest.approx(norm(moved[-2:]) / norm(after[-2:]), rel=RELATIVE)
    assert len(layers) == (3 if name == "Muon" else 4)
    assert moves[-1] > 0  # SOAP takes its first step to learn its basis
    assert not monitor.faults.counts


@pytest.mark.parametrize("name", ["Muon", "SOAP", "Schedule-Free"])
def test_weights_are_the_same_with_and_without(name: str, watch: Any) -> None:
    def train(watched: bool) -> list[torch.Tensor]:
        net = model()
        optimizer = OPTIMIZERS[name](net.parameters())
        if name == "Schedule-Free":
            optimizer.train()  # type: ignore[attr-defined]
        if watched:
            watch(optimizer, sample_every=2, update_scratch_bytes=4096)
        for _ in range(5):
            one_step(net, optimizer)
        return held(optimizer)

    assert all(torch.equal(p, q) for p, q in zip(train(False), train(True), strict=True))


@pytest.mark.parametrize(("budget", "windows", "first"), [(4096, 8, 8), (1024, 11, 12)])
def test_weights_larger_than_the_scratch_are_measured_in_turn_and_make_one_norm_of_their_latest_changes(
    budget: int, windows: int, first: int, watch: Any
) -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    # 10 256 bytes of weights. A window is an eighth of them, or the scratch where that is less, and splits matrices.
    turns = plan([p.numel() for p in net.parameters()], [4] * 8, budget, spread=2 * SPREAD)
    assert len(turns) == windows
    monitor = watch(optimizer, sample_every=2, update_scratch_bytes=budget)
    steps: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
    for step in range(1, 26):
        before = held(optimizer)
        one_step(net, optimizer)
        steps.append((before, held(optimizer)))
        assert monitor.flush()
        got = monitor.snapshot()
        assert (NORM in got) == (step >= first)
        if step % 2 or step < first:
            continue
        moved = weights = 0.0
        for k, window in enumerate(turns):
            at = (step - 1 - k) // windows * windows + k  # the last step that measured this window
            for piece in window:
                old, new = (side[piece.parameter].reshape(-1)[piece.start : piece.stop] for side in steps[at])
                moved += (new - old).square().sum().item()
                weights += new.square().sum().item()
        assert got[NORM] == pytest.approx(math.sqrt(moved), rel=RELATIVE)
        assert got[RATIO] == pytest.approx(math.sqrt(moved / weights), rel=RELATIVE)
    assert not monitor.faults.counts


def test_a_layer_is_exported_as_soon_as_its_own_parameters_are_measured(watch: Any) -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    monitor = watch(optimizer, sample_every=1, update_scratch_bytes=4096)
    one_step(net, optimizer)
    assert monitor.flush()
    assert not [s for s in monitor.snapshot() if "update" in s]  # a quarter of the weights ends within the first layer
    one_step(net, optimizer)
    assert monitor.flush()
    got = monitor.snapshot()
    assert NORM not in got
    assert [s for s in got if s.startswith("optwatch_layer_update")] == ['optwatch_layer_update_ratio{layer="0"}']


def test_weights_that_are_given_other_memory_are_measured_where_they_are_now(watch: Any) -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    monitor = watch(optimizer, sample_every=1)
    for _ in range(3):
        one_step(net, optimizer)
        for p in net.parameters():
            p.data = p.data.clone()
    before = held(optimizer)
    one_step(net, optimizer)
    assert monitor.flush()
    moved = norm([y - x for x, y in zip(before, held(optimizer), strict=True)])
    assert monitor.snapshot()[NORM] == pytest.approx(moved, rel=RELATIVE)


def test_without_a_budget_nothing_is_measured(watch: Any) -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    monitor = watch(optimizer, sample_every=1, update_scratch_bytes=0)
    one_step(net, optimizer)
    assert monitor.flush()
    assert not [series for series in monitor.snapshot() if "update" in series]


def test_a_group_added_later_is_measured_from_its_first_step(watch: Any) -> None:
    net = model()
    optimizer = torch.optim.SGD(list(net.parameters())[:-2], lr=1e-2)
    monitor = watch(optimizer, sample_every=1)
    one_step(net, optimizer)
    assert monitor.flush()
    assert 'optwatch_layer_update_ratio{layer="4"}' not in monitor.snapshot()
    optimizer.add_param_group({"params": list(net.parameters())[-2:], "lr": 1.0})
    before = held(optimizer)
    one_step(net, optimizer)
    after = held(optimizer)
    assert monitor.flush()
    got = monitor.snapshot()
    moved = [y - x for x, y in zip(before, after, strict=True)]
    assert got[NORM] == pytest.approx(norm(moved), rel=RELATIVE)
    want = norm(moved[-2:]) / norm(after[-2:])
    assert got['optwatch_layer_update_ratio{layer="4"}'] == pytest.approx(want, rel=RELATIVE)


def test_an_update_that_bf16_rounds_away_is_none(watch: Any) -> None:
    weight = nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    monitor = watch(optimizer, sample_every=1)
    weight.sum().backward()
    optimizer.step()
    assert monitor.flush()
    assert monitor.snapshot()[NORM] == monitor.snapshot()[RATIO] == 0


class MasterSGD(torch.optim.SGD):
    """Keeps its weights in float32 and rounds them to those the model has, as optimizers for bf16 do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                master = self.state[p].setdefault("master", p.detach().float())
                p.copy_(master.sub_(p.grad.float(), alpha=group["lr"]))


def test_with_master_weights_it_is_the_change_of_what_the_model_uses(watch: Any) -> None:
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = MasterSGD([weight], lr=1e-3)
    monitor = watch(optimizer, sample_every=1)
    norms = []
    for _ in range(4):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert monitor.flush()
        norms.append(monitor.snapshot()[NORM])
    # bf16 has 2^-8 below 1: three steps of 0.001 add up to a first rounding.
    assert [step for step, moved in enumerate(norms, 1) if moved] == [2]
    assert max(norms) == 2.0**-8


def test_weights_of_zero_have_no_ratio(watch: Any) -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    monitor = watch(optimizer, sample_every=1)
    weight.sum().backward()
    optimizer.step()
    assert monitor.flush()
    assert monitor.snapshot()[NORM] == 0
    assert RATIO not in monitor.snapshot()


@given(
    sizes=st.lists(st.integers(0, 3000), max_size=8),
    widths=st.lists(st.sampled_from([1, 2, 4, 8]), min_size=8, max_size=8),
    budget=st.integers(1024, 20_000),
    spread=st.integers(1, 20),
)
def test_windows_hold_every_element_once_and_never_more_than_the_budget(
    sizes: list[int], widths: list[int], budget: int, spread: int
) -> None:
    windows = plan(sizes, widths[: len(sizes)], budget, spread)
    seen = [0] * len(sizes)
    total = sum(size * width for size, width in zip(sizes, widths, strict=False))
    for window in windows:
        used = 0
        for piece in window:
            assert piece.offset >= used  # copies do not overlap
            assert piece.offset % ALIGNMENT == 0
            used = piece.offset + (piece.stop - piece.start) * widths[piece.parameter]
            assert piece.start == seen[piece.parameter] < piece.stop
            seen[piece.parameter] = piece.stop
        assert used <= budget
    assert seen == sizes
    if total + ALIGNMENT * len(sizes) <= budget // ALIGNMENT * ALIGNMENT:
        assert len(windows) == 1


def test_the_scratch_is_allocated_once_and_stays_within_its_budget() -> None:
    parameters = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in (40_000, 7, 9_000)]
    update = Update(parameters, Reducer(CPU), budget=65_536, spread=1)
    assert update.scratch_bytes == 0
    update.before()
    scratch = update._scratch
    assert scratch is not None
    for _ in range(50):
        update.after()
        update.before()
    assert update._scratch is scratch
    assert 0 < update.scratch_bytes <= 65_536
    assert scratch.untyped_storage().nbytes() == update.scratch_bytes


def test_a_step_that_was_skipped_leaves_the_measurement_before_it() -> None:
    weight = torch.ones(4)
    update = Update([weight], Reducer(CPU), budget=1024, spread=1)
    for moved, skipped, want in ((1.0, 1.0, NOT_MEASURED), (2.0, 0.0, 16.0), (0.0, 1.0, 16.0), (3.0, 0.0, 36.0)):
        update.before()
        weight.add_(moved)
        update.after(torch.tensor(skipped))
        assert update.sums()[0].item() == want


def test_a_step_that_raised_is_not_measured() -> None:
    weight = torch.ones(4)
    update = Update([weight], Reducer(CPU), budget=1024, spread=1)
    update.before()
    weight.add_(100)
    update.before()  # of the next step
    weight.add_(1)
    update.after()
    update.after()  # one too many changes nothing
    assert update.sums().tolist() == [[4.0], [4 * 102.0**2]]


@torch.no_grad()
def test_weights_that_become_another_dtype_begin_a_new_rotation() -> None:
    net = nn.Linear(8, 8)
    update = Update(list(net.parameters()), Reducer(CPU), budget=1024, spread=1)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        net.to(dtype)
        before = copy.deepcopy(net)
        update.before()
        for p in net.parameters():
            p.mul_(1.5)
        update.after()
        want = [
            (p.double() - q.double()).square().sum() for p, q in zip(net.parameters(), before.parameters(), strict=True)
        ]
        torch.testing.assert_close(update.sums()[0], torch.stack(want), rtol=1e-12, atol=0)
        assert update.scratch_bytes <= 1024
