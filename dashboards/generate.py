"""Write every dashboard as JSON: ``python dashboards/generate.py [DIR]``, by default into dashboards/generated."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE.parent) not in sys.path:  # run as a file, Python looks in dashboards/ and not beside it
    sys.path.insert(0, str(HERE.parent))

from dashboards.debug import debug  # noqa: E402
from dashboards.executive import executive  # noqa: E402
from dashboards.oncall import oncall  # noqa: E402
from dashboards.page import encode  # noqa: E402
from grafana_foundation_sdk.builders.dashboard import Dashboard  # noqa: E402  the path has to be set first

DASHBOARDS: dict[str, Callable[[], Dashboard]] = {
    "debug.json": debug,
    "executive.json": executive,
    "oncall.json": oncall,
}
"""File name and builder of each dashboard."""


def write(directory: Path) -> list[Path]:
    """Write all dashboards into `directory`, made if missing, and return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, build in DASHBOARDS.items():
        path = directory / name
        path.write_text(encode(build()), encoding="utf-8")
        written.append(path)
    return written


def main(arguments: list[str]) -> int:
    """Write into the directory named by the only argument, or into dashboards/generated."""
    if len(arguments) > 1 or arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 2 if len(arguments) > 1 else 0
    for path in write(Path(arguments[0]) if arguments else HERE / "generated"):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
