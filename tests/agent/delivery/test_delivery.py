"""From training to the real server: through its death and ours, each event once and in order; and what is sent is what
the wire's schema allows."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from optwatch import Target
from optwatch.delivery import retry

pytestmark = pytest.mark.e2e
SCHEMA = json.loads((Path(__file__).resolve().parents[3] / "schemas" / "wire-v1.json").read_text(encoding="utf-8"))
# A step that is NaN, then eleven that are not: as many incidents as are asked for, at steps 1, 13, 25 ...
TRAINING = """
import os, signal, sys
import torch
from optwatch import Settings, attach
server, spool, incidents, end = sys.argv[1:]
net = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
monitor = attach(optimizer, port=0, server=server, settings=Settings(
    address="127.0.0.1", spool_directory=spool, exit_timeout_seconds=0.2, request_timeout_seconds=1))
good = {name: value.clone() for name, value in net.state_dict().items()}
for step in range(12 * int(incidents)):
    optimizer.zero_grad()
    net(torch.ones(2, 4) * (float("nan") if step % 12 == 0 else 1)).mean().backward()
    optimizer.step()
    net.load_state_dict(good)
assert monitor.flush(30)
while monitor._reporter._queue:
    pass
print(monitor.run.id, flush=True)
if end == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if end == "stays":
    sys.stdin.read()
"""


def command(server: str, spool: Path, incidents: int, end: str = "") -> list[str]:
    return [sys.executable, "-c", TRAINING, server, str(spool), str(incidents), end]


def check(name: str, message: Any) -> None:
    jsonschema.Draft202012Validator({**SCHEMA, "$ref": f"#/$defs/{name}"}).validate(message)


def test_every_event_arrives_once_and_in_order_although_the_server_dies_in_between(
    real_server: Any, watch: Any, net: Any, step: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "RETRY_SECONDS", (0.05, 0.2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    monitor = watch(optimizer, server=real_server.url, heartbeat_interval_seconds=0.1, exit_timeout_seconds=20)
    good = {name: value.clone() for name, value in net.state_dict().items()}

    def incidents(count: int) -> None:
        for _ in range(count):
            for at in range(12):
                step(optimizer, float("nan") if at == 0 else 1.0)
                net.load_state_dict(good)
        assert monitor.flush(30)

    incidents(3)
    eventually(lambda: len(real_server.events(monitor.run.id)) == 3)
    real_server.kill()
    before = monitor.faults.counts.get("reporter", 0)
    incidents(4)
    eventually(lambda: monitor.faults.counts.get("reporter", 0) > before + 1)
    real_server.start()
    incidents(2)
    monitor.detach()
    events = real_server.events(monitor.run.id)
    assert [event["step"] for event in events] == [1 + 12 * n for n in range(9)]
    assert [event["sequence"] for event in events] == list(range(1, 10))
    run = real_server.get(f"/runs/{monitor.run.id}")
    assert (run["status"], run["final_step"]) == ("succeeded", 108)
    assert set(monitor.faults.counts) == {"reporter"}


def test_a_killed_processs_events_are_delivered_by_the_next_run_once_and_in_order(
    real_server: Any, watch: Any, net: Any, step: Any, tmp_path: Path, eventually: Any
) -> None:
    url, spool = real_server.url, tmp_path / "spool"
    real_server.kill()
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        subprocess.Popen(command(url, spool, 5, "killed"), **pipes) as dead,
        subprocess.Popen(command("http://127.0.0.1:9", spool, 1, "killed"), **pipes) as other,
        subprocess.Popen(command(url, spool, 2, "stays"), **pipes) as living,
    ):
        run_id, foreign, alive = (process.stdout.readline().strip() for process in (dead, other, living))
        assert (dead.wait(60), other.wait(60)) == (-signal.SIGKILL, -signal.SIGKILL)
        living.send_signal(signal.SIGSTOP)  # it lives, and delivers nothing itself
        try:
            real_server.start()
            optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
            monitor = watch(optimizer, server=url, exit_timeout_seconds=20)
            step(optimizer)
            eventually(lambda: len(real_server.events(run_id)) == 5)
            eventually(lambda: not list(spool.glob(f"{run_id}*")))
            assert [event["step"] for event in real_server.events(run_id)] == [1, 13, 25, 37, 49]
            assert [event["sequence"] for event in real_server.events(run_id)] == [1, 2, 3, 4, 5]
            assert real_server.get(f"/runs/{run_id}")["status"] in ("running", "lost")  # nobody said that it ended
            monitor.detach()
            assert real_server.events(alive) == []
            assert list(spool.glob(f"{alive}*.sqlite3")) != []
            assert list(spool.glob(f"{foreign}*.sqlite3")) != []
        finally:
            living.send_signal(signal.SIGCONT)
            living.kill()


def test_what_training_sends_is_what_the_schema_allows_with_nan_and_inf_in_it(
    stand_in: Any, watch: Any, net: Any, step: Any, eventually: Any
) -> None:
    server = stand_in()
    optimizer = torch.optim.AdamW(net.parameters(), lr=torch.tensor(0.01))
    monitor = watch(
        optimizer,
        server=server.url,
        heartbeat_interval_seconds=0.05,
        run="näme with spaces/" + "x" * 200,
        project="p",
        tags={"sweep": "s", "n": 3},
        seed=2**64 - 1,
        resume_from="/checkpoints/last.pt",
        target=Target("val_loss", float("-inf"), by_step=10),
    )
    for scale in (1.0, 1e30, float("nan")):
        step(optimizer, scale)
    assert monitor.flush(30)
    eventually(
        lambda: any("NaN" in beat["values"].values() for body in server.bodies("/heartbeats") for beat in body["beats"])
    )
    monitor.finish("failed", "KeyError: 'x'")
    eventually(lambda: server.bodies("/finish"))
    (run,), (finish,) = server.bodies("/runs"), server.bodies("/finish")
    check("Run", run)
    check("Finish", finish)
    for body in server.bodies("/heartbeats"):
        check("Heartbeats", body)
    for body in server.bodies("/events"):
        check("Events", body)
    (event,) = [event for event in server.events() if event["kind"] == "nonfinite"]
    assert event["details"]["loss"] in ("NaN", "Infinity")
    assert run["target"]["value"] == "-Infinity"
    # The wire has a field for the id of a run, not for a path.
    assert (run["resumed_from"], run["tags"]["resume_from"]) == (None, "/checkpoints/last.pt")


def test_the_real_server_takes_every_message_and_shows_it(
    real_server: Any, watch: Any, net: Any, step: Any, eventually: Any
) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    monitor = watch(
        optimizer,
        server=real_server.url,
        heartbeat_interval_seconds=0.1,
        run="r" * 256,
        tags={f"{n:0128}": "v" * 256 for n in range(63)},
        seed=2**64 - 1,
        resume_from="/a/" + "b" * 300,
        target=Target("m" * 256, float("nan"), by_step=2**63 - 1),
        exit_timeout_seconds=20,
    )
    step(optimizer)
    step(optimizer, float("nan"))
    assert monitor.flush(30)
    run_id = monitor.run.id
    eventually(
        lambda: (
            real_server.get(f"/runs/{run_id}").get("ranks")
            and "nonfinite" in [event["kind"] for event in real_server.events(run_id)]
        ),
    )
    monitor.finish("failed", "stopped by hand")
    monitor.detach()
    run = real_server.get(f"/runs/{run_id}")
    assert (run["status"], run["reason"], run["final_step"]) == ("failed", "stopped by hand", 2)
    assert run["seed"] == 2**64 - 1
    assert (monitor.faults.counts, monitor._reporter.dropped) == ({}, 0)
