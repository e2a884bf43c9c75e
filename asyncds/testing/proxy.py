"""A TCP proxy that puts a network's round trip in front of a server on this machine."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast
from urllib.parse import urlsplit

from asyncds.errors import ConfigurationError
from asyncds.testing.connection import reset
from asyncds.testing.host import Factory, Hosted
from asyncds.testing.wire import Body, MalformedRequestError, body_reader, parse_head

_BACKLOG = 4096
_TRAVELLING_BYTES = 16 * 1024 * 1024
_MAX_HEAD = 64 * 1024
# The loop's timers count whole milliseconds: what is due within half of one goes now, so that the errors cancel out.
_TIMER_SLACK_S = 0.0005


@dataclass(frozen=True, slots=True)
class ProxyStats:
    """What has passed since the proxy started; `max_open` is the highest number of connections at once.

    `requests` counts by operation what reached the target, as `ServerStats` does, if the proxy was asked to count.
    """

    connections_open: int
    connections_total: int
    max_open: int
    bytes_up: int
    bytes_down: int
    requests: Counter[str]


class _RequestCounter:
    """Counts the requests in what a client sends; what is no HTTP, such as TLS, ends the counting of its connection."""

    def __init__(self, requests: Counter[str]) -> None:
        self._requests = requests
        self._buffer = b""
        self._body: Body | None = None
        self._readable = True

    def __call__(self, chunk: bytes) -> None:
        if not self._readable:
            return
        self._buffer += chunk
        try:
            while self._buffer and self._next():
                pass
        except MalformedRequestError:
            self._readable, self._buffer = False, b""

    def _next(self) -> bool:
        """Take a head or a body out of the buffer; False if its end has not come yet."""
        if self._body is not None:
            rest = self._body.feed(self._buffer)
            self._buffer = rest or b""
            if rest is not None:
                self._body = None
            return rest is not None
        head, separator, rest = self._buffer.partition(b"\r\n\r\n")
        if not separator:
            if len(head) > _MAX_HEAD:
                raise MalformedRequestError(f"request head over {_MAX_HEAD} bytes")
            return False
        request = parse_head(head)
        self._requests[request.operation] += 1
        self._buffer, self._body = rest, body_reader(request)
        return True


class _Pipe:
    """One direction of a connection: each chunk comes out half a round trip after it went in.

    A chunk of b"" is the end of the stream, None a reset. Nothing leaves before `opens_at`.
    """

    def __init__(self, service: "_ProxyService", source: "_End", sink: "_End", opens_at: float) -> None:
        self.bytes = 0
        self.watch: Callable[[bytes], None] | None = None
        self._service = service
        self._source = source
        self._sink = sink
        self._opens_at = opens_at
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[float, bytes | None]] = deque()
        self._travelling = 0
        self._timer: asyncio.TimerHandle | None = None

    def push(self, chunk: bytes | None) -> None:
        now = time.monotonic()
        self._queue.append((max(now, self._opens_at) + self._service.rtt / 2, chunk))
        size = len(chunk or b"")
        self.bytes += size
        self._travelling += size
        if self._travelling > _TRAVELLING_BYTES:
            self._source.pause(True)
        if self._timer is None:
            self._wait_or_flush(now)

    def flush(self) -> None:
        """Hand over what has travelled long enough, unless the sink is not connected or has no room."""
        self._cancel_timer()
        if self._queue:
            self._wait_or_flush(time.monotonic())

    def cancel(self) -> None:
        self._cancel_timer()
        self._queue.clear()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait_or_flush(self, now: float) -> None:
        while self._queue and self._sink.writable:
            due, chunk = self._queue[0]
            if due - now > _TIMER_SLACK_S:
                self._timer = self._loop.call_later(due - now, self.flush)
                return
            self._queue.popleft()
            self._travelling -= len(chunk or b"")
            self._sink.accept(chunk)
            if self.watch is not None and chunk:
                self.watch(chunk)
        if self._travelling <= _TRAVELLING_BYTES // 2:
            self._source.pause(False)


class _End(asyncio.Protocol):
    """The proxy's socket to the client, or the one to the target."""

    def __init__(self, link: "_Link") -> None:
        self.outgoing: _Pipe
        self.incoming: _Pipe
        self.transport: asyncio.Transport | None = None
        self.stream_ended = False
        self.lost = False
        self._link = link
        self._write_paused = False
        self._read_paused = False

    @property
    def writable(self) -> bool:
        return self.transport is not None and not self._write_paused

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._link.end_opened(self)
        self.incoming.flush()

    def data_received(self, data: bytes) -> None:
        self.outgoing.push(data)

    def eof_received(self) -> bool:
        self.outgoing.push(b"")
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        # The other direction would wait for room that does not come.
        self._write_paused = False
        if exc is not None:
            self.outgoing.push(None)
        self.incoming.flush()
        self._link.end_lost()

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        self.incoming.flush()

    def pause(self, paused: bool) -> None:
        if paused == self._read_paused or self.transport is None or self.lost or self.transport.is_closing():
            return
        self._read_paused = paused
        if paused:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()

    def accept(self, chunk: bytes | None) -> None:
        """Carry out what arrived: bytes, the end of the stream, or a reset."""
        if self.transport is None or self.lost or self.transport.is_closing():
            return
        if chunk is None:
            reset(self.transport)
        elif chunk:
            self.transport.write(chunk)
        else:
            self.stream_ended = True
            self.transport.write_eof()
            self._link.stream_ended()

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class _Link:
    """One proxied connection: two ends and the two pipes between them."""

    def __init__(self, service: "_ProxyService") -> None:
        self._service = service
        self.client = _End(self)
        self.target = _End(self)
        # The client's connect() returned at once, for the kernel answered it: the round trip it saved is added here.
        opened = time.monotonic()
        self.up = _Pipe(service, self.client, self.target, opens_at=opened + service.rtt)
        self.down = _Pipe(service, self.target, self.client, opens_at=opened + service.rtt / 2)
        self.up.watch = service.watch()
        self.client.outgoing = self.target.incoming = self.up
        self.target.outgoing = self.client.incoming = self.down

    def end_opened(self, end: _End) -> None:
        if end is self.client:
            self._service.opened(self)

    def stream_ended(self) -> None:
        if self.client.stream_ended and self.target.stream_ended:
            self.client.close()
            self.target.close()

    def target_refused(self) -> None:
        self.target.lost = True
        self.down.push(None)
        self.end_lost()

    def end_lost(self) -> None:
        if self.client.lost and self.target.lost:
            self.up.cancel()
            self.down.cancel()
            self._service.closed(self)

    def abort(self) -> None:
        self.client.abort()
        self.target.abort()


class _ProxyService:
    """The proxy proper; everything here runs on one event loop."""

    def __init__(self, scheme: str, host: str, port: int, rtt: float, count_requests: bool) -> None:
        self.rtt = rtt
        self._counting = count_requests
        self._requests: Counter[str] = Counter()
        self._scheme = scheme
        self._target = host, port
        self._links: set[_Link] = set()
        self._dials: set[asyncio.Task[None]] = set()
        self._all_closed = asyncio.Event()
        self._stopping = False
        self._total = 0
        self._max_open = 0
        self._bytes_closed = (0, 0)

    async def start(self) -> str:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Link(self).client, "127.0.0.1", 0, backlog=_BACKLOG)
        return f"{self._scheme}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self._stopping = True
        self._server.close()
        for dial in self._dials:
            dial.cancel()
        await asyncio.gather(*self._dials, return_exceptions=True)
        for link in tuple(self._links):
            link.abort()
        while self._links:
            self._all_closed.clear()
            await self._all_closed.wait()
        await self._server.wait_closed()

    def opened(self, link: _Link) -> None:
        self._links.add(link)
        if self._stopping:
            link.target.lost = True
            link.abort()
            return
        self._total += 1
        self._max_open = max(self._max_open, len(self._links))
        dial = asyncio.get_running_loop().create_task(self._dial(link))
        self._dials.add(dial)
        dial.add_done_callback(self._dials.discard)

    async def _dial(self, link: _Link) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: link.target, *self._target)
        except OSError:
            link.target_refused()
        except asyncio.CancelledError:
            link.target.lost = link.target.transport is None
            raise

    def watch(self) -> _RequestCounter | None:
        return _RequestCounter(self._requests) if self._counting else None

    def closed(self, link: _Link) -> None:
        self._links.discard(link)
        up, down = self._bytes_closed
        self._bytes_closed = up + link.up.bytes, down + link.down.bytes
        self._all_closed.set()

    def set_rtt(self, rtt: float) -> None:
        self.rtt = rtt

    def snapshot(self) -> ProxyStats:
        up, down = self._bytes_closed
        return ProxyStats(
            connections_open=len(self._links),
            connections_total=self._total,
            max_open=self._max_open,
            bytes_up=up + sum(link.up.bytes for link in self._links),
            bytes_down=down + sum(link.down.bytes for link in self._links),
            requests=self._requests.copy(),
        )


class LatencyProxy(Hosted):
    """Put a round trip of `rtt` seconds between clients and a server, while the context is open.

    `with LatencyProxy(server.endpoint, rtt=0.01) as proxy:` and clients use `proxy.endpoint`. Every chunk travels
    rtt/2 in each direction, and chunks do not wait for each other, so neither bandwidth nor the number of connections
    is limited. A half-close, a reset and a refused target travel likewise. Timers count whole milliseconds: a
    direction is off by up to one, and by some 0.3 ms where rtt/2 is a whole number of them.

    Modelled: the round trip of each request, and the one of connecting: the client's connect() returns at once, and
    what it sends on a new connection waits that round trip in its place. TLS costs its own round trips, as its bytes
    are delayed like any others. Not modelled: bandwidth, slow start (the first large body on a new connection takes
    several round trips on a real network), loss, jitter, and DNS.

    With `count_requests=True` it reads along and counts the requests that it hands to the target, which real servers do
    not tell: plain HTTP only, each connection at the cost of holding one request's body.

    The proxy runs in a child process, which leaves this process's GIL alone and ends with it however it ends, or with
    `process=False` on a thread.
    """

    def __init__(
        self, target_endpoint: str, rtt: float = 0.010, *, process: bool = True, count_requests: bool = False
    ) -> None:
        super().__init__(process=process)
        self._count_requests = count_requests
        self._target = _checked_target(target_endpoint)
        self._rtt = _checked_rtt(rtt)

    def _factory(self) -> Factory:
        return partial(_ProxyService, *self._target, self._rtt, self._count_requests)

    @property
    def rtt(self) -> float:
        """Seconds per round trip; an assignment holds for what is read after it."""
        return self._rtt

    @rtt.setter
    def rtt(self, seconds: float) -> None:
        self._call("set_rtt", _checked_rtt(seconds))
        self._rtt = seconds

    @property
    def stats(self) -> ProxyStats:
        """Return the counts as they are now."""
        stats: ProxyStats = self._call("snapshot")
        return stats


def _checked_rtt(seconds: float) -> float:
    if not 0 <= seconds < float("inf"):
        raise ConfigurationError(f"rtt is a number of seconds, at least 0, not {seconds!r}")
    return seconds


def _checked_target(endpoint: str) -> tuple[str, str, int]:
    """Return scheme, host and port of an endpoint."""
    try:
        url = urlsplit(endpoint)
        port = url.port or {"http": 80, "https": 443}.get(url.scheme)
    except ValueError as exc:
        raise ConfigurationError(f"target endpoint {endpoint!r}: {exc}") from exc
    if not url.hostname or port is None:
        raise ConfigurationError(f"target endpoint {endpoint!r} is no http://HOST:PORT or https://HOST:PORT")
    return url.scheme, url.hostname, port
