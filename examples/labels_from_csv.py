"""Take objects and labels from a CSV file: which digits are odd, for the pictures that `tutorial.py` uploads.

Such a file has a row for each object, and any number of columns. This one is written here first, as an annotator would.
"""

import csv
import sys

import torch
from torch import nn
from torchvision.transforms import ToTensor

from asyncds import AsyncdsError, CachedS3MapDataset, ImageTransform, Manifest


def annotate(path: str) -> None:
    """`file,parity` for each picture: `1/0001.png,odd`."""
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "parity"])
        for info in Manifest.from_prefix("s3://mnist/train/"):
            name = info.key.removeprefix("train/")
            rows.writerow([name, "odd" if int(name[0]) % 2 else "even"])


def main(path: str = "parity.csv") -> None:
    annotate(path)
    columns = {"key": "file", "label": "parity", "root": "s3://mnist/train"}
    dataset = CachedS3MapDataset.from_csv(path, **columns, transform=ImageTransform(ToTensor(), mode="L"))
    print(f"{len(dataset):,} pictures, {dataset.class_to_idx}", flush=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, len(dataset.classes)))
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for epoch in range(1, 4):
        right = 0
        for images, labels in dataset.loader(batch_size=100, shuffle=True):
            scores = model(images)
            right += (scores.argmax(1) == labels).sum().item()
            optimiser.zero_grad()
            nn.functional.cross_entropy(scores, labels).backward()
            optimiser.step()
        print(f"epoch {epoch}: {right / len(dataset):.1%} right while training", flush=True)


if __name__ == "__main__":
    try:
        main()
    except AsyncdsError as error:
        sys.exit(f"error: {error}")
