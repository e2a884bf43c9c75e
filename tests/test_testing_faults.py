"""Faults of the S3 server that end, stretch or forge an answer; derived buckets, stragglers, counts."""

import gzip
import http.client
import pickle
import random
import re
import socket
import time
import tracemalloc
from collections import Counter
from urllib.parse import urlsplit

import pytest

from asyncds.errors import ConfigurationError
from asyncds.testing import Fault, LogNormal, S3Server, Stragglers, body_of

BODY = body_of("k", 10_000)


@pytest.fixture
def server():
    with S3Server() as server:
        server.put("b", "k", BODY)
        yield server


def connect(server, timeout=20):
    parts = urlsplit(server.endpoint)
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)


def ask(server, target="/b/k", method="GET"):
    connection = connect(server)
    try:
        connection.request(method, target)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def raw(server, target="/b/k"):
    """All bytes that come until the server closes."""
    parts = urlsplit(server.endpoint)
    with socket.create_connection((parts.hostname, parts.port), timeout=20) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))


def script(server, *steps, **options):
    server.script("b", "k", steps, **options)


# bodies that take their time, or have no end


def test_body_drips_by_so_many_bytes_and_the_connection_goes_on(server):
    script(server, Fault.dripping(3000, 0.05, after=1000))
    connection = connect(server)
    started = time.monotonic()
    for _ in range(2):
        connection.request("GET", "/b/k")
        assert connection.getresponse().read() == BODY
    assert 0.15 <= time.monotonic() - started < 2
    assert server.stats.connections_total == 1
    connection.close()


def test_drip_ends_with_its_client(server):
    script(server, Fault.dripping(1, 0.01))
    connection = connect(server)
    connection.request("GET", "/b/k")
    assert connection.getresponse().read(5) == BODY[:5]
    connection.close()
    deadline = time.monotonic() + 10
    while server.stats.in_flight:
        assert time.monotonic() < deadline


def test_huge_body_is_announced_and_sent_as_far_as_somebody_reads_without_being_held(server):
    script(server, Fault.huge(10 << 30))
    connection = connect(server)
    tracemalloc.start()
    connection.request("GET", "/b/k")
    answer = connection.getresponse()
    assert answer.headers["Content-Length"] == str(10 << 30)
    for _ in range(32):
        assert answer.read(1 << 20) == bytes(1 << 20)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    connection.close()
    script(server, Fault.huge(3_000_001))
    assert ask(server)[2] == bytes(3_000_001)
    assert ask(server)[2] == BODY


def test_bomb_is_small_until_it_is_unpacked(server):
    script(server, Fault.gzip_bomb(32 << 20))
    _, headers, body = ask(server)
    assert headers["Content-Encoding"] == "gzip"
    assert len(body) < 64 << 10
    assert gzip.decompress(body) == bytes(32 << 20)


def test_headers_may_be_a_megabyte(server):
    script(server, Fault.headers({f"x-{number}": "y" * 1000 for number in range(1000)}))
    head, _, body = raw(server).partition(b"\r\n\r\n")
    assert len(head) > 1_000_000
    assert body == BODY


# forged framing


def test_chunks_may_be_right_cut_off_or_of_another_size(server):
    script(server, Fault.chunked(), Fault.chunked(3000, after=7000), Fault.chunked(lie=7), Fault.chunked(lie=-7))
    status, headers, body = ask(server)
    assert (status, body, headers["Content-Length"]) == (200, BODY, None)
    with pytest.raises(http.client.IncompleteRead):
        ask(server)
    for _ in range(2):
        with pytest.raises((http.client.IncompleteRead, ValueError)):
            ask(server)
    assert ask(server)[2] == BODY


@pytest.mark.parametrize("line", [b"HTTP/1.1 2OO OK", b"", b"ICY 200 OK", b"\x00\xff"])
def test_first_line_may_be_anything(server, line):
    script(server, Fault.status_line(line))
    head, _, body = raw(server).partition(b"\r\n\r\n")
    assert head.startswith(line + b"\r\nConnection") or head.startswith(line + b"\r\nDate")
    assert body == BODY


def test_redirects_lead_elsewhere_or_in_a_loop(server):
    script(server, Fault.redirect("http://169.254.169.254/latest", status=301), Fault.redirect())
    status, headers, _ = ask(server)
    assert (status, headers["Location"]) == (301, "http://169.254.169.254/latest")
    status, headers, _ = ask(server)
    assert (status, headers["Location"]) == (307, "/b/k")


def test_slow_down_may_say_when_to_come_back(server):
    script(server, Fault.slow_down(2), Fault.slow_down("Fri, 31 Dec 1999 23:59:59 GMT"), Fault.slow_down())
    told = [ask(server) for _ in range(3)]
    assert {status for status, _, _ in told} == {503}
    assert [headers["Retry-After"] for _, headers, _ in told] == ["2", "Fri, 31 Dec 1999 23:59:59 GMT", None]


# listings


def keys(page):
    return re.findall(rb"<Key>(.*?)</Key>", page)


def test_pages_of_a_listing_are_spoilt(server):
    server.put_many("l", {f"k{number}": b"x" for number in range(4)})
    misprints = "unsorted", "doubled", "no token", "circle"
    server.script("l", None, [Fault.listing(misprint) for misprint in misprints], operation="LIST")
    backwards, doubled, endless, circle, right = (ask(server, "/l?list-type=2&max-keys=3")[2] for _ in range(5))
    assert keys(right) == [b"k0", b"k1", b"k2"] == keys(endless) == keys(circle)
    assert keys(backwards) == keys(right)[::-1]
    assert keys(doubled) == [b"k0", b"k0", b"k1", b"k1", b"k2", b"k2"]
    assert (b"<IsTruncated>true<" in endless, b"NextContinuationToken" in endless) == (True, False)
    token = re.findall(rb"<NextContinuationToken>(.*?)<", circle)[0].decode()
    assert keys(ask(server, f"/l?list-type=2&max-keys=3&continuation-token={token}")[2]) == keys(right)


def test_listing_fails_at_the_page_that_the_script_says(server):
    server.script("l", None, [Fault(), Fault.status(500)], operation="LIST")
    server.put_many("l", {f"k{number}": b"x" for number in range(4)})
    assert [ask(server, "/l?list-type=2")[0] for _ in range(3)] == [200, 500, 200]
    assert server.stats.faulted == {("l", ""): 1}


# connections


def test_idle_connection_is_closed_by_the_server_and_a_busy_one_is_not():
    with S3Server(idle_timeout=0.2) as server:
        server.put("b", "k", BODY)
        script(server, Fault.delay(0.5))
        connection = connect(server)
        connection.request("GET", "/b/k")
        assert connection.getresponse().read() == BODY
        assert connection.sock.recv(1) == b""
        connection.close()
        assert server.stats.connections_open == 0


# latencies


def test_stragglers_are_as_many_and_as_slow_as_was_said():
    generator = random.Random(0)
    drawn = [Stragglers(0.01, fraction=0.02, times=20).draw(generator) for _ in range(20_000)]
    assert Counter(drawn).keys() == {0.01, 0.2}
    assert 300 < drawn.count(0.2) < 500
    slow = Stragglers(LogNormal(0.01, 0.05), fraction=1, times=10).draw(random.Random(1))
    assert slow == pytest.approx(10 * LogNormal(0.01, 0.05).draw(random.Random(1)))


def test_server_answers_with_stragglers(server):
    server.latency = Stragglers(0.0001, fraction=0.1, times=1000)
    times = []
    for _ in range(60):
        started = time.monotonic()
        ask(server)
        times.append(time.monotonic() - started)
    assert 1 <= sum(seconds >= 0.1 for seconds in times) <= 20
    assert min(times) < 0.05


# what follows from keys


def test_derived_bucket_lists_and_serves_what_follows_from_its_keys(server):
    server.derive("many", 2_000_000, 100, prefix="train/")
    status, headers, body = ask(server, "/many/train/1999999")
    assert (status, body) == (200, body_of("train/1999999", 100))
    page = ask(server, "/many?list-type=2&prefix=train/15&max-keys=3")[2]
    assert keys(page) == [b"train/1500000", b"train/1500001", b"train/1500002"]
    assert headers["ETag"].strip('"').endswith("-1")
    etag = ask(server, "/many?list-type=2&prefix=train/1999999")[2]
    assert headers["ETag"].strip('"').encode() in etag
    for wrong in ("train/2000000", "train/0", "train/0000000x", "test/0000000", "0000000"):
        assert ask(server, f"/many/{wrong}")[0] == 404
    assert ask(server, "/many?list-type=2&prefix=trai&delimiter=/")[2].count(b"<CommonPrefixes>") == 1
    assert ask(server, "/many/new", "PUT")[0] == 403
    with pytest.raises(ConfigurationError, match="follow from their keys"):
        server.put("many", "new", b"")


@pytest.mark.parametrize("prefix", ["", "2024/", "é😀"])
def test_derived_objects_are_those_of_the_listing(server, prefix):
    server.derive("few", 11, 3, prefix=prefix)
    listed = [key.decode() for key in keys(ask(server, "/few?list-type=2")[2])]
    assert listed == [f"{prefix}{number:02}" for number in range(11)]


# counts and values


def test_counts_tell_what_was_refused_what_was_faulted_and_what_came_again(server):
    script(server, Fault.status(503), Fault(), Fault.reset(5000))
    for _ in range(2):
        ask(server)
    with pytest.raises(ConnectionResetError):
        ask(server)
    assert server.stats.faulted == {("b", "k"): 2}
    assert server.stats.again == {("b", "k"): 2}
    server.reset_counts()
    assert (server.stats.faulted, server.stats.again, server.stats.refused) == (Counter(), Counter(), 0)
    with S3Server(rate_limit=0.001) as limited:
        limited.put("b", "k", BODY)
        assert [ask(limited)[0] for _ in range(3)] == [200, 503, 503]
        assert limited.stats.refused == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fault(fill=-1),
        lambda: Fault.chunked(0),
        lambda: Fault.dripping(0),
        lambda: Fault.dripping(1, 0),
        lambda: Fault.listing("upside down"),
        lambda: Stragglers(0.1, fraction=2),
        lambda: Stragglers(-1),
        lambda: Stragglers(0.1, times=0.5),
        lambda: S3Server(idle_timeout=0),
    ],
)
def test_impossible_values_are_refused(make):
    with pytest.raises(ConfigurationError):
        make()


def test_faults_pickle_and_reach_a_server_in_a_process():
    steps = [Fault.redirect(), Fault.chunked(lie=1), Fault.dripping(), Fault.listing("circle"), Fault.status_line(b"x")]
    assert pickle.loads(pickle.dumps(steps)) == steps
    with S3Server(process=True, latency=Stragglers(0.001)) as server:
        server.derive("b", 10, 100)
        server.script("b", "3", [Fault.slow_down(1)])
        assert [ask(server, "/b/3")[0] for _ in range(2)] == [503, 200]
        assert server.stats.faulted == {("b", "3"): 1}
