"""HTTP/1.1 as far as a plain GET needs it: keep-alive connections, one request in flight on each.

Understood is one kind of answer: a `200` (a `206`, to who asks for a part) with a `Content-Length` that fits. Of any
other answer the caller learns its status; its connection is closed, so that nothing of it can be taken for the answer
to the next request.
"""

import asyncio
import contextlib
import errno
import io
import itertools
import logging
import math
import socket
import ssl
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

from aiohappyeyeballs import AddrInfoType, start_connection

from asyncds.store.base import Drop, Reserve, no_bound

__all__ = ["Answer", "Body", "BrokenConnection", "NoConnection", "Pace", "Pool", "length_of"]

_log = logging.getLogger(__name__)
_LONGEST_HEAD = 64 << 10
_FIRST_PIECE = 8 << 10
_BUFFER = 256 << 10
_IDLE_S = 10.0
_RESOLVED_S, _OUTDATED_S = 10.0, 60.0
_SLOWEST = 100.0  # bytes per second: what comes more slowly only drips
_PATIENCE_S = 0.25  # with one address, before another is tried beside it (RFC 8305, 8)
_TOKEN = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz"  # what a name may consist of (RFC 9110, 5.6.2)
_REPEATABLE = {b"vary", b"set-cookie", b"via", b"warning", b"link", b"server", b"cache-control"}


class Answer(NamedTuple):
    """Status (0 for what is no HTTP/1.1), headers by lower-case name, and the body; empty unless `whole`.

    `checked` says that somebody has compared it with a checksum.
    """

    status: int
    headers: dict[bytes, bytes]
    body: bytes
    whole: bool
    checked: bool = False


Done = Callable[["Answer | BaseException"], object]


class NoConnection(Exception):
    """No connection could be made; the message names host and port, the cause says why."""


class BrokenConnection(Exception):
    """The connection ended, stood still, or carried something that is no HTTP. `untouched`: before any answer."""

    def __init__(self, reason: str, *, untouched: bool = False) -> None:
        super().__init__(reason)
        self.untouched = untouched


class Body:
    """A body of known length, received piece by piece and handed out as the one piece of memory that it came into."""

    def __init__(self, length: int) -> None:
        self.missing = length
        # The kernel gives these zeros page by page as they are overwritten: announcing much does not take much. CPython
        # writes into them, and gives them away, without a copy, since nobody else has them.
        self._file = io.BytesIO(bytes(length))

    def append(self, data: bytes | memoryview) -> None:
        """Take the next piece; one that is longer than what is missing makes `missing` negative."""
        self.missing -= len(data)
        if self.missing >= 0:
            self._file.write(data)

    def whole(self) -> bytes:
        return self._file.getvalue()


class Pace:
    """Whether an answer goes on: within `timeout` seconds come 100 bytes for each of them, or the rest, or its head."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.least = math.ceil(_SLOWEST * timeout)
        self.begin(0.0)

    def begin(self, now: float) -> None:
        """Something has been asked for, or a whole part of the answer has come."""
        self.since, self._came = now, 0

    def came(self, size: int, now: float) -> None:
        """So many bytes have come."""
        self._came += size
        if self._came >= self.least:
            self.begin(now)

    def fault(self, now: float) -> str | None:
        """What is the matter, if it does not go on."""
        if now - self.since <= self.timeout:
            return None
        few = f"fewer than {self.least:,} bytes" if self._came else "no byte"
        return f"{few} came for {self.timeout:g} s"


class _Connection(asyncio.BufferedProtocol):
    """One connection of a pool: idle, or busy with one request of which it will tell `done`.

    What arrives lands in `buffer`, which all connections of a loop share, since each takes it from there at once.
    """

    def __init__(self, pool: "Pool", buffer: memoryview) -> None:
        self.done: Done | None = None
        self._pool = pool
        self.pace = Pace(pool.timeout)
        self.until = math.inf  # when the answer must be there
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._buffer = buffer
        self._start = b""  # of a head that is not complete
        self._is_full = False  # whether more than the buffer took may have come with what came last
        self._head: tuple[int, dict[bytes, bytes]] | None = None
        self._body = Body(0)
        self._size: int | None = None
        self._reserve: Reserve = no_bound
        self._status = 200

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def ask(self, request: bytes, size: int | None, reserve: Reserve, status: int, done: "Done") -> None:
        """Send a request. `status` is the only one that fits, and `size` the only `Content-Length`, if it is known.

        `done` is called once, with the answer, or with why there is none; then the pool has the connection again.
        """
        assert self._transport is not None
        self._start, self._head, self._size, self._reserve, self._status = b"", None, size, reserve, status
        self.pace.begin(self._loop.time())
        self._transport.write(request)
        self.done = done  # last: whoever asks in vain is told once, by what that raises

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def drop(self, done: Done) -> None:
        """End the request of which this would be told, if it is still under way."""
        if self.done is done:
            self._fail(BrokenConnection("nobody waits for it any more"))

    def end(self, outcome: Answer | BaseException) -> None:
        """Tell what has become of the request, and let the connection be used for others, if it is open."""
        done, self.done = self.done, None
        self._body, self._head = Body(0), None  # an idle connection does not keep what it brought
        self.pace.begin(self._loop.time())
        self._pool.take_back(self)
        if done is not None:
            try:
                done(outcome)
            except Exception:
                _log.exception("an answer could not be handed on")

    # what the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's do not inherit from it

    def get_buffer(self, sizehint: int) -> memoryview:
        # Of a body that nobody knew to be large, not much is to arrive before somebody says that there is room for it.
        return self._buffer[:_FIRST_PIECE] if self._size is None and self._head is None else self._buffer

    def buffer_updated(self, count: int) -> None:
        self.pace.came(count, self._loop.time())
        self._is_full = count == len(self.get_buffer(count))
        data = self._buffer[:count]
        if self.done is None:
            self.abort()  # nothing was asked
        elif self._head is None:
            self._read_head(self._start + data)
        else:
            self._read_body(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self.done is not None:
            untouched = self._head is None and not self._start
            self.end(BrokenConnection(str(error or "the server closed it"), untouched=untouched))

    # the answer

    def _read_head(self, data: bytes) -> None:
        end = data.find(b"\r\n\r\n", 0, _LONGEST_HEAD)
        if end < 0:
            if len(data) < _LONGEST_HEAD:
                self._start = data
            else:
                self._fail(BrokenConnection("the head of the answer does not end"))
            return
        head = _parsed(data[:end])
        length = None if head is None else length_of(head[1])
        if head is None:
            self.abort()
            self.end(Answer(0, {}, b"", whole=False))
        elif head[0] != self._status or length is None or length != (length if self._size is None else self._size):
            self.abort()
            self.end(Answer(*head, b"", whole=False))
        elif len(data) - end - 4 == length:
            self._deliver(head, data[end + 4 :])
        else:
            self._head, self._start = head, b""
            self.pace.begin(self._loop.time())
            try:
                if self._size is None:
                    self._reserve(length)
                self._body = Body(length)
            except MemoryError:
                self._fail(BrokenConnection(f"{length:,} bytes are announced, and memory has no room for them"))
            except BaseException as error:  # what `reserve` has to say goes to who asks
                self._fail(error)
            else:
                self._read_body(memoryview(data)[end + 4 :])

    def _read_body(self, data: bytes | memoryview) -> None:
        body, head = self._body, self._head
        body.append(data)
        if body.missing < 0:
            self._fail(BrokenConnection("the body is longer than announced"))
        elif body.missing == 0 and head is not None:
            self._deliver(head, body.whole())

    def _deliver(self, head: tuple[int, dict[bytes, bytes]], body: bytes) -> None:
        if self._is_full or head[1].get(b"connection", b"").lower() == b"close":
            self.abort()  # what may follow an answer unseen would be taken for the next one
        self.end(Answer(*head, body, whole=True))

    def _fail(self, error: BaseException) -> None:
        self.abort()
        self.end(error)


def _parsed(head: bytes) -> tuple[int, dict[bytes, bytes]] | None:
    """Status and headers; None if it is no HTTP/1.1, or a header that matters is there twice and says two things.

    What one reads in one way and another in another is none: a `Transfer-Encoding` may hide in it.
    """
    first, *lines = head.split(b"\r\n")
    if not first.startswith(b"HTTP/1.1 ") or not first[9:12].isdigit() or first[12:13] not in (b" ", b""):
        return None
    if not head.count(b"\r") == head.count(b"\n") == len(lines) or b"\0" in head:
        return None
    headers: dict[bytes, bytes] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        name, value = name.lower(), value.strip(b" \t")
        if not colon or not name or name.translate(None, _TOKEN):
            return None
        if name in headers and headers[name] != value and name not in _REPEATABLE:
            return None
        headers[name] = value
    return int(first[9:12]), headers


def length_of(headers: dict[bytes, bytes]) -> int | None:
    """The length of a body, if an answer says it in the one way that is understood."""
    text = headers.get(b"content-length", b"")
    return int(text) if text.isdigit() and len(text) < 19 and b"transfer-encoding" not in headers else None


class _Addresses:
    """What a host's name stands for: asked anew after ten seconds, each address of the preferred kind in its turn.

    A name of S3 stands for several servers, and for others a minute later; whoever asks for each connection anew gets a
    thread and a wait for each. Lives on one event loop.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._known: list[AddrInfoType] = []
        self._turns = itertools.count()
        self._asked = -math.inf
        self._asking: asyncio.Task[None] | None = None

    async def next(self) -> list[AddrInfoType]:
        """All addresses, the one whose turn it is first. Raises `OSError` where the name stands for nothing."""
        age = asyncio.get_running_loop().time() - self._asked
        if age > _RESOLVED_S and (self._asking is None or self._asking.done()):
            self._asking = asyncio.create_task(self._ask())
            self._asking.add_done_callback(lambda task: task.cancelled() or task.exception())  # for whoever waits
        if self._asking is not None and (not self._known or age > _OUTDATED_S):
            await asyncio.shield(self._asking)
        if not self._known:
            raise OSError("no address is known")
        preferred = [address for address in self._known if address[0] == self._known[0][0]]
        turn = next(self._turns) % len(preferred)
        return [*preferred[turn:], *preferred[:turn], *self._known[len(preferred) :]]

    def drop(self, address: AddrInfoType) -> None:
        """Leave out an address that cannot be reached, or not at once, unless it is the last, until the next asking."""
        if len(self._known) > 1 and address in self._known:
            self._known.remove(address)

    def ask_again(self) -> None:
        """Believe nothing that is known any more."""
        self._known, self._asked = [], -math.inf

    async def aclose(self) -> None:
        """Ask no more."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])

    async def _ask(self) -> None:
        loop, found = asyncio.get_running_loop(), list[Any]()
        self._asked = loop.time()
        with contextlib.suppress(socket.gaierror):  # an address stands for itself, which takes no thread
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        try:
            found = found or await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except OSError:
            if not self._known:
                self._asked = -math.inf
                raise
        else:
            self._known = sorted(found, key=lambda address: address[0] != found[0][0])


class Pool:
    """Connections to one place, opened as demand grows and closed when they were idle for 10 s.

    They are shared out over the addresses of the host.

    How many there are is bounded by how many requests its user has in flight. Lives on one event loop.
    """

    def __init__(self, host: str, port: int, *, timeout: float, tls: ssl.SSLContext | None) -> None:
        self._host = host
        self._port = port
        self.timeout = timeout
        self._tls = tls
        self._addresses = _Addresses(host, port)
        self._buffer = memoryview(bytearray(_BUFFER))
        self._idle: deque[_Connection] = deque()
        self._busy: set[_Connection] = set()
        self._watch: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._closed = False

    async def get(
        self, request: bytes, size: int | None, reserve: Reserve, status: int = 200, *, fresh: bool = False
    ) -> Answer:
        """Send a request, and return its answer, whole if it is of this `status`.

        If `size` is not known, `reserve` is called with it before a body is read, and what it raises is raised.

        Raises `NoConnection` or `BrokenConnection`; what does not go on for `timeout` seconds (`Pace`) is
        broken. A connection
        that was kept alive and turns out to be closed is replaced once; a `fresh` request goes over a new one.
        Cancelling closes the connection. Raises `NoConnection` once the pool is closed.
        """
        connection = None if fresh else self._kept()
        if connection is not None:
            try:
                return await self._asked(connection, request, size, reserve, status)
            except BrokenConnection as error:
                if not error.untouched:
                    raise
        try:
            opened = await self._opened()
        except NoConnection as error:
            scarce = fresh and getattr(error.__cause__, "errno", None) in (errno.EMFILE, errno.ENFILE)
            kept = self._kept() if scarce else None
            if kept is None:
                raise
            opened = kept
        return await self._asked(opened, request, size, reserve, status)

    def ask(self, request: bytes, size: int, done: Done, until: float) -> Drop | None:
        """Send a request on a connection that is open and idle, if there is one; return what ends it early.

        `done` is called with what `get` returns or raises; there is no second try. What is not there at `until`, by the
        clock of the loop, is broken.
        """
        connection = self._kept()
        if connection is None:
            return None
        connection.until = until
        self._send(connection, request, size, no_bound, 200, done)
        return partial(connection.drop, done)

    def _send(
        self, connection: _Connection, request: bytes, size: int | None, reserve: Reserve, status: int, done: Done
    ) -> None:
        self._busy.add(connection)
        self._watch_over()
        connection.ask(request, size, reserve, status, done)

    def take_back(self, connection: _Connection) -> None:
        """Called by a connection whose request has ended."""
        connection.until = math.inf
        self._busy.discard(connection)
        if connection.is_open:
            self._idle.append(connection)

    async def _asked(
        self, connection: _Connection, request: bytes, size: int | None, reserve: Reserve, status: int
    ) -> Answer:
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._send(connection, request, size, reserve, status, partial(_resolve, answer))
        try:
            return await answer
        except asyncio.CancelledError:
            if answer.cancelled():  # or the answer is there, and somebody else may have the connection
                connection.abort()
            raise

    def _kept(self) -> _Connection | None:
        """The connection that was used last, if one is alive."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _opened(self) -> _Connection:
        loop, name = asyncio.get_running_loop(), self._host if self._tls is not None else None
        if self._closed:
            raise NoConnection(f"{self._host}:{self._port}") from ConnectionError("the pool is closed")
        try:
            async with asyncio.timeout(self.timeout):
                wire = await self._reached()
                try:
                    _, connection = await loop.create_connection(
                        lambda: _Connection(self, self._buffer), sock=wire, ssl=self._tls, server_hostname=name
                    )
                except BaseException:
                    wire.close()
                    raise
        except OSError as error:
            raise NoConnection(f"{self._host}:{self._port}") from error
        if self._closed:  # meanwhile
            connection.abort()
        return connection

    async def _reached(self) -> socket.socket:
        """A socket that is connected to the address whose turn it is, or to the first other one that answers."""
        addresses = await self._addresses.next()
        try:
            wire = await start_connection(addresses, happy_eyeballs_delay=_PATIENCE_S)
        except OSError:
            self._addresses.ask_again()
            raise
        with contextlib.suppress(OSError):  # it may have been closed already, as the first request will tell
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if wire.getpeername()[0] != addresses[0][4][0]:
                self._addresses.drop(addresses[0])
        return wire

    def _watch_over(self) -> None:
        """Look after all connections from time to time, rather than set a timer for each request."""
        if self._watch is None:
            loop, pause = asyncio.get_running_loop(), min(1.0, self.timeout / 4)
            self._watch, self._due = loop.call_later(pause, self._look), loop.time() + pause

    def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        self._watch = None
        overdue = now - self._due  # this process stood still, and answers that have come are still to be read
        for connection in list(self._busy):
            connection.pace.since += overdue
            connection.until += overdue
            late = connection.pace.fault(now)
            if late is None and now > connection.until:
                late = "it took too long"
            if late is not None:
                connection.abort()
                connection.end(BrokenConnection(late))
        while self._idle and now - self._idle[0].pace.since > _IDLE_S:
            self._idle.popleft().abort()
        if self._busy or self._idle:
            self._watch_over()

    async def aclose(self) -> None:
        """Close all connections, for good, and wait for the loop to notice."""
        self._closed = True
        if self._watch is not None:
            self._watch.cancel()
        for connection in [*self._idle, *self._busy]:
            connection.abort()
        self._idle.clear()
        await self._addresses.aclose()
        await asyncio.sleep(0)


def _resolve(future: asyncio.Future[Answer], outcome: Answer | BaseException) -> None:
    if future.done():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
