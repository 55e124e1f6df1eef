import base64
import json
import math
import struct
import uuid
import zlib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from optwatch_server import wire
from optwatch_server.cli import main
from optwatch_server.database.engine import Database
from optwatch_server.runs import recordings
from optwatch_server.runs.store import Store, StoreError
from optwatch_server.settings import Settings
from optwatch_server.web import charts
from optwatch_server.web.limits import MAX_BODY_BYTES, MAX_RECORDING_BYTES

NAN = math.nan
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def live(database: Database, clock, serving, tmp_path: Path):
    """A server on each database, with a store of the test's own."""
    with serving(database, clock, settings=Settings(recordings_url=str(tmp_path / "store"))) as server:
        yield server


def series(name: str, columns: dict[str, list[float]], kind: str = "float32") -> dict[str, object]:
    """A series as docs/wire.md says, written here without the agent's help."""
    planes = b""
    for values in columns.values():
        packed = [struct.pack("<f", value)[0 if kind == "float32" else 2 :] for value in values]
        planes += b"".join(bytes(value[byte] for value in packed) for byte in range(len(packed[0]) if packed else 0))
    data = base64.b64encode(zlib.compress(planes)).decode()
    return {"name": name, "type": kind, "members": list(columns), "data": data}


def table(rows: int = 40, first: int = 100, **changes: Any) -> dict[str, Any]:
    """Steps whose layer `blocks.1` rises tenfold at the end, and is NaN at the last."""
    steps = list(range(first, first + rows))
    rising = [0.5] * (rows - 5) + [1.0, 2.0, 3.0, 4.0, NAN]
    values: dict[str, Any] = {
        "name": "steps",
        "optimizer": "AdamW",
        "rows": rows,
        "columns": {
            "step": steps,
            "loss": [2.5] * (rows - 1) + ["NaN"],
            "grad_norm": [*rising[:-1], "NaN"],
            "grad_norm_before_clip": [None] * rows,
            "learning_rate": [1e-3] * rows,
        },
        "series": [
            series("layer_grad_norm", {"embed": [0.25] * rows, "blocks.1": rising, "head": [0.0] * rows}),
            series("parameter_grad_norm", {"embed.weight": [0.25] * rows}, "bfloat16"),
        ],
    }
    return values | changes


def recording(**changes: Any) -> dict[str, Any]:
    values = {
        "schema": 1,
        "id": str(uuid.uuid4()),
        "rank": 0,
        "reason": "nonfinite",
        "step": 139,
        "layer": "blocks.1",
        "recorded_at": 1_700_000_000.0,
        "tables": [table()],
        "notes": [{"type": "event", "kind": "nonfinite", "severity": "critical", "step": 139}],
    }
    return values | changes


def send(live, body: object, run_id: str = "run-1"):
    return live.client.post(f"/api/v1/runs/{run_id}/recordings", json=body)


def test_a_recording_is_kept_listed_and_given_back_as_it_was_sent(live) -> None:
    live.run()
    body = recording()
    answer = send(live, body)
    assert (answer.status_code, answer.json()) == (201, {"id": body["id"], "kept": True})
    again = send(live, body)
    assert (again.status_code, again.json()) == (200, {"id": body["id"], "kept": True})
    (listed,) = live.client.get("/api/v1/runs/run-1/recordings").json()["recordings"]
    assert {name: listed[name] for name in ("id", "rank", "reason", "step", "layer", "first_step", "last_step")} == {
        "id": body["id"],
        "rank": 0,
        "reason": "nonfinite",
        "step": 139,
        "layer": "blocks.1",
        "first_step": 100,
        "last_step": 139,
    }
    got = live.client.get(f"/api/v1/runs/run-1/recordings/{body['id']}").json()
    assert got == body
    kept = wire.Recording.model_validate(got).tables[0]
    embed, risen, _ = recordings.decode(kept.series[0], 40)
    assert embed == [0.25] * 40
    assert risen[-3:-1] == [3.0, 4.0]
    assert math.isnan(risen[-1] or 0)
    assert recordings.decode(kept.series[1], 40) == [[0.25] * 40]


def test_of_each_rank_the_newest_four_are_kept_and_of_a_run_sixteen_ranks(live, tmp_path: Path) -> None:
    live.run()
    first = recording()
    send(live, first)
    for _ in range(3):
        live.clock.now += 1
        send(live, recording())
    files = tmp_path / "store" / "run-1"
    assert (files / f"{first['id']}.json.gz").exists()
    live.clock.now += 1
    send(live, recording())
    listed = live.client.get("/api/v1/runs/run-1/recordings").json()["recordings"]
    assert len(listed) == 4
    assert first["id"] not in {entry["id"] for entry in listed}
    assert {path.name for path in files.iterdir()} == {f"{entry['id']}.json.gz" for entry in listed}
    for rank in range(1, 16):
        assert send(live, recording(rank=rank)).status_code == 201
    beyond = send(live, recording(rank=16))
    assert (beyond.status_code, beyond.json()["kept"]) == (200, False)
    assert send(live, recording(rank=15)).json()["kept"]


def test_a_recording_belongs_to_its_run(live) -> None:
    assert send(live, recording()).status_code == 404
    live.run()
    live.run("run-2")
    body = recording()
    send(live, body)
    assert live.client.get(f"/api/v1/runs/run-2/recordings/{body['id']}").status_code == 404
    assert live.client.get("/api/v1/runs/run-2/recordings").json() == {"recordings": []}
    assert live.client.get("/api/v1/runs/run-3/recordings").status_code == 404
    assert live.page(f"/runs/run-2?recording={body['id']}").status_code == 404


def broken(**changes: object) -> dict[str, Any]:
    return recording(tables=[table(**changes)])


def one(data: str, members: int = 1) -> list[dict[str, object]]:
    return [{"name": "x", "type": "float32", "members": ["m"] * members, "data": data}]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (broken(series=one("not base64!")), "table steps of AdamW: the data of x cannot be read"),
        (broken(series=one(base64.b64encode(b"no zlib").decode())), "the data of x cannot be read"),
        (
            broken(series=one(base64.b64encode(zlib.compress(bytes(159))).decode())),
            "the data of x is not 160 bytes long: send 4 for each of 1 members and 40 rows",
        ),
        (broken(series=one(base64.b64encode(zlib.compress(bytes(161))).decode())), "is not 160 bytes long"),
        (broken(series=one(base64.b64encode(zlib.compress(bytes(10**8))).decode())), "is not 160 bytes long"),
        (broken(series=one(base64.b64encode(zlib.compress(bytes(160))[:-3]).decode())), "is not 160 bytes long"),
        (recording(tables=[{**table(), "rows": 39}]), "column step has 40 values: send 39, one a row"),
        (broken(columns={"loss": [1.0] * 40}), "the column step is missing"),
        (broken(columns={"step": [None] * 40}), "the column step is missing or holds what is no step"),
        (broken(columns={"step": [-1] * 40}), "holds what is no step"),
        (recording(tables=[{**table(rows=4096), "series": one("", 2000)}]), "has more than 4194304 numbers"),
        (recording(schema=2), "this server knows schema 1 only"),
        (recording(reason="Not a kind"), "reason"),
    ],
)
def test_a_recording_that_does_not_hold_what_it_says_is_refused(small, body: dict[str, Any], told: str) -> None:
    small.run()
    answer = send(small, body)
    assert answer.status_code == 422, answer.text
    assert told in answer.json()["detail"]
    assert small.client.get("/api/v1/runs/run-1/recordings").json() == {"recordings": []}


def test_a_recording_may_be_larger_than_other_bodies_up_to_its_own_limit(small) -> None:
    small.run()
    body = json.dumps(recording()).encode()
    headers = {"Content-Type": "application/json"}
    padded = body + b" " * (MAX_RECORDING_BYTES - len(body))
    path = "/api/v1/runs/run-1/recordings"
    assert len(padded) > MAX_BODY_BYTES
    assert small.client.post(path, content=padded, headers=headers).status_code == 201
    answer = small.client.post(path, content=padded + b" ", headers=headers)
    assert answer.status_code == 413
    assert "4194304 is the limit" in answer.json()["detail"]


def test_a_store_that_fails_keeps_nothing_and_a_lost_file_leaves_the_page(small, tmp_path: Path) -> None:
    small.run()
    (tmp_path / "recordings").write_text("a file where the folder would be")
    answer = send(small, recording())
    assert answer.status_code == 503
    assert "nothing was kept, send it again later" in answer.json()["detail"]
    assert small.client.get("/api/v1/runs/run-1/recordings").json() == {"recordings": []}
    (tmp_path / "recordings").unlink()
    body = recording()
    assert send(small, body).status_code == 201
    (path,) = (tmp_path / "recordings" / "run-1").iterdir()
    path.write_bytes(b"damaged")
    assert small.client.get(f"/api/v1/runs/run-1/recordings/{body['id']}").status_code == 503
    page = small.page("/runs/run-1")
    assert page.status_code == 200
    assert "is damaged" in page.text
    path.unlink()
    assert "did not give run-1/" in small.page("/runs/run-1").text


def figures(page: str) -> dict[str, ElementTree.Element]:
    """The charts of a page by title; what is no XML fails here."""
    begin = 'viewBox="0 0 640 210"'
    found = [
        ElementTree.fromstring(f'<svg xmlns="{SVG[1:-1]}" {begin}{part.partition("</svg>")[0]}</svg>')
        for part in page.split(f"<svg {begin}")[1:]
    ]
    return {str(svg.findtext(f"{SVG}title")): svg for svg in found}


def test_the_page_draws_the_steps_up_to_the_incident_and_marks_it(small) -> None:
    small.run()
    assert "Black box" not in small.page("/runs/run-1").text
    send(small, recording())
    page = small.page("/runs/run-1").text
    assert "<script" not in page
    assert "Rank 0, steps 100 to 139: nonfinite at step <strong>139</strong>, first in layer <strong>blocks.1" in page
    drawn = figures(page)
    assert set(drawn) == {
        "Loss",
        "Gradient norm",
        "Gradient norm of the worst layers",
        "Gradient norm of the worst parameters",
        "Learning rate",
    }
    for svg in drawn.values():
        assert [text.text for text in svg.findall(f"{SVG}text[@class='mark']")] == ["nonfinite at step 139"]
        (line,) = svg.findall(f"{SVG}line[@class='mark']")
        assert line.get("x1") == str(float(charts.RIGHT))
    layers = drawn["Gradient norm of the worst layers"]
    assert str(layers.findtext(f"{SVG}desc")).startswith(
        "Steps 100 to 139: blocks.1 from 0.5 to 4, not finite from step 139; embed from 0.25 to 0.25; head"
    )
    (broken,) = layers.findall(f"{SVG}path[@class='broken']")
    assert broken.findtext(f"{SVG}title") == "blocks.1: nan"
    assert "not finite from step 139" in str(drawn["Loss"].findtext(f"{SVG}desc"))
    assert not drawn["Learning rate"].findall(f"{SVG}path[@class='broken']")


def test_the_page_shows_the_newest_recording_and_others_on_demand(small) -> None:
    small.run()
    older = recording(step=None, reason="left_behind", layer=None, notes=[])
    send(small, older)
    small.clock.now += 60
    send(small, recording(rank=3))
    page = small.page("/runs/run-1").text
    assert "Rank 3, steps 100 to 139: nonfinite" in page
    assert f'href="/runs/run-1?recording={older["id"]}#black-box"' in page
    page = small.page(f"/runs/run-1?recording={older['id']}").text
    assert "Rank 0, steps 100 to 139: left behind" in page
    assert not figures(page)["Loss"].findall(f"{SVG}line[@class='mark']")


def test_names_and_numbers_of_a_recording_cannot_break_the_page(small) -> None:
    small.run()
    evil = '<script>alert(1)</script>&"'
    columns = {"step": [1, 2], "loss": ["Infinity", "-Infinity"], "grad_norm": [0, -1e308], "learning_rate": [0, 1e308]}
    tables = [
        {
            **table(rows=2),
            "optimizer": evil,
            "columns": columns,
            "series": [series("layer_grad_norm", {evil: [0, NAN]})],
        },
        {**table(rows=2), "optimizer": "Muon", "columns": columns, "series": []},
        {"name": "steps", "optimizer": "never stepped", "rows": 0, "columns": {"step": []}, "series": []},
        {"name": "samples", "optimizer": evil, "rows": 1, "columns": {"step": [0]}, "series": []},
    ]
    assert send(small, recording(tables=tables, step=2**62, notes=[{"step": "x", "severity": "critical"}])).is_success
    page = small.page("/runs/run-1")
    assert page.status_code == 200
    assert "<script" not in page.text
    assert set(figures(page.text)) >= {"Loss", "Gradient norm", "Learning rate"}
    assert send(small, recording(tables=[])).is_success
    small.clock.now += 1
    assert send(small, recording(tables=[tables[2]])).is_success
    assert small.page("/runs/run-1").status_code == 200


def test_the_worst_broke_first_or_rose_furthest_before() -> None:
    rows = 30
    columns = {
        "calm": [1.0] * rows,
        "late": [1.0] * 29 + [NAN],
        "early": [1.0] * 28 + [NAN, NAN],
        "risen": [1.0] * 27 + [50.0, NAN, NAN],
    }
    kept = wire.Recording.model_validate(
        recording(step=29, layer=None, tables=[table(rows, 0, series=[series("layer_grad_norm", columns)])])
    )
    assert charts.picture(kept).worst == ["risen", "early", "late", "calm"]
    named = kept.model_copy(update={"layer": "calm"})
    assert charts.picture(named).worst[0] == "calm"
    before = kept.model_copy(update={"step": 26})
    assert charts.picture(before).worst[0] == "calm"  # nothing had happened: the model's order


def test_any_file_system_of_fsspec_is_a_store() -> None:
    store = Store(f"memory://{uuid.uuid4()}")
    with pytest.raises(StoreError, match="did not give a/b: FileNotFoundError"):
        store.get("a/b")
    store.put("a/b", b"1")
    store.put("a/b", b"2")
    assert store.get("a/b") == b"2"
    store.delete("a/b")
    store.delete("a/b")
    with pytest.raises(StoreError):
        store.get("a/b")


def test_a_store_that_cannot_be_used_stops_the_start_with_one_line(tmp_path: Path, capsys) -> None:
    database = f"sqlite:///{tmp_path / 'x.sqlite3'}"
    assert main(["--port", "0", "--database-url", database, "--recordings-url", "nosuch://user:secret@bucket"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("optwatch server: the store of recordings 'nosuch://bucket' cannot be used (")
    assert "secret" not in line
