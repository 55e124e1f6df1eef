"""What is read of each optimizer's state is what its definition says, and docs/optimizers.md says what that is.

By default a sample of each package is run. With ``OPTWATCH_ALL_OPTIMIZERS=1`` (``make optimizers``) all are, and the
page is made anew and compared whole.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from optwatch import kernels, state
from optwatch.kernels import locate

ROOT = Path(__file__).resolve().parents[3]


def _module(name: str) -> ModuleType:
    folder = Path(__file__).parent / "optimizer_proof"
    if "optimizer_proof" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "optimizer_proof", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules["optimizer_proof"] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"optimizer_proof.{name}")


page, tables = _module("page"), _module("tables")
ALL = os.environ.get("OPTWATCH_ALL_OPTIMIZERS") == "1"
SAMPLE: dict[str, set[str]] = {
    "torch.optim": set(tables.TORCH),
    "pytorch_optimizer": {
        *("AdaBelief", "AdaFactor", "AdamMini", "Adan", "APOLLO", "CAME", "DAdaptAdam", "DASH", "FlashAdamW", "Lamb"),
        *("Lion", "Lookahead", "MADGRAD", "Muon", "Nero", "Prodigy", "SAM", "Shampoo", "SOAP", "SPAM", "TRAC"),
    },
    "schedulefree": set(tables.SCHEDULEFREE),
    "lion_pytorch": {"Lion"},
    "transformers.optimization": {"Adafactor"},
    "bitsandbytes.optim": {"AdamW8bit", "PagedAdam32bit", "Lion8bit", "Adagrad8bit"},
    "torchao.optim": set(),  # it compiles its step, which takes long
}
pytestmark = [
    # The packages' own: what is tested is what they keep, not how they are written.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        importlib.util.find_spec("pytorch_optimizer") is None, reason="needs the packages of the dev extra"
    ),
]


@pytest.mark.parametrize("package", tables.TABLES)
def test_what_is_exported_equals_the_definition_of_each_optimizer(package: str, tmp_path: Path) -> None:
    names = None if ALL else SAMPLE[package]
    if names is not None and not names:
        pytest.skip("all of it runs with OPTWATCH_ALL_OPTIMIZERS=1")
    kernels.prepare_addresses().join()  # else some would be read by Python alone: few have 50 parameters
    assert locate.compiled.made is not None
    subjects = page.proved(package, tmp_path, names)
    assert {s.name: s.problems for s in subjects if s.problems} == {}
    document = (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")
    section = document[document.index(f"## {package} ") :]
    for subject in subjects:
        assert page.row(subject) in section, "docs/optimizers.md is out of date: python scripts/generate_optimizers.py"


@pytest.mark.parametrize("package", ["torch.optim", "pytorch_optimizer", "schedulefree", "lion_pytorch"])
def test_no_optimizer_of_a_package_is_left_out(package: str) -> None:
    assert page.unlisted(package) == []


def test_every_reader_reads_a_moment_or_says_why_not() -> None:
    for name, reader in state.READERS.items():
        for signal, reason in reader.unavailable().items():
            assert re.match(r"\w.{8,}", reason), (name, signal)


class Wrong(torch.optim.Adam):
    """Keeps something else under Adam's keys."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["exp_avg"] = torch.full_like(p, 7.0)


class Careful(torch.optim.Adam):
    """Does something around Adam's step."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_a_class_that_replaces_the_step_of_a_known_one_has_no_moments() -> None:
    reader = state.reader_for(Wrong([nn.Parameter(torch.ones(2))]))
    assert "Wrong replaces step() of Adam" in reader.unavailable()["first_moment"]


def test_a_class_that_calls_the_step_of_a_known_one_is_read_as_that_one() -> None:
    assert state.reader_for(Careful([nn.Parameter(torch.ones(2))])) == state.READERS["torch.Adam"]


def test_a_class_that_is_not_known_is_named_as_the_reason() -> None:
    class Mine(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1})

    reader = state.reader_for(Mine([nn.Parameter(torch.ones(2))]))
    assert "Mine is not known" in reader.unavailable()["second_moment"]


ODD = [None, "a word", torch.ones(3), torch.ones(2, dtype=torch.int64)]


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "Python"])
@pytest.mark.parametrize("odd", ODD, ids=str)
def test_a_key_that_does_not_hold_what_it_should_is_no_moment(
    odd: Any, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels.prepare_addresses().join()
    assert locate.compiled.made is not None
    if not compiled:
        monkeypatch.setattr(locate.compiled, "made", None)
    first, second, third = (nn.Parameter(torch.ones(2)) for _ in range(3))
    reader, moment = state.READERS["torch.Adam"], torch.ones(2)
    states: dict[Any, Any] = {first: {"exp_avg": moment}, second: {"exp_avg_sq": moment}}

    def firsts(*parameters: torch.Tensor) -> tuple[list[int], list[Any]]:
        positions, moments = reader.firsts(states, list(parameters), torch.device("cpu"))
        return list(positions), list(moments)

    assert firsts(first, second, third) == ([0], [moment])
    found = kernels.moments(states, [first, second], ("exp_avg",), torch.device("cpu"))
    assert (found is not None) == compiled
    states[second]["exp_avg"] = odd
    assert firsts(second, first) == ([1], [moment])


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "Python"])
def test_steps_are_counted_by_the_parameter_or_by_its_group(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.prepare_addresses().join()
    if not compiled:
        monkeypatch.setattr(locate.compiled, "made", None)
    parameters: list[torch.Tensor] = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    reader, groups = state.READERS["torch.Adam"], [{"step": 7}, {}, {}]
    steps = [torch.tensor(3.0), torch.tensor([4.0]), 5]
    states: dict[Any, Any] = {p: {"step": step} for p, step in zip(parameters, steps, strict=True)}

    def counts(*chosen: int) -> Any:
        return reader.counts(states, [parameters[i] for i in chosen], groups, chosen)

    assert [float(x) for x in counts(0, 1, 2)] == [3, 4, 5]
    assert all(isinstance(x, float) or x.dim() == 0 for x in counts(0, 1, 2))
    assert (counts(0) == 3.0) == compiled
    states[parameters[2]]["step"] = torch.tensor(3.0)
    assert (counts(0, 2) == 3.0) == compiled
    assert [float(x) for x in counts(2, 1)] == [3, 4]
    for p in parameters:
        del states[p]["step"]
    assert [None if x is None else float(x) for x in counts(0, 1, 2)] == [7, None, None]


def test_finding_a_reader_imports_no_package() -> None:
    packages = [name for name in state.PACKAGES if name != "torch"]
    code = (
        "import sys, torch; from optwatch import state; state.reader_for(torch.optim.Adam([torch.zeros(1)]));"
        f"print([name for name in {packages!r} if name in sys.modules])"
    )
    import subprocess

    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "[]"


def held_bytes(*tensors: torch.Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def test_bytes_of_nested_and_wrapped_state_count_once() -> None:
    parameter = nn.Parameter(torch.ones(8))
    inside = torch.optim.Adam([parameter])
    shared = torch.zeros(256)
    inside.state[parameter] = {
        "codes": torch.zeros(8, dtype=torch.uint8),
        "table": shared,
        "blocks": [{"m": torch.ones(4)}],
    }
    inside.state["run"] = {"table": shared, "parameter": parameter, "count": 3}
    assert state.state_bytes(inside) == {("codes", "uint8"): 8, ("table", "float32"): 1024, ("blocks", "float32"): 16}


@pytest.mark.skipif(not ALL, reason="makes the whole page: runs with OPTWATCH_ALL_OPTIMIZERS=1")
def test_the_page_is_what_the_proofs_make(tmp_path: Path) -> None:
    text, problems = page.page(tmp_path)
    assert problems == []
    assert text == (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")
