"""The cache on disk under a storm: killed processes, flipped bytes, and a folder that somebody has poisoned."""

import contextlib
import ctypes
import functools
import itertools
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import sqlite3
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from multiprocessing.sharedctypes import RawValue
from pathlib import Path

import pytest
from diskcache.core import MODE_PICKLE

from asyncds.cache import INLINE_LIMIT, Cache
from asyncds.entry import Entry, NewEntry, entry_key, object_id, pack_header
from asyncds.errors import CacheError

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs fork, and FIFOs that Linux opens for both"),
]
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 1 << 30 else None
PATTERNS = 0x01, 0x80, 0xFF
KNOWN = re.compile(
    r"CACHEDIR\.TAG|format\.json|objects|datasets|locks|manifests|stats|objects/cache\.db(-wal|-shm)?|objects/[0-9a-f]{2}"
    r"|objects/[0-9a-f]{2}/[0-9a-f]{30}\.obj|datasets/[0-9a-f]{32}\.json|locks/(datasets|files|claims|dirty|sweeping)"
)


@pytest.fixture
def tmp_path():
    """A folder in memory, where there is room: nothing here is about what reaches a disk."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@functools.lru_cache(1000)
def new(name: str, etag: str = "v1") -> NewEntry:
    """An entry with a body of its own: small ones go into the row, and large ones into a file."""
    chance = random.Random(name + etag)
    size = INLINE_LIMIT + chance.randrange(8000) if name.endswith("large") else chance.randrange(800)
    return NewEntry(object_id("http://store", "bucket", name), etag, chance.randbytes(size))


def some(name: str, count: int) -> list[NewEntry]:
    return [new(f"{name}-{number}-{size}") for number in range(count) for size in ("small", "large")]


def keys(entries: list[NewEntry]) -> list[bytes]:
    return [entry_key(entry.object, entry.etag) for entry in entries]


def read(cache: Cache, entries: list[NewEntry]) -> list[bool]:
    """Which of them are there, after a look at every byte."""
    found = cache.get_many(keys(entries))
    for entry, got in zip(entries, found, strict=True):
        assert got in (None, Entry(entry.etag, entry.body)), "a wrong entry"
    return [got is not None for got in found]


def rows(directory: Path, statement: str, *values: object) -> list[tuple]:
    """What the database says to one statement, asked behind the cache's back."""
    with contextlib.closing(sqlite3.connect(directory / "objects" / "cache.db")) as connection, connection:
        return connection.execute(statement, values).fetchall()


def files(directory: Path) -> dict[str, Path]:
    return {f"{path.parent.name}/{path.name}": path for path in (directory / "objects").glob("??/*")}


def closed(cache: Cache) -> Path:
    """Close a cache so that its folder can be copied: all is in the database, and none in its log."""
    cache.close()
    rows(cache.directory, "PRAGMA wal_checkpoint(TRUNCATE)")
    assert not list((cache.directory / "objects").glob("cache.db-*"))
    return cache.directory.parent


def settle(cache: Cache) -> None:
    """One sweep, after which all must be well, by the cache's audit of itself and by a recount of ours."""
    cache.sweep()
    assert cache.check() == {}
    assert (cache.faults, cache.damaged) == (0, 0)
    named = rows(cache.directory, "SELECT filename FROM Cache WHERE filename IS NOT NULL")
    assert sorted(files(cache.directory)) == sorted(name for (name,) in named)
    blocks = sum(-(-path.stat().st_size // 4096) * 4096 for path in files(cache.directory).values())
    ((count,),) = rows(cache.directory, "SELECT count(*) FROM Cache")
    counted = rows(cache.directory, "SELECT key, value FROM Settings WHERE key IN ('count', 'size') ORDER BY key")
    assert counted == [("count", count), ("size", blocks)]
    assert rows(cache.directory, "PRAGMA integrity_check") == [("ok",)]
    names = [path.relative_to(cache.directory).as_posix() for path in cache.directory.rglob("*")]
    assert [name for name in names if not KNOWN.fullmatch(name)] == []


# processes that are killed


class Doom:
    """Kills this process before or after its n-th call of one kind; `progress` counts the calls of all kinds."""

    def __init__(self, kind, n, after, progress=None):
        self._kind, self._left, self._after = kind, n, after
        self._progress = ctypes.c_ulong() if progress is None else progress
        for name in ("open", "pwrite", "rename", "replace", "mkdir", "unlink"):
            setattr(os, name, functools.partial(self.call, name, getattr(os, name)))
        doom = self

        class Connection(sqlite3.Connection):
            def execute(self, statement, *values):
                kind = "commit" if statement == "COMMIT" else "statement"
                return doom.call(kind, super().execute, statement, *values)

        sqlite3.connect = functools.partial(sqlite3.connect, factory=Connection)

    def call(self, kind, function, *arguments, **options):
        self._progress.value += 1
        self._left -= kind == self._kind
        due = kind == self._kind and self._left == 0
        if due and not self._after:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return function(*arguments, **options)
        finally:
            if due:
                os.kill(os.getpid(), signal.SIGKILL)


def killed_at_each(child, job, kind, prepare):
    """Kill processes that do a job before and after the first, second, … call of a kind; yield what they leave."""

    def work(place, moment):
        Doom(kind, moment // 2, moment % 2 == 1)
        JOBS[job](place)

    for moment in itertools.count(2):
        place = prepare(job)
        process = child("fork", work, place, moment, wait=False)
        process.join(30)
        if process.exitcode == 0:  # it was not called so often
            break
        assert process.exitcode == -signal.SIGKILL
        yield place
    assert moment > 3, "it was never called"


class Writer:
    """A process that stores until it dies: by itself, or when it is found to have made `target` calls."""

    def __init__(self, number, folder, front, compete, target, *doom):
        self.number, self.target, self.parent = number, target, os.getpid()
        self.progress, self.stored = RawValue(ctypes.c_ulong), RawValue(ctypes.c_ulong)
        work = functools.partial(self.work, folder, front, compete, *doom)
        self.process = multiprocessing.get_context("fork").Process(target=work)
        self.process.start()

    def own(self, batch):
        return some(f"writer-{self.number}-{batch}", 1)

    def work(self, folder, front, compete, *doom):
        Doom(*doom, self.progress)
        cache = Cache(folder)
        for batch in itertools.count():
            if os.getppid() != self.parent:  # nobody is left to kill it
                break
            front.value += 1  # near which all the others work, too
            shared = some(f"shared-{front.value}", 3) if compete else []
            assert cache.put_many([*self.own(batch), *shared], f"tag-{batch % 3}") == 2 + len(shared)
            self.stored.value = batch + 1
            if batch % 3 == 1:
                cache.remove(keys(shared))
            if batch % 4 == 1:
                cache.sweep()


@pytest.mark.parametrize("compete", [False, True])
def test_storm_of_kills_leaves_neither_a_wrong_entry_nor_a_trace(tmp_path, compete):
    chance, front = random.Random(0), RawValue(ctypes.c_ulong)
    dooms = itertools.product([0], ("open", "rename", "commit"), range(1, 15), (False, True))
    plans = [*dooms, *((chance.randrange(1, 250), "", 0, False) for _ in range(40))]
    chance.shuffle(plans)
    cache, living, dead = Cache(tmp_path), [], []
    try:
        while plans or living:
            while plans and len(living) < 4:
                living.append(Writer(len(living) + len(dead), tmp_path, front, compete, *plans.pop()))
            read(cache, some(f"shared-{front.value - chance.randrange(20)}", 3))
            writer = chance.choice([*living, *dead])
            read(cache, writer.own(writer.stored.value - chance.randrange(3)))
            for writer in living:
                for _ in range(chance.randrange(3000)):  # so that a kill falls anywhere between two calls
                    pass
                if writer.target and writer.progress.value >= writer.target:
                    writer.process.kill()
            before = len(dead)
            dead += [writer for writer in living if not writer.process.is_alive()]
            living = [writer for writer in living if writer not in dead]
            if len(dead) // 50 > before // 50:
                assert cache.check().keys() <= {"orphan", "temporary"}
    finally:
        for writer in living:
            writer.process.kill()
            writer.process.join()
    assert Counter(writer.process.exitcode for writer in dead) == {-signal.SIGKILL: 124}
    assert cache.faults == 0
    cache.close()
    assert (tmp_path / "asyncds" / "locks" / "dirty").exists(), "the next run would not sweep"
    cache = Cache(tmp_path)
    settle(cache)
    for writer in dead:
        stored = [entry for batch in range(writer.stored.value) for entry in writer.own(batch)]
        assert all(read(cache, stored)), "what a killed process had stored is there"
        assert len({*read(cache, writer.own(writer.stored.value))}) == 1, "half a transaction"
    read(cache, [entry for number in range(front.value + 5) for entry in some(f"shared-{number}", 3)])
    assert (cache.faults, cache.damaged) == (0, 0)
    cache.close()


LIMIT = 780_000


@pytest.fixture
def prepare(tmp_path):
    """Make a cache that is full of three datasets, one of which this process holds, anew each time."""
    cache, numbers, holders = Cache(tmp_path / "template"), itertools.count(), []
    for tag in ("held", "idle", "later"):
        assert cache.put_many([new(f"{tag}-0-large", "v0"), *some(tag, 5)], tag) == 11
        cache.hold(tag)
        cache.release(tag)
    assert LIMIT - 100_000 < cache.volume() < LIMIT
    template = closed(cache)
    (cache.directory / "locks" / "dirty").unlink()

    def make(job):
        place = tmp_path / str(next(numbers))
        if job == "begin":
            return place
        shutil.copytree(template, place)
        for number in range(5 * (job == "sweep")):
            path = place / "asyncds" / "objects" / f"{number:02x}" / f"{number:030x}.obj"
            path.parent.mkdir(0o700, exist_ok=True)
            path.write_bytes(bytes(5000))
            path.with_suffix(".tmp").write_bytes(bytes(5000))
            (place / "asyncds" / "locks" / "dirty").touch(0o600)
        holders.append(Cache(place))
        holders[-1].hold("held")
        holders[-1].close()
        for note in (place / "asyncds" / "datasets").iterdir():
            os.utime(note, (0, 0) if "held" in note.read_text() else None)  # held, though used least recently
        return place

    return make


def store_in_parts(place):
    entry = new("parts-large")
    large = Cache(place).begin(entry.object, entry.etag, len(entry.body), "new")
    large.write(9000, entry.body[9000:])
    large.write(0, entry.body[:9000])
    large.finish(first_seen=True)


def compete(place):
    """Store what another stores between one's look and one's transaction."""
    rename = os.rename

    def late(*names, **places):
        os.rename = rename
        rename(*names, **places)
        assert Cache(place).put_many(some("more", 2)) == 4

    os.rename = late
    Cache(place).put_many(some("more", 2))


JOBS = {
    "begin": lambda place: (Cache(place).hold("new"), Cache(place).put_many(some("new", 2), "new")),
    "sweep": lambda place: Cache(place).sweep(),
    "make room": lambda place: Cache(place, limit=LIMIT).put_many(some("new", 5), "new"),
    "remove": lambda place: Cache(place).remove(keys(some("idle", 2))),
    "compete": compete,
    "parts": store_in_parts,
}
DEATHS = [
    *(("begin", kind) for kind in ("mkdir", "open", "pwrite", "rename", "replace", "commit", "statement")),
    *(("sweep", kind) for kind in ("open", "unlink")),
    *(("make room", kind) for kind in ("open", "pwrite", "rename", "commit", "unlink")),
    *((job, kind) for job in ("remove", "compete") for kind in ("commit", "unlink")),
    *(("parts", kind) for kind in ("open", "pwrite", "rename", "commit")),
]


SLOW = {("begin", "statement"), ("make room", "open")}


@pytest.mark.parametrize(
    "death",
    [pytest.param(death, marks=[pytest.mark.thorough] * (death in SLOW), id="-".join(death)) for death in DEATHS],
)
def test_wherever_a_process_is_killed_the_next_run_is_clean(prepare, child, death):
    for place in killed_at_each(child, *death, prepare):
        cache = Cache(place, limit=LIMIT)
        settle(cache)
        assert cache.put_many(some("new", 5), "new") == 10
        assert all(read(cache, some("new", 5)))
        read(cache, [new("parts-large")])
        assert cache.volume() <= LIMIT
        assert "begin" in death or all(read(cache, some("held", 5)))
        settle(cache)
        cache.close()


@pytest.mark.parametrize("job", ["sweep", "make room"])
def test_what_a_killed_sweep_or_making_room_leaves_is_swept_by_the_next_run(prepare, child, job):
    for place in killed_at_each(child, job, "unlink", prepare):
        named = {name for (name,) in rows(place / "asyncds", "SELECT filename FROM Cache")}
        assert files(place / "asyncds").keys() <= named or any(
            (place / "asyncds" / "locks" / name).exists() for name in ("dirty", "sweeping")
        )


# damage


def damages(content: bytes, header: int):
    """What may become of a file: flipped, cut short, zeroed from somewhere on, or longer."""
    places = [*range(header), *range(header, len(content), 97), len(content) - 1]
    for place, pattern in itertools.product(places, PATTERNS):
        yield content[:place] + bytes([content[place] ^ pattern]) + content[place + 1 :]
    for length in [*range(header + 1), *range(header, len(content), 997), len(content) - 4096, len(content) - 1]:
        yield content[:length]
        yield content[:length].ljust(len(content), b"\0")
    yield content + b"\0"
    yield content + content


def test_damaged_file_is_never_served_but_counted_removed_and_healed(tmp_path):
    cache, entry = Cache(tmp_path), NewEntry(new("file").object, "v1", b"\x07" * (INLINE_LIMIT + 1))
    header, count = pack_header(*keys([entry]), "v1", entry.body), 0
    assert cache.put_many([entry]) == 1
    for count, damaged in enumerate(damages(header + entry.body, len(header)), 1):
        (path,) = files(cache.directory).values()
        path.write_bytes(damaged)
        assert read(cache, [entry]) == [False]
        assert (cache.damaged, path.exists(), len(cache)) == (count, False, 0)
        assert cache.put_many([entry]) == 1
        assert read(cache, [entry]) == [True]
    assert (count > 1200, cache.faults, cache.check()) == (True, 0, {})


@pytest.mark.parametrize("other", [("one", "v2"), ("other", "v1")])
def test_files_of_two_rows_that_changed_places_are_misses_and_heal(tmp_path, other):
    cache = Cache(tmp_path)
    entries = [NewEntry(new(name).object, etag, bytes(INLINE_LIMIT)) for name, etag in (("one", "v1"), other)]
    assert cache.put_many(entries) == 2
    one, two = files(cache.directory).values()
    one.rename(tmp_path / "third")
    two.rename(one)
    (tmp_path / "third").rename(two)
    assert read(cache, entries) == [False, False]
    assert (cache.damaged, len(cache), one.exists(), two.exists()) == (2, 0, False, False)
    assert cache.put_many(entries) == 2
    assert (read(cache, entries), cache.check()) == ([True, True], {})


PAGES = [*some("page", 3), *(new(f"page-{number}") for number in range(57))]


def outcome(place: Path) -> str:
    """What becomes of a cache with a damaged database."""
    try:
        with contextlib.closing(Cache(place, limit=1 << 30)) as cache:
            for attempt in range(3):
                read(cache, PAGES)
                cache.sweep()
                if cache.put_many(PAGES) == len(PAGES) and all(read(cache, PAGES)):
                    return "healed" if attempt else "at once"
            return "bypassed"
    except CacheError:
        return "refused"
    except AssertionError:
        return "wrong"
    except Exception as error:
        return f"raised {error!r}"


def outcomes(step: int) -> dict[str, list[int]]:
    """Where bytes of the database were flipped, each in a copy of its own, by outcome: all `step` bytes of its header,
    and fewer of its pages."""
    found = defaultdict(list)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder, warnings.catch_warnings(action="ignore"):
        cache, copy = Cache(Path(folder) / "whole", limit=1 << 30), Path(folder) / "copy"
        assert cache.put_many(PAGES) == len(PAGES)
        whole, database = closed(cache), copy / "asyncds" / "objects" / "cache.db"
        (cache.directory / "locks" / "dirty").unlink()
        content = (cache.directory / "objects" / "cache.db").read_bytes()
        for place in [*range(0, 512, step), *range(512, len(content), 47 * step)]:
            shutil.copytree(whole, copy, copy_function=os.link)  # files are never written to again
            database.unlink()
            flipped = bytes([content[place] ^ PATTERNS[place % 3]])
            database.write_bytes(content[:place] + flipped + content[place + 1 :])
            found[outcome(copy)].append(place)
            shutil.rmtree(copy)
    return dict(found)


@pytest.mark.parametrize(("step", "least"), [pytest.param(1, 1500, marks=pytest.mark.thorough), (3, 500)])
def test_flipped_byte_of_the_database_is_a_miss_that_heals(step, least):
    found = outcomes(step)
    assert found.keys() == {"at once", "healed"}, "it was damage of both kinds, and never was a byte wrong"
    assert sum(map(len, found.values())) > least


# a poisoned folder


OLD = some("old", 2)
NAMES = [f"{digit * 30}.{ending}" for digit in "012" for ending in ("obj", "tmp")]


def pickles(cache, outside):
    class Bomb:
        def __reduce__(self):
            return open, (str(outside / "exploded"), "w")

    payload = pickle.dumps(Bomb())
    rows(cache, "UPDATE Cache SET mode = ?, value = ? WHERE filename IS NULL", MODE_PICKLE, payload)
    rows(cache, "INSERT INTO Cache (key, raw, mode, value) VALUES (?1, 0, ?2, ?1)", payload, MODE_PICKLE)
    rows(cache, "UPDATE Settings SET value = ? WHERE key = 'disk_pickle_protocol'", payload)
    for path in files(cache).values():
        path.write_bytes(payload)


def name(text, *entries):
    """Let rows name this file."""

    def poison(cache, outside):
        for key in keys(entries):
            rows(cache, "UPDATE Cache SET filename = ?, value = NULL WHERE key = ?", text.format(outside), key)

    return poison


def instead(pattern, make, target=NAMES[0]):
    """Put something else in the place of files."""

    def poison(cache, outside):
        for path in [*cache.glob(pattern)] if "*" in pattern else [cache / pattern]:
            path.unlink(missing_ok=True)
            make(outside / target, path)

    return poison


def fifo(_, path):
    os.mkfifo(path, 0o600)


def linked_folders(cache, outside):
    """All folders of files are one outside, where there are files that rows name, and others."""
    name(f"ab/{NAMES[0]}", OLD[1])(cache, outside)
    name(f"ab/{NAMES[2]}", OLD[3])(cache, outside)
    for number in range(256):
        shutil.rmtree(cache / "objects" / f"{number:02x}", ignore_errors=True)
        (cache / "objects" / f"{number:02x}").symlink_to(outside)


def planted(*statements):
    return lambda cache, outside: [rows(cache, statement) for statement in statements]


def disguised_pragma(cache, outside):
    """A setting of which the table's index says another name than the table itself."""
    content = (cache / "objects" / "cache.db").read_bytes()
    assert content.count(b"sqlite_journal_modewal") == 1
    content = content.replace(b"sqlite_journal_modewal", b"sqlite_user_version777")
    (cache / "objects" / "cache.db").write_bytes(content)


LOOT = "CREATE TRIGGER planted AFTER INSERT ON Cache BEGIN INSERT INTO loot VALUES (NEW.key); END"
POISONS = {
    "pickles": pickles,
    "name with dots": name("../../../outside/0", *OLD[:2]),
    "name with dots within": name("ab/../../../../outside/0", *OLD[:2]),
    "absolute name": name("{}/0", *OLD[:2]),
    "objects/??/* is a hard link": instead("objects/??/*", os.link),
    "linked folders": linked_folders,
    "trigger": planted("CREATE TABLE loot (key)", LOOT),
    "view": planted("ALTER TABLE Cache RENAME TO Hidden", "CREATE VIEW Cache AS SELECT * FROM Hidden"),
    "table": planted("CREATE TABLE loot (key)"),
    "pragma": planted("INSERT INTO Settings VALUES ('sqlite_user_version', 77)"),
    "disguised pragma": disguised_pragma,
    "option of the disk": planted("INSERT INTO Settings VALUES ('disk_evil', 1)"),
    "no size": planted("UPDATE Settings SET value = NULL WHERE key = 'size'"),
    "infinite format": lambda cache, outside: (cache / "format.json").write_text('{"format": Infinity}'),
    "objects/cache.db is a link to what is empty": instead("objects/cache.db", os.symlink, "empty"),
}
for place in ("objects/??/*", "locks/claims", "locks/files", "locks/dirty", "format.json", "datasets/*.json"):
    POISONS[f"{place} is a FIFO"], POISONS[f"{place} is a link"] = instead(place, fifo), instead(place, os.symlink)
for place in ("locks/claims", "locks/files", "locks/dirty", "objects/cache.db", "objects/cache.db-wal"):
    POISONS[f"{place} is a link to nothing"] = instead(place, os.symlink, "nothing")


def use(place, limit):
    """All that one does with a cache."""
    warnings.simplefilter("ignore")
    with contextlib.suppress(CacheError), contextlib.closing(Cache(place, limit=limit)) as cache:
        cache.hold("mine")
        for batch in range(3):
            assert cache.claim(OLD[0].object)
            read(cache, OLD)
            cache.put_many(some(f"new-{batch}", 4), "mine")
            cache.sweep()
            cache.check(fix=batch == 1)
            cache.put_many(OLD, "mine")
            read(cache, [*OLD, *some(f"new-{batch}", 4)])
            cache.unclaim(OLD[0].object)
        cache.remove(keys(OLD))
        cache.release("mine")
        assert str(cache.directory) in repr(cache)


def snapshot(folder):
    return {path.name: (path.lstat().st_mode, path.read_bytes()) for path in folder.iterdir()}


@pytest.mark.parametrize("poison", POISONS)
def test_poisoned_folder_runs_nothing_reaches_nothing_outside_and_does_not_block(tmp_path, child, poison):
    cache, outside = Cache(tmp_path / "cache"), tmp_path / "outside"
    assert cache.put_many(OLD, "old") == len(OLD)
    cache.hold("old")
    cache.release("old")
    limit, place = cache.volume() + 120_000, closed(cache)
    outside.mkdir()
    for file in [*NAMES, "0"]:
        (outside / file).write_bytes(pack_header(*keys(OLD[1:2]), "v1", OLD[1].body) + OLD[1].body)
    for file in ("empty", NAMES[2]):
        (outside / file).write_bytes(b"")
    for path in outside.iterdir():
        path.chmod(0o600)
    POISONS[poison](cache.directory, outside)
    before = snapshot(outside)
    process = child("fork", use, place, limit, wait=False)
    process.join(10)
    assert process.exitcode is not None, "it blocks"
    assert process.exitcode == 0
    assert snapshot(outside) == before
    for statement, nothing in (("PRAGMA user_version", [(0,)]), ("SELECT * FROM loot", [])):
        with contextlib.suppress(sqlite3.Error):
            assert rows(cache.directory, statement) == nothing
