"""A store in memory, for tests of what stands on a store."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from asyncds.errors import AsyncdsError, BucketNotFound, ObjectChanged, ObjectNotFound
from asyncds.manifest import ObjectInfo

__all__ = ["FakeStore"]


@dataclass
class FakeStore:
    """An `ObjectStore` on a dict: `FakeStore({("bucket", "key"): b"bytes"})`. A bucket exists while it has an object.

    `gates` maps a key to an event: a GET of it waits until that is set. `failures` maps a key to errors: a GET of it
    takes the first off the list and raises it. `gets` counts GETs by key, `calls` the other methods.
    """

    objects: dict[tuple[str, str], bytes] = field(default_factory=dict)
    endpoint: str = "fake://store"
    page_size: int = 1000
    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    failures: dict[str, list[AsyncdsError]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    gets: Counter[str] = field(default_factory=Counter)
    in_flight: int = 0
    max_in_flight: int = 0
    closed: bool = False

    def info(self, bucket: str, key: str) -> ObjectInfo:
        """Return what a listing says of an object."""
        if (bucket, key) not in self.objects and self._keys(bucket):
            raise ObjectNotFound(f"{ObjectInfo(bucket, key).uri}: the object does not exist")
        body = self.objects[bucket, key]
        return ObjectInfo(bucket, key, len(body), hashlib.md5(body, usedforsecurity=False).hexdigest())

    async def reached(self, in_flight: int) -> None:
        """Return once so many GETs are in flight; to be awaited on the loop that they run on."""
        while self.in_flight < in_flight:
            await asyncio.sleep(0)

    async def list(self, bucket: str, prefix: str) -> AsyncGenerator[Sequence[ObjectInfo], None]:
        self.calls["list"] += 1
        keys = sorted((key for key in self._keys(bucket) if key.startswith(prefix)), key=str.encode)
        for start in range(0, len(keys), self.page_size):
            yield [self.info(bucket, key) for key in keys[start : start + self.page_size]]

    async def get(
        self,
        info: ObjectInfo,
        reserve: Callable[[int], None] | None = None,
        part: slice | None = None,
    ) -> tuple[ObjectInfo, bytes]:
        self.gets[info.key] += 1
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            if info.key in self.gates:
                await self.gates[info.key].wait()
            if self.failures.get(info.key):
                raise self.failures[info.key].pop(0)
            served = self.info(info.bucket, info.key)
            if info.etag not in (None, served.etag):
                raise ObjectChanged(f"{info.uri}: the object changed")
            body = self.objects[info.bucket, info.key]
            if info.size is None and reserve is not None:
                reserve(len(body))
            return served, body if part is None else body[part]
        finally:
            self.in_flight -= 1

    async def head(self, bucket: str, key: str) -> ObjectInfo:
        self.calls["head"] += 1
        return self.info(bucket, key)

    async def aclose(self) -> None:
        self.closed = True

    def _keys(self, bucket: str) -> set[str]:
        keys = {key for name, key in self.objects if name == bucket}
        if not keys:
            raise BucketNotFound(f"s3://{bucket}: the bucket does not exist at this endpoint")
        return keys
