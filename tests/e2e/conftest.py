"""The whole product as real processes: server, Prometheus, Alertmanager and a receiver of pages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from optwatch_server.local.everything import local
from optwatch_server.local.receiver import Receiver
from optwatch_server.local.stack import Stack

ROOT = Path(__file__).parents[2]


@dataclass
class Product:
    """Addresses of what runs, and a way to start training that reports to it."""

    folder: Path
    server: str
    receiver: Receiver
    stack: Stack
    _running: ExitStack

    def train(self, run_id: str, *arguments: str, script: Path = ROOT / "examples" / "train_transformer.py") -> Any:
        """A training process with the one line in it, ended by pid when the test ends."""
        environment = os.environ | {
            "OPTWATCH_SERVER": self.server,
            "OPTWATCH_RUN_ID": run_id,
            "OPTWATCH_RUN": "end-to-end",
            "OPTWATCH_PROJECT": "tests",
            "OPTWATCH_PORT": "0",
            "OPTWATCH_ADDRESS": "127.0.0.1",
            "OPTWATCH_SPOOL_DIRECTORY": str(self.folder / "spool"),
        }
        process = subprocess.Popen([sys.executable, str(script), *arguments], env=environment)
        self._running.callback(process.wait)
        self._running.callback(lambda: process.poll() is None and process.kill())
        return process

    def get(self, path: str) -> Any:
        """JSON of the server."""
        with urllib.request.urlopen(self.server + path, timeout=10) as response:
            return json.load(response)

    def run(self, run_id: str) -> dict[str, Any]:
        """What the server knows of a run; empty until it does."""
        try:
            return dict(self.get(f"/api/v1/runs/{run_id}"))
        except urllib.error.HTTPError as error:
            error.close()
            return {}

    def query(self, expression: str) -> list[dict[str, Any]]:
        """An instant query of the real Prometheus."""
        url = f"{self.stack.prometheus_url}/api/v1/query?query={urllib.parse.quote(expression)}"
        with urllib.request.urlopen(url, timeout=10) as response:
            return list(json.load(response)["data"]["result"])

    def until(self, condition: Callable[[], Any], seconds: float, what: str) -> Any:
        """The first true value of `condition`, asked for at most `seconds`."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, f"no {what} within {seconds} s"
            time.sleep(0.2)
        return value

    def pages(self, run_id: str) -> list[dict[str, Any]]:
        """Alerts of this run that reached the page receiver while firing, one for each notification."""
        return [
            dict(alert)
            for notification in self.receiver.notifications
            if notification.receiver == "page" and notification.status == "firing"
            for alert in notification.alerts
            if alert["labels"].get("run_id") == run_id
        ]


@pytest.fixture
def product(tmp_path: Path) -> Iterator[Product]:
    """Everything that is shipped, running, with the shipped configuration."""
    with ExitStack() as running:
        everything = running.enter_context(local(tmp_path))
        yield Product(tmp_path, everything.server, everything.receiver, everything.stack, running)
