"""The GPU's one-pass kernel counts what float64 sums count, never holds up training, and is left where it fails.

Interpreted on a CPU and compiled for GPUs that are not there; where there is one, run on it.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optwatch import kernels
from optwatch.kernels import device as devices
from optwatch.kernels.cuts import BLOCK, CHUNK, HEADER, MOST_CHUNKS, Cut, Form
from optwatch.kernels.device import DeviceKernel
from optwatch.training.statistics import Reducer

HERE = Path(__file__).parent
CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is built for Linux on x86-64")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )


def assert_nothing_wrong(done: subprocess.CompletedProcess[str]) -> None:
    said = done.stdout.strip().splitlines()
    assert (done.returncode, said[-1:]) == (0, ["0 wrong"]), done.stdout[-4000:] + done.stderr[-4000:]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("what", ["kernel", "reducer"])
def test_interpreted_it_agrees_with_float64_for_every_kind_dtype_size_and_layout(what: str) -> None:
    assert_nothing_wrong(run(str(HERE / "kernels_device.py"), "cpu", what, TRITON_INTERPRET="1"))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("which", ["aligned", "unaligned"])
def test_every_form_becomes_machine_code_of_a_gpu_and_is_the_same_for_all_addresses(which: str, tmp_path: Path) -> None:
    assert_nothing_wrong(run(str(HERE / "kernels_compile.py"), which, "90", TRITON_CACHE_DIR=str(tmp_path)))


def form(kind: str = "products", aligned: bool = True) -> Form:
    return Form(kind, torch.float32, torch.float32 if kind == "changes" else None, kind == "nonnegative", aligned)


@pytest.mark.parametrize(
    "sizes",
    [
        [],
        [0, 0],
        [1],
        [BLOCK, CHUNK, CHUNK + 1],
        [3] * 100_000,
        [CHUNK * MOST_CHUNKS],
        [CHUNK * MOST_CHUNKS + 1],
        [10**11, *[1] * 1000],
        [CHUNK + 1] * (MOST_CHUNKS - 1),  # as many tensors of two chunks as there can be
        [CHUNK + 1] * 30_000,
        [2**28] * 300 + [2048] * 600,
    ],
    ids=str,
)
def test_a_call_holds_at_most_a_mebibyte_and_64_bytes_a_tensor_on_the_device(sizes: list[int]) -> None:
    cut = Cut(sizes, [form(aligned=i % 2 == 0) for i in range(len(sizes))])
    thresholds = 8 * len(sizes)
    assert cut.device_bytes + thresholds <= 2**20 + 64 * len(sizes)


@pytest.mark.parametrize("sizes", [[5], [0, 7, BLOCK, 0], [BLOCK + 1, 3 * BLOCK, 2], [9 * BLOCK + 5, BLOCK + 1, BLOCK]])
def test_every_element_is_in_one_chunk_of_its_tensor(sizes: list[int]) -> None:
    cut = Cut(sizes, [form()] * len(sizes), chunk=BLOCK)
    (part,) = cut.parts
    table = cut.filled([100 * (i + 1) for i in range(len(sizes))], [0] * len(sizes)).tolist()
    count, columns, chunk, of_large, large = table[:HEADER]
    addresses, _, lengths, places = (table[HEADER + k * count : HEADER + (k + 1) * count] for k in range(4))
    pieces = table[HEADER + 4 * count :][:of_large]
    firsts = table[HEADER + 4 * count + of_large :]
    assert (count, columns, chunk, large) == (
        sum(x > 0 for x in sizes),
        len(sizes),
        BLOCK,
        sum(x > BLOCK for x in sizes),
    )
    assert addresses == [100 * (i + 1) for i in places]
    assert lengths == [sizes[i] for i in places]
    assert part.programs == of_large + count - large
    seen: dict[int, list[int]] = {i: [] for i in places}
    for program in range(part.programs):  # as the kernel does
        owner = pieces[program] >> 32 if program < of_large else large + program - of_large
        begin = (pieces[program] & 0x7FFFFFFF) * chunk if program < of_large else 0
        seen[places[owner]] += range(begin, min(begin + chunk, lengths[owner]))
    assert seen == {i: list(range(size)) for i, size in enumerate(sizes) if size}
    assert [pieces[first] for first in firsts] == [owner << 32 for owner in range(large)]


class Broken:
    """Stands for a kernel whose launch raises."""

    def __init__(self) -> None:
        self.calls = 0

    def reduce(self, *_: Any) -> None:
        self.calls += 1
        raise RuntimeError("no such launch")


class Silent(Broken):
    """Stands for one whose form is not there yet."""

    def reduce(self, *_: Any) -> None:
        self.calls += 1


def with_kernel(made: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Reducer, DeviceKernel]:
    kernel = DeviceKernel(CPU)
    kernel._made = made
    monkeypatch.setitem(devices._kernels, CPU, kernel)
    monkeypatch.setattr(kernels, "kernel", devices.kernel)
    monkeypatch.setattr(kernels, "prepare", lambda device: None)
    return Reducer(CPU, compiled=True), kernel


def results(reducer: Reducer) -> list[list[float]]:
    xs, ys = [torch.full((3,), 2.0), torch.ones(2)], [torch.full((3,), 5.0), torch.ones(2)]
    squares, pairs = reducer.products(xs, [0], ys[:1])
    return [
        reducer.square_sums(xs).tolist(),
        reducer.dot_products(xs, ys).tolist(),
        squares.tolist(),
        pairs.flatten().tolist(),
        reducer.changes(ys, xs, reducer.new_plan([3, 2])).flatten().tolist(),
        reducer.nonnegative(xs, torch.tensor([1.5, 1.5], dtype=torch.float64)).flatten().tolist(),
    ]


RIGHT = [[12, 2], [30, 2], [12, 2], [12, 30, 75], [27, 0, 12, 2], [6, 2, 2, 1, 0, 2]]


def test_what_the_kernel_does_not_answer_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Silent()
    reducer, kernel = with_kernel(made, monkeypatch)
    assert results(reducer) == RIGHT
    assert made.calls > 6
    assert kernel.off is None


def test_a_launch_that_raises_is_said_once_and_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = Broken()
    reducer, kernel = with_kernel(made, monkeypatch)
    assert results(reducer) == RIGHT == results(reducer)
    assert made.calls == 1
    (record,) = [record for record in caplog.records if record.name == "optwatch"]
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "optwatch: no Triton kernel on cpu, torch's operations do it: RuntimeError: no such launch"
    )
    assert str(kernel) == "Triton kernel of cpu (off: RuntimeError: no such launch), 0 calls answered"


@pytest.mark.parametrize("broken", [None, "raise OSError('libtriton.so: no such symbol')"])
def test_a_triton_that_cannot_be_imported_leaves_torchs_operations(
    broken: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton" or name.endswith("triton_reduce")]:
        monkeypatch.delitem(sys.modules, name)
    if broken is None:
        monkeypatch.setitem(sys.modules, "triton", None)
    else:
        (tmp_path / "triton.py").write_text(broken)
        monkeypatch.syspath_prepend(tmp_path)
    caplog.set_level(logging.DEBUG, "optwatch")
    reducer, kernel = with_kernel(None, monkeypatch)
    kernel.thread.start()
    assert results(reducer) == RIGHT
    kernel.thread.join(60)
    assert kernel.off is not None
    assert results(reducer) == RIGHT
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]


ONE_STEP = """
import importlib.abc, sys, threading
import torch
from optwatch import Settings, attach, kernels
from optwatch.kernels import device as devices

class Who(importlib.abc.MetaPathFinder):
    seen = set()
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "triton" or name.endswith((".triton_reduce", ".triton_code")):
            self.seen.add(threading.current_thread().name)

sys.modules["triton"] = None  # torch itself imports it with its first optimizer
p = torch.nn.Parameter(torch.full((4,), 3.0))
optimizer = torch.optim.AdamW([p], lr=0.1)
del sys.modules["triton"]
sys.meta_path.insert(0, Who())
monitor = attach(optimizer, port=0, settings=Settings(address="127.0.0.1", sample_every=1))
for _ in range(3):
    p.square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
assert monitor.flush(60)
assert not monitor.faults.counts
monitor.detach()
assert "triton" not in sys.modules, "imported on a CPU"
assert not Who.seen and not devices._kernels
"""
ASKED = """
cpu = torch.device("cpu")
devices.prepare(cpu)
kernel = devices._kernels[cpu]
while not kernel.there:
    assert kernel.off is None, kernel.off
    kernel.thread.join(0.01)
"triton" in sys.modules or sys.exit("not imported at all")
assert Who.seen == {"optwatch-triton"}, Who.seen
assert kernel.reduce("products", [torch.ones(3)]) is None, "compiled while the caller waited"
"""


def test_on_a_cpu_neither_import_nor_attach_nor_steps_import_triton() -> None:
    done = run("-c", ONE_STEP)
    assert done.returncode == 0, done.stderr


@needs_triton
def test_triton_is_imported_and_compiles_on_a_thread_of_its_own_which_the_interpreters_end_waits_for() -> None:
    done = run("-c", ONE_STEP + ASKED, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


@needs_triton
def test_a_kernel_that_is_interpreted_is_not_given_addresses_of_a_gpu() -> None:
    program = "import torch\nfrom optwatch.kernels.triton_reduce import TritonKernel\nTritonKernel(torch.device('{}'))"
    for device, interpreted in (("cuda:0", "1"), ("cpu", "0")):
        done = run("-c", program.format(device), TRITON_INTERPRET=interpreted)
        assert done.returncode == 1
        assert f"TRITON_INTERPRET is for the CPU, and compiled kernels are for CUDA: not for {device}" in done.stderr


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("what", ["kernel", "reducer"])
def test_compiled_it_agrees_with_float64_for_every_kind_dtype_size_and_layout(what: str) -> None:
    assert_nothing_wrong(run(str(HERE / "kernels_device.py"), "cuda:0", what, TRITON_INTERPRET="0"))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.filterwarnings("ignore:.*FP_FUSION")
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}], ids=str)
def test_the_kernel_takes_over_within_1000_steps_none_of_which_waits_or_compiles(
    options: dict[str, bool], watch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs

    compiled: list[str] = []
    monkeypatch.setattr(
        knobs.runtime, "jit_post_compile_hook", lambda **_: compiled.append(threading.current_thread().name)
    )
    monkeypatch.setattr(devices, "_kernels", {})  # as in a new process
    net = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 1)).cuda()
    optimizer = torch.optim.AdamW(net.parameters(), **options)
    monitor = watch(optimizer, sample_every=5)
    x = torch.randn(32, 64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1000):
            net(x).square().mean().backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step == 20:  # every form has been asked for, and torch's operations have answered until now
                (kernel,) = devices._kernels.values()
                end = time.monotonic() + 100
                while kernel.waiting:
                    assert kernel.off is None
                    assert time.monotonic() < end, "not compiled in time"
                    time.sleep(0.05)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert monitor.flush(30)
    assert not monitor.faults.counts
    assert kernel.off is None
    assert kernel.answered > 900
    assert set(compiled) <= {"optwatch-triton"}


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("count", [1, 2000])
def test_on_a_device_a_call_holds_at_most_a_mebibyte_and_64_bytes_a_tensor(count: int) -> None:
    device = torch.device("cuda", 0)
    xs = list(torch.ones(2**24, device=device).split(2**24 // count))
    reducer = Reducer(device, compiled=True)
    limits = torch.ones(len(xs), dtype=torch.float64)
    at = range(0, len(xs), 2)
    calls = [
        lambda: reducer.products(xs, list(at), [xs[i] for i in at]),
        lambda: reducer.nonnegative(xs, limits),
        lambda: reducer.changes(xs, xs, reducer.new_plan([x.numel() for x in xs])),
    ]
    for call in calls:
        call()
        kernel = devices._kernels[device]
        end = time.monotonic() + 100
        while kernel.waiting or not kernel.answered:
            assert kernel.off is None
            assert time.monotonic() < end, "not compiled in time"
            time.sleep(0.05)
            call()
        before = kernel.answered
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        assert kernel.answered == before + 2
        assert torch.cuda.max_memory_allocated() - held <= 2**20 + 64 * len(xs)
    assert reducer._scratch is None
