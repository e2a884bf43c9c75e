"""The small HTTP/1.1: bodies in pieces of any size, with and without a known length, on both event loops."""

import asyncio
import errno
import gc
import math
import ssl
import tracemalloc
from contextlib import asynccontextmanager

import pytest
import trustme
import uvloop

from asyncds.store.wire import Answer, BrokenConnection, Pace, Pool

LOOPS = pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop])
LARGE = bytes(range(256)) * 12_000  # 3 MB, which fit into no socket's buffers


def head(length):
    return f"HTTP/1.1 200 OK\r\nETag: abc\r\nContent-Length: {length}\r\n\r\n".encode()


@asynccontextmanager
async def pool_on(handle, *, tls=False, timeout=10.0):
    """A pool of connections to a server of a few lines."""
    tasks = set()

    async def guarded(reader, writer):
        tasks.add(asyncio.current_task())
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                await handle(writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    contexts = [None, None]
    if tls:
        authority = trustme.CA()
        contexts = [ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()]
        authority.issue_cert("localhost").configure_cert(contexts[0])
        authority.configure_trust(contexts[1])
    server = await asyncio.start_server(guarded, "127.0.0.1", 0, ssl=contexts[0])
    pool = Pool("localhost", server.sockets[0].getsockname()[1], timeout=timeout, tls=contexts[1])
    try:
        yield pool
    finally:
        await pool.aclose()
        server.close()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)


def at_once(size):
    """There is room."""


def run(factory, main):
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(asyncio.wait_for(main(), 30))


@LOOPS
@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("size", [None, len(LARGE)])
def test_large_body_arrives_whole_and_the_connection_serves_again(factory, tls, size):
    async def handle(writer):
        writer.write(head(len(LARGE)) + LARGE)
        await writer.drain()

    async def main():
        async with pool_on(handle, tls=tls) as pool:
            for _ in range(3):
                assert await pool.get(b"GET\r\n\r\n", size, at_once) == Answer(
                    200, {b"etag": b"abc", b"content-length": b"3072000"}, LARGE, True
                )
            assert len(pool._idle) == 1

    run(factory, main)


class NoRoom(BaseException):
    """What a fetcher raises when it hears of a size."""


@LOOPS
@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("room", [False, True])
def test_size_that_nobody_knew_is_told_before_the_body_is_read(factory, tls, room):
    told = []

    async def handle(writer):
        writer.write(head(len(LARGE)) + LARGE)
        await writer.drain()

    def reserve(size):
        told.append(size)
        if not room:
            raise NoRoom

    async def main():
        async with pool_on(handle, tls=tls) as pool:
            if room:
                assert (await pool.get(b"GET\r\n\r\n", None, reserve)).body == LARGE
            else:
                with pytest.raises(NoRoom):
                    await pool.get(b"GET\r\n\r\n", None, reserve)
            assert (told, len(pool._idle), len(pool._busy)) == ([len(LARGE)], int(room), 0)

    run(factory, main)


@LOOPS
@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("size", [20_000, 300_000])
def test_server_may_close_when_it_has_answered(factory, tls, size):
    async def handle(writer):
        writer.write(head(size).replace(b"ETag", b"Connection: close\r\nETag") + LARGE[:size])
        writer.close()

    async def main():
        async with pool_on(handle, tls=tls) as pool:
            for _ in range(20):
                for known in (size, None):
                    assert (await pool.get(b"GET\r\n\r\n", known, at_once)).body == LARGE[:size]

    run(factory, main)


@LOOPS
def test_nothing_is_reserved_for_what_is_there_or_was_listed(factory):
    async def handle(writer):
        writer.write(head(5) + b"hello")

    def reserve(size):
        raise AssertionError("there is nothing to reserve")

    async def main():
        async with pool_on(handle) as pool:
            for size in (5, None):
                assert (await pool.get(b"GET\r\n\r\n", size, reserve)).body == b"hello"

    run(factory, main)


@LOOPS
@pytest.mark.parametrize("size", [None, 5, len(LARGE)])
def test_body_that_is_longer_than_announced_is_refused(factory, size):
    async def handle(writer):
        writer.write(head(size or 5) + (LARGE if size == len(LARGE) else b"hello") + b"!")

    async def main():
        async with pool_on(handle) as pool:
            with pytest.raises(BrokenConnection, match="longer than announced"):
                await pool.get(b"GET\r\n\r\n", size, at_once)

    run(factory, main)


@LOOPS
@pytest.mark.parametrize("listed", [False, True])
def test_body_that_no_memory_can_hold_is_refused(factory, listed):
    size = 10**17

    async def handle(writer):
        writer.write(head(size) + b"start")

    async def main():
        async with pool_on(handle) as pool:
            with pytest.raises(BrokenConnection, match="memory has no room"):
                await pool.get(b"GET\r\n\r\n", size if listed else None, at_once)

    run(factory, main)


@LOOPS
@pytest.mark.parametrize("size", [None, len(LARGE)])
def test_idle_connections_keep_nothing_of_what_they_brought(factory, size):
    async def handle(writer):
        writer.write(head(len(LARGE)) + LARGE)
        await writer.drain()

    async def main():
        async with pool_on(handle) as pool:
            await pool.get(b"GET\r\n\r\n", size, at_once)
            gc.collect()
            tracemalloc.start()
            try:
                answer = await pool.get(b"GET\r\n\r\n", size, at_once)
                assert tracemalloc.get_traced_memory()[0] > len(LARGE)
                assert tracemalloc.get_traced_memory()[1] < 2 * len(LARGE), "a body is held once"
                del answer
                for _ in range(20):
                    await asyncio.sleep(0)
                gc.collect()
                assert tracemalloc.get_traced_memory()[0] < len(LARGE) / 4
            finally:
                tracemalloc.stop()

    run(factory, main)


async def test_request_that_cannot_be_written_is_told_once_by_what_that_raises(monkeypatch):
    async def handle(writer):
        writer.write(head(2) + b"ok")

    async with pool_on(handle) as pool:
        await pool.get(b"GET\r\n\r\n", 2, at_once)
        (connection,) = pool._idle
        monkeypatch.setattr(connection, "_transport", Unwritable(connection._transport))
        told = []
        with pytest.raises(OSError, match="no buffer"):
            pool.ask(b"GET\r\n\r\n", 2, told.append, math.inf)
        connection.abort()
        await asyncio.sleep(0)
        assert told == []


class Unwritable:
    """A transport whose `write` fails."""

    def __init__(self, transport):
        self._transport = transport

    def __getattr__(self, name):
        return getattr(self._transport, name)

    def write(self, data):
        raise OSError("no buffer space")


# what goes on, and what only drips


def test_answer_of_which_nothing_comes_is_at_fault_after_the_timeout():
    pace = Pace(10.0)
    pace.begin(100.0)
    assert pace.fault(110.0) is None
    assert pace.fault(110.1) == "no byte came for 10 s"


def test_drip_is_at_fault_although_bytes_come():
    pace = Pace(10.0)
    pace.begin(100.0)
    for second in range(11):
        pace.came(5, 100.0 + second)
    assert pace.fault(110.1) == "fewer than 1,000 bytes came for 10 s"


def test_slow_answer_goes_on_as_long_as_a_hundred_bytes_a_second_come():
    pace = Pace(10.0)
    pace.begin(100.0)
    for second in range(1, 60):
        pace.came(101, 100.0 + second)
        assert pace.fault(100.0 + second) is None


@LOOPS
def test_kept_connection_is_used_where_no_descriptor_is_left_for_a_new_one(factory, monkeypatch):
    async def main():
        async def handle(writer):
            writer.write(head(5) + b"hello")

        async with pool_on(handle) as pool:
            assert (await pool.get(b"GET / HTTP/1.1\r\n\r\n", 5, at_once)).body == b"hello"

            async def refused():
                raise OSError(errno.EMFILE, "Too many open files")

            monkeypatch.setattr(pool, "_reached", refused)
            assert (await pool.get(b"GET / HTTP/1.1\r\n\r\n", 5, at_once, fresh=True)).body == b"hello"

    run(factory, main)
