"""What the server holds: buckets of objects in memory, and listings of them in key order."""

import hashlib
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from functools import lru_cache
from typing import Any

from asyncds.errors import ConfigurationError
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


def body_of(key: str, size: int) -> bytes:
    """Return `size` bytes that follow from the key, so that a test needs no copy to see that one of them is wrong."""
    return hashlib.shake_128(key.encode()).digest(size)


class StoredObject:
    """One immutable version of an object."""

    __slots__ = ("_response", "body", "content_type", "etag", "modified", "size")

    def __init__(self, body: bytes, content_type: str = _BINARY) -> None:
        self.body = body
        self.size = len(body)
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
        self.objects: Mapping[bytes, StoredObject] = {}
        self._sorted: Sequence[bytes] | None = None

    def put(self, key: bytes, stored: StoredObject) -> None:
        if key not in self.objects:
            self._sorted = None
        self._own()[key] = stored

    def delete(self, key: bytes) -> None:
        if self._own().pop(key, None) is not None:
            self._sorted = None

    def _own(self) -> dict[bytes, StoredObject]:
        if not isinstance(self.objects, dict):
            raise ConfigurationError("the objects of this bucket follow from their keys: it takes no others")
        return self.objects

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


class _Derived(StoredObject):
    """An object whose body is made from its key each time that somebody asks for it.

    Its ETag says by its "-1", as S3's of an upload in parts do, that it is no MD5.
    """

    __slots__ = ("_key",)

    def __init__(self, key: bytes, size: int, modified: int) -> None:
        self._key, self.size, self.modified = key.decode(), size, modified
        self.etag = f'"{hashlib.shake_128(b"etag of " + key).hexdigest(16)}-1"'
        self.content_type = _BINARY
        self._response = None

    @property
    def body(self) -> bytes:  # type: ignore[override]
        return body_of(self._key, self.size)


class _DerivedKeys(Sequence[bytes]):
    """Keys in order: a prefix, and a number of as many digits as the last one has."""

    def __init__(self, prefix: str, count: int) -> None:
        self._prefix, self._count, self._digits = prefix, count, len(str(count - 1))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < self._count:
            raise IndexError(place)
        return f"{self._prefix}{place:0{self._digits}}".encode()

    def __contains__(self, key: object) -> bool:
        number = bytes(key)[-self._digits :] if isinstance(key, bytes) else b""
        return number.isdigit() and int(number) < self._count and self[int(number)] == key


class DerivedBucket(Bucket):
    """Objects that take no memory, however many there are."""

    def __init__(self, count: int, size: int, prefix: str) -> None:
        super().__init__()
        self._sorted = _DerivedKeys(prefix, count)
        self.objects = _DerivedObjects(self._sorted, size)


class _DerivedObjects(Mapping[bytes, StoredObject]):
    def __init__(self, keys: _DerivedKeys, size: int) -> None:
        self._keys, self._size, self._modified = keys, size, int(time.time())

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._keys)

    def __getitem__(self, key: bytes) -> StoredObject:
        if key not in self._keys:
            raise KeyError(key)
        return _Derived(key, self._size, self._modified)


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

    def derive(self, bucket: str, count: int, size: int, prefix: str) -> None:
        """Put a bucket of derived objects in the place of what is there."""
        self.buckets[bucket] = DerivedBucket(count, size, prefix)

    def delete(self, bucket: str, key: str) -> None:
        if bucket in self.buckets:
            self.buckets[bucket].delete(key.encode())
