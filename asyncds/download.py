"""Ask a store for objects: attempts and retries, verification, and room in memory for what is under way."""

import asyncio
import contextlib
import logging
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from functools import partial
from typing import Any, Literal

from asyncds.errors import AsyncdsError, ObjectChanged, TransferFailed
from asyncds.large import PART
from asyncds.limiter import Limiter, most
from asyncds.manifest import ObjectInfo
from asyncds.retry import Retry
from asyncds.store.base import First, ObjectStore, failed, no_bound, stands_for

__all__ = ["Budget", "Downloader", "Express", "Memory", "SizeTold", "Slots", "verify"]

_log = logging.getLogger(__name__)
_MEMORY = 32 << 20
_TICK_S = 0.02
_WINDOW = 512  # that the writer never waits for a limiter which has found that few requests suffice
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


class SizeTold(BaseException):
    """The answer announces more than there is room for now. Not an `Exception`: no store may take it for its own."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


class Budget:
    """So much of something, given out in the order in which it was asked for; who asks for more than all has it alone.

    Lives on one event loop.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._used = 0
        self._waiting: deque[tuple[int, Callable[[], bool]]] = deque()

    @property
    def spent(self) -> bool:
        """Whether there is nothing for one who asks now."""
        return bool(self._waiting) or self._used >= self.size

    def offer(self, amount: int, accept: Callable[[], bool]) -> None:
        """Call `accept` when there is so much for it, now or in its turn. What it accepts is given back later."""
        if self._waiting or not self._fits(amount):
            self._waiting.append((amount, accept))
        else:
            self._hand(amount, accept)

    async def take(self, amount: int) -> None:
        """Wait until there is so much, and take it; to be given back by `give_back`."""
        if self.take_now(amount):
            return
        turn = asyncio.get_running_loop().create_future()
        place = amount, partial(_granted, turn)
        self._waiting.append(place)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(amount)
            else:
                with contextlib.suppress(ValueError):  # it was its turn, just now
                    self._waiting.remove(place)
                self.give_back(0)  # to those who stood behind
            raise

    def take_now(self, amount: int) -> bool:
        """Take so much if it is there now, and nobody waits; tell whether it was."""
        if self._waiting or not self._fits(amount):
            return False
        self._used += amount
        return True

    def give_back(self, amount: int) -> None:
        self._used -= amount
        while self._waiting and self._fits(self._waiting[0][0]):
            self._hand(*self._waiting.popleft())

    def _hand(self, amount: int, accept: Callable[[], bool]) -> None:
        self._used += amount
        try:
            accepted = accept()
        except Exception:  # nobody who gives something back may come to harm by that
            accepted = False
            _log.exception("something was offered in vain")
        if not accepted:
            self._used -= amount

    def _fits(self, amount: int) -> bool:
        return self._used == 0 or self._used + amount <= self.size


def _granted(turn: asyncio.Future[None]) -> bool:
    if turn.done():
        return False
    turn.set_result(None)
    return True


class Slots(Budget):
    """Requests that may be in flight: a number of them, or as many as a limiter says, which is told what they bring.

    Whoever has something to send when one is free is in `listeners`, and says by `held_up` whether it would send more.
    When there are to be fewer, what is in flight lands. `most` is how many there can ever be.
    """

    def __init__(self, size: int | Limiter) -> None:
        self._limiter = size if isinstance(size, Limiter) else None
        super().__init__(size.limit if isinstance(size, Limiter) else size)
        self.most = size.most if isinstance(size, Limiter) else size
        self.listeners = weakref.WeakSet[Any]()
        self._objects = self._bytes = self._failures = 0  # since the limiter was told
        self._watch: asyncio.TimerHandle | None = None
        self._told, self._bound = 0.0, False

    @classmethod
    def of(cls, concurrency: int | Literal["auto"], processes: int = 1) -> "Slots":
        """The share of one of so many processes in what a rank may have in flight, at least one request."""
        if concurrency == "auto":
            return cls(Limiter(most=max(1, most() // processes)))
        return cls(max(1, concurrency // processes))

    @property
    def window(self) -> int:
        """How many objects may be under way at once, in flight or waiting to be stored."""
        return 2 * self.size if self._limiter is None else max(_WINDOW, 2 * self.size)

    def came(self, size: int) -> None:
        """Count an object, or a part of one, that was brought as it should be."""
        self._objects += 1
        self._bytes += size
        if self._watch is None and self._limiter is not None:
            self._watch_on()

    def failed(self) -> None:
        """Count a request that came to nothing, and would be repeated."""
        self._failures += 1
        if self._watch is None and self._limiter is not None:
            self._watch_on()

    def _watch_on(self) -> None:
        if self._watch is None:
            self._told, self._bound = time.perf_counter(), False
        self._watch = asyncio.get_running_loop().call_later(_TICK_S, self._tell)

    def _tell(self) -> None:
        """Tell the limiter from time to time what has come, rather than with each object, while something is due."""
        assert self._limiter is not None
        now, held_up = time.perf_counter(), bool(self._waiting) or any(other.held_up for other in self.listeners)
        came = self._objects, self._bytes, self._failures
        size = self._limiter.told(now - self._told, *came, bound=held_up and self._bound)
        self._objects = self._bytes = self._failures = 0
        self._told, self._bound = now, held_up
        more, self.size = size > self.size, size
        if self._used or self._waiting:
            self._watch_on()
        else:
            self._watch = None
        if more:
            self.give_back(0)
            for other in list(self.listeners):
                other.launch_ahead()


class Memory(Budget):
    """Bytes that may be on their way between socket and disk."""

    def __init__(self, size: int = _MEMORY) -> None:
        super().__init__(size)


class _Turn:
    """A slot for one request, and room in memory for its answer. The room is kept where the attempt succeeds.

    Whoever has room has a slot, too, and goes on: nobody can wait for the one while others wait for the other.
    """

    def __init__(self, slots: Slots, memory: Memory, size: int) -> None:
        self.size = size
        self._slots = slots
        self._memory = memory
        self._held = 0

    async def __aenter__(self) -> None:
        await self._slots.take(1)
        try:
            await self._memory.take(self.size)
        except BaseException:
            self._slots.give_back(1)
            raise
        self._held = self.size

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._slots.give_back(1)
        if kind is not None:
            self.release()

    def hold(self, size: int) -> bool:
        """Hold room for so many bytes instead of what is held now, if there is some; tell whether there was."""
        if size > self._held and not self._memory.take_now(size - self._held):
            return False
        if size < self._held:
            self._memory.give_back(self._held - size)
        self.size = self._held = size
        return True

    def release(self) -> None:
        held, self._held = self._held, 0
        self._memory.give_back(held)


class Express:
    """An object that is sent for without a task; what becomes of it is for subclasses to say.

    `known` is the object, of known size. `held` are the bytes of memory that are kept for it from its request on, to be
    given back by who gets it. `spent` is how many seconds of its deadline are over. When it is `over`, nobody needs it
    any more.
    """

    __slots__ = ("_began", "_downloader", "held", "known", "over", "spent")

    def __init__(self, downloader: "Downloader", info: ObjectInfo) -> None:
        self._downloader = downloader
        self._began = 0.0
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
                if downloader.ask(self, self._began + size / _SLOWEST - self.spent):
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
        try:
            self._downloader.arrived(len(body), asyncio.get_running_loop().time() - self._began)
        finally:
            self.landed(served, body)

    def otherwise(self, first: First) -> None:
        """See `Outcome`."""
        self._downloader.slots.give_back(1)
        self.release()
        self.detour(first, asyncio.get_running_loop().time() - self._began)

    def release(self) -> None:
        """Give back the memory that is held for it."""
        held, self.held = self.held, 0
        self._downloader.memory.give_back(held)


class Downloader:
    """Brings the bytes of objects, within `slots` for requests and `memory` for what has arrived and is not yet gone.

    `observe` is told of each request that brought what was asked for how many seconds it took. `spent` is how
    many seconds of a download's deadline are over before it begins. Lives on one event loop.
    """

    def __init__(
        self,
        store: ObjectStore,
        retry: Retry,
        slots: Slots,
        memory: Memory,
        observe: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.memory = memory
        self._observe = observe
        self._store = store
        self._retry = retry
        self.slots = slots
        self._count = self._bytes = 0
        self._ask: Callable[[ObjectInfo, Express, float], bool] | None = None
        if stands_for(store, "ask", "get"):
            self._ask = store.ask  # type: ignore[attr-defined]

    def express(self, object: Express) -> None:
        """Send for an object as soon as there is a slot, without a task.

        That is how a healthy object of a store that has `ask` comes, at less than half the cost of `whole`; where
        anything is the matter, it has to make a detour.
        """
        if self._ask is None:
            object.detour(None, 0.0)
        else:
            self.slots.offer(1, object.depart)

    def ask(self, object: Express, until: float) -> bool:
        """Ask for it at once, if that can be done, and tell whether it was; it has the deadline from `until` on."""
        return self._ask is not None and self._ask(object.known, object, until + self._retry.deadline)

    def arrived(self, size: int, seconds: float) -> None:
        """Count an object that came by express, and let others have its slot."""
        self.slots.came(size)
        self.slots.give_back(1)
        self._observe(seconds)
        self._retry.reached = True
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
        turn = _Turn(self.slots, self.memory, self.expected_size(info))
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
        self, info: ObjectInfo, turn: _Turn, spent: float, most: int | None, first: First | None
    ) -> tuple[ObjectInfo, bytes]:
        """Ask for an object; anew, with room for it, if its answer tells a size that there was no room for."""
        attempts = iter(() if first is None else (first,))
        attempt = partial(self._attempt, info, turn, most, attempts)
        for _ in range(_SIZES_TOLD):
            try:
                return await self._retry(attempt, info.uri, turn, turn.size / _SLOWEST, spent)
            except SizeTold as told:
                if most is not None and told.size > most:
                    raise
                turn.size = told.size
        raise TransferFailed(f"{info.uri}: it was of another size each time it was asked for")

    async def _attempt(
        self, info: ObjectInfo, turn: _Turn, most: int | None, others: Iterator[First], clock: asyncio.Timeout
    ) -> tuple[ObjectInfo, bytes]:
        started = time.perf_counter()
        other = next(others, None)
        asked = other() if other is not None else self._store.get(info, partial(_admit, turn, most, clock))
        with self._counted():
            served, body = await asked
            verify(info, served, body)
        self.slots.came(len(body))
        self._observe(time.perf_counter() - started)
        return served, body

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
        turn = _Turn(self.slots, self.memory, part.stop - part.start)
        try:
            attempt = partial(self._attempt_part, info, part)
            allowance = (info.size or 0) / _SLOWEST
            await write(part.start, await self._retry(attempt, info.uri, turn, allowance, spent))
        finally:
            turn.release()

    async def _attempt_part(self, info: ObjectInfo, part: slice, _: asyncio.Timeout) -> bytes:
        started = time.perf_counter()
        with self._counted():
            served, body = await self._store.get(info, no_bound, part)
            if len(body) != part.stop - part.start:
                raise TransferFailed(f"{info.uri}: {len(body)} bytes of a part of {part.stop - part.start} arrived")
            verify(info, served, None)
        self.slots.came(len(body))
        self._observe(time.perf_counter() - started)
        return body


def _admit(turn: _Turn, most: int | None, clock: asyncio.Timeout, size: int) -> None:
    """Make room for a body whose size its answer has told, and time, too. Raises `SizeTold` if there is none."""
    more = max(0, size - turn.size)
    if (most is not None and size > most) or not turn.hold(size):
        raise SizeTold(size)
    clock.reschedule((clock.when() or 0.0) + more / _SLOWEST)
