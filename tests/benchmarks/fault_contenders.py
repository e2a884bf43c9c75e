"""What faults.py compares: each library used as its documentation says, through one small interface.

Each imports its own library only when it is made, in an environment that has it; only the standard library is imported
above. `keys` are those that it lists, `read` returns their bytes, `samples` is what a DataLoader is given.

All get the same limits as far as they have an option for them: 5 s without progress, 20 s for one object. Retries are
left as each library has them.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

PREFIX = "data/"
IDLE_S = 5
OBJECT_S = 20
ENVIRONMENT = {"ASYNCDS_TIMEOUT": str(IDLE_S), "ASYNCDS_DEADLINE": str(OBJECT_S)}
BOTOCORE = {"connect_timeout": IDLE_S, "read_timeout": IDLE_S}


def endpoint() -> str:
    return os.environ["AWS_ENDPOINT_URL"]


class Samples:
    """A map-style dataset over a contender that is none itself."""

    def __init__(self, contender: Any) -> None:
        self.contender = contender

    def __len__(self) -> int:
        return len(self.contender.keys)

    def __getitems__(self, indices: list[int]) -> list[bytes]:
        return self.contender.read([self.contender.keys[index] for index in indices])


class Asyncds:
    verify_md5 = False

    def __init__(self, folder: str, bucket: str) -> None:
        from asyncds import CachedS3MapDataset

        self.samples = CachedS3MapDataset.from_prefix(
            f"s3://{bucket}/{PREFIX}", transform=_read, cache_dir=folder, verify_md5=self.verify_md5
        )
        self.keys = [info.key for info in self.samples.manifest]
        self.rows = {key: row for row, key in enumerate(self.keys)}

    def read(self, keys: Sequence[str]) -> list[bytes]:
        return self.samples.__getitems__([self.rows[key] for key in keys])


class AsyncdsWithMd5(Asyncds):
    verify_md5 = True


class AiobotocoreAndDiskcache:
    """The few lines that everybody writes: what is missing is asked for together, and kept under its key."""

    def __init__(self, folder: str, bucket: str) -> None:
        import asyncio

        import diskcache

        self.run, self.bucket, self.cache = asyncio.run, bucket, diskcache.Cache(folder)
        self.keys = asyncio.run(self.listed())
        self.samples = Samples(self)

    def client(self) -> Any:
        from aiobotocore.config import AioConfig
        from aiobotocore.session import get_session

        return get_session().create_client("s3", config=AioConfig(**BOTOCORE))

    async def listed(self) -> list[str]:
        async with self.client() as client:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=PREFIX)
            return [entry["Key"] async for page in pages for entry in page.get("Contents", [])]

    def read(self, keys: Sequence[str]) -> list[bytes]:
        return self.run(self.together(keys))

    async def together(self, keys: Sequence[str]) -> list[bytes]:
        from asyncio import gather

        async with self.client() as client:
            return await gather(*(self.one(client, key) for key in keys))

    async def one(self, client: Any, key: str) -> bytes:
        body = self.cache.get(key)
        if body is None:
            answer = await client.get_object(Bucket=self.bucket, Key=key)
            body = await answer["Body"].read()
            self.cache.set(key, body)
        return body


class FilecacheOverS3fs:
    """With `check_files`, which asks for each file's ETag; without, it serves what was overwritten for a week.

    It refuses to be used after a fork: it is made anew in each worker.
    """

    def __init__(self, folder: str, bucket: str) -> None:
        self.folder, self.bucket = folder, bucket
        self.make()
        self.keys = [path.removeprefix(f"{bucket}/") for path in self.files.fs.find(f"{bucket}/{PREFIX}")]
        self.samples = Samples(self)

    def make(self) -> None:
        import fsspec

        options = {"endpoint_url": endpoint(), "config_kwargs": BOTOCORE}
        self.files = fsspec.filesystem(
            "filecache", target_protocol="s3", target_options=options, cache_storage=self.folder, check_files=True
        )
        self.process = os.getpid()

    def read(self, keys: Sequence[str]) -> list[bytes]:
        if self.process != os.getpid():
            self.make()
        return [self.one(key) for key in keys]

    def one(self, key: str) -> bytes:
        with self.files.open(f"{self.bucket}/{key}") as file:
            return file.read()


class LitDataRaw:
    def __init__(self, folder: str, bucket: str) -> None:
        import litdata
        from litdata.streaming import downloader

        # There are no options for these: http is refused, and 200 s are the limit of a request.
        downloader._OBSTORE_CLIENT_OPTIONS.update(
            {"allow_http": True, "connect_timeout": f"{IDLE_S}s", "timeout": f"{OBJECT_S}s"}
        )
        self.samples = litdata.StreamingRawDataset(
            f"s3://{bucket}/{PREFIX.rstrip('/')}",
            cache_dir=folder,
            cache_files=True,
            recompute_index=True,  # list anew, as the others do
            download_timeout=OBJECT_S,
            storage_options={"endpoint_url": endpoint()},
        )
        prefix = f"s3://{bucket}/"
        self.keys = [file.path.removeprefix(prefix) for file in self.samples.files]
        self.rows = {key: row for row, key in enumerate(self.keys)}

    def read(self, keys: Sequence[str]) -> list[bytes]:
        samples = self.samples.__getitems__([self.rows[key] for key in keys])
        time.sleep(0.3)  # it writes its cache in the background
        return samples


class S3TorchConnector:
    def __init__(self, folder: str, bucket: str) -> None:
        from s3torchconnector import S3ClientConfig, S3MapDataset

        self.samples = S3MapDataset.from_prefix(
            f"s3://{bucket}/{PREFIX}",
            region=os.environ["AWS_REGION"],
            endpoint=endpoint(),
            s3client_config=S3ClientConfig(force_path_style=True),
            transform=_read,
        )
        self.keys = [pair.key for pair in self.samples._dataset_bucket_key_pairs]
        self.rows = {key: row for row, key in enumerate(self.keys)}

    def read(self, keys: Sequence[str]) -> list[bytes]:
        return [self.samples[self.rows[key]] for key in keys]


def _read(file: Any) -> bytes:
    return file.read()


class Recipe(NamedTuple):
    """How a contender is run, and what its cache is made of."""

    make: Callable[[str, str], Any]
    modules: tuple[str, ...]  # what takes long to import
    library: str | None = None  # whose environment it runs in; None: this one
    index: str | None = None  # the file that says what the cache holds
    database: bool = False  # that is diskcache's
    cache: bool = True
    serial: bool = False  # a batch is read one object after the other: each of them is progress


TORCH = "torch.utils.data"
_ASYNCDS = Recipe(Asyncds, (TORCH, "asyncds.dataset", "asyncds.store"), index="asyncds/objects/cache.db", database=True)
CONTENDERS = {
    "asyncds": _ASYNCDS,
    "asyncds + MD5": _ASYNCDS._replace(make=AsyncdsWithMd5),
    "aiobotocore + diskcache": Recipe(
        AiobotocoreAndDiskcache, (TORCH, "aiobotocore.session", "diskcache"), index="cache.db", database=True
    ),
    "s3fs filecache": Recipe(FilecacheOverS3fs, (TORCH, "s3fs", "fsspec"), "s3fs", index="cache", serial=True),
    "litData raw": Recipe(LitDataRaw, (TORCH, "litdata", "s3fs"), "litdata", index="*/index.json.zstd"),
    "s3torchconnector": Recipe(
        S3TorchConnector, (TORCH, "s3torchconnector"), "s3torchconnector", cache=False, serial=True
    ),
}
