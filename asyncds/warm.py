"""Bring a whole table into the cache, before training needs it."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncds.cache import Cache
from asyncds.errors import AsyncdsError, DatasetClosed, EndpointUnreachable
from asyncds.large import LARGE, PART
from asyncds.lookup import resident
from asyncds.manifest import Manifest, ObjectInfo
from asyncds.progress import Advance

if TYPE_CHECKING:
    from asyncds.fetcher import Fetcher

__all__ = ["Missing", "Plan", "WarmReport", "planned", "warm"]

_LOOKUP = 200
_HOPELESS = 100


class WarmReport(NamedTuple):
    """What a warm-up found and did: `resident` were cached when it came to them, `fetched` it brought itself, `shared`
    came by another process meanwhile; `bytes` are those of the last two. `uncached` counts what did not fit, most of
    which was not fetched either.
    """

    objects: int
    resident: int
    fetched: int
    shared: int
    bytes: int
    uncached: int
    failures: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        lines = f"{self.objects:,} objects: {self.resident:,} were cached, {self.fetched:,} fetched"
        lines += f", {self.shared:,} brought by others" if self.shared else ""
        lines += f" ({self.bytes / 1e6:,.1f} MB in {self.seconds:.1f} s)"
        if self.uncached:
            lines += f", {self.uncached:,} did not fit into the cache"
        return lines + (f", {len(self.failures):,} failed" if self.failures else "")


class Plan(NamedTuple):
    """What a warm-up would do: `gets` requests for `bytes`, after the `lists` that the listing took; `room` is what
    is free.

    `seconds` is what the requests take at the least, at the round trip that was measured; None where none was.
    """

    objects: int
    resident: int
    lists: int
    gets: int
    bytes: int
    room: int
    seconds: float | None = None

    def __str__(self) -> str:
        text = f"{self.objects:,} objects: {self.resident:,} are cached; LIST {self.lists:,}, GET {self.gets:,}"
        text += f" would bring {self.bytes / 1e6:,.1f} MB"
        if self.seconds is not None:
            text += f" in {self.seconds:,.1f} s or more"
        return text + ("" if self.bytes <= self.room else f"; {max(0, self.room) / 1e6:,.1f} MB are free")


class Missing:
    """Rows of a manifest that the cache does not have, found 200 at a time while they are consumed; `advance` is told
    of all others.

    Those that the cache has no room for, or that `admits` does not want, are left out, and counted in `unfit`.
    """

    def __init__(
        self,
        cache: Cache,
        endpoint: str,
        manifest: Manifest,
        rows: NDArray[np.int64],
        admits: Callable[[int], bool],
        tag: str,
        advance: Advance,
    ) -> None:
        self.total = len(rows)
        self.resident = 0
        self.unfit = 0
        self._cache = cache
        self._endpoint = endpoint
        self._manifest = manifest
        self._rows = rows
        self._admits = admits
        self._tag = tag
        self._advance = advance

    async def chunks(self) -> AsyncGenerator[list[ObjectInfo], None]:
        """Look in a thread, and yield what is missing of 200 at a time: a million that are there hold nobody up."""
        for start in range(0, self.total, _LOOKUP):
            looked_at = self._rows[start : start + _LOOKUP]
            found = await asyncio.to_thread(self._missing, looked_at)
            self._advance(len(looked_at) - len(found))
            yield found

    def _missing(self, rows: NDArray[np.int64]) -> list[ObjectInfo]:
        infos = self._manifest.rows(rows)
        present = resident(self._cache, self._endpoint, infos)
        self.resident += sum(present)
        absent = [info for info, there in zip(infos, present, strict=True) if not there]
        room = self._cache.make_room(sum(info.size or 0 for info in absent), self._tag) if absent else 0
        found = []
        for info in absent:
            if self._fits(info, room):
                room -= info.size or 0
                found.append(info)
        self.unfit += len(absent) - len(found)
        return found

    def _fits(self, info: ObjectInfo, room: int) -> bool:
        if info.size is None:
            return not self._cache.full
        return info.size <= room and self._admits(info.size)


def planned(
    cache: Cache, endpoint: str, manifest: Manifest, rows: NDArray[np.int64], advance: Advance
) -> tuple[Plan, ObjectInfo | None]:
    """What warming these rows would take, and one of the objects that it would bring. Nothing is touched."""
    cached, gets, size, one = 0, 0, 0, None
    for start in range(0, len(rows), _LOOKUP):
        infos = manifest.rows(rows[start : start + _LOOKUP])
        present = resident(cache, endpoint, infos)
        missing = [info for info, there in zip(infos, present, strict=True) if not there]
        sizes = [info.size or 0 for info in missing]
        cached += sum(present)
        size += sum(sizes)
        gets += sum(-(-each // PART) if each > LARGE else 1 for each in sizes)
        one = one or next(iter(missing), None)
        advance(len(infos))
    return Plan(len(rows), cached, 0, gets, size, cache.room()), one


async def warm(fetcher: "Fetcher", missing: Missing, advance: Advance) -> WarmReport:
    """Download what is missing, and report; whatever ends it, the cache has what arrived when it returns or raises.

    Failures of single objects are collected. A store that cannot be reached, or that has given nothing after 100
    failures, raises what it raised.
    """
    started, before, done = time.monotonic(), fetcher.uncached, fetcher.done
    arrived, size, failures = 0, 0, list[str]()
    try:
        async with aclosing(fetcher.outcomes(missing.chunks())) as outcomes:
            async for _, result in outcomes:
                if isinstance(result, DatasetClosed | EndpointUnreachable):
                    raise result
                if isinstance(result, AsyncdsError):
                    failures.append(str(result))
                    if not arrived and len(failures) >= _HOPELESS:
                        raise result
                else:
                    arrived, size = arrived + 1, size + len(result.body)
                    del result  # or it is held until the next one is there
                seconds = max(time.monotonic() - started, 1e-3)
                rate = f"{size / 1e6:,.1f} MB, {arrived / seconds:,.0f}/s, {size / 1e6 / seconds:,.1f} MB/s"
                advance(1, note=f"{rate}, {len(failures):,} failed, {fetcher.in_flight:,} in flight")
    finally:
        await fetcher.flush()
    uncached = missing.unfit + fetcher.uncached - before
    fetched = min(arrived, fetcher.done - done)  # what else is brought here meanwhile does not count
    report = WarmReport(missing.total, missing.resident, fetched, arrived - fetched, size, uncached, tuple(failures), 0)
    return report._replace(seconds=time.monotonic() - started)
