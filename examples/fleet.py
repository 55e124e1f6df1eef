"""The fleet scene: a dozen small real training runs, most of which something happens to, under the shipped product.

    python examples/fleet.py [--minutes 3] [--keep]

Starts the server, Prometheus, Alertmanager and a receiver, runs the scenes of fleet_run.py, and prints which pages and
tickets came for which run beside those that were to come. Exits 1 where they differ.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from optwatch_server.local.everything import local
from optwatch_server.local.receiver import Receiver
from optwatch_server.local.stack import free_port

RUN = Path(__file__).with_name("fleet_run.py")
EXPECTED: dict[str, set[str]] = {
    "healthy": set(),
    "two-ranks": set(),
    "spike": {"TrainingLossSpike"},
    "divergence": {"TrainingDiverged"},
    "nan": {"TrainingNonFinite"},
    "kill": {"TrainingRunLost"},
    "stall": set(),
    "out-of-memory": {"TrainingOutOfMemory"},
    "crash": {"TrainingCrashed"},
    "resume-without-state": {"TrainingResumedWithoutState"},
    "checkpoint-failure": {"TrainingCheckpointFailed"},
}
"""Alerts that each scene has to raise. A stall pages only after ten minutes without a step: see its runbook."""
ALLOWED: dict[str, set[str]] = {
    "spike": {"TrainingGradientSpike"},
    "divergence": {
        "TrainingLossSpike",
        "TrainingGradientSpike",
        "TrainingValidationRegressed",
        "TrainingSlowConvergence",
    },
    "nan": {"TrainingLossSpike", "TrainingGradientSpike", "TrainingScheduleJump", "TrainingSlowConvergence"},
    "stall": {"TrainingStalled"},
    # It logs a text as a number, which is a fault of the agent's: counted, and no trouble to training.
    "checkpoint-failure": {"OptwatchAgentErrors"},
}
"""Alerts that may come besides."""


class Fleet:
    """All scenes as processes, ended by pid."""

    def __init__(self, folder: Path, server: str, steps: int) -> None:
        self._folder = folder
        self._server = server
        self._steps = steps
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start every run; one with two ranks is two processes."""
        for scene in EXPECTED:
            world = 2 if scene == "two-ranks" else 1
            port = free_port()
            for rank in range(world):
                self._start(scene, rank, world, port)

    def _start(self, scene: str, rank: int, world: int, port: int) -> None:
        environment = os.environ | {
            "OPTWATCH_SERVER": self._server,
            "OPTWATCH_RUN_ID": f"fleet-{scene}",
            "OPTWATCH_RUN": scene,
            "OPTWATCH_PROJECT": "fleet" if scene < "k" else "research",
            "OPTWATCH_TEAM": "vision" if scene < "k" else "language",
            "OPTWATCH_TAGS": "cost_per_device_hour=2.5,cost_budget=100",
            "OPTWATCH_PORT": "0",
            "OPTWATCH_ADDRESS": "127.0.0.1",
            "OPTWATCH_SPOOL_DIRECTORY": str(self._folder / "spool"),
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        if scene == "resume-without-state":
            environment["OPTWATCH_RESUME_FROM"] = "fleet-healthy"
        command = [sys.executable, str(RUN), scene, "--steps", str(self._steps)]
        with (self._folder / f"{scene}-{rank}.log").open("wb") as log:
            self.processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    def stop(self) -> None:
        """End what still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def alerts(receiver: Receiver) -> dict[str, set[str]]:
    """Alerts that reached a receiver while firing, by scene."""
    arrived: dict[str, set[str]] = {}
    for notification in receiver.notifications:
        for alert in notification.alerts:
            if alert["status"] == "firing":
                scene = str(alert["labels"].get("run_id", "")).removeprefix("fleet-")
                arrived.setdefault(scene, set()).add(alert["labels"]["alertname"])
    return arrived


def differences(arrived: dict[str, set[str]]) -> list[str]:
    """What came and was not to come, and the other way round."""
    found = []
    for scene, wanted in EXPECTED.items():
        came = arrived.get(scene, set())
        found += [f"{scene}: no {name}" for name in sorted(wanted - came)]
        found += [f"{scene}: {name} was not to come" for name in sorted(came - wanted - ALLOWED.get(scene, set()))]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="how long to watch")
    parser.add_argument("--keep", action="store_true", help="leave everything running afterwards until Ctrl-C")
    options = parser.parse_args()
    with contextlib.ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="optwatch-fleet-")))
        product = running.enter_context(local(folder))
        fleet = Fleet(folder, product.server, steps=100_000)
        running.callback(fleet.stop)
        fleet.start()
        print(f"server        {product.server}")
        print(f"prometheus    {product.stack.prometheus_url}")
        print(f"alertmanager  {product.stack.alertmanager_url}", flush=True)
        deadline = time.monotonic() + 60 * options.minutes
        while time.monotonic() < deadline:
            time.sleep(1)
        arrived = alerts(product.receiver)
        for scene, wanted in EXPECTED.items():
            print(f"{scene:24} {', '.join(sorted(arrived.get(scene, ()))) or '-':60} wanted {', '.join(wanted) or '-'}")
        wrong = differences(arrived)
        print("\n".join(wrong) or "every run had its alerts, and no others")
        with contextlib.suppress(KeyboardInterrupt):
            while options.keep:
                time.sleep(1)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
