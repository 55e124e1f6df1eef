"""Runs one of the checks below on the device given as an argument, and prints what disagrees with float64 sums.

By itself a process: Triton decides at its import whether it interprets (TRITON_INTERPRET=1, on a CPU) or compiles.
"""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any

import torch

from optwatch import kernels
from optwatch.kernels.cuts import BLOCK, CHUNK, Cut, Form
from optwatch.kernels.device import DeviceKernel
from optwatch.training.statistics import Reducer

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = (0, 1, 3, 1024, 5000, CHUNK, CHUNK + 1)
wrong: list[object] = []


def check(what: object, got: torch.Tensor, want: torch.Tensor) -> None:
    # Products of both signs may sum up to little: their rounding is that of the terms.
    if not torch.allclose(got.cpu(), want.cpu(), rtol=1e-12, atol=1e-9, equal_nan=True):
        wrong.append(what)
        print(what, got.tolist()[:4], want.tolist()[:4])


def wait(kernel: DeviceKernel, *arguments: Any) -> torch.Tensor:
    """The result, once the form that it needs has been compiled in the background."""
    for _ in range(6000):
        if (result := kernel.reduce(*arguments)) is not None:
            return result
        if kernel.off:
            break
        time.sleep(0.02)
    raise SystemExit(f"no answer: {kernel}")


def right(kind: str, x: torch.Tensor, y: torch.Tensor | None, limit: float) -> list[float]:
    x = x.double()
    if kind == "nonnegative":
        return [float(x.sum()), float(x.max()) if x.numel() else 0.0, float((x < limit).sum())]
    if kind == "changes":
        assert y is not None
        return [float((x - y.double()).square().sum()), float(x.square().sum()), 0.0]
    other = torch.zeros_like(x) if y is None else y.double()
    return [float(x.square().sum()), float((x * other).sum()), float(other.square().sum())]


def every_kind_dtype_and_size(kernel: DeviceKernel, device: torch.device) -> None:
    xs = [torch.randn(n, device=device).to(d) for n, d in itertools.product(SIZES, DTYPES)]
    at = [i for i in range(len(xs)) if i % 5]
    ys = [torch.randn(xs[i].numel(), device=device).to(DTYPES[i % 3]) for i in at]
    other = dict(zip(at, ys, strict=True))
    limits = torch.linspace(0.0, 1.0, len(xs), dtype=torch.float64)
    cases: list[tuple[str, list[torch.Tensor], Any, Any, Any]] = [
        ("products", xs, ys, at, None),
        ("products", xs, (), None, None),
        ("changes", [xs[i] for i in at], ys, None, None),
        ("nonnegative", [x.abs() for x in xs], (), None, limits),
        ("nonnegative", [x.abs() for x in xs], (), None, limits.to(device)),
        ("nonnegative", [x.abs() for x in xs], (), None, None),
    ]
    for kind, firsts, seconds, positions, thresholds in cases:
        for _ in range(2):
            result = wait(kernel, kind, firsts, seconds, positions, thresholds).cpu()
            for i, x in enumerate(firsts):
                y = (other if kind == "products" and positions else dict(enumerate(seconds))).get(i)
                limit = -1.0 if thresholds is None else float(thresholds[i])
                expected = torch.tensor(right(kind, x, y, limit), dtype=torch.float64)
                check((kind, x.dtype, x.numel()), result[:, i], expected)


def more_chunks_than_are_added_up_at_once(kernel: DeviceKernel, device: torch.device) -> None:
    from optwatch.kernels.triton_reduce import launch  # imported by a thread of the kernel's in the other checks

    x = torch.rand(300 * BLOCK + 5, device=device)
    y = torch.rand_like(x)
    for kind, other, limit in (("products", y, None), ("changes", y, None), ("nonnegative", None, 0.3)):
        limits = None if limit is None else torch.tensor([limit], dtype=torch.float64, device=device)
        seconds = () if other is None else [other]
        wait(kernel, kind, [x], seconds, None, limits)
        form = Form(kind, x.dtype, None if other is None else y.dtype, limit is not None, aligned=True)
        cut = Cut([x.numel()], [form], chunk=BLOCK)
        table = torch.tensor(cut.filled([x.data_ptr()], [y.data_ptr()]), dtype=torch.int64, device=device)
        partial = torch.zeros(3 * cut.rows, dtype=torch.float64, device=device)
        result = torch.zeros(3, 1, dtype=torch.float64, device=device)
        launch(cut, table, limits, partial, result)
        check(
            (kind, "301 chunks"), result[:, 0], torch.tensor(right(kind, x, other, limit or 0.0), dtype=torch.float64)
        )


def numbers_that_are_not_finite(kernel: DeviceKernel, device: torch.device) -> None:
    for value in (float("nan"), float("inf")):
        for at in (0, CHUNK):
            broken = torch.ones(CHUNK + 1, device=device)
            broken[at] = value
            for kind in ("products", "nonnegative"):
                seen = wait(kernel, kind, [broken]).cpu()
                finite = wait(kernel, kind, [torch.full((5,), 3e19, device=device)]).cpu()
                same = seen[0, 0].isnan() if value != value else seen[0, 0] == value
                largest = kind == "products" or bool(seen[1, 0].isnan() if value != value else seen[1, 0] == value)
                if not same or not finite.isfinite().all() or not largest:
                    wrong.append(kind)
                    print("non-finite", kind, value, at, seen.tolist(), finite.tolist())


def what_it_cannot_read(kernel: DeviceKernel, device: torch.device) -> None:
    freed, whole = torch.ones(1000, device=device), torch.ones(1000, device=device)
    part = whole[100:]
    for each in (freed, whole):
        each.untyped_storage().resize_(0)  # as FSDP does with the parameters of other layers
    two = torch.ones(2, device=device)
    refused: list[tuple[Any, ...]] = [
        ("products", [torch.ones(4, 4, device=device).t()[:2]]),
        ("products", [torch.ones(3, dtype=torch.int64, device=device)]),
        ("products", [torch.ones(3, device="meta")]),
        ("products", [freed]),
        ("products", [part]),
        ("products", [two], [torch.ones(3, device=device)]),
        ("nonnegative", [two], (), None, torch.ones(2)),
    ]
    for arguments in refused:
        if kernel.reduce(*arguments) is not None:
            wrong.append(arguments)
            print("read what it cannot read:", arguments)
    if kernel.off:
        wrong.append(kernel.off)
        print(kernel.off)


def lists(device: torch.device) -> dict[str, list[torch.Tensor]]:
    made = [torch.randn(n, device=device).to(d) for n, d in itertools.product((0, 7, 2000), DTYPES)]
    odd = torch.randn(4000, device=device)
    odd[17], odd[2000] = float("nan"), float("inf")
    return {
        "every dtype": made,
        "no tensor": [],
        "empty tensors": [torch.ones(0, 4, device=device), torch.ones(0, device=device)],
        "not contiguous": [
            torch.randn(30, 20, device=device).t(),
            torch.randn(30, 20, device=device)[::2, ::3],
            torch.randn(8, 3, 5, 5, device=device).to(memory_format=torch.channels_last),
            torch.randn(7, device=device).expand(9, 7),
            torch.tensor(3.5, device=device),
        ],
        "odd addresses": [odd[i : i + 900 + i] for i in (1, 2, 3, 5)],
        "not finite": [odd, odd[100:1900], odd[1999:]],
        # Each is a program, which the interpreter takes its time for.
        "many small tensors": [torch.randn(i % 9, device=device) for i in range(200 if device.type == "cpu" else 2000)],
    }


def a_reducer(kernel: DeviceKernel, device: torch.device) -> None:
    """With the kernel a `Reducer` gives what it gives without."""
    plain, kerneled = Reducer(device), Reducer(device)
    kerneled._compiles = True
    kernels.kernel = lambda _=None: kernel if kernel.there else None  # type: ignore[assignment,misc]
    for name, xs in lists(device).items():
        ys, positive = [(x * 0.5).to(x.dtype) for x in xs], [x.abs() for x in xs]
        at = [i for i in range(len(xs)) if i % 3 == 1]
        paired = [ys[i] for i in at]
        limits = torch.linspace(0, 1, len(xs), dtype=torch.float64)
        flats = [x.reshape(-1).clone() for x in xs]
        plan = plain.new_plan([x.numel() for x in flats])
        calls: dict[str, Any] = {
            "square_sums": lambda r, xs=xs: r.square_sums(xs),
            "dot_products": lambda r, xs=xs, ys=ys: r.dot_products(xs, ys),
            "products": lambda r, xs=xs, at=at, paired=paired: torch.cat(
                [part.flatten() for part in r.products(xs, at, paired)]
            ),
            "changes": lambda r, flats=flats, plan=plan: r.changes([x * 0.5 for x in flats], flats, plan),
            "nonnegative": lambda r, positive=positive, limits=limits: r.nonnegative(positive, limits),
            "without limits": lambda r, positive=positive: r.nonnegative(positive, None),
        }
        for call, work in calls.items():
            want = work(plain)
            for _ in range(6000):
                before = kernel.answered
                got = work(kerneled)  # also right where the kernel has not answered yet
                check((name, call), got, want)
                if kernel.answered > before or not xs or kernel.off:
                    break
                time.sleep(0.02)
            if (xs and kernel.answered == before) or kernel.off:
                wrong.append((name, call))
                print("not answered by the kernel:", name, call, kernel)
    if device.type == "cuda" and kerneled._scratch is not None:
        wrong.append("scratch")


def a_fault(kernel: DeviceKernel, device: torch.device) -> None:
    """A launch that raises switches the kernel off; the same call is answered, and the kernel is not asked again."""
    made: Any = kernel._made
    calls = []

    def broken(*arguments: Any) -> None:
        calls.append(arguments)
        raise RuntimeError("no launch")

    made.reduce = broken
    reducer = Reducer(device)
    reducer._compiles = True
    for _ in range(3):
        check("fault", reducer.square_sums([torch.full((3,), 2.0, device=device)]), torch.tensor([12.0]).double())
    if len(calls) != 1 or kernel.off != "RuntimeError: no launch":
        wrong.append("fault")
        print("asked", len(calls), "times;", kernel)


def main() -> None:
    device = torch.device(sys.argv[1])
    kernel = DeviceKernel(device)
    kernel.thread.start()
    torch.manual_seed(0)
    for check_of in CHECKS[sys.argv[2]]:
        check_of(kernel, device)
    print(f"{len(wrong)} wrong")
    kernel.close()
    sys.exit(len(wrong) > 0)


CHECKS = {
    "kernel": (
        every_kind_dtype_and_size,
        more_chunks_than_are_added_up_at_once,
        numbers_that_are_not_finite,
        what_it_cannot_read,
    ),
    "reducer": (a_reducer, a_fault),
}

if __name__ == "__main__":
    main()
