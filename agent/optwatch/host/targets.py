"""Whether a run has reached its target."""

from __future__ import annotations

from optwatch.export.table import Table
from optwatch.settings import Target


class TargetWatch:
    """Follows one metric towards a target, on the host thread."""

    def __init__(self, target: Target | None, table: Table) -> None:
        self._target = target
        self._table = table
        if target is not None:
            table.set("optwatch_target_by_step", target.by_step, target.metric)
            table.set("optwatch_target_reached", 0, target.metric)

    def value(self, name: str, value: float) -> None:
        """A metric has a new value. Once reached, a target stays reached."""
        target = self._target
        if target is None or name != target.metric:
            return
        if value <= target.value if target.mode == "min" else value >= target.value:
            self._table.set("optwatch_target_reached", 1, target.metric)
