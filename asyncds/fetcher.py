"""Bring objects into the cache: bounded concurrency, one download per object, retries, verification."""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Self

from asyncds.cache import Cache
from asyncds.entry import NewEntry, entry_key, object_id
from asyncds.errors import AsyncdsError, DatasetClosed, ObjectChanged, TransferFailed
from asyncds.manifest import ObjectInfo
from asyncds.retry import Retry
from asyncds.stats import Counters
from asyncds.store.base import ObjectStore

__all__ = ["Fetched", "Fetcher", "Memory", "lookup"]

_log = logging.getLogger(__name__)
_MEMORY = 32 << 20
_LOOKUP = 200
_STALE_S = 0.02
_SECONDS_BETWEEN_CLAIMS = 0.03
_SLOWEST = 1e6  # bytes per second below which a large object may miss its deadline
_UNLISTED = 64 << 10  # bytes that an object of unknown size is taken for at least, until its answer begins
_BATCH_ENTRIES = 256
_BATCH_BYTES = 8 << 20


class Fetched(NamedTuple):
    """An object as it was served: `info` has its true size and ETag."""

    info: ObjectInfo
    body: bytes


def lookup(cache: Cache, endpoint: str, infos: Sequence[ObjectInfo]) -> tuple[list[ObjectInfo], list[Fetched | None]]:
    """Find objects in the cache without touching an event loop.

    Returns the objects, now with the ETag of the version first seen where none was listed, and what is cached of each.
    """
    known, keys = identify(cache, endpoint, infos)
    entries = iter(cache.get_many([key for key in keys if key is not None]))
    found: list[Fetched | None] = []
    for info, key in zip(known, keys, strict=True):
        entry = next(entries) if key is not None else None
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


def verify(expected: ObjectInfo, served: ObjectInfo, body: bytes) -> None:
    """Compare what arrived with what the manifest names. Raises `TransferFailed` or `ObjectChanged`."""
    if expected.size is not None and len(body) != expected.size:
        raise TransferFailed(f"{expected.uri}: {len(body)} bytes arrived, {expected.size} were listed")
    if served.size is not None and len(body) != served.size:
        raise TransferFailed(f"{expected.uri}: {len(body)} bytes arrived, {served.size} were announced")
    if served.etag is None:
        raise TransferFailed(f"{expected.uri}: the store sent no ETag, so that no version can be told from another")
    if expected.etag is not None and served.etag != expected.etag:
        raise ObjectChanged(f"{expected.uri}: its ETag is {served.etag}, not {expected.etag}")


def _chunks(infos: Iterable[ObjectInfo]) -> Iterator[list[ObjectInfo]]:
    source = iter(infos)
    while chunk := list(islice(source, _LOOKUP)):
        yield chunk


class Memory:
    """Bytes that may be on their way between socket and disk: first come, first served; a giant goes alone."""

    def __init__(self, size: int = _MEMORY) -> None:
        self.size = size
        self._used = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, amount: int) -> None:
        """Wait until there is room for so many bytes, and take it; to be given back by `give_back`."""
        if not self._waiting and self._fits(amount):
            self._used += amount
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((amount, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(amount)
            raise

    def give_back(self, amount: int) -> None:
        self._used -= amount
        while self._waiting and (self._waiting[0][1].cancelled() or self._fits(self._waiting[0][0])):
            next_amount, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._used += next_amount
                turn.set_result(None)

    def _fits(self, amount: int) -> bool:
        return self._used == 0 or self._used + amount <= self.size


class _Turn:
    """A slot for one request, and room in memory for its answer. The room is kept where the attempt succeeds.

    Whoever has room has a slot, too, and goes on: nobody can wait for the one while others wait for the other.
    """

    def __init__(self, slots: asyncio.Semaphore, memory: Memory, size: int) -> None:
        self.size = size
        self._slots = slots
        self._memory = memory
        self._held = 0

    async def __aenter__(self) -> None:
        await self._slots.acquire()
        try:
            await self.hold(self.size)
        except BaseException:
            self._slots.release()
            raise

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._slots.release()
        if kind is not None:
            self.release()

    async def hold(self, size: int) -> None:
        """Hold room for so many bytes instead of what is held now. Nothing is held while waiting for more."""
        self.size = size
        if size <= self._held:
            self._memory.give_back(self._held - size)
        else:
            self.release()
            await self._memory.take(size)
        self._held = size

    def release(self) -> None:
        held, self._held = self._held, 0
        self._memory.give_back(held)


class Flight:
    """One download under way. `arrived` holds the object or the error; `task` ends when the cache has it, too."""

    def __init__(self, fly: Callable[[asyncio.Future[Fetched]], Coroutine[Any, Any, None]]) -> None:
        self.arrived: asyncio.Future[Fetched] = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(fly(self.arrived))


class _Window:
    """Downloads that were launched and not yet handed on, bounded in number and in bytes."""

    def __init__(self, fetcher: "Fetcher", size: int, memory: int) -> None:
        self._fetcher = fetcher
        self._size = size
        self._memory = memory
        self._held = 0
        self._finished = asyncio.Queue[tuple[ObjectInfo, asyncio.Task[Fetched], int]]()
        self.pending = set[asyncio.Task[Fetched]]()

    @property
    def full(self) -> bool:
        return len(self.pending) >= self._size or self._held >= self._memory

    def launch(self, info: ObjectInfo) -> None:
        amount = self._fetcher.expected_size(info)
        self._held += amount
        task = asyncio.create_task(self._settled(info))
        self.pending.add(task)
        task.add_done_callback(lambda task: self._land(info, task, amount))

    async def _settled(self, info: ObjectInfo) -> Fetched:
        """The object, once the cache has it."""
        flight = self._fetcher.start(info)
        await asyncio.wait([flight.task])
        return flight.arrived.result()

    def _land(self, info: ObjectInfo, task: asyncio.Task[Fetched], expected: int) -> None:
        size = 0 if task.cancelled() or task.exception() is not None else len(task.result().body)
        self._held += size - expected
        self._finished.put_nowait((info, task, size))

    async def next(self) -> tuple[ObjectInfo, Fetched | AsyncdsError]:
        info, task, amount = await self._finished.get()
        self.pending.discard(task)
        self._held -= amount
        error = task.exception()
        if error is None:
            return info, task.result()
        if isinstance(error, AsyncdsError):
            return info, error
        raise error

    async def close(self) -> None:
        for task in self.pending:
            task.cancel()
        await asyncio.gather(*self.pending, return_exceptions=True)


class Fetcher:
    """Downloads objects from a store into a cache, at most one download per object at a time.

    Lives on one event loop. At most `concurrency` requests are in flight, and 32 MiB between socket and disk; fetchers
    that are given the same `slots` and `memory` share these bounds.
    A waiter that is cancelled or times out does not disturb the download, nor others who wait for it. A failure is
    told to all who wait, once, and not remembered.

        async with Fetcher(store, cache, concurrency=64, retry=Retry(...)) as fetcher:
            async for info, body in fetcher.fetch(infos):
                ...
    """

    def __init__(
        self,
        store: ObjectStore,
        cache: Cache | None,
        *,
        concurrency: int,
        retry: Retry,
        tag: str = "",
        counters: Counters | None = None,
        slots: asyncio.Semaphore | None = None,
        memory: Memory | None = None,
    ) -> None:
        self._store = store
        self._cache = cache
        self._concurrency = concurrency
        self._slots = slots or asyncio.Semaphore(concurrency)
        self._retry = retry
        self._memory = memory or Memory()
        self._tag = tag
        self._counters = counters
        self._flights: dict[tuple[str, str, str | None], Flight] = {}
        self._unwritten: deque[tuple[NewEntry, asyncio.Future[None]]] = deque()
        self._writing: asyncio.Task[None] | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="asyncds-writer")
        self._looking: list[tuple[ObjectInfo, asyncio.Future[tuple[ObjectInfo, Fetched | None]]]] = []
        self._closed = False
        self._done = self._failed = self._bytes = 0

    def __repr__(self) -> str:
        return f"<Fetcher {len(self._flights)} in flight, {self._done} done, {self._failed} failed>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def get(self, info: ObjectInfo) -> Fetched:
        """Return one object, from the cache or the store.

        Raises what `asyncds.errors` lists under `StoreError`; `DatasetClosed` when the fetcher is closed meanwhile.
        """
        (info,), (found,) = self._lookup([info])
        return found if found is not None else await asyncio.shield(self.start(info).arrived)

    async def fetch(self, infos: Iterable[ObjectInfo]) -> AsyncGenerator[Fetched, None]:
        """Yield the objects as they arrive, in no particular order, each once; the first failure is raised.

        What is requested runs ahead of the consumer by at most twice the concurrency, and by the bytes of `memory`, as
        far as sizes are known beforehand: one who is slow holds it up.
        """
        async with contextlib.aclosing(self.outcomes(infos)) as outcomes:
            async for _, result in outcomes:
                if isinstance(result, BaseException):
                    raise result
                yield result

    async def outcomes(
        self, infos: Iterable[ObjectInfo]
    ) -> AsyncGenerator[tuple[ObjectInfo, Fetched | AsyncdsError], None]:
        """As `fetch`, with each failure in the place of its object."""
        window = _Window(self, 2 * self._concurrency, self._memory.size)
        try:
            for chunk in _chunks(infos):
                while chunk:
                    looked, (known, hits) = time.monotonic(), self._lookup(chunk)
                    place = 0
                    # A look-up that has grown old is made again: somebody may have fetched the rest meanwhile.
                    while place < len(chunk) and (place == 0 or time.monotonic() - looked < _STALE_S):
                        hit = hits[place]
                        if hit is not None:
                            yield known[place], hit
                        else:
                            window.launch(known[place])
                        while window.full:
                            yield await window.next()
                        place += 1
                    chunk = chunk[place:]
            while window.pending:
                yield await window.next()
        finally:
            await window.close()

    def start(self, info: ObjectInfo) -> Flight:
        """Start a download, or join the one under way. Does not look into the cache."""
        if self._closed:
            raise DatasetClosed("the fetcher is closed")
        key = (info.bucket, info.key, info.etag)
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = Flight(partial(self._fly, info))
            flight.task.add_done_callback(lambda _: self._landed(key, flight))
        return flight

    async def flush(self) -> None:
        """Wait until the cache has what has arrived so far."""
        while self._writing is not None and not self._writing.done():
            await asyncio.wait([self._writing])

    async def aclose(self) -> None:
        """Cancel what is under way, wait for it, and close the store. Whoever waits gets `DatasetClosed`."""
        self._closed = True
        tasks = [flight.task for flight in self._flights.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.flush()
        self._writer.shutdown()
        close = getattr(self._store, "aclose", None)
        if close is not None:
            await close()

    def expected_size(self, info: ObjectInfo) -> int:
        """Bytes of the object, as listed, or as the mean of the others lets expect."""
        return info.size if info.size is not None else max(_UNLISTED, self._bytes // max(1, self._done))

    def _lookup(self, infos: Sequence[ObjectInfo]) -> tuple[list[ObjectInfo], list[Fetched | None]]:
        if self._cache is None:
            return list(infos), [None] * len(infos)
        return lookup(self._cache, self._store.endpoint, infos)

    # one download

    async def _fly(self, info: ObjectInfo, arrived: asyncio.Future[Fetched]) -> None:
        async with self._claimed(info) as (info, found, waited):
            if found is not None:
                arrived.set_result(found)
            else:
                await self._download(info, arrived, waited)

    @contextlib.asynccontextmanager
    async def _claimed(self, info: ObjectInfo) -> AsyncGenerator[tuple[ObjectInfo, Fetched | None, float], None]:
        """Be the only one on this machine who brings the object, and look whether somebody has brought it just now.

        Yields what the object is known as, what the cache has of it, and how many seconds it took. Who waits for a
        process that stands still waits for a quarter of the deadline, and then brings the object as well.
        """
        if self._cache is None or self._cache.full:
            yield info, None, 0.0
            return
        id, now = object_id(self._store.endpoint, info.bucket, info.key), asyncio.get_running_loop().time
        started, claimed = now(), self._cache.claim(id)
        try:
            while not claimed and now() - started < self._retry.deadline / 4:
                await asyncio.sleep(_SECONDS_BETWEEN_CLAIMS)
                claimed = self._cache.claim(id)
            yield *await self._look_again(info), now() - started
        finally:
            if claimed:
                self._cache.unclaim(id)

    def _look_again(self, info: ObjectInfo) -> asyncio.Future[tuple[ObjectInfo, Fetched | None]]:
        """Look an object up, together with the others that come here in the same turn of the loop."""
        loop = asyncio.get_running_loop()
        if not self._looking:
            loop.call_soon(self._look_all_up)
        result: asyncio.Future[tuple[ObjectInfo, Fetched | None]] = loop.create_future()
        self._looking.append((info, result))
        return result

    def _look_all_up(self) -> None:
        looking, self._looking = self._looking, []
        answers = self._lookup([info for info, _ in looking])
        for (_, result), info, found in zip(looking, *answers, strict=True):
            if not result.done():
                result.set_result((info, found))

    async def _download(self, info: ObjectInfo, arrived: asyncio.Future[Fetched], waited: float) -> None:
        turn = _Turn(self._slots, self._memory, self.expected_size(info))
        try:
            attempt = partial(self._attempt, info, turn)
            fetched = await self._retry(attempt, info.uri, turn, turn.size / _SLOWEST - waited)
            await turn.hold(len(fetched.body))
            self._done += 1
            self._bytes += len(fetched.body)
            self._count(gets=1, bytes=len(fetched.body))
            arrived.set_result(fetched)
            if self._cache is not None:
                await self._publish(info, fetched)
        finally:
            turn.release()

    async def _attempt(self, info: ObjectInfo, turn: _Turn, clock: asyncio.Timeout) -> Fetched:
        served, body = await self._store.get(info, partial(self._make_room, turn, clock))
        verify(info, served, body)
        return Fetched(served, body)

    async def _make_room(self, turn: _Turn, clock: asyncio.Timeout, size: int) -> None:
        """Wait for room for a body whose size the answer has told; the deadline waits, too."""
        now, stop = asyncio.get_running_loop().time, clock.when()
        left = (stop or now()) - now()
        clock.reschedule(None)
        await turn.hold(size)
        clock.reschedule(now() + left)

    def _landed(self, key: tuple[str, str, str | None], flight: Flight) -> None:
        """Let go of a flight, and tell those who wait when it failed."""
        del self._flights[key]
        error = None if flight.task.cancelled() else flight.task.exception()
        if flight.arrived.done():
            return
        if error is None:
            error = DatasetClosed(f"s3://{key[0]}/{key[1]}: the dataset was closed before the object arrived")
        else:
            self._failed += 1
            self._count(failures=1)
        flight.arrived.set_exception(error)
        flight.arrived.exception()  # read once, so that a failure nobody waits for is not logged as lost

    def _count(self, **amounts: float) -> None:
        if self._counters is not None:
            self._counters.add(**amounts)

    # into the cache, off the loop, as many at once as have gathered

    async def _publish(self, asked: ObjectInfo, fetched: Fetched) -> None:
        info = fetched.info
        id = object_id(self._store.endpoint, info.bucket, info.key)
        entry = NewEntry(id, info.etag or "", fetched.body, first_seen=asked.etag is None)
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unwritten.append((entry, written))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())
        await written

    async def _write(self) -> None:
        assert self._cache is not None
        loop = asyncio.get_running_loop()
        while self._unwritten:
            batch = self._next_batch()
            entries = [entry for entry, _ in batch]
            try:
                stored = await loop.run_in_executor(self._writer, self._cache.put_many, entries, self._tag)
            except Exception:  # the cache is advisory: whatever becomes of it, those who wait have their objects
                stored = 0
                _log.exception("objects could not be cached")
            self._count(uncached=len(entries) - stored)
            for _, written in batch:
                if not written.done():
                    written.set_result(None)

    def _next_batch(self) -> list[tuple[NewEntry, asyncio.Future[None]]]:
        batch, size = list[tuple[NewEntry, asyncio.Future[None]]](), 0
        while self._unwritten and len(batch) < _BATCH_ENTRIES and size < _BATCH_BYTES:
            batch.append(self._unwritten.popleft())
            size += len(batch[-1][0].body)
        return batch
