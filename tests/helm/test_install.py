"""docs/install.md: every command is known here and checked as far as it goes without a cluster, every value exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helm_python
import pytest
import tomllib
import yaml
from tests.helm.conftest import CHART, ROOT, Render

from optwatch_server.cli import _parser

TEXT = (ROOT / "docs" / "install.md").read_text()
BLOCK = re.compile(r"^( *)```(\w+) ?([\w-]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def blocks(language: str, mark: str = "") -> list[str]:
    found = [
        "\n".join(line.removeprefix(indent) for line in body.splitlines())
        for indent, its_language, its_mark, body in BLOCK.findall(TEXT)
        if (its_language, its_mark) == (language, mark)
    ]
    assert found
    return found


COMMANDS = [shlex.split(line) for block in blocks("bash") for line in block.splitlines() if line]


def commands(program: str, *words: str) -> list[list[str]]:
    found = [command for command in COMMANDS if command[: 1 + len(words)] == [program, *words]]
    assert found, (program, *words)
    return found


def options(command: list[str], name: str) -> list[str]:
    return [command[at + 1] for at, word in enumerate(command) if word == name]


def test_every_command_is_one_that_a_test_here_checks() -> None:
    known = {"pip", "optwatch", "export", "python", "helm", "kubectl", "docker", "promtool", "amtool"}
    assert {command[0] for command in COMMANDS} == known
    assert {(mark, language) for _, language, mark, _ in BLOCK.findall(TEXT)} == {
        ("", "bash"),
        ("optwatch", "yaml"),
        ("kube-prometheus-stack", "yaml"),
    }


def test_the_extras_that_pip_installs_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for command in commands("pip", "install"):
        extras = re.fullmatch(r"optwatch\[(.+)\]", command[2])
        assert extras is not None
        assert set(extras[1].split(",")) <= set(project["optional-dependencies"])
    for instructions in re.findall(r"`\[([\w,]+)\]`", TEXT):
        assert set(instructions.split(",")) <= set(project["optional-dependencies"])


def test_the_server_takes_the_options_shown() -> None:
    for command in commands("optwatch", "server"):
        _parser().parse_args(command[2:])


def test_the_variables_exported_are_read_by_agent_or_server() -> None:
    sources = "".join(
        path.read_text()
        for folder in ("agent/optwatch", "server/optwatch_server")
        for path in (ROOT / folder).rglob("*.py")
    )
    for command in commands("export"):
        assert f'"{command[1].split("=")[0]}"' in sources, command


def all_values() -> dict[str, Any]:
    files: dict[str, Any] = {}
    for number, text in enumerate(blocks("yaml", "optwatch")):
        name = re.match(r"# (\S+\.yaml)\n", text)
        files[name[1] if name else str(number)] = yaml.safe_load(text)
    return files


@pytest.mark.parametrize("values", all_values().values(), ids=all_values())
def test_the_values_shown_render(render: Render, values: dict[str, Any]) -> None:
    assert render(values).one("Deployment")


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: merged(first[key], value) if isinstance(value, dict) and isinstance(first.get(key), dict) else value
        for key, value in second.items()
    }
    return {**first, **both}


@pytest.mark.parametrize(
    "command", [one for one in COMMANDS if one[0] == "helm"], ids=lambda command: "-".join(command[1:3])
)
def test_helm_commands_name_the_chart_files_and_values_that_there_are(render: Render, command: list[str]) -> None:
    assert command[1] in ("install", "upgrade", "rollback", "test", "uninstall")
    plain = [word for word in command[2:] if not word.startswith("--")]
    assert "optwatch" in plain
    assert options(command, "--namespace") == ["monitoring"]
    known = {"--namespace", "--create-namespace", "--values", "--wait", "--logs", "--set", "--install"}
    assert {word for word in command if word.startswith("--")} <= known
    if command[1] in ("install", "upgrade"):
        assert "helm/optwatch" in command
        assert (ROOT / "helm/optwatch/Chart.yaml").is_file()
        values: dict[str, Any] = {}
        for file in options(command, "--values"):
            values = merged(values, all_values()[file])
        for expression in options(command, "--set"):
            values = merged(values, helm_python.parse_set_string(expression))
        assert render(values).one("Deployment")


def test_the_values_of_kube_prometheus_stack_go_with_those_of_the_chart(render: Render) -> None:
    given: dict[str, Any] = {}
    for text in blocks("yaml", "kube-prometheus-stack"):
        given = merged(given, yaml.safe_load(text))
    annotation = given["grafana"]["sidecar"]["dashboards"]["folderAnnotation"]
    assert annotation in render().all("ConfigMap")[0]["metadata"]["annotations"]
    assert given["alertmanager"]["alertmanagerSpec"]["alertmanagerConfigMatcherStrategy"]["type"] == "None"
    (step,) = given["prometheus"]["prometheusSpec"]["additionalAlertRelabelConfigs"]
    assert step == {"action": "labeldrop", "regex": "prometheus"}


def test_kubectl_commands_name_objects_and_files_that_there_are(render: Render) -> None:
    for command in commands("kubectl"):
        if command[1:3] == ["create", "secret"]:
            assert command[4] == all_values()["optwatch-postgresql.yaml"]["database"]["postgresql"]["existingSecret"]
            key = next(word for word in command if word.startswith("--from-file=")).split("=")[1]
            default = yaml.safe_load((CHART / "values.yaml").read_text())["database"]["postgresql"]["key"]
            assert key == default
        elif command[1] == "delete":
            assert command[2] == "persistentvolumeclaim"
            assert command[3] == render(name="optwatch").one("PersistentVolumeClaim")["metadata"]["name"]
        else:
            assert command[1] == "create"
            assert (ROOT / options(command, "--filename")[0]).is_file()


def test_the_image_built_is_the_one_that_the_chart_installs(render: Render) -> None:
    (command,) = commands("docker", "build")
    assert options(command, "--tag") == [render().container()["image"]]


def test_the_exported_files_pass_the_checks_shown(program: Callable[[str], str], tmp_path: Path) -> None:
    (export,) = commands("optwatch", "alerts", "export")
    for command in (export, *commands("promtool"), *commands("amtool")):
        words = [
            word for part in command for word in (map(str, sorted(tmp_path.glob(part))) if "*" in part else [part])
        ]
        run = [sys.executable, "-m", "optwatch"] if words[0] == "optwatch" else [program(words[0])]
        done = subprocess.run([*run, *words[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_links_to_files_and_sections_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", TEXT, re.M)
    }
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        if link.startswith("#"):
            assert link[1:] in headings, link
        else:
            assert (ROOT / "docs" / link).exists(), link
