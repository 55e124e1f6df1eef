"""Runs each script of examples/frameworks as it is and without its one line of ours, and prints what came of both.

By itself a process: the frameworks warn and keep globals. Arguments: the folder of the scripts.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

from optwatch import Monitor
from optwatch import monitor as module

OURS = re.compile(r"^(attach\(.*|trainer\.(add_callback|callbacks\.append)\(OptwatchCallback\(\)\))$", re.MULTILINE)


def run(name: str, source: str) -> list[str]:
    """The losses that a script prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, name, "exec"), {"__name__": "__main__"})
    return [line for line in printed.getvalue().splitlines() if re.fullmatch(r"[-\d.e]+( [-\d.e]+)?", line)]


def main() -> None:
    seen: list[dict[str, Any]] = []
    detach = Monitor.detach

    def note(monitor: Monitor) -> None:
        monitor.flush(60)
        if monitor._attached:
            seen.append({"values": monitor.snapshot(), "faults": dict(monitor.faults.counts), "run": monitor.run.name})
        detach(monitor)

    Monitor.detach = note  # type: ignore[method-assign]
    results = {}
    for path in sorted(Path(sys.argv[1]).glob("*.py")):
        source = path.read_text()
        without, lines = OURS.subn("", source)
        plain = run(path.name, without)
        assert not seen, f"{path.name}: something was attached without the line"
        watched = run(path.name, source)
        for monitor in list(module.attached.values()):
            monitor.detach()
        results[path.stem] = {"lines": lines, "plain": plain, "watched": watched, "seen": seen[:]}
        seen.clear()
    print("RESULTS", json.dumps(results))


if __name__ == "__main__":
    main()
