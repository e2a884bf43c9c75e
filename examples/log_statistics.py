"""Log what a dataset counted to TensorBoard, once per epoch: is training waiting for bytes, and why?

Reads the pictures that `tutorial.py` uploads, with its `.env` file, and does nothing with them. Needs
`pip install "asyncds[vision]" tensorboard`. Then `tensorboard --logdir runs`.
"""

import argparse
import sys
import time

import torch
from torchvision.transforms import v2

from asyncds import AsyncdsError, CachedS3MapDataset, ImageTransform

try:
    from torch.utils.tensorboard import SummaryWriter
except ModuleNotFoundError as error:
    sys.exit(f"{error}: pip install tensorboard")


def read(epochs: int, workers: int, folder: str) -> None:
    pixels = ImageTransform(v2.Compose([v2.ToImage(), v2.Resize((28, 28)), v2.ToDtype(torch.float32, scale=True)]))
    dataset = CachedS3MapDataset.from_prefix("s3://mnist/train/", transform=pixels)
    loader = dataset.loader(batch_size=200, shuffle=True, num_workers=workers)
    with SummaryWriter(folder) as writer:
        for epoch in range(1, epochs + 1):
            started = time.perf_counter()
            before = dataset.stats()
            samples = sum(len(batch) for batch in loader)
            for name, value in of_epoch(before, dataset.stats()).items():  # in Lightning: self.log_dict(of_epoch(...))
                writer.add_scalar(f"asyncds/{name}", value, epoch)
            print(f"epoch {epoch}: {samples / (time.perf_counter() - started):,.0f} images/s; {dataset}", flush=True)


def of_epoch(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What the counters, which run as long as the dataset lives, grew by; latencies are of all requests so far."""
    return {name: value - (0 if name.startswith("latency") else before[name]) for name, value in after.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0, help="worker processes of the DataLoader")
    parser.add_argument("--folder", default="runs", help="where TensorBoard looks")
    arguments = parser.parse_args()
    try:
        read(arguments.epochs, arguments.workers, arguments.folder)
    except AsyncdsError as error:
        sys.exit(f"error: {error}")
