"""The hooks on layers: what they see, and that training never sees them."""

from __future__ import annotations

import copy
import io
import math
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from optwatch import kernels
from optwatch.faults import Faults
from optwatch.host.passes import Reader
from optwatch.record import Passes
from optwatch.training.activations import Activations
from optwatch.training.layers import probe_points


class Blocks(nn.Module):
    """`count` blocks of two layers, which may be computed anew in the backward pass."""

    def __init__(self, count: int = 3, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(count))
        self.head = nn.Linear(4, 1)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


class Casts(nn.Module):
    """Gives out what it is given, times `value`, as `dtype`."""

    def __init__(self, dtype: torch.dtype, value: float = 1.0) -> None:
        super().__init__()
        self.dtype, self.value = dtype, value
        self.weight = nn.Parameter(torch.ones(()))  # layers without any are not watched

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.value).to(self.dtype)


@pytest.fixture(autouse=True, params=[True, False], ids=["compiled", "by torch"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these tests is run with the compiled kernel and without."""
    monkeypatch.setattr(sys.modules[__name__], "COMPILED", request.param)
    if request.param:
        kernels.prepare().join()
        assert kernels.cpu_kernel() is not None


COMPILED = True


def watched(model: nn.Module, max_layers: int = 32, gradients: bool = False) -> tuple[Activations, Faults]:
    faults = Faults()
    activations = Activations(faults, gradients, COMPILED)
    activations.watch(model, max_layers)
    return activations, faults


def read(activations: Activations) -> Passes:
    trace = activations.claim()
    assert trace is not None
    return Reader().passes(trace)


def spoil(model: nn.Module, layer: str, value: float = math.nan) -> None:
    model.get_submodule(layer).register_forward_hook(lambda _, args, output: output * value, prepend=True)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_the_first_layer_with_a_bad_output_is_named_also_where_layers_are_computed_anew(reentrant: bool | None) -> None:
    model = Blocks(reentrant=reentrant)
    activations, faults = watched(model)
    spoil(model, "blocks.1.0", math.inf)
    model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    seen = read(activations)
    assert (seen.broken, seen.value) == ("blocks.1.0", "inf")
    assert seen.order == ["input", *(f"blocks.{i}.{j}" for i in range(3) for j in range(2)), "head"]
    assert not faults.counts


def test_a_bad_input_comes_before_every_layer_and_numbers_of_other_kinds_are_no_input() -> None:
    model = Blocks()
    activations, _ = watched(model)
    model(torch.full((2, 4), math.nan)).sum().backward()
    assert read(activations).broken == "input"
    embedding = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 1))
    activations, _ = watched(embedding)
    embedding(torch.zeros(2, 3, dtype=torch.int64)).sum().backward()
    assert read(activations).order == ["0", "1"]


def test_micro_batches_are_read_together_and_each_step_anew() -> None:
    model = Blocks()
    activations, _ = watched(model)
    model(torch.full((2, 4), math.nan))
    model(torch.randn(2, 4))
    assert read(activations).broken == "input"
    model(torch.randn(2, 4))
    assert read(activations).broken is None


def test_an_output_that_is_infinite_at_healthy_steps_too_tells_nothing_unless_it_becomes_nan() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Hardtanh(), nn.Linear(4, 1))
    activations, _ = watched(model)
    spoil(model, "0", math.inf)
    reader = Reader()

    def step(healthy: bool) -> str | None:
        model(torch.randn(2, 4))
        trace = activations.claim()
        assert trace is not None
        if healthy:
            reader.learn(trace)
            return None
        return reader.passes(trace).broken

    assert step(healthy=False) == "0"
    step(healthy=True)
    assert step(healthy=False) is None
    spoil(model, "2")
    assert step(healthy=False) == "2"
    spoil(model, "0")
    assert step(healthy=False) == "0"


def test_a_model_in_evaluation_has_no_hooks_on_its_layers_and_gives_out_the_same_bits() -> None:
    """Torch takes another path through an encoder layer that has hooks."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    x = torch.randn(2, 3, 8)

    def evaluated() -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            return model(x)

    before = evaluated()
    activations, _ = watched(model)
    assert torch.equal(evaluated(), before)
    assert activations.claim() is None
    assert not any(module._forward_hooks for module in model.modules())
    model.train()(x)
    assert "0" in read(activations).order
    activations.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_copies_of_a_model_have_hooks_that_do_nothing_and_need_no_optwatch() -> None:
    model = Blocks()
    activations, _ = watched(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert b"optwatch" not in buffer.getvalue()
    buffer.seek(0)
    for copied in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        copied(torch.randn(2, 4))
    assert activations.claim() is None


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_whole_compiled_graph_holds_nothing_of_it(backend: str) -> None:
    torch.compiler.reset()
    model = Blocks()
    activations, faults = watched(model)
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(2, 4)
    got = compiled(x)
    assert activations.claim() is None
    assert torch.equal(got, model(x))
    assert not faults.counts


@pytest.mark.parametrize("backwards", [True, False])
def test_gradients_of_outputs_say_whether_a_bad_gradient_is_this_ranks_own(backwards: bool) -> None:
    model = Blocks()
    activations, _ = watched(model, gradients=True)
    output = model(torch.randn(2, 4))
    (output * (math.nan if backwards else 1.0)).sum().backward()
    assert read(activations).own_gradients_finite is not backwards


def test_layers_are_told_apart_as_finely_as_their_number_allows() -> None:
    model = Blocks(6)
    named = {most: [label for label, _ in probe_points(model, most)] for most in (13, 12, 6, 3, 1)}
    assert len(named[13]) == 13
    assert named[12] == [*(f"blocks.{i}" for i in range(6)), "head"]
    assert named[6] == ["blocks.0-1", "blocks.2-3", "blocks.4-5", "head"]
    assert named[3] == ["blocks.0-3", "blocks.4-5", "head"]
    assert named[1] == []
    assert dict(probe_points(model, 6))["blocks.2-3"] is model.blocks[3]


def test_what_the_hooks_take_is_added_up_until_it_is_asked_for() -> None:
    model = Blocks()
    activations, _ = watched(model)
    assert activations.spent() == 0
    model(torch.randn(2, 4)).sum().backward()
    assert activations.spent() > 0
    assert activations.spent() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_outputs_of_every_dtype_and_form_are_read_and_large_numbers_are_no_infinity(dtype: torch.dtype) -> None:
    model = nn.Sequential(*(Casts(dtype) for _ in range(3)))
    activations, faults = watched(model)
    largest = torch.full((40, 50), torch.finfo(dtype).max, dtype=dtype)
    spoilt = largest.clone()
    spoilt[7, 3] = math.inf
    for x, want in (
        (largest, None),
        (largest.t(), None),
        (spoilt, "inf"),
        (spoilt.t(), "inf"),
        (spoilt - spoilt, "nan"),
    ):
        model(x)
        assert read(activations).value == want
    assert not faults.counts


def test_outputs_of_several_kinds_stay_in_execution_order() -> None:
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float64]
    for bad in range(4):
        model = nn.Sequential(*(Casts(dtype, math.nan if i == bad else 1.0) for i, dtype in enumerate(dtypes)))
        activations, _ = watched(model)
        model(torch.ones(2, 4))
        seen = read(activations)
        assert (seen.broken, seen.order) == (str(bad), ["input", "0", "1", "2", "3"])
