"""The agent's detectors over a recorded curve."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from optwatch.events import Event
from optwatch.record import NonFinite, StepRecord
from optwatch.settings import Settings

from .suite import Detectors

Row = tuple[int, float | None, float | None]
"""Step, loss and gradient norm; None where it was not logged."""


def replay(rows: Iterable[Row | tuple[int, float | None]], settings: Settings | None = None) -> Iterator[Event]:
    """Run exactly the agent's detectors over `rows` of ``(step, loss)`` or ``(step, loss, grad_norm)``, in their order.

    Rows are taken one by one, as training would give them; an event comes out at the row that it is raised at. NaN and
    Inf count as such, None as not logged. Of an event, ``details["signal"]`` says what it is about. Without `settings`
    the agent's defaults hold. Detectors look at rows, not at the difference of their steps: a curve logged every 100
    steps is judged as one whose every step was logged.

    Raises:
        Exception: what a detector raises, which in the agent is only counted.
    """

    def on_fault(error: Exception) -> None:
        raise error

    detectors = Detectors(settings or Settings(), None, on_fault)
    for row in rows:
        step, loss = row[0], row[1]
        norm = row[2] if len(row) > 2 else None
        record = StepRecord(step=step, optimizer="", started=0.0, grad_norm=norm)
        if norm is not None and norm - norm != 0:
            record.nonfinite.append(NonFinite("gradient", "nan" if norm != norm else "inf"))
        record.give_loss(loss)
        yield from detectors.observe(record)


def signal(event: Event) -> str:
    """What a replayed event is about: ``loss`` or ``grad_norm``."""
    source = event.details.get("source")
    return "grad_norm" if source == "gradient" else str(event.details.get("signal", "loss"))
