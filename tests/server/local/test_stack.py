"""The shipped configuration runs in the real Prometheus and Alertmanager, and pages."""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from optwatch_server.local import stack as stack_module
from optwatch_server.local.receiver import Receiver
from optwatch_server.local.stack import Process, Stack, StackError
from optwatch_server.shipped import shipped
from optwatch_server.shipping.configuration import Addresses, export, main

NOWHERE = "http://127.0.0.1:9"


class FakeRun:
    """The two endpoints that Prometheus reads: the server's list of targets, and one run's metrics."""

    def __init__(self) -> None:
        self.nonfinite = 0
        self.served_one_at: float | None = None  # when Prometheus first got the 1
        self.scrapes = 0
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/api/v1/sd":
                    labels = {"run_id": "run-1", "project": "nlp", "team": "research"}
                    body = json.dumps([{"targets": [fake.address], "labels": labels}])
                    kind = "application/json"
                else:
                    body, kind = fake.metrics(), "text/plain; version=0.0.4"
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, format: str, *args: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self.thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def metrics(self) -> str:
        self.scrapes += 1
        if self.nonfinite and self.served_one_at is None:
            self.served_one_at = time.monotonic()
        who = 'run_id="run-1",rank="0"'
        lines = [f'optwatch_run_info{{{who},run="gpt-small",project="nlp",team="research",optimizer="AdamW"}} 1']
        for source in ("loss", "gradient"):
            lines.append(f'optwatch_nonfinite_total{{{who},source="{source}"}} {self.nonfinite}')
        lines.append(f'optwatch_spikes_total{{{who},signal="loss"}} {self.nonfinite}')
        if self.nonfinite:
            lines.append(f'optwatch_nonfinite_first_step{{{who},source="gradient",layer="blocks.3"}} 812')
        return "\n".join(lines) + "\n"

    def __enter__(self) -> FakeRun:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH that holds only what a test puts into it."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def _program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def _wait_until(condition: Callable[[], bool], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.05)


def _get(url: str) -> Any:
    address = urlsplit(url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=10)
    try:
        connection.request("GET", f"{address.path}?{address.query}")
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.e2e
def test_a_first_nan_in_a_scrape_gives_exactly_one_page_and_no_ticket(tmp_path: Path) -> None:
    with FakeRun() as run, Receiver() as receiver:
        stack = Stack(
            tmp_path, server=f"http://{run.address}", page_url=receiver.page_url, ticket_url=receiver.ticket_url
        )
        with stack:
            pids = [stack.prometheus.pid, stack.alertmanager.pid]
            _wait_until(lambda: run.scrapes >= 4, 60)  # the server's job and the run's, twice
            run.nonfinite = 1
            changed_at = time.monotonic()
            page = receiver.wait_for(lambda notification: notification.receiver == "page", 60)
            arrived_at = time.monotonic()
            assert run.served_one_at is not None
            since_step, since_scrape = arrived_at - changed_at, arrived_at - run.served_one_at
            print(f"page {since_step:.1f} s after the step, {since_scrape:.1f} s after the scrape")
            _wait_until(lambda: _get(f"{stack.alertmanager_url}/api/v2/alerts?filter=notify=ticket") != [], 30)
            (ticket,) = _get(f"{stack.alertmanager_url}/api/v2/alerts?filter=notify=ticket")
            _wait_until(
                lambda: _states(stack) == {"TrainingNonFinite": "active", "TrainingLossSpike": "suppressed"}, 30
            )
            # Longer than tickets wait for company (30 s): one that was not muted would have come by then.
            time.sleep(35)
        arrived = [(notification.receiver, notification.status) for notification in receiver.notifications]
    assert ticket["labels"]["run_id"] == "run-1"
    assert arrived == [("page", "firing")]
    (alert,) = page.alerts
    assert alert["labels"] == {
        "alertname": "TrainingNonFinite",
        "severity": "critical",
        "notify": "page",
        "run_id": "run-1",
        "run": "gpt-small",
        "project": "nlp",
        "team": "research",
    }
    assert "First seen at step 812 in the gradient, on rank 0; " in alert["annotations"]["description"]
    assert "the layer to look at first is blocks.3." in alert["annotations"]["description"]
    assert alert["annotations"]["run_url"] == f"http://{run.address}/runs/run-1"
    assert alert["annotations"]["runbook_url"] == f"http://{run.address}/runbooks/TrainingNonFinite"
    assert all(_gone(pid) for pid in pids)


def _states(stack: Stack) -> dict[str, str]:
    return {
        alert["labels"]["alertname"]: alert["status"]["state"]
        for alert in _get(f"{stack.alertmanager_url}/api/v2/alerts")
    }


def _stack(directory: Path, **options: Any) -> Stack:
    return Stack(directory, server=NOWHERE, page_url=f"{NOWHERE}/page", ticket_url=f"{NOWHERE}/ticket", **options)


@pytest.mark.e2e
def test_both_programs_are_ready_within_the_block_and_gone_after_it(tmp_path: Path) -> None:
    with _stack(tmp_path / "new") as stack:
        rules = _get(f"{stack.prometheus_url}/api/v1/rules")["data"]["groups"]
        assert {rule["name"] for group in rules for rule in group["rules"]} >= {"TrainingNonFinite", "TrainingRunLost"}
        (alertmanager,) = _get(f"{stack.prometheus_url}/api/v1/alertmanagers")["data"]["activeAlertmanagers"]
        assert alertmanager["url"].startswith(stack.alertmanager_url)
        processes = [stack.prometheus, stack.alertmanager]
        assert all(process.log.read_text() for process in processes)
    assert all(_gone(process.pid) for process in processes)
    stack.stop()  # repeating it changes nothing
    with pytest.raises(StackError, match="the stack is not running: use it within its `with` block"):
        _ = stack.prometheus_url


@pytest.mark.e2e
def test_a_taken_port_is_replaced_by_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = iter([taken.getsockname()[1], stack_module.free_port(), stack_module.free_port()])
        monkeypatch.setattr(stack_module, "free_port", lambda: next(ports))
        with _stack(tmp_path) as stack:
            assert stack.alertmanager.port != taken.getsockname()[1]


@pytest.mark.e2e
def test_a_directory_may_be_given_relative_to_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with _stack(Path("here")) as stack:
        assert stack.prometheus.log == tmp_path / "here" / "prometheus.log"


@pytest.mark.e2e
def test_a_configuration_that_prometheus_refuses_is_told_with_its_words_and_leaves_nothing_running(
    tmp_path: Path,
) -> None:
    source = tmp_path / "source"
    (source / "rules").mkdir(parents=True)
    for name in ("prometheus.yaml", "alertmanager.yaml"):
        (source / name).write_text((shipped("alerts") / name).read_text())
    (source / "rules" / "broken.yaml").write_text("groups: [{name: g, rules: [{alert: A, expr: 'sum('}]}]\n")
    stack = _stack(tmp_path / "run", source=source)
    with pytest.raises(StackError, match=r"(?s)prometheus exited with status 1 .*broken\.yaml"):
        stack.start()
    with pytest.raises(StackError, match="not running"):
        _ = stack.alertmanager


def test_a_missing_program_is_named_with_the_debian_package_that_has_it(tmp_path: Path, programs: Path) -> None:
    with pytest.raises(
        StackError,
        match="alertmanager or prometheus-alertmanager is not on PATH; "
        "on Debian: apt-get install prometheus-alertmanager",
    ):
        _stack(tmp_path).start()
    _program(programs, "alertmanager", "exit 0")
    with pytest.raises(StackError, match=r"prometheus is not on PATH; on Debian: apt-get install prometheus$"):
        _stack(tmp_path).start()


def test_a_program_that_never_gets_ready_is_stopped_and_its_log_quoted(tmp_path: Path) -> None:
    command = ["/bin/sh", "-c", "echo opening the database; exec sleep 60"]
    with pytest.raises(StackError, match=r"(?s)slow was not ready within 0.3 s. The end of .*slow.log:\nopening"):
        Process.start("slow", lambda port: command, tmp_path, 0.3)


def test_a_program_that_ignores_the_request_to_end_is_killed(tmp_path: Path) -> None:
    process = Process(
        "stubborn", ["/bin/sh", "-c", "trap '' TERM; echo up; while :; do sleep 1; done"], 1, tmp_path / "log"
    )
    _wait_until(lambda: "up" in process.tail(), 10)
    process.stop(grace=0.2)
    assert _gone(process.pid)


def test_export_changes_addresses_and_nothing_else(tmp_path: Path) -> None:
    addresses = Addresses(
        "https://optwatch.example.org/base/",
        "https://grafana.example.org",
        "am.example.org:9094",
        "https://pager.example.org/a?key=b",
        "https://tickets.example.org/a",
    )
    written = export(tmp_path / "new", addresses)
    shipped_rules = sorted((shipped("alerts") / "rules").glob("*.yaml"))
    assert [path.name for path in written] == ["prometheus.yaml", "alertmanager.yaml", *(p.name for p in shipped_rules)]

    prometheus, original = (
        yaml.safe_load((p / "prometheus.yaml").read_text()) for p in (tmp_path / "new", shipped("alerts"))
    )
    assert prometheus != original
    assert prometheus["scrape_configs"][0]["static_configs"][0]["targets"] == ["optwatch.example.org:443"]
    original["scrape_configs"][0] |= {
        "scheme": "https",
        "metrics_path": "/base/metrics",
        "static_configs": [{"targets": ["optwatch.example.org:443"]}],
    }
    original["scrape_configs"][1]["http_sd_configs"][0]["url"] = "https://optwatch.example.org/base/api/v1/sd"
    original["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = ["am.example.org:9094"]
    assert prometheus == original

    alertmanager, original = (
        yaml.safe_load((p / "alertmanager.yaml").read_text()) for p in (tmp_path / "new", shipped("alerts"))
    )
    original["receivers"][0]["webhook_configs"][0]["url"] = "https://pager.example.org/a?key=b"
    original["receivers"][1]["webhook_configs"][0]["url"] = "https://tickets.example.org/a"
    assert alertmanager == original

    for path in shipped_rules:
        text = (tmp_path / "new" / "rules" / path.name).read_text()
        assert "optwatch:8000" not in text
        back = text.replace("https://optwatch.example.org/base", "http://optwatch:8000")
        assert back.replace("https://grafana.example.org", "http://grafana:3000") == path.read_text()


def test_export_without_addresses_gives_what_is_shipped_with_the_comment_that_explains_it(tmp_path: Path) -> None:
    for path in export(tmp_path, Addresses()):
        original = shipped("alerts") / path.relative_to(tmp_path)
        assert yaml.safe_load(path.read_text()) == yaml.safe_load(original.read_text())
        assert path.read_text().splitlines()[0] == original.read_text().splitlines()[0]


def test_a_configuration_without_a_place_for_an_address_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prometheus.yaml").write_text("global: {}\n")
    with pytest.raises(ValueError, match=r"prometheus.yaml has no place for an address it should have: KeyError"):
        export(tmp_path / "new", Addresses(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server": "optwatch:8000"}, "server is 'optwatch:8000'; expected something like http://optwatch:8000"),
        ({"server": "http://a/{{ x }}"}, "server is "),
        ({"grafana": 'http://a" x: "'}, "grafana is "),
        (
            {"alertmanager": "http://am:9093"},
            "alertmanager is 'http://am:9093'; expected something like alertmanager:9093",
        ),
        ({"page_url": "ftp://pager"}, "page_url is 'ftp://pager'; expected something like https://pager"),
        ({"alertmanager": "am:99999"}, "range"),
    ],
)
def test_an_address_of_the_wrong_form_is_refused_with_an_example(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Addresses(**changes)


def test_the_command_writes_the_files_and_lists_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", str(tmp_path / "new"), "--server", "http://watch:1", "--alertmanager", "am:2"]
    assert main([*arguments, "--page-url", "http://pager/p", "--grafana", "http://g:3"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert f"{tmp_path / 'new' / 'rules' / 'training.yaml'}" in listed
    assert "watch:1" in (tmp_path / "new" / "prometheus.yaml").read_text()
    assert "http://pager/p" in (tmp_path / "new" / "alertmanager.yaml").read_text()
    assert "http://g:3/d/" in (tmp_path / "new" / "rules" / "training.yaml").read_text()


def test_the_command_says_which_file_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["export", str(tmp_path / "file")]) == 1
    assert "optwatch alerts export: " in capsys.readouterr().err


def test_the_command_refuses_a_wrong_address_before_writing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(tmp_path / "new"), "--server", "watch"])
    assert stopped.value.code == 2
    assert "server is 'watch'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
