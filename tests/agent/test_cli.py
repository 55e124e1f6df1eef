"""The `optwatch` command."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest

from optwatch import cli


class Entry:
    """An entry point as `importlib.metadata` gives it."""

    def __init__(self, name: str, load: Any) -> None:
        self.name, self.load = name, load


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Any:
    def give(**loaders: Any) -> None:
        monkeypatch.setattr(cli, "entry_points", lambda group: [Entry(n, load) for n, load in loaders.items()])

    return give


def test_a_command_gets_the_arguments_after_its_name_and_gives_the_exit_status(commands: Any) -> None:
    given: list[list[str]] = []
    commands(serve=lambda: lambda arguments: given.append(arguments) or 3)
    assert cli.main(["serve", "--port", "0"]) == 3
    assert given == [["--port", "0"]]


def test_an_unknown_command_is_named_with_those_that_are_known(commands: Any, capsys: Any) -> None:
    commands(server=None, alerts=None)
    assert cli.main(["servre"]) == 2
    assert capsys.readouterr().err.startswith("optwatch: no command 'servre'; known: alerts, server\n\nusage: optwatch")


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["-h"], 0), (["--help"], 0)])
def test_help_lists_the_commands(arguments: list[str], status: int, commands: Any, capsys: Any) -> None:
    commands(server=None, alerts=None)
    assert cli.main(arguments) == status
    assert "commands:\n  alerts\n  server\n" in capsys.readouterr().out


def test_a_command_whose_parts_are_not_installed_says_what_to_install(commands: Any, capsys: Any) -> None:
    def load() -> Any:
        raise ModuleNotFoundError("No module named 'fastapi'", name="fastapi")

    commands(server=load)
    assert cli.main(["server"]) == 1
    told = "optwatch server: the module 'fastapi' is not installed; pip install 'optwatch[server]' brings it\n"
    assert capsys.readouterr().err == told


def test_the_installed_command_finds_the_servers_and_imports_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "optwatch", "server", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout.startswith("usage: optwatch server")
    assert not [line for line in done.stderr.splitlines() if line.endswith(" torch")]


def test_the_version_is_the_distributions(capsys: Any) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"optwatch {version('optwatch')}\n"
