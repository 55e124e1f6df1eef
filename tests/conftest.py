"""For every test: one thread for each process, since tests run side by side and more threads than cores only wait."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """End to end first: such a test mostly waits, for minutes, and as the last one it would have nothing beside it."""
    items.sort(key=lambda item: item.path.parent.name != "e2e")
