"""What takes much longer than others is asked for twice: which requests those are, and what becomes of both."""

import asyncio
import contextlib
from operator import methodcaller

import pytest

from asyncds import CachedS3MapDataset, Fetcher, ObjectInfo
from asyncds import hedging as module
from asyncds.errors import DeadlineExceeded
from asyncds.hedging import Hedging, either
from asyncds.testing import Fault

OBJECTS = 200
PATIENCE = {"timeout": 600.0, "deadline": 600.0}  # so that nothing but a second request helps within a test's time


class Loop:
    """A loop whose time goes on when a test says so."""

    def __init__(self, monkeypatch):
        self.now, self.due = 1000.0, []
        monkeypatch.setattr(module.asyncio, "get_running_loop", lambda: self)

    def time(self):
        return self.now

    def call_later(self, seconds, function):
        self.due.append((self.now + seconds, function))
        return function

    def pass_by(self, seconds, *, standing_still=False):
        """Let time pass: with all timers on time, or all at its end."""
        end = self.now + seconds
        if standing_still:
            self.now = end
        while self.due and self.due[0][0] <= end:
            when, function = self.due.pop(0)
            self.now = max(self.now, when)
            function()
        self.now = end


class Request:
    def __init__(self):
        self.told = 0

    def late(self):
        self.told += 1


@pytest.fixture
def loop(monkeypatch):
    return Loop(monkeypatch)


def experienced(seconds=0.01, *, of=500):
    hedging = Hedging()
    for _ in range(of):
        hedging.came(seconds, 1000)
    return hedging


def test_request_is_late_after_a_quarter_of_a_second_where_others_are_fast(loop):
    hedging, request = experienced(0.01), Request()
    hedging.begin(request, 1000)
    loop.pass_by(0.25)
    assert not request.told
    loop.pass_by(0.15)
    assert request.told == 1
    loop.pass_by(10)
    assert request.told == 1


def test_request_is_late_after_four_times_what_nearly_all_others_take(loop):
    hedging, request = experienced(0.5), Request()
    hedging.begin(request, 1000)
    loop.pass_by(1.9)
    assert not request.told
    loop.pass_by(0.6)  # percentiles are known to a fifth
    assert request.told == 1


def test_one_slow_answer_in_a_hundred_does_not_make_all_others_wait(loop):
    hedging, request = Hedging(), Request()
    for number in range(1000):
        hedging.came(5.0 if number % 100 == 0 else 0.01, 1000)
    hedging.begin(request, 1000)
    loop.pass_by(0.4)
    assert request.told == 1


def test_request_that_is_over_is_never_late(loop):
    hedging, request = experienced(), Request()
    hedging.begin(request, 1000)
    loop.pass_by(0.2)
    hedging.end(request)
    loop.pass_by(10)
    assert not request.told
    assert not loop.due  # an idle process is left alone


def test_nothing_is_late_before_a_hundred_have_come_nor_where_it_is_switched_off(loop):
    off = Hedging(enabled=False)
    for _ in range(1000):
        off.came(0.01, 1000)
    for hedging in (experienced(of=99), off):
        request = Request()
        hedging.begin(request, 1000)
        loop.pass_by(10)
        assert not request.told


def test_where_everything_is_late_one_in_fifty_is_asked_for_twice(loop):
    hedging = experienced(of=10_000)
    requests = [Request() for _ in range(1000)]
    for request in requests:
        hedging.begin(request, 1000)
    loop.pass_by(10)
    assert sum(request.told for request in requests) == 8  # what was saved
    for request in requests[500:]:
        hedging.came(10, 1000)
        hedging.end(request)
    loop.pass_by(40)
    assert 8 < sum(request.told for request in requests) <= 8 + 500 * 0.02


def test_time_in_which_the_loop_stood_still_makes_nothing_late(loop):
    hedging, request = experienced(), Request()
    hedging.begin(request, 1000)
    loop.pass_by(30, standing_still=True)
    assert not request.told


def test_object_that_is_much_larger_than_the_others_takes_its_time(loop):
    hedging, large, usual = experienced(), Request(), Request()
    hedging.begin(large, 1_000_000)
    hedging.begin(usual, 60_000)
    loop.pass_by(10)
    assert (large.told, usual.told) == (0, 1)


def test_network_that_becomes_slower_is_got_used_to(loop):
    hedging, request = experienced(0.01, of=4000), Request()
    for _ in range(1000):
        hedging.came(1.0, 1000)
    hedging.begin(request, 1000)
    loop.pass_by(3.5)
    assert not request.told


# two requests for one object


async def ends(seconds=0.0, result=None, error=None):
    await asyncio.sleep(seconds)
    if error is not None:
        raise error
    return result


async def test_first_success_counts_and_the_other_is_over():
    fast, slow = asyncio.create_task(ends(0, "fast")), asyncio.create_task(ends(60, "slow"))
    assert await either(slow, fast) == "fast"
    assert slow.cancelled()


async def test_failure_of_one_leaves_it_to_the_other():
    bad, good = asyncio.create_task(ends(error=ValueError("bad"))), asyncio.create_task(ends(0.01, "good"))
    assert await either(bad, good) == "good"


async def test_success_counts_where_both_end_at_once():
    for turn in range(50):
        good, bad = ends(0, "good"), ends(0, error=ValueError("bad"))
        first, second = map(asyncio.create_task, (good, bad) if turn % 2 else (bad, good))
        await asyncio.sleep(0.001)
        assert await either(first, second) == "good"


async def test_failure_of_both_is_told():
    with pytest.raises(KeyError, match="second"):
        await either(
            asyncio.create_task(ends(error=ValueError("first"))),
            asyncio.create_task(ends(0.01, error=KeyError("second"))),
        )


async def test_whoever_is_cancelled_cancels_both():
    tasks = [asyncio.create_task(ends(60)), asyncio.create_task(ends(60))]
    waiting = asyncio.create_task(either(*tasks))
    await asyncio.sleep(0)
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    assert all(task.cancelled() for task in tasks)


# against a server


@pytest.fixture
def stocked(s3):
    s3.put_many("mnist", {f"train/{n:03}": n.to_bytes(2, "big") * 400 for n in range(OBJECTS)})
    return s3


def given_back(fetcher):
    return fetcher._slots._used, fetcher.downloader.memory._used, fetcher._unarrived, fetcher._expected


@contextlib.asynccontextmanager
async def practised(server, **options):
    """A fetcher that has seen what a request takes here, and the infos of all objects."""
    dataset = CachedS3MapDataset.from_prefix("s3://mnist/train/")
    manifest = dataset.manifest
    dataset.close()
    async with Fetcher.open(**PATIENCE | {"concurrency": 8} | options) as fetcher:
        async for _ in fetcher.fetch(list(manifest)[: OBJECTS // 2]):
            pass
        server.reset_counts()
        yield fetcher, list(manifest)[OBJECTS // 2 :]
        async with asyncio.timeout(10):
            while any(given_back(fetcher)):  # also of what was cancelled
                await asyncio.sleep(0)


@pytest.mark.parametrize("lane", ["auto", "full"])
@pytest.mark.parametrize("concurrency", [3, 64])
async def test_answer_that_never_comes_is_made_up_for_by_a_second_request(stocked, lane, concurrency):
    async with practised(stocked, lane=lane, concurrency=concurrency) as (fetcher, infos):
        stocked.script("mnist", "train/150", [Fault.stall()])
        stocked.script("mnist", "train/160", [Fault.stall(after=100)])
        bodies = {info.key: body async for info, body in fetcher.fetch(infos)}
        assert bodies == {info.key: int(info.key[-3:]).to_bytes(2, "big") * 400 for info in infos}
        counts = stocked.stats.gets
        assert {key: n for (_, key), n in counts.items() if n > 1} == {"train/150": 2, "train/160": 2}


@pytest.mark.parametrize("lane", ["auto", "full"])
async def test_second_request_is_counted_apart_and_is_no_retry(stocked, lane):
    dataset = CachedS3MapDataset.from_prefix("s3://mnist/train/", lane=lane, **PATIENCE)
    dataset.__getitems__(range(100))
    stocked.script("mnist", "train/150", [Fault.stall()])
    samples = dataset.__getitems__(range(100, OBJECTS))
    assert [sample.read() for sample in samples[50:51]] == [(150).to_bytes(2, "big") * 400]
    stats = dataset.stats()
    assert (stats["hedges"], stats["retries"], stats["gets"]) == (1, 0, OBJECTS)
    assert stocked.stats.requests["GET"] == OBJECTS + 1
    dataset.close()


@pytest.mark.parametrize("lane", ["auto", "full"])
async def test_first_answer_that_comes_after_all_counts(stocked, lane, monkeypatch):
    monkeypatch.setattr(module, "_FACTOR", 0.0)  # a quarter of a second is late, also on a machine that is busy
    async with practised(stocked, lane=lane) as (fetcher, infos):
        stocked.script("mnist", "train/150", [Fault.delay(1.0), Fault.stall()])
        bodies = {info.key: body async for info, body in fetcher.fetch(infos)}
        assert len(bodies) == len(infos)
        assert stocked.stats.gets["mnist", "train/150"] == 2


@pytest.mark.parametrize("lane", ["auto", "full"])
async def test_second_request_that_fails_leaves_the_first_alone(stocked, lane, monkeypatch):
    monkeypatch.setattr(module, "_FACTOR", 0.0)  # a quarter of a second is late, also on a machine that is busy
    async with practised(stocked, lane=lane) as (fetcher, infos):
        stocked.script("mnist", "train/150", [Fault.delay(1.0), Fault.status(503)])
        bodies = {info.key: body async for info, body in fetcher.fetch(infos)}
        assert len(bodies) == len(infos)
        assert stocked.stats.gets["mnist", "train/150"] == 2


@pytest.mark.parametrize("lane", ["auto", "full"])
async def test_where_hedging_is_off_there_is_one_request(stocked, lane):
    async with practised(stocked, lane=lane, hedging=False) as (fetcher, infos):
        stocked.script("mnist", "train/150", [Fault.delay(1.0)])
        assert len([body async for _, body in fetcher.fetch(infos)]) == len(infos)
        assert stocked.stats.gets["mnist", "train/150"] == 1


async def test_another_version_that_the_second_request_brings_is_not_taken(stocked, monkeypatch):
    monkeypatch.setattr(module, "_FACTOR", 0.0)
    async with practised(stocked) as (fetcher, infos):
        other = Fault.body(bytes(800), own_etag=True)
        stocked.script("mnist", "train/150", [Fault.delay(1.0), other])
        bodies = {info.key: body async for info, body in fetcher.fetch(infos)}
        assert bodies["train/150"] == (150).to_bytes(2, "big") * 400
        assert stocked.stats.gets["mnist", "train/150"] == 2


@pytest.mark.parametrize("lane", ["auto", "full"])
@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("slots", [1, 3])
async def test_stalls_that_take_all_slots_end_with_their_attempts(stocked, lane, sized, slots):
    """Nobody waits for a slot, or for room, that is held for the same object."""
    async with practised(stocked, lane=lane, concurrency=slots, timeout=1.0, deadline=60.0) as (fetcher, infos):
        chosen = infos[:slots]
        for info in chosen:
            stocked.script("mnist", info.key, [Fault.stall()])
        asked = [info if sized else ObjectInfo(info.bucket, info.key) for info in infos]
        async with asyncio.timeout(30):
            assert len([body async for _, body in fetcher.fetch(asked)]) == len(infos)
        counts = stocked.stats.gets
        assert all(counts["mnist", info.key] in (2, 3) for info in chosen)


@pytest.mark.parametrize("lane", ["auto", "full"])
async def test_two_answers_that_drip_end_with_the_deadline_of_the_object(stocked, lane, monkeypatch):
    monkeypatch.setattr(module, "_FACTOR", 0.0)
    stocked.put("mnist", "train/150", bytes(40_000))
    async with practised(stocked, lane=lane, timeout=1.0, deadline=3.0) as (fetcher, infos):
        # Fast enough for an attempt to go on, and a hundred seconds in all.
        stocked.script("mnist", "train/150", [Fault.dripping(100, 0.25, after=100)], forever=True)
        async with asyncio.timeout(20):
            with pytest.raises(DeadlineExceeded, match="s3://mnist/train/150"):
                await fetcher.get(infos[50])
        assert stocked.stats.gets["mnist", "train/150"] == 2


@pytest.mark.parametrize("lane", ["auto", "full"])
async def test_one_answer_that_drips_ends_with_the_deadline_of_the_object(stocked, lane):
    stocked.put("mnist", "train/150", bytes(40_000))
    async with practised(stocked, lane=lane, timeout=1.0, deadline=2.0, hedging=False) as (fetcher, infos):
        stocked.script("mnist", "train/150", [Fault.dripping(100, 0.25, after=100)], forever=True)
        async with asyncio.timeout(20):
            with pytest.raises(DeadlineExceeded, match="s3://mnist/train/150"):
                await fetcher.get(infos[50])
        assert stocked.stats.gets["mnist", "train/150"] == 1


def test_one_in_a_hundred_that_never_answers_holds_up_no_batch_and_costs_one_request_each(s3_process):
    """What is late is asked for once more, and nothing else is: not where all is well either."""
    objects = 600
    bodies = {f"train/{number:03}": number.to_bytes(2, "big") * 400 for number in range(objects)}
    s3_process.put_many("mnist", bodies)
    s3_process.latency = 0.1  # four times that is late, and a machine that is busy is not
    options = {"transform": methodcaller("read"), "concurrency": 64, **PATIENCE}
    with CachedS3MapDataset.from_prefix("s3://mnist/train/", **options) as dataset:
        rows = iter(dataset.loader(20, collate_fn=list))
        found = [sample for _ in range(10) for sample in next(rows)]
        usual = dataset.stats()["hedges"]
        asked = s3_process.stats.requests["GET"]
        late = [key for key in [*bodies][450::25] if not s3_process.stats.gets["mnist", key]]
        for key in late:
            s3_process.script("mnist", key, [Fault.stall()])
        found += [sample for batch in rows for sample in batch]
        assert found == [*bodies.values()]
        assert (usual, dataset.stats()["hedges"], dataset.stats()["retries"]) == (0, len(late), 0)
    assert len(late) >= 4, f"{asked} had been asked for"
    assert s3_process.stats.requests["GET"] == objects + len(late) <= 1.02 * objects


async def test_late_object_that_comes_first_is_not_kept_waiting_by_a_queue(stocked, monkeypatch):
    monkeypatch.setattr(module, "_FACTOR", 0.0)
    async with practised(stocked, concurrency=2) as (fetcher, infos):
        stocked.latency = 0.02
        stocked.script("mnist", infos[0].key, [Fault.delay(0.6)])
        order = []
        tasks = [asyncio.create_task(fetcher.get(info)) for info in infos]
        for task, info in zip(tasks, infos, strict=True):
            task.add_done_callback(lambda _, key=info.key: order.append(key))
        await asyncio.gather(*tasks)
        assert order[-1] != infos[0].key


async def test_closing_amid_two_requests_ends_both(stocked):
    async with practised(stocked) as (fetcher, _):
        stocked.script("mnist", "train/150", [Fault.stall(), Fault.stall()])
        waiting = asyncio.create_task(fetcher.get(ObjectInfo("mnist", "train/150", 800)))
        async with asyncio.timeout(20):
            while stocked.stats.gets["mnist", "train/150"] < 2:
                await asyncio.sleep(0.01)
        await fetcher.aclose()
        with pytest.raises(Exception, match="closed"):
            await waiting
        async with asyncio.timeout(10):
            while stocked.stats.connections_open:
                await asyncio.sleep(0.01)
