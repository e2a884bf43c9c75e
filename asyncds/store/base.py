"""The seam between asyncds and a store."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Protocol, runtime_checkable

from asyncds.manifest import ObjectInfo

__all__ = ["ObjectStore", "Reserve"]

Reserve = Callable[[int], Awaitable[None]]


async def no_bound(size: int) -> None:
    """There is room for everything."""


@runtime_checkable
class ObjectStore(Protocol):
    """A source of objects. Implement these three methods, and a dataset reads from it.

    All three run on the event loop of the portal, many at once, and may be cancelled at any await. They raise errors
    of `asyncds.errors`: one whose class is `transient` is retried by the caller. An optional coroutine method
    `aclose()` is awaited at the end.
    """

    @property
    def endpoint(self) -> str:
        """The store's identity, part of every cache key: two stores that may differ have different ones."""
        ...

    def list(self, bucket: str, prefix: str) -> AsyncGenerator[Sequence[ObjectInfo], None]:
        """Yield pages of all objects whose key starts with `prefix`, in any order, each object once."""
        ...

    async def get(self, info: ObjectInfo, reserve: Reserve = no_bound) -> tuple[ObjectInfo, bytes]:
        """Make one attempt to read the object. Return what the store says it served (key, size, ETag), and the bytes.

        Where `info` names a size, no more than one byte above it is ever held; where it names none, `reserve(size)` is
        awaited as soon as the size is known, before the body is read: it returns when there is room for so many bytes.
        Where `info` names an ETag, another version raises `ObjectChanged`, if the store can tell.
        """
        ...

    async def head(self, bucket: str, key: str) -> ObjectInfo:
        """Return size and ETag without the bytes. Raise `ObjectNotFound`."""
        ...
