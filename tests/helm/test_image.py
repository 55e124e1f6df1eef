"""The image, as far as it goes without an engine: its context builds the wheel, which runs locked down."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tomllib
from tests.helm.conftest import ROOT, Render


@dataclass
class Stage:
    base: str
    name: str | None
    lines: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [text for name, text in self.lines if name == instruction]


def stages() -> list[Stage]:
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: list[Stage] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, rest = line.split(maxsplit=1)
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            found.append(Stage(base, name or None))
        else:
            found[-1].lines.append((instruction, rest))
    return found


KNOWN = {"WORKDIR", "COPY", "ENV", "RUN", "LABEL", "USER", "EXPOSE", "ENTRYPOINT", "CMD"}


def environment(stage: Stage) -> dict[str, str]:
    return dict(part.split("=", 1) for line in stage.all("ENV") for part in shlex.split(line))


def context() -> list[str]:
    """The paths of the build context that the first stage copies."""
    return [path for line in stages()[0].all("COPY") for path in line.split()[:-1]]


def sent(path: str) -> bool:
    """Whether .dockerignore lets a file into the context: the last line that matches it, or a folder above it, wins."""
    result = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").removeprefix("**/")
        above = [path, *map(str, Path(path).parents)][:-1]
        names = [Path(one).name for one in above] if "**/" in line else above
        if pattern == "*" or any(fnmatch.fnmatchcase(one, pattern) for one in names):
            result = line.startswith("!")
    return result


def test_the_dockerfile_has_two_stages_and_ends_without_root_and_without_a_shell() -> None:
    build, image = stages()
    assert {name for stage in (build, image) for name, _ in stage.lines} <= KNOWN
    assert build.base == image.base == "python:3.12-slim"
    assert image.all("RUN") == []
    assert image.all("USER") == ["65532:65532"]
    assert json.loads(image.all("ENTRYPOINT")[0]) == ["/opt/optwatch/bin/optwatch"]
    assert json.loads(image.all("CMD")[0]) == ["server", "--host", "0.0.0.0"]
    assert all(line.startswith("--from=build ") for line in image.all("COPY"))
    assert "[server,postgresql]" in " ".join(build.all("RUN"))


def test_the_chart_runs_the_image_as_the_image_s_own_user_and_command(render: Render) -> None:
    image = stages()[1]
    spec = render().one("Deployment")["spec"]["template"]["spec"]
    user, group = map(int, image.all("USER")[0].split(":"))
    assert (spec["securityContext"]["runAsUser"], spec["securityContext"]["runAsGroup"]) == (user, group)
    container = spec["containers"][0]
    assert "command" not in container
    assert container["args"][:3] == json.loads(image.all("CMD")[0])
    assert image.all("EXPOSE") == [str(container["ports"][0]["containerPort"])]
    (url,) = [one["value"] for one in container["env"] if one["name"] == "OPTWATCH_DATABASE_URL"]
    assert environment(image)["OPTWATCH_DATABASE_URL"] == url


def test_the_build_context_is_what_is_copied_and_carries_no_test_cache_or_database() -> None:
    assert all(sent(path) for path in context())
    for path in ("agent/optwatch/attach.py", "dashboards/generated/debug.json", "runbooks/TrainingNonFinite.md"):
        assert sent(path), path
    for path in (
        ".git/config",
        ".venv/bin/python",
        "tests/conftest.py",
        "dashboards/debug.py",
        "agent/optwatch/__pycache__/a.cpython-312.pyc",
        "server/runs.sqlite3-wal",
        "helm/optwatch/values.yaml",
    ):
        assert not sent(path), path


def test_everything_that_the_wheel_is_made_of_is_in_the_build_context() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = [*wheel["packages"], *wheel["force-include"], project["project"]["readme"], "LICENSE", "pyproject.toml"]
    for path in needed:
        assert any(path == copied or path.startswith(f"{copied}/") for copied in context()), path


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A venv into which the wheel, built from the context alone, was installed as the Dockerfile installs it."""
    folder = tmp_path_factory.mktemp("image")
    source = folder / "source"
    for path in context():
        files = [path] if (ROOT / path).is_file() else [str(f.relative_to(ROOT)) for f in (ROOT / path).rglob("*")]
        for name in files:
            if (ROOT / name).is_file() and sent(name):
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # Without isolation: hatchling is in the development environment already.
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("optwatch-*.whl")
    venv = folder / "venv"
    # From the interpreter itself and not from this venv's link to it, which the sandbox cannot follow.
    python = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    subprocess.run([python, "-m", "venv", "--without-pip", str(venv)], check=True)
    requirement = f"optwatch[server,postgresql] @ {wheel.as_uri()}"
    install = [*pip, "--python", str(venv / "bin" / "python"), "install", "-c", str(source / "constraints.txt")]
    subprocess.run([*install, requirement], check=True)
    return venv


@pytest.mark.slow
def test_the_image_s_python_has_the_server_and_postgresql_and_no_torch(installed: Path) -> None:
    def python(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([installed / "bin" / "python", "-Ic", code], capture_output=True, text=True)

    assert python("import optwatch_server.cli, psycopg").returncode == 0
    assert "No module named 'torch'" in python("import torch").stderr
    listed = python("from optwatch_server.shipped import shipped; print(*shipped('runbooks').iterdir())").stdout
    assert "TrainingNonFinite.md" in listed
    size = sum(path.stat().st_size for path in installed.rglob("*") if path.is_file())
    assert size < 200 * 2**20


WRITE = """
import sys
for path in sys.argv[1:]:
    try:
        open(path, "w").close()
        print("written", path)
    except OSError:
        print("refused", path)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make mount and network namespaces")
def test_the_server_runs_with_the_chart_s_command_on_a_read_only_root_without_any_right(
    installed: Path, render: Render, tmp_path: Path
) -> None:
    release = render(namespace="monitoring")
    container = release.container()
    image = stages()[1]
    data, temporary, root = (tmp_path / name for name in ("data", "tmp", "root"))
    for folder in (data, temporary, root):
        folder.mkdir()
    # What the volumes do: fsGroup owns the data, and an emptyDir is everybody's.
    os.chown(data, 65532, 65532)
    temporary.chmod(0o1777)
    mounts = {one["mountPath"]: {"data": data, "tmp": temporary}[one["name"]] for one in container["volumeMounts"]}
    base = environment(image) | {"PATH": f"{installed / 'bin'}:/usr/bin:/bin"}
    entry = json.loads(image.all("ENTRYPOINT")[0])
    test = release.one("Pod")["spec"]["containers"][0]
    port = container["ports"][0]["containerPort"]
    here = f"http://127.0.0.1:{port}"
    places = ["/x", f"{installed}/x", "/usr/x", "/tmp/x", "/var/lib/optwatch/x"]
    specification: dict[str, Any] = {
        "root": str(root),
        "read_only": sorted({"/usr", "/etc", "/bin", "/lib", "/lib64", sys.base_prefix, str(installed)}),
        "writable": {path: str(source) for path, source in mounts.items()},
        "user": 65532,
        "log": str(tmp_path / "log"),
        "command": [str(installed / "bin" / Path(entry[0]).name), *container["args"]],
        "environment": base | {one["name"]: one["value"] for one in container["env"]},
        "ready": f"{here}{container['startupProbe']['httpGet']['path']}",
        "probes": [
            f"{here}{container[probe]['httpGet']['path']}"
            for probe in ("startupProbe", "livenessProbe", "readinessProbe")
        ]
        + [f"{here}/metrics", f"{here}/runbooks/TrainingNonFinite"],
        "commands": [
            # The test Pod's own command; only the name of the Service is one that there is no DNS for here.
            {
                "command": test["command"],
                "environment": base | {one["name"]: one["value"] for one in test["env"]} | {"OPTWATCH_SERVER": here},
            },
            {"command": ["python", "-c", WRITE, *places], "environment": base},
        ],
    }
    (tmp_path / "specification.json").write_text(json.dumps(specification))
    command = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", sys.executable]
    sandbox = Path(__file__).with_name("sandbox.py")
    done = subprocess.run(
        [*command, str(sandbox), str(tmp_path / "specification.json")], capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["probes"].values()) == {200}, result
    status = dict(line.split(":\t", 1) for line in result["status"].splitlines() if ":\t" in line)
    assert status["Uid"].split() == ["65532"] * 4
    assert (int(status["CapEff"], 16), int(status["CapBnd"], 16), status["NoNewPrivs"]) == (0, 0, "1")
    page, write = result["commands"]
    assert page["status"] == 0, page["output"]
    assert "the server has run helm-test-" in page["output"]
    assert write["output"].split() == [
        word for path in places for word in ("written" if path.removesuffix("/x") in mounts else "refused", path)
    ]
    assert result["exit"] == 0, result["log"]
    assert "Traceback" not in result["log"]
    assert (data / "optwatch.sqlite3").stat().st_uid == 65532
