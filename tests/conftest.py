"""For every test: one thread for each process, since tests run side by side and more threads than cores only wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_sessionstart(session: pytest.Session) -> None:
    """What is compiled once for a machine is there before tests run side by side: among them, and giving way to them, a
    compiler would take minutes."""
    if session.config.getoption("numprocesses", None):
        program = "from optwatch import kernels; kernels.prepare_addresses().join()"
        subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """End to end first: such a test mostly waits, for minutes, and as the last one it would have nothing beside it."""
    items.sort(key=lambda item: item.path.parent.name != "e2e")
