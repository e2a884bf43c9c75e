"""Train on images in MinIO, as with the S3 Connector for PyTorch: but for the import it is the same script.

Images lie under `train/<label>/<name>.png` and `test/<label>/<name>.png` of one bucket; `asyncds demo --endpoint URL`
puts some there. Needs `pip install "asyncds[vision]"` and in the working directory a file `.env`:

    AWS_ACCESS_KEY_ID=...
    AWS_SECRET_ACCESS_KEY=...
    AWS_ENDPOINT_URL=http://localhost:9000
    AWS_REGION=us-east-1
    MNIST_BUCKET_NAME=mnist
"""

import argparse
import os
import sys
import time
from io import BytesIO

import torch
from dotenv import load_dotenv
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

# from s3torchconnector import S3MapDataset, S3Reader
from asyncds import AsyncdsError, CachedS3MapDataset as S3MapDataset, S3Reader  # isort: skip

NEEDED = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION", "MNIST_BUCKET_NAME")


class MNISTTransform:
    def __init__(self, transform):
        self.transform = transform

    def __call__(self, object: S3Reader):
        image = Image.open(BytesIO(object.read()))
        return self.transform(image), int(object.key.split("/")[1])


def load(part: str, workers: int) -> DataLoader:
    pixels = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    uri = f"s3://{os.environ['MNIST_BUCKET_NAME']}/{part}/"
    region, endpoint = os.environ["AWS_REGION"], os.environ["AWS_ENDPOINT_URL"]
    dataset = S3MapDataset.from_prefix(uri, region=region, endpoint=endpoint, transform=MNISTTransform(pixels))
    return DataLoader(dataset, batch_size=200, shuffle=part == "train", num_workers=workers)


def train(epochs: int, workers: int) -> None:
    training, testing = load("train", workers), load("test", workers)
    convolutions = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()
    model = nn.Sequential(*convolutions, nn.AdaptiveMaxPool2d(4), nn.Flatten(), nn.Linear(512, 10))  # of any size
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for epoch in range(1, epochs + 1):
        started = time.perf_counter()
        for images, labels in training:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        seconds = time.perf_counter() - started
        with torch.no_grad():
            right = sum((model(images).argmax(1) == labels).sum().item() for images, labels in testing)
        accuracy = right / len(testing.dataset)
        print(f"epoch {epoch}: loss {loss.item():.3f}, test accuracy {accuracy:.1%}, {seconds:.2f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0, help="worker processes of the DataLoader")
    arguments = parser.parse_args()
    load_dotenv(".env")
    if missing := [name for name in NEEDED if not os.environ.get(name)]:
        sys.exit(f"{', '.join(missing)} not set: write NAME=value into the file .env of this directory")
    try:
        train(arguments.epochs, arguments.workers)
    except AsyncdsError as error:
        sys.exit(f"error: {error}")
