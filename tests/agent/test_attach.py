"""`attach`: what it takes, what it refuses and how, and that it needs torch only when called."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import optwatch
from optwatch import attach


@pytest.fixture
def optimizer(net: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1)


def test_attaching_again_returns_the_same_monitor_and_adds_no_hook(watch: Any, optimizer: Any) -> None:
    monitor = watch(optimizer)
    hooks = len(optimizer._optimizer_step_pre_hooks)
    assert watch(optimizer) is monitor
    assert attach(optimizer) is monitor
    assert len(optimizer._optimizer_step_pre_hooks) == hooks


def test_an_optimizer_given_twice_is_watched_once(watch: Any, optimizer: Any, step: Any) -> None:
    monitor = watch(optimizer, optimizer)
    step(optimizer)
    assert monitor.flush(30)
    assert monitor.snapshot()["optwatch_steps_total"] == 1


def test_part_of_a_run_that_is_watched_is_that_run(watch: Any, net: Any) -> None:
    first, second = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in net)
    monitor = watch(first, second)
    assert watch(second) is monitor


def test_an_optimizer_of_another_run_is_refused(watch: Any, net: Any) -> None:
    first, second = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in net)
    watch(first)
    told = "some of these optimizers are watched already; give all optimizers of a run to one attach(), or call "
    with pytest.raises(ValueError, match=re.escape(told)):
        watch(first, second)


def test_after_detach_nothing_of_it_is_left(watch: Any, optimizer: Any) -> None:
    backward, threads = torch.Tensor.backward, set(threading.enumerate())
    monitor = watch(optimizer)
    assert torch.Tensor.backward is not backward
    monitor.detach()
    monitor.detach()
    assert torch.Tensor.backward is backward
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert {t for t in threading.enumerate() if t.name.startswith("optwatch")} <= threads


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"port": -1}, ValueError, "attach(port=-1): give a port from 0 to 65535"),
        ({"port": 65536}, ValueError, "attach(port=65536): give a port from 0 to 65535"),
        ({"port": "9464"}, ValueError, "attach(port='9464'): give a port from 0 to 65535"),
        ({"server": "optwatch:8000"}, ValueError, "attach(server='optwatch:8000'): give a URL such as http://"),
        ({"server": "ftp://x"}, ValueError, "attach(server='ftp://x'): give a URL such as http://optwatch:8000"),
        ({"server": "http://"}, ValueError, "attach(server='http://'): give a URL such as http://optwatch:8000"),
        ({"server": "http://x:many"}, ValueError, "attach(server='http://x:many'): give a URL such as http://"),
        ({"model": "gpt"}, TypeError, "attach(model=str): give the torch.nn.Module that is trained"),
        ({"run": "r" * 257}, ValueError, "has 257 characters: give at most 256"),
        ({"tags": {"": "x"}}, ValueError, "tag '': give a name of 1 to 128 characters"),
        ({"tags": {"k": "v" * 257}}, ValueError, "tag k='vvv"),
        ({"tags": {str(n): "" for n in range(64)}}, ValueError, "64 tags: give at most 63"),
        ({"seed": 2**64}, ValueError, "seed=18446744073709551616: give one that torch.manual_seed takes"),
    ],
)
def test_an_argument_that_does_not_fit_is_refused_by_name(
    arguments: dict[str, Any], error: type[Exception], told: str, optimizer: Any, settings: Any
) -> None:
    with pytest.raises(error, match=re.escape(told)):
        attach(optimizer, settings=settings(), **arguments)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    ("variable", "text", "told"),
    [
        ("OPTWATCH_PORT", "http", "OPTWATCH_PORT='http': give a port from 0 to 65535"),
        ("OPTWATCH_PORT", "70000", "OPTWATCH_PORT='70000': give a port from 0 to 65535"),
        ("OPTWATCH_SERVER", "optwatch", "OPTWATCH_SERVER='optwatch': give a URL such as http://optwatch:8000"),
        ("OPTWATCH_TAGS", "a=1,b", "OPTWATCH_TAGS='a=1,b': 'b' is no tag; give key=value,key=value"),
        ("OPTWATCH_SEED", "x", "OPTWATCH_SEED='x': give a whole number"),
        ("OPTWATCH_RUN_ID", "-x", "OPTWATCH_RUN_ID='-x': give at most 128 letters, digits, '.', '_' or '-', beginning"),
        ("WORLD_SIZE", "0", "WORLD_SIZE='0': give the number of ranks, 1 or more"),
        ("RANK", "-1", "RANK='-1': give this process's rank, 0 or more"),
        ("RANK", "one", "RANK='one': give a whole number"),
    ],
)
def test_a_variable_that_does_not_fit_is_refused_by_name(
    variable: str, text: str, told: str, optimizer: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(ValueError, match=re.escape(told)):
        attach(optimizer, settings=settings())


def test_what_is_no_optimizer_is_refused_by_its_type(net: Any) -> None:
    with pytest.raises(TypeError, match=re.escape("attach(Sequential): give a torch.optim.Optimizer")):
        attach(net)


def test_arguments_come_before_variables(watch: Any, optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, text in {"RUN": "a", "PROJECT": "b", "TAGS": "x=1, y=2", "SEED": "3", "RESUME_FROM": "old"}.items():
        monkeypatch.setenv(f"OPTWATCH_{variable}", text)
    run = watch(optimizer, project="mine", tags={"y": 5}).run
    assert (run.name, run.project, run.tags, run.seed, run.resumed_from) == (
        "a",
        "mine",
        {"x": "1", "y": "5"},
        3,
        "old",
    )


def test_the_port_and_settings_come_from_variables(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTWATCH_PORT", "0")
    monkeypatch.setenv("OPTWATCH_ADDRESS", "127.0.0.1")
    monkeypatch.setenv("OPTWATCH_SAMPLE_EVERY", "7")
    monitor = attach(optimizer)
    try:
        assert monitor._host._settings.sample_every == 7
        assert not monitor.url.endswith(":9464/metrics")
    finally:
        monitor.detach()


def test_without_a_server_there_is_no_reporter_and_no_run_page(watch: Any, optimizer: Any) -> None:
    monitor = watch(optimizer)
    assert monitor.run_url is None
    assert "optwatch-reporter" not in {thread.name for thread in threading.enumerate()}


def test_a_status_that_is_none_is_refused(watch: Any, optimizer: Any) -> None:
    with pytest.raises(ValueError, match=re.escape("finish('done'): give 'succeeded', 'failed' or 'cancelled'")):
        watch(optimizer).finish("done")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_importing_optwatch_imports_no_torch() -> None:
    code = "import sys, optwatch; print('torch' in sys.modules, optwatch.Settings().max_layers)"
    done = run_python(code)
    assert (done.stdout, done.stderr) == ("False 20\n", "")


def test_without_torch_attach_says_what_to_install() -> None:
    code = """
import sys
sys.modules["torch"] = None
import optwatch
try:
    optwatch.attach(object())
except ModuleNotFoundError as error:
    print(error.name, error)
"""
    done = run_python(code)
    expected = (
        "torch optwatch.attach needs PyTorch, which is not installed here: pip install 'optwatch[torch]', or torch as "
        "https://pytorch.org says for your machine\n"
    )
    assert (done.stdout, done.stderr) == (expected, "")


def test_the_packages_names_are_there_and_others_are_refused() -> None:
    assert {name for name in optwatch.__all__ if getattr(optwatch, name) is None} == set()
    with pytest.raises(AttributeError, match="module 'optwatch' has no attribute 'attatch'"):
        optwatch.attatch  # noqa: B018


def test_an_address_that_cannot_be_bound_makes_no_run_known(stand_in: Any, optimizer: Any, settings: Any) -> None:
    server = stand_in()
    with pytest.raises(OSError, match="give an address of this machine"):
        attach(optimizer, port=0, server=server.url, settings=settings(address="192.0.2.1"))
    assert server.requests == []
    assert "optwatch-reporter" not in {thread.name for thread in threading.enumerate()}


def test_where_there_is_no_home_messages_go_to_the_folder_for_temporary_files(tmp_path: Path, stand_in: Any) -> None:
    code = f"""
import os, tempfile, torch
from optwatch import Settings, attach
os.environ.pop("HOME", None)
os.getuid = lambda: 123456
monitor = attach(torch.optim.SGD([torch.zeros(1)], lr=0.1), port=0, server={stand_in().url!r},
                 settings=Settings(address="127.0.0.1"))
monitor.detach()
print(monitor._reporter._directory, monitor.faults.counts)
"""
    environment = {k: v for k, v in os.environ.items() if k != "XDG_STATE_HOME"} | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.stdout == f"{tmp_path}/optwatch-123456/spool {{}}\n", done.stderr


def test_what_kubernetes_calls_the_port_of_a_service_is_none_of_ours(
    monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    monkeypatch.setenv("OPTWATCH_PORT", "tcp://10.0.0.7:8000")
    monitor = attach(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), settings=settings())
    try:
        assert monitor.url.startswith("http://127.0.0.1:")
    finally:
        monitor.detach()


def test_an_empty_group_before_the_first_parameter_is_no_trouble(watch: Any) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([{"params": []}, {"params": [weight]}], lr=0.5)
    monitor = watch(optimizer)
    weight.sum().backward()
    optimizer.step()
    monitor.flush()
    assert monitor.snapshot()['optwatch_grad_norm{stage="at_step"}'] == pytest.approx(2**0.5)
    assert not monitor.faults.counts


def test_an_attach_that_raises_leaves_nothing_behind(settings: Any, stand_in: Any) -> None:
    server = stand_in()
    weight = torch.nn.Parameter(torch.ones(2))
    good = torch.optim.SGD([weight], lr=0.1)
    bad = torch.optim.Adam([weight])
    bad.state[weight] = {"step": "three"}  # of which no step count can be read
    threads = threading.active_count()
    with pytest.raises(ValueError, match="three"):
        attach(good, bad, port=0, server=server.url, settings=settings())
    assert not good._optimizer_step_pre_hooks
    assert threading.active_count() == threads
    assert server.requests == []
