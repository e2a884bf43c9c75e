"""Bring objects into the cache: bounded concurrency, one download per object, retries, verification."""

import asyncio
import contextlib
import inspect
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal, Self, Unpack

from asyncds.budget import Memory, Slots
from asyncds.cache import Cache, LargeEntry
from asyncds.download import Downloader, Express, SizeTold
from asyncds.entry import NewEntry, object_id
from asyncds.errors import AsyncdsError, ConfigurationError, DatasetClosed, ObjectChanged
from asyncds.index import FAULTS
from asyncds.large import LARGE, StoredBody
from asyncds.lookup import Fetched, lookup
from asyncds.manifest import Manifest, ManifestBuilder, ObjectInfo
from asyncds.prefetch import Place, Prefetch
from asyncds.progress import progress_bar
from asyncds.recipe import StoreRecipe
from asyncds.retry import Retry
from asyncds.selection import Choice, Selection
from asyncds.stats import Counters
from asyncds.store.base import First, NoParts, ObjectStore
from asyncds.warm import Missing, WarmReport, warm
from asyncds.writer import Writer

__all__ = ["Fetched", "Fetcher"]

_log = logging.getLogger(__name__)
_LOOKUP = 200
_SECONDS_BETWEEN_CLAIMS = 0.03
_REFILLS = 4  # of the window, while it is used once
_SECONDS_TO_FLUSH = 3.0
_NOBODY = -1  # the group of a prefetch whose group is gone


def _abandon(beginning: asyncio.Future[LargeEntry | None]) -> None:
    entry = None if beginning.cancelled() or beginning.exception() is not None else beginning.result()
    if entry is not None:
        entry.abandon()


async def _chunks(infos: Iterable[ObjectInfo]) -> AsyncGenerator[list[ObjectInfo], None]:
    source = iter(infos)
    while chunk := list(islice(source, _LOOKUP)):
        yield chunk


def _table(infos: Iterable[ObjectInfo]) -> Manifest:
    if isinstance(infos, Manifest):
        return infos
    builder = ManifestBuilder()
    for info in infos:
        builder.add(info)
    return builder.build(endpoint="", source="objects")


Key = tuple[str, str, str | None]  # bucket, key and ETag


class Flight(Express):
    """One download under way.

    `result` is the object, or the error, once it is there, and `arrived` a future of it. `settled` comes after it, and
    tells whether the cache has the object. `known` is what is asked for: `info`, with the ETag that the cache knows it
    by. `size` is what is expected to arrive, `group` that of a prefetch which nobody waits for yet, `reserved` are the
    bytes of memory that are kept free for it in the window of what was brought in advance. When it is `over`, what
    still happens to it is ignored.

    The futures are made when somebody asks for them: nobody waits for most of what is brought in advance, and the
    garbage collector has to look at all that lives for as long as a download takes.
    """

    __slots__ = (
        *("_arrived", "_fetcher", "_settled", "claimed", "group", "id", "info", "key"),
        *("reserved", "result", "size", "stored"),
    )

    def __init__(self, fetcher: "Fetcher", info: ObjectInfo, group: int | None = None, reserved: int = 0) -> None:
        super().__init__(fetcher.downloader, info)
        self._fetcher = fetcher
        self.info = info
        self.key: Key = (info.bucket, info.key, info.etag)
        self.id = fetcher.object_id(info)
        self.size = fetcher.downloader.expected_size(info)
        self.group = group
        self.reserved = reserved
        self.claimed = False
        self.result: Fetched | BaseException | None = None
        self.stored: bool | None = None
        self._arrived: asyncio.Future[Fetched] | None = None
        self._settled: asyncio.Future[bool] | None = None

    @property
    def arrived(self) -> asyncio.Future[Fetched]:
        if self._arrived is None:
            self._arrived = asyncio.get_running_loop().create_future()
            self._tell_result()
        return self._arrived

    @property
    def settled(self) -> asyncio.Future[bool]:
        if self._settled is None:
            self._settled = asyncio.get_running_loop().create_future()
            if self.stored is not None:
                self._settled.set_result(self.stored)
        return self._settled

    def arrive(self, result: Fetched | BaseException) -> None:
        """To be called once, with the object or the error."""
        self.result = result
        self._tell_result()

    def settle(self, stored: bool) -> None:
        """To be called once, after `arrive`."""
        self.stored = stored
        if self._settled is not None:
            self._settled.set_result(stored)

    def _tell_result(self) -> None:
        if self._arrived is None or self.result is None:
            return
        if isinstance(self.result, BaseException):
            self._arrived.set_exception(self.result)
            self._arrived.exception()  # read once, so that a failure nobody waits for is not logged as lost
        else:
            self._arrived.set_result(self.result)

    def landed(self, served: ObjectInfo, body: bytes) -> None:
        """See `Express`."""
        self._fetcher.landed(self, served, body)

    def detour(self, first: First | None, spent: float) -> None:
        """See `Express`."""
        self.spent += spent
        self._fetcher.detour(self, first)


class _Window:
    """Downloads that were launched and not yet handed on, bounded in number and in bytes."""

    def __init__(self, fetcher: "Fetcher", memory: int) -> None:
        self._fetcher = fetcher
        self._memory = memory
        self._held = 0
        self._finished: asyncio.Queue[tuple[Flight, int]] | None = asyncio.Queue()
        self.pending = 0

    @property
    def full(self) -> bool:
        return self.pending >= self._fetcher.downloader.slots.window or self._held >= self._memory

    def launch(self, info: ObjectInfo) -> None:
        flight = self._fetcher.start(info)
        self._held += flight.size
        self.pending += 1
        flight.settled.add_done_callback(partial(self._land, flight))

    def _land(self, flight: Flight, _: asyncio.Future[bool]) -> None:
        if self._finished is not None:
            size = len(flight.result.body) if isinstance(flight.result, Fetched) else 0
            self._held += size - flight.size
            self._finished.put_nowait((flight, size))

    async def next(self) -> tuple[ObjectInfo, Fetched | AsyncdsError]:
        assert self._finished is not None
        flight, amount = await self._finished.get()
        self.pending -= 1
        self._held -= amount
        if isinstance(flight.result, Fetched | AsyncdsError):
            return flight.info, flight.result
        assert flight.result is not None
        raise flight.result

    def close(self) -> None:
        """Nobody takes what still comes; it goes into the cache."""
        self._finished = None


class Fetcher:
    """Downloads objects from a store into a cache, at most one download per object at a time.

    Lives on one event loop. At most `concurrency` requests are in flight, and 32 MiB between socket and disk; fetchers
    that are given the same `slots` and `memory` share these bounds. What `admits` does not want, by its size, is not
    cached. With `hedging`, an object that takes much longer than others is asked for twice (`Hedging`).
    A waiter that is cancelled or times out does not disturb the download, nor others who wait for it. A failure is
    told to all who wait, once, and not remembered.

        async with Fetcher.open(endpoint="http://localhost:9000") as fetcher:
            async for info, body in fetcher.fetch([ObjectInfo("mnist", "train/0/00001.png"), ...]):
                ...

    What an `ObjectInfo` says of size and ETag is insisted on; the rows of a `Manifest` say both. A body of more than
    16 MiB that is cached is a `StoredBody`, whose `open()` returns a file.
    """

    def __init__(
        self,
        store: ObjectStore,
        cache: Cache | None,
        *,
        concurrency: int | Literal["auto"],
        retry: Retry,
        tag: str = "",
        counters: Counters | None = None,
        slots: Slots | None = None,
        memory: Memory | None = None,
        admits: Callable[[int], bool] | None = None,
        hedging: bool = True,
        on_early: Callable[[Fetched], None] | None = None,
    ) -> None:
        try:
            inspect.signature(store.get).bind(None, None, None)
        except TypeError:
            raise ConfigurationError(f"{type(store).__name__}.get() must take (info, reserve, part)") from None
        self._store = store
        self._cache = cache
        self._patience = retry.deadline / 4
        self._slots = slots or Slots.of(concurrency)
        self._counters = counters
        observe = counters.observe if counters is not None else lambda seconds: None
        hedge = partial(self._count, hedges=1)
        self.downloader = Downloader(store, retry, self._slots, memory or Memory(), observe, hedge, hedging=hedging)
        self._tag = tag
        self._admits = admits or (lambda size: True)
        self._on_early = on_early or (lambda fetched: None)
        self._flights: dict[Key, Flight] = {}
        self._ahead = Prefetch[ObjectInfo, Fetched]()
        self._slots.listeners.add(self)
        self._unarrived = self._expected = 0  # downloads under way whose object is not there yet, and bytes of all
        self._writer = Writer(cache, tag) if cache is not None else None
        self._whole_only: set[str] = set()  # buckets of which the store has been found to send no parts
        self._boarding: list[Flight] = []
        self._late: list[Flight] = []
        self._closed = False
        self._at_end = contextlib.ExitStack()
        self.done = self._failed = 0  # objects that it brought, and that could not be had
        self.uncached = 0  # objects that the cache did not take

    @classmethod
    def open(cls, **options: Any) -> Self:
        """Make a fetcher with a store and a cache of its own, which it closes.

        Takes by keyword what constructors of datasets take to say where objects are and how they are brought: `region`,
        `endpoint`, `profile`, `unsigned`, `session_factory`, `s3client_config`, `store`, and the settings of
        `asyncds.Settings`; those that are about samples mean nothing here, nor does `admit`. To be called on the loop
        that it is used on. Raises `ConfigurationError` or `CacheError`.
        """
        recipe = StoreRecipe.of(**options)
        settings, tag = recipe.settings, f"objects at {recipe.identity}"
        retry = Retry(settings.retries, settings.deadline, settings.first_contact)
        with contextlib.ExitStack() as undo:
            cache = Cache(settings.cache_dir, limit=settings.cache_size, read_only=settings.cache_read_only)
            undo.callback(cache.close)
            cache.hold(tag)
            undo.callback(cache.release, tag)
            slots = Slots.of(settings.concurrency)
            store = recipe.make(slots.most, retry)
            fetcher = cls(
                store,
                cache,
                concurrency=settings.concurrency,
                retry=retry,
                tag=tag,
                slots=slots,
                hedging=settings.hedging,
            )
            fetcher._at_end = undo.pop_all()
        return fetcher

    def __repr__(self) -> str:
        flights = f"{len(self._flights)} in flight, at most {self._slots.size}"
        return f"<Fetcher {flights}, {self.done} done, {self._failed} failed>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    @property
    def in_flight(self) -> int:
        """Objects that were sent for, and have not arrived."""
        return min(self._unarrived, self._slots.size)

    async def get(self, info: ObjectInfo) -> Fetched:
        """Return one object, from the cache or the store.

        Raises what `asyncds.errors` lists under `StoreError`; `DatasetClosed` when the fetcher is closed meanwhile.
        """
        if not isinstance(info, ObjectInfo):
            raise ConfigurationError(f"{info!r:.80} names no object: write ObjectInfo(bucket, key)")
        (info,), (found,) = self._lookup([info])
        return found if found is not None else await asyncio.shield(self.start(info).arrived)

    async def fetch(self, infos: Iterable[ObjectInfo]) -> AsyncGenerator[Fetched, None]:
        """Yield the objects as they arrive, in no particular order, each once; the first failure is raised.

        What is requested runs ahead of the consumer by at most twice the concurrency, and by the bytes of `memory`, as
        far as sizes are known beforehand: one who is slow holds it up. With `auto`, it may be 512 objects.
        """
        async with contextlib.aclosing(self.outcomes(infos)) as outcomes:
            async for _, result in outcomes:
                if isinstance(result, BaseException):
                    raise result
                yield result

    async def outcomes(
        self, infos: Iterable[ObjectInfo] | AsyncGenerator[list[ObjectInfo], None]
    ) -> AsyncGenerator[tuple[ObjectInfo, Fetched | AsyncdsError], None]:
        """As `fetch`, with each failure in the place of its object; also of what has to be waited for, in lists."""
        window = _Window(self, self.downloader.memory.size)
        async with contextlib.AsyncExitStack() as at_end:
            at_end.callback(window.close)
            chunks = infos if isinstance(infos, AsyncGenerator) else _chunks(infos)
            async for chunk in await at_end.enter_async_context(contextlib.aclosing(chunks)):
                for info, hit in zip(*self._lookup(chunk), strict=True):
                    if hit is not None:
                        yield info, hit
                    else:
                        window.launch(info)
                    while window.full:
                        yield await window.next()
            while window.pending:
                yield await window.next()

    async def warm(
        self, infos: Iterable[ObjectInfo], *, progress: bool = False, **choice: Unpack[Choice]
    ) -> WarmReport:
        """Bring into the cache what it does not have of these, such as a `Manifest`, and return what was done.

        `choice` selects: `match`, `exclude`, `limit`, `order`, `seed` and `partition`, as for `dataset.warm`.
        Cancelled, it keeps what arrived, and goes on from there when called again. Objects that cannot be had are named
        in `failures`; a store that cannot be reached at all raises.
        """
        if self._cache is None:
            raise ConfigurationError("a fetcher without a cache has nothing to warm")
        selection, manifest = Selection.of(**choice), _table(infos)
        rows = selection.rows(manifest)
        with progress_bar(f"warming {manifest.source}", len(rows), show=progress) as advance:
            missing = Missing(self._cache, self._store.endpoint, manifest, rows, self._admits, self._tag, advance)
            return await warm(self, missing, advance)

    def start(self, info: ObjectInfo) -> Flight:
        """Start a download, or join the one under way. Does not look into the cache."""
        if self._closed:
            raise DatasetClosed("the fetcher is closed")
        key = (info.bucket, info.key, info.etag)
        kept, flight = self._ahead.take(key[:2]), self._flights.get(key)
        if kept is not None and flight is None and info.etag in (None, kept.info.etag):
            self._count(prefetch_hits=1)
            flight = Flight(self, info)
            flight.arrive(kept)
            flight.settle(stored=False)
        elif flight is None:
            flight = self._launch(Flight(self, info))
        elif flight.group is not None:
            self._count(prefetch_hits=int(flight.result is not None))
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

    def _launch(self, flight: Flight) -> Flight:
        self._flights[flight.key] = flight
        self._unarrived += 1
        self._expected += flight.size
        if not self._boarding:
            asyncio.get_running_loop().call_soon(self._board)
        self._boarding.append(flight)
        return flight

    def _arrive(self, flight: Flight, result: Fetched | BaseException) -> None:
        flight.arrive(result)
        self._unarrived -= 1
        # Some at a time: what is launched together is claimed, looked up and written together.
        if self._unarrived <= self._few:
            for fetcher in list(self._slots.listeners):
                try:
                    fetcher.launch_ahead()
                except Exception:  # of another dataset, maybe: this one's objects go on
                    _log.exception("nothing more is brought in advance")

    @property
    def _few(self) -> int:
        """So many downloads are under way when more is brought in advance."""
        return self._slots.size - self._slots.size // _REFILLS

    @property
    def held_up(self) -> bool:
        """Whether more would be brought in advance if there were more slots."""
        return self._ahead.next() is not None and (self._unarrived > self._few or self._slots.spent)

    def launch_ahead(self) -> None:
        """Send for what was named in advance, as far as there are slots; to be called on the loop."""
        room: int | None = None
        while not self._closed and self._unarrived < self._slots.size and not self._slots.spent:
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
                self._launch(Flight(self, info, group, reserved))

    async def flush(self) -> None:
        """Wait until the cache has what has arrived so far."""
        if self._writer is not None:
            await self._writer.flush()

    async def aclose(self) -> None:
        """Cancel what is under way, and close the store. Whoever waits gets `DatasetClosed`.

        What has arrived goes to the cache first, as far as it takes it within three seconds.
        """
        self._closed = True
        self._ahead.forget(lambda _: True)
        flights = list(self._flights.values())
        tasks = [flight.task for flight in flights if flight.task is not None]
        for task in tasks:
            task.cancel()
        for flight in flights:
            if flight.task is None and flight.result is None:
                self._land(flight, stored=False)
        with self._at_end:  # also where this is cancelled
            try:
                await asyncio.gather(*tasks, return_exceptions=True)
                for flight in [flight for flight in self._flights.values() if flight.result is None]:
                    self._land(flight, stored=False)
                if self._writer is not None:
                    await self._writer.aclose(_SECONDS_TO_FLUSH)
            finally:
                close = getattr(self._store, "aclose", None)
                if close is not None:
                    await close()

    def _lookup(self, infos: Sequence[ObjectInfo]) -> tuple[list[ObjectInfo], list[Fetched | None]]:
        if self._cache is None:
            return list(infos), [None] * len(infos)
        return lookup(self._cache, self._store.endpoint, infos, self._tag)

    # one download: look whether somebody has brought it, be the only one who does, send for it, store it

    def _board(self) -> None:
        """Claim, look up and send for what was launched in the same turn of the loop, together."""
        boarding, self._boarding = self._boarding, []
        self._look([flight for flight in boarding if not flight.over and self._checked_in(flight)])

    def _checked_in(self, flight: Flight) -> bool:
        """Say that this process brings the object; tell whether it is to be looked up before, and can be now."""
        try:
            if self._cache is None or not self._admits(flight.info.size or 0):
                self._send(flight)
                return False
            if self._cache.full:  # nobody waits for what will not be there
                return True
            flight.claimed = self._cache.claim(flight.id)
            if not flight.claimed:
                self._see_to(flight, self._wait_for_claim(flight))
            return flight.claimed
        except Exception as error:
            self._land(flight, stored=False, error=error)
            return False

    async def _wait_for_claim(self, flight: Flight) -> None:
        """Wait for another process that brings the object: a quarter of the deadline; then bring it as well."""
        assert self._cache is not None
        now = asyncio.get_running_loop().time
        started = now()
        while not flight.claimed and now() - started < self._patience:
            await asyncio.sleep(_SECONDS_BETWEEN_CLAIMS)
            flight.claimed = self._cache.claim(flight.id)
        flight.spent, flight.task = now() - started, None
        if not self._late:
            asyncio.get_running_loop().call_soon(self._look_late)
        self._late.append(flight)

    def _see_to(self, flight: Flight, coroutine: Coroutine[Any, Any, None]) -> None:
        """Let a task see to it; if that is cancelled, maybe before it has begun, or fails, the flight is over."""
        flight.task = asyncio.create_task(coroutine)
        flight.task.add_done_callback(partial(self._seen_to, flight))

    def _seen_to(self, flight: Flight, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if task.cancelled() or error is not None:
            self._land(flight, stored=False, error=error)

    def _look_late(self) -> None:
        late, self._late = self._late, []
        self._look([flight for flight in late if not flight.over])

    def _look(self, flights: list[Flight]) -> None:
        """Look objects up that are claimed, since somebody may have brought them just now; send for the others."""
        infos = [flight.info for flight in flights]
        try:
            answers = self._lookup(infos) if infos else ([], [])
        except Exception:  # a warning that is made an error, say: those who wait must go on
            answers = infos, [None] * len(infos)
            _log.exception("the cache could not be looked into")
        for flight, known, found in zip(flights, *answers, strict=True):
            flight.known = known
            try:
                if found is None:
                    self._send(flight)
                else:
                    self._arrive(flight, found)
                    self._land(flight, stored=True)
            except Exception as error:
                self._land(flight, stored=False, error=error)

    def _send(self, flight: Flight) -> None:
        if flight.known.size is None or flight.known.size > LARGE:
            self.detour(flight, None)
        else:
            self.downloader.express(flight)

    def landed(self, flight: Flight, served: ObjectInfo, body: bytes) -> None:
        """An object has come by express: hand it on, and store it."""
        if flight.over:
            return
        try:
            self._deliver(flight, Fetched(served, body))
            if self._cache is not None and self._admits(len(body)):
                self._publish(flight, served, body, partial(self._stored, flight))
            else:
                self._stored(flight, there=False)
        except Exception as error:
            self._land(flight, stored=False, error=error)

    def _stored(self, flight: Flight, there: bool) -> None:
        refused = int(not there and self._cache is not None)
        self.uncached += refused
        self._count(uncached=refused)
        self._land(flight, stored=there)

    def detour(self, flight: Flight, first: First | None) -> None:
        """Bring an object with all that may be needed: retries, parts, its size if nobody knows it."""
        if not flight.over:
            self._see_to(flight, self._travel(flight, first))

    async def _travel(self, flight: Flight, first: First | None) -> None:
        self._stored(flight, await self._download(flight, first))

    async def _download(self, flight: Flight, first: First | None) -> bool:
        """Bring an object: a large one in parts, straight into its file, if cache and store can do that."""
        if self._cache is not None and flight.known.size is None:
            try:
                return await self._download_whole(flight, LARGE)
            except SizeTold:
                known = flight.known
                flight.known = await self._store.head(known.bucket, known.key)
                if known.etag not in (None, flight.known.etag):
                    text = f"{known.uri}: its ETag is {flight.known.etag}, not {known.etag}"
                    raise ObjectChanged(text) from None
        parts = await self._download_parts(flight)
        if parts is None:
            return await self._download_whole(flight, None, first)
        body, kept = parts
        self._deliver(flight, Fetched(flight.known, body))
        return kept

    async def _download_whole(self, flight: Flight, most: int | None, first: First | None = None) -> bool:
        whole = self.downloader.whole(flight.known, spent=flight.spent, most=most, first=first)
        async with whole as (served, body):
            self._deliver(flight, Fetched(served, body))
            if self._cache is None or not self._admits(len(body)):
                return False
            stored: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            self._publish(flight, served, body, partial(_tell, stored))
            return await stored

    async def _download_parts(self, flight: Flight) -> tuple[StoredBody, bool] | None:
        """Bring a large object into its file, and tell whether the cache keeps it.

        None if it is not large, does not fit, or comes as a whole only.
        """
        cache, info = self._cache, flight.known
        if cache is None or self._writer is None or info.size is None or info.size <= LARGE or info.etag is None:
            return None
        if info.bucket in self._whole_only or not self._admits(info.size):
            return None
        run = self._writer.run
        beginning = run(cache.begin, flight.id, info.etag, info.size, self._tag)
        try:
            entry = await asyncio.shield(beginning)
        except asyncio.CancelledError:
            await asyncio.wait([beginning])
            _abandon(beginning)
            raise
        if entry is None:
            return None
        try:
            await self.downloader.parts(info, partial(run, entry.write), spent=flight.spent)
            return await run(partial(entry.finish, first_seen=flight.info.etag is None)), entry.kept
        except BaseException as error:
            await self._writer.call(entry.abandon)  # after the parts that are being written there
            if isinstance(error, FAULTS) and not isinstance(error, AsyncdsError):
                cache.failed("written", error)
            elif not isinstance(error, NoParts):
                raise
            else:
                self._whole_only.add(info.bucket)
            return None

    def _deliver(self, flight: Flight, fetched: Fetched) -> None:
        self.done += 1
        self._count(gets=1, bytes=len(fetched.body))
        self._arrive(flight, fetched)

    def _publish(self, flight: Flight, served: ObjectInfo, body: bytes, done: Callable[[bool], object]) -> None:
        assert self._writer is not None
        entry = NewEntry(flight.id, served.etag or "", body, first_seen=flight.info.etag is None)
        self._writer.put(entry, done)

    def object_id(self, info: ObjectInfo) -> bytes:
        """What stands for the object in the cache."""
        return object_id(self._store.endpoint, info.bucket, info.key)

    def _land(self, flight: Flight, *, stored: bool, error: BaseException | None = None) -> None:
        """Let go of a flight, and tell those who wait when it failed; keep what was brought in advance for later."""
        if flight.over:
            return
        flight.over = True
        del self._flights[flight.key]
        self._expected -= flight.size
        self._ahead.release(flight.reserved)
        if flight.claimed and self._cache is not None:
            self._cache.unclaim(flight.id)
        flight.release()
        try:
            if isinstance(flight.result, Fetched):
                if flight.group is not None:
                    self._keep(flight.key[:2], flight.result, flight.group, stored)
            else:
                self._fail(flight, error)
        finally:
            flight.settle(stored)

    def _fail(self, flight: Flight, error: BaseException | None) -> None:
        if error is None:
            error = DatasetClosed(f"{flight.info.uri}: the dataset was closed before the object arrived")
        elif flight.group is None:
            self._failed += 1
            self._count(failures=1)
        self._arrive(flight, error)

    def _keep(self, place: Place, fetched: Fetched, group: int, stored: bool) -> None:
        if group == _NOBODY:
            return
        if stored:
            self._on_early(fetched)
        else:
            self._ahead.keep(place, fetched, len(fetched.body), group)

    def _count(self, **amounts: float) -> None:
        if self._counters is not None:
            self._counters.add(**amounts)


def _tell(stored: asyncio.Future[bool], there: bool) -> None:
    if not stored.done():
        stored.set_result(there)
