"""The datasets that peers.py compares: one object each way, the same decoding for all.

Each imports its own library only when it is made, in an environment that has it.
"""

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from epochs import LocalFiles, OpenedImage, PerSample, images
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset

THREADS = 64


class OpenedBytes:
    """An open file to the number of its bytes, all of which are read."""

    def __call__(self, file: Any) -> int:
        return len(file.read())


class Unwrapped:
    """What `opened` makes of a file, from its bytes."""

    def __init__(self, opened: Callable[[Any], Any]) -> None:
        self.opened = opened

    def __call__(self, body: bytes) -> Any:
        return self.opened(io.BytesIO(body))


class InThreads(Dataset[Any]):
    """A dataset that reads a batch in threads: what its users write by hand."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.pool = dataset, None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        if self.pool is None:
            self.pool = ThreadPoolExecutor(THREADS)
        return list(self.pool.map(self.dataset.__getitem__, indices))


def jpegs(count: int) -> Iterator[tuple[str, bytes]]:
    """JPEGs of 440x400, about 100 kB each: noise on smooth colours, fifty of them in turns."""
    random, bodies = np.random.default_rng(0), []
    for _ in range(min(count, 50)):
        smooth = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((440, 400))
        pixels = np.asarray(smooth) + random.normal(0, 24, (400, 440, 3))
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        bodies.append(file.getvalue())
    for number in range(count):
        yield f"train/{number % 10}/{number:06}.jpg", bodies[number % len(bodies)]


def raw(size: int, count: int) -> Iterator[tuple[str, bytes]]:
    body = os.urandom(size)
    for number in range(count):
        yield f"train/{number % 10}/{number:06}.bin", body


@dataclass(frozen=True)
class Kind:
    """What the objects of a bucket are."""

    label: str
    objects: int
    batch: int
    bodies: Callable[[int], Iterator[tuple[str, bytes]]]
    opened: Callable[[Any], Any]


KINDS = {
    "png": Kind("PNGs of 28x28", 4000, 200, images, OpenedImage()),
    "jpeg": Kind("JPEGs of 100 kB", 300, 50, jpegs, OpenedImage()),
    "1MB": Kind("objects of 1 MB, not decoded", 300, 20, partial(raw, 1_000_000), OpenedBytes()),
    "64MB": Kind("objects of 64 MB, not decoded", 6, 1, partial(raw, 64_000_000), OpenedBytes()),
}


def bucket_of(kind: str) -> str:
    return f"peers-{kind.lower()}"


def asyncds_dataset(options: argparse.Namespace, cache: str) -> Any:
    from asyncds import CachedS3MapDataset

    kind = KINDS[options.kind]
    prefix = f"s3://{bucket_of(options.kind)}/train"
    return CachedS3MapDataset.from_prefix(prefix, transform=kind.opened, cache_dir=cache)


def s3torchconnector_dataset(options: argparse.Namespace, **config: Any) -> Any:
    from s3torchconnector import S3ClientConfig, S3MapDataset

    return S3MapDataset.from_prefix(
        f"s3://{bucket_of(options.kind)}/train",
        region=os.environ["AWS_REGION"],
        endpoint=os.environ["AWS_ENDPOINT_URL"],
        transform=KINDS[options.kind].opened,
        s3client_config=S3ClientConfig(force_path_style=True, **config),
    )


def litdata_dataset(options: argparse.Namespace, cache: str) -> Any:
    """Its own index takes s3fs, which pins another botocore, and is written to the bucket: it is given one instead."""
    from litdata import StreamingRawDataset
    from litdata.raw.indexer import BaseIndexer, FileMetadata
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = "true"  # it refuses endpoints without TLS, and has no switch

    class Known(BaseIndexer):
        def discover_files(self, *_: Any) -> list[FileMetadata]:
            place = f"s3://{bucket_of(options.kind)}"
            return [FileMetadata(f"{place}/{key}", size) for key, size in stored(options)]

        def build_or_load_index(self, *_: Any, **__: Any) -> list[FileMetadata]:
            return self.discover_files()

    return StreamingRawDataset(
        f"s3://{bucket_of(options.kind)}/train",
        cache_dir=cache,
        indexer=Known(),
        cache_files=True,
        transform=Unwrapped(KINDS[options.kind].opened),
    )


def files_of(options: argparse.Namespace) -> Path:
    return Path(options.folder, options.kind, "files")


def stored(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Key and size of every object."""
    place = files_of(options)
    return sorted((str(path.relative_to(place)), path.stat().st_size) for path in place.rglob("*") if path.is_file())


def written(options: argparse.Namespace, cache: str) -> None:
    """Wait until a cache that is filled in the background has all: at most a minute."""
    wanted, until = sum(size for _, size in stored(options)), time.monotonic() + 60
    while time.monotonic() < until:
        if sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file()) >= wanted:
            return
        time.sleep(0.1)


@dataclass(frozen=True)
class Contender:
    """A way to read; `epoch` is the state of its cache, or "every" where it has none."""

    library: str
    epoch: str
    make: Callable[[argparse.Namespace, str], Any]
    serial: bool = False  # asks for one object after the other: its first samples tell its rate


def minio_dataset(options: argparse.Namespace, _: str) -> Any:
    host, keys = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://"), [key for key, _ in stored(options)]
    return PerSample(host, keys, KINDS[options.kind].opened, bucket_of(options.kind))


CONTENDERS = {
    "asyncds, cold": Contender("asyncds", "cold", asyncds_dataset),
    "asyncds, warm": Contender("asyncds", "warm", asyncds_dataset),
    "s3torchconnector": Contender(
        "s3torchconnector", "every", lambda options, _: s3torchconnector_dataset(options), serial=True
    ),
    f"s3torchconnector, {THREADS} threads": Contender(
        "s3torchconnector",
        "every",
        lambda options, _: InThreads(s3torchconnector_dataset(options, throughput_target_gbps=100)),
    ),
    "litData raw, cold": Contender("litdata", "cold", litdata_dataset),
    "litData raw, warm": Contender("litdata", "warm", litdata_dataset),
    "minio-py": Contender("minio", "every", minio_dataset, serial=True),
    "local files": Contender(
        "torch", "every", lambda options, _: LocalFiles(files_of(options), KINDS[options.kind].opened)
    ),
}


def cache_of(name: str, options: argparse.Namespace) -> str:
    """An empty folder, or the one that all runs on a full cache share."""
    if CONTENDERS[name].epoch == "cold":
        return tempfile.mkdtemp(dir=options.folder)
    return str(Path(options.folder, options.kind, CONTENDERS[name].library))


def loader_for(name: str, dataset: Any, options: argparse.Namespace) -> DataLoader[Any]:
    batch = KINDS[options.kind].batch
    if name.startswith("asyncds"):
        loader: DataLoader[Any] = dataset.loader(batch, shuffle=True, num_workers=options.workers)
        return loader
    if CONTENDERS[name].serial and options.few < len(dataset):
        dataset, batch = Subset(dataset, range(options.few)), min(batch, options.few // max(1, options.workers))
    return DataLoader(dataset, batch, shuffle=True, num_workers=options.workers)
