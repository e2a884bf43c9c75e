"""What a bucket gives from here: steps, the knee, the limit's name; and that measuring leaves nothing behind."""

import asyncio
import os

import pytest

from asyncds.errors import AccessDenied, CacheError, DeadlineExceeded, EmptyDataset
from asyncds.recipe import StoreRecipe
from asyncds.testing import Fault
from asyncds.tune import Step, binding, knee, tune

KEYS = [f"train/{number:03}" for number in range(300)]
BODY = os.urandom(1000)


@pytest.fixture
def server(s3):
    s3.put_many("mnist", dict.fromkeys(KEYS, BODY))
    return s3


def step(concurrency, rate, *, cpu=0.1, refused=0):
    return Step(concurrency, rate, 1000 * rate, 1.0, cpu, refused)


GROWS = [step(1, 100), step(2, 200), step(4, 400), step(8, 800)]


FLAT = [*GROWS, step(16, 820), step(32, 810)]
LARGE = [one._replace(bytes=5_000_000 * one.objects) for one in FLAT]


@pytest.mark.parametrize(
    ("steps", "cold", "written", "concurrency", "limit"),
    [
        (GROWS, step(8, 790), 10_000, 8, "concurrency"),
        (FLAT, step(8, 790), 10_000, 8, "network"),
        ([*GROWS[:3], step(8, 800, cpu=0.95), step(16, 830, cpu=0.99)], step(8, 790), 10_000, 8, "cpu"),
        (FLAT, step(8, 400, cpu=0.95), 10_000, 8, "cpu"),
        (FLAT, step(8, 600), 700, 8, "cache"),
        (FLAT, step(8, 600), 10_000, 8, "cache"),
        (LARGE, step(8, 790), 10_000, 8, "memory"),
        ([*GROWS, step(16, 700, refused=100)], step(8, 790), 10_000, 8, "store"),
        ([step(1, 0)], step(1, 0), 10_000, 1, "concurrency"),
    ],
)
def test_knee_and_limit(steps, cold, written, concurrency, limit):
    assert knee(steps).concurrency == concurrency
    assert binding(steps, cold, written) == limit


def test_a_step_says_how_long_one_takes_by_littles_law():
    assert step(8, 800).time_of_one == pytest.approx(0.01)


async def test_more_in_flight_is_tried_while_it_pays(server, tmp_path):
    server.latency = 0.02
    told = []
    recipe = StoreRecipe.of(cache_dir=tmp_path)
    found = await tune(recipe, "mnist", "train/", highest=8, seconds=20, tell=told.append)
    assert [step.concurrency for step in told] == [1, 2, 4, 8]
    assert (found.objects, found.complete, found.mean_size, found.cut) == (300, True, 1000, False)
    assert found.best.concurrency == 8
    assert found.steps[0].time_of_one >= 0.02
    assert server.stats.max_in_flight == 8
    assert set(server.stats.requests) == {"GET", "LIST"}, "nothing is written to the bucket"
    assert sum(step.objects for step in told) <= server.stats.requests["GET"]
    assert list(tmp_path.iterdir()) == [], "the cache that it measured is gone"


async def test_no_more_objects_are_asked_for_than_may_be(server, tmp_path):
    found = await tune(StoreRecipe.of(cache_dir=tmp_path), "mnist", "", objects=100, seconds=20)
    assert found.cut
    assert server.stats.requests["GET"] <= 100


async def test_no_more_time_is_taken_than_there_is(server, tmp_path):
    found = await tune(StoreRecipe.of(cache_dir=tmp_path), "mnist", "", seconds=0.01)
    assert [step.concurrency for step in found.steps] == [1]
    assert found.cut
    assert found.rate > 0


async def test_epoch_is_expected_to_take_as_long_as_fetching_and_writing_at_once(server, tmp_path, monkeypatch):
    monkeypatch.setattr("asyncds.tune._COLD_S", 30)  # time for all, however busy the machine is
    server.latency = 0.02
    found = await tune(StoreRecipe.of(cache_dir=tmp_path), "mnist", "train/", highest=4, seconds=50)
    assert found.cold.concurrency == found.best.concurrency
    assert found.cold.objects == 300
    assert found.cold.bytes == 300 * len(BODY)
    assert found.epoch_s == pytest.approx(300 / found.cold.rate)
    assert found.cold.rate <= 4 / 0.02


async def test_object_that_cannot_be_had_is_left_out(server, tmp_path):
    server.script("mnist", KEYS[7], [Fault.status(403, "AccessDenied")], forever=True)
    found = await tune(StoreRecipe.of(cache_dir=tmp_path), "mnist", "", highest=4, seconds=20)
    assert found.cold.objects == 299


async def test_listing_that_takes_long_is_cut_short(server, tmp_path):
    server.put_many("mnist", {f"many/{number:05}": b"x" for number in range(3000)})
    server.script("mnist", None, [Fault.delay(0.5)], operation="LIST", forever=True)
    found = await tune(StoreRecipe.of(cache_dir=tmp_path), "mnist", "many/", highest=2, seconds=1)
    assert (found.objects, found.complete) == (1000, False)


async def test_what_a_killed_one_left_behind_is_removed(server, tmp_path):
    old, new = tmp_path / "asyncds-tune-old", tmp_path / "asyncds-tune-new"
    for place in (old, new):
        place.mkdir()
    os.utime(old, (0, 0))
    await tune(StoreRecipe.of(cache_dir=tmp_path), "mnist", "train/00", highest=1, seconds=5)
    assert [place.name for place in tmp_path.iterdir()] == ["asyncds-tune-new"]


async def test_object_that_stalls_ends_its_step_and_no_more(server, tmp_path, monkeypatch):
    monkeypatch.setattr("asyncds.tune._GRACE_S", 0.5)
    server.script("mnist", KEYS[7], [Fault.stall(10)], forever=True)
    async with asyncio.timeout(40):
        found = await tune(StoreRecipe.of(cache_dir=tmp_path), "mnist", "", highest=4, seconds=3)
    assert found.best.rate > 0


async def test_slow_objects_are_counted_with_all_who_ask_at_work(server, tmp_path, monkeypatch):
    monkeypatch.setattr("asyncds.tune._LONGEST_S", 1.5)
    monkeypatch.setattr("asyncds.tune._COLD_S", 0.1)
    server.latency = 0.6  # longer than a step of the first
    found = await tune(StoreRecipe.of(cache_dir=tmp_path), "mnist", "", highest=2, seconds=20)
    assert [round(step.rate * 0.6 / step.concurrency, 1) for step in found.steps] == [1.0, 1.0]


async def test_nothing_is_recommended_where_nothing_came(server, tmp_path, monkeypatch):
    monkeypatch.setattr("asyncds.tune._GRACE_S", 0.5)
    server.script("mnist", None, [Fault.stall(0)], forever=True)
    with pytest.raises(DeadlineExceeded, match="no object came"):
        await tune(StoreRecipe.of(cache_dir=tmp_path), "mnist", "", seconds=1)


async def test_cache_that_cannot_be_is_named_before_anything_is_asked(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="ASYNCDS_CACHE_DIR"):
        await tune(StoreRecipe.of(cache_dir=tmp_path / "file" / "cache"), "mnist", "")
    assert server.stats.total == 0


async def test_fewer_objects_than_requests_that_might_be_in_flight(server, tmp_path):
    server.latency = 0.02
    found = await tune(StoreRecipe.of(cache_dir=tmp_path), "mnist", "train/00", highest=64, seconds=20)
    assert found.objects == 10
    assert [step.concurrency for step in found.steps] == [1, 2, 4, 5]


async def test_store_that_refuses_is_asked_no_harder(server, tmp_path):
    server.latency = 0.02
    server.script("mnist", None, [Fault()] * 400 + [Fault.status(503)] * 100, shared=True)
    found = await tune(StoreRecipe.of(cache_dir=tmp_path), "mnist", "", seconds=20)
    assert found.limit == "store"
    assert found.steps[-1].refused > 0
    assert not found.cut


async def test_errors_are_those_of_a_fetcher(server, tmp_path):
    with pytest.raises(EmptyDataset, match="nothing to measure"):
        await tune(StoreRecipe.of(cache_dir=tmp_path), "mnist", "none/")
    server.script("mnist", None, [Fault.status(403, "AccessDenied")], forever=True)
    with pytest.raises(AccessDenied):
        await tune(StoreRecipe.of(cache_dir=tmp_path), "mnist", "")
