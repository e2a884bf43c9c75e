"""Servers for what `asyncds.testing.S3Server` does not do: a relay that meddles, another host, keys that end.

All run on threads of this process, on free loopback ports.
"""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

READ = 65536
SLICE_S = 0.2  # between two pieces of an answer that drips

Answer = AsyncIterator[bytes]


class Connection:
    """One connection of a client, and the one to the server that belongs to it."""

    def __init__(self, relay: "Relay", reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.relay, self.reader, self.writer = relay, reader, writer
        self.doomed = False  # ends as its next request arrives
        self.rate: int | None = None

    async def serve(self) -> None:
        answers, requests = await asyncio.open_connection(*self.relay.target)
        back = asyncio.ensure_future(self.pass_back(answers))
        try:
            while data := await self.reader.read(READ):
                if self.doomed:
                    return
                if (answer := self.relay.intercept(data)) is not None:
                    back.cancel()
                    return await self.say(answer)
                self.rate = self.relay.rate(data)
                requests.write(data)
        finally:
            back.cancel()
            requests.close()

    async def say(self, answer: Answer) -> None:
        async for data in answer:
            self.writer.write(data)
            await self.writer.drain()

    async def pass_back(self, answers: asyncio.StreamReader) -> None:
        while data := await answers.read(READ):
            await (self.drip(data, self.rate) if self.rate else self.give(data))
        self.writer.close()

    async def give(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def drip(self, data: bytes, rate: int) -> None:
        await self.give(data[:10_000])
        size = max(1, int(rate * SLICE_S))
        for start in range(10_000, len(data), size):
            await asyncio.sleep(SLICE_S)
            await self.give(data[start : start + size])


class Relay:
    """Passes bytes between clients and a server, and does with them what it is told.

    `intercept` is given the bytes of each request, and returns an answer in the server's place, after which the
    connection ends, or None. `rate` is given the same, and returns the bytes per second of the answer, or None.
    """

    def __init__(self, endpoint: str, intercept: Callable[[bytes], Answer | None] = lambda request: None) -> None:
        host, _, port = endpoint.removeprefix("http://").partition(":")
        self.target = host, int(port)
        self.intercept = intercept
        self.rate: Callable[[bytes], int | None] = lambda request: None
        self._port = 0
        self._connections: set[Connection] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.accept()
        return self

    def __exit__(self, *_: object) -> None:
        self.refuse()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def accept(self) -> None:
        """Listen, always on the same port."""
        self._call(self._accept())

    def refuse(self) -> None:
        """Refuse connections, and end those that there are."""
        self._call(self._refuse())

    def hang_up(self) -> None:
        """End every connection in order."""
        self._call(self._hang_up())

    def doom(self) -> None:
        """End every connection as its next request arrives."""
        for connection in tuple(self._connections):
            connection.doomed = True

    def _call(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _accept(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self._port, backlog=1024)
        self._port = self._server.sockets[0].getsockname()[1]

    async def _refuse(self) -> None:
        self._server.close()
        for connection in tuple(self._connections):
            connection.writer.transport.abort()

    async def _hang_up(self) -> None:
        for connection in tuple(self._connections):
            connection.writer.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(self, reader, writer)
        self._connections.add(connection)
        with contextlib.suppress(OSError):
            await connection.serve()
        self._connections.discard(connection)
        writer.close()


async def answer(status: str, body: bytes = b"", **headers: str) -> Answer:
    """An answer in one piece."""
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()]
    length = f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    yield f"HTTP/1.1 {status}\r\n{''.join(lines)}{length}".encode() + body


async def zeros(request: bytes, announced: int, sent: int, **headers: str) -> Answer:
    """So many zero bytes are announced, and at most so many sent, a megabyte at a time."""
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()]
    ranged = b"\r\nrange:" in request.lower()
    lines += [f"Content-Range: bytes 0-{announced - 1}/{announced}\r\n"] * ranged
    status = "206 Partial Content" if ranged else "200 OK"
    yield f"HTTP/1.1 {status}\r\n{''.join(lines)}Content-Length: {announced}\r\n\r\n".encode()
    for _ in range(sent // 1_000_000):
        yield bytes(1_000_000)


@contextlib.contextmanager
def http_server(host: str, answer: Callable[[BaseHTTPRequestHandler], bytes]) -> Iterator[str]:
    """Answers each GET and HEAD with 200 and what it is told; yields the endpoint."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = answer(self)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer((host, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://{host}:{server.server_port}"
        server.shutdown()
        thread.join()


class Elsewhere:
    """Another host, which gives to whoever asks bytes that are not those, and keeps the headers that came."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.headers: list[dict[str, str]] = []

    def __call__(self, request: BaseHTTPRequestHandler) -> bytes:
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        return bytes(self.size)

    def was_told(self) -> str | None:
        """The most precious thing that a client has sent here."""
        for name, word in (("x-amz-security-token", "session token"), ("authorization", "signature")):
            if any(name in headers for headers in self.headers):
                return word
        return None


class Keys:
    """A container's credentials: some that last `seconds`, replaced in their second half by others, for an hour."""

    def __init__(self, seconds: float) -> None:
        self.half, self.ends = (datetime.now(UTC) + timedelta(seconds=share * seconds) for share in (0.5, 1))

    def renew(self) -> None:
        """End the first before their time."""
        self.half = self.ends = datetime.now(UTC)

    @property
    def over(self) -> bool:
        return datetime.now(UTC) >= self.ends

    def __call__(self, _: BaseHTTPRequestHandler) -> bytes:
        now = datetime.now(UTC)
        access, ends = ("FIRSTKEY", self.ends) if now < self.half else ("SECONDKEY", now + timedelta(hours=1))
        names = {"AccessKeyId": access, "SecretAccessKey": "secret", "Token": "token"}
        return json.dumps(names | {"Expiration": ends.strftime("%Y-%m-%dT%H:%M:%SZ")}).encode()
