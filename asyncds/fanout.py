"""Listing a prefix in many places at once: ranges of keys, each read page by page, and divided as long as it pays.

Nobody knows beforehand where the keys are. So the listing begins as one range, and each full page that a range brings
lets it give away parts of what is ahead of it: at folders, if the store names some there, or else at a key that
is guessed from the characters seen so far. A guess that lands in the void costs one request, and shrinks the range that
made it.
"""

import asyncio
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise

from asyncds.errors import TransferFailed
from asyncds.listing import Rows, list_prefix
from asyncds.manifest import KeyFilter, Manifest, together
from asyncds.store.base import ObjectStore, Pages, stands_for

__all__ = ["list_store", "midway"]

_AT_ONCE = 8
_PAGES_PER_SPLIT = 4
_PIECES = 8
_LEVELS = 4


class _OutOfOrder(Exception):
    """The store does not list in UTF-8 order of keys, or not from where it was told to."""


async def list_store(
    store: ObjectStore,
    bucket: str,
    prefix: str,
    *,
    match: KeyFilter | None = None,
    limit: int | None = None,
    progress: Callable[[int], object] | None = None,
    at_once: int = _AT_ONCE,
) -> Manifest:
    """List a prefix as `list_prefix` does, with the same table, and up to `at_once` requests in flight.

    Of a store that can begin behind a key (`Pages`); any other, a listing with a `limit`, and a directory bucket (S3
    Express, which is in no order) are read one page after the other. Takes at most a quarter more requests than that
    and `at_once` + 5 more, and none more where all is on one page. `progress` is called after each answer with its
    number of keys; with less than none, if the listing begins anew. A failing page fails the listing, once all others
    have ended.
    """
    counted = 0

    def count(keys: int) -> None:
        nonlocal counted
        counted += keys
        if progress is not None:
            progress(keys)

    if (
        isinstance(store, Pages)
        and stands_for(store, "page", "list")
        and limit is None
        and at_once > 1
        and not bucket.endswith("--x-s3")
    ):
        try:
            return await _Listing(store, bucket, prefix, match, count, at_once).run(store.endpoint)
        except _OutOfOrder:
            count(-counted)  # and from the beginning
    pages = store.list(bucket, prefix)
    return await list_prefix(
        pages, endpoint=store.endpoint, bucket=bucket, prefix=prefix, match=match, limit=limit, progress=count
    )


class _Range:
    """Keys above `after`, up to `until`, and the rows that were found there.

    `first` is the first key that the store named, and `beyond` the first one that was above `until`.
    """

    def __init__(self, after: str, until: str | None, rows: Rows) -> None:
        self.after = after
        self.until = until
        self.rows = rows
        self.first: str | None = None
        self.beyond: str | None = None


class _Listing:
    """One listing under way. All of it runs on one event loop, which is why nothing here is locked."""

    def __init__(
        self,
        store: Pages,
        bucket: str,
        prefix: str,
        match: KeyFilter | None,
        progress: Callable[[int], object],
        at_once: int,
    ) -> None:
        self._store = store
        self._bucket = bucket
        self._prefix = prefix
        self._match = match
        self._progress = progress
        self._at_once = at_once
        self._ranges: list[_Range] = []
        self._reading = 0
        self._full_pages = 0
        self._letters: set[str] = set()
        # Some stores list in the order of UTF-16, where a page may well ascend in both. A range ends at the first key
        # above its last: if the next range does not begin with the same, keys lie between that neither has seen.
        # Where all keys are ASCII, the orders are the same, and what is written meanwhile may make that difference.
        self._ascii = True
        self._folders: list[str] = []
        self._tasks = asyncio.TaskGroup()

    async def run(self, endpoint: str) -> Manifest:
        try:
            async with self._tasks:
                self._start("", None)
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        self._ranges.sort(key=lambda some: some.after)
        if not self._ascii and any(one.beyond != other.first for one, other in pairwise(self._ranges)):
            raise _OutOfOrder
        return together([some.rows.table(endpoint) for some in self._ranges])

    def _start(self, after: str, until: str | None) -> None:
        some = _Range(after, until, Rows(self._bucket, self._prefix, self._match))
        self._ranges.append(some)
        self._reading += 1
        self._tasks.create_task(self._read(some))

    async def _read(self, some: _Range) -> None:
        token, seen, last = None, set[str](), some.after
        while True:
            page = await self._store.page(self._bucket, self._prefix, after=some.after, token=token)
            keys = [info.key for info in page.objects]
            if any(key <= before for before, key in zip([last, *keys], keys, strict=False)):
                raise _OutOfOrder
            self._ascii = self._ascii and all(map(str.isascii, keys))
            within = len(keys) if some.until is None else bisect_right(keys, some.until)
            some.first = some.first or next(iter(keys), None)
            some.beyond = next(iter(keys[within:]), None)
            some.rows.add(page.objects[:within])
            self._progress(within)
            if page.token is None or within < len(keys):
                break
            if page.token in seen:
                raise TransferFailed(f"listing s3://{self._bucket}/{self._prefix}: the store leads in a circle")
            seen.add(token := page.token)
            if keys:
                last = keys[-1]
                await self._divide(some, keys[0], last)
        self._reading -= 1

    async def _divide(self, some: _Range, first: str, last: str) -> None:
        """Give parts of what a range has ahead to new ones, as far as requests are left for that."""
        self._full_pages += 1
        self._letters.update(first, last)
        if self._full_pages == 1:
            self._folders = await self._found_folders()
        left = self._at_once + self._full_pages // _PAGES_PER_SPLIT + 1 - len(self._ranges)
        count = min(_PIECES, left, self._at_once - self._reading)
        for middle in reversed(self._middles(last, some.until, count) if count > 0 else []):
            self._start(middle, some.until)
            some.until = middle

    def _middles(self, last: str, until: str | None, count: int) -> list[str]:
        """Where to divide what lies ahead: evenly at folders, or else at one key that is guessed."""
        ahead = bisect_right(self._folders, last)
        beyond = len(self._folders) if until is None else bisect_left(self._folders, until)
        if ahead < beyond:
            pieces = min(count, beyond - ahead) + 1
            return [self._folders[ahead + (beyond - ahead) * piece // pieces] for piece in range(1, pieces)]
        middle = midway(last, until, len(self._prefix), self._letters)
        return [] if middle is None else [middle]

    async def _found_folders(self) -> list[str]:
        """The first folders below the prefix, on the first level that has more than one."""
        folders: Sequence[str] = [self._prefix]
        for _ in range(_LEVELS):
            folders = await self._store.folders(self._bucket, folders[0])
            self._progress(0)
            if len(folders) != 1:
                break
        return sorted(folders)


def midway(low: str, high: str | None, start: int, letters: set[str]) -> str | None:
    """A key between two, about in the middle of those that these letters make; None if there is none such.

    All keys agree up to `start`. In Python, texts compare as their UTF-8 does.
    """
    usual = sorted(letters)
    for place in range(start, len(low)):
        stem, here = low[:place], low[place]
        above = [letter for letter in usual if letter > here and (high is None or stem + letter < high)]
        if above:
            return stem + above[len(above) // 2]
    return None
