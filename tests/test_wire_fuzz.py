"""The small HTTP/1.1 against whatever a server may send: a body is handed on only if its framing leaves no doubt."""

import asyncio
import gc
import re
import socket
import ssl
import tracemalloc
from collections import Counter
from contextlib import asynccontextmanager
from functools import cache
from itertools import pairwise
from urllib.parse import unquote

import pytest
import trustme
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncds.errors import AsyncdsError, TransferFailed
from asyncds.manifest import ObjectInfo
from asyncds.retry import Retry
from asyncds.store import Connection, S3Store, wire
from asyncds.store.base import no_bound
from asyncds.store.wire import Answer, BrokenConnection, Pool, _Connection

LOOPS = pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop])
LONGEST_HEAD = 64 << 10
REQUEST = b"GET / HTTP/1.1\r\n\r\n"
BODY = bytes(range(256)) * 16
SECOND = b"the answer to the second request"


def answer(body, *lines, status="200 OK"):
    """An answer with a length, and with other lines in its head."""
    head = [f"HTTP/1.1 {status}".encode(), *lines, b"Content-Length: %d" % len(body)]
    return b"\r\n".join([*head, b"", body])


def examples(few, many):
    """How many cases a test makes up: few where all tests run, and many where there is time."""
    thorough = pytest.param(many, marks=[pytest.mark.thorough, pytest.mark.timeout(900)])
    return pytest.mark.parametrize("examples", [few, thorough])


def vary(examples, *strategies):
    """Run a check with so many cases."""
    return lambda check: settings(max_examples=examples, deadline=None)(given(*strategies)(check))()


# what is right, by RFC 9112 and by nothing else of this repository

HEAD = re.compile(rb"HTTP/1\.1 ([0-9]{3})(?: [^\r\n\0]*)?\r\n((?:[^\s:\0]+:[^\r\n\0]*\r\n)*)\r\n")


def framed(raw, size, status):
    """The body of the answer with which these bytes begin, and what follows it; None where that can be doubted."""
    head = HEAD.match(raw)
    if head is None or int(head[1]) != status or head.end() > LONGEST_HEAD:
        return None
    lengths = named(head, b"content-length")
    if len(lengths) != 1 or named(head, b"transfer-encoding") or not re.fullmatch(rb"[0-9]{1,18}", *lengths):
        return None
    length, rest = int(*lengths), raw[head.end() :]
    if len(rest) < length or size not in (None, length):
        return None
    return rest[:length], rest[length:]


def named(head, name):
    """What the headers of this name say."""
    fields = [line.split(b":", 1) for line in head[2].splitlines()]
    return {value.strip(b" \t") for found, value in fields if found.lower() == name}


def is_plain(raw):
    """Whether no header is there twice, and all have names that are some: such a head can be understood."""
    head = HEAD.match(raw)
    names = [line.partition(b":")[0].lower() for line in head[2].splitlines()]
    return len(names) == len(set(names)) and all(re.fullmatch(rb"[a-z0-9!#$%&'*+.^_`|~-]+", name) for name in names)


# a connection that is fed by hand


class Line(asyncio.Transport):
    """What a connection takes for its transport."""

    def __init__(self, wire):
        super().__init__({"socket": wire})
        self.closed = False

    def write(self, data):
        assert data == REQUEST

    def abort(self):
        self.closed = True

    def is_closing(self):
        return self.closed


def feed(connection, data):
    """Bring these bytes as an event loop does: into the buffers that the connection gives, until it is closed."""
    while data and connection.is_open:
        buffer = connection.get_buffer(-1)
        count = min(len(buffer), len(data))
        buffer[:count] = data[:count]
        connection.buffer_updated(count)
        data = data[count:]


async def outcome_of(pieces, size, status=200, reserve=no_bound):
    """What a request ends with whose answer comes in these pieces, and whether its connection is kept for others."""
    pool, told, silent = Pool("localhost", 1, timeout=5, tls=None), [], socket.socketpair()
    connection = _Connection(pool, pool._buffer)
    connection.connection_made(Line(silent[0]))
    pool._send(connection, REQUEST, size, reserve, status, told.append)
    for piece in pieces:
        feed(connection, piece)
    kept = bool(told) and pool._kept() is connection
    connection.connection_lost(None)
    await pool.aclose()
    for end in silent:
        end.close()
    assert len(told) == 1, "who asks is told once"
    assert not pool._busy
    return told[0], kept


def check_outcome(outcome, kept, raw, size, status=200):
    """Nothing but the answer is delivered, and a connection is kept only where nothing is left of it."""
    right = framed(raw, size, status)
    if isinstance(outcome, BrokenConnection):
        assert not outcome.untouched or not raw
        assert right is None or str(outcome) == "the body is longer than announced"
    else:
        assert isinstance(outcome, Answer)
        assert (right is not None) if outcome.whole else outcome.body == b""
    if isinstance(outcome, Answer) and outcome.whole:
        assert outcome.body == right[0]
        assert kept == (right[1] == b"" and outcome.headers.get(b"connection", b"").lower() != b"close")
    else:
        assert not kept
        assert right is None or right[1] or not is_plain(raw), "a right answer is delivered"


def split(raw, cuts):
    places = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
    return [raw[start:end] for start, end in pairwise(places)]


CASES = st.sampled_from([bytes.lower, bytes.upper, bytes.title])
TOKEN = st.from_regex(rb"[a-zA-Z][a-zA-Z0-9!#$%&'*+.^_`|~-]{0,20}", fullmatch=True)
TEXT = st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), max_size=30).map(
    lambda t: t.encode("latin-1")
)
SPACES = st.sampled_from([b" ", b"", b"\t", b"  \t"])
BODIES = st.binary(max_size=60) | st.integers(0, len(BODY)).map(lambda size: BODY[:size]) | st.just(SECOND)
CUTS = st.lists(st.integers(0, 5000) | st.integers(0, 150), max_size=12)
STATUSES = st.sampled_from([200, 206])


@st.composite
def answers(draw):
    """A right answer, its status, and its body."""
    status, body = draw(STATUSES), draw(BODIES)
    lines = draw(
        st.lists(st.tuples(TOKEN.map(lambda name: b"x-" + name), TEXT), unique_by=lambda line: line[0].lower())
    )
    lines += [(b"Content-Length", b"%d" % len(body))]
    lines += draw(st.sampled_from([[], [(b"ETag", b'"abc"')], [(b"ETag", b'"abc"'), (b"Date", b"today")]]))
    head = b"HTTP/1.1 %d" % status + draw(st.sampled_from([b" OK", b" ", b"", b" Partial Content", b" caf\xe9"]))
    for name, value in draw(st.permutations(lines)):
        head += b"\r\n" + draw(CASES)(name) + b":" + draw(SPACES) + value + draw(SPACES)
    return head + b"\r\n\r\n" + body, status, body


TELLING = [b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b"\x0b", b":", b",", b"0", b"9", b"+", b"-", b"\r\n\r\n", b"\n\n"]
TELLING += [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 206 P\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.0 200 OK\r\n"]
TELLING += [b"Content-Length: 3\r\n", b"content-length:3\r\n", b"Content-Length : 3\r\n", b" Content-Length: 3\r\n"]
TELLING += [b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding : chunked\r\n", b"\nTransfer-Encoding: chunked"]
TELLING += [b"3\r\nabc\r\n0\r\n\r\n", b"abc", b"Connection: close\r\n", b"Vary: a\r\n", b"Vary: b\r\n", answer(b"evil")]
GARBAGE = st.binary(max_size=200) | st.lists(st.sampled_from(TELLING), max_size=12).map(b"".join)


@st.composite
def mutated(draw):
    """What was a right answer until bytes of it were changed, left out, or added."""
    raw, status, body = draw(answers())
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, min(len(raw), 200)) | st.integers(0, len(raw)))
        gone = draw(st.integers(0, 2) | st.integers(0, 200))
        raw = raw[:at] + draw(st.just(b"") | st.binary(max_size=2) | st.sampled_from(TELLING)) + raw[at + gone :]
    return raw, status, body


@examples(200, 5_000)
def test_right_answer_in_any_pieces_is_delivered_and_its_connection_kept(examples):
    with asyncio.Runner() as runner:

        @vary(examples, answers(), CUTS, st.booleans())
        def check(right, cuts, known):
            raw, status, body = right
            size = len(body) if known else None
            outcome, kept = runner.run(outcome_of(split(raw, cuts), size, status))
            assert (outcome.whole, outcome.body, outcome.status, kept) == (True, body, status, True)
            check_outcome(outcome, kept, raw, size, status)


@examples(400, 20_000)
def test_answer_that_was_changed_on_its_way_is_never_half_understood(examples):
    with asyncio.Runner() as runner:

        @vary(examples, mutated(), CUTS, st.booleans())
        def check(changed, cuts, known):
            raw, status, body = changed
            size = len(body) if known else None
            check_outcome(*runner.run(outcome_of(split(raw, cuts), size, status)), raw, size, status)


@examples(400, 20_000)
def test_garbage_is_never_an_answer(examples):
    with asyncio.Runner() as runner:

        @vary(examples, GARBAGE, CUTS, st.sampled_from([None, 0, 3, 4]), STATUSES)
        def check(raw, cuts, size, status):
            check_outcome(*runner.run(outcome_of(split(raw, cuts), size, status)), raw, size, status)


ODD = {
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nevil\r\n0\r\n\r\n",
    "chunked, with a length": answer(b"4\r\nevil\r\n0\r\n\r\n", b"Transfer-Encoding: chunked"),
    "chunked, with a space before the colon": answer(b"4\r\nevil\r\n0\r\n\r\n", b"Transfer-Encoding : chunked"),
    "chunked, after a bare LF": answer(b"4\r\nevil\r\n0\r\n\r\n", b"ETag: a\nTransfer-Encoding: chunked"),
    "chunked, after a bare CR": answer(b"4\r\nevil\r\n0\r\n\r\n", b"ETag: a\rTransfer-Encoding: chunked"),
    "chunked, folded": answer(b"4\r\nevil\r\n0\r\n\r\n", b"Transfer-Encoding:", b" chunked"),
    "redirect": answer(b"evil", b"Location: /other", status="301 Moved Permanently"),
    "temporary redirect": answer(b"evil", b"Location: http://evil.example/", status="307 Temporary Redirect"),
    "100-continue first": b"HTTP/1.1 100 Continue\r\n\r\n" + answer(b"evil"),
    "304": answer(b"", status="304 Not Modified"),
    "304 with a body": answer(b"evil", status="304 Not Modified"),
    "204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "206": answer(b"evil", status="206 Partial Content"),
    "status of four digits": answer(b"evil", status="2000 OK"),
    "status of letters": answer(b"evil", status="2OO OK"),
    "tab after the status": answer(b"evil").replace(b"200 OK", b"200\tOK"),
    "negative status": answer(b"evil", status="-200 OK"),
    "folded header": answer(b"evil", b"X: a", b"  b"),
    "folded header with a colon": answer(b"evil", b"X: a", b"\tb: c"),
    "two lengths": answer(b"evil", b"Content-Length: 3"),
    "a list of lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 4, 4\r\n\r\nevil",
    "no length": b"HTTP/1.1 200 OK\r\n\r\nevil",
    "empty length": b"HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\nevil",
    "negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -4\r\n\r\nevil",
    "+4": b"HTTP/1.1 200 OK\r\nContent-Length: +4\r\n\r\nevil",
    "4_0": b"HTTP/1.1 200 OK\r\nContent-Length: 4_0\r\n\r\nevil",
    "0x4": b"HTTP/1.1 200 OK\r\nContent-Length: 0x4\r\n\r\nevil",
    "digits that are no ASCII": b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\n\r\nevil",
    "vertical tab before the length": b"HTTP/1.1 200 OK\r\nContent-Length: \x0b4\r\n\r\nevil",
    "huge length": b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999999999\r\n\r\nevil",
    "endless length": b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\nevil",
    "space before the colon": b"HTTP/1.1 200 OK\r\nContent-Length : 4\r\n\r\nevil",
    "no colon": answer(b"evil", b"what"),
    "no name": answer(b"evil", b": what"),
    "NUL in a header": answer(b"evil", b"X: a\0b"),
    "NUL in a name": answer(b"evil", b"X\0: a"),
    "NUL in the status": answer(b"evil", status="200 O\0K"),
    "bare LF at the end of a line": answer(b"evil").replace(b"OK\r\n", b"OK\n"),
    "bare LF": answer(b"evil").replace(b"\r\n", b"\n"),
    "bare CR": answer(b"evil").replace(b"\r\n", b"\r"),
    "bare LF in a value": answer(b"evil", b"X: a\nb"),
    "empty line first": b"\r\n" + answer(b"evil"),
    "HTTP/1.0": answer(b"evil").replace(b"1.1", b"1.0"),
    "HTTP/2": b"\0\0\x12\4\0\0\0\0\0\0\3\0\0\0\x80\0\4\0\1\0\0\0\5\0\xff\xff\xff",
    "HTTP/0.9": b"evil",
    "TLS": b"\x15\x03\x01\0\2\2F",
    "lower case": answer(b"evil").replace(b"HTTP", b"http"),
    "head of 64 KiB": answer(b"evil", b"X: " + b"y" * LONGEST_HEAD),
    "head of 200 kB": answer(b"evil", *[b"X: " + b"y" * 1000] * 200),
    "head without end": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 300_000,
    "first line without end": b"HTTP/1.1 200 " + b"y" * 300_000,
    "longer than announced": answer(b"evil") + b"!",
    "two answers": answer(b"evil") * 2,
}


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("oddity", ODD)
async def test_odd_answer_is_refused_however_it_comes(oddity, size):
    raw = ODD[oddity]
    cuts = range(1, len(raw)) if len(raw) < 1000 else (1, 20, len(raw) - 1)
    ways = [[raw], *(split(raw, [cut]) for cut in cuts), split(raw, range(0, len(raw), 1 + len(raw) // 40))]
    for pieces in ways:
        outcome, kept = await outcome_of(pieces, size)
        check_outcome(outcome, kept, raw, size)
        assert not kept
        if framed(raw, size, 200) is None:
            assert not isinstance(outcome, Answer) or not outcome.whole


@pytest.mark.parametrize("size", [None, 5])
async def test_answer_that_ends_early_is_broken_wherever_it_ends(size):
    raw = answer(b"hello", b"ETag: abc")
    for end in range(len(raw)):
        outcome, kept = await outcome_of([raw[:end]] if end else [], size)
        assert isinstance(outcome, BrokenConnection)
        assert (outcome.untouched, kept) == (end == 0, False)


@pytest.mark.parametrize(
    ("line", "understood"),
    [
        (b"Vary: Accept", True),
        (b"Content-Length: 5", True),
        (b"ETag: abc", True),
        (b"ETag: abd", False),
        (b"Content-Range: bytes 0-4/9", False),
        (b"Content-Length: 05", False),
    ],
)
async def test_header_that_is_there_twice_must_not_contradict_itself(line, understood):
    raw = answer(b"hello", b"ETag: abc", b"Content-Range: bytes 0-4/5", b"Vary: Origin", line)
    outcome, kept = await outcome_of([raw], 5)
    assert (outcome.whole, kept) == (understood, understood)
    assert outcome.status == (200 if understood else 0)


@pytest.mark.parametrize("size", [None, 3_000_000])
@pytest.mark.parametrize("piece", [1000, 1 << 20])
async def test_no_more_memory_is_taken_than_for_a_head_and_what_is_announced(piece, size):
    announced = answer(bytes(3_000_000), b"X: " + b"y" * 60_000)
    for raw, bound in [(b"HTTP/1.1 200 OK\r\nX: " + bytes(5_000_000), 0), (announced + bytes(5_000_000), 3_000_000)]:
        pieces = [memoryview(raw)[start : start + piece] for start in range(0, len(raw), piece)]
        gc.collect()
        tracemalloc.start()
        try:
            outcome, kept = await outcome_of(pieces, size)
            taken = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert not kept
        assert isinstance(outcome, BrokenConnection) or (outcome.whole, len(outcome.body)) == (True, 3_000_000)
        assert taken < bound + 4 * LONGEST_HEAD + 2 * wire._BUFFER


# real connections


class Counting(_Connection):
    """Counts what has come: a server that waits for that has the last word on where an answer is cut."""

    received = 0

    def buffer_updated(self, count):
        Counting.received += count
        super().buffer_updated(count)


@pytest.fixture(autouse=True)
def counting(monkeypatch):
    monkeypatch.setattr(wire, "_Connection", Counting)


class Script:
    """A server that says these pieces to the first request, and what is right to all others."""

    def __init__(self, pieces, *, closes=False):
        self.pieces, self.closes = pieces, closes
        self.asked = 0
        self.writer = None
        self.connections = set()
        self.said = asyncio.Event()

    async def serve(self, reader, writer):
        self.connections.add(asyncio.current_task())
        try:
            self.writer = writer
            while await reader.readuntil(b"\r\n\r\n"):
                self.asked += 1
                if self.asked == 1:
                    await self.say(reader, writer)
                    self.said.set()
                    if self.closes:
                        return
                else:
                    writer.write(answer(SECOND))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.said.set()
            writer.close()

    async def say(self, reader, writer):
        for piece in self.pieces:
            before = Counting.received
            writer.write(piece)
            await writer.drain()
            while Counting.received < before + len(piece):
                if reader.at_eof() or reader.exception() or writer.is_closing():
                    return
                await asyncio.sleep(0)


@cache
def contexts():
    authority = trustme.CA()
    ours, theirs = ssl.create_default_context(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(theirs)
    authority.configure_trust(ours)
    return ours, theirs


@asynccontextmanager
async def pool_on(script, *, tls=False, timeout=5.0):
    """A pool of connections to such a server."""
    ours, theirs = contexts() if tls else (None, None)
    server = await asyncio.start_server(script.serve, "127.0.0.1", 0, ssl=theirs)
    pool = Pool("localhost", server.sockets[0].getsockname()[1], timeout=timeout, tls=ours)
    try:
        async with asyncio.timeout(10):
            yield pool
    finally:
        await pool.aclose()
        server.close()
        await asyncio.wait_for(asyncio.gather(*script.connections, return_exceptions=True), 10)


async def told(pool, size, status=200):
    """What a request ends with, be it an error."""
    try:
        return await pool.get(REQUEST, size, no_bound, status)
    except BrokenConnection as error:
        return error


async def check_two(script, size, status=200, **options):
    """Whatever came in answer to the first request, the second gets its own."""
    raw = b"".join(script.pieces)
    async with pool_on(script, **options) as pool:
        first = await told(pool, size, status)
        await script.said.wait()
        kept = [connection for connection in pool._idle if connection.is_open]
        if isinstance(first, Answer) and first.whole:
            assert first.body == framed(raw, size, status)[0]
        second = await told(pool, None)
        assert (second.whole, second.body) == (True, SECOND)
        return first, kept


@LOOPS
@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_right_answer_may_be_cut_anywhere_on_its_way(factory, tls, known):
    raw = answer(b"hello", b"ETag: abc")
    with asyncio.Runner(loop_factory=factory) as runner:
        for cut in range(len(raw)):
            script = Script(split(raw, [cut]))
            first, kept = runner.run(check_two(script, 5 if known else None, tls=tls))
            assert (first.body, len(kept), len(script.connections)) == (b"hello", 1, 1)


@LOOPS
@examples(50, 3_000)
def test_right_answer_may_be_cut_often_on_its_way(factory, examples):
    with asyncio.Runner(loop_factory=factory) as runner:

        @vary(examples, answers(), CUTS, st.booleans())
        def check(right, cuts, known):
            raw, status, body = right
            script = Script(split(raw, cuts))
            first, kept = runner.run(check_two(script, len(body) if known else None, status))
            assert (first.whole, first.body, len(kept), len(script.connections)) == (True, body, 1, 1)


@LOOPS
@examples(50, 3_000)
def test_nothing_that_a_server_says_spoils_the_next_request(factory, examples):
    with asyncio.Runner(loop_factory=factory) as runner:

        @vary(examples, mutated() | GARBAGE.map(lambda raw: (raw, 200, b"evil")), CUTS, st.booleans())
        def check(said, cuts, known):
            raw, status, body = said
            script = Script(split(raw, cuts), closes=True)
            runner.run(check_two(script, len(body) if known else None, status))


@LOOPS
@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("oddity", [oddity for oddity in ODD if framed(ODD[oddity], None, 200) is None])
def test_odd_answer_is_refused_and_its_connection_closed(factory, tls, oddity):
    with asyncio.Runner(loop_factory=factory) as runner:
        first, kept = runner.run(check_two(Script([ODD[oddity]], closes=True), None, tls=tls))
        assert not kept
        assert not isinstance(first, Answer) or not first.whole


@LOOPS
@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("unasked", [b"x", answer(b"evil"), answer(b"evil") * 200])
def test_answer_to_nothing_closes_the_connection_that_brought_it(factory, tls, unasked):
    async def main():
        script = Script([answer(b"good")])
        async with pool_on(script, tls=tls) as pool:
            assert (await told(pool, 4)).body == b"good"
            (connection,) = pool._idle
            script.writer.write(unasked)
            while connection.is_open:
                await asyncio.sleep(0)
            assert (await told(pool, None)).body == SECOND
            assert len(script.connections) == 2

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


@LOOPS
@pytest.mark.parametrize("tls", [False, True])
def test_silence_in_an_answer_is_bounded(factory, tls):
    raw = answer(b"hello")

    async def main(end):
        async with pool_on(Script([raw[:end]]), tls=tls) as pool:
            connection = await pool._opened()
            pool.timeout = connection.pace.timeout = 0.05  # from here on: to connect may take longer
            with pytest.raises(BrokenConnection, match=r"(no byte|fewer than 500 bytes) came for 0\.05 s"):
                await pool._asked(connection, REQUEST, 5, no_bound, 200)
            assert not pool._idle

    with asyncio.Runner(loop_factory=factory) as runner:
        for end in (0, 1, 20, len(raw) - 5, len(raw) - 1):
            runner.run(main(end))


@LOOPS
@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("at_once", [False, True])
def test_second_answer_to_one_request_is_none_to_the_next(factory, tls, at_once):
    first = answer(bytes(wire._FIRST_PIECE - len(answer(b"")) - 3))
    assert len(first) == wire._FIRST_PIECE, "the first answer fills the buffer: the second is not read with it"

    async def main():
        script, ends = Script([first + answer(b"evil")]), asyncio.get_running_loop().create_future()

        def go_on(answer):
            if not pool.ask(REQUEST, 4, ends.set_result, asyncio.get_running_loop().time() + 5):
                ends.set_result(None)

        async with pool_on(script, tls=tls) as pool:
            if at_once:
                pool._send(await pool._opened(), REQUEST, None, no_bound, 200, go_on)
                assert not isinstance(await ends, Answer)
            else:
                assert len((await told(pool, None)).body) > 8000
                assert (await told(pool, None)).body == SECOND

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


# the store


@asynccontextmanager
async def store_of(odd):
    """A store of objects named after oddities, and a list of the requests that `odd` says are answered so."""
    connections, met = set(), []

    async def serve(reader, writer):
        connections.add(asyncio.current_task())
        try:
            while request := await reader.readuntil(b"\r\n\r\n"):
                key = unquote(request.split(b" ")[1].decode()).removeprefix("/b/")
                if key in ODD and odd(request):
                    met.append(key)
                    writer.write(ODD[key])
                    await writer.drain()
                    return
                writer.write(answer(b"good", b'ETag: "abc"'))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    connection = Connection("AWS", endpoint, "us-east-1", access_key="key", secret_key="secret", path_style=True)
    store = S3Store(connection, concurrency=4, timeout=2, retry=Retry(0, deadline=10, first_contact=5))
    try:
        async with asyncio.timeout(30):
            assert (await store.get(ObjectInfo("b", "first")))[1] == b"good"
            yield store, met
    finally:
        await store.aclose()
        server.close()
        await asyncio.wait_for(asyncio.gather(*connections, return_exceptions=True), 10)


def is_of_the_full_lane(request):
    return b"amz-sdk-invocation-id" in request.lower()


BREAKING = {"HTTP/2", "HTTP/0.9", "TLS", "bare LF", "bare CR", "head of 64 KiB", "head of 200 kB", "head without end"}
BREAKING |= {"first line without end", "longer than announced", "two answers", "huge length"}


@pytest.mark.parametrize("size", [None, 4])
async def test_object_whose_answer_is_odd_comes_down_the_full_lane(size):
    async with store_of(lambda request: not is_of_the_full_lane(request)) as (store, met):
        for oddity in ODD:
            lanes = Counter(store.lanes)
            (result,) = await asyncio.gather(store.get(ObjectInfo("b", oddity, size)), return_exceptions=True)
            if oddity in BREAKING and isinstance(result, TransferFailed):  # another attempt may find it whole
                assert "the connection broke" in str(result)
            else:
                assert (result[1], store.lanes) == (b"good", lanes + Counter(answer=1))
            assert met.pop() == oddity
            for _ in range(4):  # so many make up for an odd one
                assert (await store.get(ObjectInfo("b", "other", size)))[1] == b"good"
            assert store.lanes["lean"] == lanes["lean"] + 4


async def test_object_whose_every_answer_is_odd_is_an_error_that_says_why():
    async with store_of(lambda request: True) as (store, met):
        for oddity in ODD:
            with pytest.raises(AsyncdsError, match=f"^s3://b/{re.escape(oddity)}: |redirects to .*: refused"):
                await store.get(ObjectInfo("b", oddity, 4))
            assert set(met) == {oddity}
            met.clear()
            assert (await store.get(ObjectInfo("b", "other", 4)))[1] == b"good"
