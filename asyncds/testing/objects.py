"""What the server holds: buckets of objects in memory, and listings of them in key order."""

import hashlib
import time
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate
from functools import lru_cache

from asyncds.testing.wire import Response

_BINARY = "application/octet-stream"


@lru_cache(maxsize=64)
def http_date(seconds: int) -> str:
    return formatdate(seconds, usegmt=True)


@lru_cache(maxsize=64)
def iso_date(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(seconds))


def etag_of(body: bytes) -> str:
    return f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'


class StoredObject:
    """One immutable version of an object."""

    __slots__ = ("_response", "body", "content_type", "etag", "modified")

    def __init__(self, body: bytes, content_type: str = _BINARY) -> None:
        self.body = body
        self.etag = etag_of(body)
        self.content_type = content_type
        self.modified = int(time.time())
        self._response: Response | None = None

    def headers(self) -> dict[str, str]:
        return {
            "ETag": self.etag,
            "Last-Modified": http_date(self.modified),
            "Accept-Ranges": "bytes",
            "Content-Type": self.content_type,
        }

    def response(self) -> Response:
        """Return the answer to a plain GET; the same instance each time, so its head is rendered once."""
        if self._response is None:
            self._response = Response(200, self.headers(), self.body)
        return self._response


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a listing; `resume` is the smallest key that the next page may hold, None after the last page."""

    keys: list[bytes]
    prefixes: list[bytes]
    resume: bytes | None


def after_key(key: bytes) -> bytes:
    return key + b"\0"


def after_prefix(prefix: bytes) -> bytes:
    # UTF-8 never contains 0xFF, so the last byte can always be raised.
    return prefix[:-1] + bytes([prefix[-1] + 1])


class Bucket:
    """Objects by key, listed in UTF-8 byte order."""

    def __init__(self) -> None:
        self.objects: dict[bytes, StoredObject] = {}
        self._sorted: list[bytes] | None = None

    def put(self, key: bytes, stored: StoredObject) -> None:
        if key not in self.objects:
            self._sorted = None
        self.objects[key] = stored

    def delete(self, key: bytes) -> None:
        if self.objects.pop(key, None) is not None:
            self._sorted = None

    def page(self, prefix: bytes, delimiter: bytes, start: bytes, limit: int) -> Page:
        """List at most `limit` keys and common prefixes, none of them before `start`."""
        if self._sorted is None:
            self._sorted = sorted(self.objects)
        page = Page([], [], None)
        position = bisect_left(self._sorted, max(prefix, start))
        while position < len(self._sorted) and (key := self._sorted[position]).startswith(prefix):
            if len(page.keys) + len(page.prefixes) == limit:
                return Page(page.keys, page.prefixes, start) if limit else page
            cut = key.find(delimiter, len(prefix)) if delimiter else -1
            if cut < 0:
                page.keys.append(key)
                start = after_key(key)
                position += 1
            else:
                page.prefixes.append(key[: cut + len(delimiter)])
                start = after_prefix(page.prefixes[-1])
                position = bisect_left(self._sorted, start, position)
        return page


class Store:
    """Buckets by name."""

    def __init__(self, region: str | None = None) -> None:
        self.region = region
        self.buckets: dict[str, Bucket] = {}

    def create_bucket(self, name: str) -> Bucket:
        return self.buckets.setdefault(name, Bucket())

    def put_many(self, bucket: str, objects: Mapping[str, bytes]) -> list[str]:
        """Store objects, creating the bucket where needed; return their ETags in the mapping's order."""
        target = self.create_bucket(bucket)
        etags = []
        for key, body in objects.items():
            stored = StoredObject(bytes(body))
            target.put(key.encode(), stored)
            etags.append(stored.etag)
        return etags

    def delete(self, bucket: str, key: str) -> None:
        if bucket in self.buckets:
            self.buckets[bucket].delete(key.encode())
