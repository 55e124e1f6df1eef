"""Programs that the tests of alerts need: missing ones fail a test, since a rule that nobody ran is a guess."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # `dashboards` and `tests` are folders of the repository, not of the distribution

PACKAGES = {"prometheus": "prometheus", "promtool": "prometheus", "amtool": "prometheus-alertmanager", "bash": "bash"}


def find(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.fail(
            f"{name} is not on PATH, and these tests do not pass without it; on Debian: "
            f"apt-get install {PACKAGES[name]} (all of them: prometheus prometheus-alertmanager)"
        )
    return path


@pytest.fixture
def program() -> Callable[[str], str]:
    """Gives a program's path, or fails the test."""
    return find


@pytest.fixture
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program to its end and gives its status and all that it said."""

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [find(name), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
            # Go's garbage is collected a quarter as often: a fifth less of the processors, for 250 MB at most.
            env=os.environ | {"GOGC": "400"},
        )

    return run
