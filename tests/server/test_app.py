import pytest
from sqlalchemy.exc import OperationalError


def _no_database(*_arguments: object) -> None:
    raise OperationalError("SELECT 1", {}, OSError("gone"))


def test_a_server_that_is_well_says_so(live) -> None:
    assert live.client.get("/healthz").json() == {"status": "ok"}
    assert live.client.get("/readyz").json() == {"status": "ok"}


def test_without_its_database_the_server_lives_but_is_not_ready(small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small.service.database, "read", _no_database)
    monkeypatch.setattr(small.service.database, "write", _no_database)
    assert small.client.get("/healthz").status_code == 200
    for answer in (small.client.get("/readyz"), small.run(), small.client.get("/api/v1/runs")):
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "5"
        assert answer.json()["detail"] == "the database does not answer: nothing was kept, send it again later"
    assert "the database does not answer" in small.page("/").text


def test_a_fault_of_the_server_is_a_500_that_tells_no_secrets(small, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(small.service.database, "read", fail)
    answer = small.client.get("/api/v1/runs")
    assert answer.status_code == 500
    assert answer.json()["detail"] == "the server failed at this request: its log has the traceback"
    assert "secret" not in answer.text


def test_the_api_describes_itself(small) -> None:
    paths = small.client.get("/api/v1/openapi.json").json()["paths"]
    assert set(paths) >= {
        "/api/v1/runs",
        "/api/v1/runs/{run_id}",
        "/api/v1/runs/{run_id}/finish",
        "/api/v1/runs/{run_id}/events",
        "/api/v1/heartbeats",
        "/api/v1/events",
        "/api/v1/sd",
    }
    assert "/" not in paths
