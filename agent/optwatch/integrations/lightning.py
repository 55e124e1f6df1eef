"""Lightning: ``Trainer(callbacks=[OptwatchCallback()])``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback

from optwatch import Monitor, attach

from . import reported


class OptwatchCallback(Callback):  # type: ignore[misc,unused-ignore]
    """Attaches when training begins, reports validation values, and says how training ended.

    Args:
        options: Those of `optwatch.attach`. ``resume_from`` is by default the checkpoint that ``fit`` was given.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self.monitor: Monitor | None = None
        """Set while training runs."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to all optimizers of the module, as one run."""
        defaults: dict[str, Any] = {"model": pl_module}
        if trainer.ckpt_path:
            defaults["resume_from"] = str(trainer.ckpt_path)
        self.monitor = attach(*trainer.optimizers, **(defaults | self._options))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Report what validation logged; the sanity check before training comes before there is a run."""
        if self.monitor is not None:
            self.monitor.log(**reported(trainer.callback_metrics, ("val", "test", "eval")))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Say what ended training, which Lightning may turn into a quiet end."""
        if self.monitor is not None:
            status = "cancelled" if isinstance(exception, KeyboardInterrupt) else "failed"
            self.monitor.finish(status, f"{type(exception).__name__}: {exception}")  # type: ignore[arg-type,unused-ignore]
            self.teardown(trainer, pl_module, "fit")  # which Lightning leaves out then

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Training is over; where nothing was said of its end it succeeded."""
        if self.monitor is not None:
            self.monitor.detach()
            self.monitor = None
