"""Lightning's Trainer: a module with training and validation steps and a scheduler."""

import tempfile

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from optwatch.integrations.lightning import OptwatchCallback


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        print(f"{loss.item():.17g}")
        return loss

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self.net(x), y))

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}


pl.seed_everything(5)
x = torch.randn(64, 8)
data = TensorDataset(x, x.sum(1, keepdim=True))
trainer = pl.Trainer(
    max_epochs=3,
    accelerator="cpu",
    gradient_clip_val=1.0,
    default_root_dir=tempfile.mkdtemp(),
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.callbacks.append(OptwatchCallback())
trainer.fit(Regression(), DataLoader(data, 8), DataLoader(data, 32))
