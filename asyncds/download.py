"""Ask a store for objects: attempts and retries, verification, and a second request for what is late."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from functools import partial
from typing import Any, Protocol

from asyncds.budget import Memory, Slots, Turn
from asyncds.errors import AsyncdsError, ObjectChanged, TransferFailed
from asyncds.hedging import Hedging, either
from asyncds.large import PART
from asyncds.manifest import ObjectInfo
from asyncds.retry import Retry
from asyncds.store.base import Drop, First, ObjectStore, Reserve, failed, no_bound, stands_for

__all__ = ["Downloader", "Express", "SizeTold", "verify"]

_SLOWEST = 1e6  # bytes per second below which a large object may miss its deadline
_SIZES_TOLD = 4  # for one object, before it is given up
_UNLISTED = 64 << 10  # bytes that an object of unknown size is taken for at least, until its answer begins


def verify(expected: ObjectInfo, served: ObjectInfo, body: bytes | None) -> None:
    """Compare what arrived with what the manifest names; without a body, that of which a part arrived.

    Raises `TransferFailed` or `ObjectChanged`.
    """
    size = served.size if body is None else len(body)
    if expected.size is not None and size != expected.size:
        raise TransferFailed(f"{expected.uri}: {size} bytes arrived, {expected.size} were listed")
    if served.size is not None and size != served.size:
        raise TransferFailed(f"{expected.uri}: {size} bytes arrived, {served.size} were announced")
    if served.etag is None:
        raise TransferFailed(f"{expected.uri}: the store sent no ETag, so that no version can be told from another")
    if expected.etag is not None and served.etag != expected.etag:
        raise ObjectChanged(f"{expected.uri}: its ETag is {served.etag}, not {expected.etag}")


class Get(Protocol):
    """See `ObjectStore.get`."""

    def __call__(
        self, info: ObjectInfo, reserve: Reserve = ..., part: slice | None = None
    ) -> Awaitable[tuple[ObjectInfo, bytes]]: ...


class SizeTold(BaseException):
    """The answer announces more than there is room for now. Not an `Exception`: no store may take it for its own."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


class Express:
    """An object that is sent for without a task; what becomes of it is for subclasses to say.

    `known` is the object, of known size. `held` are the bytes of memory that are kept for it from its request on, to be
    given back by who gets it. `spent` is how many seconds of its deadline are over. When it is `over`, nobody needs it
    any more. When it is late, it makes its detour with this request, and another one beside it.
    """

    __slots__ = ("_began", "_downloader", "_drop", "_outcome", "held", "known", "over", "spent")

    def __init__(self, downloader: "Downloader", info: ObjectInfo) -> None:
        self._downloader = downloader
        self._began = 0.0
        self._drop: Drop | None = None
        self._outcome: asyncio.Future[First] | None = None  # of the request, when it is late
        self.known = info
        self.held = 0
        self.spent = 0.0
        self.over = False

    def landed(self, served: ObjectInfo, body: bytes) -> None:
        """Here it is, verified."""
        raise NotImplementedError

    def detour(self, first: First | None, spent: float) -> None:
        """It has to be brought by `Downloader.whole`, with this first attempt, when so many seconds are spent."""
        raise NotImplementedError

    # the way there

    def depart(self) -> bool:
        """Use a slot, or leave it."""
        downloader, size = self._downloader, self.known.size or 0
        if self.over:
            return False
        if downloader.memory.take_now(size):
            self.held, self._began = size, asyncio.get_running_loop().time()
            with contextlib.suppress(Exception):  # `whole` will run into the same, and explain it
                self._drop = downloader.ask(self, self._began + size / _SLOWEST - self.spent)
            if self._drop is not None:
                return True
            self.release()
        self.detour(None, 0.0)
        return False

    def came(self, served: ObjectInfo, body: bytes) -> None:
        """See `Outcome`."""
        try:
            verify(self.known, served, body)
        except Exception as error:
            self.otherwise(failed(error))
            return
        if self._outcome is not None:
            self.otherwise(partial(_told, served, body))
            return
        try:
            self._downloader.arrived(self, len(body), asyncio.get_running_loop().time() - self._began)
        finally:
            self.landed(served, body)

    def otherwise(self, first: First) -> None:
        """See `Outcome`."""
        self._downloader.hedging.end(self)
        self._downloader.slots.give_back(1)
        self.release()
        if self._outcome is None:
            self.detour(first, asyncio.get_running_loop().time() - self._began)
        elif not self._outcome.done():
            self._outcome.set_result(first)

    def late(self) -> None:
        """See `Hedging`."""
        loop = asyncio.get_running_loop()
        self._outcome = loop.create_future()
        self.detour(partial(self._downloader.race, self), loop.time() - self._began)

    @property
    def came_after_all(self) -> bool:
        """Whether the request that was late is over."""
        return self._outcome is not None and self._outcome.done()

    async def outcome(self) -> tuple[ObjectInfo, bytes]:
        """What becomes of the request that is late. Cancelling ends it."""
        assert self._outcome is not None
        try:
            first = await self._outcome
        finally:
            if self._drop is not None:
                self._drop()
        return await first()

    def release(self) -> None:
        """Give back the memory that is held for it."""
        held, self.held = self.held, 0
        self._downloader.memory.give_back(held)


class Downloader:
    """Brings the bytes of objects, within `slots` for requests and `memory` for what has arrived and is not yet gone.

    `observe` is told of each request that brought what was asked for how many seconds it took. `spent` is how
    many seconds of a download's deadline are over before it begins. With `hedging`, what is late is asked for once
    more, `on_hedge` is told of it, and what comes first counts; parts of large objects are not late. Lives on one event
    loop.
    """

    def __init__(
        self,
        store: ObjectStore,
        retry: Retry,
        slots: Slots,
        memory: Memory,
        observe: Callable[[float], None] = lambda seconds: None,
        on_hedge: Callable[[], object] = lambda: None,
        hedging: bool = True,
    ) -> None:
        self.memory = memory
        self.hedging = Hedging(hedging)
        self._on_hedge = on_hedge
        self._observe_one = observe
        self._store = store
        self._retry = retry
        self.slots = slots
        self._count = self._bytes = 0
        self._ask: Callable[[ObjectInfo, Express, float], Drop | None] | None = None
        if stands_for(store, "ask", "get"):
            self._ask = store.ask  # type: ignore[attr-defined]
        self._again = store.get
        if stands_for(store, "again", "get"):
            self._again = store.again  # type: ignore[attr-defined]

    def express(self, object: Express) -> None:
        """Send for an object as soon as there is a slot, without a task.

        That is how a healthy object of a store that has `ask` comes, at less than half the cost of `whole`; where
        anything is the matter, it has to make a detour.
        """
        if self._ask is None:
            object.detour(None, 0.0)
        else:
            self.slots.offer(1, object.depart)

    def ask(self, object: Express, until: float) -> Drop | None:
        """Ask for it at once, if that can be done; it has the deadline from `until` on."""
        if self._ask is None:
            return None
        drop = self._ask(object.known, object, until + self._retry.deadline)
        if drop is not None:
            self.hedging.begin(object)
        return drop

    async def race(self, object: Express) -> tuple[ObjectInfo, bytes]:
        """Ask once more for what is late, and return what comes first, verified."""
        first = asyncio.create_task(object.outcome())
        if object.came_after_all:
            return await first
        return await either(first, asyncio.create_task(self._once_more(object.known, no_bound)))

    def arrived(self, object: Express, size: int, seconds: float) -> None:
        """Count an object that came by express, and let others have its slot."""
        self.hedging.end(object)
        self.slots.came(size)
        self.slots.give_back(1)
        self._observe(seconds)
        self._retry.succeeded()
        self._count += 1
        self._bytes += size

    def expected_size(self, info: ObjectInfo) -> int:
        """Bytes of the object, as listed, or as the mean of the others lets expect."""
        return info.size if info.size is not None else max(_UNLISTED, self._bytes // max(1, self._count))

    @contextlib.asynccontextmanager
    async def whole(
        self, info: ObjectInfo, *, spent: float = 0.0, most: int | None = None, first: First | None = None
    ) -> AsyncGenerator[tuple[ObjectInfo, bytes], None]:
        """Yield an object, verified; the memory for it is held until the end of the context.

        `first` is awaited in the place of the first attempt. Raises `SizeTold` when an answer announces more than
        `most` bytes, and what `Retry` and `verify` raise.
        """
        turn = Turn(self.slots, self.memory, self.expected_size(info))
        try:
            served, body = await self._brought(info, turn, spent, most, first)
            turn.hold(len(body))
            self._count += 1
            self._bytes += len(body)
            yield served, body
        finally:
            turn.release()

    async def parts(self, info: ObjectInfo, write: Callable[[int, bytes], Any], *, spent: float = 0.0) -> None:
        """Bring an object of known size and ETag in parts of 8 MiB, and await `write(position, part)` for each.

        The parts arrive in any order. The first error cancels the others, and is raised: one of those that `whole`
        raises, `NoParts`, or what `write` raised.
        """
        assert info.size is not None
        starts = range(0, info.size, PART)
        parts = [slice(start, min(start + PART, info.size)) for start in starts]
        tasks = [asyncio.create_task(self._bring(info, part, write, spent)) for part in parts]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _brought(
        self, info: ObjectInfo, turn: Turn, spent: float, most: int | None, first: First | None
    ) -> tuple[ObjectInfo, bytes]:
        """Ask for an object; anew, with room for it, if its answer tells a size that there was no room for."""
        attempt = partial(self._attempt, info, turn, most, first, itertools.count())
        for _ in range(_SIZES_TOLD):
            try:
                return await self._retry(attempt, info.uri, turn, turn.size / _SLOWEST, spent)
            except SizeTold as told:
                if most is not None and told.size > most:
                    raise
                turn.size = told.size
        raise TransferFailed(f"{info.uri}: it was of another size each time it was asked for")

    async def _attempt(
        self,
        info: ObjectInfo,
        turn: Turn,
        most: int | None,
        first: First | None,
        numbers: Iterator[int],
        clock: asyncio.Timeout,
    ) -> tuple[ObjectInfo, bytes]:
        started = time.perf_counter()
        number = next(numbers)
        get = self._again if number else self._store.get
        with self._counted():
            asked = first() if first and not number else self._hedged(get, info, turn, most, clock)
            served, body = await asked
            verify(info, served, body)
        self.slots.came(len(body))
        self._observe(time.perf_counter() - started)
        return served, body

    async def _hedged(
        self, get: Get, info: ObjectInfo, turn: Turn, most: int | None, clock: asyncio.Timeout
    ) -> tuple[ObjectInfo, bytes]:
        """Ask for an object, and a second time if it is late, in its turn."""
        if not self.hedging.ready:
            return await get(info, partial(_admit, turn, most, clock))
        first = asyncio.create_task(_verified(get, info, partial(_admit, turn, most, clock)))
        watched = _Watched(first)
        self.hedging.begin(watched)
        try:
            await watched.over_or_late
        except asyncio.CancelledError:
            first.cancel()
            await asyncio.wait([first])
            raise
        finally:
            self.hedging.end(watched)
        if first.done():
            return first.result()
        return await either(first, asyncio.create_task(self._in_its_turn(info, most, clock)))

    async def _in_its_turn(
        self, info: ObjectInfo, most: int | None, clock: asyncio.Timeout
    ) -> tuple[ObjectInfo, bytes]:
        turn = Turn(self.slots, self.memory, self.expected_size(info))
        try:
            async with turn:
                return await self._once_more(info, partial(_admit, turn, most, clock))
        finally:
            turn.release()

    async def _once_more(self, info: ObjectInfo, reserve: Reserve) -> tuple[ObjectInfo, bytes]:
        self._on_hedge()
        return await _verified(self._again, info, reserve)

    def _observe(self, seconds: float) -> None:
        self.hedging.came(seconds)
        self._observe_one(seconds)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Count an attempt that fails in a way that another may not."""
        try:
            yield
        except AsyncdsError as error:
            if error.transient:
                self.slots.failed()
            raise

    async def _bring(self, info: ObjectInfo, part: slice, write: Callable[[int, bytes], Any], spent: float) -> None:
        turn = Turn(self.slots, self.memory, part.stop - part.start)
        try:
            attempt = partial(self._attempt_part, info, part, itertools.count())
            allowance = (info.size or 0) / _SLOWEST
            await write(part.start, await self._retry(attempt, info.uri, turn, allowance, spent))
        finally:
            turn.release()

    async def _attempt_part(self, info: ObjectInfo, part: slice, numbers: Iterator[int], _: asyncio.Timeout) -> bytes:
        started = time.perf_counter()
        get = self._again if next(numbers) else self._store.get
        with self._counted():
            served, body = await get(info, no_bound, part)
            if len(body) != part.stop - part.start:
                raise TransferFailed(f"{info.uri}: {len(body)} bytes of a part of {part.stop - part.start} arrived")
            verify(info, served, None)
        self.slots.came(len(body))
        self._observe_one(time.perf_counter() - started)
        return body


class _Watched:
    """A request that a task makes."""

    def __init__(self, request: asyncio.Task[Any]) -> None:
        self.over_or_late: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        request.add_done_callback(self.late)

    def late(self, _: object = None) -> None:
        """See `Hedging`."""
        if not self.over_or_late.done():
            self.over_or_late.set_result(None)


async def _verified(get: Get, info: ObjectInfo, reserve: Reserve) -> tuple[ObjectInfo, bytes]:
    served, body = await get(info, reserve)
    verify(info, served, body)
    return served, body


async def _told(served: ObjectInfo, body: bytes) -> tuple[ObjectInfo, bytes]:
    return served, body


def _admit(turn: Turn, most: int | None, clock: asyncio.Timeout, size: int) -> None:
    """Make room for a body whose size its answer has told, and time, too. Raises `SizeTold` if there is none."""
    more = max(0, size - turn.size)
    if (most is not None and size > most) or not turn.hold(size):
        raise SizeTold(size)
    clock.reschedule((clock.when() or 0.0) + more / _SLOWEST)
