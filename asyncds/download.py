"""Ask a store for objects: attempts and retries, verification, and room in memory for what is under way."""

import asyncio
import contextlib
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any

from asyncds.errors import ObjectChanged, TransferFailed
from asyncds.large import PART
from asyncds.manifest import ObjectInfo
from asyncds.retry import Retry
from asyncds.store.base import ObjectStore, no_bound

__all__ = ["Downloader", "Memory", "SizeTold", "Slots", "verify"]

_MEMORY = 32 << 20
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


class Slots(asyncio.Semaphore):
    """Requests that may be in flight. Whoever has something to send when one is free is in `listeners`."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.listeners = weakref.WeakSet[Any]()


class Memory:
    """Bytes that may be on their way between socket and disk: first come, first served; a giant goes alone."""

    def __init__(self, size: int = _MEMORY) -> None:
        self.size = size
        self._used = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, amount: int) -> None:
        """Wait until there is room for so many bytes, and take it; to be given back by `give_back`."""
        if self.take_now(amount):
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((amount, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(amount)
            raise

    def take_now(self, amount: int) -> bool:
        """Take room if there is some now, and nobody waits; tell whether there was."""
        if self._waiting or not self._fits(amount):
            return False
        self._used += amount
        return True

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
            await self._memory.take(self.size)
        except BaseException:
            self._slots.release()
            raise
        self._held = self.size

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._slots.release()
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


class Downloader:
    """Brings the bytes of objects, within `slots` for requests and `memory` for what has arrived and is not yet gone.

    `observe` is told of each request that brought what was asked for how many seconds it took. `allowance`, in seconds,
    is added to the deadline of a download. Lives on one event loop.
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
        self._slots = slots
        self._count = self._bytes = 0

    def expected_size(self, info: ObjectInfo) -> int:
        """Bytes of the object, as listed, or as the mean of the others lets expect."""
        return info.size if info.size is not None else max(_UNLISTED, self._bytes // max(1, self._count))

    @contextlib.asynccontextmanager
    async def whole(
        self, info: ObjectInfo, *, allowance: float = 0.0, most: int | None = None
    ) -> AsyncGenerator[tuple[ObjectInfo, bytes], None]:
        """Yield an object, verified; the memory for it is held until the end of the context.

        Raises `SizeTold` when its answer announces more than `most` bytes, and what `Retry` and `verify` raise.
        """
        turn = _Turn(self._slots, self.memory, self.expected_size(info))
        try:
            served, body = await self._brought(info, turn, allowance, most)
            turn.hold(len(body))
            self._count += 1
            self._bytes += len(body)
            yield served, body
        finally:
            turn.release()

    async def parts(self, info: ObjectInfo, write: Callable[[int, bytes], Any], *, allowance: float = 0.0) -> None:
        """Bring an object of known size and ETag in parts of 8 MiB, and await `write(position, part)` for each.

        The parts arrive in any order. The first error cancels the others, and is raised: one of those that `whole`
        raises, `NoParts`, or what `write` raised.
        """
        assert info.size is not None
        starts = range(0, info.size, PART)
        parts = [slice(start, min(start + PART, info.size)) for start in starts]
        tasks = [asyncio.create_task(self._bring(info, part, write, allowance)) for part in parts]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _brought(
        self, info: ObjectInfo, turn: _Turn, allowance: float, most: int | None
    ) -> tuple[ObjectInfo, bytes]:
        """Ask for an object; anew, with room for it, if its answer tells a size that there was no room for."""
        attempt = partial(self._attempt, info, turn, most)
        for _ in range(_SIZES_TOLD):
            try:
                return await self._retry(attempt, info.uri, turn, turn.size / _SLOWEST + allowance)
            except SizeTold as told:
                if most is not None and told.size > most:
                    raise
                turn.size = told.size
        raise TransferFailed(f"{info.uri}: it was of another size each time it was asked for")

    async def _attempt(
        self, info: ObjectInfo, turn: _Turn, most: int | None, clock: asyncio.Timeout
    ) -> tuple[ObjectInfo, bytes]:
        started = time.perf_counter()
        served, body = await self._store.get(info, partial(_admit, turn, most, clock))
        verify(info, served, body)
        self._observe(time.perf_counter() - started)
        return served, body

    async def _bring(self, info: ObjectInfo, part: slice, write: Callable[[int, bytes], Any], allowance: float) -> None:
        turn = _Turn(self._slots, self.memory, part.stop - part.start)
        try:
            attempt = partial(self._attempt_part, info, part)
            allowance += (info.size or 0) / _SLOWEST
            await write(part.start, await self._retry(attempt, info.uri, turn, allowance))
        finally:
            turn.release()

    async def _attempt_part(self, info: ObjectInfo, part: slice, _: asyncio.Timeout) -> bytes:
        started = time.perf_counter()
        served, body = await self._store.get(info, no_bound, part)
        if len(body) != part.stop - part.start:
            raise TransferFailed(f"{info.uri}: {len(body)} bytes of a part of {part.stop - part.start} arrived")
        verify(info, served, None)
        self._observe(time.perf_counter() - started)
        return body


def _admit(turn: _Turn, most: int | None, clock: asyncio.Timeout, size: int) -> None:
    """Make room for a body whose size its answer has told, and time, too. Raises `SizeTold` if there is none."""
    more = max(0, size - turn.size)
    if (most is not None and size > most) or not turn.hold(size):
        raise SizeTold(size)
    clock.reschedule((clock.when() or 0.0) + more / _SLOWEST)
