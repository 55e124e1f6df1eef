"""The audit of a run's configuration: rules at attach, and rules over the first steps."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

from optwatch.events import Event
from optwatch.export.table import Table
from optwatch.record import StepRecord

from . import hyperparameters, membership, steps
from .rule import Finding, Rule, Rules
from .steps import FirstSteps
from .subject import Subject

__all__ = ["AT_ATTACH", "OVER_FIRST_STEPS", "Audit", "Finding", "FirstSteps", "Rule", "Rules", "Subject"]

logger = logging.getLogger("optwatch")
AT_ATTACH: tuple[Rules[Subject], ...] = (hyperparameters.RULES, membership.RULES)
"""What is looked at when attaching; no rule reads what a tensor holds."""
OVER_FIRST_STEPS: Rules[FirstSteps] = steps.RULES
"""What is looked at after the first `steps.STEPS` steps."""


class Audit:
    """The audit of one run: `begin` on the thread that attaches, then a sink for its records on the host thread."""

    def __init__(
        self,
        subject: Subject,
        silent: frozenset[str],
        losses_are_told_apart: bool,
        table: Table,
        on_event: Callable[[Event], None],
        on_fault: Callable[[Exception], None],
    ) -> None:
        self._silent = silent
        self._table = table
        self._on_event = on_event
        self._on_fault = on_fault
        self._open = {
            name: FirstSteps(name, optimizer, subject, losses_are_told_apart)
            for name, optimizer in subject.optimizers.items()
        }
        """By optimizer. They hold the model until they are complete."""

    def begin(self, subject: Subject) -> list[Finding]:
        """Run the rules that look at the configuration, tell what they found, and return it."""
        found = [finding for rules in AT_ATTACH for finding in rules.findings(subject, self._silent, self._on_fault)]
        self._tell(found, 0, "at attach", next(iter(subject.optimizers)))
        return found

    def record(self, record: StepRecord) -> None:
        """Take one step; with the last of the first ones run the rules about them. See `sinks.Sink`."""
        seen = self._open.get(record.optimizer)
        if seen is None or record.skipped:
            return
        seen.add(record)
        if not seen.complete:
            return
        del self._open[record.optimizer]
        seen.tokens = self._table.total("optwatch_tokens_total")
        found = OVER_FIRST_STEPS.findings(seen, self._silent, self._on_fault)
        self._tell(found, record.step, f"over the first {steps.STEPS} steps", record.optimizer)

    def event(self, event: Event) -> None:
        """See `sinks.Sink`."""

    def _tell(self, found: Sequence[Finding], step: int, when: str, optimizer: str) -> None:
        for rule, count in Counter(finding.rule for finding in found).items():
            self._table.set("optwatch_audit_findings", count, rule)
        warnings = [finding for finding in found if finding.severity == "warning"]
        for finding in found:
            if not warnings:  # else the event's own line on the log has them all
                logger.info("optwatch: audit %s: %s", when, finding)
        if warnings:
            self._on_event(_event(found, warnings, step, when, optimizer))


def _event(found: Sequence[Finding], warnings: Sequence[Finding], step: int, when: str, optimizer: str) -> Event:
    """One event for all: twenty findings are one ticket."""
    many = f"{len(found)} findings" if len(found) > 1 else "1 finding"
    ordered = [*warnings, *(finding for finding in found if finding.severity != "warning")]
    return Event(
        kind="audit_finding",
        step=step,
        occurred_at=time.time(),
        summary=f"The audit of the configuration has {many} {when}: "
        + "; ".join(f"{each.rule}: {each.thing}: {each.value}" for each in ordered)
        + ".",
        likely=" ".join(f"{each.rule}: {each.fix}." for each in ordered)
        + " What is meant that way is silenced by Settings(audit_silenced=...).",
        runbook="TrainingAuditFinding",
        details={
            "optimizer": optimizer,
            "findings": [
                {
                    "rule": each.rule,
                    "severity": each.severity,
                    "thing": each.thing,
                    "value": each.value,
                    "fix": each.fix,
                }
                for each in ordered
            ],
        },
    )
