"""From nothing to a trained model: upload handwritten digits to `mnist/train/<label>/`, train on them, evaluate.

Needs `pip install "asyncds[vision]" minio scikit-learn`, a server, and in the working directory a file `.env` with
MINIO_URL=localhost:9000, MINIO_ACCESS_KEY=..., MINIO_SECRET_KEY=... and MINIO_SECURE=false, a name to a line.
"""

import sys
import time
import warnings
from io import BytesIO
from urllib.parse import urlsplit

import torch
from minio import Minio
from minio.error import MinioException
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torchvision.transforms import ToTensor

from asyncds import AsyncdsError, CachedS3MapDataset, Connection, ImageTransform, Settings
from asyncds.errors import BucketNotFound, ConfigurationError, EmptyDataset


def connect() -> Minio:
    """MinIO's own client, for the server that asyncds reads from, and with the same keys."""
    with warnings.catch_warnings(action="ignore"):  # of two servers: that is an error here
        place = Connection.resolve(settings := Settings())
    url = urlsplit(place.endpoint or "https://s3.amazonaws.com")
    if settings.minio_url not in (None, url.netloc):
        raise ConfigurationError(f"MINIO_URL is {settings.minio_url}, but AWS_* variables mean {url.netloc}: keep one")
    keys = place.access_key, place.secret_key, place.session_token
    return Minio(url.netloc, *keys, secure=url.scheme == "https", region=place.region or "us-east-1")


def upload(client: Minio) -> None:
    if not client.bucket_exists("mnist"):
        client.make_bucket("mnist")
    pictures, labels = load_digits(return_X_y=True)
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        Image.fromarray((picture.reshape(8, 8) * 15).astype("uint8")).save(file := BytesIO(), "PNG")
        key = f"{'train' if number % 5 else 'test'}/{label}/{number:04}.png"
        client.put_object("mnist", key, BytesIO(file.getvalue()), file.tell())
    print(f"uploaded {len(labels):,} pictures", flush=True)


def load(part: str) -> CachedS3MapDataset:
    transform = ImageTransform(ToTensor(), mode="L")
    return CachedS3MapDataset.from_prefix(f"s3://mnist/{part}/", transform=transform, label="parent")


def main(epochs: int = 3) -> None:
    client = connect()
    try:
        print(f"{len(load('train')):,} pictures are there", flush=True)
    except (BucketNotFound, EmptyDataset):
        upload(client)
    training, testing = load("train"), load("test")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    loader = training.loader(batch_size=100, shuffle=True)  # num_workers=4 for larger pictures
    for epoch in range(1, epochs + 1):
        started = time.perf_counter()
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}, {time.perf_counter() - started:.2f} s", flush=True)
    with torch.no_grad():
        right = sum((model(images).argmax(1) == labels).sum().item() for images, labels in testing.loader(200))
    print(f"test accuracy {right / len(testing):.1%}\n{training}")


if __name__ == "__main__":
    try:
        main()
    except (AsyncdsError, MinioException) as error:  # the latter, where these keys may not write
        sys.exit(f"error: {error}")
