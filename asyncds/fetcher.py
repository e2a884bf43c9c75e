"""Bring objects into the cache: bounded concurrency, one download per object, retries, verification."""

import asyncio
import contextlib
import inspect
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Self, TypeVar

from asyncds.cache import Cache, LargeEntry
from asyncds.download import Downloader, Memory, SizeTold, Slots
from asyncds.entry import NewEntry, entry_key, object_id
from asyncds.errors import AsyncdsError, ConfigurationError, DatasetClosed, ObjectChanged
from asyncds.index import FAULTS
from asyncds.large import LARGE, StoredBody
from asyncds.manifest import ObjectInfo
from asyncds.prefetch import Prefetch
from asyncds.retry import Retry
from asyncds.stats import Counters
from asyncds.store.base import NoParts, ObjectStore

__all__ = ["Fetched", "Fetcher", "lookup"]

T = TypeVar("T")
_log = logging.getLogger(__name__)
_LOOKUP = 200
_SECONDS_BETWEEN_CLAIMS = 0.03
_REFILLS = 4  # of the window, while it is used once
_BATCH_ENTRIES = 256
_BATCH_BYTES = 8 << 20
_SECONDS_TO_FLUSH = 3.0


_NOBODY = -1  # the group of a prefetch whose group is gone


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


def _abandon(beginning: asyncio.Future[LargeEntry | None]) -> None:
    entry = None if beginning.cancelled() or beginning.exception() is not None else beginning.result()
    if entry is not None:
        entry.abandon()


async def _handed_over(kept: Fetched, arrived: asyncio.Future[Fetched]) -> bool:
    """A flight that has been."""
    arrived.set_result(kept)
    return False


def _chunks(infos: Iterable[ObjectInfo]) -> Iterator[list[ObjectInfo]]:
    source = iter(infos)
    while chunk := list(islice(source, _LOOKUP)):
        yield chunk


Key = tuple[str, str, str | None]  # bucket, key and ETag


class Flight:
    """One download under way. `arrived` holds the object or the error; `task` ends when that is settled, too.

    The task tells whether the cache has the object. `size` is what is expected to arrive, `group` that of a
    prefetch which nobody waits for yet, and `reserved` are the bytes of memory that are kept free for it.
    """

    def __init__(
        self,
        fly: Callable[[asyncio.Future[Fetched]], Coroutine[Any, Any, bool]],
        size: int,
        group: int | None = None,
        reserved: int = 0,
    ) -> None:
        self.arrived: asyncio.Future[Fetched] = asyncio.get_running_loop().create_future()
        self.size = size
        self.group = group
        self.reserved = reserved
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
        amount = self._fetcher.downloader.expected_size(info)
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
    that are given the same `slots` and `memory` share these bounds. What `admits` does not want, by its size, is not
    cached.
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
        slots: Slots | None = None,
        memory: Memory | None = None,
        admits: Callable[[int], bool] | None = None,
        on_early: Callable[[ObjectInfo], None] | None = None,
    ) -> None:
        try:
            inspect.signature(store.get).bind(None, None, None)
        except TypeError:
            raise ConfigurationError(f"{type(store).__name__}.get() must take (info, reserve, part)") from None
        self._store = store
        self._cache = cache
        self._concurrency = concurrency
        self._patience = retry.deadline / 4
        self._slots = slots or Slots(concurrency)
        observe = counters.observe if counters is not None else lambda seconds: None
        self.downloader = Downloader(store, retry, self._slots, memory or Memory(), observe)
        self._tag = tag
        self._admits = admits or (lambda size: True)
        self._counters = counters
        self._on_early = on_early or (lambda info: None)
        self._flights: dict[Key, Flight] = {}
        self._ahead = Prefetch[ObjectInfo, Fetched]()
        self._slots.listeners.add(self)
        self._unarrived = self._expected = 0  # downloads under way whose object is not there yet, and bytes of all
        self._unwritten: deque[tuple[NewEntry, asyncio.Future[bool]]] = deque()
        self._writing: asyncio.Task[None] | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="asyncds-writer")
        self._looking: list[tuple[ObjectInfo, asyncio.Future[tuple[ObjectInfo, Fetched | None]]]] = []
        self._closed = False
        self._done = self._failed = 0

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
        window = _Window(self, 2 * self._concurrency, self.downloader.memory.size)
        try:
            for chunk in _chunks(infos):
                for info, hit in zip(*self._lookup(chunk), strict=True):
                    if hit is not None:
                        yield info, hit
                    else:
                        window.launch(info)
                    while window.full:
                        yield await window.next()
            while window.pending:
                yield await window.next()
        finally:
            await window.close()

    def start(self, info: ObjectInfo) -> Flight:
        """Start a download, or join the one under way. Does not look into the cache."""
        if self._closed:
            raise DatasetClosed("the fetcher is closed")
        key = (info.bucket, info.key, info.etag)
        kept, flight = self._ahead.take(key[:2]), self._flights.get(key)
        if kept is not None and flight is None and info.etag in (None, kept.info.etag):
            self._count(prefetch_hits=1)
            return self._launch(key, Flight(partial(_handed_over, kept), 0))
        if flight is None:
            return self._launch(key, Flight(partial(self._fly, info), self.downloader.expected_size(info)))
        if flight.group is not None:
            self._count(prefetch_hits=int(flight.arrived.done()))
            flight.group = None
        return flight

    def prefetch(self, infos: Iterable[ObjectInfo], group: int = 0) -> None:
        """Bring these, too, in this order, when there are slots that nobody who waits needs; to be called on the loop.

        They go to the cache. What it does not take stays in memory until it is asked for, up to 64 MiB; then no more
        is brought. A failure is not told: whoever asks for the object meets it.
        """
        for info in infos:
            key = (info.bucket, info.key, info.etag)
            if key not in self._flights:
                self._ahead.want(key[:2], info, group)
        self.launch_ahead()

    def forget(self, gone: Callable[[int], bool]) -> None:
        """Drop what was to be brought for groups that are gone; what is under way goes on into the cache."""
        self._ahead.forget(gone)
        for flight in self._flights.values():
            if flight.group is not None and gone(flight.group):
                flight.group = _NOBODY
        self.launch_ahead()

    def _launch(self, key: Key, flight: Flight) -> Flight:
        self._flights[key] = flight
        self._unarrived += 1
        self._expected += flight.size
        flight.arrived.add_done_callback(self._arrived)
        flight.task.add_done_callback(lambda _: self._landed(key, flight))
        return flight

    def _arrived(self, _: asyncio.Future[Fetched]) -> None:
        self._unarrived -= 1
        # Some at a time: what is launched together is claimed, looked up and written together.
        if self._unarrived <= self._concurrency - self._concurrency // _REFILLS:
            for fetcher in list(self._slots.listeners):
                fetcher.launch_ahead()

    def launch_ahead(self) -> None:
        """Send for what was named in advance, as far as there are slots; to be called on the loop."""
        room: int | None = None
        while not self._closed and self._unarrived < self._concurrency and not self._slots.locked():
            wanted = self._ahead.next()
            if wanted is None:
                return
            place, info, group = wanted
            size, key = self.downloader.expected_size(info), (info.bucket, info.key, info.etag)
            if room is None:  # of the cache, beside what is under way
                room = 0 if self._cache is None else self._cache.room() - self._expected
            reserved = 0 if size <= room and self._admits(size) else size
            if not self._ahead.reserve(reserved):
                return
            room -= size - reserved
            self._ahead.take(place)
            if key in self._flights:
                self._ahead.release(reserved)
            else:
                self._launch(key, Flight(partial(self._fly, info), size, group, reserved))

    async def flush(self) -> None:
        """Wait until the cache has what has arrived so far."""
        while self._writing is not None and not self._writing.done():
            await asyncio.wait([self._writing])

    async def aclose(self) -> None:
        """Cancel what is under way, and close the store. Whoever waits gets `DatasetClosed`.

        What has arrived goes to the cache first, as far as it takes it within three seconds.
        """
        self._closed = True
        self._ahead.forget(lambda _: True)
        tasks = [flight.task for flight in self._flights.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SECONDS_TO_FLUSH):
                await self.flush()
        self._unwritten.clear()
        self._writer.shutdown(wait=self._writing is None or self._writing.done())
        close = getattr(self._store, "aclose", None)
        if close is not None:
            await close()

    def _lookup(self, infos: Sequence[ObjectInfo]) -> tuple[list[ObjectInfo], list[Fetched | None]]:
        if self._cache is None:
            return list(infos), [None] * len(infos)
        return lookup(self._cache, self._store.endpoint, infos, self._tag)

    # one download

    async def _fly(self, info: ObjectInfo, arrived: asyncio.Future[Fetched]) -> bool:
        async with self._claimed(info) as (info, found, waited):
            if found is not None:
                arrived.set_result(found)
                return True
            return await self._download(info, arrived, waited)

    @contextlib.asynccontextmanager
    async def _claimed(self, info: ObjectInfo) -> AsyncGenerator[tuple[ObjectInfo, Fetched | None, float], None]:
        """Be the only one on this machine who brings the object, and look whether somebody has brought it just now.

        Yields what the object is known as, what the cache has of it, and how many seconds it took. Who waits for a
        process that stands still waits for a quarter of the deadline, and then brings the object as well.
        """
        if self._cache is None or not self._admits(info.size or 0):
            yield info, None, 0.0
            return
        if self._cache.full:  # nobody waits for what will not be there
            yield *await self._look_again(info), 0.0
            return
        id, now = object_id(self._store.endpoint, info.bucket, info.key), asyncio.get_running_loop().time
        started, claimed = now(), self._cache.claim(id)
        try:
            while not claimed and now() - started < self._patience:
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
        infos = [info for info, _ in looking]
        try:
            answers = self._lookup(infos)
        except Exception:  # a warning that is made an error, say: those who wait must go on
            answers = infos, [None] * len(infos)
            _log.exception("the cache could not be looked into")
        for (_, result), info, found in zip(looking, *answers, strict=True):
            if not result.done():
                result.set_result((info, found))

    async def _download(self, info: ObjectInfo, arrived: asyncio.Future[Fetched], waited: float) -> bool:
        """Bring an object: a large one in parts, straight into its file, if cache and store can do that."""
        asked = info
        if self._cache is not None and info.size is None:
            try:
                return await self._download_whole(asked, info, arrived, waited, LARGE)
            except SizeTold:
                info = await self._store.head(info.bucket, info.key)
                if asked.etag not in (None, info.etag):
                    raise ObjectChanged(f"{info.uri}: its ETag is {info.etag}, not {asked.etag}") from None
        parts = await self._download_parts(asked, info, waited)
        if parts is None:
            return await self._download_whole(asked, info, arrived, waited, None)
        body, kept = parts
        self._deliver(Fetched(info, body), arrived)
        self._count(uncached=int(not kept))
        return kept

    async def _download_whole(
        self,
        asked: ObjectInfo,
        info: ObjectInfo,
        arrived: asyncio.Future[Fetched],
        waited: float,
        most: int | None,
    ) -> bool:
        async with self.downloader.whole(info, allowance=-waited, most=most) as (served, body):
            self._deliver(Fetched(served, body), arrived)
            if self._cache is not None and self._admits(len(body)):
                return await self._publish(asked, served, body)
            self._count(uncached=int(self._cache is not None))
            return False

    def _deliver(self, fetched: Fetched, arrived: asyncio.Future[Fetched]) -> None:
        self._done += 1
        self._count(gets=1, bytes=len(fetched.body))
        arrived.set_result(fetched)

    async def _download_parts(
        self, asked: ObjectInfo, info: ObjectInfo, waited: float
    ) -> tuple[StoredBody, bool] | None:
        """Bring a large object into its file, and tell whether the cache keeps it.

        None if it is not large, does not fit, or comes as a whole only.
        """
        cache = self._cache
        if cache is None or info.size is None or info.size <= LARGE or info.etag is None:
            return None
        if not self._admits(info.size):
            return None
        run = partial(asyncio.get_running_loop().run_in_executor, self._writer)
        id = object_id(self._store.endpoint, info.bucket, info.key)
        beginning = run(cache.begin, id, info.etag, info.size, self._tag)
        try:
            entry = await asyncio.shield(beginning)
        except asyncio.CancelledError:
            await asyncio.wait([beginning])
            _abandon(beginning)
            raise
        if entry is None:
            return None
        try:
            await self.downloader.parts(info, partial(run, entry.write), allowance=-waited)
            return await run(partial(entry.finish, first_seen=asked.etag is None)), entry.kept
        except BaseException as error:
            await self._off_loop(entry.abandon)  # after the parts that are being written there
            if isinstance(error, FAULTS) and not isinstance(error, AsyncdsError):
                cache.failed("written", error)
            elif not isinstance(error, NoParts):
                raise
            return None

    def _landed(self, key: Key, flight: Flight) -> None:
        """Let go of a flight, and tell those who wait when it failed; keep what was brought in advance for later."""
        del self._flights[key]
        self._expected -= flight.size
        self._ahead.release(flight.reserved)
        error = None if flight.task.cancelled() else flight.task.exception()
        if flight.arrived.done():
            if flight.group is not None and not flight.task.cancelled() and error is None:
                self._keep(key, flight, flight.group)
            return
        if error is None:
            error = DatasetClosed(f"s3://{key[0]}/{key[1]}: the dataset was closed before the object arrived")
        elif flight.group is None:
            self._failed += 1
            self._count(failures=1)
        flight.arrived.set_exception(error)
        flight.arrived.exception()  # read once, so that a failure nobody waits for is not logged as lost

    def _keep(self, key: Key, flight: Flight, group: int) -> None:
        fetched = flight.arrived.result()
        if group == _NOBODY:
            return
        if flight.task.result():
            self._on_early(fetched.info)
        else:
            self._ahead.keep(key[:2], fetched, len(fetched.body), group)

    def _count(self, **amounts: float) -> None:
        if self._counters is not None:
            self._counters.add(**amounts)

    # into the cache, off the loop, as many at once as have gathered

    async def _publish(self, asked: ObjectInfo, info: ObjectInfo, body: bytes) -> bool:
        id = object_id(self._store.endpoint, info.bucket, info.key)
        entry = NewEntry(id, info.etag or "", body, first_seen=asked.etag is None)
        written: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._unwritten.append((entry, written))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())
        return await written

    async def _write(self) -> None:
        assert self._cache is not None
        while self._unwritten:
            batch = self._next_batch()
            entries = [entry for entry, _ in batch]
            try:
                stored = await self._off_loop(self._cache.put_each, entries, self._tag)
            except Exception:  # the cache is advisory: whatever becomes of it, those who wait have their objects
                stored = [False] * len(entries)
                _log.exception("objects could not be cached")
            self._count(uncached=stored.count(False))
            for (_, written), there in zip(batch, stored, strict=True):
                if not written.done():
                    written.set_result(there)

    async def _off_loop(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function on the writer's thread; here, where threads are given no more work: at the very end."""
        try:
            working = asyncio.get_running_loop().run_in_executor(self._writer, function, *arguments)
        except RuntimeError:
            await asyncio.sleep(0)
            return function(*arguments)
        return await working

    def _next_batch(self) -> list[tuple[NewEntry, asyncio.Future[bool]]]:
        batch, size = list[tuple[NewEntry, asyncio.Future[bool]]](), 0
        while self._unwritten and len(batch) < _BATCH_ENTRIES and size < _BATCH_BYTES:
            batch.append(self._unwritten.popleft())
            size += len(batch[-1][0].body)
        return batch
