"""For every test: one thread for each process, since tests run side by side and more threads than cores only wait."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
