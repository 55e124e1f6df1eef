"""Write docs/audit.md, the rules of the audit, from the rules: ``python scripts/generate_audit.py [FILE]``."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from optwatch.audit import AT_ATTACH, OVER_FIRST_STEPS, Rule
from optwatch.audit.steps import STEPS

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "audit.md"

HEADER = """# The audit of the configuration

<!-- Written by scripts/generate_audit.py from the rules in agent/optwatch/audit. Change those, and run it again. -->

`attach` looks at the optimizer, its groups and the model, and once more at the first {steps} steps. What it finds is on
the log and in `optwatch_audit_findings{{rule}}`; with a **warning** among it, one event `audit_finding` lists all.

A **warning** is almost surely a mistake. An **info** is a choice that its source advises against, and opens no ticket.
What is meant that way is silenced by its id: `Settings(audit_silenced="lion-rate,empty-group")`, or
`OPTWATCH_AUDIT_SILENCED`; `all` silences the audit. No rule reads what a tensor holds, and rank 0 speaks for all ranks.
"""


def document(at_attach: Iterable[Rule[Any]], over_first_steps: Iterable[Rule[Any]]) -> str:
    """The page as Markdown.

    Raises:
        ValueError: a rule has no text or no source, and its id is told.
    """
    parts = [HEADER.format(steps=STEPS)]
    for title, rules in (("At attach", at_attach), (f"Over the first {STEPS} steps", over_first_steps)):
        parts.append(f"\n## {title}\n\n| rule | | what it finds | source |\n| --- | --- | --- | --- |\n")
        for rule in rules:
            if not rule.text or not rule.source:
                raise ValueError(f"rule {rule.id}: its docstring wants a text and 'Source: ...'")
            cells = (f"`{rule.id}`", rule.severity, rule.text.replace("``", "`"), rule.source.replace("``", "`"))
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return "".join(parts)


def main(arguments: list[str]) -> int:
    """Write to the file named by the only argument, or to docs/audit.md."""
    path = Path(arguments[0]) if arguments else DOCUMENT
    path.write_text(document([rule for rules in AT_ATTACH for rule in rules.all], OVER_FIRST_STEPS.all), "utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
