"""The latency proxy: what a round trip costs, what it does not slow down, and what travels through it."""

import concurrent.futures
import contextlib
import hashlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest

from asyncds.errors import ConfigurationError
from asyncds.testing import Fault, LatencyProxy, S3Server

BODY = hashlib.shake_128(b"body").digest(10_000)
GET = b"GET /b/k HTTP/1.1\r\n\r\n"
GET_AND_CLOSE = b"GET /b/k HTTP/1.1\r\nConnection: close\r\n\r\n"
# Timers count whole milliseconds and may be up to one early in each direction.
EARLY_S = 0.002


@pytest.fixture
def server() -> Iterator[S3Server]:
    with S3Server() as server:
        server.put("b", "k", BODY)
        yield server


@pytest.fixture
def proxy(server) -> Iterator[LatencyProxy]:
    with LatencyProxy(server.endpoint, rtt=0.0, process=False) as proxy:
        yield proxy


def connect(endpoint: str) -> socket.socket:
    url = urlsplit(endpoint)
    return socket.create_connection((url.hostname, url.port), timeout=20)


def read_to_end(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 20), b""))


def read_until_reset(connection: socket.socket) -> bytes:
    received = b""
    while True:
        try:
            chunk = connection.recv(65536)
        except ConnectionResetError:
            return received
        assert chunk, "the connection was closed in order"
        received += chunk


def read_until_closed(connection: socket.socket) -> bytes:
    with contextlib.suppress(ConnectionResetError):
        return read_to_end(connection)
    return b""


def fetch(endpoint: str) -> bytes:
    with connect(endpoint) as connection:
        connection.sendall(GET_AND_CLOSE)
        return read_to_end(connection)


def ask_once(connection: socket.socket) -> float:
    """Send one GET and read its answer; return the seconds it took."""
    started = time.monotonic()
    connection.sendall(GET)
    received = b""
    while not received.endswith(BODY):
        received += connection.recv(65536)
    return time.monotonic() - started


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"


@pytest.mark.parametrize("process", [False, True], ids=["thread", "process"])
def test_request_takes_a_round_trip_and_the_first_one_two(server, process):
    with LatencyProxy(server.endpoint, rtt=0.05, process=process) as proxy, connect(proxy.endpoint) as connection:
        first, second = ask_once(connection), ask_once(connection)
    assert 0.1 - EARLY_S <= first < 1.0
    assert 0.05 - EARLY_S <= second < 0.5


def test_connection_opened_ahead_pays_no_second_round_trip(server, proxy):
    with connect(proxy.endpoint) as connection:
        ask_once(connection)
        proxy.rtt = 0.3
        assert 0.3 - EARLY_S <= ask_once(connection) < 0.6 - EARLY_S
    assert proxy.rtt == 0.3


def test_connections_do_not_wait_for_each_other(server, proxy):
    proxy.rtt = 0.1
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(fetch, [proxy.endpoint] * 40))
    assert time.monotonic() - started < 40 * 0.2 / 2
    assert all(answer.endswith(BODY) for answer in answers)
    assert proxy.stats.max_open > 1


def test_chunks_of_one_connection_travel_at_the_same_time(server, proxy):
    with connect(proxy.endpoint) as connection:
        ask_once(connection)
        proxy.rtt = 0.1
        started = time.monotonic()
        for _ in range(20):
            connection.sendall(GET)
        connection.sendall(GET_AND_CLOSE)
        assert read_to_end(connection).count(BODY) == 21
    assert time.monotonic() - started < 20 * 0.1 / 2


def test_large_body_arrives_whole_at_a_slow_reader(server, proxy):
    body = os.urandom(60_000_000)
    server.put("b", "k", body)
    proxy.rtt = 0.002
    with connect(proxy.endpoint) as connection:
        connection.sendall(GET_AND_CLOSE)
        eventually(lambda: proxy.stats.bytes_down > 1_000_000)
        assert read_to_end(connection).endswith(body)
    assert proxy.stats.bytes_down > len(body)


def test_half_close_travels_and_the_answer_still_comes_back():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = threading.Thread(target=answer_after_end_of_stream, args=(listener,))
        target.start()
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with LatencyProxy(endpoint, rtt=0.01, process=False) as proxy, connect(proxy.endpoint) as connection:
            connection.sendall(b"question")
            connection.shutdown(socket.SHUT_WR)
            assert read_to_end(connection) == b"noitseuq"
            eventually(lambda: proxy.stats.connections_open == 0)
        target.join()


def answer_after_end_of_stream(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.sendall(read_to_end(connection)[::-1])


def test_reset_by_the_server_reaches_the_client_after_its_bytes(server, proxy):
    proxy.rtt = 0.01
    server.script("b", "k", [Fault.reset(after=5000)])
    with connect(proxy.endpoint) as connection:
        connection.sendall(GET)
        assert read_until_reset(connection).endswith(BODY[:5000])


def test_reset_by_the_client_reaches_the_server(server, proxy):
    server.script("b", "k", [Fault.stall()])
    connection = connect(proxy.endpoint)
    connection.sendall(GET)
    eventually(lambda: server.stats.in_flight == 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    eventually(lambda: server.stats.connections_open == 0)
    eventually(lambda: proxy.stats.connections_open == 0)


def test_client_that_leaves_frees_both_connections(server, proxy):
    with connect(proxy.endpoint) as connection:
        ask_once(connection)
        assert proxy.stats.connections_open == 1
    eventually(lambda: server.stats.connections_open == 0)
    eventually(lambda: proxy.stats.connections_open == 0)


def test_refused_target_resets_the_client():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with LatencyProxy(endpoint, rtt=0.05, process=False) as proxy:
        started = time.monotonic()
        with connect(proxy.endpoint) as connection:
            assert read_until_reset(connection) == b""
        assert time.monotonic() - started >= 0.05 - EARLY_S
        eventually(lambda: proxy.stats.connections_open == 0)


def test_counts_cover_connections_and_bytes(server, proxy):
    answers = []
    for _ in range(3):
        answers.append(fetch(proxy.endpoint))
        eventually(lambda: proxy.stats.connections_open == 0)
    stats = proxy.stats
    assert (stats.connections_total, stats.max_open) == (3, 1)
    assert stats.bytes_up == 3 * len(GET_AND_CLOSE)
    assert stats.bytes_down == sum(map(len, answers))


@pytest.mark.parametrize("process", [False, True], ids=["thread", "process"])
def test_exit_closes_what_is_open(server, process):
    with LatencyProxy(server.endpoint, rtt=0.001, process=process) as proxy:
        endpoint = proxy.endpoint
        connection = connect(endpoint)
        ask_once(connection)
    with connection:
        assert read_until_closed(connection) == b""
    with pytest.raises(ConnectionRefusedError):
        connect(endpoint)


@pytest.mark.parametrize("endpoint", ["", "127.0.0.1:9000", "ftp://127.0.0.1", "http://127.0.0.1:port"])
def test_target_that_is_no_endpoint_is_refused(endpoint):
    with pytest.raises(ConfigurationError, match="target endpoint"):
        LatencyProxy(endpoint)


@pytest.mark.parametrize("rtt", [-0.001, float("inf"), float("nan")])
def test_impossible_round_trip_is_refused(rtt):
    with pytest.raises(ConfigurationError, match="rtt"):
        LatencyProxy("http://127.0.0.1:9000", rtt=rtt)
