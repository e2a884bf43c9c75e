"""The cache: what comes back is what was stored, or nothing; no fault of the disk stops who uses it."""

import contextlib
import errno
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import sqlite3
import stat
import sys
import threading
import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from diskcache.core import MODE_PICKLE
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncds.audit import PROBLEMS
from asyncds.cache import INLINE_LIMIT, Cache, largest_that_fits
from asyncds.entry import Entry, NewEntry, entry_key, object_id, pack_header, unpack
from asyncds.errors import CacheError
from asyncds.mounts import network_filesystem
from asyncds.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

BIG = INLINE_LIMIT + 1000
BODIES = [b"", b"a", b"b" * (INLINE_LIMIT - 1), b"c" * INLINE_LIMIT, os.urandom(300_000)]


def new(number, body, etag="v1", **options):
    return NewEntry(object_id("http://store", "bucket", f"key-{number}"), etag, body, **options)


def key(entry):
    return entry_key(entry.object, entry.etag)


def stored(cache, *bodies):
    """Store these bodies, and return the entries and their keys."""
    entries = [new(number, body) for number, body in enumerate(bodies)]
    assert cache.put_many(entries) == len(entries)
    return entries, [key(entry) for entry in entries]


def database(cache):
    return cache.directory / "objects" / "cache.db"


def rows(cache, statement, *values):
    """What the database says to one statement, asked behind the cache's back."""
    connection = sqlite3.connect(database(cache))
    try:
        with connection:
            return connection.execute(statement, values).fetchall()
    finally:
        connection.close()


def file_of(cache, entry):
    ((name,),) = rows(cache, "SELECT filename FROM Cache WHERE key = ?", key(entry))
    return cache.directory / "objects" / name


def audit(cache):
    """Every file has its row and every row its file; what is accounted equals a recount."""
    count = len(cache)
    folder = cache.directory / "objects"
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.glob("*/*")}
    names = {name for (name,) in rows(cache, "SELECT filename FROM Cache WHERE filename IS NOT NULL")}
    assert files.keys() == names
    ((counted,),) = rows(cache, "SELECT value FROM Settings WHERE key = 'size'")
    inline = rows(cache, "SELECT value FROM Cache WHERE filename IS NULL")
    assert counted == sum(-(-size // 4096) * 4096 for size in files.values())
    assert count == len(names) + len(inline)
    assert rows(cache, "PRAGMA integrity_check") == [("ok",)]
    assert cache.check() == {}


@pytest.fixture
def cache(tmp_path):
    """An empty cache, which must pass its audit in the end."""
    cache = Cache(tmp_path / "cache")
    yield cache
    audit(cache)
    cache.close()


# storing and reading


def test_batch_comes_back_in_order_with_misses_in_place(cache):
    entries, keys = stored(cache, *BODIES)
    absent = key(new("absent", b""))
    found = cache.get_many([absent, *keys, absent, keys[1]])
    assert found == [None, *[Entry("v1", body) for body in BODIES], None, Entry("v1", b"a")]
    assert cache.present([absent, *keys]) == set(keys)
    assert len(cache) == len(entries)


def test_batch_of_thousands_comes_back(cache):
    _, keys = stored(cache, *(b"%d" % number for number in range(1500)))
    assert [entry.body for entry in cache.get_many(keys)] == [b"%d" % number for number in range(1500)]


def test_storing_again_changes_nothing(cache):
    entries, keys = stored(cache, *BODIES)
    volume = cache.volume()
    assert cache.put_many(entries) == len(entries)
    assert cache.volume() == volume
    assert cache.get_many(keys) == [Entry("v1", body) for body in BODIES]


def test_same_object_twice_in_a_batch_is_stored_once(cache):
    entry = new(1, b"x" * BIG)
    cache.put_many([entry, entry])
    assert cache.get_many([key(entry)]) == [Entry("v1", entry.body)]


def test_versions_of_an_object_lie_side_by_side(cache):
    one, two = new(1, b"old", "v1"), new(1, b"new" * BIG, "v2")
    cache.put_many([one, two])
    assert cache.get_many([key(two), key(one)]) == [Entry("v2", two.body), Entry("v1", b"old")]


def test_entries_outlive_the_handle(cache, tmp_path):
    _, keys = stored(cache, *BODIES)
    cache.close()
    assert Cache(tmp_path / "cache").get_many(keys) == [Entry("v1", body) for body in BODIES]
    assert cache.get_many(keys)[0] == Entry("v1", b"")


def test_removed_entries_are_gone_with_their_files(cache):
    _, keys = stored(cache, *BODIES)
    cache.remove(keys[1:])
    assert [entry is not None for entry in cache.get_many(keys)] == [True, False, False, False, False]


def test_store_bucket_and_key_tell_objects_apart():
    names = [("a", "b", "c"), ("a", "bc", ""), ("ab", "", "c"), ("a", "b", "C"), ("a", "b", "é"), ("a", "b", "e\u0301")]
    assert len({object_id(*name) for name in names}) == len(names)


def test_first_seen_version_is_remembered_until_forgotten(cache):
    listed, unlisted = new(1, b"x", "v1"), new(2, b"y", '"odd" é', first_seen=True)
    cache.put_many([listed, unlisted])
    objects = [listed.object, unlisted.object, new(3, b"").object]
    assert cache.first_seen(objects) == [None, '"odd" é', None]
    cache.put_many([new(2, b"z", "later", first_seen=True)])
    assert cache.first_seen(objects)[1] == "later"
    cache.forget_first_seen([unlisted.object, listed.object])
    assert cache.first_seen(objects) == [None, None, None]
    assert cache.get_many([key(listed), key(unlisted)]) == [Entry("v1", b"x"), Entry('"odd" é', b"y")]


def test_etag_of_zeros_is_not_taken_for_the_record_of_the_first_version(cache):
    zeros, seen = new(1, b"body", "0" * 32), new(1, b"other", "v1", first_seen=True)
    cache.put_many([zeros])
    assert cache.first_seen([zeros.object]) == [None]
    cache.put_many([seen])
    assert cache.get_many([key(zeros)]) in ([None], [Entry("0" * 32, b"body")])


def test_repr_tells_where_and_how_much(cache):
    stored(cache, b"a", b"b")
    assert repr(cache) == f"<Cache {cache.directory}: 2 entries, {cache.volume():,} bytes>"


# what is not exactly as it was written


@given(st.text(st.characters(codec="utf-8"), max_size=20), st.binary(max_size=100))
@settings(max_examples=100, deadline=None)
def test_value_unpacks_to_what_was_packed(etag, body):
    name = os.urandom(32)
    assert unpack(name, pack_header(name, etag, body) + body) == Entry(etag, body)


@pytest.mark.parametrize("body", [b"", b"some body"])
def test_every_flipped_bit_and_every_truncation_is_rejected(body):
    name = os.urandom(32)
    value = bytearray(pack_header(name, "etag-1", body) + body)
    assert unpack(name, bytes(value)) == Entry("etag-1", body)
    for position in range(len(value)):
        assert unpack(name, bytes(value[:position])) is None
        for bit in range(8):
            value[position] ^= 1 << bit
            assert unpack(name, bytes(value)) is None, (position, bit)
            value[position] ^= 1 << bit
    assert unpack(name, bytes(value) + b"\0") is None
    assert unpack(os.urandom(32), bytes(value)) is None


def swap(one, other):
    one.rename(one.with_name("third"))
    other.rename(one)
    one.with_name("third").rename(other)


DAMAGE = {
    "truncated": lambda path, other: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path, other: path.write_bytes(b""),
    "zeroed": lambda path, other: path.write_bytes(bytes(path.stat().st_size)),
    "bit rot": lambda path, other: path.write_bytes(path.read_bytes()[:-1] + b"\0"),
    "removed": lambda path, other: path.unlink(),
    "swapped": swap,
    "symlink": lambda path, other: (path.unlink(), path.symlink_to(other)),
    "fifo": lambda path, other: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_a_miss_that_repairs_itself_and_spares_the_batch(cache, damage):
    entries, keys = stored(cache, b"x" * BIG, b"small", b"y" * BIG)
    DAMAGE[damage](file_of(cache, entries[0]), file_of(cache, entries[2]))
    found = cache.get_many(keys)
    assert found[0] is None
    assert found[1] == Entry("v1", b"small")
    assert found[2] == (None if damage == "swapped" else Entry("v1", entries[2].body))
    assert cache.put_many(entries) == 3
    assert cache.get_many(keys) == [Entry("v1", entry.body) for entry in entries]
    assert cache.faults == 0


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("value", None),
        ("value", "text"),
        ("value", 7),
        ("value", b""),
        ("value", b"\x80\x04K\x01."),
        ("filename", ""),
        ("filename", 7),
        ("filename", b"ab/" + b"0" * 30 + b".obj"),
        ("filename", "ab/../../cache.db"),
        ("filename", "ab/" + "0" * 30 + ".obj\n"),
    ],
)
def test_poisoned_row_is_a_miss_that_repairs_itself(cache, column, value):
    entries, keys = stored(cache, b"one", b"two")
    rows(cache, f"UPDATE Cache SET {column} = ? WHERE key = ?", value, keys[0])
    assert cache.get_many(keys) == [None, Entry("v1", b"two")]
    assert cache.put_many(entries) == 2
    assert cache.get_many(keys) == [Entry("v1", b"one"), Entry("v1", b"two")]


def test_forged_etag_that_is_no_text_is_a_miss(cache):
    entries, (name,) = stored(cache, b"one")

    class Bytes(str):
        def encode(self, *_):
            return b"\xff\xfe"

    rows(cache, "UPDATE Cache SET value = ?", pack_header(name, Bytes(), b"one") + b"one")
    assert cache.get_many([name]) == [None]
    assert cache.put_many(entries) == 1


class Bomb:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return open, (str(self.place), "w")


@pytest.mark.parametrize("in_file", [False, True])
def test_pickle_in_the_cache_is_a_miss_and_runs_nothing(cache, tmp_path, in_file):
    payload = pickle.dumps(Bomb(tmp_path / "exploded"))
    entries, keys = stored(cache, b"x" * BIG if in_file else b"small")
    if in_file:
        file_of(cache, entries[0]).write_bytes(payload)
    else:
        rows(cache, "UPDATE Cache SET value = ?", payload)
    rows(cache, "UPDATE Cache SET mode = ?", MODE_PICKLE)
    rows(cache, "INSERT INTO Cache (key, raw, mode, value) VALUES (?, 0, ?, ?)", payload, MODE_PICKLE, payload)
    assert cache.get_many([*keys, payload]) == [None, None]
    assert cache.put_many(entries) == 1
    cache.remove([payload])
    assert cache.get_many(keys) == [Entry("v1", entries[0].body)]
    assert not (tmp_path / "exploded").exists()
    rows(cache, "DELETE FROM Cache WHERE raw = 0")


@pytest.mark.parametrize("way", ["../../../outside", "{outside}", "ab/../../../../outside", "ab/{hex}.obj/../../x"])
def test_file_outside_the_pattern_is_neither_opened_nor_deleted(cache, tmp_path, monkeypatch, way):
    entries, keys = stored(cache, b"body")
    outside = tmp_path / "outside"
    outside.write_bytes(pack_header(keys[0], "v1", b"body") + b"body")
    name = way.format(outside=outside, hex="0" * 30)
    rows(cache, "UPDATE Cache SET value = NULL, filename = ?", name)
    opened, real = [], os.open

    def watched(path, *arguments, **options):
        opened.append(os.fspath(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", watched)
    assert cache.get_many(keys) == [None]
    assert opened == []
    assert outside.exists()
    assert cache.put_many(entries) == 1


PLANTS = {
    "trigger": [
        "CREATE TABLE loot (key)",
        "CREATE TRIGGER planted AFTER INSERT ON Cache BEGIN INSERT INTO loot VALUES (NEW.key); END",
    ],
    "pragma": ["INSERT INTO Settings VALUES ('sqlite_user_version', 77)"],
    "option": ["INSERT INTO Settings VALUES ('disk_evil', 1)"],
    "eviction": ["UPDATE Settings SET value = 'least-recently-stored' WHERE key = 'eviction_policy'"],
}


@pytest.mark.parametrize("plant", PLANTS)
def test_what_was_planted_in_the_database_has_no_effect(tmp_path, plant):
    cache = Cache(tmp_path)
    stored(cache, b"one")
    for statement in PLANTS[plant]:
        rows(cache, statement)
    cache.close()
    with warnings.catch_warnings(record=True, action="always") as caught:
        cache = Cache(tmp_path)
    assert len(caught) == (plant != "eviction"), "an index that diskcache did not make is set aside"
    _, keys = stored(cache, b"one", b"two")
    assert cache.get_many(keys) == [Entry("v1", b"one"), Entry("v1", b"two")]
    tables = {name for (name,) in rows(cache, "SELECT name FROM sqlite_master")}
    assert "loot" not in tables or rows(cache, "SELECT * FROM loot") == []
    assert rows(cache, "PRAGMA user_version") == [(0,)]


# the limit


@pytest.mark.parametrize("size", [1000, BIG])
def test_volume_stays_within_the_limit_and_nothing_is_evicted(tmp_path, size):
    cache = Cache(tmp_path, limit=1 << 20)
    kept = []
    for start in range(0, 2000, 20):
        entries = [new(number, os.urandom(size)) for number in range(start, start + 20)]
        before = cache.present(kept)
        cache.put_many(entries)
        kept += cache.present([key(entry) for entry in entries])
        assert cache.present(kept) >= before
        assert cache.volume() <= (1 << 20) + 20 * (size + 4096)
        if start > 60 and not cache.present([key(entry) for entry in entries]):
            break
    assert cache.volume() > 0.8 * (1 << 20)
    assert len(cache) == len(kept)
    assert cache.put_many([new("last", b"x" * size)]) == 0
    assert all(entry is not None for entry in cache.get_many(kept))
    audit(cache)


def test_object_larger_than_the_cache_is_passed_over(tmp_path):
    cache = Cache(tmp_path, limit=200_000)
    entries = [new(1, b"small"), new(2, bytes(300_000)), new(3, b"small too")]
    assert cache.put_many(entries) == 2
    assert [entry is not None for entry in cache.get_many([key(entry) for entry in entries])] == [True, False, True]


@pytest.mark.parametrize("share", ["50%", "100%"])
def test_share_of_the_disk_is_a_limit(tmp_path, share):
    stored(Cache(tmp_path, limit=Settings(cache_size=share).cache_size), b"a" * BIG)


def test_free_space_is_kept_free(tmp_path, monkeypatch):
    cache, real = Cache(tmp_path), os.statvfs

    def nearly_full(path):
        disk = list(real(path))
        disk[4] = int(disk[2] * 0.05) + 100  # f_bavail, in blocks
        return os.statvfs_result(disk)

    monkeypatch.setattr(os, "statvfs", nearly_full)
    room = 100 * real(tmp_path).f_frsize
    assert cache.put_many([new(1, bytes(room // 2)), new(2, bytes(room)), new(3, b"x" * 100)]) == 2


# threads and processes


def check(directory, keys, bodies, number):
    """In another process: read what is there, add something of one's own."""
    cache = Cache(directory)
    assert [entry.body for entry in cache.get_many(keys)] == bodies
    assert cache.put_many([new(f"process-{number}-{i}", b"x" * (BIG * (i % 2))) for i in range(50)]) == 50


def check_inherited(cache, keys, bodies):
    assert [entry.body for entry in cache.get_many(keys)] == bodies
    assert cache.put_many([new("child", b"of the child")]) == 1
    cache.close()


def test_forked_child_reads_and_writes_while_the_parent_goes_on(cache, child):
    _, keys = stored(cache, *BODIES)
    assert None not in cache.get_many(keys)
    child("fork", check_inherited, cache, keys, BODIES)
    assert cache.get_many([key(new("child", b""))]) == [Entry("v1", b"of the child")]
    assert cache.put_many([new("parent", b"after")]) == 1
    assert [entry.body for entry in cache.get_many(keys)] == BODIES


def test_fork_while_a_thread_writes_hangs_nobody(cache, child):
    _, keys = stored(cache, *BODIES)
    stop, numbers = threading.Event(), []

    def write():
        while not stop.is_set():
            numbers.append(cache.put_many([new(f"thread-{len(numbers)}", b"y" * BIG)]))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(20):
            child("fork", check_inherited, cache, keys, BODIES)
    finally:
        stop.set()
        thread.join()
    assert set(numbers) == {1}


def test_threads_share_a_cache(cache):
    errors = []

    def work(name):
        try:
            for number in range(30):
                entry = new(f"{name}-{number}", name.encode() * (BIG if number % 3 == 0 else 1))
                assert cache.put_many([entry, new(f"all-{number}", b"same")]) == 2
                assert cache.get_many([key(entry)]) == [Entry("v1", entry.body)]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(cache) == 4 * 30 + 30


def test_processes_share_a_directory(cache, child):
    _, keys = stored(cache, *BODIES)
    arguments = cache.directory.parent, keys, BODIES
    processes = [child(method, check, *arguments, number, wait=False) for number, method in enumerate(["spawn"] * 2)]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(cache) == len(BODIES) + 100


def open_when_told(directory, barrier):
    barrier.wait()
    assert Cache(directory).put_many([new(os.getpid(), b"x")]) == 1


def test_processes_may_open_a_new_directory_at_once(tmp_path, child):
    barrier = multiprocessing.get_context("fork").Barrier(4)
    processes = [child("fork", open_when_told, tmp_path, barrier, wait=False) for _ in range(4)]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4


def test_directory_that_another_process_is_about_to_mark_can_be_opened(tmp_path, monkeypatch):
    real, nested = Path.write_text, []

    def slowly(path, text, *arguments, **options):
        if not nested:
            nested.append(path)
            path.write_bytes(b"")
            Cache(tmp_path)
            nested.pop()
        return real(path, text, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", slowly)
        Cache(tmp_path)
    assert json.loads((tmp_path / "asyncds" / "format.json").read_text())["format"] == 1


def put_and_die(directory, number):
    cache = Cache(directory)
    cache.put_many([new(i, b"z" * BIG) for i in range(number)])
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_stored_is_there(cache, child):
    process = child("fork", put_and_die, cache.directory.parent, 10, wait=False)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert cache.get_many([key(new(i, b"")) for i in range(10)]) == [Entry("v1", b"z" * BIG)] * 10


def die_before_the_row_is_there(directory):
    real = os.rename

    def rename(*arguments, **places):
        real(*arguments, **places)
        os.kill(os.getpid(), signal.SIGKILL)

    os.rename = rename
    Cache(directory).put_many([new(1, b"z" * BIG)])


def test_writer_killed_between_file_and_row_leaves_a_miss(tmp_path, child):
    process = child("fork", die_before_the_row_is_there, tmp_path, wait=False)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "asyncds" / "objects").glob("*/*.obj"))) == 1
    cache = Cache(tmp_path)
    assert cache.get_many([key(new(1, b""))]) == [None]
    assert cache.put_many([new(1, b"z" * BIG)]) == 1
    assert cache.get_many([key(new(1, b""))]) == [Entry("v1", b"z" * BIG)]


# faults


class FailNth:
    """A layer over `os` whose n-th call fails with an errno; `calls` tells how many there were."""

    def __init__(self, monkeypatch, n, number):
        self.calls = 0
        for name in ("open", "rename", "mkdir", "statvfs", "unlink"):
            monkeypatch.setattr(os, name, self._failing(getattr(os, name), n, number))

    def _failing(self, function, n, number):
        def call(*arguments, **options):
            self.calls += 1
            if self.calls == n:
                raise OSError(number, os.strerror(number))
            return function(*arguments, **options)

        return call


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EMFILE], ids=errno.errorcode.get)
@pytest.mark.filterwarnings("ignore:the cache in")
def test_whichever_call_fails_storing_does_not_raise_and_leaves_no_litter(tmp_path, monkeypatch, number):
    n, failing = 0, None
    while failing is None or failing.calls >= n:
        n += 1
        cache = Cache(tmp_path / str(n))
        entries, keys = stored(cache, b"before")
        cache.get_many(keys)
        entries += [new("big", b"x" * BIG), new("small", b"small"), new("big too", b"y" * BIG)]
        with monkeypatch.context() as patch:
            failing = FailNth(patch, n, number)
            cache.put_many(entries)
        audit(cache)
        assert cache.put_many(entries) == 4
        assert cache.get_many([key(entry) for entry in entries]) == [Entry("v1", entry.body) for entry in entries]
    assert n > 4


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE], ids=errno.errorcode.get)
def test_file_that_cannot_be_read_is_a_miss_with_one_warning_and_spares_the_batch(cache, monkeypatch, number):
    entries, keys = stored(cache, b"x" * BIG, b"small")
    with monkeypatch.context() as patch:
        FailNth(patch, 1, number)
        with pytest.warns(UserWarning, match=os.strerror(number)) as caught:
            found = cache.get_many(keys)
    assert found == [None, Entry("v1", b"small")]
    assert (len(caught), cache.faults) == (1, 1)
    cache.put_many(entries)
    assert cache.get_many(keys) == [Entry("v1", entry.body) for entry in entries]


def store_beyond_the_limit(cache):
    entries = [new("small", b"s"), new("giant", bytes(1 << 20))]
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 10, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.warns(UserWarning, match="File too large") as caught:
        assert [cache.put_many(entries) for _ in range(3)] == [1, 1, 1]
    assert (len(caught), cache.faults) == (1, 3)
    assert cache.get_many([key(new(0, b""))]) == [Entry("v1", b"before")]


def test_full_disk_degrades_with_one_warning(cache, child):
    stored(cache, b"before")
    child("fork", store_beyond_the_limit, cache)


def test_processes_of_a_run_warn_once_among_them(tmp_path, child):
    caches = [Cache(tmp_path, limit=1, notices=tmp_path / run) for run in ("run", "run", "another")]
    with pytest.warns(UserWarning, match="is full: what does not fit is downloaded again"):
        caches[0].put_many([new(1, b"x")])
    assert [cache.put_many([new(1, b"x")]) for cache in caches[:2]] == [0, 0]
    child("spawn", store_in_silence, caches[1].directory.parent, tmp_path / "run")
    with pytest.warns(UserWarning, match="is full"):
        caches[2].put_many([new(1, b"x")])


def store_in_silence(folder, notices):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Cache(folder, limit=1, notices=notices).put_many([new(1, b"x")]) == 0


def test_warning_says_what_cannot_be_done_and_the_remedy(cache, monkeypatch):
    with monkeypatch.context() as patch:
        FailNth(patch, 1, errno.ENOSPC)
        with pytest.warns(UserWarning, match="the cache in") as caught:
            cache.put_many([new(1, b"x")])
    message = str(caught[0].message)
    assert message.startswith(f"the cache in {cache.directory} cannot be written (No space left on device)")
    assert "ASYNCDS_CACHE_DIR" in message


DISASTERS = {
    "a directory": lambda cache: (database(cache).unlink(), database(cache).mkdir()),
}


@pytest.mark.parametrize("disaster", DISASTERS)
def test_broken_database_degrades_with_one_warning(tmp_path, disaster):
    cache = Cache(tmp_path)
    entries, keys = stored(cache, *BODIES)
    cache.close()
    for leftover in database(cache).parent.glob("cache.db-*"):
        leftover.unlink()
    DISASTERS[disaster](cache)

    def use():
        return cache.get_many(keys), cache.put_many(entries), cache.present(keys), cache.first_seen([entries[0].object])

    with pytest.warns(UserWarning, match="objects come straight from the store") as caught:
        assert use() == ([None] * len(keys), 0, set(), [None])
    assert len(caught) == 1
    assert cache.faults >= 4


def wrecked_header(path):
    path.write_bytes(b"garbage " * 1000)


def wrecked_pages(path):
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xa5" * (len(content) - 4096))


def emptied(path):
    path.write_bytes(b"")


def without_its_table(path):
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("DROP TABLE Cache")
    connection.close()


@pytest.mark.parametrize("open_before", [False, True])
@pytest.mark.parametrize("wreck", [wrecked_header, wrecked_pages, emptied, without_its_table])
@pytest.mark.filterwarnings("ignore:the cache in")
def test_damaged_index_is_set_aside_and_made_anew_and_its_space_taken_back(tmp_path, wreck, open_before):
    cache = Cache(tmp_path)
    entries, keys = stored(cache, *BODIES)
    cache.close()
    for leftover in database(cache).parent.glob("cache.db-*"):
        leftover.unlink()
    if not open_before:
        wreck(database(cache))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = Cache(tmp_path)
        cache.sweep()
        if open_before:
            wreck(database(cache))
        for _ in range(3):
            assert all(
                entry in (None, Entry("v1", body)) for entry, body in zip(cache.get_many(keys), BODIES, strict=True)
            )
            cache.put_many(entries)
    assert len({str(warning.message) for warning in caught}) <= 2
    assert cache.get_many(keys) == [Entry("v1", body) for body in BODIES]
    cache.sweep()
    audit(cache)


@pytest.mark.filterwarnings("ignore:the cache")
def test_broken_database_breaks_neither_repr_nor_refresh(tmp_path):
    cache = Cache(tmp_path)
    database(cache).write_bytes(b"garbage " * 1000)
    assert str(cache.directory) in repr(cache)
    cache.forget_first_seen([new(1, b"").object])
    cache.remove([key(new(1, b""))])


def open_with_descriptors(directory, spare):
    used = len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with contextlib.suppress(CacheError), warnings.catch_warnings(action="ignore"):
        Cache(directory)


@pytest.mark.parametrize("spare", range(5))
def test_process_short_of_descriptors_takes_nothing_from_the_others(tmp_path, child, spare):
    cache = Cache(tmp_path)
    _, keys = stored(cache, *BODIES)
    cache.close()
    child("fork", open_with_descriptors, tmp_path, spare)
    assert list(cache.directory.glob("damaged*")) == []
    assert cache.get_many(keys) == [Entry("v1", body) for body in BODIES]
    audit(cache)


@pytest.mark.filterwarnings("ignore:the cache in")
def test_directory_that_vanishes_under_a_job_does_not_stop_it(tmp_path):
    cache = Cache(tmp_path / "cache")
    entries, keys = stored(cache, *BODIES)
    cache.close()
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    assert cache.get_many(keys) == [None] * len(keys)
    assert cache.put_many(entries) in (0, len(entries))


# the audit


def first_file(cache):
    return next((cache.directory / "objects").glob("*/*.obj"))


def overwrite(path, content):
    path.write_bytes(content)


SEEDED = {
    "damaged": lambda cache: overwrite(first_file(cache), first_file(cache).read_bytes()[:-1]),
    "missing": lambda cache: first_file(cache).unlink(),
    "orphan": lambda cache: shutil.copy(first_file(cache), first_file(cache).with_name("0" * 30 + ".obj")),
    "temporary": lambda cache: first_file(cache).with_suffix(".tmp").touch(0o600),
    "accounting": lambda cache: rows(cache, "UPDATE Settings SET value = value + 1 WHERE key = 'size'"),
    "permissions": lambda cache: first_file(cache).chmod(0o644),
    "index": lambda cache: wrecked_pages(database(cache)),
}


@pytest.mark.parametrize("kind", SEEDED)
@pytest.mark.filterwarnings("ignore:the cache")
def test_audit_names_what_is_wrong_and_mends_it(tmp_path, kind):
    cache = Cache(tmp_path)
    _, keys = stored(cache, *BODIES)
    assert cache.check() == {}
    if kind == "index":
        cache.close()
        for leftover in database(cache).parent.glob("cache.db-*"):
            leftover.unlink()
    SEEDED[kind](cache)
    problems = cache.check(fix=True)
    assert (kind in problems, set(PROBLEMS) >= problems.keys()) == (True, True)
    if kind != "index":
        assert ([*problems], len(problems[kind])) == ([kind], 1)
    assert cache.check() == {}
    assert all(entry in (None, Entry("v1", body)) for entry, body in zip(cache.get_many(keys), BODIES, strict=True))
    audit(cache)


def test_audit_reports_what_is_foreign_and_leaves_it_alone(cache, tmp_path):
    stored(cache, *BODIES)
    (tmp_path / "outside").write_bytes(b"outside")
    foreign = [(cache.directory / "objects") / "notes.txt", first_file(cache).with_name("a.obj")]
    for path in foreign:
        path.touch(0o600)
    link = first_file(cache).with_name("1" * 30 + ".obj")
    link.symlink_to(tmp_path / "outside")
    assert {kind: sorted(paths) for kind, paths in cache.check(fix=True).items()} == {
        "foreign": sorted(map(str, [*foreign, link]))
    }
    assert (tmp_path / "outside").read_bytes() == b"outside"
    for path in [*foreign, link]:
        path.unlink()


def test_folder_that_became_a_link_while_the_cache_is_open_is_not_written_through(cache, tmp_path):
    entries, keys = stored(cache, b"b" * BIG)
    outside = tmp_path / "outside"
    outside.mkdir()
    for number in range(256):
        shutil.rmtree(cache.directory / "objects" / f"{number:02x}", ignore_errors=True)
        (cache.directory / "objects" / f"{number:02x}").symlink_to(outside)
    assert cache.get_many(keys) == [None]
    with pytest.warns(UserWarning, match="cannot be written"):
        assert cache.put_many(entries) == 0
    assert list(outside.iterdir()) == []
    assert len(cache.check()["foreign"]) == 256
    Cache(cache.directory.parent).close()  # whoever opens it removes them


def test_linked_folder_is_not_followed_and_its_removal_is_told(tmp_path):
    (tmp_path / "asyncds").mkdir(mode=0o700)
    (tmp_path / "larger disk").mkdir()
    (tmp_path / "asyncds" / "objects").symlink_to(tmp_path / "larger disk")
    with pytest.warns(UserWarning, match=r"objects was a link .* removed: to have .* set ASYNCDS_CACHE_DIR"):
        cache = Cache(tmp_path)
    stored(cache, b"b" * BIG)
    assert list((tmp_path / "larger disk").iterdir()) == []


def test_room_is_kept_for_what_is_arriving_in_parts(tmp_path):
    cache = Cache(tmp_path, limit=3 << 20)
    first = cache.begin(new(1, b"").object, "v1", 2 << 20)
    assert cache.begin(new(2, b"").object, "v1", 2 << 20) is None
    first.abandon()
    second = cache.begin(new(2, b"").object, "v1", 2 << 20)
    second.write(0, bytes(2 << 20))
    second.finish()
    assert (cache.volume() > 2 << 20, cache.room() > (1 << 20) - (64 << 10)) == (True, True)
    audit(cache)


def test_row_that_another_process_has_removed_meanwhile_is_not_damaged(cache, monkeypatch):
    _, keys = stored(cache, b"b" * BIG)
    seen = cache._folder.query("SELECT key, filename, value, tag FROM Cache")
    cache.remove(keys)
    with monkeypatch.context() as patch:
        patch.setattr(cache._folder, "query", lambda *_: seen)
        assert cache.get_many(keys) == [None]
    assert cache.damaged == 0


@pytest.mark.parametrize("writing", [True, False])
def test_pipe_in_the_place_of_a_file_is_a_miss(cache, writing):
    entries, keys = stored(cache, b"b" * BIG)
    path = first_file(cache)
    path.unlink()
    os.mkfifo(path, 0o600)
    ends = os.open(path, os.O_RDWR | os.O_NONBLOCK) if writing else None
    assert cache.get_many(keys) == [None]
    if ends is not None:
        os.close(ends)
    assert cache.put_many(entries) == 1
    path.unlink(missing_ok=True)


# the sweep


def litter(cache, count=3):
    """Files such as a writer leaves that was killed before it had written their rows."""
    folder = (cache.directory / "objects") / "ab"
    folder.mkdir(0o700, exist_ok=True)
    paths = [folder / f"{number:030x}{ending}" for number in range(count) for ending in (".obj", ".tmp")]
    for path in paths:
        path.write_bytes(b"x" * 5000)
        path.chmod(0o600)
    return paths


def test_sweep_takes_back_what_no_row_names_and_nothing_else(cache):
    _, keys = stored(cache, *BODIES)
    litter(cache)
    assert cache.check().keys() == {"orphan", "temporary"}
    assert cache.sweep() == 6 * 8192
    assert cache.sweep() == 0
    assert cache.get_many(keys) == [Entry("v1", body) for body in BODIES]


def test_file_that_is_being_written_is_no_litter(cache, monkeypatch):
    swept, commit = [], Cache.commit

    def sweeping(self, written, tag):
        swept.append((self.sweep(), self.check()))
        return commit(self, written, tag)

    monkeypatch.setattr(Cache, "commit", sweeping)
    _, keys = stored(cache, b"b" * BIG)
    assert swept == [(0, {})]
    assert cache.get_many(keys) == [Entry("v1", b"b" * BIG)]


def write_and_wait(cache, written, go_on):
    commit = Cache.commit

    def waiting(self, *values):
        written.set()
        assert go_on.wait(20)
        return commit(self, *values)

    with patch.object(Cache, "commit", waiting):
        stored(cache, b"b" * BIG)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_file_that_another_process_is_writing_is_no_litter(cache, method):
    context = multiprocessing.get_context(method)
    written, go_on = context.Event(), context.Event()
    process = context.Process(target=write_and_wait, args=(cache if method == "fork" else None, written, go_on))
    if method == "spawn":
        process = context.Process(target=open_and_write, args=(cache.directory.parent, written, go_on))
    process.start()
    assert written.wait(20)
    assert (cache.sweep(), cache.check()) == (0, {})
    go_on.set()
    process.join(20)
    assert process.exitcode == 0
    assert cache.get_many([key(new(0, b""))]) == [Entry("v1", b"b" * BIG)]


def open_and_write(folder, written, go_on):
    write_and_wait(Cache(folder), written, go_on)


def test_next_run_sweeps_by_itself_after_a_kill_and_does_not_otherwise(tmp_path, child):
    cache = Cache(tmp_path)
    stored(cache, b"b" * BIG)
    process = child("spawn", write_and_die, tmp_path, wait=False)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert cache.check().keys() == {"orphan"}
    reopened = Cache(tmp_path)
    while cache.check():  # for as long as the test has time
        pass
    reopened.close()
    cache.close()


def write_and_die(folder):
    Cache.commit = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    stored(Cache(folder), b"b" * BIG, b"c" * BIG)


# the folder


def test_folder_is_private(cache):
    stored(cache, *BODIES)
    cache.get_many([])
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [cache.directory, *cache.directory.rglob("*")]}
    assert {path for path, mode in modes.items() if path.is_dir() and mode != 0o700} == set()
    assert {path for path, mode in modes.items() if not path.is_dir() and mode != 0o600} == set()


def test_folder_tells_backups_what_it_is(cache):
    assert (cache.directory / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_directory_that_cannot_be_used_is_an_error_at_open(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"cannot be used as a cache \(.*\): set ASYNCDS_CACHE_DIR"):
        Cache(tmp_path / place)


def test_directory_of_another_owner_is_refused(tmp_path, monkeypatch):
    Cache(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(CacheError, match=r"belongs to user \d+: set ASYNCDS_CACHE_DIR"):
        Cache(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"format": 2}', "is of format 2, this asyncds knows 1"), ("[]", "is damaged"), ("{}", "is damaged")],
)
def test_folder_of_a_newer_or_unknown_format_is_refused(tmp_path, content, message):
    cache = Cache(tmp_path)
    _, keys = stored(cache, b"kept")
    (cache.directory / "format.json").write_text(content)
    with pytest.raises(CacheError, match=message):
        Cache(tmp_path)
    assert cache.get_many(keys) == [Entry("v1", b"kept")]


def test_full_cache_says_so_once(tmp_path):
    cache = Cache(tmp_path, limit=1)
    with pytest.warns(UserWarning, match=r"is full: .* raise ASYNCDS_CACHE_SIZE") as caught:
        assert [cache.put_many([new(number, b"x")]) for number in range(3)] == [0, 0, 0]
    assert len(caught) == 1


# filesystems


MOUNTS = r"""22 1 0:21 / / rw,relatime - ext4 /dev/vda rw
30 22 0:40 / /home rw - nfs4 server:/home rw
31 30 0:41 / /home/with\040space rw - tmpfs tmpfs rw
32 22 0:42 / /mnt/bucket rw - fuse.mount-s3 mount-s3 rw
33 22 0:43 / /var/lib rw - fuse.fuse-overlayfs overlay rw
34 22 0:44 / /again rw - ext4 /dev/vdb rw
35 22 0:45 / /again rw - lustre lustre rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/tmp/cache", None),
        ("/home/me/.cache", "nfs4"),
        ("/homestead", None),
        ("/home/with space/x", None),
        ("/mnt/bucket/a/b", "fuse.mount-s3"),
        ("/var/lib/x", None),
        ("/again", "lustre"),
    ],
)
def test_filesystem_of_a_network_is_recognised(tmp_path, monkeypatch, path, kind):
    (tmp_path / "mountinfo").write_text(MOUNTS)
    monkeypatch.setattr("asyncds.mounts._MOUNTS", tmp_path / "mountinfo")
    assert network_filesystem(Path(path)) == kind


def test_cache_on_a_network_filesystem_is_refused_if_named_and_moved_if_not(tmp_path, monkeypatch):
    mounts, local = tmp_path / "mountinfo", tmp_path / "local"
    local.mkdir(mode=0o700)
    mounts.write_text(f"1 0 0:1 / / rw - nfs4 x rw\n2 1 0:2 / {local} rw - ext4 x rw\n")
    monkeypatch.setattr("asyncds.mounts._MOUNTS", mounts)
    with pytest.raises(CacheError, match=r"network filesystem \(nfs4\).*ASYNCDS_CACHE_DIR"):
        Cache(tmp_path / "named")
    assert not (tmp_path / "named").exists()
    monkeypatch.delenv("ASYNCDS_CACHE_DIR")
    monkeypatch.setenv("TMPDIR", os.fspath(local))
    with pytest.warns(UserWarning, match="ASYNCDS_CACHE_DIR"):
        assert Settings().cache_dir == local
    local.chmod(0o777)  # a directory of all, where a name can be taken by others
    with pytest.raises(CacheError, match="network filesystem"):
        Cache(Settings().cache_dir)
    monkeypatch.setenv("TMPDIR", os.fspath(tmp_path / "elsewhere"))
    with pytest.raises(CacheError, match="network filesystem"):
        Cache(Settings().cache_dir)


# formats and permissions


def test_older_format_is_set_aside_and_a_newer_one_refused(tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    _, keys = stored(cache, *BODIES)
    cache.close()
    monkeypatch.setattr("asyncds.folder.FORMAT", 2)
    with pytest.warns(UserWarning, match="of format 1: it was moved to"):
        cache = Cache(tmp_path)
    assert cache.get_many(keys) == [None] * len(keys)
    stored(cache, *BODIES)
    cache.close()
    assert len([*cache.directory.glob("objects-of-format-1-*")]) == 1
    monkeypatch.setattr("asyncds.folder.FORMAT", 1)
    with pytest.raises(CacheError, match="is of format 2, this asyncds knows 1"):
        Cache(tmp_path)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_folder_that_others_may_write_to_is_refused(tmp_path, mode):
    folder = Cache(tmp_path).directory
    folder.chmod(mode)
    with pytest.raises(CacheError, match="may be written by others"):
        Cache(tmp_path)
    folder.chmod(0o755)
    Cache(tmp_path)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


# folders that are only read


def snapshot(folder):
    return {path: (path.lstat().st_mtime_ns, path.is_dir() or path.read_bytes()) for path in folder.rglob("*")}


@pytest.fixture
def sealed(tmp_path, monkeypatch):
    """A cache with entries, in a folder that cannot be written as far as asyncds can see."""
    cache = Cache(tmp_path)
    _, keys = stored(cache, *BODIES)
    cache.close()
    monkeypatch.setattr("asyncds.folder.os.access", lambda *_: False)
    before = snapshot(tmp_path)
    yield tmp_path, keys
    assert snapshot(tmp_path) == before


def test_folder_that_cannot_be_written_is_read(sealed):
    folder, keys = sealed
    cache = Cache(folder)
    assert cache.read_only
    assert cache.get_many(keys) == [Entry("v1", body) for body in BODIES]
    with pytest.warns(UserWarning, match="is read-only: what it lacks"):
        assert cache.put_many([new("more", b"x")]) == 0
    assert cache.put_many([new("more", b"x", first_seen=True)]) == 0
    assert (cache.room(), cache.begin(new("large", b"").object, "v1", 1 << 25), cache.faults) == (0, None, 0)
    cache.hold("dataset")
    cache.release("dataset")
    assert (cache.sweep(), cache.check()) == (0, {})
    with pytest.raises(CacheError, match="nothing in it can be mended"):
        cache.check(fix=True)
    cache.close()


def test_damage_in_a_folder_that_cannot_be_written_is_a_miss(tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    _, keys = stored(cache, b"b" * BIG)
    first_file(cache).write_bytes(b"damaged")
    cache.close()
    monkeypatch.setattr("asyncds.folder.os.access", lambda *_: False)
    cache = Cache(tmp_path)
    for _ in range(2):
        assert cache.get_many(keys) == [None]
    assert (cache.damaged, cache.faults) == (2, 0)


def test_folder_of_another_user_is_read_only_when_asked_for(tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    _, keys = stored(cache, *BODIES)
    cache.close()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(CacheError, match=r"belongs to user .*ASYNCDS_CACHE_READ_ONLY"):
        Cache(tmp_path)
    cache = Cache(tmp_path, read_only=True)
    assert cache.get_many(keys) == [Entry("v1", body) for body in BODIES]
    cache.directory.chmod(0o777)
    with pytest.raises(CacheError, match="may be written by others"):
        Cache(tmp_path, read_only=True)


@pytest.mark.parametrize("what", ["nothing", "an empty folder", "another format"])
def test_reading_only_what_is_not_there_is_an_error(tmp_path, what):
    if what == "an empty folder":
        (tmp_path / "asyncds").mkdir(0o700)
    if what == "another format":
        Cache(tmp_path).close()
        (tmp_path / "asyncds" / "format.json").write_text('{"format": 7}')
    with pytest.raises(CacheError):
        Cache(tmp_path, read_only=True)


# which objects are kept


@given(st.lists(st.integers(-1, 200_000), max_size=40), st.integers(0, 2_000_000))
def test_largest_that_fits_lets_the_smallest_in(sizes, room):
    largest = largest_that_fits(np.array(sizes, np.int64), room)
    kept = sorted(size for size in sizes if size >= 0 and (largest is None or size <= largest))
    below = [size for size in kept if size != largest]
    assert sum(below) <= room
    if largest is not None:
        assert sum(-(-size // 4096) * 4096 + 4096 for size in sorted(s for s in sizes if s >= 0)) > room
