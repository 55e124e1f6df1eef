"""Where tensors lie: compiled code says what Python says, and neither lets a kernel read what it must not."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from optwatch import kernels
from optwatch.kernels import build, locate
from optwatch.training.statistics import Reducer

CPU = torch.device("cpu")
RECIPE = build.locate_recipe()


@pytest.fixture(params=["compiled", "Python"])
def located(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    kernels.prepare_addresses().join()
    assert locate.compiled.made is not None, "there is no C++ compiler, or no headers of Python, or it does not compile"
    if request.param == "Python":
        monkeypatch.setattr(locate.compiled, "made", None)
    return str(request.param)


class Own(Tensor):
    """A subclass, which may keep its elements anywhere."""


def freed() -> Tensor:
    whole = torch.ones(1000)
    part = whole[100:]
    whole.untyped_storage().resize_(0)  # as FSDP does with the parameters of other layers
    return part


UNREADABLE = {
    "with gaps": lambda: torch.ones(4, 3)[:, ::2],
    "a column": lambda: torch.ones(4, 3).t()[:1],
    "expanded": lambda: torch.ones(1, 3).expand(4, 3),
    "elsewhere": lambda: torch.ones(3, device="meta"),
    "integers": lambda: torch.ones(3, dtype=torch.int64),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "sparse": lambda: torch.ones(3).to_sparse(),
    "freed": freed,
    "freed whole": lambda: freed()._base,
    "subclass": lambda: torch.ones(3).as_subclass(Own),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_of_a_list_with_one_that_no_kernel_may_read_nothing_is_told(name: str, located: str) -> None:
    odd = UNREADABLE[name]()
    assert kernels.addresses([torch.ones(3), odd]) is None
    assert locate.place(odd) is None
    kernels.prepare().join()
    kernel = kernels.cpu_kernel()
    assert kernel is not None
    assert kernel.largest(odd) is None


def test_each_tensor_is_where_it_says_and_nothing_is_missed(located: str) -> None:
    tensors = [torch.ones(n + 3)[3:].to(dtype) for n in (0, 1, 9) for dtype in locate.DTYPES]
    tensors += [Parameter(torch.ones(2, 3)), torch.ones(7)[5:], torch.empty(0)]
    found = kernels.addresses(tensors)
    assert found is not None
    where, sizes, dtypes = found.lists()
    assert where == [x.data_ptr() for x in tensors]
    assert sizes == [x.numel() for x in tensors]
    assert dtypes == [locate.DTYPES[x.dtype] for x in tensors]
    assert [locate.place(x) for x in tensors] == list(zip(where, sizes, dtypes, strict=True))
    again = kernels.addresses(tuple(tensors))
    assert again is not None
    assert found.key() == again.key()
    again = kernels.addresses(tensors[::-1])
    assert again is not None
    assert found.key() != again.key()


REORDERED = {
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "three dimensions, channels last": lambda x: x[:, :, None].contiguous(memory_format=torch.channels_last_3d),
}


@pytest.mark.parametrize("name", REORDERED)
def test_a_tensor_in_another_order_of_dimensions_is_read_as_it_lies_but_not_in_a_pair_with_one_in_its_own(
    name: str, located: str
) -> None:
    kernels.prepare().join()
    kernel = kernels.cpu_kernel()
    assert kernel is not None
    reorder, x, y = REORDERED[name], torch.randn(4, 3, 5, 2), torch.randn(4, 3, 5, 2)
    other, another = reorder(x), reorder(y)
    assert not other.is_contiguous()
    for tensors, in_order in (([x, y], True), ([x, other], False)):
        found = kernels.addresses(tensors)
        assert found is not None
        assert found.in_order == in_order
    alone = kernel.reduce("products", [other, y])
    assert alone is not None
    assert torch.allclose(alone[0], torch.stack([z.double().square().sum() for z in (x, y)]))
    assert kernel.largest(other) == float(x.abs().max())
    want = (x.double() * y.double()).sum()
    pair = kernel.reduce("products", [other], [another])
    assert pair is not None
    assert torch.allclose(pair[1], want)
    flat = x.reshape(other.shape)
    assert kernel.reduce("products", [flat], [another]) is None
    assert torch.allclose(Reducer(CPU, compiled=True).dot_products([flat], [another]), want)


def test_gradients_are_told_with_the_parameters_that_have_one(located: str) -> None:
    parameters: list[Tensor] = [Parameter(torch.ones(i)) for i in range(5)]
    for i in (0, 2, 4):
        parameters[i].grad = torch.full((i,), float(i))
    positions, gradients = kernels.gradients(parameters, CPU)
    assert list(positions) == [0, 2, 4]
    assert isinstance(gradients, kernels.Located) == (located == "compiled")
    assert all(x is parameters[i].grad for i, x in zip(positions, gradients, strict=True))
    assert gradients[2] is parameters[4].grad
    assert [len(x) for x in gradients[1:]] == [2, 4]
    found = kernels.addresses(gradients)
    assert found is not None
    assert found.lists()[0] == [x.data_ptr() for x in gradients]
    assert list(kernels.gradients(parameters[1:2], CPU)[0]) == []


@pytest.mark.parametrize("name", sorted(UNREADABLE.keys() - {"integers", "elsewhere", "complex"}))
def test_gradients_of_which_a_kernel_may_not_read_one_are_told_all_the_same(name: str, located: str) -> None:
    odd = UNREADABLE[name]()
    parameters: list[Tensor] = [Parameter(torch.ones(3)), Parameter(torch.ones(odd.shape))]
    for parameter, gradient in zip(parameters, (torch.ones(3), odd), strict=True):
        parameter.grad = gradient
    positions, gradients = kernels.gradients(parameters, CPU)
    assert list(positions) == [0, 1]
    assert gradients[1] is odd
    if name != "subclass" or located == "Python":  # one that keeps its elements as any tensor does
        assert kernels.addresses(gradients) is None


def test_a_gradient_lives_as_long_as_somebody_may_read_it(located: str) -> None:
    parameter = Parameter(torch.ones(2**20))
    parameter.grad = torch.full((2**20,), 3.0)
    _, gradients = kernels.gradients([parameter], CPU)
    found = kernels.addresses(gradients)
    assert found is not None
    parameter.grad = None  # another thread, while the kernel reads without the GIL
    others = [torch.zeros(2**20) for _ in range(4)]
    address = found.lists()[0][0]
    assert address not in [x.data_ptr() for x in others]
    del gradients, found
    gc.collect()


MANY = 150
"""More than are looked at together."""


def test_moments_are_told_with_the_parameters_that_have_one(located: str) -> None:
    parameters: list[Tensor] = [Parameter(torch.ones(i % 3, 2)) for i in range(MANY)]
    states = {p: {"second": torch.zeros_like(p), "step": torch.tensor(1.0)} for p in parameters}
    having = [i for i in range(MANY) if i % 7]
    for i in having:
        states[parameters[i]]["first" if i % 2 else "other"] = torch.full_like(parameters[i], i).detach()
    del states[parameters[0]]
    found = kernels.moments(states, parameters, ("first", "other"), CPU)
    if located == "Python":
        assert found is None
        return
    assert found is not None
    positions, moments = found
    assert list(positions) == having
    want = [states[parameters[i]]["first" if i % 2 else "other"] for i in having]
    assert all(x is y for x, y in zip(moments, want, strict=True))
    told = kernels.addresses(moments)
    assert told is not None
    assert told.lists() == ([x.data_ptr() for x in want], [x.numel() for x in want], [0] * len(want))
    assert told.numbers() == [x.numel() for x in want]
    whole = kernels.moments(states, [parameters[i] for i in having], ("first", "other"), CPU)
    assert whole is not None
    assert list(whole[0]) == list(range(len(having)))
    assert kernels.moments(dict.fromkeys(parameters), parameters, ("first",), CPU) is None
    nothing = kernels.moments({}, parameters, ("first",), CPU)
    assert nothing is not None
    assert not nothing[1]


ODD_MOMENTS = UNREADABLE | {
    "of another shape": lambda: torch.ones(4),
    "no tensor": lambda: 3.0,
    "a list": lambda: [torch.ones(3)],
}


@pytest.mark.parametrize("name", ODD_MOMENTS)
def test_of_moments_of_which_a_kernel_may_not_read_one_nothing_is_told(name: str, located: str) -> None:
    odd = ODD_MOMENTS[name]()
    shape = odd.shape if isinstance(odd, Tensor) and name != "of another shape" else (3,)
    parameters: list[Tensor] = [Parameter(torch.ones(3)), Parameter(torch.ones(shape))]
    states = {parameters[0]: {"m": torch.ones(3)}, parameters[1]: {"m": odd}}
    assert (kernels.moments(states, parameters[:1], ("m",), CPU) is not None) == (located == "compiled")
    assert kernels.moments(states, parameters, ("m",), CPU) is None


def test_the_step_count_that_all_share_is_told(located: str) -> None:
    parameters: list[Tensor] = [Parameter(torch.ones(1)) for _ in range(MANY)]
    states = {p: {"step": torch.tensor(5.0)} for p in parameters}
    for same in (torch.tensor(5, dtype=torch.int64), torch.tensor(5.0, dtype=torch.float64)):
        states[parameters[-1]] = {"step": same}
        assert kernels.shared_count(states, parameters, "step") == (5.0 if located == "compiled" else None)
    others = [torch.tensor(6.0), torch.tensor([5.0]), 5.0, torch.tensor(5, dtype=torch.int32), torch.tensor(math.nan)]
    for odd in others:
        states[parameters[-1]] = {"step": odd}  # type: ignore[dict-item]  # what some optimizers keep
        assert kernels.shared_count(states, parameters, "step") is None
    states[parameters[-1]] = {}
    assert kernels.shared_count(states, parameters, "step") is None
    assert kernels.shared_count(states, [], "step") is None


class OwnHash(Tensor):
    """What hash() says of it is not where it is."""

    def __hash__(self) -> int:
        return 7


def test_a_state_is_looked_up_by_what_hash_says(located: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parameter, own = Parameter(torch.ones(3)), torch.ones(3).as_subclass(OwnHash)
    assert kernels.moments({own: {"m": torch.ones(3)}}, [own], ("m",), CPU) is None
    monkeypatch.setattr(Tensor, "__hash__", lambda self: 7)
    states = {parameter: {"m": torch.ones(3)}}
    assert kernels.moments(states, [parameter], ("m",), CPU) is None


def test_what_is_gone_while_it_is_read_is_said() -> None:
    kernels.prepare_addresses().join()
    parameter = Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    states = {parameter: {"m": torch.ones(3)}}
    _, gradients = kernels.gradients([parameter], CPU)
    found = kernels.moments(states, [parameter], ("m",), CPU)
    assert found is not None
    parameter.grad = None
    del states[parameter]
    for what, tensors in (("gradient", gradients), ("moment", found[1])):
        with pytest.raises(RuntimeError, match=rf"the {what} of a parameter of shape \(3,\) is gone"):
            tensors[0]


@pytest.mark.slow
def test_a_library_that_tells_wrong_addresses_is_not_kept(tmp_path: Path) -> None:
    text = RECIPE.source.read_text()
    assert "x.const_data_ptr())" in text
    source = tmp_path / "locate.cpp"
    source.write_text(text.replace("x.const_data_ptr())", "x.const_data_ptr()) + 4"))
    with pytest.raises(OSError, match="instead of"):
        build.library(replace(RECIPE, source=source, flags=(*RECIPE.flags, "-O0"), gently=False), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.so"))
