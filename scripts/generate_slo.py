"""Write alerts/rules/slo.yaml, the rules of the objectives: ``python scripts/generate_slo.py [FILE]``."""

from __future__ import annotations

import sys
from pathlib import Path

from optwatch_server.objectives.rules import rules
from optwatch_server.objectives.slo import load

ALERTS = Path(__file__).resolve().parent.parent / "alerts"


def main(arguments: list[str]) -> int:
    """Write to the file named by the only argument, or to alerts/rules/slo.yaml; return 1 for a refused objective."""
    path = Path(arguments[0]) if arguments else ALERTS / "rules" / "slo.yaml"
    try:
        text = rules(load(ALERTS / "slo"))
    except ValueError as error:
        print(f"generate_slo: {error}", file=sys.stderr)
        return 1
    path.write_text(text, encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
