"""The limiter against simulated networks: it is told none of what they are, and no clock but theirs runs."""

import asyncio
import math
import resource
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Network, Second, Simulation, goodput

from asyncds import Fetcher, ObjectInfo
from asyncds.budget import Slots
from asyncds.limiter import Limiter, most
from asyncds.testing import Fault, LogNormal

FIXED = (4, 8, 16, 32, 64, 128, 256)
NETWORKS = {
    "0 ms": Network(latency=0.0002),
    "1 ms": Network(latency=0.001),
    "10 ms": Network(latency=0.01),
    "50 ms": Network(latency=0.05),
    "150 ms": Network(latency=0.15),
    "1 ms, p99 5 ms": Network(latency=LogNormal(0.001, 0.005)),
    "10 ms, p99 50 ms": Network(latency=LogNormal(0.01, 0.05)),
    "50 ms, p99 250 ms": Network(latency=LogNormal(0.05, 0.25)),
    "503 above 2,000 per second": Network(rate=2000),
    "503 above 500 per second, 50 ms": Network(rate=500, latency=0.05),
    "a queue above 2,000 per second": Network(rate=2000, queues=True),
    "100 MB/s": Network(bandwidth=100e6, cpu=50e-6, latency=LogNormal(0.02, 0.04)),
    "10 MB/s": Network(bandwidth=10e6),
    "16 at once": Network(servers=16, service=0.01, latency=LogNormal(0.01, 0.05)),
    "a slow client": Network(cpu=0.002),
    "1 of 20 fails": Network(fails=0.05, latency=LogNormal(0.01, 0.02)),
}


@cache
def best_fixed(network: Network) -> float:
    return max(goodput(Simulation(network, limit).run(3), since=0.5) for limit in FIXED)


def auto(network: Network, seconds: float, **options) -> list[Second]:
    return Simulation(network, Limiter(), **options).run(seconds)


def mean_limit(ticks: list[Second], since: float) -> float:
    limits = [tick.limit for tick in ticks if tick.time > since]
    return sum(limits) / len(limits)


# goodput


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", NETWORKS)
def test_nine_tenths_of_the_best_fixed_value_are_reached(name, seed):
    ticks = auto(NETWORKS[name], 6, seed=seed)
    assert goodput(ticks) >= 0.9 * best_fixed(NETWORKS[name])  # the search for it included


def test_limit_holds_at_the_knee_and_not_far_above():
    ticks = auto(Network(rate=2000, queues=True), 10)
    assert 20 <= mean_limit(ticks, 3) <= 60  # 2,000 per second for 10 ms, one after another


def test_limit_holds_where_the_thread_of_the_client_is_saturated():
    ticks = auto(Network(cpu=0.001), 10)
    assert 10 <= mean_limit(ticks, 3) <= 40


def test_few_failures_that_have_nothing_to_do_with_the_limit_do_not_lower_it():
    network = Network(latency=0.05, fails=0.1)
    assert mean_limit(auto(network, 10), 3) >= 200


@pytest.mark.parametrize(
    "sizes",
    [
        lambda generator: int(generator.lognormvariate(math.log(30_000), 1.5)),
        lambda generator: generator.choice([500] * 50 + [4_000_000]),
    ],
    ids=["log-normal", "dwarfs and giants"],
)
def test_objects_of_mixed_sizes_do_not_mislead_it(sizes):
    network = Network(latency=LogNormal(0.02, 0.06), bandwidth=200e6)
    best = max(goodput(Simulation(network, limit, sizes=sizes).run(6), since=1) for limit in FIXED)
    ticks = auto(network, 8, sizes=sizes)
    assert goodput(ticks, since=1) >= 0.85 * best


def test_objects_that_grow_all_the_time_do_not_mislead_it():
    grown = iter(range(1000, 10**9, 20))
    ticks = auto(Network(bandwidth=100e6, latency=0.02), 10, sizes=lambda _: next(grown))
    last = [tick for tick in ticks if tick.time > 8]
    size = next(grown)
    assert goodput(last) * size >= 0.85 * 100e6


# changes under way


def test_limit_follows_a_round_trip_that_becomes_ten_times_as_long_and_short_again():
    simulation = Simulation(Network(latency=0.01), Limiter())
    simulation.run(5)
    simulation.network = Network(latency=0.1)
    slow = simulation.run(8)
    simulation.network = Network(latency=0.01)
    fast = simulation.run(8)
    assert goodput(slow, since=8) >= 0.9 * best_fixed(Network(latency=0.1))
    assert goodput(fast, since=14) >= 0.9 * best_fixed(Network(latency=0.01))
    assert mean_limit(fast, 18) < 300 < mean_limit(slow, 10)


def test_limit_follows_a_bandwidth_that_is_halved():
    simulation = Simulation(Network(latency=0.05, bandwidth=20e6), Limiter())
    before = simulation.run(6)
    simulation.network = Network(latency=0.05, bandwidth=10e6)
    after = simulation.run(8)
    assert goodput(after, since=7) >= 0.95 * 1000
    assert mean_limit(after, 11) < 0.75 * mean_limit(before, 4)


# failures


@pytest.mark.parametrize("latency", [0.001, 0.01, 0.05, 0.15])
def test_burst_of_64_refusals_is_over_within_two_seconds(latency):
    simulation = Simulation(Network(latency=latency), Limiter())
    usual = goodput(simulation.run(6), since=4)
    simulation.refuses = 64
    after = simulation.run(3)
    assert sum(tick.failures for tick in after) == 64
    assert goodput(after, since=7.5) >= 0.9 * usual
    assert goodput(after, since=8) >= 0.9 * usual


def test_burst_cuts_the_limit_once():
    limiter = Limiter(start=256)
    for _ in range(64):
        limiter.told(0.001, 3, 30_000, 1, bound=True)
    assert limiter.limit == round(256 * (1 - 0.25 / 2))


def test_storm_of_thirty_seconds_is_survived():
    simulation = Simulation(Network(latency=0.02), Limiter())
    usual = goodput(simulation.run(5), since=3)
    simulation.refuses = 10**9
    storm = simulation.run(30)
    simulation.refuses = 0
    after = simulation.run(4)
    assert max(tick.limit for tick in storm[-50:]) <= 50
    assert goodput(after, since=37) >= 0.9 * usual


# demand


def test_small_demand_is_no_evidence():
    ticks = auto(Network(latency=0.05), 20, demand=lambda time: 100 * time)
    assert {tick.limit for tick in ticks} == {128}


def test_batches_with_pauses_between_them_raise_a_limit_that_holds_them_up():
    ticks = auto(Network(latency=0.05), 30, demand=lambda time: 500 * (1 + time // 1))
    assert ticks[-1].limit > 128  # 500 at once, each second


def test_limit_that_holds_nobody_up_stays_after_a_busy_time():
    simulation = Simulation(Network(latency=0.05), Limiter(), demand=lambda time: 1e9 if time < 4 else 0)
    busy = simulation.run(3)[-1].limit
    assert busy > 128
    assert simulation.run(1)
    limits = {tick.limit for tick in simulation.run(20)}
    assert len(limits) == 1
    assert min(limits) > 128


# always

reports = st.lists(
    st.tuples(st.floats(1e-6, 1.0), st.integers(0, 2000), st.integers(0, 10**9), st.integers(0, 2000), st.booleans()),
    max_size=200,
)


@given(reports, st.integers(1, 64), st.integers(1, 4096), st.integers(1, 4096))
@settings(deadline=None, derandomize=True)
def test_limit_is_always_within_its_bounds(told, least, start, most):
    limiter = Limiter(least=least, start=start, most=most)
    for seconds, objects, size, failures, bound in told:
        limit = limiter.told(seconds, objects, size, failures, bound=bound)
        assert min(least, most) <= limit <= most
        assert limit == limiter.limit


@given(st.integers(1, 1024), st.integers(0, 1000), st.integers(33, 2000))
@settings(deadline=None, derandomize=True)
def test_one_generation_of_failures_cuts_once_and_at_most_by_half(start, good, bad):
    limiter = Limiter(start=start, least=1)
    before = limiter.limit
    limiter.told(0.02, good, 0, bad, bound=False)
    assert before / 2 - 1 <= limiter.limit <= before


@given(reports)
@settings(deadline=None, derandomize=True, max_examples=20)
def test_limit_is_never_stuck_at_its_minimum(told):
    limiter = Limiter()
    for seconds, objects, size, failures, bound in told:
        limiter.told(seconds, objects, size, failures, bound=bound)
    simulation = Simulation(Network(latency=0.05), limiter)
    simulation.run(4)
    assert goodput(simulation.run(2)) >= 0.8 * best_fixed(Network(latency=0.05))


@given(st.floats(0.001, 0.1), st.floats(1e-4, 2e-3), st.integers(0, 100))
@settings(deadline=None, derandomize=True, max_examples=10)
def test_goodput_is_that_of_the_bound_whatever_the_round_trip_and_the_cost(latency, cpu, seed):
    network = Network(latency=LogNormal(latency, 2 * latency), cpu=cpu)
    bound = min(1 / cpu, 256 / latency / 1.1)
    assert goodput(auto(network, 6, seed=seed), since=3) >= 0.85 * bound


def test_simulation_is_the_same_each_time():
    network = Network(latency=LogNormal(0.01, 0.05), fails=0.01)
    assert auto(network, 1, seed=3) == auto(network, 1, seed=3)
    assert auto(network, 1, seed=3) != auto(network, 1, seed=4)


# in use


class Scripted(Limiter):
    """Says one limit after another, and tells when it has said the last."""

    def __init__(self, *limits: int) -> None:
        super().__init__(start=limits[0], least=1)
        self.limits = list(limits[1:])
        self.said = asyncio.Event()

    def told(self, seconds, objects, size, failures, *, bound):
        if self.limits:
            self._limit = float(self.limits.pop(0))
        else:
            self.said.set()
        return self.limit


async def test_more_slots_let_those_go_who_wait_for_one():
    slots = Slots(Scripted(1, 3))
    async with asyncio.timeout(10):
        await slots.take(1)
        slots.came(100)
        await slots.take(1)
        await slots.take(1)
    assert slots.size == 3
    assert slots.spent


async def test_fewer_slots_let_land_what_is_in_flight():
    limiter = Scripted(3, 1)
    slots = Slots(limiter)
    async with asyncio.timeout(10):
        for _ in range(3):
            await slots.take(1)
        slots.failed()
        await limiter.said.wait()
    for _ in range(2):
        slots.give_back(1)
        assert slots.spent
    slots.give_back(1)
    assert slots.take_now(1)
    assert not slots.take_now(1)


async def test_a_number_stays_as_it_is():
    slots = Slots.of(64, 3)
    for _ in range(100):
        slots.failed()
    assert (slots.size, slots.most) == (21, 21)
    assert Slots.of(2, 3).size == 1


@pytest.mark.parametrize(("processes", "start"), [(1, 128), (8, 128), (64, 16), (4096, 1)])
def test_processes_share_the_highest_limit(monkeypatch, processes, start):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4096, 4096))
    slots = Slots.of("auto", processes)
    assert slots.size == start
    assert slots.most == max(1, 1024 // processes)


def test_highest_limit_leaves_files_for_others(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    assert most() == 128
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert most() == 1024


async def test_limiter_is_told_of_each_object_and_each_failed_attempt_once(s3, monkeypatch):
    told, all_told = [0, 0, 0], asyncio.Event()

    def record(limiter, seconds, *counts, bound):
        assert seconds >= 0
        told[:] = [total + count for total, count in zip(told, counts, strict=True)]
        if told[0] == 301:
            all_told.set()
        return limiter.limit

    monkeypatch.setattr(Limiter, "told", record)
    infos = [ObjectInfo("mnist", f"{number:03}", 100) for number in range(301)]
    s3.put_many("mnist", {info.key: bytes(100) for info in infos})
    async with asyncio.timeout(20), Fetcher.open(concurrency="auto") as fetcher:
        await fetcher.get(infos[0])
        s3.script("mnist", None, [Fault.status(503)] * 10 + [Fault.reset()] * 10, shared=True)
        assert len([found async for found in fetcher.fetch(infos[1:])]) == 300
        await all_told.wait()
        assert "at most 128" in repr(fetcher)
    assert told == [301, 30100, 20]


def fetch_with_few_files(count):
    """As on macOS, where a process may open 256 files unless somebody says otherwise."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    async def fetch():
        infos = [ObjectInfo("mnist", f"{number:04}", 100) for number in range(count)]
        async with Fetcher.open(concurrency="auto") as fetcher:
            assert len([found async for found in fetcher.fetch(infos)]) == count
            assert fetcher._slots.most == 128

    asyncio.run(fetch())


def test_few_files_are_enough_where_more_requests_would_pay(s3_process, child):
    s3_process.put_many("mnist", {f"{number:04}": bytes(100) for number in range(4000)})
    s3_process.latency = 0.05
    child("spawn", fetch_with_few_files, 4000)
    assert 64 < s3_process.stats.max_in_flight <= 128
    assert s3_process.stats.requests["GET"] == 4000
