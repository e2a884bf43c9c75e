"""The seam between asyncds and a store."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import NamedTuple, NoReturn, Protocol, runtime_checkable

from asyncds.errors import StoreError
from asyncds.manifest import ObjectInfo

__all__ = [
    "Drop",
    "First",
    "NoParts",
    "ObjectStore",
    "Outcome",
    "Page",
    "Pages",
    "Reserve",
    "failed",
    "no_bound",
    "stands_for",
]

Reserve = Callable[[int], None]
Drop = Callable[[], None]
"""Ends a request early: who is to be told of it is told so at once. Does nothing to one that is over."""
First = Callable[[], Awaitable[tuple[ObjectInfo, bytes]]]
"""The attempt to read an object that goes before all others."""


class NoParts(StoreError):
    """The store sends objects as a whole only."""


def stands_for(store: object, shortcut: str, method: str) -> bool:
    """Whether a store's `shortcut` does what its `method` does: not where a class below the one that the shortcut comes
    from has changed the method, nor where something is wrapped around the store."""
    mro = type(store).__mro__
    homes = [next((place for place, home in enumerate(mro) if name in vars(home)), None) for name in (shortcut, method)]
    return None not in homes and homes[0] <= homes[1]  # type: ignore[operator]


def failed(error: BaseException) -> First:
    """An attempt that has ended so."""

    async def attempt() -> NoReturn:
        raise error

    return attempt


class Outcome(Protocol):
    """Who is told what has become of one attempt: by a call of one of these, on the loop."""

    def came(self, served: ObjectInfo, body: bytes) -> None:
        """What `ObjectStore.get` would return."""

    def otherwise(self, first: First) -> None:
        """A task has to see to it: `first` goes on with the attempt, or raises how it ended."""


def no_bound(size: int) -> None:
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

    async def get(
        self, info: ObjectInfo, reserve: Reserve = no_bound, part: slice | None = None
    ) -> tuple[ObjectInfo, bytes]:
        """Make one attempt to read the object. Return what the store says it served (key, size, ETag), and the bytes.

        Where `info` names a size, no more than one byte above it is ever held; where it names none, `reserve(size)` is
        called as soon as the size is known, before the body is read: it raises, no `Exception`, where there is no room.
        Where `info` names an ETag, another version raises `ObjectChanged`, if the store can tell. `part` asks for these
        bytes only, and is given for objects above 16 MiB, with their size; the size returned is the object's all the
        same. A store that cannot do that raises `NoParts`, and is asked for the whole.
        """
        ...

    async def head(self, bucket: str, key: str) -> ObjectInfo:
        """Return size and ETag without the bytes. Raise `ObjectNotFound`."""
        ...


class Page(NamedTuple):
    """Part of a listing, and what to ask for the rest by: None where there is none."""

    objects: Sequence[ObjectInfo]
    token: str | None


@runtime_checkable
class Pages(Protocol):
    """What a store can have beside the three methods: then its listings are read in many places at once."""

    async def page(self, bucket: str, prefix: str, *, after: str = "", token: str | None = None) -> Page:
        """Return one page of a listing in UTF-8 order, retried: behind the key `after`, or where a token says."""
        ...

    async def folders(self, bucket: str, prefix: str) -> Sequence[str]:
        """Return what keys begin with from the prefix to the next slash: as many as fit on a page, retried."""
        ...
