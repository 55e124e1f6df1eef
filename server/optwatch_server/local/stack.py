"""The real Prometheus and Alertmanager with the shipped configuration, on free loopback ports, for demos and tests."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from optwatch_server.shipping.configuration import GRAFANA, Addresses, export

PROMETHEUS = (("prometheus",), "prometheus")
# Debian's package renames the program, since another package had the name.
ALERTMANAGER = (("alertmanager", "prometheus-alertmanager"), "prometheus-alertmanager")
"""Names under which each program is looked for on PATH, and the Debian package that has it."""

ATTEMPTS = 5
"""How often a start is tried again with another port, where the one that was free a moment ago is taken."""
TAIL_LINES = 20


class StackError(RuntimeError):
    """Prometheus or Alertmanager is missing or does not run; the message says which, why, and what to do."""


class Stack:
    """Alertmanager and Prometheus as processes: both ready when the ``with`` block begins, both gone when it has ended.

    Runs the shipped prometheus.yaml, alertmanager.yaml and rules, in which only addresses are replaced:

    - `directory`: where configuration, data and logs go; made if it is missing.
    - `server`: URL of the optwatch server, scraped, asked for targets, and the prefix of links to runs and runbooks.
    - `page_url`, `ticket_url`: webhooks of the two receivers, for instance `Receiver.page_url` and `.ticket_url`.
    - `grafana`: URL that begins links to dashboards.
    - `source`: another folder laid out as ``alerts/`` is, in place of the shipped one.
    - `timeout`: seconds that each program has to become ready.

    Raises (on entering):
        StackError: a program is not on PATH, or does not become ready; nothing is left running.
    """

    def __init__(
        self,
        directory: Path,
        *,
        server: str,
        page_url: str,
        ticket_url: str,
        grafana: str = GRAFANA,
        source: Path | None = None,
        timeout: float = 30.0,
    ) -> None:
        self.directory = directory.resolve()  # the programs run in it, where a relative path would mean another folder
        self._addresses = Addresses(server, grafana, page_url=page_url, ticket_url=ticket_url)
        self._source = source
        self._timeout = timeout
        self._alertmanager: Process | None = None
        self._prometheus: Process | None = None

    @property
    def prometheus(self) -> Process:
        """The running Prometheus: `url`, `pid`, `log`. Raises StackError outside the ``with`` block."""
        return _running(self._prometheus)

    @property
    def alertmanager(self) -> Process:
        """The running Alertmanager: `url`, `pid`, `log`. Raises StackError outside the ``with`` block."""
        return _running(self._alertmanager)

    @property
    def prometheus_url(self) -> str:
        """``http://127.0.0.1:PORT`` of Prometheus."""
        return self.prometheus.url

    @property
    def alertmanager_url(self) -> str:
        """``http://127.0.0.1:PORT`` of Alertmanager."""
        return self.alertmanager.url

    def start(self) -> Stack:
        """Start both and wait until they are ready. The ``with`` block does it. Raises StackError as the class says."""
        alertmanager, prometheus = find(*ALERTMANAGER), find(*PROMETHEUS)
        configuration = self.directory / "configuration"
        try:
            export(configuration, self._addresses, self._source)
            self._alertmanager = Process.start(
                "alertmanager",
                lambda port: [
                    alertmanager,
                    f"--config.file={configuration / 'alertmanager.yaml'}",
                    f"--storage.path={self.directory / 'alertmanager'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                    f"--web.external-url=http://127.0.0.1:{port}",
                    "--cluster.listen-address=",  # alone: else it listens on every address and waits for peers
                ],
                self.directory,
                self._timeout,
            )
            addresses = replace(self._addresses, alertmanager=f"127.0.0.1:{self._alertmanager.port}")
            export(configuration, addresses, self._source)
            self._prometheus = Process.start(
                "prometheus",
                lambda port: [
                    prometheus,
                    f"--config.file={configuration / 'prometheus.yaml'}",
                    f"--storage.tsdb.path={self.directory / 'prometheus'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                    f"--web.external-url=http://127.0.0.1:{port}",
                ],
                self.directory,
                self._timeout,
            )
            # Prometheus learns of its Alertmanager seconds after it is ready, and what it could send to nobody it tries
            # again only after a minute.
            if not _wait_until(self._introduced, self._timeout):
                raise StackError(
                    f"prometheus did not find its alertmanager within {self._timeout:g} s. "
                    f"The end of {self._prometheus.log}:\n{self._prometheus.tail()}"
                )
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop both, Prometheus first so that it does not miss its Alertmanager. Repeating it changes nothing."""
        for process in (self._prometheus, self._alertmanager):
            if process is not None:
                process.stop()
        self._prometheus = self._alertmanager = None

    def _introduced(self) -> bool:
        status, body = _get(self.prometheus.port, "/api/v1/alertmanagers")
        return status == http.client.OK and bool(json.loads(body)["data"]["activeAlertmanagers"])

    def __enter__(self) -> Stack:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()


class Process:
    """One program that listens on a loopback port: its `url`, `port`, `pid` and `log` file."""

    def __init__(self, name: str, command: Sequence[str], port: int, log: Path) -> None:
        self.name, self.port, self.log = name, port, log
        self.url = f"http://127.0.0.1:{port}"
        with log.open("ab") as output:
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=log.parent
            )

    @classmethod
    def start(cls, name: str, command: Callable[[int], Sequence[str]], directory: Path, timeout: float) -> Process:
        """Start ``command(port)`` on a free port and return it once ``/-/ready`` answers 200; logs go to `directory`.

        `timeout` is in seconds, for each attempt. A port can be taken between being found free and being bound, and
        neither program can bind port 0 and tell which it got: then another one is tried.

        Raises:
            StackError: it exited, or was not ready in time (it is then stopped); the message ends with its log.
        """
        log = directory / f"{name}.log"
        for _ in range(ATTEMPTS):
            log.unlink(missing_ok=True)
            port = free_port()
            process = cls(name, command(port), port, log)
            try:
                why = process._wait_until_ready(timeout)
            except BaseException:
                process.stop()
                raise
            if why is None:
                return process
            process.stop()
            if "address already in use" not in process.tail():
                break
        raise StackError(f"{name} {why}. The end of {log}:\n{process.tail()}")

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._child.pid

    def tail(self) -> str:
        """Return the last lines of the log, or a note that it is empty."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:]) or "(empty)"

    def stop(self, grace: float = 10.0) -> None:
        """Ask the process to end, kill it after `grace` seconds, and wait until it is gone. May be repeated."""
        if self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(grace)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()

    def _wait_until_ready(self, timeout: float) -> str | None:
        """Return None once ready, or why it is not."""
        _wait_until(lambda: self._child.poll() is not None or _get(self.port, "/-/ready")[0] == http.client.OK, timeout)
        # Looked at last: another process may be the one that answers on a port that this one could not take.
        if (status := self._child.poll()) is not None:
            return f"exited with status {status} before it was ready"
        if _get(self.port, "/-/ready")[0] != http.client.OK:
            return f"was not ready within {timeout:g} s"
        return None


def _wait_until(condition: Callable[[], bool], timeout: float) -> bool:
    """Return True as soon as `condition` holds, or False if it has not within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _get(port: int, path: str) -> tuple[int, bytes]:
    """Return status and body of a GET on the loopback; status 0 where nobody answers. Never goes through a proxy."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def find(names: Sequence[str], package: str) -> str:
    """Return the path of the first program of `names` on PATH.

    Raises:
        StackError: there is none; the message names `package`, the Debian package that has it.
    """
    for name in names:
        if path := shutil.which(name):
            return path
    raise StackError(f"{' or '.join(names)} is not on PATH; on Debian: apt-get install {package}")


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _running(process: Process | None) -> Process:
    if process is None:
        raise StackError("the stack is not running: use it within its `with` block")
    return process
