import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / "schemas" / "wire-v1.json"


def check(name: str, message: object) -> None:
    document = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator({**document, "$ref": f"#/$defs/{name}"}).validate(message)


def test_the_schema_file_is_what_the_models_say() -> None:
    script = ROOT / "scripts" / "generate_schema.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("loss", [2.5, 3, "NaN", "Infinity", "-Infinity"])
def test_the_schema_takes_a_number_that_may_not_be_finite(loss: object) -> None:
    check("Heartbeats", {"schema": 1, "beats": [{"run_id": "r", "values": {"loss": loss}}]})


@pytest.mark.parametrize("loss", ["nan", "1.5", None, []])
def test_the_schema_refuses_what_is_no_number(loss: object) -> None:
    with pytest.raises(jsonschema.ValidationError):
        check("Heartbeats", {"schema": 1, "beats": [{"run_id": "r", "values": {"loss": loss}}]})


def test_the_schema_takes_a_newer_agents_fields_and_refuses_its_schema() -> None:
    check("Run", {"schema": 1, "id": "r", "colour": "blue"})
    with pytest.raises(jsonschema.ValidationError):
        check("Run", {"schema": 2, "id": "r"})


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"schema": 2, "id": "r"}, "schema is 2: this server knows schema 1 only: send 1, or upgrade the server"),
        ({"schema": True, "id": "r"}, "schema is True: this server knows schema 1 only"),
        ({"id": "r"}, "schema is missing: send it, as docs/wire.md says"),
        ({"schema": 1, "id": "-r"}, "id is '-r': String should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$'"),
        ({"schema": 1, "id": "r" * 129}, "String should match pattern"),
        ({"schema": 1, "id": "r", "name": "n" * 257}, "String should have at most 256 characters"),
        ({"schema": 1, "id": "r", "tags": {str(n): "" for n in range(65)}}, "tags is {'0': '', "),
        ({"schema": 1, "id": "r", "tags": {"": "x"}}, "tags"),
        ({"schema": 1, "id": "r", "world_size": 0}, "world_size is 0: Input should be greater than or equal to 1"),
        ({"schema": 1, "id": "r", "seed": 2**64}, "seed is 18446744073709551616: Input should be less than or equal"),
        ({"schema": 1, "id": "r", "started_at": 1e15}, "started_at is 1000000000000000.0: Input should be less than"),
        ({"schema": 1, "id": "r", "heartbeat_interval_seconds": 0}, "Input should be greater than 0"),
        ({"schema": 1, "id": "r", "target": {"metric": "loss", "value": "low"}}, "target.value"),
    ],
)
def test_a_run_beyond_the_contract_is_refused_with_field_value_and_fix(small, message: object, told: str) -> None:
    answer = small.client.post("/api/v1/runs", json=message)
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert told in answer.json()["detail"]


def test_what_is_just_within_the_limits_is_taken(small) -> None:
    answer = small.run("r" * 128, name="n" * 256, tags={str(n): "v" * 256 for n in range(64)}, seed=2**64 - 1)
    assert answer.status_code == 201
    assert answer.json()["seed"] == 2**64 - 1
    beats = [{"run_id": "r" * 128, "rank": rank} for rank in range(1000)]
    assert small.beats(*beats).json() == {"accepted": 1000, "unknown_runs": []}


def test_a_batch_beyond_the_limit_is_refused_whole(small) -> None:
    small.run()
    answer = small.beats(*({"run_id": "run-1", "rank": rank} for rank in range(1001)))
    assert answer.status_code == 422
    assert "beats" in answer.json()["detail"]
    assert "at most 1000 items" in answer.json()["detail"]
    assert small.client.get("/api/v1/runs/run-1").json()["ranks"] == []


def test_unknown_fields_are_ignored_at_every_level(small) -> None:
    assert small.run(colour="blue", target={"metric": "loss", "value": 1, "soon": True}).status_code == 201
    assert small.beat(colour="blue").json()["accepted"] == 1
    assert small.events(small.event(colour="blue")).json()["accepted"] == 1


def test_a_bare_nan_is_refused_with_the_string_to_send(small) -> None:
    small.run()
    body = b'{"schema": 1, "beats": [{"run_id": "run-1", "values": {"loss": NaN}}]}'
    answer = small.client.post("/api/v1/heartbeats", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert "beats[0].values.loss is nan" in answer.json()["detail"]
    assert 'send the string "NaN", "Infinity" or "-Infinity"' in answer.json()["detail"]
