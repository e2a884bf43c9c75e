"""The cache at its edges: processes that stop or come between, folders that vanish or are replaced, disks that fail."""

import asyncio
import contextlib
import gc
import itertools
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
import weakref
from pathlib import Path

import pytest

import asyncds.folder
import asyncds.locks
from asyncds.cache import INLINE_LIMIT, Cache
from asyncds.clearing import _bytes
from asyncds.entry import Entry, NewEntry, entry_key, object_id
from asyncds.errors import CacheError
from asyncds.fetcher import Fetcher
from asyncds.index import DATABASE, is_trustworthy
from asyncds.large import LARGE
from asyncds.locks import Locks
from asyncds.lookup import lookup
from asyncds.manifest import ObjectInfo
from asyncds.retry import Retry
from asyncds.testing import FakeStore

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

BIG = INLINE_LIMIT + 1000
UNTOLD = "ignore:the cache in .* cannot be:UserWarning"


def new(name, body=b"x" * 500, etag="v1", **options):
    return NewEntry(object_id("http://store", "bucket", f"key-{name}"), etag, body, **options)


def some(name, count, size=500):
    return [new(f"{name}-{number}", os.urandom(size)) for number in range(count)]


def keys_of(entries):
    return [entry_key(entry.object, entry.etag) for entry in entries]


def stored(cache, entries, tag=""):
    assert cache.put_many(entries, tag) == len(entries)
    return keys_of(entries)


def found(entries):
    return [Entry(entry.etag, entry.body) for entry in entries]


def database(cache):
    return cache.directory / "objects" / "cache.db"


def rows(path, statement, *, timeout=5.0):
    with contextlib.closing(sqlite3.connect(path, timeout=timeout, isolation_level=None)) as connection:
        return connection.execute(statement).fetchall()


def files_of(cache):
    return sorted((cache.directory / "objects").glob("*/*.obj"))


def set_aside(cache):
    return list(cache.directory.glob("damaged-*"))


def fetcher_of(store, cache):
    return Fetcher(store, cache, concurrency=4, retry=Retry(3, deadline=20, first_contact=5))


def nothing():
    pass


@pytest.fixture
def cache(tmp_path):
    cache = Cache(tmp_path / "cache")
    yield cache
    assert cache.check() == {}
    cache.close()


# two caches of a process


def store_close_and_look(directory, theirs, ours, closed, go_on):
    cache = Cache(directory)
    stored(cache, theirs)
    cache.close()
    closed.set()
    assert go_on.wait(20)
    assert Cache(directory).get_many(keys_of(ours)) == found(ours)


def test_second_cache_of_a_process_does_not_make_others_delete_the_log_under_it(cache, child):
    before, ours, theirs = some("before", 100), some("ours", 200), some("theirs", 100)
    assert cache.get_many(stored(cache, before)) == found(before)
    log = database(cache).with_name("cache.db-wal")
    inode = log.stat().st_ino
    second = Cache(cache.directory.parent)
    second.get_many(keys_of(before))
    context = multiprocessing.get_context("spawn")  # a fork closes connections, and would hide what is lost
    closed, go_on = context.Event(), context.Event()
    process = child("spawn", store_close_and_look, cache.directory.parent, theirs, ours, closed, go_on, wait=False)
    assert closed.wait(30)
    assert log.stat().st_ino == inode
    stored(cache, ours)
    go_on.set()
    process.join(30)
    assert process.exitcode == 0
    assert cache.get_many(keys_of(theirs)) == found(theirs)
    assert rows(database(cache), "PRAGMA integrity_check") == [("ok",)]


def test_index_that_was_deleted_by_itself_shares_no_log_with_the_next(cache, tmp_path):
    """SQLite locks the map of a log once per process, and shrinks it under whoever has lost that lock: a SIGBUS."""
    before, after = some("before", 100), some("after", 100)
    other = Cache(cache.directory.parent)
    assert other.get_many(stored(cache, before)) == found(before)
    shared, kept = database(cache).with_name("cache.db-shm"), tmp_path / "kept"
    with cache._folder.transaction() as index:
        index.execute("DELETE FROM Cache")
        os.link(shared, kept)
        content = subprocess.check_output(["cat", kept])
        database(cache).unlink()
        assert other.get_many(keys_of(before)) == [None] * 100
        assert subprocess.check_output(["cat", kept]) == content
    assert other.get_many(stored(cache, after)) == found(after)
    assert rows(database(cache), "PRAGMA integrity_check") == [("ok",)]


def test_index_is_made_by_one_process_at_a_time(tmp_path, monkeypatch):
    """Who removes the old log must not meet the new one of somebody else."""
    open_file, free = os.open, []

    def opened(path, flags, *arguments, **options):
        if str(path).endswith(DATABASE) and flags & os.O_EXCL:
            free.append(Locks.at(Path(path).parents[1] / "locks" / "files").take(asyncds.folder._MAKING))
        return open_file(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", opened)
    Cache(tmp_path).close()
    assert free == [False]


def test_space_of_what_a_deleted_index_named_is_taken_back(cache):
    stored(cache, some("large", 3, size=INLINE_LIMIT + 1))
    cache.close()
    cache._folder.dirty.unlink()
    for path in database(cache).parent.glob(f"{DATABASE}*"):
        path.unlink()
    other = Cache(cache.directory.parent, sweeping=False)
    assert other._folder.dirty.exists(), "the next run sweeps"
    assert other.sweep() > 3 * INLINE_LIMIT
    assert other.check() == {}


def expect_claimed(directory, object, claimed):
    assert Cache(directory).claim(object) is not claimed


def test_folder_that_was_deleted_does_not_leave_its_locks_to_a_cache_that_is_opened_next(cache, child):
    """The process would hold them where nobody looks for them, and bring what others are bringing."""
    object = some("object", 1)[0].object
    assert cache.claim(object)
    shutil.rmtree(cache.directory)
    second = Cache(cache.directory.parent)
    child("spawn", expect_claimed, cache.directory.parent, object, False)
    assert second.claim(object)
    child("spawn", expect_claimed, cache.directory.parent, object, True)


def expect_held(directory, tag):
    assert Cache(directory)._folder.datasets.is_shared(_bytes(tag))


def test_cache_of_a_deleted_folder_does_not_undo_what_the_next_one_holds(cache, child):
    cache.hold("train")
    shutil.rmtree(cache.directory)
    second = Cache(cache.directory.parent)
    second.hold("train")
    cache.release("train")
    child("spawn", expect_held, cache.directory.parent, "train")


@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt, SystemExit])
def test_lock_that_is_taken_as_a_signal_comes_is_not_waited_for_again(monkeypatch, error):
    def fail(*_):
        raise error

    def release(lock):
        while sys._current_frames()[main].f_code is not asyncds.folder._acquire.__code__:
            os.sched_yield()
        sys.setswitchinterval(5)
        os.kill(os.getpid(), signal.SIGUSR2)
        lock.release()
        sum(range(3_000_000))  # the interpreter's lock is kept, so that the other thread has its lock before it goes on

    main = threading.main_thread().ident
    interval, before = sys.getswitchinterval(), signal.signal(signal.SIGUSR2, fail)
    monkeypatch.setattr(asyncds.folder, "held_back", [])
    lock = threading.Lock()
    lock.acquire()
    try:
        thread = threading.Thread(target=release, args=(lock,))
        thread.start()
        asyncds.folder._acquire(lock)
    finally:
        sys.setswitchinterval(interval)
        signal.signal(signal.SIGUSR2, before)
    thread.join()
    assert lock.locked()
    assert [type(raised) for raised in asyncds.folder.held_back] == [error]


# writers that fail or stand still


def store_more_than_the_disk_takes(cache, before):
    most = database(cache).stat().st_size + (1 << 20)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.warns(UserWarning, match="cannot be written"):
        # More than SQLite's page cache of 2 MB: it writes before the commit, and undoes the transaction by itself.
        assert cache.put_many(some("large", 250, INLINE_LIMIT - 1000)) == 0
    assert cache.get_many(keys_of(before)) == found(before)


def test_write_error_within_a_transaction_does_not_cost_what_was_there(cache, child):
    before = some("before", 300)
    stored(cache, before)
    child("fork", store_more_than_the_disk_takes, cache, before)
    assert set_aside(cache) == []
    assert cache.get_many(keys_of(before)) == found(before)
    stored(cache, some("large", 250, INLINE_LIMIT - 1000))


def stop_within_a_transaction(path):
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    os.kill(os.getpid(), signal.SIGSTOP)


def test_writer_that_was_stopped_costs_others_five_seconds_once_and_neither_readers_nor_forks_more(cache, child):
    before, took = some("before", 3), list[float]()
    stored(cache, before)
    stopped = child("fork", stop_within_a_transaction, database(cache), wait=False)
    assert os.WIFSTOPPED(os.waitpid(stopped.pid, os.WUNTRACED)[1])

    def write():
        started = time.monotonic()
        assert cache.put_many(some("late", 1)) == 0
        took.append(time.monotonic() - started)

    def fork_meanwhile():
        child("fork", nothing)
        took.append(time.monotonic() - started)
        writer.join()

    writer, started = threading.Thread(target=write), time.monotonic()
    writer.start()
    while writer.is_alive() and not cache._folder._writing.locked():
        pass
    other = Cache(cache.directory.parent)
    for reader in (cache, other):
        assert reader.get_many(keys_of(before)) == found(before)
    assert (time.monotonic() - started < 3, writer.is_alive()) == (True, True), "who opens and reads waits for nobody"
    with pytest.warns(UserWarning, match=r"cannot be written \(database is locked\)"):
        fork_meanwhile()
    assert 4 < max(took) < 12
    started = time.monotonic()
    assert [cache.put_many(some(f"later-{number}", 1)) for number in range(20)] == [0] * 20
    child("fork", nothing)
    assert time.monotonic() - started < 3, "for half a minute nobody tries"
    assert cache.get_many(keys_of(before)) == found(before)
    os.kill(stopped.pid, signal.SIGKILL)
    stopped.join()
    cache._folder._locked_until -= 30  # it is over
    stored(cache, some("late", 1))


@pytest.mark.filterwarnings("error")
async def test_look_up_that_fails_on_the_loop_hangs_no_flight_where_warnings_are_errors(cache, monkeypatch):
    store = FakeStore({("b", f"k{number}"): b"%d" % number for number in range(3)})
    infos = [store.info(*name) for name in store.objects]

    def failing(*_):
        raise OSError(5, "Input/output error")

    async with fetcher_of(store, cache) as fetcher, asyncio.timeout(20):
        with monkeypatch.context() as patch:
            patch.setattr(cache._folder, "query", failing)
            flights = [fetcher.start(info) for info in infos]
            assert [(await flight.arrived).body for flight in flights] == [b"0", b"1", b"2"]
            await asyncio.wait([flight.settled for flight in flights])
        assert cache.faults > 0
        assert [served.body async for served in fetcher.fetch(infos[:1])] == [b"0"]
        await fetcher.flush()
    assert [there and there.body for there in lookup(cache, store.endpoint, infos)[1]] == [b"0", None, None]


def test_writers_come_in_between_while_many_entries_are_removed(cache):
    entries = [new(number, b"x", first_seen=True) for number in range(2000)]
    stored(cache, entries)
    free = []

    def watched():
        for number, entry in enumerate(entries):
            if number % 600 == 599:
                rows(database(cache), "BEGIN IMMEDIATE", timeout=0)
                free.append(number)
            yield entry.object

    cache.forget_first_seen(watched())
    assert free == [599, 1199, 1799]
    assert cache.first_seen([entry.object for entry in entries]) == [None] * 2000
    assert cache.get_many(keys_of(entries)) == found(entries)


# room


@pytest.mark.parametrize(("admit", "warms"), [("first", True), ("smallest", True), ("smallest", False)])
def test_room_is_made_from_a_dataset_that_nobody_holds(tmp_path, admit, warms):
    from asyncds import CachedS3MapDataset, S3Reader

    sizes = range(35_000, 65_000, 500)
    store = FakeStore({("b", f"{name}/{size}"): os.urandom(size) for name in "xy" for size in sizes})

    def dataset(name):
        options = {"transform": S3Reader.read, "cache_dir": tmp_path, "cache_size": "3.5MB", "admit": admit}
        return CachedS3MapDataset.from_prefix(f"s3://b/{name}/", store=store, **options)

    with dataset("x") as gone:
        assert gone.warm(progress=False).uncached == 0
    with dataset("y") as used:
        if warms:
            assert used.warm(progress=False)[:6] == (60, 0, 60, 0, sum(sizes), 0)
        else:
            used.__getitems__(range(60))
        store.gets.clear()
        used.__getitems__(range(60))
        assert store.gets.total() == 0
    assert Cache(tmp_path).check() == {}


def hold_and_count(directory, tag, keys, opened, held, go_on, pipe):
    cache = Cache(directory, limit=1_000_000)
    opened.set()
    cache.hold(tag)
    held.set()
    assert go_on.wait(20)
    pipe.send(len(cache.present(keys)))


def test_dataset_is_held_by_who_opens_it_while_room_is_made_from_it_as_soon_as_that_is_over(tmp_path, child):
    cache = Cache(tmp_path, limit=1_000_000)
    cache.hold("used")
    keys = stored(cache, some("used", 20, 40_000), "used")
    cache.release("used")
    making_room = cache._clearing._of_nobody("other")
    with contextlib.closing(making_room):
        assert len(next(making_room)) == 20, "its rows are about to go"
        context = multiprocessing.get_context("fork")
        opened, held, go_on = context.Event(), context.Event(), context.Event()
        ours, theirs = context.Pipe()
        child("fork", hold_and_count, tmp_path, "used", keys, opened, held, go_on, theirs, wait=False)
        assert opened.wait(20)
        assert not held.wait(0.5)
    assert held.wait(9), "the end of making room, and not of patience, is waited for"
    cache.hold("other")
    assert cache.put_many(some("other", 20, 40_000), "other") < 20
    go_on.set()
    assert ours.recv() == 20
    assert cache.check() == {}


@pytest.mark.parametrize("how", ["clear", "make room"])
def test_dataset_that_comes_into_use_while_it_is_removed_keeps_what_is_left(tmp_path, child, how):
    cache = Cache(tmp_path, limit=10_000_000)
    cache.hold("used")
    keys = stored(cache, some("used", 1300, 200), "used")
    cache.release("used")
    context = multiprocessing.get_context("fork")
    opened, held, go_on = context.Event(), context.Event(), context.Event()
    ours, theirs = context.Pipe()

    def comes():
        child("fork", hold_and_count, tmp_path, "used", keys, opened, held, go_on, theirs, wait=False)
        while not cache.in_use():  # for as long as the test has time
            pass
        assert not held.is_set(), "it waits for what goes on"

    if how == "clear":
        asked = itertools.count(1)
        done = cache.clear("used", spare=lambda: next(asked) == 3 and bool(comes()))
        assert (done.bytes > 0, done.whole) == (True, False)
    else:
        making_room = cache._clearing._of_nobody("other")
        cache._clearing._drop(next(making_room))
        cache._clearing._drop(next(making_room))
        comes()
        assert list(making_room) == []
    assert held.wait(20)
    go_on.set()
    assert ours.recv() == 300
    assert cache.check() == {}


def test_what_is_in_use_is_asked_anew_before_each_time(tmp_path):
    cache, left = Cache(tmp_path), list[int]()
    stored(cache, some("used", 1300, 200), "used")

    def spare():
        left.append(len(cache))
        return len(left) == 3

    assert not cache.clear("used", spare=spare).whole
    assert left == [1300, 1300, 800]
    assert cache.clear("used", spare=lambda: True) == (0, False)
    assert cache.clear("used").whole
    assert len(cache) == 0


@pytest.mark.parametrize("way", ["whole", "in parts"])
def test_object_that_is_larger_than_the_cache_does_not_make_it_full_for_others(tmp_path, way):
    cache = Cache(tmp_path, limit=400_000)
    if way == "whole":
        assert cache.put_many([new("giant", bytes(500_000))]) == 0
    else:
        assert cache.begin(new("giant").object, "v1", 500_000) is None
    assert not cache.full
    stored(cache, some("small", 5, BIG))
    assert cache.begin(new("half").object, "v1", 300_000) is None
    assert cache.full, "this one would have fitted"
    assert cache.check() == {}


def test_object_that_is_larger_than_the_cache_does_not_keep_room_from_being_made_for_its_batch(tmp_path):
    cache = Cache(tmp_path, limit=1_000_000)
    stored(cache, some("before", 20, 40_000), "gone")
    cache.hold("gone")
    cache.release("gone")
    small = some("small", 10, 40_000)
    assert cache.put_many([new("giant", bytes(2_000_000)), *small], "used") == 10
    assert cache.present(keys_of(small)) == set(keys_of(small))
    assert not cache.full
    assert cache.check() == {}


def store_what_fitted_before(directory, number, barrier):
    cache, commit = Cache(directory, limit=2_000_000), Cache.commit

    def together(*arguments):
        barrier.wait(20)
        return commit(*arguments)

    Cache.commit = together
    entries = some(number, 40, 40_000)
    count = cache.put_many(entries, f"dataset {number}")
    assert len(cache.present(keys_of(entries))) == count


def test_six_processes_that_find_the_same_room_do_not_fill_it_six_times(tmp_path, child):
    cache = Cache(tmp_path, limit=2_000_000)
    barrier = multiprocessing.get_context("fork").Barrier(6)
    processes = [child("fork", store_what_fitted_before, tmp_path, n, barrier, wait=False) for n in range(6)]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 6
    assert 1_600_000 < cache.volume() < 2_100_000
    assert sum(path.stat().st_size for path in files_of(cache)) < 2_100_000
    assert cache.check() == {}


def on_a_bare_loop(coroutine):
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(coroutine)
    finally:
        loop.close()


@pytest.mark.parametrize(
    "run",
    [
        asyncio.run,
        on_a_bare_loop,
    ],
    ids=["asyncio.run", "a bare loop"],
)
def test_fetcher_that_is_closed_while_room_is_made_for_a_large_object_leaves_nothing(tmp_path, monkeypatch, run):
    cache, store = Cache(tmp_path, limit=4 * LARGE), FakeStore({("b", "k"): bytes(LARGE + 1)})
    begin, begun, flights = cache.begin, threading.Event(), []

    def slowly(*arguments):
        begun.set()
        while flights[0].task is None or not flights[0].task.cancelling():
            pass
        return begin(*arguments)

    async def close_amid():
        fetcher = fetcher_of(store, cache)
        flights.append(fetcher.start(store.info("b", "k")))
        assert await asyncio.to_thread(begun.wait, 20)
        await fetcher.aclose()

    monkeypatch.setattr(cache, "begin", slowly)
    run(close_amid())
    assert cache.room() > 3.9 * LARGE
    assert [*cache.directory.glob("objects/*/*.tmp"), *files_of(cache)] == []
    assert cache.check() == {}


# folders that vanish or are replaced


def deleted(directory, spare):
    shutil.rmtree(directory)


def replaced(directory, spare):
    Cache(spare).close()
    shutil.rmtree(directory)
    (spare / "asyncds").rename(directory)


LOSSES = [deleted, replaced]


def lose_the_folder_write_and_die(place, lose):
    cache = Cache(place / "cache")
    stored(cache, some("before", 1, BIG))
    lose(cache.directory, place / "spare")
    stored(cache, some("kept", 1, BIG))
    cache.commit = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    cache.put_many(some("lost", 1, BIG))


@pytest.mark.parametrize("lose", LOSSES)
def test_what_a_process_leaves_that_is_killed_after_its_folder_was_lost_is_swept_by_the_next_run(tmp_path, child, lose):
    process = child("fork", lose_the_folder_write_and_die, tmp_path, lose, wait=False)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert len([*(tmp_path / "cache").glob("asyncds/objects/*/*.obj")]) == 2
    cache = Cache(tmp_path / "cache")
    cache._sweeper._join()
    assert len(files_of(cache)) == len(cache) == 1
    assert cache.check() == {}


def take_nothing(directory, datasets, claim):
    locks = directory / "locks"
    # Not `Locks.at`, which a fork inherits: who comes new opens what lies there now.
    assert [name for name in datasets if Locks(locks / "datasets").take(name.encode())] == []
    assert not Locks(locks / "claims").take(claim)


@pytest.mark.parametrize("lose", LOSSES)
def test_what_a_process_holds_is_held_again_once_its_folder_was_lost(cache, tmp_path, child, lose):
    cache.hold("a")
    cache.hold("b")
    cache.hold("released")
    cache.release("released")
    stored(cache, some("before", 2, BIG))
    assert cache.claim(b"o" * 16)
    cache.unclaim(b"o" * 16)
    lose(cache.directory, tmp_path / "spare")
    stored(cache, some("after", 2, BIG))
    assert cache.claim(b"o" * 16)
    child("fork", take_nothing, cache.directory, ["a", "b"], b"o" * 16)
    assert cache._folder.datasets.take(b"released")
    cache.release("a")
    assert cache._folder.datasets.take(b"a")


def test_what_each_cache_of_a_process_holds_is_held_again_once_its_folder_was_deleted(cache, tmp_path, child):
    other = Cache(cache.directory.parent)
    cache.hold("a")
    other.hold("b")
    for each in (cache, other):
        stored(each, some("before", 2))
    shutil.rmtree(cache.directory)
    for each in (cache, other):
        stored(each, some("after", 2))
    cache.claim(b"o" * 16)
    child("fork", take_nothing, cache.directory, ["a", "b"], b"o" * 16)


def test_folder_that_is_deleted_again_and_again_costs_no_descriptors(cache):
    cache.hold("a")
    held = []
    for number in range(4):
        stored(cache, some(f"{number}", 2))
        assert cache.claim(b"o" * 16)
        held.append(len(os.listdir("/dev/fd")))
        shutil.rmtree(cache.directory)
    assert held == [held[0]] * 4


def test_dataset_is_pickled_for_a_spawned_process_after_its_folder_was_deleted(tmp_path):
    from asyncds import CachedS3MapDataset, S3Reader

    store = FakeStore({("b", "p/1"): b"body"})
    with CachedS3MapDataset.from_prefix("s3://b/p/", store=store, transform=S3Reader.read, cache_dir=tmp_path) as one:
        assert len(one) == 1
        shutil.rmtree(tmp_path / "asyncds")
        with pickle.loads(pickle.dumps(one)) as other:
            assert other[0] == b"body"
    assert Cache(tmp_path).check() == {}


USES = {
    "read": lambda cache, entries: cache.get_many(keys_of(entries)),
    "write": lambda cache, entries: cache.put_many(entries),
    "remove": lambda cache, entries: cache.remove(keys_of(entries)),
    "check": lambda cache, entries: cache.check(fix=True),
    "sweep": lambda cache, entries: cache.sweep(),
    "begin": lambda cache, entries: cache.begin(new("large").object, "v1", LARGE + 1),
}


@pytest.mark.parametrize("use", ["read", "write", "remove"])
def test_trigger_in_a_folder_that_came_into_the_place_of_an_open_one_never_runs(cache, tmp_path, use):
    entries = some("entry", 3)
    keys = stored(cache, entries)
    cache.get_many(keys)
    spare = Cache(tmp_path / "spare")
    stored(spare, entries)
    spare.close()
    rows(database(spare), "CREATE TABLE loot (key)")
    for event in ("INSERT", "DELETE"):
        action = "BEGIN INSERT INTO loot VALUES (1); END"
        rows(database(spare), f"CREATE TRIGGER planted_{event} AFTER {event} ON Cache {action}")
    shutil.rmtree(cache.directory)
    spare.directory.rename(cache.directory)
    with pytest.warns(UserWarning, match="the cache's index was damaged: it was moved to"):
        USES[use](cache, entries)
    stored(cache, entries)
    assert cache.get_many(keys) == found(entries)
    (aside,) = set_aside(cache)
    assert rows(aside / "cache.db", "SELECT * FROM loot") == []


def snapshot(folder):
    seen = {path: path.lstat() for path in [folder, *folder.rglob("*")]}
    return {path: (status.st_mtime_ns, status.st_mode, status.st_size) for path, status in seen.items()}


@pytest.mark.parametrize("use", USES)
@pytest.mark.filterwarnings(UNTOLD)
def test_folder_of_a_newer_format_that_came_into_the_place_of_an_open_one_is_not_touched(tmp_path, use):
    cache, spare = Cache(tmp_path / "cache"), Cache(tmp_path / "spare")
    entries = [*some("small", 3), *some("large", 3, BIG)]
    assert cache.get_many(stored(cache, entries)) == found(entries)
    stored(spare, entries)
    spare.close()
    made = (spare.directory / "format.json").read_text()
    (spare.directory / "format.json").write_text(made.replace('"format": 1', '"format": 99'))
    shutil.rmtree(cache.directory)
    spare.directory.rename(cache.directory)
    before = snapshot(cache.directory)
    with contextlib.suppress(CacheError):
        USES[use](cache, entries)
    assert snapshot(cache.directory) == before
    assert cache.get_many(keys_of(entries)) == [None] * 6
    (cache.directory / "format.json").write_text(made)
    assert cache.get_many(keys_of(entries)) == found(entries)
    assert cache.check() == {}


@pytest.mark.filterwarnings("ignore:.* was a link or a pipe, and was removed:UserWarning")
def test_link_in_a_folder_of_a_newer_format_is_left_where_it_is(tmp_path):
    cache = Cache(tmp_path)
    cache.close()
    made = (cache.directory / "format.json").read_text()
    (cache.directory / "format.json").write_text(made.replace('"format": 1', '"format": 99'))
    link = cache.directory / "something new"
    link.symlink_to(tmp_path)
    before = snapshot(cache.directory)
    with pytest.raises(CacheError, match="is of format 99"):
        Cache(tmp_path)
    assert snapshot(cache.directory) == before
    link.unlink()
    (cache.directory / "format.json").write_text(made)
    assert cache.check() == {}


def test_shard_that_became_a_link_is_not_followed_when_what_it_leads_to_is_discarded(cache, tmp_path):
    (key,) = stored(cache, some("entry", 1, BIG))
    (path,) = files_of(cache)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / path.name).write_bytes(b"precious")
    path.parent.rename(tmp_path / "shard")
    path.parent.symlink_to(outside)
    assert cache.get_many([key]) == [None]
    assert cache.present([key]) == set(), "it was damaged, and discarded"
    assert (outside / path.name).read_bytes() == b"precious"
    path.parent.unlink()
    (tmp_path / "shard").rename(path.parent)
    assert cache.sweep() > 0


# damage


def open_once_all_have_seen_the_damage(directory, number, barrier, pipe):
    seen = []

    def together(path, **options):
        trustworthy = is_trustworthy(path, **options)
        if not seen:
            seen.append(trustworthy)
            barrier.wait(20)
        return trustworthy

    asyncds.folder.is_trustworthy = together
    warnings.simplefilter("ignore")
    cache = Cache(directory)
    assert seen == [False]
    entries = some(number, 50)
    cache.put_many(entries)
    pipe.send(cache.present(keys_of(entries)))


def test_damaged_index_that_several_processes_open_at_once_is_set_aside_once_and_what_they_store_stays(tmp_path, child):
    cache = Cache(tmp_path)
    stored(cache, some("before", 50))
    cache.close()
    with open(database(cache), "r+b") as file:
        file.write(b"garbage " * 100)
    context = multiprocessing.get_context("fork")
    barrier, pipes = context.Barrier(4), [context.Pipe() for _ in range(4)]
    processes = [
        child("fork", open_once_all_have_seen_the_damage, tmp_path, number, barrier, theirs, wait=False)
        for number, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(set_aside(cache)) == 1
    kept = set[bytes]().union(*(ours.recv() for ours, _ in pipes))
    assert kept != set()
    cache = Cache(tmp_path)
    assert cache.present([*kept]) == kept
    cache.sweep()
    assert cache.check() == {}


def test_index_that_another_process_moves_away_at_that_moment_is_made_anew_as_private_as_ever(tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    stored(cache, some("before", 3))
    cache.close()
    moved = []

    def late(path, **options):
        if not moved:
            moved.append(path.rename(tmp_path / "set aside by another"))
        return is_trustworthy(path, **options)

    monkeypatch.setattr(asyncds.folder, "is_trustworthy", late)
    cache = Cache(tmp_path)
    stored(cache, some("after", 3))
    assert moved != []
    assert cache.check() == {}


@contextlib.contextmanager
def unreadable(monkeypatch, path):
    real = os.pread

    def pread(descriptor, *arguments):
        if os.path.samestat(os.fstat(descriptor), os.fstat(file.fileno())):
            raise OSError(5, "Input/output error")
        return real(descriptor, *arguments)

    # While it is open, no other file is given its inode: not even the one that comes into its place.
    with open(path, "rb") as file, monkeypatch.context() as patch:
        patch.setattr(os, "pread", pread)
        yield


def test_file_that_gives_an_error_of_the_disk_is_a_miss_once_and_then_replaced(cache, monkeypatch):
    entries = some("entry", 3, BIG)
    keys = stored(cache, entries)
    with unreadable(monkeypatch, files_of(cache)[0]):
        with pytest.warns(UserWarning, match=r"cannot be read \(Input/output error\)"):
            assert cache.get_many(keys).count(None) == 1
        assert len(cache.present(keys)) == 2
        stored(cache, entries)
        assert cache.get_many(keys) == found(entries)
    assert (cache.damaged, cache.faults) == (1, 1)


def test_audit_that_meets_an_error_of_the_disk_removes_that_file_and_leaves_the_index(cache, monkeypatch):
    entries = [*some("large", 3, BIG), *some("small", 50)]
    keys = stored(cache, entries)
    path = files_of(cache)[0]
    with unreadable(monkeypatch, path):
        problems = cache.check(fix=True)
        assert {kind: len(found) for kind, found in problems.items()} == {"damaged": 1}
        assert cache.check() == {}
    assert not path.exists()
    assert cache.get_many(keys).count(None) == 1
    assert set_aside(cache) == []


def test_file_in_the_place_of_a_shard_costs_neither_the_index_nor_the_rest_of_the_sweep(cache):
    entries = [*some("large", 5, BIG), *some("small", 50)]
    keys = stored(cache, entries)
    shard = files_of(cache)[0].parent
    lost = len(list(shard.iterdir()))
    shutil.rmtree(shard)
    shard.touch(0o600)
    litter = [
        cache.directory / "objects" / name / f"{'0' * 30}.obj" for name in ("00", "80", "ff") if name != shard.name
    ]
    for path in litter:
        path.parent.mkdir(0o700, exist_ok=True)
        path.touch(0o600)
    assert cache.sweep() == 0, "they are empty"
    assert [path for path in litter if path.exists()] == []
    problems = cache.check(fix=True)
    assert {kind: len(found) for kind, found in problems.items()} == {"missing": lost, "foreign": 1}
    assert cache.check() == {"foreign": [str(shard)]}
    assert cache.get_many(keys).count(None) == lost
    assert set_aside(cache) == []
    shard.unlink()


async def test_hit_of_another_size_than_the_listed_one_is_a_miss_that_heals(cache):
    class SameTag(FakeStore):
        def info(self, bucket, key):
            return super().info(bucket, key)._replace(etag="constant")

    store = SameTag({("b", "k"): b"old"})
    async with fetcher_of(store, cache) as fetcher:
        assert (await fetcher.get(store.info("b", "k"))).body == b"old"
        await fetcher.flush()
        store.objects["b", "k"] = b"longer, and new"
        assert (await fetcher.get(ObjectInfo("b", "k", None, "constant"))).body == b"old", "nobody says otherwise"
        assert (await fetcher.get(store.info("b", "k"))).body == b"longer, and new"
        await fetcher.flush()
        assert (await fetcher.get(store.info("b", "k"))).body == b"longer, and new"
    assert store.gets["k"] == 2
    assert len(cache) == 1


# interrupts, finalizers and forks


class Interrupted:
    def __init__(self, lock, go_on):
        self.lock, self.go_on, self.pending = lock, go_on, True

    def acquire(self, blocking=True):
        if threading.current_thread() is threading.main_thread():
            if self.pending:
                self.pending = False
                signal.raise_signal(signal.SIGINT)  # raises here, as it does from a lock that is waited for
            self.go_on.set()  # who waits in spite of it must get the lock
        return self.lock.acquire()

    def release(self):
        self.lock.release()

    def locked(self):
        return self.lock.locked()

    def __enter__(self):
        return self.acquire()

    def __exit__(self, *_):
        self.release()


def locks_of_a_fork(cache):
    return [asyncds.folder._forking, cache._folder._reading, cache._folder._writing]


@pytest.fixture
def interrupted_fork(cache, child):
    def fork(function, *arguments):
        writing, go_on = threading.Event(), threading.Event()

        def write():
            with cache._folder.transaction():
                writing.set()
                assert go_on.wait(20)

        thread, lock = threading.Thread(target=write), cache._folder._writing
        thread.start()
        assert writing.wait(20)
        cache._folder._writing = Interrupted(lock, go_on)
        try:
            process = child("fork", function, *arguments, wait=False)
            with pytest.raises(KeyboardInterrupt):  # it comes when the process has forked
                threading.Event().wait(20)
            return process
        except KeyboardInterrupt:
            return None  # it came before that
        finally:
            go_on.set()
            thread.join(20)
            cache._folder._writing = lock

    yield fork
    for lock in locks_of_a_fork(cache):
        if lock.locked():  # or the audit would wait for it forever
            lock.release()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupt_while_a_fork_waits_for_a_writer_leaves_no_lock_held(cache, interrupted_fork):
    entries = some("before", 3)
    keys = stored(cache, entries)
    assert cache.get_many(keys) == found(entries)
    interrupted_fork(nothing)
    assert [lock.locked() for lock in locks_of_a_fork(cache)] == [False] * 3
    assert cache.get_many(keys) == found(entries)
    stored(cache, some("after", 3))


def read_and_write_or_be_killed(cache, before, go_on):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(20)
    assert go_on.wait(10)
    assert cache.get_many(keys_of(before)) == found(before)
    with contextlib.closing(sqlite3.connect(database(cache), timeout=0, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")  # without the patience that the cache has
    stored(cache, some("child", 1))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_child_of_a_fork_that_was_interrupted_while_it_waited_for_a_writer_can_write(cache, interrupted_fork):
    before, go_on = some("before", 3), multiprocessing.get_context("fork").Event()
    assert cache.get_many(stored(cache, before)) == found(before)
    process = interrupted_fork(read_and_write_or_be_killed, cache, before, go_on)
    stored(cache, some("parent", 1))
    go_on.set()
    if process is not None:
        process.join(30)
        assert process.exitcode == 0


def test_finalizer_that_lets_go_of_a_dataset_while_another_is_taken_does_not_deadlock(cache, monkeypatch):
    class Holder:
        pass

    offset, collected = asyncds.locks._offset, []

    def collecting(name):
        if not collected:
            collected.append(gc.collect())  # as the interpreter may do wherever something is allocated
        return offset(name)

    cache.hold("dropped")
    holder = Holder()
    holder.itself = holder
    weakref.finalize(holder, cache.release, "dropped")
    gc.disable()
    try:
        del holder
        monkeypatch.setattr(asyncds.locks, "_offset", collecting)
        thread = threading.Thread(target=cache.hold, args=("taken",), daemon=True)
        thread.start()
        thread.join(10)
    finally:
        gc.enable()
    assert not thread.is_alive()
    assert cache._folder.datasets.take(b"dropped")
    assert not cache._folder.datasets.take(b"taken")


def claim_or_be_killed(cache):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(10)
    assert cache.claim(b"o" * 16)


def test_child_of_a_process_whose_read_only_cache_was_busy_at_the_fork_does_not_hang(cache, child):
    stored(cache, some("entry", 1))
    reader = Cache(cache.directory.parent, read_only=True)
    busy, go_on = threading.Event(), threading.Event()

    def hold_the_guard():
        with reader._folder.claims._guard:
            busy.set()
            assert go_on.wait(20)

    thread = threading.Thread(target=hold_the_guard)
    thread.start()
    assert busy.wait(20)
    process = child("fork", claim_or_be_killed, reader, wait=False)
    go_on.set()
    thread.join()
    process.join(30)
    assert process.exitcode == 0


# where it may lie


@pytest.mark.parametrize(
    "name",
    [
        "$PLACE",
        "${PLACE}/below",
        "x$PLACE",
        "$NOWHERE",
    ],
)
def test_directory_that_names_a_variable_is_refused_in_one_line(tmp_path, monkeypatch, name):
    monkeypatch.setenv("PLACE", "somewhere")
    with pytest.raises(CacheError, match="names a variable") as refused:
        Cache(tmp_path / name)
    assert "\n" not in str(refused.value)
    assert list(Path(tmp_path).iterdir()) == []


@pytest.mark.parametrize("busy", ["another thread writes", "another process stands still"])
def test_taking_data_over_waits_for_no_writer_and_costs_no_hit(cache, busy):
    theirs = some("theirs", 3)
    keys = stored(cache, theirs, "theirs")
    writing = cache._folder._writing
    if busy == "another thread writes":
        writing.acquire()
    else:
        cache._folder._locked_until = time.monotonic() + 30
    try:
        assert cache.get_many(keys, "ours") == found(theirs)
    finally:
        if busy == "another thread writes":
            writing.release()
        cache._folder._locked_until = 0.0
    assert cache.faults == 0
    assert cache.get_many(keys, "ours") == found(theirs)
    assert {row[3] for row in cache._select(keys).values()} == {"ours"}
    assert cache.check() == {}
