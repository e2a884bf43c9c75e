"""When a request takes so long that the same is asked for once more: the tail of the others, and a watch over all."""

import asyncio
import bisect
import itertools
import math
from typing import Protocol, TypeVar

__all__ = ["Hedging", "Late", "either"]

T = TypeVar("T")

_FACTOR, _PERCENTILE, _LEAST_S = 4.0, 95, 0.25
_SHARE, _SAVED = 0.02, 8.0
_LARGER, _SMALL = 4, 64 << 10  # times the mean size, and bytes: what is above both takes long because it is large
_ENOUGH, _MEMORY = 100, 2000  # requests: before anything is late, and that are remembered
_TICK_S = 0.05
_FASTEST_S, _GROWTH, _BUCKETS = 0.001, 1.2, 64


class Late(Protocol):
    """A request that can be told, once, that it is late."""

    def late(self) -> None: ...


class Hedging:
    """Tells the few requests that take much longer than the others, so that they are hedged (J. Dean and L. A. Barroso,
    "The Tail at Scale", CACM 56(2), 2013).

    Late is what takes longer than four times the 95th percentile of the last thousands, and than 250 ms. It is told at
    most once for every 50 requests that have come, so that second requests are 2 % of all where everything is late:
    then they would not help. Not the 99th percentile: where one in a hundred answers is slow, that is slow itself.

    Objects that are much larger than the mean are never late: they take their time. Nor does time count in which the
    loop stood still: what was on its way may have come long since. `ready` is whether enough has come to tell what is
    late; never, unless `enabled`. Lives on one event loop.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.ready = False
        self._enabled = enabled
        self._under_way: dict[Late, float] = {}  # since when, by `_clock`: in the order in which they began
        self._clock = self._ticked = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self._allowance = 0.0
        self._patience = math.inf
        self._counts = [0.0] * _BUCKETS
        self._seen = 0
        self._mean = 0.0  # bytes, of about the last hundred

    def begin(self, request: Late, size: int | None) -> None:
        """A request was sent, for so many bytes, if that is known; nothing happens before it is `ready`."""
        if not self.ready or (size is not None and size > max(_SMALL, _LARGER * self._mean)):
            return
        now = asyncio.get_running_loop().time()
        if self._watch is None:
            self._watch_on(now)
        self._under_way[request] = self._clock + min(now - self._ticked, _TICK_S)

    def end(self, request: Late) -> None:
        """It is over, in whatever way."""
        self._under_way.pop(request, None)

    def came(self, seconds: float, size: int) -> None:
        """A request brought so many bytes, so many seconds after it was sent."""
        self._mean += (size - self._mean) / min(self._seen + 1, _ENOUGH)
        self._allowance = min(_SAVED, self._allowance + _SHARE)
        bucket = math.ceil(math.log(max(seconds, _FASTEST_S) / _FASTEST_S, _GROWTH))
        self._counts[min(_BUCKETS - 1, bucket)] += 1
        self._seen += 1
        if self._seen % _ENOUGH == 0:
            self._learn()

    def _learn(self) -> None:
        """Take the percentile anew; what is long ago counts for less and less."""
        reached = list(itertools.accumulate(self._counts))
        tail = _FASTEST_S * _GROWTH ** bisect.bisect_left(reached, reached[-1] * _PERCENTILE / 100)
        self._patience = max(_LEAST_S, _FACTOR * tail)
        self.ready = self._enabled
        if reached[-1] >= _MEMORY:
            self._counts = [count / 2 for count in self._counts]

    def _watch_on(self, now: float) -> None:
        self._ticked = now
        self._watch = asyncio.get_running_loop().call_later(_TICK_S, self._tick)

    def _tick(self) -> None:
        now = asyncio.get_running_loop().time()
        self._clock += min(now - self._ticked, 2 * _TICK_S)
        self._watch = None
        while self._under_way and self._allowance >= 1:
            request, began = next(iter(self._under_way.items()))
            if self._clock - began <= self._patience:
                break
            self.end(request)
            self._allowance -= 1
            request.late()
        if self._under_way:
            self._watch_on(now)


async def either(*tasks: asyncio.Task[T]) -> T:
    """Return the first success, or raise the last failure. All tasks are over when this ends."""
    waiting = set(tasks)
    try:
        while True:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            good = [task for task in done if not task.cancelled() and task.exception() is None]
            if good or not waiting:
                return (good or list(done))[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
