"""A watched training with Lightning: two lines more than without.

python examples/lightning_digits.py
"""

from typing import Any

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gradwatch_lightning import GradwatchCallback  # this line


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        pixels, labels = batch
        return nn.functional.cross_entropy(self.net(pixels), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


pixels, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
digits = TensorDataset((pixels.float() - 4.9) / 6.0, labels)  # mean 0, variance 1 of all pixels

pl.seed_everything(0, verbose=False)
quiet: dict[str, Any] = {
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "logger": False,
}
callback = GradwatchCallback()  # and this one
trainer = pl.Trainer(max_epochs=5, accelerator="cpu", callbacks=[callback], **quiet)
trainer.fit(Digits(), DataLoader(digits, batch_size=64, shuffle=True))

print(callback.summary())
