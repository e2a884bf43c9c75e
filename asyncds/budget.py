"""What is under way is bounded: requests in flight, and bytes between socket and disk."""

import asyncio
import contextlib
import logging
import time
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from asyncds.limiter import Limiter, most

__all__ = ["Budget", "Memory", "Slots", "Turn"]

_log = logging.getLogger(__name__)
_MEMORY = 32 << 20
_TICK_S = 0.02
_WINDOW = 512  # that the writer never waits for a limiter which has found that few requests suffice


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


class Turn:
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
