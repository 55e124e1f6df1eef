"""`helm test`: the Pod's very command, against a real server and an Alertmanager."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.helm.conftest import Render

from optwatch_server.local.serving import serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("server")) as url:
        yield url


class Alertmanager:
    """Answers the second question about alerts with one, or none ever; keeps what it was asked."""

    def __init__(self, *, silent: bool = False) -> None:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urllib.parse.urlsplit(self.path)
                asked.append(urllib.parse.parse_qs(url.query)["filter"][0])
                alerts = [] if silent or len(asked) < 2 else [{"labels": {"alertname": "TrainingNonFinite"}}]
                body = json.dumps(alerts).encode()
                self.send_response(200 if url.path == "/api/v2/alerts" else 404)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Silence."""

        self.asked = asked
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> Alertmanager:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


def page(render: Render, server: str, *alertmanagers: str, seconds: int = 10) -> subprocess.CompletedProcess[str]:
    """Run the Pod's command with its environment; only the server's address is that of this machine."""
    release = render({"alertmanagerUrls": list(alertmanagers), "tests": {"alertSeconds": seconds}})
    container = release.one("Pod")["spec"]["containers"][0]
    environment = {one["name"]: one["value"] for one in container["env"]}
    service = release.one("Service")["metadata"]
    assert environment["OPTWATCH_SERVER"] == f"http://{service['name']}.{service['namespace']}.svc:8000"
    environment |= {"OPTWATCH_SERVER": server, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(container["command"], env=environment, capture_output=True, text=True, timeout=60)


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as response:
        return json.load(response)


def test_the_run_and_its_critical_event_are_at_the_server_and_the_run_has_ended(render: Render, server: str) -> None:
    done = page(render, server)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "alertmanagerUrls is empty" in done.stdout
    run_id = done.stdout.split()[4]
    run = get(f"{server}/api/v1/runs/{run_id}")
    assert (run["status"], run["project"]) == ("cancelled", "helm-test")
    (event,) = get(f"{server}/api/v1/runs/{run_id}/events")["events"]
    assert (event["severity"], event["kind"]) == ("critical", "nonfinite")
    assert "nothing is wrong" in event["summary"]


def test_every_alertmanager_is_asked_for_the_alert_of_that_run_until_it_has_it(render: Render, server: str) -> None:
    with Alertmanager() as first, Alertmanager() as second:
        done = page(render, server, first.url, second.url)
    assert done.returncode == 0, done.stdout + done.stderr
    run_id = done.stdout.split()[4]
    assert first.asked == second.asked == [f'run_id="{run_id}"'] * 2
    assert done.stdout.count("has TrainingNonFinite") == 2


def test_an_alertmanager_that_never_hears_of_it_fails_the_test(render: Render, server: str) -> None:
    with Alertmanager(silent=True) as silent:
        done = page(render, server, silent.url, seconds=1)
    assert done.returncode == 1
    assert f"FAILED: {silent.url} has no alert of the run after 1 s" in done.stderr


def test_an_alertmanager_or_a_server_that_is_away_fails_the_test(render: Render, server: str) -> None:
    nobody = "http://127.0.0.1:9"
    done = page(render, server, nobody)
    assert (done.returncode, f"FAILED: {nobody}/api/v2/alerts" in done.stderr) == (1, True)
    done = page(render, nobody)
    assert (done.returncode, f"FAILED: {nobody}/api/v1/runs" in done.stderr) == (1, True)
