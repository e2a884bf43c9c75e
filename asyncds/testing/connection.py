"""One client connection of the S3 server: requests in, responses out in order, faults carried out."""

import asyncio
import socket
import struct
import sys
from collections.abc import Callable
from typing import Protocol, cast

from asyncds.testing.faults import Fault
from asyncds.testing.s3 import status_response
from asyncds.testing.wire import Body, MalformedRequestError, Request, Response, body_reader, parse_head, payload

_MAX_HEAD = 64 * 1024
_JOIN_LIMIT = 64 * 1024
_WRITE_BUFFER = 256 * 1024
_FLUSH_POLL_S = 0.001
_LINGER_S = 2.0
_TLS = b"\x16\x03"  # how its handshake begins
_ZEROS = bytes(_JOIN_LIMIT)
_LINGER_RESET = struct.pack("ii", 1, 0)


class Handler(Protocol):
    """What a connection needs of its server."""

    @property
    def idle_timeout(self) -> float | None:
        """Seconds after which a connection without a request is closed."""

    def delay(self) -> float:
        """Seconds for which the next answer waits."""

    def opened(self, connection: "Connection") -> None: ...

    def closed(self, connection: "Connection") -> None: ...

    def begin(self, request: Request) -> Fault | None:
        """Count a request as in flight and return the fault it is to meet."""

    def respond(self, request: Request) -> Response: ...

    def date_line(self) -> bytes: ...

    def sent(self, body_bytes: int) -> None: ...

    def end(self) -> None:
        """Count a request as no longer in flight."""


def reset(transport: asyncio.Transport) -> None:
    """Close with RST instead of FIN; what is still queued here is lost."""
    connection: socket.socket = transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
    transport.abort()


class Connection(asyncio.Protocol):
    """Serve one request at a time; what the client pipelines behind it waits in the buffer."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._buffer = b""
        self._receiving: tuple[Request, Body] | None = None
        self._busy = False
        self._refused = False
        self._closes = False
        self._write_paused = False
        self._on_drained: Callable[[], None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._idle: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not inherit from asyncio.Transport.
        self._transport = cast(asyncio.Transport, transport)
        # With a low mark of 0, resume_writing means that the kernel has taken everything.
        self._transport.set_write_buffer_limits(high=_WRITE_BUFFER, low=0)
        self._handler.opened(self)
        self._watch_idleness()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._timer, self._idle):
            if timer is not None:
                timer.cancel()
        self._on_drained = None
        if self._busy:
            self._handler.end()
        self._busy = True
        self._handler.closed(self)

    def abort(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._buffer = self._buffer + data if self._buffer else data
        if not self._busy:
            self._serve_buffer()

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        callback, self._on_drained = self._on_drained, None
        if callback is not None:
            callback()
            self._serve_buffer()

    def _serve_buffer(self) -> None:
        try:
            while self._buffer and not self._busy:
                request = self._next_request()
                if request is None:
                    return
                self._begin(request)
        except MalformedRequestError as exc:
            self._refuse(exc)

    def _next_request(self) -> Request | None:
        """Take a complete request out of the buffer, or None when more bytes are needed."""
        if self._receiving is None:
            if self._buffer.startswith(_TLS):
                raise MalformedRequestError("the client speaks TLS, and this server plain http")
            head, separator, rest = self._buffer.partition(b"\r\n\r\n")
            if not separator:
                if len(head) > _MAX_HEAD:
                    raise MalformedRequestError(f"request head over {_MAX_HEAD} bytes")
                return None
            self._buffer = rest
            request = parse_head(head)
            body = body_reader(request)
            if body is None:
                return request
            self._receiving = request, body
            if request.headers.get(b"expect", b"").lower() == b"100-continue":
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return self._receive_body(*self._receiving)

    def _receive_body(self, request: Request, body: Body) -> Request | None:
        rest = body.feed(self._buffer)
        self._buffer = rest or b""
        if rest is None:
            return None
        self._receiving = None
        request.body = payload(request, body)
        return request

    def _refuse(self, exc: MalformedRequestError) -> None:
        self._busy, self._buffer, self._refused = False, b"", True
        response = status_response(400, None, str(exc))
        self._transport.write(response.head(self._handler.date_line(), close=True) + response.body)
        if self._transport.can_write_eof():  # to close before all is read would be a reset, and the answer lost
            self._transport.write_eof()
            self._timer = self._loop.call_later(_LINGER_S, self._transport.close)
        else:
            self._transport.close()

    def _begin(self, request: Request) -> None:
        self._busy = True
        if self._idle is not None:
            self._idle.cancel()
        self._closes = not request.keeps_alive
        fault = self._handler.begin(request)
        delay = self._handler.delay() + (fault.delay_s if fault else 0.0)
        if delay > 0:
            self._later(delay, self._reply, request, fault)
        else:
            self._reply(request, fault)

    def _later(self, delay: float, callback: Callable[..., None], *args: object) -> None:
        def run() -> None:
            self._timer = None
            callback(*args)
            self._serve_buffer()

        self._timer = self._loop.call_later(delay, run)

    def _reply(self, request: Request, fault: Fault | None) -> None:
        response = self._handler.respond(request)
        if fault is not None:
            response = fault.apply(response, request.resource)
        self._closes = self._closes or response.closes
        head = response.head(self._handler.date_line(), close=self._closes)
        body = response.body if request.method != "HEAD" else b""
        if fault is None:
            self._send(head, body, self._finish)
        else:
            self._send_spoilt(fault, fault.changed_head(head), body, fault.fill if request.method != "HEAD" else 0)

    def _send_spoilt(self, fault: Fault, head: bytes, body: bytes, fill: int) -> None:
        if fault.drip is not None:
            start = fault.after or 0
            self._send(head, body[:start], lambda: self._drip(fault, body[start:]))
        elif fault.ending is None:
            self._send(head, body, lambda: self._pour(fill))
        elif fault.after is None:
            self._end_early(fault, head, body)
        else:
            rest = body[fault.after :]
            self._send(head, body[: fault.after], lambda: self._end_early(fault, b"", rest))

    def _drip(self, fault: Fault, rest: bytes) -> None:
        assert fault.drip is not None
        size, interval = fault.drip
        if rest:
            self._later(interval, self._send, b"", rest[:size], lambda: self._drip(fault, rest[size:]))
        else:
            self._finish()

    def _pour(self, count: int) -> None:
        """Send so many zeros, for as long as the client takes them."""
        while count > 0 and not self._write_paused and not self._transport.is_closing():
            size = min(count, len(_ZEROS))
            count -= size
            self._handler.sent(size)
            self._transport.write(_ZEROS[:size])
        if self._write_paused:
            self._on_drained = lambda: self._pour(count)
        else:
            self._finish()

    def _send(self, head: bytes, body: bytes, then: Callable[[], None]) -> None:
        """Write, and go on once the transport has room again."""
        self._handler.sent(len(body))
        if len(body) <= _JOIN_LIMIT:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)
        if self._write_paused:
            self._on_drained = then
        else:
            then()

    def _finish(self) -> None:
        if self._closes:
            # The request stays in flight until connection_lost: the client waits for the end of the stream.
            self._transport.close()
            return
        self._busy = False
        self._handler.end()
        self._watch_idleness()

    def _watch_idleness(self) -> None:
        if self._handler.idle_timeout is not None:
            self._idle = self._loop.call_later(self._handler.idle_timeout, self._transport.close)

    def _end_early(self, fault: Fault, head: bytes, rest: bytes) -> None:
        match fault.ending:
            case "close":
                self._transport.close()
            case "reset":
                self._reset_when_flushed()
            case "stall" if fault.resume_s is not None:
                self._later(fault.resume_s, self._send, head, rest, self._finish)

    def _reset_when_flushed(self) -> None:
        """Send RST once the peer's kernel holds what was written; RST discards what is still queued here."""
        if self._unsent():
            self._later(_FLUSH_POLL_S, self._reset_when_flushed)
            return
        reset(self._transport)

    def _unsent(self) -> int:
        queued = self._transport.get_write_buffer_size()
        if queued or not sys.platform.startswith("linux"):
            return queued
        import fcntl
        import termios

        connection: socket.socket = self._transport.get_extra_info("socket")
        # On a socket, TIOCOUTQ counts the bytes that the peer has not acknowledged.
        outstanding = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, b"\0\0\0\0")
        return int.from_bytes(outstanding, sys.byteorder)
