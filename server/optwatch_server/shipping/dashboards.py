"""The shipped dashboards with one's own addresses, ready for a plain Grafana: `optwatch dashboards export`.

Nothing but addresses is changed, so that what was tested is what is seen. The dashboards link to each other by paths,
which hold wherever Grafana is: it has no address here.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import yaml

from optwatch_server.shipped import shipped

from .configuration import SERVER

PROMETHEUS = "http://prometheus:9090"
"""Where Grafana finds Prometheus, unless told otherwise."""
SCRAPE_INTERVAL = "5s"
"""As in the shipped prometheus.yaml: Grafana would take 15 s, and its shortest rates would span a minute."""

# Written into JSON, where Grafana looks for variables: nothing that either would read as its own.
_URL = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+(/[A-Za-z0-9._~/\-]*)?")


@dataclass(frozen=True)
class Addresses:
    """Where the services of a deployment are.

    Raises:
        ValueError: an address is not of its form; the message names it and gives an example.
    """

    server: str = SERVER
    """URL of the optwatch server as people's browsers reach it; may have a path."""
    prometheus: str = PROMETHEUS
    """URL of Prometheus as Grafana reaches it; may have a path."""
    path: str | None = None
    """Folder in which Grafana finds the exported ``dashboards``; None where it reads them where they were written."""

    def __post_init__(self) -> None:
        for name, example in (("server", SERVER), ("prometheus", PROMETHEUS)):
            value = getattr(self, name)
            if not _URL.fullmatch(value):
                raise ValueError(f"{name} is {value!r}; expected something like {example}")
            _ = urlsplit(value).port  # says so itself where it is out of range
            object.__setattr__(self, name, value.rstrip("/"))
        if self.path is not None and not PurePosixPath(self.path).is_absolute():
            raise ValueError(f"path is {self.path!r}; expected a whole path like /var/lib/grafana/dashboards")


def export(directory: Path, addresses: Addresses, source: Path | None = None) -> list[Path]:
    """Write the dashboards and what makes a plain Grafana load them into `directory`; return the paths written.

    These are dashboards/*.json, provisioning/dashboards/optwatch.yaml and provisioning/datasources/optwatch.yaml.
    `directory` is made if it is missing, and files of these names in it are replaced. `source` is a folder of
    dashboards, and the shipped one where it is None.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: there is no dashboard, or one lacks a place where an address belongs.
    """
    source = source or shipped("dashboards")
    dashboards = sorted(source.glob("*.json"))
    if not dashboards:
        raise ValueError(f"{source} holds no dashboard: reinstall optwatch")
    written = []
    for path in dashboards:
        text = path.read_text(encoding="utf-8")
        if SERVER not in text:
            raise ValueError(f"{path} has no place for the server's address: it lacks {SERVER}")
        written.append(_write(directory / "dashboards" / path.name, text.replace(SERVER, addresses.server)))
    found = addresses.path or str((directory / "dashboards").resolve())
    for name, document in (("dashboards", _dashboards(found)), ("datasources", _datasources(addresses.prometheus))):
        body = yaml.safe_dump(document, sort_keys=False, width=120, allow_unicode=True)
        written.append(_write(directory / "provisioning" / name / "optwatch.yaml", body))
    return written


def _dashboards(path: str) -> dict[str, Any]:
    provider = {
        "name": "optwatch",
        "folder": "optwatch",
        "type": "file",
        "allowUiUpdates": False,
        "updateIntervalSeconds": 30,
        "options": {"path": path.replace("$", "$$")},  # Grafana puts environment variables in place of $NAME
    }
    return {"apiVersion": 1, "providers": [provider]}


def _datasources(url: str) -> dict[str, Any]:
    # Not the default one: Grafana refuses to start with two of those, and the dashboards let one choose.
    source = {
        "name": "Prometheus (optwatch)",
        "uid": "optwatch-prometheus",
        "type": "prometheus",
        "access": "proxy",
        "url": url,
        "jsonData": {"httpMethod": "POST", "timeInterval": SCRAPE_INTERVAL},
    }
    return {"apiVersion": 1, "datasources": [source]}


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def main(arguments: list[str]) -> int:
    """Run ``optwatch dashboards``: return 0, or 1 with a message on standard error where it cannot be done."""
    parser = argparse.ArgumentParser(prog="optwatch dashboards", description="The shipped Grafana dashboards.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "export", help="write the dashboards with your addresses, and provisioning files for a plain Grafana"
    )
    command.add_argument("directory", metavar="DIR", type=Path, help="folder to write into; made if it is missing")
    command.add_argument(
        "--server", metavar="URL", default=SERVER, help="the optwatch server, for browsers (default: %(default)s)"
    )
    command.add_argument(
        "--prometheus", metavar="URL", default=PROMETHEUS, help="Prometheus, for Grafana (default: %(default)s)"
    )
    command.add_argument(
        "--path", metavar="PATH", help="where Grafana finds the JSON files (default: DIR/dashboards on this machine)"
    )
    options = parser.parse_args(arguments)
    try:
        addresses = Addresses(options.server, options.prometheus, options.path)
    except ValueError as error:
        command.error(str(error))
    try:
        written = export(options.directory, addresses)
    except (OSError, ValueError) as error:
        print(f"optwatch dashboards export: {error}", file=sys.stderr)
        return 1
    for path in written:
        print(path)
    return 0
