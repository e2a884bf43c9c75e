"""Train a ResNet on a bucket laid out as ImageNet is: `train/<class>/<name>.JPEG`.

The bucket is named by IMAGENET_BUCKET_NAME, in the environment or in the file `.env` of the working directory, beside
where the store is and with which keys. Needs `pip install "asyncds[vision]"`.
"""

import argparse
import os
import sys
import time

import torch
from dotenv import load_dotenv
from torch import nn
from torchvision.models import resnet18
from torchvision.transforms import v2

from asyncds import AsyncdsError, CachedS3MapDataset, ImageTransform

TO_TENSOR = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
NORMALISE = v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


def main(epochs: int, workers: int, limit: int | None, size: int) -> None:
    augment = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *TO_TENSOR, NORMALISE])
    plain = v2.Compose([v2.Resize(size), v2.CenterCrop(size), *TO_TENSOR, NORMALISE])
    options = {"label": "parent", "match": "*.JPEG", "limit": limit, "on_error": "replace"}
    whole = CachedS3MapDataset.from_prefix(f"s3://{os.environ['IMAGENET_BUCKET_NAME']}/train/", **options)
    print(f"{len(whole):,} pictures of {len(whole.classes):,} classes", flush=True)
    training, held_out = whole.split([0.9, 0.1], torch.Generator().manual_seed(0))
    loader = training.with_transform(ImageTransform(augment)).loader(64, shuffle=True, num_workers=workers)
    testing = held_out.with_transform(ImageTransform(plain)).loader(64, num_workers=workers)
    model = resnet18(num_classes=len(whole.classes))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(1, epochs + 1):
        started = time.perf_counter()
        model.train()
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        seconds = time.perf_counter() - started
        model.eval()
        with torch.no_grad():
            right = sum((model(images).argmax(1) == labels).sum().item() for images, labels in testing)
        accuracy = right / len(held_out)
        print(f"epoch {epoch}: loss {loss.item():.3f}, accuracy {accuracy:.1%}, {seconds:.1f} s", flush=True)
    print(f"waited {whole.stats()['blocked_s']:.1f} s for bytes; {len(whole.failures())} pictures were replaced")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2, help="worker processes of the DataLoader")
    parser.add_argument("--limit", type=int, help="only the first so many pictures")
    parser.add_argument("--size", type=int, default=224, help="edge of the pictures, in pixels")
    arguments = parser.parse_args()
    load_dotenv(".env")
    if not os.environ.get("IMAGENET_BUCKET_NAME"):
        sys.exit("IMAGENET_BUCKET_NAME not set: write IMAGENET_BUCKET_NAME=... into the file .env")
    try:
        main(arguments.epochs, arguments.workers, arguments.limit, arguments.size)
    except AsyncdsError as error:
        sys.exit(f"error: {error}")
