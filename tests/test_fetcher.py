"""The fetcher: one download per object, bounded, verified, and nobody who waits is forgotten."""

import asyncio
import threading
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from asyncds import warm
from asyncds.budget import Memory
from asyncds.cache import Cache
from asyncds.download import verify
from asyncds.errors import (
    AccessDenied,
    ConfigurationError,
    DatasetClosed,
    ObjectChanged,
    ObjectNotFound,
    TransferFailed,
)
from asyncds.fetcher import Fetched, Fetcher
from asyncds.lookup import lookup, resident
from asyncds.manifest import ObjectInfo
from asyncds.retry import Retry
from asyncds.stats import Counters
from asyncds.testing import FakeStore


def store_of(count, size=10, **options):
    return FakeStore({("b", f"k{number}"): b"%d" % (number % 10) * size for number in range(count)}, **options)


def infos_of(store):
    return [store.info(*name) for name in store.objects]


def gated(store, *keys):
    """Close a gate before these keys, or all, and return what opens it."""
    gate = asyncio.Event()
    store.gates = dict.fromkeys(keys or [key for _, key in store.objects], gate)
    return gate


@asynccontextmanager
async def fetching(store, cache=None, *, concurrency=8, retries=3, **options):
    retry = Retry(retries, deadline=20, first_contact=5)
    async with Fetcher(store, cache, concurrency=concurrency, retry=retry, **options) as fetcher:
        yield fetcher


async def settle():
    """Let everything run that can run without waiting for anything outside the loop."""
    for _ in range(100):
        await asyncio.sleep(0)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path)


class SlowCache(Cache):
    """A cache whose writes wait for `gate`."""

    def __init__(self, directory):
        super().__init__(directory)
        self.gate, self.writing, self.batches = threading.Event(), threading.Event(), []

    def put_each(self, entries, tag=""):
        self.writing.set()
        assert self.gate.wait(20)
        self.batches.append(len(entries))
        return super().put_each(entries, tag)


@dataclass
class Lying(FakeStore):
    """A store whose first answers are these, whatever is asked."""

    answers: list[tuple[ObjectInfo, bytes]] = field(default_factory=list)

    async def get(self, info, reserve, part=None):
        truth = await super().get(info, reserve, part)
        return self.answers.pop(0) if self.answers else truth


# one download per object


async def test_many_waiters_share_one_download():
    store = store_of(1)
    gate, (info,) = gated(store), infos_of(store)
    async with fetching(store) as fetcher:
        waiters = [asyncio.create_task(fetcher.get(info)) for _ in range(10)]
        await store.reached(1)
        await settle()
        assert repr(fetcher) == "<Fetcher 1 in flight, at most 8, 0 done, 0 failed>"
        gate.set()
        assert await asyncio.gather(*waiters) == [Fetched(info, b"0" * 10)] * 10
    assert store.gets == {"k0": 1}


async def test_flight_ends_when_the_cache_has_the_object(tmp_path):
    store, cache = store_of(1), SlowCache(tmp_path)
    (info,) = infos_of(store)
    async with fetching(store, cache) as fetcher:
        first = await fetcher.get(info)
        flight = fetcher.start(info)
        assert not flight.settled.done()
        assert await fetcher.get(info) == first
        cache.gate.set()
        await flight.settled
        assert await fetcher.get(info) == first
    assert store.gets == {"k0": 1}


async def test_versions_of_an_object_are_separate_downloads():
    store = store_of(1)
    gated(store).set()
    async with fetching(store) as fetcher:
        results = await asyncio.gather(
            fetcher.get(store.info("b", "k0")), fetcher.get(ObjectInfo("b", "k0", etag="old")), return_exceptions=True
        )
    assert isinstance(results[0], Fetched)
    assert isinstance(results[1], ObjectChanged)


async def cancelled(waiter):
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter


async def timed_out(waiter):
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(waiter, 0.01)


@pytest.mark.parametrize("give_up", [cancelled, timed_out])
async def test_waiter_that_gives_up_leaves_the_download_running(cache, give_up):
    store = store_of(1)
    gate, (info,) = gated(store), infos_of(store)
    async with fetching(store, cache) as fetcher:
        impatient, patient = (asyncio.create_task(fetcher.get(info)) for _ in range(2))
        await store.reached(1)
        await give_up(impatient)
        gate.set()
        assert (await patient).body == store.objects["b", "k0"]


async def test_download_that_everybody_gave_up_on_still_fills_the_cache(cache):
    store = store_of(1)
    gate, (info,) = gated(store), infos_of(store)
    async with fetching(store, cache) as fetcher:
        waiter = asyncio.create_task(fetcher.get(info))
        await store.reached(1)
        flight = fetcher.start(info)
        await cancelled(waiter)
        gate.set()
        await flight.settled
    assert resident(cache, store.endpoint, [info]) == [True]


# failures


async def test_failure_is_told_to_all_who_wait_and_not_remembered():
    store = store_of(1, failures={"k0": [AccessDenied("s3://b/k0: denied")]})
    gate, (info,) = gated(store), infos_of(store)
    async with fetching(store) as fetcher:
        waiters = [asyncio.create_task(fetcher.get(info)) for _ in range(3)]
        await store.reached(1)
        gate.set()
        errors = await asyncio.gather(*waiters, return_exceptions=True)
        assert [(type(error), str(error)) for error in errors] == [(AccessDenied, "s3://b/k0: denied")] * 3
        assert repr(fetcher) == "<Fetcher 0 in flight, at most 8, 0 done, 1 failed>"
        assert (await fetcher.get(info)).info == info
    assert store.gets == {"k0": 2}


@pytest.mark.parametrize("waits", [True, False])
async def test_failure_that_nobody_hears_is_not_logged_as_lost(caplog, waits):
    store = store_of(1, failures={"k0": [AccessDenied("denied")]})
    gate, (info,) = gated(store), infos_of(store)
    async with fetching(store) as fetcher:
        waiter = asyncio.create_task(fetcher.get(info)) if waits else None
        flight = fetcher.start(info)
        if waiter is not None:
            await settle()
            await cancelled(waiter)
        gate.set()
        await asyncio.wait([flight.settled])
        del flight, waiter
        await settle()
    assert caplog.records == []


async def test_transient_failures_are_retried_and_counted(tmp_path):
    store, counters = store_of(1, failures={"k0": [TransferFailed("503"), TransferFailed("reset")]}), []
    retry = Retry(3, 20, 5, on_retry=lambda: counters.append("retry"))
    async with Fetcher(store, None, concurrency=1, retry=retry) as fetcher:
        assert (await fetcher.get(store.info("b", "k0"))).body == store.objects["b", "k0"]
    assert (store.gets["k0"], counters) == (3, ["retry", "retry"])


async def test_retries_end_with_an_error_that_tells_the_story():
    store = store_of(1, failures={"k0": [TransferFailed("s3://b/k0: 503 SlowDown").because("wait") for _ in range(9)]})
    async with fetching(store, retries=2) as fetcher:
        with pytest.raises(TransferFailed, match=r"^s3://b/k0: 503 SlowDown after 3 attempts in \d\.\d s; wait$"):
            await fetcher.get(store.info("b", "k0"))


async def test_missing_object_is_neither_retried_nor_cached_as_a_miss(cache):
    store = store_of(1)
    async with fetching(store, cache) as fetcher:
        for _ in range(2):
            with pytest.raises(ObjectNotFound):
                await fetcher.get(ObjectInfo("b", "absent"))
        store.objects["b", "absent"] = b"now"
        assert (await fetcher.get(ObjectInfo("b", "absent"))).body == b"now"
    assert store.gets == {"absent": 3}


# verification


@pytest.mark.parametrize(
    ("expected", "served", "body", "error"),
    [
        ((3, "v"), (3, "v"), b"abc", None),
        ((None, None), (3, "v"), b"abc", None),
        ((0, "v"), (0, "v"), b"", None),
        ((3, "v"), (3, "v"), b"ab", TransferFailed),
        ((3, "v"), (4, "v"), b"abcd", TransferFailed),
        ((None, "v"), (3, "v"), b"ab", TransferFailed),
        ((3, "v"), (3, "w"), b"abc", ObjectChanged),
        ((3, None), (3, None), b"abc", TransferFailed),
        ((None, "v"), (3, None), b"abc", TransferFailed),
    ],
)
def test_what_arrives_is_compared_with_the_manifest(expected, served, body, error):
    arguments = ObjectInfo("b", "k", *expected), ObjectInfo("b", "k", *served), body
    if error is None:
        return verify(*arguments)
    with pytest.raises(error, match=r"^s3://b/k: ") as caught:
        verify(*arguments)
    assert type(caught.value) is error


async def test_wrong_length_is_fetched_again_and_other_version_is_not(cache):
    store = Lying({("b", "k"): b"right"})
    info = store.info("b", "k")
    store.answers = [(info._replace(size=4), b"righ"), (info, b"too long")]
    async with fetching(store, cache) as fetcher:
        assert (await fetcher.get(info)).body == b"right"
        store.objects["b", "k"] = b"other"
        changed = info._replace(etag="f" * 32)
        store.answers = [(store.info("b", "k"), b"other")]
        with pytest.raises(ObjectChanged, match="create the dataset again"):
            await fetcher.get(changed)
    assert lookup(cache, store.endpoint, [info])[1] == [Fetched(info, b"right")]
    assert len(cache) == 1


# bounds


async def test_requests_in_flight_stay_within_the_bound():
    store = store_of(50)
    gate = gated(store)
    async with fetching(store, concurrency=4) as fetcher:
        waiters = [asyncio.create_task(fetcher.get(info)) for info in infos_of(store)]
        await store.reached(4)
        await settle()
        gate.set()
        assert {result.info for result in await asyncio.gather(*waiters)} == set(infos_of(store))
    assert store.max_in_flight == 4


async def test_retry_does_not_hold_a_slot(monkeypatch):
    store = store_of(2, failures={"k0": [TransferFailed("503")]})
    first, second = infos_of(store)
    pausing, resume = asyncio.Event(), asyncio.Event()

    async def sleep(_):
        pausing.set()
        await resume.wait()

    async with fetching(store, concurrency=1) as fetcher:
        with monkeypatch.context() as patch:
            patch.setattr("asyncds.retry.asyncio.sleep", sleep)
            waiter = asyncio.create_task(fetcher.get(first))
            await pausing.wait()
            assert (await fetcher.get(second)).info == second
        resume.set()
        assert (await waiter).info == first


async def test_bytes_on_their_way_stay_within_the_bound():
    store = store_of(10, size=40)
    store.objects["b", "giant"] = b"g" * 1000
    gate, infos = gated(store), infos_of(store)
    async with fetching(store, memory=Memory(100)) as fetcher:
        waiters = [asyncio.create_task(fetcher.get(info)) for info in [*infos[:5], infos[-1], *infos[5:-1]]]
        await store.reached(2)
        await settle()
        assert store.in_flight == 2
        gate.set()
        assert sum(len(result.body) for result in await asyncio.gather(*waiters)) == 1400
    assert store.max_in_flight == 2


async def test_memory_is_held_until_the_cache_has_the_object(tmp_path):
    store, cache = store_of(3, size=60), SlowCache(tmp_path)
    one, two, _ = infos_of(store)
    async with fetching(store, cache, memory=Memory(100)) as fetcher:
        await fetcher.get(one)
        waiter = asyncio.create_task(fetcher.get(two))
        await settle()
        assert store.gets == {"k0": 1}
        cache.gate.set()
        assert (await waiter).info == two


async def test_memory_is_first_come_first_served_and_survives_cancellation():
    memory, order, gates = Memory(100), [], {name: asyncio.Event() for name in "abcd"}

    async def hold(name, amount):
        await memory.take(amount)
        order.append(name)
        await gates[name].wait()
        memory.give_back(amount)

    tasks = [asyncio.create_task(hold(*what)) for what in [("a", 80), ("b", 50), ("c", 10), ("d", 95)]]
    await settle()
    assert order == ["a"], "c would fit, but b came before"
    await cancelled(tasks[1])
    gates["a"].set()
    await settle()
    assert order == ["a", "c"]
    gates["c"].set()
    await settle()
    assert order == ["a", "c", "d"]
    gates["d"].set()
    await asyncio.gather(tasks[0], *tasks[2:])
    await asyncio.wait_for(memory.take(1000), 5)


async def test_memory_given_to_one_who_was_cancelled_at_that_moment_goes_back():
    memory = Memory(100)
    await memory.take(100)
    waiter = asyncio.create_task(memory.take(100))
    await settle()
    memory.give_back(100)
    waiter.cancel()  # its turn has come, and it does not know yet
    await asyncio.gather(waiter, return_exceptions=True)
    await asyncio.wait_for(memory.take(100), 5)


class Telling(FakeStore):
    """A store that tells sizes, counts the bytes that it was allowed to send at once, and waits for `gate`."""

    sending = most = asked = at_once = 0

    async def get(self, info, reserve, part=None):
        served, body = await super().get(info, reserve, part)
        self.sending, self.asked = self.sending + len(body), self.asked + 1
        self.most, self.at_once = max(self.most, self.sending), max(self.at_once, self.asked)
        for _ in range(20):
            await asyncio.sleep(0)
        self.sending, self.asked = self.sending - len(body), self.asked - 1
        return served, body


@pytest.mark.parametrize("size", [100, 60_000, 300_000])
async def test_bytes_of_objects_without_a_listing_stay_within_the_bound(size):
    store, memory = Telling(store_of(40, size=size).objects), Memory(1_000_000)
    async with fetching(store, memory=memory, concurrency=32) as fetcher:
        waiters = [asyncio.create_task(fetcher.get(ObjectInfo("b", key))) for _, key in store.objects]
        assert sum(len(result.body) for result in await asyncio.gather(*waiters)) == 40 * size
    assert store.most <= 1_000_000
    if size < 1000:
        assert store.at_once > 10
    assert store.gets.total() <= 80
    assert size > 65_536 or store.gets.total() == 40, "what is no larger than expected is asked for once"
    assert memory.take_now(1_000_000), "all of it was given back"


async def test_giant_without_a_listing_goes_alone():
    store, memory = Telling(store_of(6, size=50_000).objects), Memory(200_000)
    store.objects["b", "giant"] = b"g" * 1_000_000
    async with fetching(store, memory=memory) as fetcher:
        waiters = [asyncio.create_task(fetcher.get(ObjectInfo("b", key))) for _, key in store.objects]
        assert sum(len(result.body) for result in await asyncio.gather(*waiters)) == 1_300_000
    assert store.most == 1_000_000
    assert store.gets["giant"] == 2


async def test_size_that_is_told_gives_time(monkeypatch):
    monkeypatch.setattr("asyncds.download._SLOWEST", 1e5)
    store = store_of(1, size=100_000)

    class Slow(FakeStore):
        async def get(self, info, reserve, part=None):
            answer = await super().get(info, reserve, part)
            started = asyncio.get_running_loop().time()
            while asyncio.get_running_loop().time() < started + 0.4:
                await asyncio.sleep(0)
            return answer

    async with Fetcher(Slow(store.objects), None, concurrency=1, retry=Retry(0, 0.2, 0.2)) as fetcher:
        assert len((await fetcher.get(ObjectInfo("b", "k0"))).body) == 100_000


async def test_object_that_is_larger_each_time_is_given_up():
    class Growing(FakeStore):
        async def get(self, info, reserve, part=None):
            self.gets["k"] += 1
            reserve(10**8 * self.gets["k"])

    async with fetching(Growing(), memory=Memory(1000)) as fetcher:
        with pytest.raises(TransferFailed, match="another size each time"):
            await fetcher.get(ObjectInfo("b", "k"))


async def test_store_whose_get_takes_too_little_is_refused():
    class Old(FakeStore):
        async def get(self, info):
            return await super().get(info)

    with pytest.raises(ConfigurationError, match=r"Old.get\(\) must take \(info, reserve, part\)"):
        Fetcher(Old(), None, concurrency=1, retry=Retry(0, 1, 1))


async def test_retry_of_what_had_memory_and_those_who_wait_for_it_do_not_block_each_other():
    store = store_of(6, size=400_000, failures={"k0": [TransferFailed("reset")] * 3})
    async with fetching(store, concurrency=2, memory=Memory(400_000)) as fetcher:
        waiters = [asyncio.create_task(fetcher.get(ObjectInfo("b", f"k{n}"))) for n in range(6)]
        assert sum(len(result.body) for result in await asyncio.wait_for(asyncio.gather(*waiters), 20)) == 2_400_000
    assert store.gets["k0"] == 4


# many at once


async def test_fetch_yields_each_object_once_from_cache_and_store(cache):
    store = store_of(600)
    infos = infos_of(store)
    async with fetching(store, cache) as fetcher:
        for info in infos[::3]:
            await fetcher.start(info).settled
        found = [fetched async for fetched in fetcher.fetch(iter(infos))]
        assert sorted(found) == sorted(Fetched(info, store.objects["b", info.key]) for info in infos)
        assert [fetched async for fetched in fetcher.fetch([])] == []
    assert set(store.gets.values()) == {1}


async def test_slow_stream_does_not_fetch_again_what_another_has_fetched_meanwhile(cache):
    store = store_of(100)
    async with fetching(store, cache, concurrency=4) as fetcher:
        slow = fetcher.fetch(infos_of(store))
        found = [await anext(slow)]
        assert len([fetched async for fetched in fetcher.fetch(infos_of(store))]) == 100
        found += [fetched async for fetched in slow]
    assert sorted(found) == sorted(Fetched(info, store.objects["b", info.key]) for info in infos_of(store))
    assert set(store.gets.values()) == {1}


async def test_fetch_raises_the_first_failure_and_outcomes_goes_on():
    store = store_of(20)
    infos = [*infos_of(store), ObjectInfo("b", "absent")]
    async with fetching(store) as fetcher:
        with pytest.raises(ObjectNotFound):
            _ = [fetched async for fetched in fetcher.fetch(infos)]
        outcomes = {info: result async for info, result in fetcher.outcomes(infos)}
    assert outcomes.keys() == set(infos)
    assert isinstance(outcomes.pop(infos[-1]), ObjectNotFound)
    assert all(isinstance(result, Fetched) for result in outcomes.values())


async def test_slow_consumer_holds_the_requests_up():
    store = store_of(100)
    async with fetching(store, concurrency=5) as fetcher:
        stream = fetcher.fetch(infos_of(store))
        for taken in range(1, 4):
            await anext(stream)
            await settle()
            assert store.gets.total() < taken + 2 * 5
        await stream.aclose()


async def test_consumer_that_leaves_early_leaves_nothing_behind(caplog):
    store = store_of(30)
    gate = gated(store, *(f"k{number}" for number in range(1, 30)))
    async with fetching(store, concurrency=5) as fetcher:
        async for fetched in fetcher.fetch(infos_of(store)):
            assert fetched.info.key == "k0"
            break
        gate.set()
    assert caplog.records == []
    assert store.in_flight == 0


# versions and the cache


async def test_cached_object_costs_no_request(cache):
    store = store_of(5)
    async with fetching(store, cache) as fetcher:
        assert len([fetched async for fetched in fetcher.fetch(infos_of(store))]) == 5
    async with fetching(store, cache) as fetcher:
        assert len([fetched async for fetched in fetcher.fetch(infos_of(store))]) == 5
    assert set(store.gets.values()) == {1}
    assert resident(cache, store.endpoint, infos_of(store)) == [True] * 5


async def test_unlisted_object_keeps_the_version_first_seen_until_forgotten(cache):
    store, unlisted = store_of(1), ObjectInfo("b", "k0")
    old = store.info("b", "k0")
    async with fetching(store, cache) as fetcher:
        assert lookup(cache, store.endpoint, [unlisted]) == ([unlisted], [None])
        assert (await fetcher.get(unlisted)).info == old
        await fetcher.aclose()
    store.objects["b", "k0"] = b"new"
    async with fetching(store, cache) as fetcher:
        assert (await fetcher.get(unlisted)).info == old
        assert lookup(cache, store.endpoint, [unlisted])[0] == [unlisted._replace(etag=old.etag)]
        assert (await fetcher.get(store.info("b", "k0"))).body == b"new"
    assert store.gets == {"k0": 2}


async def test_same_key_of_another_store_is_another_object(cache):
    one, other = FakeStore({("b", "k"): b"one"}, "fake://one"), FakeStore({("b", "k"): b"two"}, "fake://other")
    for store, body in ((one, b"one"), (other, b"two")):
        async with fetching(store, cache) as fetcher:
            assert (await fetcher.get(ObjectInfo("b", "k"))).body == body


async def test_objects_that_arrive_together_are_written_together(tmp_path):
    store, cache = store_of(60), SlowCache(tmp_path)
    async with fetching(store, cache, concurrency=60) as fetcher:
        flights = [fetcher.start(info) for info in infos_of(store)]
        await asyncio.wait([flight.arrived for flight in flights])
        cache.gate.set()
        await asyncio.wait([flight.settled for flight in flights])
    assert sum(cache.batches) == 60
    assert len(cache.batches) <= 3


async def test_full_cache_takes_nothing_and_training_goes_on(tmp_path):
    store, counters = store_of(5), Counters(tmp_path / "counters")
    cache = Cache(tmp_path, limit=1)
    async with fetching(store, cache, counters=counters) as fetcher:
        assert len([fetched async for fetched in fetcher.fetch(infos_of(store))]) == 5
    totals = counters.total()
    assert (totals["gets"], totals["bytes"], totals["uncached"], totals["failures"]) == (5, 50, 5, 0)


async def test_failures_are_counted(tmp_path):
    counters = Counters(tmp_path / "counters")
    async with fetching(store_of(1), counters=counters) as fetcher:
        with pytest.raises(ObjectNotFound):
            await fetcher.get(ObjectInfo("b", "absent"))
    assert counters.total()["failures"] == 1


class BrokenCache(Cache):
    def put_each(self, entries, tag=""):
        raise RuntimeError("a fault that nobody thought of")


async def test_whatever_becomes_of_the_cache_those_who_wait_have_their_objects(tmp_path, caplog):
    store = store_of(600)
    async with asyncio.timeout(3), fetching(store, BrokenCache(tmp_path), concurrency=600) as fetcher:
        assert len([fetched async for fetched in fetcher.fetch(infos_of(store))]) == 600
    assert store.closed


async def test_etag_that_is_no_text_does_not_stop_the_download(cache):
    store = Lying({("b", "k"): b"body"})
    store.answers = [(ObjectInfo("b", "k", 4, "caf\udce9"), b"body")]
    async with asyncio.timeout(3), fetching(store, cache) as fetcher:
        assert [fetched.body async for fetched in fetcher.fetch([ObjectInfo("b", "k")])] == [b"body"]
    assert store.closed


# the end


async def test_closing_wakes_everybody_with_dataset_closed(cache):
    store = store_of(20)
    gated(store)
    async with fetching(store, cache, concurrency=2) as fetcher:
        waiters = [asyncio.create_task(fetcher.get(info)) for info in infos_of(store)]
        outcomes = asyncio.create_task(anext(fetcher.outcomes(infos_of(store))))
        await store.reached(2)
        await fetcher.aclose()
        errors = await asyncio.gather(*waiters, return_exceptions=True)
        assert {type(error) for error in errors} == {DatasetClosed}
        assert isinstance((await outcomes)[1], DatasetClosed)
        with pytest.raises(DatasetClosed):
            await fetcher.get(store.info("b", "k0"))
    assert (store.in_flight, store.closed) == (0, True)


async def test_closing_waits_for_what_is_being_written(tmp_path):
    store, cache = store_of(1), SlowCache(tmp_path)
    async with fetching(store, cache) as fetcher:
        await fetcher.get(store.info("b", "k0"))
        assert cache.writing.wait(10)
        closing = asyncio.create_task(fetcher.aclose())
        await settle()
        assert not closing.done()
        cache.gate.set()
        await closing
    assert resident(cache, store.endpoint, infos_of(store)) == [True]


@pytest.mark.parametrize("amid", ["the writer", "the store"])
async def test_closing_that_is_cancelled_gives_everything_back_all_the_same(tmp_path, monkeypatch, amid):
    begun, closed, gate, put = asyncio.Event(), [], threading.Event(), Cache.put_each

    class Reluctant(FakeStore):
        async def aclose(self):
            closed.append("store")
            if amid == "the store":
                begun.set()
                await asyncio.Event().wait()

    def put_slowly(self, *arguments):
        gate.wait(10)
        return put(self, *arguments)

    close = Cache.close
    monkeypatch.setattr(Cache, "close", lambda self: closed.append("cache"))
    fetcher = Fetcher.open(store=Reluctant({("b", "k"): b"x"}), cache_dir=tmp_path)
    if amid == "the writer":
        monkeypatch.setattr(Cache, "put_each", put_slowly)
        begun.set()
    await fetcher.get(ObjectInfo("b", "k"))
    closing = asyncio.create_task(fetcher.aclose())
    await begun.wait()
    await settle()
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    gate.set()
    assert closed == ["store", "cache"]
    close(fetcher._cache)


async def test_store_without_aclose_is_fine():
    class Bare(FakeStore):
        aclose = None

    async with fetching(Bare({("b", "k"): b"x"})) as fetcher:
        assert (await fetcher.get(ObjectInfo("b", "k"))).body == b"x"


async def test_looking_for_what_is_cached_holds_nobody_up(tmp_path, monkeypatch):
    looking, go_on, resident = threading.Event(), threading.Event(), warm.resident

    def slow(*arguments):
        looking.set()
        assert go_on.wait(20)
        return resident(*arguments)

    monkeypatch.setattr(warm, "resident", slow)
    store = store_of(300)
    infos = infos_of(store)
    async with Fetcher.open(store=store, cache_dir=tmp_path) as fetcher:
        warming = asyncio.create_task(fetcher.warm(infos))
        await asyncio.to_thread(looking.wait, 20)
        async with asyncio.timeout(10):
            assert (await fetcher.get(infos[7])).body == b"7" * 10
        go_on.set()
        report = await warming
    assert (report.objects, report.resident + report.fetched) == (300, 300)
