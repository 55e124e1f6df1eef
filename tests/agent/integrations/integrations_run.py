"""Trains through callbacks that the scripts in examples/frameworks do not use, and prints what the monitors saw."""

from __future__ import annotations

import json
import tempfile
from typing import Any

import lightning.pytorch as pl
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from optwatch.integrations.accelerate import OptwatchTracker
from optwatch.integrations.lightning import OptwatchCallback
from optwatch.monitor import Monitor, attached


def tracked() -> dict[str, Any]:
    tracker = OptwatchTracker(port=0, run="tracked")
    accelerator = Accelerator(cpu=True, log_with=tracker)
    net = torch.nn.Linear(3, 1)
    try:
        accelerator.init_trackers("project")
        early = "nothing was raised"
    except RuntimeError as error:
        early = str(error)
    accelerator.trackers.clear()
    net, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters()))
    accelerator.init_trackers("project")
    for step in range(3):
        accelerator.backward(net(torch.ones(2, 3)).mean())
        optimizer.step()
        optimizer.zero_grad()
        accelerator.log({"val_loss": 2.5, "train_loss": 1.0, "text": "no number"}, step=step)
    monitor = accelerator.get_tracker("optwatch", unwrap=True)
    monitor.flush(60)
    values = monitor.snapshot()
    accelerator.end_training()
    return {"early": early, "values": values, "run": monitor.run.name, "left": len(attached)}


class Failing(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if index == 2:
            raise KeyError("no such column")
        return self.net(batch[0]).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def failed() -> dict[str, Any]:
    ends: list[tuple[str, str | None]] = []
    finish = Monitor.finish

    def noted(monitor: Monitor, status: Any = "succeeded", reason: str | None = None) -> None:
        ends.append((status, reason))
        finish(monitor, status, reason)

    Monitor.finish = noted  # type: ignore[method-assign]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=tempfile.mkdtemp(),
        callbacks=[OptwatchCallback(port=0)],
        **quiet,
    )
    try:
        trainer.fit(Failing(), DataLoader(TensorDataset(torch.ones(8, 2)), 2))
        raised = "nothing was raised"
    except KeyError as error:
        raised = str(error)
    Monitor.finish = finish  # type: ignore[method-assign]
    return {"raised": raised, "first": ends[0], "left": len(attached)}


if __name__ == "__main__":
    print("RESULTS", json.dumps({"tracked": tracked(), "failed": failed()}))
