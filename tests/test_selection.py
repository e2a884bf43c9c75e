"""What is warmed: which objects, in which order, and by which process."""

import asyncio
import re

import numpy as np
import pytest

from asyncds.cache import Cache
from asyncds.dataset import CachedS3MapDataset
from asyncds.errors import ConfigurationError, EmptyDataset
from asyncds.fetcher import Fetcher
from asyncds.manifest import ManifestBuilder, ObjectInfo
from asyncds.retry import Retry
from asyncds.selection import Selection, local_partition
from asyncds.testing import FakeStore

KEYS = ["a/0.png", "a/1.txt", "b/2.png", "b/3.png", "c\n/4.png"]
SIZES = [50, 10, 40, 20, 30]


def table(sizes=SIZES):
    builder = ManifestBuilder("b")
    for key, size in zip(KEYS, sizes, strict=True):
        builder.add(ObjectInfo("b", key, size, "e"))
    return builder.build(endpoint="x", source="s3://b/")


def rows(sizes=SIZES, **choice):
    return Selection.of(**choice).rows(table(sizes)).tolist()


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"match": "*.png"}, [0, 2, 3, 4]),
        ({"match": ["a/*", "*3.png"]}, [0, 1, 3]),
        ({"exclude": "*.png"}, [1]),
        ({"match": "*.png", "exclude": ["a/*", "c*"]}, [2, 3]),
        ({"order": "smallest"}, [1, 3, 4, 2, 0]),
        ({"limit": 2}, [0, 1]),
        ({"limit": "2"}, [0, 1]),
        ({"limit": 99}, [0, 1, 2, 3, 4]),
        ({"limit": "40%"}, [0, 1]),
        ({"limit": 0.5}, [0, 1, 2]),
        ({"limit": "1%"}, [0]),
        ({"limit": "20.1%"}, [0, 1]),
        ({"limit": "6e1 %"}, [0, 1, 2]),
        ({"limit": "100%"}, [0, 1, 2, 3, 4]),
        ({"limit": "60B", "order": "smallest"}, [1, 3, 4]),
        ({"limit": "59B", "order": "smallest"}, [1, 3]),
        ({"limit": "1GB"}, [0, 1, 2, 3, 4]),
        ({"limit": 3, "match": "*.png", "order": "smallest"}, [3, 4, 2]),
        ({"match": ["a*png", "*", "?"], "exclude": "*[!0-3].*"}, [0, 1, 2, 3]),
        ({"partition": "0/1"}, [0, 1, 2, 3, 4]),
    ],
)
def test_rows_are_those_that_were_asked_for(choice, expected):
    assert rows(**choice) == expected


def test_unknown_sizes_come_last_among_the_smallest():
    assert rows([-1, 10, -1, 5, 0], order="smallest") == [4, 3, 1, 0, 2]


def test_shuffle_is_the_same_for_the_same_seed():
    first = rows(order="shuffle", seed=3)
    assert sorted(first) == [0, 1, 2, 3, 4]
    assert rows(order="shuffle", seed=3) == first
    assert any(rows(order="shuffle", seed=seed) != first for seed in range(5))


def table_of(keys, buckets=("b",)):
    builder = ManifestBuilder()
    for number, key in enumerate(keys):
        builder.add(ObjectInfo(buckets[number % len(buckets)], key, number * 7919 % 1000, "e"))
    return builder.build(endpoint="x", source="s3://b/")


MANY = [f"train/{number:07}.png" for number in range(10_000)]


@pytest.mark.parametrize("choice", [{}, {"order": "shuffle"}, {"limit": 700, "order": "smallest"}, {"match": "*3*"}])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_parts_are_disjoint_and_complete_and_about_equal_and_each_in_order(choice, parts):
    manifest = table_of(MANY[:5000])
    whole = Selection.of(**choice).rows(manifest).tolist()
    found = [Selection.of(**choice, partition=f"{part}/{parts}").rows(manifest).tolist() for part in range(parts)]
    assert sorted(np.concatenate(found).tolist()) == sorted(whole)
    for some in found:
        members = set(some)
        assert [row for row in whole if row in members] == some
        assert 0.75 < len(some) * parts / len(whole) < 1.25


def test_parts_of_listings_that_differ_agree_about_each_key():
    listed, later = table_of(MANY[1::2]), table_of(["a", *MANY, "z"])
    brought = {listed[row].key for row in Selection.of(partition="0/2").rows(listed)}
    brought |= {later[row].key for row in Selection.of(partition="1/2").rows(later)}
    assert brought >= set(MANY[1::2])
    again = {later[row].key for row in Selection.of(partition="0/2").rows(later)}
    assert brought | again == {"a", *MANY, "z"}
    assert {listed[row].key for row in Selection.of(partition="0/2").rows(listed)} <= again


def test_parts_do_not_depend_on_which_buckets_a_table_has():
    one, two = table_of(["k", "l", "m"]), table_of(["k", "x", "l", "y", "m"], ["b", "c"])
    assert one.shares(97).tolist() == two.shares(97).tolist()[::2]


@pytest.mark.parametrize("percent", range(1, 101))
def test_share_is_exact(percent):
    hundred = table_of(MANY[:100])
    assert len(Selection.of(limit=f"{percent}%").rows(hundred)) == percent
    assert len(Selection.of(limit=percent / 100).rows(hundred)) == (percent if percent < 100 else 100)


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ({"limit": 0}, "limit=0: must be a number of objects"),
        ({"limit": "0%"}, "limit='0%'"),
        ({"limit": "101%"}, "limit='101%'"),
        ({"limit": -1}, "limit=-1"),
        ({"limit": "5 apples"}, "limit='5 apples'"),
        ({"limit": "1.5"}, "limit='1.5'"),
        ({"limit": "nan"}, "limit='nan'"),
        ({"limit": 2.5}, "limit=2.5"),
        ({"order": "largest"}, "order='largest': must be listing or smallest or shuffle"),
        ({"seed": -1}, "seed=-1"),
        ({"match": ""}, "is no pattern of keys"),
        ({"partition": "2/2"}, "partition='2/2': of 2 parts, i goes from 0 to 1"),
        ({"partition": "0/0"}, "partition='0/0'"),
        ({"partition": "-1/2"}, "partition='-1/2': must be i/n, such as 0/4, or auto"),
        ({"partition": "1"}, "partition='1': must be i/n"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_listed(choice, sentence):
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        Selection.of(**choice)


def test_patterns_that_nothing_fits():
    with pytest.raises(EmptyDataset, match="none of 5 keys fits the patterns"):
        rows(match="*.jpeg")


def test_limit_below_the_first_object():
    with pytest.raises(EmptyDataset, match="the first object alone has 50 bytes"):
        rows(limit="49B")


def test_bytes_of_objects_whose_sizes_nobody_knows():
    with pytest.raises(ConfigurationError, match="sizes are not known"):
        rows([-1] * 5, limit="1GB")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "RANK": "9", "WORLD_SIZE": "16"}, (1, 4)),
        ({"SLURM_LOCALID": "2", "SLURM_NTASKS_PER_NODE": "8", "SLURM_PROCID": "10"}, (2, 8)),
        ({"SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NTASKS_PER_NODE": "8"}, (2, 4)),
        ({"SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "1"}, (2, 4)),
        ({"SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "2"}, (2, 3)),
        ({"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1,2,1(x2)", "SLURM_NODEID": "3"}, (0, 1)),
        ({"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x16)"}, (1, 4)),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_RANK": "2"}, (0, 2)),
        ({"RANK": "1", "WORLD_SIZE": "4"}, (0, 1)),
    ],
)
def test_local_variables_of_launchers_say_which_part(variables, expected):
    assert local_partition(variables) == expected


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_NODEID": "3"},
        {"SLURM_NODEID": "one"},
        {},
    ],
)
def test_node_that_is_not_among_those_of_the_step(variables):
    variables = {"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3"} | variables
    with pytest.raises(ConfigurationError, match=r"3 nodes, and SLURM_NODEID=.* none of them: write"):
        local_partition(variables)


@pytest.mark.parametrize("tasks", ["many", "", "4(x2", "4(x)"])
def test_tasks_that_are_no_numbers(tasks):
    with pytest.raises(ConfigurationError, match="SLURM_LOCALID/SLURM_STEP_TASKS_PER_NODE='0/"):
        local_partition({"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": tasks})


@pytest.mark.parametrize("variables", [{"LOCAL_RANK": "1"}, {"LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "4"}])
def test_local_variables_that_contradict_each_other(variables):
    with pytest.raises(ConfigurationError, match="LOCAL_RANK"):
        local_partition(variables)


def test_dataset_warms_what_is_chosen():
    store = FakeStore({("b", key): b"x" * size for key, size in zip(KEYS, SIZES, strict=True)})
    with CachedS3MapDataset.from_prefix("s3://b/", store=store) as dataset:
        report = dataset.warm(progress=False, match="*.png", order="smallest", limit="60B")
        assert (report.objects, report.fetched, report.bytes) == (2, 2, 50)
        with pytest.raises(ConfigurationError, match="limit='some'"):
            dataset.warm(progress=False, limit="some")
        assert dataset.warm(progress=False).resident == 2


@pytest.mark.parametrize("of", [iter, lambda infos: infos])
async def test_fetcher_warms_any_iterable(tmp_path, of):
    store, cache = FakeStore({("b", key): key.encode() for key in KEYS}), Cache(tmp_path)
    infos = [store.info("b", key) for key in KEYS]
    async with Fetcher(store, cache, concurrency=2, retry=Retry(1, deadline=20, first_contact=5)) as fetcher:
        report = await fetcher.warm(of(infos), exclude="a/*")
        assert (report.objects, report.fetched, report.failures) == (3, 3, ())
        report = await fetcher.warm(of(infos))
    assert (report.resident, report.fetched) == (3, 2)
    assert set(store.gets.values()) == {1}
    assert cache.check() == {}


async def test_cancelled_warm_of_a_fetcher_keeps_what_arrived(tmp_path):
    store, cache = FakeStore({("b", key): key.encode() for key in KEYS}), Cache(tmp_path)
    store.gates = {KEYS[-1]: asyncio.Event()}
    infos = [store.info("b", key) for key in KEYS]
    async with Fetcher(store, cache, concurrency=2, retry=Retry(1, deadline=20, first_contact=5)) as fetcher:
        warming = asyncio.create_task(fetcher.warm(infos))
        while fetcher.in_flight != 1 or len(cache) < len(KEYS) - 1:  # for as long as the test has time
            await asyncio.sleep(0)
        warming.cancel()
        with pytest.raises(asyncio.CancelledError):
            await warming
        store.gates[KEYS[-1]].set()
        report = await fetcher.warm(infos)
    assert report.resident + report.fetched == len(KEYS)
    assert set(store.gets.values()) == {1}


async def test_what_another_brings_meanwhile_is_counted_apart(tmp_path):
    store, cache = FakeStore({("b", key): key.encode() for key in KEYS}), Cache(tmp_path)
    store.gates = {KEYS[0]: asyncio.Event()}
    infos = [store.info("b", key) for key in KEYS]
    options = {"concurrency": 9, "retry": Retry(1, deadline=20, first_contact=5)}
    async with Fetcher(store, cache, **options) as other, Fetcher(store, Cache(tmp_path), **options) as fetcher:
        bringing = asyncio.create_task(other.get(infos[0]))
        while not store.in_flight:  # for as long as the test has time
            await asyncio.sleep(0)
        warming = asyncio.create_task(fetcher.warm(infos))
        while len(cache) < len(KEYS) - 1:
            await asyncio.sleep(0)
        store.gates[KEYS[0]].set()
        report, _ = await asyncio.gather(warming, bringing)
    assert (report.resident, report.fetched, report.shared) == (0, len(KEYS) - 1, 1)
    assert report.bytes == sum(len(key) for key in KEYS)
    assert "5 objects: 0 were cached, 4 fetched, 1 brought by others (" in str(report)
    assert set(store.gets.values()) == {1}


async def test_fetcher_without_a_cache_has_nothing_to_warm():
    store = FakeStore({("b", "k"): b"x"})
    async with Fetcher(store, None, concurrency=2, retry=Retry(1, deadline=20, first_contact=5)) as fetcher:
        with pytest.raises(ConfigurationError, match="without a cache"):
            await fetcher.warm([store.info("b", "k")])
