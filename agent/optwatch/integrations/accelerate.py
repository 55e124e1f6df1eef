"""Accelerate: ``Accelerator(log_with=OptwatchTracker())``, and what is logged there is reported here."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from optwatch import Monitor, attach
from optwatch.training.living import living

from . import reported


class OptwatchTracker(GeneralTracker):  # type: ignore[misc,unused-ignore]
    """Attaches at ``accelerator.init_trackers()``, reports ``accelerator.log()``, detaches at ``end_training()``.

    Args:
        options: Those of `optwatch.attach`. The project is by default that of ``init_trackers``.
    """

    name = "optwatch"
    requires_logging_directory = False
    main_process_only = False  # every rank exports its own

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._options = options
        self.monitor: Monitor | None = None
        """Set between ``init_trackers`` and ``end_training``."""

    @property
    def tracker(self) -> Monitor | None:
        """The monitor, for ``accelerator.get_tracker("optwatch", unwrap=True)``."""
        return self.monitor

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Nothing is kept of the configuration: ``tags`` of `attach` are for what alerts and dashboards select by."""

    def start(self) -> None:
        """Attach to the optimizers that ``accelerator.prepare()`` was given.

        Raises:
            RuntimeError: none have been prepared yet.
        """
        accelerator = next(
            (found for found in living(Accelerator) if any(logger is self for logger in found.log_with)),
            None,
        )
        optimizers = accelerator._optimizers if accelerator is not None else []
        if not optimizers:
            raise RuntimeError(
                "OptwatchTracker found no optimizer: call accelerator.prepare(optimizer) before "
                "accelerator.init_trackers()"
            )
        self.monitor = attach(*optimizers, **self._options)

    def log(self, values: dict[str, Any], step: int | None = None, **given: Any) -> None:
        """Report validation values."""
        if self.monitor is not None:
            self.monitor.log(**reported(values, ("val", "test", "eval")))

    def finish(self) -> None:
        """Training is over: the run succeeded."""
        if self.monitor is not None:
            self.monitor.detach()
            self.monitor = None
