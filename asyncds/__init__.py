"""Async, cached datasets for PyTorch: millions of small objects in S3 or MinIO, read at the speed of a local disk.

    from asyncds import CachedS3MapDataset

    dataset = CachedS3MapDataset.from_prefix("s3://mnist/train", transform=...)
    loader = DataLoader(dataset, batch_size=200, shuffle=True, num_workers=4)

Names are loaded when they are first used: importing asyncds imports neither torch nor botocore.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if sys.platform == "win32":
    raise ImportError("asyncds runs on Linux and macOS, not on Windows: use WSL")

if TYPE_CHECKING:
    from asyncds.cache import Cache
    from asyncds.dataset import CachedS3MapDataset
    from asyncds.errors import AsyncdsError
    from asyncds.fetcher import Fetcher
    from asyncds.loading import loader
    from asyncds.lookahead import LookaheadBatchSampler
    from asyncds.manifest import Manifest, ObjectInfo
    from asyncds.reader import S3Reader
    from asyncds.retry import Retry
    from asyncds.settings import Settings
    from asyncds.store import Connection, ObjectStore, S3Store
    from asyncds.vision import ImageTransform

__version__ = "0.1.0"

_HOMES = {
    "AsyncdsError": "asyncds.errors",
    "Cache": "asyncds.cache",
    "CachedS3MapDataset": "asyncds.dataset",
    "Connection": "asyncds.store",
    "Fetcher": "asyncds.fetcher",
    "ImageTransform": "asyncds.vision",
    "LookaheadBatchSampler": "asyncds.lookahead",
    "Manifest": "asyncds.manifest",
    "ObjectInfo": "asyncds.manifest",
    "ObjectStore": "asyncds.store",
    "Retry": "asyncds.retry",
    "S3Reader": "asyncds.reader",
    "S3Store": "asyncds.store",
    "Settings": "asyncds.settings",
    "loader": "asyncds.loading",
}

__all__ = [
    "AsyncdsError",
    "Cache",
    "CachedS3MapDataset",
    "Connection",
    "Fetcher",
    "ImageTransform",
    "LookaheadBatchSampler",
    "Manifest",
    "ObjectInfo",
    "ObjectStore",
    "Retry",
    "S3Reader",
    "S3Store",
    "Settings",
    "loader",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'asyncds' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
