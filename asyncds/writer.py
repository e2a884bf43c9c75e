"""Into the cache, off the loop: as many objects at once as have gathered, so that storing never holds up receiving."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from asyncds.cache import Cache
from asyncds.entry import NewEntry

__all__ = ["Writer"]

T = TypeVar("T")

_log = logging.getLogger(__name__)
_BATCH_ENTRIES = 256
_BATCH_BYTES = 8 << 20


class Writer:
    """Stores entries of one dataset on a thread of its own, in the order in which they come.

    Lives on one event loop. What waits to be stored is bounded by who puts it there.
    """

    def __init__(self, cache: Cache, tag: str) -> None:
        self._cache = cache
        self._tag = tag
        self._unwritten: deque[tuple[NewEntry, Callable[[bool], object]]] = deque()
        self._writing: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="asyncds-writer")

    def put(self, entry: NewEntry, done: Callable[[bool], object]) -> None:
        """Store an entry, and then call `done` with whether the cache has it."""
        self._unwritten.append((entry, done))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())

    def run(self, function: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        """Call a function on the thread, after what was put there before."""
        return asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def flush(self) -> None:
        """Wait until the cache has what was put here so far."""
        while self._writing is not None and not self._writing.done():
            await asyncio.wait([self._writing])

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """As `run`; here, where threads are given no more work: when the interpreter is about to end."""
        try:
            working = self.run(function, *arguments)
        except RuntimeError:
            await asyncio.sleep(0)
            return function(*arguments)
        return await working

    async def aclose(self, patience: float) -> None:
        """Store what is here, as far as that takes no more than so many seconds, and end the thread."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self.flush()
        dropped, self._unwritten = self._unwritten, deque()
        for _, done in dropped:
            _tell(done, False)
        self._thread.shutdown(wait=self._writing is None or self._writing.done())

    async def _write(self) -> None:
        while self._unwritten:
            batch = self._next_batch()
            entries = [entry for entry, _ in batch]
            try:
                stored = await self.call(self._cache.put_each, entries, self._tag)
            except Exception:  # the cache is advisory: those who wait have their objects
                stored = [False] * len(entries)
                _log.exception("objects could not be cached")
            for (_, done), there in zip(batch, stored, strict=True):
                _tell(done, there)

    def _next_batch(self) -> list[tuple[NewEntry, Callable[[bool], object]]]:
        batch, size = list[tuple[NewEntry, Callable[[bool], object]]](), 0
        while self._unwritten and len(batch) < _BATCH_ENTRIES and size < _BATCH_BYTES:
            batch.append(self._unwritten.popleft())
            size += len(batch[-1][0].body)
        return batch


def _tell(done: Callable[[bool], object], there: bool) -> None:
    try:
        done(there)
    except Exception:  # the others are to be told all the same
        _log.exception("whether an object was cached could not be told")
