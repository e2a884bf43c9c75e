"""What runs behind the S3 server: connections, buckets, scripts and counts, on one event loop."""

import asyncio
import random
import socket
import ssl
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from asyncds.errors import ConfigurationError
from asyncds.testing.access import Access, Keys
from asyncds.testing.connection import Connection
from asyncds.testing.faults import Fault, FaultScripts
from asyncds.testing.latency import Latency
from asyncds.testing.objects import Store, http_date
from asyncds.testing.s3 import respond
from asyncds.testing.tls import TlsServer
from asyncds.testing.wire import Request, Response

_BACKLOG = 4096
_SLOW_DOWN, _NO_FAULT = Fault.slow_down(), Fault()


@dataclass(frozen=True, slots=True)
class ServerStats:
    """What the server has seen since it started or since `reset_counts`.

    `requests` counts by operation: GET, HEAD, PUT, DELETE (objects), LIST, HEAD_BUCKET, LOCATION, CREATE_BUCKET, OTHER.
    `gets` counts the GETs of each `(bucket, key)`, and `again` those after its first, which are retries, unless it
    comes in parts. `faulted` counts the requests that met a fault of a script, by `(bucket, key)`, with an empty key
    for those on buckets; `refused` those that the rate limit refused. What was never asked counts 0. `bytes_sent`
    counts bodies without heads. A request is in flight from the arrival of its last byte until the kernel has taken the
    response, so `max_in_flight` shows a client's concurrency only under a latency: without one, small answers are
    immediate.
    """

    requests: Counter[str]
    gets: Counter[tuple[str, str]]
    faulted: Counter[tuple[str, str]]
    refused: int
    bytes_sent: int
    connections_open: int
    connections_total: int
    in_flight: int
    max_in_flight: int

    @property
    def total(self) -> int:
        return self.requests.total()

    @property
    def again(self) -> Counter[tuple[str, str]]:
        return Counter({name: count - 1 for name, count in self.gets.items() if count > 1})


class _RateLimit:
    """So many requests per second, and those of a tenth of a second more at once: a token bucket."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._tokens = self._most = max(1.0, rate / 10)
        self._filled = time.monotonic()

    def refuses(self) -> bool:
        """Whether a request that comes now is one too many."""
        now = time.monotonic()
        self._tokens = min(self._most, self._tokens + (now - self._filled) * self._rate)
        self._filled = now
        if self._tokens < 1:
            return True
        self._tokens -= 1
        return False


class S3Service:
    """The server proper; everything here runs on one event loop."""

    def __init__(
        self,
        latency: Latency,
        access: Access,
        tls: tuple[str, str] | None,
        rate_limit: float | None,
        idle_timeout: float | None,
        clock_skew: float,
        port: int,
    ) -> None:
        self.latency = latency
        self.idle_timeout = idle_timeout
        self.clock_skew = clock_skew
        self._tls = tls
        self._port = port
        self._context: ssl.SSLContext | None = None
        self._server: asyncio.Server | TlsServer
        self._rate_limit = _RateLimit(rate_limit) if rate_limit is not None else None
        self._random = random.Random(0)
        self._access = access
        access.clock = self._now
        self._store = Store(access.region)
        self._scripts = FaultScripts()
        self._connections: set[Connection] = set()
        self._connections_total = 0
        self._requests: Counter[str] = Counter()
        self._gets: Counter[tuple[str, bytes]] = Counter()
        self._faulted: Counter[tuple[str, bytes]] = Counter()
        self._refused = 0
        self._bytes_sent = 0
        self._in_flight = 0
        self._max_in_flight = 0
        self._date = (0, b"")
        self._all_closed = asyncio.Event()
        self._stopping = False

    async def start(self) -> str:
        loop = asyncio.get_running_loop()
        listener = socket.create_server(("127.0.0.1", self._port), backlog=_BACKLOG)
        place = f"127.0.0.1:{listener.getsockname()[1]}"
        if self._tls is None:
            self._server = await loop.create_server(lambda: Connection(self), sock=listener, backlog=_BACKLOG)
            return f"http://{place}"
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.set_certificate(*self._tls)
        self._server = TlsServer(listener, self._context, lambda: Connection(self))
        return f"https://{place}"

    async def stop(self) -> None:
        self._stopping = True
        self._server.close()
        if isinstance(self._server, TlsServer):  # a handshake may just have been finished
            await self._server.wait_closed()
        for connection in tuple(self._connections):
            connection.abort()
        while self._connections:
            self._all_closed.clear()
            await self._all_closed.wait()
        await self._server.wait_closed()

    def opened(self, connection: Connection) -> None:
        self._connections.add(connection)
        if self._stopping:
            connection.abort()
        self._connections_total += 1

    def closed(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._all_closed.set()

    def begin(self, request: Request) -> Fault | None:
        operation = request.operation
        self._requests[operation] += 1
        if operation == "GET":
            self._gets[request.bucket, request.key] += 1
        self._in_flight += 1
        if self._in_flight > self._max_in_flight:
            self._max_in_flight = self._in_flight
        if self._rate_limit is not None and self._rate_limit.refuses():
            self._refused += 1
            return _SLOW_DOWN
        fault = self._scripts.take(operation, request.bucket, request.key)
        if fault is not None and fault != _NO_FAULT:
            self._faulted[request.bucket, request.key] += 1
        return fault

    def respond(self, request: Request) -> Response:
        return respond(request, self._store, self._access)

    def date_line(self) -> bytes:
        now = int(self._now())
        if now != self._date[0]:
            self._date = now, f"Date: {http_date(now)}\r\n".encode()
        return self._date[1]

    def sent(self, body_bytes: int) -> None:
        self._bytes_sent += body_bytes

    def end(self) -> None:
        self._in_flight -= 1

    def delay(self) -> float:
        """Seconds before the next answer."""
        return self.latency if isinstance(self.latency, float) else self.latency.draw(self._random)

    def _now(self) -> float:
        return time.time() + self.clock_skew

    def set_latency(self, latency: Latency) -> None:
        self.latency = latency

    def set_clock_skew(self, seconds: float) -> None:
        self.clock_skew = seconds

    def set_certificate(self, certificate: str, key: str) -> None:
        if self._context is None:
            raise ConfigurationError("this server speaks plain http: start it with tls")
        self._context.load_cert_chain(certificate, key, password="")

    def set_credentials(self, credentials: Keys) -> None:
        self._access.replace(credentials)

    def derive(self, *args: Any) -> None:
        self._store.derive(*args)

    def create_bucket(self, name: str) -> None:
        self._store.create_bucket(name)

    def put_many(self, bucket: str, objects: dict[str, bytes]) -> list[str]:
        return self._store.put_many(bucket, objects)

    def delete(self, bucket: str, key: str) -> None:
        self._store.delete(bucket, key)

    def script(self, *args: Any) -> None:
        self._scripts.add(*args)

    def clear_scripts(self) -> None:
        self._scripts.clear()

    def snapshot(self) -> ServerStats:
        return ServerStats(
            requests=Counter(self._requests),
            gets=_by_text(self._gets),
            faulted=_by_text(self._faulted),
            refused=self._refused,
            bytes_sent=self._bytes_sent,
            connections_open=len(self._connections),
            connections_total=self._connections_total,
            in_flight=self._in_flight,
            max_in_flight=self._max_in_flight,
        )

    def reset_counts(self) -> None:
        self._requests.clear()
        self._gets.clear()
        self._faulted.clear()
        self._refused = 0
        self._bytes_sent = 0
        self._connections_total = len(self._connections)
        self._max_in_flight = self._in_flight


def _by_text(counts: Counter[tuple[str, bytes]]) -> Counter[tuple[str, str]]:
    return Counter({(bucket, key.decode("utf-8", "replace")): count for (bucket, key), count in counts.items()})
