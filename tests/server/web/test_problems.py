import pytest

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("body", "headers", "status", "told"),
    [
        (b"{", JSON, 400, "the body is not JSON ("),
        (b"", JSON, 422, "the body is missing"),
        (b"[]", JSON, 422, "the body is []"),
        (b'{"schema": 1}', {"Content-Type": "text/plain"}, 422, "send it with Content-Type: application/json"),
        (b"[" * 100_000, JSON, 400, "the body"),
        (b'{"schema": 1, "id": "a", "seed": ' + b"9" * 5000 + b"}", JSON, 400, "the body"),
        (b'{"schema": 1, "id": "a", "name": "\xff"}', JSON, 400, "the body"),
    ],
)
def test_what_is_no_message_is_a_clear_4xx(small, body: bytes, headers: dict[str, str], status: int, told: str) -> None:
    answer = small.client.post("/api/v1/runs", content=body, headers=headers)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert told in answer.json()["detail"]
    assert (answer.json()["type"], answer.json()["status"]) == ("about:blank", status)


def test_every_refused_field_is_named_with_its_value(small) -> None:
    answer = small.client.post("/api/v1/heartbeats", json={"schema": 1, "beats": [{"run_id": "r"}, {"rank": -1}]})
    assert answer.json()["errors"] == [
        {"field": "beats[1].run_id", "value": "{'rank': -1}", "problem": "Field required"},
        {"field": "beats[1].rank", "value": "-1", "problem": "Input should be greater than or equal to 0"},
    ]
    assert answer.json()["detail"] == "beats[1].run_id is missing: send it, as docs/wire.md says (and 1 more)"


def test_a_flood_of_errors_is_cut(small) -> None:
    answer = small.client.post("/api/v1/heartbeats", json={"schema": 1, "beats": [{"run_id": "/"}] * 100})
    assert len(answer.json()["errors"]) == 20
    assert "(and 99 more)" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("method", "path", "status", "told"),
    [
        ("GET", "/api/v1/nothing", 404, "GET /api/v1/nothing does not exist"),
        ("DELETE", "/api/v1/runs", 405, "DELETE /api/v1/runs is not allowed"),
        ("GET", "/api/v1/runs?limit=0", 422, "limit is '0': Input should be greater than or equal to 1"),
        ("GET", "/api/v1/runs?status=gone", 422, "status is 'gone'"),
        ("GET", "/api/v1/runs/%00", 422, "run_id is '\\x00'"),
    ],
)
def test_a_request_that_fits_nothing_says_where_to_look(small, method: str, path: str, status: int, told: str) -> None:
    answer = small.client.request(method, path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert told in answer.json()["detail"]


def test_a_method_that_is_not_allowed_comes_with_those_that_are(small) -> None:
    assert "GET" in small.client.delete("/api/v1/runs/run-1").headers["allow"]
