"""The demo: a server, a real training run with one added line, and, where they are on PATH, Prometheus and Alertmanager
with the shipped configuration and a receiver that prints pages.

    python examples/demo.py [--break nan] [--steps N] [--keep]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from optwatch_server.local.everything import local
from optwatch_server.local.receiver import Receiver, text
from optwatch_server.local.serving import serving
from optwatch_server.local.stack import Stack, StackError

TRAINING = Path(__file__).with_name("train_transformer.py")
BREAKS = {"nan": ("TrainingNonFinite", "the learning rate is set to 1e20 at step {step}")}


def main() -> int:
    """Run the demo and return its exit status: 0 when everything that was to be seen was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--break", dest="breaks", choices=sorted(BREAKS), help="break the run this way")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--keep", action="store_true", help="leave the server and its tools running until Ctrl-C")
    options = parser.parse_args()
    with contextlib.ExitStack() as running, contextlib.suppress(KeyboardInterrupt):
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="optwatch-demo-")))
        server, receiver, stack = start(running, folder)
        status = train(folder, server, options.steps, options.breaks, receiver)
        summary(server, stack)
        if options.keep:
            print("\nstill running; Ctrl-C ends it")
            while True:
                time.sleep(1)
        return status
    return 0


def start(running: contextlib.ExitStack, folder: Path) -> tuple[str, Receiver | None, Stack | None]:
    """Start everything, or the server alone where Prometheus and Alertmanager are not installed, and say so."""
    try:
        product = running.enter_context(local(folder))
    except StackError as error:
        server = running.enter_context(serving(folder / "server"))
        print(f"no paging     {error}\n              (training, metrics and the run page work without)")
        print(f"server        {server}")
        return server, None, None
    print(f"server        {product.server}")
    print(f"prometheus    {product.stack.prometheus_url}")
    print(f"alertmanager  {product.stack.alertmanager_url}")
    return product.server, product.receiver, product.stack


def train(folder: Path, server: str, steps: int, breaks: str | None, receiver: Receiver | None) -> int:
    """Train in a process of its own, show its progress, and wait for the page where the run is broken."""
    break_at = steps * 2 // 5
    command = [sys.executable, str(TRAINING), "--steps", str(steps), "--pause", "0.05"]
    if breaks:
        command += ["--break-at", str(break_at)]
    environment = os.environ | {
        "OPTWATCH_SERVER": server,
        "OPTWATCH_RUN": "demo",
        "OPTWATCH_PROJECT": "optwatch",
        "OPTWATCH_PORT": "0",
        "OPTWATCH_ADDRESS": "127.0.0.1",
        "OPTWATCH_SPOOL_DIRECTORY": str(folder / "spool"),
    }
    print(f"training      {TRAINING.name}: a transformer on Python's own sources, with one line of optwatch in it")
    if breaks:
        print(f"breaking      {BREAKS[breaks][1].format(step=break_at)}")
    process = subprocess.Popen(command, env=environment)
    try:
        run = wait_for_run(server, process)
        if run:
            print(f"run page      {server}/runs/{run['id']}")
        for target in get(f"{server}/api/v1/sd"):
            print(f"metrics       http://{target['targets'][0]}/metrics")
        paged = wait_for_page(breaks, receiver, break_at)
        if process.wait() != 0:
            print(f"training ended with exit status {process.returncode}", file=sys.stderr)
            return 1
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
    return 0 if paged else 1


def wait_for_run(server: str, process: subprocess.Popen[bytes]) -> dict[str, Any] | None:
    """The run as the server knows it, with its metrics registered, once training has attached."""
    while process.poll() is None:
        runs = get(f"{server}/api/v1/runs")["runs"]
        if runs and get(f"{server}/api/v1/sd"):
            return dict(runs[0])
        time.sleep(0.2)
    return None


def wait_for_page(breaks: str | None, receiver: Receiver | None, step: int) -> bool:
    """Print the page that a broken run causes; True if it came, or none was to come."""
    if breaks is None or receiver is None:
        return True
    alert = BREAKS[breaks][0]
    try:
        page = receiver.wait_for(lambda n: n.receiver == "page" and alert in n.names(), timeout=240)
    except TimeoutError:
        print(f"no {alert} page came", file=sys.stderr)
        return False
    print(f"\n{text(page)}\n", flush=True)
    return True


def summary(server: str, stack: Stack | None) -> None:
    """Say how the run ended, by the server's word, and what Prometheus has of it."""
    print()
    for run in get(f"{server}/api/v1/runs")["runs"]:
        print(f"run {run['id']}: {run['status']}")
        for event in get(f"{server}/api/v1/runs/{run['id']}/events")["events"]:
            print(f"  step {event['step']}: {event['summary']}")
    if stack:
        names = get(f"{stack.prometheus_url}/api/v1/label/__name__/values")["data"]
        print(f"prometheus has {sum(name.startswith('optwatch_') for name in names)} optwatch metrics of it")


def get(url: str) -> Any:
    """The JSON behind a URL of this machine."""
    with urllib.request.urlopen(url, timeout=10) as response:
        return json.load(response)


if __name__ == "__main__":
    sys.exit(main())
