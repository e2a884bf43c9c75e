"""Several processes, one cache directory: one download per object, whoever dies or stands still."""

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

from asyncds import CachedS3MapDataset, S3Reader
from asyncds.locks import Locks
from asyncds.lookup import resident
from asyncds.testing import Fault, S3Server

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.usefixtures("fork_server"),
]
COUNT = 400
KEYS = [f"train/{number:04}" for number in range(COUNT)]


def body(key: str) -> bytes:
    return random.Random(key).randbytes(200)


@pytest.fixture
def bucket(s3_process: S3Server) -> S3Server:
    s3_process.put_many("mnist", {key: body(key) for key in KEYS})
    s3_process.reset_counts()
    return s3_process


@pytest.fixture
def alone(child) -> Callable[..., BaseProcess]:
    """As `child(..., wait=False)`, in a process that has nothing of this one but its environment."""

    def start(function: Callable[..., object], *arguments: Any) -> BaseProcess:
        return child("forkserver", run, dict(os.environ), function, *arguments, wait=False)

    return start


def run(environment, function, *arguments):
    os.environ |= environment  # the fork server has that of its start
    function(*arguments)


# locks


def take_and_tell(path, names, pipe):
    locks = Locks.at(path)
    pipe.send([locks.take(name) for name in names])
    pipe.recv()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_lock_is_held_by_one_process_and_freed_by_its_death(tmp_path, child, method):
    locks = Locks.at(tmp_path / "locks")
    assert [locks.take(b"a"), locks.take(b"a"), locks.share(b"a"), locks.share(b"s"), locks.share(b"s")] == [
        *(True, False, False),
        *(True, True),
    ]
    ours, theirs = multiprocessing.Pipe()
    process = child(method, take_and_tell, tmp_path / "locks", [b"a", b"s", b"c"], theirs, wait=False)
    assert ours.recv() == [False, False, True]
    assert not locks.take(b"c")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert locks.take(b"c")
    locks.release(b"s")
    assert not locks.take(b"s"), "it is shared by another still"
    locks.release(b"s")
    assert locks.take(b"s")


def test_locks_of_a_file_are_the_same_for_the_whole_process(tmp_path):
    one, other = Locks.at(tmp_path / "locks"), Locks.at(tmp_path / "." / "locks")
    assert one is other
    one.take(b"a")
    assert not other.take(b"a")


def test_locks_that_cannot_be_had_are_granted(tmp_path):
    locks = Locks.at(tmp_path / "nowhere" / "locks")
    assert locks.take(b"a")
    assert not locks.take(b"a"), "within the process they still mean something"
    locks.release(b"a")
    assert locks.take(b"a")


def child_of_a_holder(path):
    locks = Locks.at(path)
    sys.exit(locks.take(b"a"))


def test_forked_child_neither_has_nor_frees_the_locks_of_its_parent(tmp_path, child):
    locks = Locks.at(tmp_path / "locks")
    locks.take(b"a")
    child("fork", child_of_a_holder, tmp_path / "locks")
    child("fork", child_of_a_holder, tmp_path / "locks")


def ask_until_told(path, pipe):
    locks = Locks.at(path)
    pipe.send(locks.is_shared(b"taken"))
    while not pipe.poll():
        assert not locks.is_shared(b"a")


def test_asking_whether_a_lock_is_shared_leaves_no_trace(tmp_path, child):
    locks = Locks.at(tmp_path / "locks")
    assert locks.take(b"taken")
    ours, theirs = multiprocessing.Pipe()
    process = child("fork", ask_until_told, tmp_path / "locks", theirs, wait=False)
    assert not ours.recv(), "who has it alone does not share it"
    for _ in range(20_000):
        assert locks.take(b"a")
        locks.release(b"a")
    ours.send("enough")
    process.join()
    assert process.exitcode == 0


def share_and_wait(path, pipe):
    pipe.send(Locks.at(path).share(b"a"))
    pipe.recv()


def test_lock_is_shared_for_as_long_as_somebody_shares_it(tmp_path, child):
    locks = Locks.at(tmp_path / "locks")
    assert not locks.is_shared(b"a")
    ours, theirs = multiprocessing.Pipe()
    process = child("fork", share_and_wait, tmp_path / "locks", theirs, wait=False)
    assert ours.recv()
    assert (locks.is_shared(b"a"), locks.is_shared(b"b")) == (True, False)
    assert locks.share(b"a")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert locks.is_shared(b"a"), "by this process"
    locks.release(b"a")
    assert not locks.is_shared(b"a")
    assert not Locks(None).is_shared(b"a")


# datasets


def read_everything(seed, barrier):
    order = list(range(COUNT))
    random.Random(seed).shuffle(order)
    with CachedS3MapDataset.from_prefix("s3://mnist/train/", transform=S3Reader.read) as dataset:
        len(dataset)
        barrier.wait(30)
        for start in range(0, COUNT, 50):
            some = order[start : start + 50]
            assert dataset.__getitems__(some) == [body(KEYS[index]) for index in some]


@pytest.mark.parametrize("same_order", [pytest.param(True, marks=pytest.mark.thorough), False])
def test_four_processes_that_start_at_once_download_each_object_once(bucket, alone, same_order):
    barrier = multiprocessing.get_context("forkserver").Barrier(4)
    seeds = [0] * 4 if same_order else range(4)
    processes = [alone(read_everything, seed, barrier) for seed in seeds]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert bucket.stats.requests["GET"] == COUNT
    assert set(bucket.stats.gets.values()) == {1}


def read_some(keys, deadline, pipe):
    with CachedS3MapDataset.from_objects(
        [f"s3://mnist/{key}" for key in keys], transform=S3Reader.read, deadline=deadline
    ) as dataset:
        pipe.send("asking")
        samples = dataset.__getitems__(range(len(keys)))
        pipe.send(samples)
        pipe.recv()


def wait_for_gets(bucket, count):
    while bucket.stats.requests["GET"] < count:  # for as long as the test has time
        pass


def test_those_who_wait_for_a_process_that_dies_go_on_within_a_second(bucket, alone):
    bucket.script("mnist", KEYS[0], [Fault.stall()])
    _, theirs = multiprocessing.Pipe()
    holder = alone(read_some, KEYS[:1], 60.0, theirs)
    wait_for_gets(bucket, 1)
    with CachedS3MapDataset.from_objects([f"s3://mnist/{KEYS[0]}"], transform=S3Reader.read) as dataset:
        arrivals = dataset._parts[0].source.request([*dataset.manifest])
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
        killed = time.monotonic()
        assert arrivals.take(0).body == body(KEYS[0])
        assert time.monotonic() - killed < 10, "a second, and what a busy machine adds"
    assert bucket.stats.requests["GET"] == 2


def test_those_who_wait_for_a_process_that_stands_still_bring_the_object_themselves(bucket, alone):
    bucket.script("mnist", KEYS[0], [Fault.stall()])
    _, theirs = multiprocessing.Pipe()
    holder = alone(read_some, KEYS[:1], 60.0, theirs)
    wait_for_gets(bucket, 1)
    os.kill(holder.pid, signal.SIGSTOP)
    with CachedS3MapDataset.from_objects([f"s3://mnist/{KEYS[0]}"], transform=S3Reader.read, deadline=4.0) as dataset:
        assert dataset[0] == body(KEYS[0])
    assert bucket.stats.requests["GET"] == 2


def test_two_datasets_of_a_process_download_an_object_once(bucket):
    uris = [f"s3://mnist/{key}" for key in KEYS]
    with (
        CachedS3MapDataset.from_prefix("s3://mnist/train/", transform=S3Reader.read) as one,
        CachedS3MapDataset.from_prefix("s3://mnist/train", transform=S3Reader.read) as other,
    ):
        both = [dataset._parts[0].source.request([*dataset.manifest]) for dataset in (one, other)]
        for position, key in enumerate(KEYS):
            assert {arrivals.take(position).body for arrivals in both} == {body(key)}
        for arrivals in both:
            arrivals.settle()
    assert bucket.stats.requests["GET"] == COUNT
    with CachedS3MapDataset.from_objects(uris, transform=S3Reader.read) as dataset:
        assert len(dataset) == COUNT


# making room


def dataset_of(prefix, **options):
    return CachedS3MapDataset.from_prefix(f"s3://mnist/{prefix}/", transform=S3Reader.read, **options)


def hold_open(prefix, pipe):
    with dataset_of(prefix) as dataset:
        len(dataset)
        pipe.send("held")
        pipe.recv()


@pytest.fixture
def three(s3_process: S3Server) -> dict[str, list[bytes]]:
    """Three datasets of about a megabyte each; the cache that the tests make of them holds two."""
    bodies = {name: [random.Random(f"{name}{n}").randbytes(50_000) for n in range(20)] for name in "abc"}
    for name, values in bodies.items():
        s3_process.put_many("mnist", {f"{name}/{n:02}": value for n, value in enumerate(values)})
    return bodies


def read_all(three, prefix, server):
    """Read a dataset, and tell how many GETs that took."""
    server.reset_counts()
    with dataset_of(prefix, cache_size="2.4MB") as dataset:
        assert [*dataset] == three[prefix]
    return server.stats.requests["GET"]


@pytest.mark.filterwarnings("error:the cache")
def test_room_is_made_from_the_dataset_that_was_used_least_recently(three, s3_process):
    assert [read_all(three, name, s3_process) for name in "aba"] == [20, 20, 0]
    assert read_all(three, "c", s3_process) == 20, "b has to go"
    assert [read_all(three, name, s3_process) for name in "ac"] == [0, 0]


def test_room_is_never_made_from_a_dataset_that_a_living_process_holds(three, s3_process, alone):
    assert [read_all(three, name, s3_process) for name in "ab"] == [20, 20]
    pipes = [multiprocessing.Pipe() for _ in "ab"]
    for name, (ours, theirs) in zip("ab", pipes, strict=True):
        alone(hold_open, name, theirs)
        assert ours.recv() == "held"
    with pytest.warns(UserWarning, match="is full"):
        read_all(three, "c", s3_process)
    for ours, _ in pipes:
        ours.send("end")
    assert [read_all(three, name, s3_process) for name in "ab"] == [0, 0]


def test_room_is_made_from_a_dataset_whose_process_was_killed(three, s3_process, alone):
    assert [read_all(three, name, s3_process) for name in "ab"] == [20, 20]
    ours, theirs = multiprocessing.Pipe()
    process = alone(hold_open, "b", theirs)
    assert ours.recv() == "held"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert [read_all(three, name, s3_process) for name in "ac"] == [0, 20]


def test_room_is_made_from_older_versions_first(three, s3_process):
    assert [read_all(three, name, s3_process) for name in "ab"] == [20, 20]
    three["b"] = [value[::-1] for value in three["b"]]
    s3_process.put_many("mnist", {f"b/{n:02}": value for n, value in enumerate(three["b"])})
    assert [read_all(three, name, s3_process) for name in "bab"] == [20, 0, 0]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
@pytest.mark.filterwarnings("ignore:the cache in .* is full")
def test_every_epoch_over_a_cache_that_is_too_small_downloads_exactly_what_is_not_there(s3_process, share):
    size, count = 44_000, 100
    s3_process.put_many("mnist", {f"x/{n:03}": random.Random(n).randbytes(size) for n in range(count)})
    with dataset_of("x", cache_size=int(share * count * 45_056) + 100_000) as dataset:
        source, order = dataset._parts[0].source, list(range(count))
        gets = []
        for epoch in range(4):
            random.Random(epoch).shuffle(order)
            s3_process.reset_counts()
            kept = sum(resident(source.cache, source.endpoint, source.manifest[:count]))
            for start in range(0, count, 10):
                dataset.__getitems__(order[start : start + 10])
            gets.append((s3_process.stats.requests["GET"], count - kept))
        assert all(made == missing for made, missing in gets)
        assert share * count - 3 <= kept <= share * count + 3
        assert source.cache.check() == {}


@pytest.mark.filterwarnings("ignore:the cache in .* is full")
@pytest.mark.parametrize("warmed", [True, False])
def test_smallest_objects_are_kept_if_asked_for(s3_process, warmed):
    sizes = [int(5000 * random.Random(n).lognormvariate(0, 0.8)) + 1 for n in range(300)]
    s3_process.put_many("mnist", {f"x/{n:03}": bytes(size) for n, size in enumerate(sizes)})
    half = sum(sizes) // 2
    gets = {}
    for admit in ("first", "smallest"):
        with dataset_of("x", cache_size=half, admit=admit, cache_dir=f"cache-{admit}-{warmed}") as dataset:
            if warmed:
                report = dataset.warm(progress=False)
                assert report.fetched + report.uncached >= 300
            for _ in range(2):
                s3_process.reset_counts()
                assert [len(sample) for sample in dataset] == sizes
            gets[admit] = s3_process.stats.requests["GET"]
            # What rows will take in SQLite's pages is estimated, and here all of them come in one batch.
            assert dataset._parts[0].source.cache.volume() <= half * 1.1
    assert gets["smallest"] < 0.35 * 300 < 0.42 * 300 < gets["first"], "79 % and 50 % hits are what theory says"
