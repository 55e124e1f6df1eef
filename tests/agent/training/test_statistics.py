"""Sums of any tensor equal a float64 oracle, and are not finite exactly where an element is not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optwatch import kernels
from optwatch.kernels import Place
from optwatch.kernels.plain import FreedMemoryError
from optwatch.training.blocks import CPU_BLOCK, Plan, flat
from optwatch.training.statistics import Reducer

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATHS = pytest.mark.parametrize("compiled", [False, True], ids=["torch", "kernel"])


def reducer_of(compiled: bool) -> Reducer:
    """A reducer whose path is certain: the kernel is there before it is asked."""
    if compiled:
        kernels.prepare().join()
        assert kernels.kernel() is not None
    return Reducer(CPU, compiled)


def assert_close(got: torch.Tensor, want: torch.Tensor, rtol: float = 1e-12, atol: float = 1e-9) -> None:
    # A sum of products of both signs may be near 0: its rounding is that of its terms, which are below 1e6 in sum.
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol, equal_nan=True)


def tolerance(compiled: bool, dtype: torch.dtype) -> float:
    """The compiled kernel adds up eight numbers of 16 bits at a time in float."""
    return 5e-8 if compiled and dtype.itemsize == 2 else 1e-12


@PATHS
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 2, 63, 1000, CPU_BLOCK - 1, CPU_BLOCK, CPU_BLOCK + 1, 150_000]), max_size=9)
)
def test_sums_of_any_mixture_of_sizes_equal_the_oracle(compiled: bool, dtype: torch.dtype, sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(sum(sizes))
    tensors = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    others = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    reducer = reducer_of(compiled)
    near = tolerance(compiled, dtype)
    products = max(1e-9, near * max(sizes, default=0))
    assert_close(reducer.square_sums(tensors), _stack([x.double().square().sum() for x in tensors]), near)
    assert torch.allclose(
        reducer.dot_products(tensors, others),
        _stack([(x.double() * y.double()).sum() for x, y in zip(tensors, others, strict=True)]),
        rtol=1e-8,
        atol=products,
    )
    squares = [x.square() for x in tensors]
    limits = torch.full((len(sizes),), 0.25, dtype=torch.float64)
    sums, largest, below = reducer.nonnegative(squares, limits)
    assert_close(sums, _stack([x.double().sum() for x in squares]), near)
    assert_close(
        largest, _stack([x.double().max() if len(x) else torch.zeros((), dtype=torch.float64) for x in squares])
    )
    assert_close(below, _stack([(x.double() < 0.25).sum().double() for x in squares]))
    paired = [i for i in range(len(sizes)) if i % 3]
    pairs = [(tensors[i], others[i]) for i in paired]
    first, (own, dots, second) = reducer.products(tensors, paired, [y for _, y in pairs])
    assert_close(first, reducer.square_sums(tensors), near)
    assert_close(dots, _stack([_dot(x, y) for x, y in pairs]), near, products)
    assert_close(own, _stack([_dot(x, x) for x, _ in pairs]), near)
    assert_close(second, _stack([_dot(y, y) for _, y in pairs]), near)
    moved, weights = reducer.changes(others, tensors, reducer.new_plan(sizes))
    assert_close(weights, first, near)
    assert_close(moved, _stack([_dot(change, change) for change in map(_difference, tensors, others)]), near)


@pytest.fixture
def requests() -> list[tuple[str, Any]]:
    """Lists of every kind, with tensors that no kernel reads as they lie."""
    generator = torch.Generator().manual_seed(4)
    matrix = torch.randn(300, 200, generator=generator)
    xs = [matrix, torch.randn(7, generator=generator), torch.randn(0), matrix.t()]
    return [
        ("square_sums", (xs,)),
        ("square_sums", ([],)),
        ("products", (xs, [1, 0], [torch.ones(7), matrix * 2])),
        ("nonnegative", ([x.square() for x in xs[:3]], torch.full((3,), 0.5, dtype=torch.float64))),
        ("nonnegative", ([xs[0].square()], None)),
        ("changes", ([xs[1]], [xs[1] * 3], Plan([7], CPU))),
    ]


def shapes(results: Any) -> Any:
    """Results as a tuple of tensors, whatever the method gives."""
    return results if isinstance(results, tuple) else (results,)


@PATHS
@pytest.mark.parametrize("dense", [True, False])
def test_what_is_asked_for_together_is_what_each_alone_gives(compiled: bool, dense: bool, requests: Any) -> None:
    reducer = reducer_of(compiled)
    if dense:
        requests = [(name, ([x for x in lists[0] if x.is_contiguous()], *lists[1:])) for name, lists in requests]
    want = [shapes(getattr(reducer, name)(*arguments)) for name, arguments in requests]
    # Rows of a wider table, as in a row of a step.
    tables = [[torch.full((*x.shape[:-1], x.shape[-1] + 3), -7.0, dtype=torch.float64) for x in each] for each in want]
    written: list[tuple[int, int]] = []
    with reducer.together():
        for i, (name, arguments) in enumerate(requests):
            places = [
                Place(table[..., 1 : 1 + x.shape[-1]], lambda i=i, j=j: written.append((i, j)))  # type: ignore[misc]
                for j, (table, x) in enumerate(zip(tables[i], want[i], strict=True))
            ]
            getattr(reducer, name)(*arguments, out=tuple(places) if len(places) > 1 else places[0])
    for table, x in zip([t for each in tables for t in each], [x for each in want for x in each], strict=True):
        count = x.shape[-1]
        assert_close(table[..., 1 : 1 + count], x)  # cut into other spans
        assert set(table[..., [0, -2, -1]].flatten().tolist()) == {-7.0}
    assert sorted(written) == [(i, j) for i, each in enumerate(want) for j in range(len(each))]


@PATHS
def test_what_cannot_be_read_costs_nothing_else_that_was_asked_for_with_it(compiled: bool) -> None:
    reducer = reducer_of(compiled)
    outs, written = torch.zeros(3, dtype=torch.float64), []
    places = [Place(outs[i : i + 1], lambda i=i: written.append(i)) for i in range(3)]  # type: ignore[misc]

    def ask() -> None:
        with reducer.together():
            for place, x in zip(
                places, (torch.tensor(2.0), torch.ones(2, 2).to_mkldnn(), torch.tensor(3.0)), strict=True
            ):
                reducer.square_sums([x], place)

    with pytest.raises(RuntimeError):
        ask()
    # Without a kernel each is read when it is asked for, and training's hook ends at the second.
    assert written == ([0, 2] if compiled else [0])
    assert outs.tolist() == ([4, 0, 9] if compiled else [4, 0, 0])


@PATHS
@pytest.mark.parametrize("readable", [True, False], ids=["readable", "one that no kernel reads"])
def test_copies_are_made_with_what_is_asked_for_beside_them_and_said_when_they_are(
    compiled: bool, readable: bool
) -> None:
    reducer = reducer_of(compiled)
    sources = [torch.randn(70_000), torch.randn(6, 4) if readable else torch.randn(6, 8)[:, ::2]]
    targets, out, said = [torch.zeros(x.shape) for x in sources], torch.zeros(2, dtype=torch.float64), []
    with reducer.together():
        reducer.square_sums(sources, Place(out))
        reducer.copy(sources, targets, lambda: said.append(list(map(torch.equal, sources, targets))))
    assert said == [[True, True]]
    assert_close(out, torch.stack([_dot(x, x) for x in sources]))
    reducer.copy([], [], lambda: said.append([]))
    assert len(said) == 2
    with pytest.raises(RuntimeError):
        reducer.copy(sources, [targets[0], torch.zeros(5)], lambda: said.append([]))
    assert len(said) == 2


@PATHS
@pytest.mark.parametrize("first", [0, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_memory_that_was_given_back_is_an_error_and_not_the_end_of_the_process(
    compiled: bool, dtype: torch.dtype, first: int
) -> None:
    whole = torch.ones(1000, dtype=dtype)
    freed = whole[first:]
    whole.untyped_storage().resize_(0)  # torch's own sums would read it all the same
    there = torch.ones(len(freed), dtype=dtype)
    reducer = reducer_of(compiled)
    for read in (
        lambda: reducer.square_sums([there, freed]),
        lambda: reducer.dot_products([there], [freed]),
        lambda: reducer.products([there], [0], [freed]),
        lambda: reducer.nonnegative([freed], None),
        lambda: reducer.changes([flat(there)], [flat(freed)], reducer.new_plan([len(freed)])),
    ):
        with pytest.raises(FreedMemoryError, match=r"memory of a tensor of shape \(\d+,.* given back, .*: put it back"):
            read()


def _difference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x.double() - y.double()


def _dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x.double() * y.double()).sum()


def _stack(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(values) if values else torch.zeros(0, dtype=torch.float64)


@PATHS
@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last),
        torch.randn(30, 20).t(),
        torch.randn(30, 20)[::2, ::3],
        torch.randn(7).expand(9, 7),
        torch.randn(5, 6, dtype=torch.complex64),
        torch.tensor(3.5),
        torch.randn(0, 4),
    ],
    ids=["channels last", "transposed", "strided", "expanded", "complex", "scalar", "empty"],
)
def test_a_tensor_of_any_layout_is_read_once_and_whole(compiled: bool, tensor: torch.Tensor) -> None:
    want = tensor.abs().double().square().sum().reshape(1)
    assert torch.allclose(reducer_of(compiled).square_sums([tensor]), want, rtol=1e-6)


def test_dense_layouts_are_read_without_a_copy() -> None:
    for tensor in (torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last), torch.randn(30, 20).t()):
        assert flat(tensor).data_ptr() == tensor.data_ptr()


@PATHS
def test_a_sparse_gradient_counts_its_coalesced_values(compiled: bool) -> None:
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[0, 0, 2]]), torch.tensor([1.0, 2.0, 4.0]), (5,), check_invariants=True
    )
    assert reducer_of(compiled).square_sums([sparse]).item() == 9 + 16


@PATHS
def test_a_norm_that_would_overflow_in_float32_is_finite(compiled: bool) -> None:
    huge = torch.full((100_000,), 3e19)
    assert reducer_of(compiled).square_sums([huge]).item() == pytest.approx(1e5 * float(huge[0]) ** 2)


@PATHS
@pytest.mark.parametrize("size", [10, CPU_BLOCK + 10])
def test_a_sum_is_not_finite_exactly_where_an_element_is_not(compiled: bool, size: int) -> None:
    clean = torch.full((size,), torch.finfo(torch.float32).max)
    infinite, nan, both = clean.clone(), clean.clone(), clean.clone()
    infinite[-1], nan[0], both[0], both[-1] = math.inf, math.nan, math.inf, math.nan
    got = reducer_of(compiled).square_sums([clean, infinite, nan, both])
    assert [str(x) for x in got.isfinite().tolist()] == ["True", "False", "False", "False"]
    assert got[1].isinf()
    assert got[2].isnan()
    assert got[3].isnan()
    sums, largest, _ = reducer_of(compiled).nonnegative([clean, infinite, nan], None)
    assert sums.isfinite().tolist() == largest.isfinite().tolist() == [True, False, False]


@PATHS
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_of_64_million_elements_is_exact_to_1e_7_and_in_float32_to_1e_9(
    compiled: bool, dtype: torch.dtype
) -> None:
    x = torch.randn(64 * 2**20, generator=torch.Generator().manual_seed(1)).to(dtype)
    want = sum(part.double().square().sum().item() for part in x.split(2**20))
    near = max(tolerance(compiled, dtype), 1e-9)
    assert reducer_of(compiled).square_sums([x]).item() == pytest.approx(want, rel=near)


def test_nothing_of_the_size_of_a_parameter_is_allocated() -> None:
    reducer = Reducer(CPU)
    x = torch.randn(4 * 2**20)
    reducer.square_sums([x])
    reducer.nonnegative([x.square()], torch.zeros(1, dtype=torch.float64))
    held = [value for value in vars(reducer).values() if isinstance(value, torch.Tensor)]
    assert sum(value.numel() * value.element_size() for value in held) <= 2 * 8 * CPU_BLOCK + CPU_BLOCK
