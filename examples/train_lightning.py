"""Train with PyTorch Lightning: loaders of asyncds are stock DataLoaders, and their counters are logged as metrics.

Reads the pictures that `tutorial.py` uploads, with its `.env` file. Needs `pip install "asyncds[vision]" lightning`.
"""

import sys
from typing import Any

import torch
from torch import nn
from torchvision.transforms import ToTensor

from asyncds import AsyncdsError, CachedS3MapDataset, ImageTransform

try:
    from lightning.pytorch import LightningModule, Trainer
except ModuleNotFoundError as error:
    sys.exit(f"{error}: pip install lightning")


def load(part: str) -> CachedS3MapDataset:
    transform = ImageTransform(ToTensor(), mode="L")
    return CachedS3MapDataset.from_prefix(f"s3://mnist/{part}/", transform=transform, label="parent")


class Digits(LightningModule):
    def __init__(self, dataset: CachedS3MapDataset) -> None:
        super().__init__()
        self.dataset = dataset
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def train_dataloader(self) -> Any:
        return self.dataset.loader(batch_size=100, shuffle=True)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def on_train_epoch_end(self) -> None:
        stats = self.dataset.stats()
        self.log_dict({name: float(stats[name]) for name in ("hits", "gets", "blocked_s")})

    def validation_step(self, batch: Any, _: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.model(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=5e-3)


def main() -> None:
    module = Digits(load("train"))
    names = "logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"
    trainer = Trainer(max_epochs=3, accelerator="auto", devices=1, **dict.fromkeys(names, False))
    trainer.fit(module, val_dataloaders=load("test").loader(batch_size=200))
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    print(f"accuracy {metrics['accuracy']:.1%}, hits {metrics['hits']:,.0f}, GETs {metrics['gets']:,.0f}")


if __name__ == "__main__":
    try:
        main()
    except AsyncdsError as error:
        sys.exit(f"error: {error}")
