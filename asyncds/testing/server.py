"""A fast S3 server that fails on purpose and counts what it is asked."""

import asyncio
import math
import os
import random
import socket
import ssl
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Any

from asyncds.errors import ConfigurationError
from asyncds.testing.connection import Connection
from asyncds.testing.faults import Fault, FaultScripts
from asyncds.testing.host import Factory, Hosted
from asyncds.testing.objects import Store, http_date
from asyncds.testing.s3 import Access, respond
from asyncds.testing.tls import TlsServer
from asyncds.testing.wire import Request, Response

_BACKLOG = 4096
_Z99 = NormalDist().inv_cdf(0.99)
_BATCH_BYTES = 16 * 1024 * 1024
_SLOW_DOWN = Fault.status(503)


@dataclass(frozen=True, slots=True)
class ServerStats:
    """What the server has seen since it started or since `reset_counts`.

    `requests` counts by operation: GET, HEAD, PUT, DELETE (objects), LIST, HEAD_BUCKET, LOCATION, CREATE_BUCKET, OTHER.
    `gets` counts the GETs of each `(bucket, key)`. Both give 0 for what was never asked. `bytes_sent` counts bodies
    without heads. A request is in flight from the arrival of its last byte until the kernel has taken the response, so
    `max_in_flight` shows a client's concurrency only under a latency: without one, small answers are immediate.
    """

    requests: Counter[str]
    gets: Counter[tuple[str, str]]
    bytes_sent: int
    connections_open: int
    connections_total: int
    in_flight: int
    max_in_flight: int

    @property
    def total(self) -> int:
        return self.requests.total()


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Latencies as networks have them: half of them above `median` seconds, one in a hundred above `p99`."""

    median: float
    p99: float

    def __post_init__(self) -> None:
        if not 0 < self.median <= self.p99 < float("inf"):
            raise ConfigurationError(f"{self!r}: the median lies above 0, and p99 not below it")

    def draw(self, generator: random.Random) -> float:
        """One of them, in seconds."""
        return generator.lognormvariate(math.log(self.median), math.log(self.p99 / self.median) / _Z99)


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


class _S3Service:
    """The server proper; everything here runs on one event loop."""

    def __init__(
        self,
        latency: float | LogNormal,
        access: Access,
        tls: tuple[str, str] | None,
        rate_limit: float | None,
    ) -> None:
        self.latency = latency
        self._tls = tls
        self._rate_limit = _RateLimit(rate_limit) if rate_limit is not None else None
        self._random = random.Random(0)
        self._access = access
        self._store = Store(access.region)
        self._scripts = FaultScripts()
        self._server: asyncio.Server | TlsServer
        self._connections: set[Connection] = set()
        self._connections_total = 0
        self._requests: Counter[str] = Counter()
        self._gets: Counter[tuple[str, bytes]] = Counter()
        self._bytes_sent = 0
        self._in_flight = 0
        self._max_in_flight = 0
        self._date = (0, b"")
        self._all_closed = asyncio.Event()
        self._stopping = False

    async def start(self) -> str:
        loop, listener = asyncio.get_running_loop(), socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG)
        endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
        if self._tls is None:
            self._server = await loop.create_server(lambda: Connection(self), sock=listener, backlog=_BACKLOG)
            return f"http://{endpoint}"
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*self._tls, password="")
        self._server = TlsServer(listener, context, lambda: Connection(self))
        return f"https://{endpoint}"

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
            return _SLOW_DOWN
        return self._scripts.take(operation, request.bucket, request.key)

    def respond(self, request: Request) -> Response:
        return respond(request, self._store, self._access)

    def date_line(self) -> bytes:
        now = int(time.time())
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

    def set_latency(self, latency: float | LogNormal) -> None:
        self.latency = latency

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
        gets = Counter({(bucket, key.decode("utf-8", "replace")): count for (bucket, key), count in self._gets.items()})
        return ServerStats(
            requests=Counter(self._requests),
            gets=gets,
            bytes_sent=self._bytes_sent,
            connections_open=len(self._connections),
            connections_total=self._connections_total,
            in_flight=self._in_flight,
            max_in_flight=self._max_in_flight,
        )

    def reset_counts(self) -> None:
        self._requests.clear()
        self._gets.clear()
        self._bytes_sent = 0
        self._connections_total = len(self._connections)
        self._max_in_flight = self._in_flight


class S3Server(Hosted):
    """Serve S3 from memory on a free loopback port, while the context is open.

    `with S3Server(latency=0.01) as server: server.endpoint` is `http://127.0.0.1:PORT`, path style. Any credentials do,
    unless `credentials=(access key, secret key)` or `region` are given: then requests that name others are refused as
    AWS refuses them (signatures are not checked). Every answer waits `latency` seconds, or as many as a `LogNormal`
    says, to within about a millisecond, and does not hold up others. Of more than `rate_limit` requests per second the
    rest are answered by 503 SlowDown, as S3 does, and are counted as well.

    With `tls=(certificate, key)`, the paths of two PEM files, it speaks TLS, and the endpoint begins with `https`.
    Clients trust it where `AWS_CA_BUNDLE` names the file of the authority that signed the certificate.

    The server runs on a thread of this process, or with `process=True` in a child, which leaves this process's GIL
    alone and ends with it however it ends; prefer that where a test forks. Methods may be called from any thread of
    the process that opened the context; they return when the change is in force.
    """

    def __init__(
        self,
        *,
        latency: float | LogNormal = 0.0,
        region: str | None = None,
        credentials: tuple[str, str] | None = None,
        tls: tuple[str | os.PathLike[str], str | os.PathLike[str]] | None = None,
        process: bool = False,
        rate_limit: float | None = None,
    ) -> None:
        super().__init__(process=process)
        if rate_limit is not None and not 0 < rate_limit < float("inf"):
            raise ConfigurationError(f"rate_limit is a number of requests per second, above 0, not {rate_limit!r}")
        self._rate_limit = rate_limit
        self._latency = _checked_latency(latency)
        self._access = Access(region, credentials)
        self._tls = None if tls is None else _checked_tls(*tls)

    def _factory(self) -> Factory:
        return partial(_S3Service, self._latency, self._access, self._tls, self._rate_limit)

    @property
    def latency(self) -> float | LogNormal:
        """Seconds before each answer; an assignment holds for the requests that arrive after it."""
        return self._latency

    @latency.setter
    def latency(self, seconds: float | LogNormal) -> None:
        self._call("set_latency", _checked_latency(seconds))
        self._latency = seconds

    @property
    def stats(self) -> ServerStats:
        """Return the counts as they are now."""
        stats: ServerStats = self._call("snapshot")
        return stats

    def reset_counts(self) -> None:
        """Set every count to zero, and `max_in_flight` to what is in flight now."""
        self._call("reset_counts")

    def create_bucket(self, name: str) -> None:
        """Create a bucket; one that exists stays as it is."""
        self._call("create_bucket", name)

    def put(self, bucket: str, key: str, body: bytes) -> str:
        """Store one object without HTTP, creating its bucket where needed; return its ETag, quoted."""
        return self.put_many(bucket, {key: body})[0]

    def put_many(self, bucket: str, objects: Mapping[str, bytes]) -> list[str]:
        """Store many objects without HTTP; return their ETags in the mapping's order."""
        self.create_bucket(bucket)
        etags: list[str] = []
        for batch in _batches(objects):
            etags += self._call("put_many", bucket, batch)
        return etags

    def delete(self, bucket: str, key: str) -> None:
        """Delete one object without HTTP; one that is not there is no error."""
        self._call("delete", bucket, key)

    def script(
        self,
        bucket: str,
        key: str | None,
        steps: Iterable[Fault],
        *,
        operation: str = "GET",
        shared: bool = False,
        forever: bool = False,
    ) -> None:
        """Let the n-th request from now meet the n-th step, and succeed once the steps are used up.

        With `key=None` that holds for every key of the bucket without a script of its own: each key goes through the
        steps by itself, or with `shared=True` the requests share them in order of arrival. With `forever=True` the last
        step repeats. `operation` is one of those that `ServerStats.requests` counts; for those on buckets (LIST and
        others) `key` is None. `Fault()` is a step that succeeds. A new script replaces the old one.
        """
        steps = tuple(steps)
        if forever and not steps:
            raise ConfigurationError("a script that repeats its last step needs at least one")
        self._call("script", operation, bucket, key, steps, shared, forever)

    def clear_scripts(self) -> None:
        """Forget every script."""
        self._call("clear_scripts")


def _checked_latency(latency: float | LogNormal) -> float | LogNormal:
    if not isinstance(latency, LogNormal) and not 0 <= latency < float("inf"):
        raise ConfigurationError(f"latency is a number of seconds, at least 0, not {latency!r}")
    return latency if isinstance(latency, LogNormal) else float(latency)


def _checked_tls(certificate: str | os.PathLike[str], key: str | os.PathLike[str]) -> tuple[str, str]:
    paths = os.path.abspath(certificate), os.path.abspath(key)
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(*paths, password="")  # ask nobody
    except OSError as error:  # an SSLError is one
        raise ConfigurationError(f"tls: {paths[0]} and {paths[1]} are no certificate and its key: {error}") from error
    return paths


def _batches(objects: Mapping[str, bytes]) -> Iterable[dict[str, bytes]]:
    """Split objects so that one message to the server stays far below the memory of a machine."""
    batch: dict[str, bytes] = {}
    size = 0
    for key, body in objects.items():
        batch[key] = body
        size += len(body) + len(key)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = {}, 0
    yield batch
