"""What a rule of the audit is, and what it finds."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

Severity = Literal["warning", "info"]
Seen = TypeVar("Seen")
Said = tuple[str, str, str]
"""The thing, the value found, and the fix."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a rule found."""

    rule: str
    severity: Severity
    """``warning``: almost surely a mistake. ``info``: a choice that its source advises against."""
    thing: str
    value: str
    fix: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.thing}: {self.value}; {self.fix}"


@dataclass(frozen=True)
class Rule(Generic[Seen]):
    """One rule. Its check's docstring says what it looks for, and then ``Source:`` and where that is known from."""

    id: str
    severity: Severity
    check: Callable[[Seen], Iterable[Said]]

    @property
    def text(self) -> str:
        """What the rule looks for, as one paragraph."""
        return " ".join(_doc(self.check).partition("Source:")[0].split())

    @property
    def source(self) -> str:
        """Where the rule is known from."""
        return " ".join(_doc(self.check).partition("Source:")[2].split())

    def findings(self, seen: Seen) -> Iterator[Finding]:
        """What the rule finds. Raises what the check raises."""
        for thing, value, fix in self.check(seen):
            yield Finding(self.id, self.severity, thing, value, fix)


class Rules(Generic[Seen]):
    """Rules that look at the same thing, in the order in which they were written."""

    def __init__(self) -> None:
        self.all: list[Rule[Seen]] = []

    def rule(self, name: str, severity: Severity) -> Callable[[Callable[[Seen], Iterable[Said]]], Any]:
        """Decorates a check."""

        def add(check: Callable[[Seen], Iterable[Said]]) -> Callable[[Seen], Iterable[Said]]:
            self.all.append(Rule(name, severity, check))
            return check

        return add

    def findings(self, seen: Seen, silenced: frozenset[str], on_fault: Callable[[Exception], None]) -> list[Finding]:
        """What all rules find but those silenced. What one raises is handed on, and costs only its own findings."""
        found: list[Finding] = []
        for rule in self.all:
            if rule.id in silenced:
                continue
            try:
                found.extend(rule.findings(seen))
            except Exception as error:  # noqa: BLE001 - a user's module or optimizer may be of any kind
                on_fault(error)
        return found


def _doc(check: Callable[..., Any]) -> str:
    return inspect.getdoc(check) or ""
