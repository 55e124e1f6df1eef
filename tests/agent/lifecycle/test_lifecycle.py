"""How a process ends is what its run's page says, and its exit status is what it was without us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.e2e
TRAINING = """
import os, signal, sys, threading
import torch
from optwatch import Settings, attach

def main():
    net = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    monitor = attach(optimizer, port=0, server=sys.argv[1], settings=Settings(
        address="127.0.0.1", spool_directory=sys.argv[2], exit_timeout_seconds=float(sys.argv[3])))
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.ones(2, 4)).mean().backward()
        optimizer.step()
    return monitor, optimizer

monitor, optimizer = main()
"""


@pytest.fixture
def train(tmp_path: Path) -> Any:
    """Runs a program that trains three steps and then does `end`, against a server."""

    def run(server: str, end: str, exit_timeout: float = 30, **options: Any) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "train.py"
        script.write_text(TRAINING + textwrap.dedent(end))
        command = [sys.executable, str(script), server, str(tmp_path / "spool"), str(exit_timeout)]
        return subprocess.run(command, capture_output=True, text=True, timeout=150, check=False, **options)

    return run


# What the program does then, its exit status, and what the run's page says; test_ending.py has more of them.
ENDS = {
    "it runs to its end": ("", 0, "succeeded", None),
    "an exception": ("raise KeyError('vocab')", 1, "failed", "KeyError: 'vocab'"),
    "sys.exit(3)": ("sys.exit(3)", 3, "failed", "SystemExit: 3"),
    "Ctrl-C": ("signal.raise_signal(signal.SIGINT)", -signal.SIGINT, "cancelled", "KeyboardInterrupt"),
    "a finish of the user's own before an exception": (
        "monitor.finish('succeeded', 'early'); raise KeyError",
        1,
        "succeeded",
        "early",
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_run_ends_as_its_process_does(end: str, stand_in: Any, train: Any) -> None:
    code, exit_status, status, reason = ENDS[end]
    server = stand_in()
    done = train(server.url, code)
    assert done.returncode == exit_status, done.stderr
    (finish,) = server.bodies("/finish")
    assert (finish["status"], finish["reason"], finish["final_step"]) == (status, reason, 3)
    assert ("Traceback" in done.stderr) == ("raise " in code or "excepthook" in code or "SIGINT" in code)


def test_a_process_that_is_gone_at_once_says_nothing_and_its_run_is_lost(stand_in: Any, train: Any) -> None:
    server = stand_in()
    assert train(server.url, "os._exit(7)").returncode == 7
    assert server.bodies("/finish") == []


@pytest.mark.parametrize("kind", ["absent", "silent"])
def test_a_dead_server_delays_the_end_by_no_more_than_was_allowed(
    kind: str, stand_in: Any, train: Any, tmp_path: Path
) -> None:
    server = stand_in()
    server.answer = server.never
    url = server.url if kind == "silent" else "http://127.0.0.1:9"
    done = train(url, "print(os.times().elapsed, flush=True); raise KeyError", exit_timeout=1)
    ended = os.times().elapsed
    assert done.returncode == 1
    # Loosely: without a bound the program would wait for as long as the server is silent, a minute here.
    assert ended - float(done.stdout) < 20
    assert list((tmp_path / "spool").glob("*.sqlite3"))  # and the next run delivers it


def test_what_a_process_left_is_delivered_by_the_next_one_with_its_end(
    stand_in: Any, train: Any, watch: Any, net: Any, tmp_path: Path, eventually: Any
) -> None:
    server = stand_in()
    server.answer = lambda path, body: server.response(503)
    assert train(server.url, "raise KeyError('x')", exit_timeout=0).returncode == 1
    in_vain = len(server.requests)
    server.answer = server.accept

    monitor = watch(torch.optim.SGD(net.parameters(), lr=0.1), server=server.url)
    eventually(lambda: server.bodies("/finish"))
    (dead,) = {body["id"] for body in server.bodies("/runs")} - {monitor.run.id}
    paths = [path for path, body in server.requests[in_vain:] if path != "/api/v1/heartbeats"]
    assert paths[-1] == f"/api/v1/runs/{dead}/finish"
    assert server.bodies("/finish")[-1]["reason"] == "KeyError: 'x'"
    monitor.detach()


FORKS = """
def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def train():
    net = optimizer.param_groups[0]["params"]
    for _ in range(3):
        (sum(p.sum() for p in net) * float("nan")).backward()
        optimizer.step()

def everything():
    train()
    monitor.log(val_loss=1.0, tokens=3)
    monitor.finish("failed", "from the child")
    monitor.detach()

print([child(train) for _ in range(20)], child(everything), flush=True)
pid = os.fork()
if pid == 0:
    sys.exit(9)  # through atexit, as any program that ends
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
loader = torch.utils.data.DataLoader(list(range(8)), num_workers=2, multiprocessing_context="fork")
print(sum(int(batch) for batch in loader))
"""


def test_a_forked_child_neither_hangs_nor_reports_and_its_parent_goes_on(stand_in: Any, train: Any) -> None:
    server = stand_in()
    done = train(server.url, FORKS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{[0] * 20} 0", "9", "28"]
    (finish,) = server.bodies("/finish")
    assert (finish["status"], finish["final_step"], len(server.bodies("/runs"))) == ("succeeded", 3, 1)
    assert server.events() == []


def test_a_child_that_outlives_its_parent_does_not_keep_the_port(train: Any, stand_in: Any) -> None:
    end = """
    import socket, time
    port = int(monitor.url.removesuffix("/metrics").rpartition(":")[2])
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(told, b"1")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    monitor.detach()
    with socket.create_server(("127.0.0.1", port)):
        print("free")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    """
    done = train(stand_in().url, end)
    assert (done.stdout, done.returncode) == ("free\n", 0), done.stderr
