"""Fill the cache before training, so that no epoch waits for the store; interrupted, the same call goes on.

Reads the pictures that `tutorial.py` uploads, with its `.env` file. In a shell, and without importing
torch, `asyncds warm s3://mnist/train/` does the same.
"""

import sys
import time

from torchvision.transforms import ToTensor

from asyncds import AsyncdsError, CachedS3MapDataset, ImageTransform


def main() -> None:
    transform = ImageTransform(ToTensor(), mode="L")
    dataset = CachedS3MapDataset.from_prefix("s3://mnist/train/", transform=transform, label="parent")
    report = dataset.warm()  # a bar in a terminal; `limit="50GB"` where not all of it fits
    print(report)
    if report.failures:
        print(*report.failures, sep="\n")
    before = dataset.stats()
    for epoch in range(1, 4):
        started = time.perf_counter()
        samples = sum(len(labels) for _, labels in dataset.loader(batch_size=200, shuffle=True))
        print(f"epoch {epoch}: {samples / (time.perf_counter() - started):,.0f} pictures/s", flush=True)
    after = dataset.stats()
    print(f"hits {after['hits'] - before['hits']:,}, GETs {after['gets'] - before['gets']:,} in these epochs")


if __name__ == "__main__":
    try:
        main()
    except AsyncdsError as error:
        sys.exit(f"error: {error}")
