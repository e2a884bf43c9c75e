"""Networks, simulated event by event, for what decides how many requests are in flight."""

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from asyncds.limiter import Limiter
from asyncds.testing import LogNormal

TICK_S = 0.02


@dataclass(frozen=True)
class Network:
    """A client, the way to a server, and the server; what is None has no bound.

    `latency` are the seconds from a request to its answer where nobody queues. `bandwidth` is in bytes per second.
    `servers` work on so many requests at once, `service` seconds each. Of more than `rate` requests per second the
    rest are refused, or else queue if `queues`. `cpu` are seconds of the client's thread for each answer, and `fails`
    is the share of requests that fail whatever the client does.
    """

    latency: float | LogNormal = 0.01
    bandwidth: float | None = None
    servers: int | None = None
    service: float = 0.0
    rate: float | None = None
    queues: bool = False
    cpu: float = 150e-6
    fails: float = 0.0


class Second(NamedTuple):
    """What came in a tick."""

    time: float
    limit: int
    objects: int
    failures: int


class _Queue:
    """A line in front of so many counters."""

    def __init__(self) -> None:
        self._free: list[float] = []

    def through(self, time: float, counters: int, seconds: float) -> float:
        """When somebody who comes at `time` has been served."""
        while len(self._free) > counters:
            heapq.heappop(self._free)
        start = time if len(self._free) < counters else max(time, heapq.heappop(self._free))
        heapq.heappush(self._free, start + seconds)
        return start + seconds


class Simulation:
    """Runs a client whose limit is a number, or a `Limiter`, on a network that may change.

    `sizes` draws the bytes of an object. `demand` tells how many objects are wanted by a time, in all; by default all
    that can be had.
    """

    def __init__(
        self,
        network: Network,
        limit: Limiter | int,
        *,
        seed: int = 0,
        sizes: Callable[[random.Random], int] = lambda _: 10_000,
        demand: Callable[[float], float] = lambda _: float("inf"),
    ) -> None:
        self.network = network
        self.time = 0.0
        self.refuses = 0  # so many of the next requests
        self._limiter = limit if isinstance(limit, Limiter) else None
        self.limit = limit.limit if isinstance(limit, Limiter) else limit
        self._sizes, self._demand = sizes, demand
        self._random = random.Random(seed)
        self._events: list[tuple[float, int, Callable[[int], object], int]] = []  # when, the how-manieth, what, size
        self._number = 0
        self._wire, self._counters, self._thread, self._gate = _Queue(), _Queue(), _Queue(), _Queue()
        self._in_flight = self._asked = 0
        self._again: deque[int] = deque()
        self._tokens, self._filled = 0.0, 0.0

    def run(self, seconds: float) -> list[Second]:
        """Go on for so long; returns what came, tick by tick."""
        return list(self._ticks(self.time + seconds))

    def _ticks(self, end: float) -> Iterator[Second]:
        while self.time < end - TICK_S / 2:
            self._objects = self._bytes = self._failures = 0
            bound, until = self._send(), self.time + TICK_S
            while self._events and self._events[0][0] <= until:
                self.time, _, what, size = heapq.heappop(self._events)
                what(size)
                bound = self._send() and bound
            self.time = until
            if self._limiter is not None:
                self.limit = self._limiter.told(TICK_S, self._objects, self._bytes, self._failures, bound=bound)
            yield Second(self.time, self.limit, self._objects, self._failures)

    def _send(self) -> bool:
        """Ask for what may be asked for; tells whether more was wanted."""
        while self._again or self._asked < self._demand(self.time):
            if self._in_flight >= self.limit:
                return True
            if self._again:
                self._ask(self._again.popleft())
            else:
                self._asked += 1
                self._ask(self._sizes(self._random))
        return False

    def _ask(self, size: int) -> None:
        latency = self.network.latency
        self._in_flight += 1
        seconds = latency.draw(self._random) if isinstance(latency, LogNormal) else latency
        refused = self._refused() or self._random.random() < self.network.fails
        self._at(self.time + seconds, self._refusal if refused else self._at_server, size)

    def _at_server(self, size: int) -> None:
        network, time = self.network, self.time
        if network.queues and network.rate is not None:
            time = self._gate.through(time, 1, 1 / network.rate)
        if network.servers is not None:
            time = self._counters.through(time, network.servers, network.service)
        if network.bandwidth is not None:
            time = self._wire.through(time, 1, size / network.bandwidth)
        self._at(time, self._at_client, size)

    def _refusal(self, size: int) -> None:
        self._at(self._thread.through(self.time, 1, self.network.cpu), self._failed, size)

    def _at_client(self, size: int) -> None:
        self._at(self._thread.through(self.time, 1, self.network.cpu), self._came, size)

    def _came(self, size: int) -> None:
        self._in_flight -= 1
        self._objects += 1
        self._bytes += size

    def _failed(self, size: int) -> None:
        self._in_flight -= 1
        self._failures += 1
        self._at(self.time + self._random.uniform(0, 0.1), self._again.append, size)

    def _refused(self) -> bool:
        if self.refuses:
            self.refuses -= 1
            return True
        rate = self.network.rate
        if rate is None or self.network.queues:
            return False
        self._tokens = min(rate * 0.1, self._tokens + (self.time - self._filled) * rate)
        self._filled = self.time
        if self._tokens < 1:
            return True
        self._tokens -= 1
        return False

    def _at(self, time: float, what: Callable[[int], object], size: int) -> None:
        self._number += 1
        heapq.heappush(self._events, (time, self._number, what, size))


def goodput(ticks: list[Second], since: float = 0.0) -> float:
    """Objects per second."""
    counted = [tick.objects for tick in ticks if tick.time > since]
    return sum(counted) / (len(counted) * TICK_S)
