"""Write docs/optimizers.md, what is read of each optimizer: ``python scripts/generate_optimizers.py [FILE]``.

Every optimizer of every package is run for a few steps first, and compared with its definition: what the page calls
exact has been proved on this machine just now. Fails, naming what differs, where a proof does.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "optimizers.md"


def proof() -> ModuleType:
    """The module of the tests that runs and compares."""
    sys.path.insert(0, str(ROOT / "tests" / "agent" / "state"))
    from optimizer_proof import page  # type: ignore[import-not-found]  # of the tests, which are no package

    module: ModuleType = page
    return module


def main(arguments: list[str]) -> int:
    """Write to the file named by the only argument, or to docs/optimizers.md."""
    warnings.simplefilter("ignore")  # the packages', of which there are many
    path = Path(arguments[0]) if arguments else DOCUMENT
    with tempfile.TemporaryDirectory() as folder:
        text, problems = proof().page(Path(folder))
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 1
    path.write_text(text, encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
