"""The shipped Prometheus, Alertmanager and rule files with one's own addresses: `optwatch alerts export`.

Nothing but addresses is changed, so that what was tested is what runs.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from optwatch_server.shipped import shipped

SERVER = "http://optwatch:8000"
GRAFANA = "http://grafana:3000"
ALERTMANAGER = "alertmanager:9093"
"""The addresses in the shipped files, which `export` replaces."""

# Written into YAML and into PromQL templates: nothing that either would read as its own.
_URL = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+(/[A-Za-z0-9._~/\-]*)?")
_WEBHOOK = re.compile(r"https?://[!-~]+")
_HOST_PORT = re.compile(r"[A-Za-z0-9.\-\[\]:]+:[0-9]{1,5}")


@dataclass(frozen=True)
class Addresses:
    """Where the services of a deployment are. The defaults are those of the shipped files.

    Raises:
        ValueError: an address is not of its form; the message names it and gives an example.
    """

    server: str = SERVER
    """URL of the optwatch server as both Prometheus and people's browsers reach it; may have a path."""
    grafana: str = GRAFANA
    """URL of Grafana as people's browsers reach it; may have a path."""
    alertmanager: str = ALERTMANAGER
    """HOST:PORT of Alertmanager as Prometheus reaches it."""
    page_url: str | None = None
    """Webhook of the receiver ``page``; None leaves the shipped placeholder."""
    ticket_url: str | None = None
    """Webhook of the receiver ``ticket``; None leaves the shipped placeholder."""

    def __post_init__(self) -> None:
        for name, form, example in (
            ("server", _URL, SERVER),
            ("grafana", _URL, GRAFANA),
            ("alertmanager", _HOST_PORT, ALERTMANAGER),
            ("page_url", _WEBHOOK, "https://pager.example.com/hook"),
            ("ticket_url", _WEBHOOK, "https://tickets.example.com/hook"),
        ):
            value = getattr(self, name)
            if value is not None and not form.fullmatch(value):
                raise ValueError(f"{name} is {value!r}; expected something like {example}")
            if value is not None:
                _ = urlsplit(value if "://" in value else f"//{value}").port  # says so itself where it is out of range
        for name in ("server", "grafana"):
            object.__setattr__(self, name, getattr(self, name).rstrip("/"))


def export(directory: Path, addresses: Addresses, source: Path | None = None) -> list[Path]:
    """Write prometheus.yaml, alertmanager.yaml and rules/*.yaml with `addresses` into `directory`; return their paths.

    `directory` is made if it is missing, and files of these names in it are replaced. `source` is a folder laid out as
    ``alerts/`` is, and the shipped one where it is None.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: a shipped file lacks a place where an address belongs.
    """
    source = source or shipped("alerts")
    written = []
    for name, replace in (("prometheus.yaml", _prometheus), ("alertmanager.yaml", _alertmanager)):
        text = (source / name).read_text(encoding="utf-8")
        document = yaml.safe_load(text)
        try:
            replace(document, addresses)
        except (KeyError, IndexError, StopIteration) as error:
            raise ValueError(f"{source / name} has no place for an address it should have: {error!r}") from error
        body = yaml.safe_dump(document, sort_keys=False, width=120)
        written.append(_write(directory / name, _leading_comment(text) + body))
    for path in sorted((source / "rules").glob("*.yaml")):
        # As text, since a rule file's comments are its documentation; these two stand in annotations only.
        text = path.read_text(encoding="utf-8").replace(SERVER, addresses.server).replace(GRAFANA, addresses.grafana)
        written.append(_write(directory / "rules" / path.name, text))
    return written


def _prometheus(document: Any, addresses: Addresses) -> None:
    document["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [addresses.alertmanager]
    jobs = {job["job_name"]: job for job in document["scrape_configs"]}
    url = urlsplit(addresses.server)
    server = jobs["optwatch-server"]
    server["scheme"] = url.scheme
    server["metrics_path"] = f"{url.path}/metrics"
    port = url.port or (443 if url.scheme == "https" else 80)
    host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname
    server["static_configs"][0]["targets"] = [f"{host}:{port}"]
    jobs["training"]["http_sd_configs"][0]["url"] = f"{addresses.server}/api/v1/sd"


def _alertmanager(document: Any, addresses: Addresses) -> None:
    receivers = {receiver["name"]: receiver for receiver in document["receivers"]}
    for name, url in (("page", addresses.page_url), ("ticket", addresses.ticket_url)):
        webhook = receivers[name]["webhook_configs"][0]
        webhook["url"] = url or webhook["url"]


def _leading_comment(text: str) -> str:
    """Return the comment at the head of a YAML file: `yaml` drops comments, and this one says how to use the file."""
    lines = text.splitlines(keepends=True)
    end = next((index for index, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "".join(lines[:end])


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def main(arguments: list[str]) -> int:
    """Run ``optwatch alerts``: return 0, or 1 with a message on standard error where a file cannot be written."""
    parser = argparse.ArgumentParser(prog="optwatch alerts", description="The shipped alert rules and configuration.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "export", help="write prometheus.yaml, alertmanager.yaml and the rules with your addresses"
    )
    command.add_argument("directory", metavar="DIR", type=Path, help="folder to write into; made if it is missing")
    command.add_argument("--server", metavar="URL", default=SERVER, help="the optwatch server (default: %(default)s)")
    command.add_argument("--grafana", metavar="URL", default=GRAFANA, help="Grafana (default: %(default)s)")
    command.add_argument(
        "--alertmanager", metavar="HOST:PORT", default=ALERTMANAGER, help="Alertmanager (default: %(default)s)"
    )
    command.add_argument("--page-url", metavar="URL", help="webhook that pages a person (default: a placeholder)")
    command.add_argument("--ticket-url", metavar="URL", help="webhook that opens a ticket (default: a placeholder)")
    options = parser.parse_args(arguments)
    try:
        addresses = Addresses(
            options.server, options.grafana, options.alertmanager, options.page_url, options.ticket_url
        )
    except ValueError as error:
        command.error(str(error))
    try:
        written = export(options.directory, addresses)
    except OSError as error:
        print(f"optwatch alerts export: {error}", file=sys.stderr)
        return 1
    for path in written:
        print(path)
    return 0
