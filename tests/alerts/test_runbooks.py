"""What a runbook tells someone to type works: queries run in a real Prometheus, commands parse, a script works."""

from __future__ import annotations

import http.client
import json
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import CompletedProcess
from urllib.parse import quote

import pytest
import torch
from tests.alerts import lint

import optwatch.catalogue
import optwatch_server.catalogue
from optwatch_server.local.stack import PROMETHEUS, Process, find

RUNBOOKS = lint.load(Path(__file__).resolve().parents[2] / "runbooks")
QUERIES = [(name, query) for name, text in RUNBOOKS.items() for query in lint.fences(text, "promql")]
SCRIPTS = [(name, script) for name, text in RUNBOOKS.items() for script in lint.fences(text, "bash")]
COMMANDS = {"curl", "df", "dmesg", "iostat", "journalctl", "kubectl", "nslookup", "nvidia-smi", "py-spy", "sacct"}
COMMANDS |= {"sinfo", "sleep", "top", "torchfrtrace"}
"""What a runbook may ask of a shell besides `grep` and the like behind a pipe."""
CONSOLES = [(name, console) for name, text in RUNBOOKS.items() for console in lint.fences(text, "console")]


def _exposition(scrape: int) -> str:
    """Every metric of both catalogues for two ranks of the run RUN_ID; counters rise from one scrape to the next."""
    # Prometheus would record this of its rules, and there are none here.
    lines = ['ALERTS{alertname="TrainingRunLost",alertstate="firing",notify="page",run_id="RUN_ID",run="gpt"} 1']
    for common, metrics in ((("0", "1"), optwatch.catalogue.METRICS), (("",), optwatch_server.catalogue.METRICS)):
        for metric in metrics:
            for rank in common:
                labels = {"run_id": "RUN_ID", **({"rank": rank} if rank else {})}
                for label, values in zip(metric.labels, metric.values, strict=True):
                    labels[label] = values[0] if values else labels.get(label, "any")
                inside = ",".join(f'{label}="{value}"' for label, value in labels.items())
                value = 1 if metric.kind == "gauge" else scrape
                for suffix in ("_sum", "_count") if metric.kind == "histogram" else ("",):
                    lines.append(f"{metric.name}{suffix}{{{inside}}} {value}")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A Prometheus that has scraped everything there is twice, as two jobs."""
    scrapes = 0
    twice = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal scrapes
            scrapes += 1
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(_exposition(scrapes).encode())
            if scrapes >= 6:
                twice.set()

        def log_message(self, format: str, *args: object) -> None: ...

    folder = tmp_path_factory.mktemp("prometheus")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    target = {"targets": [f"127.0.0.1:{server.server_address[1]}"]}
    configuration = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
        "scrape_configs": [
            {"job_name": "training", "static_configs": [target]},
            {  # for its `up` alone
                "job_name": "optwatch-server",
                "static_configs": [target],
                "metric_relabel_configs": [{"action": "drop", "source_labels": ["__name__"], "regex": ".*"}],
            },
        ],
    }
    (folder / "prometheus.yaml").write_text(json.dumps(configuration))
    program = find(*PROMETHEUS)
    process = Process.start(
        "prometheus",
        lambda port: [
            program,
            f"--config.file={folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        folder,
        30,
    )
    try:
        assert twice.wait(60), "Prometheus did not scrape three times within 60 s"
        yield process
    finally:
        process.stop()
        server.shutdown()
        server.server_close()


def _query(prometheus: Process, query: str) -> dict:
    connection = http.client.HTTPConnection("127.0.0.1", prometheus.port, timeout=10)
    try:
        connection.request("GET", f"/api/v1/query?query={quote(query)}")
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


@pytest.mark.e2e
@pytest.mark.parametrize(("name", "query"), QUERIES)
def test_a_query_of_a_runbook_runs_and_answers_for_a_run_that_has_everything(
    name: str, query: str, prometheus: Process
) -> None:
    deadline = time.monotonic() + 30  # a scrape that has been answered is in the database a moment later
    while True:
        answer = _query(prometheus, query)
        assert answer["status"] == "success", answer
        if answer["data"]["result"] or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    assert answer["data"]["result"], f"{name}: {query} answers nothing"


@pytest.mark.e2e
def test_a_query_that_cannot_be_parsed_is_refused(prometheus: Process) -> None:
    assert _query(prometheus, "sum(optwatch_loss")["status"] == "error"


def test_every_runbook_has_queries_and_commands() -> None:
    for name in RUNBOOKS:
        assert [query for runbook, query in QUERIES if runbook == name], name
    commands = {name for name, _ in SCRIPTS + CONSOLES}
    assert commands >= {"TrainingNonFinite", "TrainingRunLost"}


def test_every_fence_is_of_a_kind_that_a_test_checks() -> None:
    for name, text in RUNBOOKS.items():
        kinds = re.findall(r"^ *```(\w*)$", text, flags=re.MULTILINE)[::2]
        assert set(kinds) <= {"promql", "bash", "console", "python"}, name


@pytest.mark.parametrize(("name", "script"), SCRIPTS + CONSOLES)
def test_commands_of_a_runbook_parse(
    name: str, script: str, program: Callable[[str], str], run: Callable[..., CompletedProcess[str]]
) -> None:
    if (name, script) in CONSOLES:
        lines = script.splitlines()
        assert all(line.startswith("$ ") for line in lines), script
        script = "\n".join(line.removeprefix("$ ") for line in lines)
    done = run("bash", "-n", "-c", script)
    assert done.returncode == 0, done.stdout
    for line in script.splitlines():
        assert shlex.split(line)[0] in COMMANDS, line


def test_a_command_that_does_not_parse_is_found(run: Callable[..., CompletedProcess[str]]) -> None:
    assert run("bash", "-n", "-c", "grep 'xid").returncode != 0


def _checkpoint(path: Path, value: float) -> Path:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=1e-3)
    weight.grad = torch.tensor([1.0, value, 1.0])
    optimizer.step()
    torch.save({"model": {"weight": weight.detach()}, "optimizer": optimizer.state_dict()}, path)
    return path


def test_the_script_that_checks_a_checkpoint_names_what_is_not_finite_and_is_silent_about_a_good_one(
    tmp_path: Path,
) -> None:
    (script,) = lint.fences(RUNBOOKS["TrainingNonFinite"], "python")
    (tmp_path / "check.py").write_text(script)
    good, poisoned = _checkpoint(tmp_path / "good.pt", 1.0), _checkpoint(tmp_path / "poisoned.pt", float("nan"))

    def said(checkpoint: Path) -> str:
        command = [sys.executable, str(tmp_path / "check.py"), str(checkpoint)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    assert said(good) == ""
    assert said(poisoned).splitlines() == [
        "checkpoint/model/weight",
        "checkpoint/optimizer/state/0/exp_avg",
        "checkpoint/optimizer/state/0/exp_avg_sq",
    ]
