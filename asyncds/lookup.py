"""Find objects in the cache, many at a time, in the calling thread: no event loop is touched."""

from collections.abc import Sequence
from typing import NamedTuple

from asyncds.cache import Cache
from asyncds.entry import entry_key, object_id
from asyncds.large import StoredBody
from asyncds.manifest import ObjectInfo

__all__ = ["Fetched", "identify", "lookup", "resident"]


class Fetched(NamedTuple):
    """An object as it was served: `info` has its true size and ETag. A large body that is cached stays on disk."""

    info: ObjectInfo
    body: bytes | StoredBody


def lookup(
    cache: Cache, endpoint: str, infos: Sequence[ObjectInfo], tag: str | None = None
) -> tuple[list[ObjectInfo], list[Fetched | None]]:
    """Find objects in the cache without touching an event loop.

    Returns the objects, now with the ETag of the version first seen where none was listed, and what is cached of each.
    """
    known, keys = identify(cache, endpoint, infos)
    entries = iter(cache.get_many([key for key in keys if key is not None], tag))
    found: list[Fetched | None] = []
    for info, key in zip(known, keys, strict=True):
        entry = next(entries) if key is not None else None
        if entry is not None and key is not None and info.size not in (None, len(entry.body)):
            cache.remove([key])  # the store gives two contents the same ETag
            entry = None
        served = entry and Fetched(ObjectInfo(info.bucket, info.key, len(entry.body), entry.etag), entry.body)
        found.append(served or None)
    return known, found


def resident(cache: Cache, endpoint: str, infos: Sequence[ObjectInfo]) -> list[bool]:
    """Tell which objects the cache has, without reading them."""
    _, keys = identify(cache, endpoint, infos)
    present = cache.present([key for key in keys if key is not None])
    return [key in present for key in keys]


def identify(cache: Cache, endpoint: str, infos: Sequence[ObjectInfo]) -> tuple[list[ObjectInfo], list[bytes | None]]:
    """The objects with the ETag they are known by, and their cache keys; None for one whose version nobody knows."""
    ids = [object_id(endpoint, info.bucket, info.key) for info in infos]
    unlisted = [position for position, info in enumerate(infos) if info.etag is None]
    known = list(infos)
    if unlisted:
        for position, etag in zip(unlisted, cache.first_seen([ids[p] for p in unlisted]), strict=True):
            known[position] = infos[position]._replace(etag=etag)
    return known, [None if info.etag is None else entry_key(id, info.etag) for id, info in zip(ids, known, strict=True)]
