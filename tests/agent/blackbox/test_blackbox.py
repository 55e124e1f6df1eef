"""The black box: what it holds, how it survives, and who uploads it. Processes are killed for real."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from optwatch.blackbox import box as blackbox
from optwatch.blackbox import playback, recording, ringfile
from optwatch.blackbox.box import BlackBox, prune
from optwatch.delivery import uploads
from optwatch.delivery.client import Client
from optwatch.events import Event
from optwatch.faults import Faults
from optwatch.lifecycle.run import Run, describe
from optwatch.record import NonFinite, StepRecord

SCHEMA = Path(__file__).resolve().parents[3] / "schemas" / "wire-v1.json"
LIMIT = 4 * 2**20
SERVER = "http://optwatch:8000"

KILLED = """
import os, signal, sys, torch
from optwatch import attach
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
monitor = attach(optimizer, port=0)
for step in range(1, 6):
    optimizer.zero_grad()
    net(torch.randn(8, 4)).square().mean().backward()
    if step == 5:
        net[1].weight.grad[0, 0] = float("nan")
    optimizer.step()
monitor.flush()
if os.fork() == 0:  # a data loader's worker, which outlives its parent
    print(os.getpid(), flush=True)
    os.close(1)
    signal.pause()
sys.stdin.readline()  # until the worker is known
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def run() -> Run:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    options: dict[str, Any] = dict.fromkeys(("project", "tags", "seed", "resume_from", "target"))
    return describe([optimizer], run="r", heartbeat_interval_seconds=10, environment={}, **options)


@pytest.fixture
def box(tmp_path: Path, run: Run) -> Iterator[Callable[..., BlackBox]]:
    """Opens black boxes in the test's folder, each closed in the end."""
    opened: list[BlackBox] = []

    def make(max_bytes: int = LIMIT, server: str | None = SERVER, **options: Any) -> BlackBox:
        opened.append(BlackBox(tmp_path, run, max_bytes, 10, server, **options))
        return opened[-1]

    yield make
    for made in opened:
        made.close(keep=True)


LAYERS = ["embed", "head"]
PARAMETERS = ["embed.weight", "head.weight", "head.bias"]


def step(number: int, **changes: Any) -> StepRecord:
    """A record of two layers of three parameters, whose numbers follow from the step."""
    values: dict[str, Any] = {
        "step": number,
        "optimizer": "AdamW",
        "started": 1e9 + number,
        "loss": 1 / number,
        "grad_norm": number / 2,
        "learning_rates": [0.1, 0.2],
        "layers": LAYERS,
        "parameters": PARAMETERS,
        "layer_grad_norm": [number / 4, number / 8],
        "parameter_grad_norm": [number / 4, -math.inf, 0.5],
    }
    if number % 10 == 0:
        values |= {"sampled": True, "layer_weight_norm": [number + 0.5, 1.0], "weight_norm": 3.0}
    return StepRecord(**(values | changes))


def steps(box: BlackBox, optimizer: str = "AdamW") -> ringfile.Rows:
    rows = ringfile.read(box.path).table("steps", optimizer)
    assert rows is not None
    return rows


def test_it_holds_every_step_up_to_512_and_then_the_last_512_in_order(box: Any) -> None:
    made = box()
    for number in range(1, 513):
        made.record(step(number))
    assert steps(made).column("step") == list(range(1, 513))
    made.record(step(513))
    rows = steps(made)
    assert rows.column("step") == list(range(2, 514))
    assert rows.column("loss") == [1 / number for number in range(2, 514)]
    assert rows.column("learning_rate")[-1] == 0.2
    assert rows.column("grad_norm_before_clip")[-1] is None
    assert rows.column("layer_grad_norm")[-1] == [513 / 4, 513 / 8]
    assert rows.column("parameter_grad_norm")[-1] == [513 / 4, None, 0.5]
    samples = ringfile.read(made.path).table("samples", "AdamW")
    assert samples is not None
    assert samples.column("step") == list(range(10, 513, 10))
    assert samples.column("layer_weight_norm")[-1] == [510.5, 1.0]
    assert samples.column("layer_first_moment_norm")[-1] is None


def test_a_slot_that_was_being_written_is_recognised_and_only_it_is_lost(box: Any) -> None:
    made = box()
    for number in range(1, 601):
        made.record(step(number))
    rows = steps(made)
    table = rows.table
    data = bytearray(made.path.read_bytes())
    # Step 601 would take the place of step 89: half of it arrives.
    start = data.index(struct.pack("<d", 89.0)) - ringfile._SLOT.size
    data[start : start + table.slot_bytes // 2] = os.urandom(table.slot_bytes // 2)
    (contents,) = [ringfile.parse(made.path, bytes(data))]
    torn = contents.table("steps", "AdamW")
    assert torn is not None
    assert (torn.torn, rows.torn) == (1, 0)
    assert torn.column("step") == list(range(90, 601))


@pytest.mark.parametrize(("parameters", "kind"), [(300, "float32"), (2000, "bfloat16"), (4000, None)])
def test_parameters_are_there_as_exactly_as_the_bound_allows(box: Any, parameters: int, kind: str | None) -> None:
    made = box()
    names = [f"blocks.{i}.attention.weight" for i in range(parameters)]
    made.record(step(1, parameters=names, parameter_grad_norm=[0.1 * i for i in range(parameters)]))
    assert made.path.stat().st_size <= LIMIT
    column = next((c for c in steps(made).table.columns if c.name == "parameter_grad_norm"), None)
    assert (column and column.type) == kind
    assert steps(made).table.slots == 512
    if kind:
        (values,) = steps(made).column("parameter_grad_norm")
        assert values == pytest.approx([0.1 * i for i in range(parameters)], rel=1 / 128)


@pytest.mark.parametrize(("layers", "slots"), [(2000, 512), (8000, 128)])
def test_every_layer_is_there_within_the_bound_if_need_be_for_fewer_steps(box: Any, layers: int, slots: int) -> None:
    made = box()
    names = [f"blocks.{i}.attention" for i in range(layers)]
    values = [float(i) for i in range(layers)]
    series = {"layer_grad_norm": values, "layer_weight_norm": values, "layer_second_moment_mean": values}
    for number in range(1, 4):
        made.record(step(number, layers=names, parameters=names, parameter_grad_norm=values, **series))
    assert made.path.stat().st_size <= LIMIT
    assert steps(made).table.slots == slots
    assert steps(made).column("layer_grad_norm")[-1] == pytest.approx(values, rel=1 / 128)


def test_a_bound_that_holds_nothing_is_refused_and_the_smallest_one_is_not(box: Any) -> None:
    with pytest.raises(ValueError, match=r"Settings\(blackbox_bytes=65535\): give 65536 or more, or 0"):
        box(max_bytes=65535)
    made = box(max_bytes=65536)
    made.record(step(1))
    assert made.path.stat().st_size <= 65536


def test_a_layout_that_changes_keeps_the_steps_before_under_their_names(box: Any) -> None:
    made = box()
    for number in range(1, 11):
        made.record(step(number))
    new = {"layers": ["head", "adapter"], "parameters": ["head.weight", "adapter.weight"]}
    made.record(step(11, **new, layer_grad_norm=[1.0, 2.0], parameter_grad_norm=[3.0, 4.0]))
    made.record(step(12))
    rows = steps(made)
    members = {c.name: c.members for c in rows.table.columns if c.members}
    assert members["layer_grad_norm"] == ("head", "adapter", "embed")
    assert rows.column("step") == list(range(1, 13))
    assert rows.column("layer_grad_norm")[-3:] == [[10 / 8, None, 10 / 4], [1.0, 2.0, None], [12 / 8, None, 12 / 4]]
    by_name = dict(zip(members["parameter_grad_norm"], rows.column("parameter_grad_norm")[-2], strict=True))
    assert (by_name["adapter.weight"], by_name["embed.weight"]) == (4.0, None)
    samples = ringfile.read(made.path).table("samples", "AdamW")
    assert samples is not None
    assert samples.column("layer_weight_norm") == [[1.0, None, 10.5]]


def test_layouts_without_end_are_taken_in_up_to_a_number_and_cost_nothing_more(box: Any) -> None:
    made = box()
    for number in range(1, blackbox.MAX_LAYOUTS + 11):
        made.record(step(number, layers=["embed", f"new{number}"], parameters=["p"], parameter_grad_norm=[1.0]))
    rows = steps(made)
    members = next(c.members for c in rows.table.columns if c.name == "layer_grad_norm") or ()
    assert len(rows.payloads) == blackbox.MAX_LAYOUTS + 10
    assert {f"new{blackbox.MAX_LAYOUTS}"} <= set(members)
    assert f"new{blackbox.MAX_LAYOUTS + 1}" not in members
    assert rows.column("layer_grad_norm")[-1][members.index("embed")] == (blackbox.MAX_LAYOUTS + 10) / 4


def test_optimizers_have_rings_of_their_own(box: Any) -> None:
    made = box()
    for number in range(1, 4):
        made.record(step(number))
        made.record(step(number, optimizer="Muon", layers=["mlp"], layer_grad_norm=[7.0], loss=None))
    assert steps(made).column("step") == steps(made, "Muon").column("step") == [1, 2, 3]
    assert steps(made, "Muon").column("layer_grad_norm") == [[7.0]] * 3
    assert recording.optimizers(ringfile.read(made.path)) == ["AdamW", "Muon"]


def test_numbers_keep_being_finite_or_not(box: Any) -> None:
    made = box()
    made.record(step(1, loss=math.nan, grad_norm=math.inf, layer_grad_norm=[1e300, math.nan]))
    rows = steps(made)
    assert math.isnan(rows.column("loss")[0])
    assert rows.column("grad_norm") == [math.inf]
    large, broken = rows.column("layer_grad_norm")[0]
    assert large == pytest.approx(3.4e38, rel=0.01)
    assert math.isnan(broken)
    for kind in ("float32", "bfloat16"):
        packed = ringfile.pack_series([1e300, -1e300, math.inf, None], kind)
        values = ringfile.unpack_series(packed, kind)
        assert [math.isfinite(v) for v in values] == [True, True, False, False]
        assert values[2:] == (math.inf, ringfile.ABSENT)


def test_events_are_kept_within_their_bound_and_lose_what_matters_least(box: Any) -> None:
    made = box()
    made.record(step(1))
    for number in range(100):
        made.event(Event("loss_spike", number, 1e9, "jumped", "a bad batch", "R", {"long": "x" * 4000}))
    notes = recording.notes(ringfile.read(made.path))
    assert [note["step"] for note in notes] == list(range(100 - blackbox.NOTES, 100))
    assert all("details" not in note and note["summary"] == "jumped" for note in notes)


def test_the_first_number_that_is_not_finite_is_named_with_its_layer(box: Any) -> None:
    made = box()
    made.record(step(1))
    made.record(step(2, nonfinite=[NonFinite("loss", "nan"), NonFinite("gradient", "nan", ("head.bias",), ("head",))]))
    made.record(step(3, nonfinite=[NonFinite("loss", "nan")]))
    contents = ringfile.read(made.path)
    first = recording.first_nonfinite(contents)
    assert first is not None
    assert (first.step, first.source, first.layer) == (2, "loss", "head")
    (note,) = recording.notes(contents)
    assert (note["step"], note["layer"]) == (2, "head")
    made.event(Event("nonfinite", 2, 1e9, "NaN in the loss", "", "TrainingNonFinite"))
    made.event(Event("crashed", 3, 1e9, "ended", "", "TrainingCrashed"))
    what = recording.incident(ringfile.read(made.path))
    assert (what.kind, what.step, what.layer, what.summary) == ("nonfinite", 2, "head", "NaN in the loss")


def test_a_layer_that_broke_unnoticed_is_found_in_the_numbers_themselves(box: Any) -> None:
    made = box()
    for number in range(1, 30):
        made.record(step(number, layer_grad_norm=[1.0, 1.0 if number < 25 else 9.0]))
    contents = ringfile.read(made.path)
    assert recording.first_nonfinite(contents) is None
    assert [guilt.name for guilt in recording.worst(steps(made))] == ["head", "embed"]
    made.record(step(30, layer_grad_norm=[math.nan, 1.0]))
    first = recording.first_nonfinite(ringfile.read(made.path))
    assert first == recording.Incident("nonfinite", 30, "embed", "gradient")
    assert recording.worst(steps(made))[0] == recording.Guilt("embed", 30, 1.0)


def test_what_is_no_black_box_is_told_by_name_and_reason(box: Any, tmp_path: Path, capsys: Any) -> None:
    made = box()
    made.record(step(1))
    whole = made.path.read_bytes()
    version = bytearray(whole)
    version[20:24] = struct.pack("<I", 7)
    damaged = bytearray(whole)
    damaged[40] ^= 1
    for data, told in (
        (b"", "is no black box: it does not begin with 'optwatch black box'"),
        (b"SQLite format 3\0" * 9, "is no black box"),
        (bytes(version), "is a black box of version 7, and this optwatch reads 1: use the one that wrote it"),
        (whole[:-1], f"is truncated: it has {len(whole) - 1} of {len(whole)} bytes"),
        (whole[:50], "is truncated: its header has"),
        (bytes(damaged), "is damaged: the header cannot be read (its checksum does not fit)"),
    ):
        path = tmp_path / "x"
        path.write_bytes(data)
        with pytest.raises(ringfile.BlackBoxError) as raised:
            ringfile.read(path)
        assert str(raised.value).startswith(f"{path} {told}")
        assert playback.main([str(path)]) == 1
        assert f"optwatch blackbox: {path} {told}" in capsys.readouterr().err
    assert playback.main([str(tmp_path / "absent")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_a_header_that_claims_the_impossible_is_damaged(tmp_path: Path) -> None:
    packed = zlib.compress(json.dumps({"tables": [{"name": "a", "optimizer": "", "slots": 0}]}).encode())
    head = struct.pack("<20sIII", ringfile.MAGIC, 1, len(packed), zlib.crc32(packed)) + packed
    with pytest.raises(ringfile.BlackBoxError, match="the header cannot be read"):
        ringfile.parse(tmp_path, head + bytes(4096))


def test_a_disk_that_fails_costs_the_black_box_and_one_counted_fault(watch: Any, net: Any, step: Any) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = watch(optimizer, spool_directory="/dev/null/none")
    for _ in range(3):
        step(optimizer)
    assert monitor.flush()
    assert monitor.faults.counts == {"sink": 1}
    assert monitor.snapshot()["optwatch_steps_total"] == 3


def test_a_file_that_is_cut_or_deleted_under_it_does_not_harm_training(watch: Any, net: Any, step: Any) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = watch(optimizer)
    step(optimizer)
    assert monitor.flush()
    path = monitor._recorder.box.path
    os.truncate(path, 0)  # through a mapping, the next write would kill the process with SIGBUS
    step(optimizer)
    assert monitor.flush()
    path.unlink()
    step(optimizer)
    assert monitor.flush()
    assert monitor.faults.counts == {}
    assert monitor.snapshot()["optwatch_steps_total"] == 3


def test_only_its_user_reads_it_and_a_clean_end_leaves_none(
    watch: Any, net: Any, step: Any, tmp_path: Path, settings: Any
) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = watch(optimizer)
    step(optimizer)
    assert monitor.flush()
    path = monitor._recorder.box.path
    assert path.parent == settings().spool_directory
    assert path.stat().st_mode & 0o777 == 0o600
    assert ringfile.is_alive(path)
    monitor.detach()
    assert blackbox.boxes(path.parent) == []
    broken = watch(optimizer)
    step(optimizer, math.nan)
    broken.detach()
    (path,) = blackbox.boxes(path.parent)
    assert not ringfile.is_alive(path)


def test_none_is_written_where_the_setting_says_so(watch: Any, net: Any, step: Any, settings: Any) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = watch(optimizer, blackbox_bytes=0)
    step(optimizer, math.nan)
    assert monitor.flush()
    assert not blackbox.boxes(settings().spool_directory)


def test_old_ones_and_too_many_are_deleted_but_never_that_of_a_living_process(box: Any, tmp_path: Path) -> None:
    made = [box() for _ in range(4)]
    for age, each in enumerate(reversed(made)):
        each.record(step(1))
        os.utime(each.path, (1e9 - age, 1e9 - age))
    for dead in made[1:]:
        dead.close(keep=True)
    size = made[0].path.stat().st_size
    os.utime(made[3].path)
    os.utime(made[2].path)
    assert prune(tmp_path, kept_seconds=60, kept_bytes=10 * size) == [made[1].path]
    assert prune(tmp_path, kept_seconds=1e10, kept_bytes=2 * size) == []  # of three, the oldest lives
    assert len(prune(tmp_path, kept_seconds=1e10, kept_bytes=size)) == 1
    assert made[0].path in blackbox.boxes(tmp_path)


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """What a training process left that met a NaN at step 5 and was killed with SIGKILL, while a child of it lives."""
    folder = tmp_path / "killed"
    environment = {**os.environ, "OPTWATCH_SPOOL_DIRECTORY": str(folder), "OPTWATCH_ADDRESS": "127.0.0.1"}
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    worker = int(child.stdout.readline())
    child.communicate("\n", timeout=60)
    assert child.returncode == -signal.SIGKILL
    (path,) = blackbox.boxes(folder)
    try:
        assert not ringfile.is_alive(path)
    finally:
        os.kill(worker, signal.SIGKILL)
    return path


def test_a_process_killed_right_after_a_nan_leaves_the_step_and_its_layer(killed: Path, capsys: Any) -> None:
    first = recording.first_nonfinite(ringfile.read(killed))
    assert first is not None
    assert (first.step, first.source, first.layer) == (5, "gradient", "1")
    assert playback.main([str(killed.parent)]) == 0
    said = capsys.readouterr().out
    assert "not running any more" in said
    assert "not finite from step 5: the gradient, first in layer 1" in said
    assert "critical nonfinite at step 5" in said
    assert "1: not finite from step 5" in said
    assert playback.main([str(killed), "--csv"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["step"] for line in lines] == ["1", "2", "3", "4", "5"]
    assert (lines[-1]["layer_grad_norm/1"], lines[-1]["nonfinite_source"]) == ("nan", "2")
    assert float(lines[0]["layer_grad_norm/1"]) > 0
    assert playback.main([str(killed), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["first_nonfinite"] == {"step": 5, "source": "gradient", "layer": "1"}
    assert document["tables"][0]["columns"]["step"] == [1, 2, 3, 4, 5]


def check(body: object) -> None:
    document = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator({**document, "$ref": "#/$defs/Recording"}).validate(body)


def test_an_incident_is_uploaded_some_steps_after_it_and_the_file_is_gone_at_the_end(
    watch: Any, net: Any, step: Any, stand_in: Any, eventually: Any, settings: Any
) -> None:
    server = stand_in()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = watch(optimizer, server=server.url)
    for _ in range(3):
        step(optimizer)
    step(optimizer, math.nan)
    assert monitor.flush()
    for _ in range(uploads.STEPS_AFTER):
        step(optimizer)
    (body,) = eventually(lambda: server.bodies("/recordings"))
    check(body)
    assert (body["reason"], body["step"], body["layer"]) == ("nonfinite", 4, "0")
    (table,) = [table for table in body["tables"] if table["name"] == "steps"]
    assert table["rows"] >= 4 + uploads.STEPS_AFTER
    assert table["columns"]["loss"][3] == "NaN"
    eventually(lambda: not monitor._recorder._uploads.left)
    monitor.detach()
    assert len(server.bodies("/recordings")) == 1
    assert not blackbox.boxes(settings().spool_directory)


def test_an_incident_at_the_very_end_is_uploaded_with_it(watch: Any, net: Any, step: Any, stand_in: Any) -> None:
    server = stand_in()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = watch(optimizer, server=server.url, exit_timeout_seconds=60)
    step(optimizer)
    monitor.finish("failed", "out of ideas")
    monitor.detach()
    (body,) = server.bodies("/recordings")
    check(body)
    assert (body["reason"], body["step"]) == ("crashed", 1)


@pytest.mark.parametrize("answer", ["never", "error", "unknown route"])
def test_a_server_that_does_not_take_it_holds_nothing_up_and_the_file_stays(
    watch: Any, net: Any, step: Any, stand_in: Any, settings: Any, answer: str
) -> None:
    server = stand_in()

    def answered(path: str, body: Any) -> bytes:
        if not path.endswith("/recordings"):
            return server.accept(path, body)
        if answer == "never":
            return server.never(path, body)
        return server.response(500 if answer == "error" else 404)

    server.answer = answered
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = watch(optimizer, server=server.url, exit_timeout_seconds=0.5)
    step(optimizer, math.nan)
    monitor.detach()
    (path,) = blackbox.boxes(settings().spool_directory)
    assert not ringfile.is_alive(path)
    assert recording.incident(ringfile.read(path)).step == 1


def test_one_that_the_server_refuses_for_good_is_not_tried_again(
    watch: Any, net: Any, step: Any, stand_in: Any, settings: Any
) -> None:
    server = stand_in()
    server.answer = lambda path, _body: server.response(422 if path.endswith("/recordings") else 200)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = watch(optimizer, server=server.url, exit_timeout_seconds=60)
    step(optimizer, math.nan)
    monitor.detach()
    assert len(server.bodies("/recordings")) == 1
    assert not blackbox.boxes(settings().spool_directory)


def test_the_next_start_uploads_what_a_dead_process_left_for_this_server_once(
    watch: Any, net: Any, box: Any, stand_in: Any, eventually: Any, tmp_path: Path
) -> None:
    server = stand_in()
    known = False

    def answered(path: str, body: Any) -> bytes:
        return server.response(200 if known or not path.endswith("/recordings") else 404)

    server.answer = answered
    dead, foreign, living = box(server=server.url), box(server=SERVER), box(server=server.url)
    for each in (dead, foreign, living):
        each.record(step(7))
    dead.close(keep=True)
    foreign.close(keep=True)
    (tmp_path / "torn.blackbox").write_bytes(b"optwatch black box\nhalf")
    monitor = watch(torch.optim.SGD(net.parameters(), lr=0.1), server=server.url, spool_directory=tmp_path)
    eventually(lambda: server.bodies("/recordings"))
    assert dead.path.exists()  # the run is not known there yet: it comes from the spool of the same process
    known = True
    eventually(lambda: not dead.path.exists())
    (tmp_path / "torn.blackbox.broken").unlink()
    monitor.detach()
    bodies = server.bodies("/recordings")
    assert {body["reason"] for body in bodies} == {"left_behind"}
    assert len({body["id"] for body in bodies}) == 1
    again = watch(torch.optim.SGD(net.parameters(), lr=0.1), server=server.url, spool_directory=tmp_path)
    eventually(lambda: again._recorder._uploads._searched)
    again.detach()
    assert len(server.bodies("/recordings")) == len(bodies)
    assert foreign.path.exists()
    assert living.path.exists()


def test_a_sweep_uploads_the_dead_and_leaves_the_living(box: Any, stand_in: Any, tmp_path: Path, capsys: Any) -> None:
    server = stand_in()
    dead, living = box(), box()
    for each in (dead, living):
        each.record(step(7))
    dead.close(keep=True)
    assert playback.main(["--upload", str(tmp_path), "--server", server.url]) == 0
    said = capsys.readouterr().out
    assert f"{dead.path}: uploaded" in said
    assert f"{living.path}: left alone, its process lives" in said
    assert (dead.path.exists(), living.path.exists()) == (False, True)
    living.close(keep=True)
    server.answer = lambda *_: server.response(503)
    assert playback.main(["--upload", str(living.path), "--server", server.url]) == 1
    assert f"{living.path} stays" in capsys.readouterr().err
    assert living.path.exists()
    with pytest.raises(SystemExit):
        playback.main(["--upload", str(tmp_path), "--server", "optwatch:8000"])
    assert playback.main([str(tmp_path / "run")]) == 1


def test_a_recording_that_is_too_large_goes_without_its_parameters(box: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = box()
    for number in range(1, 50):
        made.record(step(number))
    body = recording.message(ringfile.read(made.path))
    check(body)
    assert [series["name"] for series in body["tables"][0]["series"]] == ["layer_grad_norm", "parameter_grad_norm"]
    assert body["tables"][0]["series"][1]["type"] == "bfloat16"
    monkeypatch.setattr(recording, "MAX_MESSAGE_BYTES", len(json.dumps(body)) - 1)
    smaller = recording.message(ringfile.read(made.path))
    assert [series["name"] for series in smaller["tables"][0]["series"]] == ["layer_grad_norm"]
    assert smaller["id"] == body["id"]
    made.record(step(50))
    assert recording.message(ringfile.read(made.path))["id"] != body["id"]


def test_a_supervised_process_that_is_killed_has_its_black_box_on_the_server(real_server: Any, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    environment = {
        **os.environ,
        "OPTWATCH_SERVER": real_server.url,
        "OPTWATCH_SPOOL_DIRECTORY": str(spool),
        "OPTWATCH_ADDRESS": "127.0.0.1",
        "OPTWATCH_RUN_ID": "supervised",
        "OPTWATCH_EXIT_TIMEOUT_SECONDS": "60",
    }
    code = KILLED.replace("if os.fork() == 0:", "if False:").replace("sys.stdin.readline()", "while not known(): pass")
    known = f"""
import json, urllib.request
def known():
    with urllib.request.urlopen("{real_server.url}/api/v1/runs") as answer:
        return json.load(answer)["runs"]
"""
    command = [sys.executable, "-m", "optwatch", "run", "--", sys.executable, "-c", known + code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 128 + signal.SIGKILL
    (kept,) = real_server.get("/runs/supervised/recordings")["recordings"]
    assert (kept["reason"], kept["step"], kept["layer"], kept["last_step"]) == ("nonfinite", 5, "1", 5)
    assert not blackbox.boxes(spool)
    client = Client(real_server.url)
    body = client.get(f"/api/v1/runs/supervised/recordings/{kept['id']}", 10)
    assert body["tables"][0]["columns"]["step"] == [1, 2, 3, 4, 5]


def test_faults_of_the_thread_that_uploads_reach_nobody(tmp_path: Path, box: Any) -> None:
    faults = Faults()
    made = uploads.Uploads("http://127.0.0.1:9", tmp_path, faults, 0.2)
    broken = box()
    broken.record(step(1))
    made.start(broken)
    made.incident()
    made.finish(0.3)
    made.close()
    assert made.left
    assert faults.counts["reporter"] >= 1
