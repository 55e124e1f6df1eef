"""A monitor on a free loopback port that is always detached: monitors wrap torch's own functions while they live."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import torch

from optwatch import Monitor, Settings, attach

Attach = Callable[..., Monitor]
# A shared machine is slow at times, and that is no example that fails.
hypothesis.settings.register_profile("optwatch", deadline=None)
hypothesis.settings.load_profile("optwatch")


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Settings]:
    """Settings on the loopback with a spool of the test's own, changed by keyword."""

    def make(**changes: Any) -> Settings:
        # Nothing that a test sees depends on how long anything took: the agent judges neither its own cost nor steps.
        fixed: dict[str, Any] = {"address": "127.0.0.1", "spool_directory": tmp_path / "spool"}
        fixed |= {"overhead_budget": 1.0, "sample_every": 10}
        return Settings(**(fixed | changes))

    return make


@pytest.fixture
def watch(settings: Callable[..., Settings]) -> Iterator[Attach]:
    """`attach` on a free port; keywords that are settings go there. Everything attached is detached afterwards."""
    monitors: list[Monitor] = []

    def make(*optimizers: torch.optim.Optimizer, **options: Any) -> Monitor:
        changes = {name: options.pop(name) for name in list(options) if name in Settings.__dataclass_fields__}
        monitor = attach(*optimizers, port=0, settings=settings(**changes), **options)
        monitors.append(monitor)
        return monitor

    yield make
    for monitor in monitors:
        monitor.detach()


class StandIn:
    """An HTTP server whose every answer a test decides, as raw bytes. Keeps what it was sent, in order."""

    def __init__(self, port: int = 0) -> None:
        self.requests: list[tuple[str, Any]] = []
        self.answer: Callable[[str, Any], bytes] = self.accept
        self.closing = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, body))
                self.wfile.write(outer.answer(self.path, body))

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: Any) -> None:
                """The client has given up on an answer that a test held back."""

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @staticmethod
    def response(status: int, body: bytes = b"{}", headers: str = "") -> bytes:
        return f"HTTP/1.0 {status} X\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body

    def accept(self, path: str, body: Any) -> bytes:
        return self.response(200)

    def never(self, path: str, body: Any) -> bytes:
        """Accepts the request and does not answer it for as long as the test lasts."""
        self.closing.wait(60)
        return b""

    def events(self) -> list[dict[str, Any]]:
        """Every event it was sent, repeats included."""
        return [event for path, body in list(self.requests) if path == "/api/v1/events" for event in body["events"]]

    def bodies(self, end: str) -> list[Any]:
        """The bodies sent to paths with this end."""
        return [body for path, body in list(self.requests) if path.endswith(end)]

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


@pytest.fixture
def stand_in() -> Iterator[Callable[..., StandIn]]:
    """Starts servers whose answers the test decides."""
    started: list[StandIn] = []

    def start(port: int = 0) -> StandIn:
        started.append(StandIn(port))
        return started[-1]

    yield start
    for server in started:
        server.close()


class RealServer:
    """`optwatch server` as a process on SQLite, which can be killed and started again on its port."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = 0
        self.url = ""
        self.start()

    def start(self) -> None:
        database = f"sqlite:///{self._folder / 'server.sqlite3'}"
        command = [sys.executable, "-m", "optwatch", "server", "--port", str(self.port), "--database-url", database]
        with (self._folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("optwatch server: http"):
                self.url = line.split()[2]
                self.port = int(self.url.rpartition(":")[2])
                return
        raise AssertionError((self._folder / "server.log").read_text())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def get(self, path: str) -> Any:
        return httpx.get(f"{self.url}/api/v1{path}", timeout=30, trust_env=False).json()

    def events(self, run_id: str) -> list[dict[str, Any]]:
        """The run's events in the server's order; none while it does not know the run."""
        return list(self.get(f"/runs/{run_id}/events?limit=500").get("events", []))


@pytest.fixture
def real_server(tmp_path: Path) -> Iterator[RealServer]:
    server = RealServer(tmp_path)
    yield server
    server.kill()


@pytest.fixture
def eventually() -> Callable[..., Any]:
    """Waits until a condition is true and returns its value; how long that takes decides nothing."""

    def wait(condition: Callable[[], Any], seconds: float = 90.0) -> Any:
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, "this did not come true in time"
            time.sleep(0.01)
        return value

    return wait


@pytest.fixture
def net() -> torch.nn.Module:
    """Two layers of three parameters in all."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1, bias=False))


@pytest.fixture
def step(net: torch.nn.Module) -> Callable[..., float]:
    """One step of training `net`: its loss. ``scale`` multiplies the input; NaN breaks the step."""

    def one(optimizer: torch.optim.Optimizer, scale: float = 1.0) -> float:
        optimizer.zero_grad()
        loss = (net(torch.ones(2, 4) * scale) ** 2).mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return one


# By name of a set of processes: their number, and the scenarios of `ranks/{ways,gone,compared}.py` that they run.
RANKS = {
    "four": (
        *(4, "distributed_data_parallel", "replicated_by_hand", "fully_sharded", "hybrid_sharded", "tensor_sharded"),
        *("tensor_and_fully_sharded", "pipeline", "pipeline_with_equal_names", "zero_redundancy"),
        *("stages_that_look_like_replicas", "sequence_parallel", "added_up_in_prometheus"),
        "nonfinite_on_one_rank",
    ),
    "two": (2, "fully_sharded", "zero_redundancy", "two_optimizers_one_of_which_steps_less", "checks_done_together"),
    "gone": (2, "lagging", "stopped", "stopped_with_the_store", "killed"),
    "unwatched": (2, "killed_unwatched"),
    "left": (2, "left_behind"),
    "first": (2, "only_first"),
    "second": (2, "only_second"),
    "compared by two": (2, "bit_flipped", "equal_bits_flipped", "moment_flipped", "step_differs", "clean"),
    "compared by four": (
        *(4, "bit_flipped", "equal_bits_flipped", "moment_flipped", "shard_flipped", "rate_differs", "sleeps"),
    ),
}
Ranks = dict[str, dict[str, list[Any]]]


DEEPSPEED = {
    "deepspeed on two": (
        *(2, "zero_0", "zero_0_bf16", "zero_1", "zero_1_bf16", "zero_1_bf16_summed_in_fp32", "zero_2", "zero_2_bf16"),
        *(
            "zero_2_accumulated",
            "zero_2_offloaded",
            "zero_3",
            "zero_3_bf16",
            "zero_3_in_sub_groups",
            "zero_3_offloaded",
        ),
    ),
    "deepspeed on one": (1, "zero_0", "zero_1", "zero_1_bf16_summed_in_fp32", "zero_2_bf16", "zero_3"),
    "deepspeed otherwise": (
        *(2, "overflowing_1", "overflowing_3", "attached_before", "attached_before_zero_3", "without_zero_in_fp16"),
        *("resumed_1", "resumed_3"),
    ),
}
"""The same for `ranks/zero.py`."""


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """By set of processes and scenario, what each rank gave; under ``codes`` how each process ended."""
    return run_ranks(tmp_path_factory, "ranks", RANKS)


@pytest.fixture(scope="session")
def deepspeed_ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """The same for training with DeepSpeed."""
    return run_ranks(tmp_path_factory, "deepspeed", DEEPSPEED)


def run_ranks(tmp_path_factory: pytest.TempPathFactory, kind: str, sets: dict[str, tuple[Any, ...]]) -> Ranks:
    """All of them run once for a whole session, whatever number of pytest's own processes there are."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / kind
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            items = [f"{name}:{size}:{','.join(scenarios)}" for name, (size, *scenarios) in sets.items()]
            command = [sys.executable, str(Path(__file__).parent / "ranks" / "launch.py"), str(folder), *items]
            with (folder / "output").open("w+") as output:
                launched = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
                try:
                    code = launched.wait(170)
                finally:  # the ranks are its children
                    if launched.poll() is None:
                        os.killpg(launched.pid, signal.SIGKILL)
                        launched.wait()
            assert code == 0, (folder / "output").read_text()[-4000:]
            (folder / "done").touch()
    results: Ranks = {}
    for name, (size, *scenarios) in sets.items():
        paths = [folder / f"{name}.{rank}.json" for rank in range(size)]
        by_rank = [json.loads(path.read_text()) if path.exists() else {} for path in paths]  # a killed one has none
        results[name] = {scenario: [rank.get(scenario, {}) for rank in by_rank] for scenario in scenarios}
        for one in (one for of_scenario in results[name].values() for one in of_scenario):
            assert "traceback" not in one, one["traceback"]
        results[name]["codes"] = json.loads((folder / f"{name}.codes.json").read_text())
    return results
