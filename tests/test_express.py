"""Objects that come without a task of their own: whatever goes wrong, everybody is told, everything is given back."""

import asyncio
import contextlib
import hashlib
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass

import pytest

from asyncds import Cache, Fetcher, ObjectInfo, Retry
from asyncds.budget import Memory, Slots
from asyncds.errors import AsyncdsError, DatasetClosed, ObjectNotFound, StoreError, TransferFailed
from asyncds.lookup import Fetched
from asyncds.source import _Early
from asyncds.testing import FakeStore

pytestmark = pytest.mark.timeout(60)
BODY = b"x" * 1000
ETAG = hashlib.md5(BODY, usedforsecurity=False).hexdigest()


def info(key: str) -> ObjectInfo:
    return ObjectInfo("bucket", key, len(BODY), ETAG)


class Scripted:
    """A server that answers each key with the same body, but for what a test says of a key."""

    def __init__(self) -> None:
        self.requests = Counter[str]()
        self.headers: dict[str, str] = {}
        self.closes: set[str] = set()
        self.port = 0

    async def serve(self, reader, writer) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                key = head.split()[1].decode().rpartition("/")[2]
                self.requests[key] += 1
                if key in self.closes:
                    break
                await asyncio.sleep(0.01)  # so that those who ask at the same time have connections of their own
                extra = self.headers.get(key, "")
                answer = f'HTTP/1.1 200 OK\r\nContent-Length: {len(BODY)}\r\nETag: "{ETAG}"\r\n{extra}\r\n'
                writer.write(answer.encode() + BODY)
        writer.close()


@contextlib.asynccontextmanager
async def scripted(monkeypatch, tmp_path, **options):
    """A server, and a fetcher whose connections to it are open."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    script = Scripted()
    server = await asyncio.start_server(script.serve, "127.0.0.1", 0)
    place = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    fetcher = Fetcher.open(endpoint=place, region="us-east-1", cache_dir=tmp_path, concurrency=4, **options)
    try:
        async with fetcher:
            await fetcher.get(info("first"))
            await asyncio.gather(*(fetcher.get(info(f"warm{number}")) for number in range(4)))
            yield script, fetcher
    finally:
        server.close()


async def all_is_given_back(fetcher: Fetcher) -> bool:
    """At once, or turns of the loop later: an object that took the full lane has a task, which ends after that."""
    until = time.monotonic() + 10
    while True:
        used = fetcher._slots._used, fetcher.downloader.memory._used, len(fetcher._flights), fetcher._unarrived
        if (*used, fetcher._expected) == (0, 0, 0, 0, 0) or time.monotonic() > until:
            return (*used, fetcher._expected) == (0, 0, 0, 0, 0)
        await asyncio.sleep(0)


# what a server may do


@pytest.mark.lean
async def test_connection_that_was_closed_while_it_was_idle_costs_one_more_request(monkeypatch, tmp_path):
    async with scripted(monkeypatch, tmp_path, retries=0) as (script, fetcher):
        script.closes.add("probe")
        with pytest.raises(TransferFailed, match="the server closed it"):
            await fetcher.get(info("probe"))
        assert script.requests["probe"] == 2
        await fetcher.flush()
        assert await all_is_given_back(fetcher)


@pytest.mark.parametrize("header", ["x-amz-checksum-crc32: abc", "x-amz-checksum-crc32: AAAAAA==", "etag: other"])
async def test_body_that_cannot_be_trusted_is_an_error_and_leaves_nothing(monkeypatch, tmp_path, header):
    async with scripted(monkeypatch, tmp_path, retries=1, deadline=5) as (script, fetcher):
        script.headers["bad"] = f"{header}\r\n"
        results = await asyncio.gather(*map(fetcher.get, map(info, ["bad", "good1", "good2"])), return_exceptions=True)
        assert isinstance(results[0], StoreError)
        assert [result.body for result in results[1:]] == [BODY, BODY]
        await fetcher.flush()
        assert await all_is_given_back(fetcher)


async def test_key_that_no_request_can_name_harms_no_other_object(monkeypatch, tmp_path):
    async with scripted(monkeypatch, tmp_path) as (_, fetcher):
        keys = ["s\ud800x", *(f"good{number}" for number in range(20))]
        bad, *good = await asyncio.gather(*map(fetcher.get, map(info, keys)), return_exceptions=True)
        assert isinstance(bad, AsyncdsError)
        assert [result.body for result in good] == [BODY] * 20
        await fetcher.flush()
        assert await all_is_given_back(fetcher)


@pytest.mark.lean
async def test_healthy_objects_come_without_a_task_each(monkeypatch, tmp_path):
    async with scripted(monkeypatch, tmp_path) as (script, fetcher):
        flights = [fetcher.start(info(f"k{number}")) for number in range(50)]
        await asyncio.gather(*(flight.settled for flight in flights))
        assert [flight.task for flight in flights] == [None] * 50
        assert {script.requests[f"k{number}"] for number in range(50)} == {1}
        assert await all_is_given_back(fetcher)


async def test_store_whose_get_is_its_own_is_asked_by_it(monkeypatch, tmp_path):
    async with scripted(monkeypatch, tmp_path) as (_, fetcher):

        class Wrapped:
            """Passes everything on to another store, but `get`."""

            gets = 0

            def __getattr__(self, name):
                return getattr(fetcher._store, name)

            async def get(self, info, reserve=lambda size: None, part=None):
                self.gets += 1
                return await fetcher._store.get(info, reserve, part)

        wrapped = Wrapped()
        outer = Fetcher(wrapped, None, concurrency=4, retry=Retry(1, 10, 5))
        await asyncio.gather(*(outer.get(info(f"k{number}")) for number in range(10)))
        assert wrapped.gets == 10


# the end


@pytest.mark.parametrize("turns", range(8))
@pytest.mark.parametrize("claimed", [True, False])
async def test_who_waits_is_told_of_the_end_whenever_it_comes(tmp_path, monkeypatch, turns, claimed):
    cache, store = Cache(tmp_path), FakeStore({("b", "k"): BODY})
    store.gates["k"] = asyncio.Event()
    if not claimed:
        monkeypatch.setattr(cache, "claim", lambda object: False)
    fetcher = Fetcher(store, cache, concurrency=2, retry=Retry(1, 20, 5))
    flight = fetcher.start(store.info("b", "k"))
    for _ in range(turns):
        await asyncio.sleep(0)
    await fetcher.aclose()
    with pytest.raises(DatasetClosed):
        await asyncio.wait_for(flight.arrived, 5)
    assert await asyncio.wait_for(flight.settled, 5) is False
    assert await all_is_given_back(fetcher)


async def test_claim_that_fails_is_an_error_and_no_hang(tmp_path, monkeypatch):
    cache, store, answers = Cache(tmp_path), FakeStore({("b", "k"): BODY}), [False]
    monkeypatch.setattr(cache, "claim", lambda object: answers.pop())  # and raises when there are none
    async with Fetcher(store, cache, concurrency=2, retry=Retry(1, 20, 5)) as fetcher:
        with pytest.raises(IndexError):
            await asyncio.wait_for(fetcher.get(store.info("b", "k")), 5)
        assert await all_is_given_back(fetcher)


async def test_cache_that_is_too_slow_to_be_waited_for_keeps_no_memory_of_others(tmp_path, monkeypatch):
    monkeypatch.setattr("asyncds.fetcher._SECONDS_TO_FLUSH", 0.1)
    cache, store = Cache(tmp_path), FakeStore({("b", f"k{number}"): BODY for number in range(600)})
    gate, memory, put_each = threading.Event(), Memory(), cache.put_each
    monkeypatch.setattr(cache, "put_each", lambda *entries: gate.wait(20) and put_each(*entries))
    fetcher = Fetcher(store, cache, concurrency=64, retry=Retry(1, 20, 5), memory=memory)
    flights = [fetcher.start(store.info("b", f"k{number}")) for number in range(600)]
    await asyncio.gather(*(flight.arrived for flight in flights))
    await fetcher.aclose()
    gate.set()
    await asyncio.wait_for(asyncio.gather(*(flight.settled for flight in flights)), 20)
    assert memory._used == 0
    assert await all_is_given_back(fetcher)
    assert all(map(cache.claim, map(fetcher.object_id, (store.info("b", f"k{number}") for number in range(600)))))


async def test_dataset_that_is_gone_does_not_hold_up_another(tmp_path, caplog):
    @dataclass
    class Admits:
        gone: bool = False

        def __call__(self, size):
            if self.gone:
                raise ReferenceError("weakly-referenced object no longer exists")
            return True

    slots, memory, admits = Slots(4), Memory(), Admits()
    stores = [FakeStore({("b", f"k{number}"): BODY for number in range(60)}) for _ in range(2)]
    stores[0].gates = {f"k{number}": asyncio.Event() for number in range(60)}
    stores[1].failures = {"k0": [ObjectNotFound("gone")]}
    own, other = (
        Fetcher(
            *(store, Cache(tmp_path / f"{number}")),
            concurrency=4,
            retry=Retry(0, 20, 5),
            slots=slots,
            memory=memory,
            admits=admits if number == 0 else None,
        )
        for number, store in enumerate(stores)
    )
    own.prefetch([stores[0].info("b", f"k{number}") for number in range(3)])
    await stores[0].reached(3)
    own._ahead.want(("b", "k30"), stores[0].info("b", "k30"), 0)
    admits.gone = True
    flights = [other.start(stores[1].info("b", f"k{number}")) for number in range(3)]
    assert await asyncio.wait_for(asyncio.gather(*(f.settled for f in flights)), 10) == [False, True, True]
    assert "nothing more is brought in advance" in caplog.text
    await asyncio.gather(own.aclose(), other.aclose())


# what is kept at hand


def test_what_was_kept_at_hand_can_be_dropped_while_it_is_in_use():
    early = _Early()
    early.add(Fetched(info("k"), BODY))
    with early._lock:
        early.clear()  # as the garbage collector does, on any thread
    assert early.take([info("k")]) == ([False], [None])


def test_child_that_was_forked_amid_an_addition_has_nothing_at_hand(monkeypatch):
    early = _Early()
    early.add(Fetched(info("k"), BODY))
    with early._lock:
        pid = os.fork()
        if pid == 0:
            signal.alarm(10)
            os._exit(int(early.take([info("k")]) != ([False], [None])))
    assert os.waitpid(pid, 0)[1] == 0
    assert early.take([info("k")]) == ([True], [Fetched(info("k"), BODY)])


def test_another_version_is_not_what_was_kept_at_hand():
    early = _Early()
    early.add(Fetched(info("k"), BODY))
    assert early.take([info("k")._replace(etag="new")]) == ([True], [None])


@pytest.mark.lean
async def test_answers_that_came_while_the_loop_stood_still_are_taken(s3, monkeypatch, tmp_path):
    """As after SIGSTOP and SIGCONT: timers are due before sockets are read."""
    infos = [info(f"k{number}") for number in range(20)]
    s3.put_many("bucket", {each.key: BODY for each in infos})
    async with Fetcher.open(cache_dir=tmp_path, concurrency=20, timeout=0.4, retries=0) as fetcher:
        await asyncio.gather(*map(fetcher.get, infos[:10]))
        s3.latency = 0.2
        s3.reset_counts()
        asked = [asyncio.create_task(fetcher.get(each)) for each in infos[10:]]
        async with asyncio.timeout(10):
            while s3.stats.requests["GET"] < 10:
                await asyncio.sleep(0)
        time.sleep(1)
        assert {fetched.body for fetched in await asyncio.gather(*asked)} == {BODY}
