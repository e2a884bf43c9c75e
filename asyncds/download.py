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
    given back by who gets it. `spent` is how many seconds of its deadline are over. `task` is what sees to it where
    that takes more than a request. When it is `over`, nobody needs it any more.

    When it is late, a second request is made, as soon as there is a slot for it, if the first is under way still, and
    memory has room; what comes first counts, and ends the other.
    """

    __slots__ = (
        *("_began", "_downloader", "_drop", "_failure", "_second", "_until"),
        *("held", "known", "over", "spent", "task"),
    )

    def __init__(self, downloader: "Downloader", info: ObjectInfo) -> None:
        self._downloader = downloader
        self._began = self._until = 0.0
        self._drop: Drop | None = None  # while the first request is under way
        self._second: asyncio.Task[tuple[ObjectInfo, bytes]] | None = None
        self._failure: First | None = None  # of the first request, while the second is under way
        self.task: asyncio.Task[Any] | None = None
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
                self._until = self._began + downloader.deadline + size / _SLOWEST - self.spent
                self._drop = downloader.ask(self, self._until)
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
        self._drop = None
        second, self._second = self._second, None
        if second is not None:
            second.cancel()
        self._hand_on(served, body)

    def otherwise(self, first: First) -> None:
        """See `Outcome`."""
        self._drop = None
        self._downloader.hedging.end(self)
        self._downloader.slots.give_back(1)
        self.release()
        if self._second is None:
            self.detour(first, self._age)
        else:
            self._failure = first

    # a second request

    def late(self) -> None:
        """See `Hedging`."""
        self._downloader.slots.offer(1, self._ask_again)

    def _ask_again(self) -> bool:
        """Use a slot for a second request, or leave it: it never waits for memory while the first one holds some."""
        if self.over or self._drop is None or not self._downloader.memory.take_now(self.known.size or 0):
            return False
        self._second = self.task = asyncio.create_task(self._downloader.in_time(self.known, self._until))
        self._second.add_done_callback(self._second_over)
        return True

    def _second_over(self, task: asyncio.Task[tuple[ObjectInfo, bytes]]) -> None:
        size = self.known.size or 0
        if not task.cancelled() and task.exception() is None and self._second is task and not self.over:
            if self._drop is not None:
                self._drop()  # which gives back what the first one has
            self._second, self.held = None, size
            self._hand_on(*task.result())
            return
        self._downloader.slots.give_back(1)
        self._downloader.memory.give_back(size)
        if self._second is task and not task.cancelled() and not self.over:
            self._second = self.task = None
            if self._failure is not None:
                self.detour(self._failure, self._age)

    # what both have

    @property
    def _age(self) -> float:
        return asyncio.get_running_loop().time() - self._began

    def _hand_on(self, served: ObjectInfo, body: bytes) -> None:
        try:
            self._downloader.arrived(self, len(body), self._age)
        finally:
            self.landed(served, body)

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
        self.deadline = retry.deadline
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
        """Ask for it at once, if that can be done; what is not there at `until` is broken."""
        if self._ask is None:
            return None
        drop = self._ask(object.known, object, until)
        if drop is not None:
            self.hedging.begin(object, object.known.size)
        return drop

    def arrived(self, object: Express, size: int, seconds: float) -> None:
        """Count an object that came by express, and let others have its slot."""
        self.hedging.end(object)
        self.slots.came(size)
        self.slots.give_back(1)
        self._observe(seconds, size)
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
        self._observe(time.perf_counter() - started, len(body))
        return served, body

    async def _hedged(
        self, get: Get, info: ObjectInfo, turn: Turn, most: int | None, clock: asyncio.Timeout
    ) -> tuple[ObjectInfo, bytes]:
        """Ask for an object, and a second time if it is late, in its turn."""
        if not self.hedging.ready:
            return await get(info, partial(_admit, turn, most, clock))
        first = asyncio.create_task(_verified(get, info, partial(_admit, turn, most, clock)))
        watched = _Watched(first, self.slots, self.memory, turn.size)
        self.hedging.begin(watched, info.size)
        try:
            await watched.over_or_room
            if not watched.has_room:
                return await first
            return await either(first, asyncio.create_task(self.once_more(info, watched.admit)))
        finally:
            self.hedging.end(watched)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            watched.give_back()

    async def in_time(self, info: ObjectInfo, until: float) -> tuple[ObjectInfo, bytes]:
        """As `once_more`, until the object's deadline, by the clock of the loop."""
        async with asyncio.timeout_at(until):
            return await self.once_more(info, no_bound)

    async def once_more(self, info: ObjectInfo, reserve: Reserve) -> tuple[ObjectInfo, bytes]:
        """Make the second request for what is late."""
        self._on_hedge()
        return await _verified(self._again, info, reserve)

    def _observe(self, seconds: float, size: int) -> None:
        self.hedging.came(seconds, size)
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
    """A request that a task makes; and when it is late, a slot and room for a second one, if they come in time."""

    def __init__(self, request: asyncio.Task[Any], slots: Slots, memory: Memory, size: int) -> None:
        self.over_or_room: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.has_room = False
        self._slots, self._memory, self._size = slots, memory, size
        request.add_done_callback(self._over)

    def late(self) -> None:
        """See `Hedging`."""
        self._slots.offer(1, self._accept)

    def _accept(self) -> bool:
        if self.over_or_room.done() or not self._memory.take_now(self._size):
            return False
        self.has_room = True
        self.over_or_room.set_result(None)
        return True

    def _over(self, _: object) -> None:
        if not self.over_or_room.done():
            self.over_or_room.set_result(None)

    def admit(self, size: int) -> None:
        """See `Reserve`."""
        if size > self._size:
            raise SizeTold(size)

    def give_back(self) -> None:
        if self.has_room:
            self._slots.give_back(1)
            self._memory.give_back(self._size)


async def _verified(get: Get, info: ObjectInfo, reserve: Reserve) -> tuple[ObjectInfo, bytes]:
    served, body = await get(info, reserve)
    verify(info, served, body)
    return served, body


def _admit(turn: Turn, most: int | None, clock: asyncio.Timeout, size: int) -> None:
    """Make room for a body whose size its answer has told, and time, too. Raises `SizeTold` if there is none."""
    more = max(0, size - turn.size)
    if (most is not None and size > most) or not turn.hold(size):
        raise SizeTold(size)
    clock.reschedule((clock.when() or 0.0) + more / _SLOWEST)
