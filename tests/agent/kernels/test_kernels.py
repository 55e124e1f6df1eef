"""The compiled kernel: exact for every number there is, alike on any number of threads, and never taken on trust."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from optwatch import kernels
from optwatch.kernels import build

RECIPE = build.reduce_recipe()


@pytest.fixture
def kernel() -> kernels.Kernel:
    kernels.prepare().join()
    found = kernels.kernel()
    assert found is not None, "this machine has no C compiler, or the kernel does not compile"
    return found


def reduced(result: torch.Tensor | None) -> torch.Tensor:
    assert result is not None
    return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_is_read_as_torch_reads_it(dtype: torch.dtype, kernel: kernels.Kernel) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    got = reduced(kernel.reduce("products", list(numbers.unbind()), list(torch.ones(2**16).unbind())))
    wide = numbers.double()
    torch.testing.assert_close(got[1], wide, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got[0], wide.square(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-30, 1e-22, 1e-15, 1e-12, 1.0, 1e17, 1e20, 3e37])
def test_sums_of_16_bits_hold_where_a_float_overflows_or_is_too_small(scale: float, kernel: kernels.Kernel) -> None:
    """They are added up in float, eight at a time."""
    x, y = (scale * torch.randn(2, 300_001)).bfloat16()
    x[: x.numel() // 3] *= 1e-6  # blocks that a float holds beside others that it does not
    y[::2] = x[::2]  # which a step has not changed
    wide, other, positive = x.double(), y.double(), x.abs()
    norms = float(wide.norm() * other.norm())
    for xs, ys in (([x], [y]), ([x, x[:0]], [y, y[:0]])):
        squares, dots, others = reduced(kernel.reduce("products", xs, ys))[:, 0]
        torch.testing.assert_close(squares, wide.square().sum(), rtol=5e-8, atol=0)
        torch.testing.assert_close(others, other.square().sum(), rtol=5e-8, atol=0)
        torch.testing.assert_close(dots, wide @ other, rtol=0, atol=5e-8 * norms)
    for n in (100_000, len(x)):
        moved, again, _ = reduced(kernel.reduce("changes", [x[:n]], [y[:n]]))[:, 0]
        torch.testing.assert_close(moved, (wide - other)[:n].square().sum(), rtol=5e-8, atol=0)
        torch.testing.assert_close(again, wide[:n].square().sum(), rtol=5e-8, atol=0)
    # A threshold beside a number of the tensor's, which a float can not tell from it.
    entry = float(positive.sort().values[200_000])
    for threshold in (entry, entry * (1 + 1e-12), entry * (1 - 1e-12)):
        found = kernel.reduce("nonnegative", [positive], thresholds=torch.tensor([threshold], dtype=torch.float64))
        total, most, below = reduced(found)[:, 0]
        torch.testing.assert_close(total, positive.double().sum(), rtol=5e-8, atol=0)
        assert most == positive.max()
        assert below == (positive.double() < threshold).sum()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_not_finite_shows_in_every_sum_that_it_is_in(
    dtype: torch.dtype, value: float, kernel: kernels.Kernel
) -> None:
    x = torch.randn(100_001).to(dtype)
    for place in (0, 70_000, 100_000):
        broken = x.clone()
        broken[place] = value
        want = value * value
        squares, dots, others = reduced(kernel.reduce("products", [broken], [x]))[:, 0]
        torch.testing.assert_close(float(squares), want, equal_nan=True)
        assert not math.isfinite(dots)
        assert math.isfinite(others)
        moved, again, _ = reduced(kernel.reduce("changes", [broken], [x]))[:, 0]
        torch.testing.assert_close([float(moved), float(again)], [want, want], equal_nan=True)
        if value != -math.inf:
            broken = broken.abs()
            total, most, _ = reduced(kernel.reduce("nonnegative", [broken]))[:, 0]
            torch.testing.assert_close([float(total), float(most)], [value, value], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [1, 31, 1000, 100_001])
def test_the_largest_magnitude_is_found_wherever_it_is(size: int, dtype: torch.dtype, kernel: kernels.Kernel) -> None:
    x = torch.randn(size).to(dtype)
    assert kernel.largest(x) == float(x.abs().max())
    assert kernel.largest(x[size:]) == 0
    for place in {0, size // 2, size - 1}:
        for value in (-100.0, torch.finfo(dtype).max, -math.inf):
            x[place] = value
            assert kernel.largest(x) == abs(float(x[place]))
        x[-1 - place] = -math.nan
        assert math.isnan(kernel.largest(x) or 0)
        x[place] = x[-1 - place] = 0


def test_the_result_has_the_same_bits_on_any_number_of_threads(kernel: kernels.Kernel) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(size, generator=generator) for size in (300_000, 7, 40_000, 0, 2**15, 100_001)]
    others = [torch.randn_like(x) for x in tensors]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            kinds: tuple[kernels.Kind, ...] = ("products", "changes")
            results.append([reduced(kernel.reduce(kind, tensors, others)) for kind in kinds])
            results[-1].append(reduced(kernel.reduce("nonnegative", [x.square() for x in tensors])))
    finally:
        torch.set_num_threads(before)
    for again in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], again, strict=True))


def test_pairs_of_different_dtypes_and_tensors_at_odd_addresses_are_read(kernel: kernels.Kernel) -> None:
    x, y = torch.randn(5001)[1:], torch.randn(5003).bfloat16()[3:]
    squares, dots, others = reduced(kernel.reduce("products", [x, y], [y, x]))
    want = (x.double() * y.double()).sum()
    torch.testing.assert_close(dots, torch.stack([want, want]), rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(squares, others.flip(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(4, 4).t()[1:],
        torch.ones(3, device="meta"),
        torch.ones(3, dtype=torch.int64),
        torch.ones(3).to_sparse(),
        torch.ones(3, dtype=torch.complex64),
    ],
    ids=["strided", "elsewhere", "integers", "sparse", "complex"],
)
def test_what_the_kernel_cannot_read_it_leaves_alone(tensor: torch.Tensor, kernel: kernels.Kernel) -> None:
    assert kernel.reduce("products", [tensor]) is None
    assert kernel.largest(tensor) is None


@pytest.mark.parametrize(
    "place",
    [
        torch.zeros(2),
        torch.zeros(3, dtype=torch.float64),
        torch.zeros(4, 2, dtype=torch.float64),
        torch.zeros(4, dtype=torch.float64)[::2],
        torch.zeros(2, dtype=torch.float64, device="meta"),
        torch.zeros(2, 3, dtype=torch.float64).t()[:2],
    ],
    ids=["float32", "too long", "too many rows", "strided", "elsewhere", "transposed"],
)
@pytest.mark.parametrize("pairs", [False, True])
def test_numbers_are_not_written_beyond_their_place(place: torch.Tensor, pairs: bool, kernel: kernels.Kernel) -> None:
    xs = [torch.ones(5), torch.ones(7)]
    wrong, right = kernels.Place(place), kernels.Place(torch.zeros(3, 2, dtype=torch.float64))
    request = kernels.Request("products", xs, *((right, xs) if pairs else (wrong,)), pairs=wrong if pairs else None)
    with pytest.raises(ValueError, match=r"numbers of 2 tensors do not fit into \(.*give float64 on the CPU, 2 in its"):
        kernel.run([request])
    assert not right.numbers.any()


def test_tensors_are_copied_to_targets_that_are_alike_and_to_no_other(kernel: kernels.Kernel) -> None:
    sources = [torch.randn(n).to(dtype) for n in (0, 1, 100_001) for dtype in (torch.float32, torch.bfloat16)]
    targets = [torch.zeros_like(x) for x in sources]

    def copy(xs: list[torch.Tensor], ys: list[torch.Tensor]) -> bool:
        return kernel.run([kernels.Request("copy", xs, None, ys)])

    assert copy(sources, targets)
    assert all(torch.equal(x, y) for x, y in zip(sources, targets, strict=True))
    for other in (torch.zeros(2), torch.zeros(1, dtype=torch.float16), torch.zeros(1, dtype=torch.float64)):
        assert not copy([torch.ones(1)], [other])
        assert not other.any()
    assert not copy([torch.ones(1), torch.ones(1)], [torch.zeros(1)])


def test_memory_that_was_given_back_or_is_too_short_is_not_read(kernel: kernels.Kernel) -> None:
    whole = torch.ones(1000)
    part = whole[100:]
    whole.untyped_storage().resize_(0)  # as FSDP does with the parameters of other layers
    for freed in (whole, part):
        assert kernel.reduce("products", [torch.ones(3), freed]) is None
        assert kernel.reduce("changes", [torch.ones(len(freed))], [freed]) is None
        assert kernel.largest(freed) is None
    sums = kernel.reduce("products", [torch.empty(0), torch.ones(2)])  # which has no memory and needs none
    assert sums is not None
    assert sums[0].tolist() == [0, 2]
    assert kernel.reduce("products", [torch.ones(10)], [torch.ones(9)]) is None
    assert kernel.reduce("changes", [torch.ones(10), torch.ones(3)], [torch.ones(10)], [0]) is None
    assert kernel.reduce("nonnegative", [torch.ones(10)], thresholds=torch.ones(2)) is None


def test_processes_that_begin_together_compile_a_library_once_and_it_is_the_users_alone(tmp_path: Path) -> None:
    log, compiler, cache = tmp_path / "log", tmp_path / "compiler", tmp_path / "cache"
    real = build._compiler(RECIPE)[0]
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] || echo compiled >> {log}\nexec {real} "$@"\n')
    compiler.chmod(0o700)
    program = (
        "import sys\nfrom pathlib import Path\nfrom optwatch.kernels import build\n"
        "print(build.library(build.reduce_recipe(), Path(sys.argv[1])))"
    )
    begun = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(cache)], env=os.environ | {"CC": str(compiler)}, stdout=subprocess.PIPE
        )
        for _ in range(3)
    ]
    printed = {process.communicate()[0].decode().strip() for process in begun}
    assert all(process.returncode == 0 for process in begun)
    path = Path(printed.pop())
    assert not printed
    assert log.read_text() == "compiled\n"
    assert oct(path.parent.stat().st_mode & 0o777) == oct(path.stat().st_mode & 0o777) == "0o700"
    assert {each.name for each in cache.iterdir()} == {path.name, path.with_suffix(".lock").name}


@pytest.mark.parametrize("mode", [0o700, 0o720, 0o702])
def test_code_is_not_loaded_from_a_folder_that_others_can_write_to(mode: int, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    if mode == 0o700:
        assert build._own_folder(shared) == shared
        return
    with pytest.raises(PermissionError, match=f"{shared}: .* writable by nobody else"):
        build.library(RECIPE, shared)


def test_a_library_that_does_not_work_is_not_kept(tmp_path: Path) -> None:
    header = RECIPE.source.with_name("sums.h").read_text()
    assert "some[k] += a[k] * a[k]" in header
    (tmp_path / "sums.h").write_text(header.replace("some[k] += a[k] * a[k]", "some[k] += a[k]"))  # wrong, and compiles
    source = tmp_path / "reduce.c"
    source.write_text(RECIPE.source.read_text())
    with pytest.raises(OSError, match="instead of"):
        build.library(replace(RECIPE, source=source), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.so"))


def test_without_a_compiler_training_is_watched_all_the_same(tmp_path: Path) -> None:
    program = (
        "import torch\nfrom optwatch import Settings, attach, kernels\n"
        "p = torch.nn.Parameter(torch.full((4,), 3.0))\noptimizer = torch.optim.SGD([p], lr=0.1)\n"
        "monitor = attach(optimizer, port=0, settings=Settings(address='127.0.0.1'))\n"
        "p.square().sum().backward()\noptimizer.step()\nkernels.prepare().join()\nassert kernels.kernel() is None\n"
        "assert monitor.flush(60)\nassert monitor.snapshot()['optwatch_grad_norm{stage=\"at_step\"}'] == 12\n"
        "assert not monitor.faults.counts\nmonitor.detach()\n"
    )
    environment = os.environ | {"PATH": str(tmp_path), "CC": "", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
