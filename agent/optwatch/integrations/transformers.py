"""Hugging Face `Trainer`: ``Trainer(..., callbacks=[OptwatchCallback()])``."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from optwatch import Monitor, attach

from . import reported


class OptwatchCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Attaches when training begins, reports what ``evaluate`` returns, and detaches when training ends.

    Args:
        options: Those of `optwatch.attach`. The run's name is by default ``TrainingArguments.run_name``, and its seed
            ``TrainingArguments.seed``.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self.monitor: Monitor | None = None
        """Set while training runs."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Attach to the optimizer that the trainer has made."""
        defaults = {"model": given.get("model"), "seed": args.seed}
        if getattr(args, "run_name", None):
            defaults["run"] = args.run_name
        self.monitor = attach(given["optimizer"], **(defaults | self._options))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **given: Any) -> None:
        """Report validation values."""
        if self.monitor is not None and logs:
            self.monitor.log(**reported(logs, ("eval_", "test_")))

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The run succeeded. Training that raises does not come here: its process says how it ended."""
        if self.monitor is not None:
            self.monitor.detach()
            self.monitor = None
