"""The baseline: a Dataset written by hand on MinIO's SDK, which asks the server once for each sample, every epoch.

Reads what `train_minio.py` trains on. Needs `pip install minio torchvision python-dotenv`, and in the working directory
a file `.env` with MINIO_URL=localhost:9000, MINIO_ACCESS_KEY=..., MINIO_SECRET_KEY=..., MINIO_SECURE=false and
MNIST_BUCKET_NAME=mnist, a name to a line.
"""

import argparse
import os
import sys
import time
from io import BytesIO

from dotenv import load_dotenv
from minio import Minio
from minio.error import MinioException
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from urllib3.exceptions import HTTPError

NEEDED = ("MINIO_URL", "MINIO_ACCESS_KEY", "MINIO_SECRET_KEY", "MNIST_BUCKET_NAME")


def connect():
    url, *keys = (os.environ[name] for name in NEEDED[:3])
    return Minio(url, *keys, secure=os.environ.get("MINIO_SECURE", "true").lower() == "true")


class MNISTDataset(Dataset):
    def __init__(self, bucket, prefix, transform, smoke_test_size=None):
        self.bucket, self.transform, self.client = bucket, transform, None
        listing = connect().list_objects(bucket, prefix=prefix, recursive=True)
        self.keys = [entry.object_name for entry in listing][:smoke_test_size]
        self.labels = [int(key.split("/")[1]) for key in self.keys]

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, index):
        self.client = self.client or connect()  # made here, so that each worker has one of its own
        response = self.client.get_object(self.bucket, self.keys[index])
        try:
            image = Image.open(BytesIO(response.read()))
        finally:
            response.close()
            response.release_conn()
        return self.transform(image), self.labels[index]


def read(epochs: int, workers: int, smoke_test_size: int | None) -> None:
    pixels = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    dataset = MNISTDataset(os.environ["MNIST_BUCKET_NAME"], "train/", pixels, smoke_test_size)
    if not dataset.keys:
        sys.exit("there are no images under train/ in this bucket: upload some, or correct MNIST_BUCKET_NAME")
    loader = DataLoader(dataset, batch_size=200, shuffle=True, num_workers=workers)
    for epoch in range(1, epochs + 1):
        started, samples = time.perf_counter(), sum(len(labels) for _, labels in loader)
        seconds = time.perf_counter() - started
        print(f"epoch {epoch}: {samples:,} samples, {seconds:.2f} s, {samples / seconds:,.0f} samples/s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="worker processes of the DataLoader")
    parser.add_argument("--smoke-test-size", type=int, help="read only the first so many images")
    arguments = parser.parse_args()
    load_dotenv(".env")
    if missing := [name for name in NEEDED if not os.environ.get(name)]:
        sys.exit(f"{', '.join(missing)} not set: write NAME=value into the file .env of this directory")
    try:
        read(arguments.epochs, arguments.workers, arguments.smoke_test_size)
    except HTTPError:
        sys.exit(f"no server answers at {os.environ['MINIO_URL']}: start MinIO, or correct MINIO_URL or MINIO_SECURE")
    except MinioException:
        sys.exit("the server refuses: correct MINIO_ACCESS_KEY, MINIO_SECRET_KEY or MNIST_BUCKET_NAME in .env")
    except ValueError as error:
        sys.exit(f"{error}: MINIO_URL is host:port without http://, and keys are train/<label>/<name>.png")
