"""What parameters are called, and how they are put together to layers."""

from __future__ import annotations

import gc
import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from optwatch.training.layers import find_model, group_layers, named_modules, parameter_names


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)  # type: ignore[arg-type]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(2, 2)
        self.mlp = nn.Linear(2, 2)


class Wrapper(nn.Module):
    """What DDP and torch.compile put around a module: one more name in front of the user's."""

    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.add_module(name, inner)


def test_the_walk_over_a_model_is_that_of_torch_with_modules_that_are_shared_absent_or_within_themselves() -> None:
    shared = Block()
    net = nn.Sequential(shared, nn.ModuleDict({"again": shared, "new": Block()}), Wrapper("module", shared.mlp))
    net.register_module("absent", None)
    object.__setattr__(shared, "_modules", shared._modules | {"around": net})
    for model in (net, shared, nn.Linear(1, 1), nn.TransformerEncoderLayer(2, 1, 2)):
        assert list(named_modules(model)) == list(model.named_modules())


def test_names_come_from_the_model_that_was_given() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    assert parameter_names(sgd(net.parameters()), net) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_names_follow_the_order_of_the_optimizers_groups() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = sgd([{"params": [net[1].bias]}, {"params": [net[0].weight, net[0].bias]}])
    assert parameter_names(optimizer, net) == ["1.bias", "0.weight", "0.bias"]


def test_names_come_from_the_optimizer_where_it_has_them() -> None:
    parameters = [("encoder.weight", nn.Parameter(torch.ones(1))), ("head", nn.Parameter(torch.ones(1)))]
    assert parameter_names(sgd(parameters), None) == ["encoder.weight", "head"]


def test_without_either_they_come_from_the_outermost_module_in_the_process() -> None:
    net = nn.ModuleDict({"outer": nn.Sequential(nn.Linear(2, 2))})
    optimizer = sgd(net.parameters())
    assert parameter_names(optimizer, None) == ["outer.0.weight", "outer.0.bias"]
    assert find_model({id(p) for p in net.parameters()}) is net


def test_where_nothing_knows_them_they_are_numbered() -> None:
    optimizer = sgd([{"params": [torch.ones(1, requires_grad=True)]}, {"params": [torch.ones(1, requires_grad=True)]}])
    assert parameter_names(optimizer, None) == ["group0.parameter0", "group1.parameter0"]


def test_a_parameter_that_the_model_does_not_hold_is_numbered_beside_the_others() -> None:
    net, extra = nn.Linear(2, 2), torch.ones(1, requires_grad=True)
    assert parameter_names(sgd([*net.parameters(), extra]), net) == ["weight", "bias", "group0.parameter2"]


def test_a_model_that_is_empty_as_a_container_is_still_the_model() -> None:
    class Sized(nn.Linear):
        def __len__(self) -> int:
            return 0

    net = Sized(2, 2)
    assert parameter_names(sgd(net.parameters()), net) == ["weight", "bias"]


def test_a_weight_that_two_modules_share_is_called_after_the_first() -> None:
    net = nn.ModuleDict({"embedding": nn.Linear(2, 2, bias=False), "head": nn.Linear(2, 2, bias=False)})
    net["head"].weight = net["embedding"].weight
    assert parameter_names(sgd(net.parameters()), net) == ["embedding.weight"]


@pytest.mark.parametrize("name", ["_orig_mod", "module", "_fsdp_wrapped_module"])
def test_wrappers_leave_no_trace_in_names_wherever_they_are(name: str) -> None:
    net = nn.Sequential(Wrapper(name, nn.Linear(2, 2)), nn.Linear(2, 1))
    assert parameter_names(sgd(net.parameters()), Wrapper(name, Wrapper("module", net))) == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    ]


def test_a_compiled_models_names_are_those_of_the_model() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    compiled = torch.compile(net, backend="eager")
    assert parameter_names(sgd(net.parameters()), compiled) == ["0.weight", "0.bias"]


def test_a_users_own_module_called_module_keeps_its_name_where_it_tells_two_apart() -> None:
    net = nn.ModuleDict({"module": nn.ModuleDict({"fc": nn.Linear(1, 1)}), "fc": nn.Linear(1, 1)})
    assert parameter_names(sgd(net.parameters()), net) == [
        "module.fc.weight",
        "module.fc.bias",
        "fc.weight",
        "fc.bias",
    ]


def test_looking_for_the_model_meets_objects_that_lie_about_their_class_or_fail() -> None:
    class Lies:
        @property
        def __class__(self) -> type:  # type: ignore[override]
            raise RuntimeError("do not look")

    class HalfBuilt(nn.Module):
        def __init__(self) -> None:
            pass  # super().__init__ was never called

    kept = [Lies(), HalfBuilt()]
    net = nn.Linear(2, 2)
    assert gc.is_tracked(kept)
    assert find_model({id(p) for p in net.parameters()}) is net


names = st.lists(
    st.from_regex(r"([a-c]|[0-9]{1,3})(\.([a-c]|[0-9]{1,3})){0,5}", fullmatch=True), max_size=80, unique=True
)


@given(names, st.integers(1, 40))
@example(["0", "0.0", "a"], 1)
def test_there_are_never_more_layers_than_asked_for(given_names: list[str], most: int) -> None:
    layers = group_layers(given_names, most)
    assert len(layers) == len(given_names)
    assert len(set(layers)) <= most
    assert all(layers)
    assert group_layers(given_names, most) == layers


@given(names)
def test_where_all_modules_fit_each_is_its_own_layer(given_names: list[str]) -> None:
    modules = [name.rpartition(".")[0] or name for name in given_names]
    assert group_layers(given_names, 1000) == modules


def test_parameters_of_one_module_are_one_layer() -> None:
    assert group_layers(["a.b.weight", "a.b.bias", "a.c.weight", "scale"], 32) == ["a.b", "a.b", "a.c", "scale"]


def blocks(count: int, *submodules: str) -> list[str]:
    return [f"blocks.{n}.{sub}.weight" for n in range(count) for sub in submodules]


def test_a_hundred_blocks_become_ranges_in_the_models_order() -> None:
    layers = group_layers(["embedding.weight", *blocks(100, "mlp"), "head.weight"], 32)
    distinct = list(dict.fromkeys(layers))
    assert distinct[:3] == ["embedding", "blocks.0-3.mlp", "blocks.4-7.mlp"]
    assert distinct[-2:] == ["blocks.96-99.mlp", "head"]
    assert len(distinct) == 27
    assert layers[1 + 6] == "blocks.4-7.mlp"


def test_the_last_range_ends_where_the_blocks_do() -> None:
    assert list(dict.fromkeys(group_layers(blocks(5, "m"), 3))) == ["blocks.0-1.m", "blocks.2-3.m", "blocks.4.m"]


def test_every_parameter_is_in_the_range_that_its_layer_names() -> None:
    given_names = blocks(100, "attention", "mlp")
    for name, layer in zip(given_names, group_layers(given_names, 20), strict=True):
        number, (first, _, last) = int(name.split(".")[1]), layer.split(".")[1].partition("-")
        assert int(first) <= number <= int(last or first)


def test_numbers_inside_numbers_as_in_a_mixture_of_experts_keep_within_the_bound_and_tell_blocks_apart() -> None:
    given_names = [f"blocks.{b}.experts.{e}.w{w}.weight" for b in range(16) for e in range(8) for w in (1, 2)]
    layers = group_layers(given_names, 32)
    assert 8 <= len(set(layers)) <= 32
    for name, layer in zip(given_names, layers, strict=True):
        found = re.match(r"blocks\.(\d+)(?:-(\d+))?", layer)
        assert found
        assert int(found[1]) <= int(name.split(".")[1]) <= int(found[2] or found[1])


def test_where_nothing_else_fits_everything_is_one_layer() -> None:
    assert group_layers(["a.weight", "b.weight"], 1) == ["all", "all"]


def test_no_parameters_are_no_layers() -> None:
    assert group_layers([], 32) == []
