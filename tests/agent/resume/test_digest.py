"""Digests of tensors change with every bit and every order, and states of generators are found again."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optwatch.resume import generators
from optwatch.resume.digest import CPU_BLOCK, Digest, Digester, digest, parts

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.complex64]
DIGESTER = Digester(torch.device("cpu"), rounding=True)


def taken(tensor: Tensor) -> Digest:
    return digest(tensor.dtype, tuple(tensor.shape), DIGESTER.readings([tensor])[0].tolist())


def flipped(tensor: Tensor, *places: tuple[int, int]) -> Tensor:
    """The float32 tensor with these bits of these elements flipped."""
    words = tensor.clone().view(torch.int32)
    for element, bit in places:
        words[element] ^= -(2**31) if bit == 31 else 2**bit
    return words.view(torch.float32)


@given(st.data())
def test_one_flipped_bit_or_two_change_a_digest(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 300))
    tensor = torch.randn(size)
    place = st.tuples(st.integers(0, size - 1), st.integers(0, 31))
    places = data.draw(st.lists(place, min_size=1, max_size=2, unique=True))
    changed = flipped(tensor, *places)
    assert taken(changed).contents != taken(tensor).contents
    assert taken(flipped(changed, *places)).contents == taken(tensor).contents


def test_the_same_bit_of_two_elements_changes_a_digest_where_an_exclusive_or_sees_nothing() -> None:
    tensor = torch.randn(3 * CPU_BLOCK)
    changed = flipped(tensor, (7, 31), (2 * CPU_BLOCK + 8, 31))
    assert not torch.equal(changed, tensor)
    assert taken(changed).contents != taken(tensor).contents
    assert torch.equal(torch.hash_tensor(changed.view(torch.int32)), torch.hash_tensor(tensor.view(torch.int32)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 3, 7, 2 * CPU_BLOCK + 1])
def test_the_order_counts_and_the_layout_in_memory_does_not(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(size).mul(4).to(dtype)
    assert taken(tensor).contents == taken(tensor.clone()).contents
    assert taken(torch.stack([tensor, tensor], 1)[:, 0]).contents == taken(tensor).contents
    # Not at the beginning of a word.
    assert taken(torch.cat([tensor[:1], tensor])[tensor[:1].numel() :]).contents == taken(tensor).contents
    if not torch.equal(tensor.flip(0), tensor):
        assert taken(tensor.flip(0)).contents != taken(tensor).contents


def test_a_digest_holds_for_every_size_of_block_and_for_many_tensors_at_once() -> None:
    tensors = [torch.randn(100_003), torch.tensor(2.0), torch.arange(9), torch.randn(5, 7).bfloat16()]
    small = Digester(torch.device("cpu"))
    small._block = 777
    for tensor, one, other in zip(tensors, DIGESTER.readings(tensors), small.readings(tensors), strict=True):
        first, second = (digest(tensor.dtype, tuple(tensor.shape), r.tolist()) for r in (one, other))
        assert first.contents == second.contents == taken(tensor).contents
        expected = tensor.double().norm() if tensor.is_floating_point() else torch.tensor(0.0)
        assert first.norm == pytest.approx(float(expected), rel=1e-12)


def test_what_has_been_through_16_bits_is_known_by_it() -> None:
    tensor = torch.randn(1000)
    assert not taken(tensor).rounded
    assert taken(tensor.bfloat16().float()).rounded
    assert taken(tensor.half().float()).rounded


def test_nested_sparse_and_wrapped_values_are_taken_apart() -> None:
    value = {"GG": [torch.ones(2), torch.zeros(3)], "sparse": torch.eye(2).to_sparse(), "none": None}
    assert [name for name, _ in parts(value, "p")] == ["p.GG.0", "p.GG.1", "p.sparse.indices", "p.sparse.values"]


def seed_and_draw(name: str, count: int) -> None:
    """Seed one generator, or draw from it: as many words, or as good as."""
    draw: dict[str, Callable[[int], object]] = {
        "torch": lambda n: torch.rand(n),
        "python": lambda n: [random.getrandbits(32) for _ in range(n)],
        "numpy": lambda n: np.random.bytes(4 * n) if n else None,
    }
    draw[name](count)


@pytest.mark.parametrize("name", ["torch", "python", "numpy"])
@pytest.mark.parametrize("count", [0, 1, 623, 624, 625, 50_000])
def test_a_state_is_reached_from_an_earlier_one_and_never_from_a_later(name: str, count: int) -> None:
    torch.manual_seed(count)
    random.seed(count)
    np.random.seed(count)
    seed_and_draw(name, 1000)
    earlier = generators.states()[name]
    seed_and_draw(name, count)
    later = generators.states()[name]
    assert generators.reachable(generators.State.from_text(earlier.text()), later)
    assert generators.reachable(later, earlier, most_draws=2**18) == (count == 0)


def test_looking_for_a_state_ends_where_it_is_told_to() -> None:
    torch.manual_seed(1)
    torch.rand(1)
    earlier = generators.states()["torch"]
    torch.rand(10 * 624)
    later = generators.states()["torch"]
    assert generators.reachable(earlier, later, most_draws=10 * 624)
    assert not generators.reachable(earlier, later, most_draws=9 * 624)


def test_only_generators_that_were_drawn_from_are_used() -> None:
    before = generators.states()
    torch.rand(1)
    assert list(generators.used(before, generators.states())) == ["torch"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_tensor_has_the_digest_of_its_copy_on_the_host_and_taking_it_waits_for_nothing() -> None:
    device = torch.device("cuda")
    tensors = [torch.randn(5_000_001), torch.randn(33, 7).bfloat16(), torch.arange(9), torch.tensor(2.0)]
    copies = [tensor.to(device) for tensor in tensors]
    digester = Digester(device, rounding=True)
    digester.readings(copies)
    torch.cuda.set_sync_debug_mode("error")
    try:
        readings = digester.readings(copies)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for tensor, reading in zip(tensors, readings.tolist(), strict=True):
        there, here = digest(tensor.dtype, tuple(tensor.shape), reading), taken(tensor)
        assert there.contents == here.contents
        assert (there.norm, there.rounded) == (pytest.approx(here.norm, rel=1e-12), here.rounded)
