"""The cache by itself: reading, storing, many readers at once, and opening it with a million entries.

    python tests/benchmarks/cache.py [--rounds 3] [--entries 1000000] [--readers 16] [--folder FOLDER]

Every run is a fresh process, and contenders take turns. asyncds is asked for batches of 200, as by a DataLoader, and
compares every checksum; stock diskcache and plain files are asked for one value after another, and compare nothing.
All of them hold the values of a batch together. Keys are shuffled. All that is read is in the page cache: what is
measured is the way to the bytes, not the disk. What is made in a given folder stays there, and the next run uses it
again; without `--folder` nothing stays. Prints Markdown tables.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import diskcache

from asyncds.cache import Cache
from asyncds.entry import NewEntry, entry_key, object_id

BATCH = 200
SIZES = {"1 kB": (1_000, 20_000), "100 kB": (100_000, 1_000)}  # bytes of a value, and how many there are
READ_TARGETS = {"1 kB": 6, "100 kB": 26}  # µs
STORE_TARGETS = {"1 kB": "25 µs", "100 kB": "1.3 times plain files"}
OPENING_TARGET = 20  # ms
OPENINGS = 5  # in each round
READING_S = 2.0
TRANSACTION_S = 2.0
ETAG = "0123456789abcdef0123456789abcdef"

Result = dict[str, float]


def object_of(number: int) -> bytes:
    return object_id("http://store", "bucket", f"train/{number:07}")


def bodies(size: str) -> Iterator[bytes]:
    """The values of one size, all different, always the same."""
    length, count = SIZES[size]
    return (number.to_bytes(8, "little") * (length // 8) for number in range(count))


def shuffled(size: str) -> list[int]:
    numbers = list(range(SIZES[size][1]))
    random.Random(0).shuffle(numbers)
    return numbers


def batches(numbers: Sequence[Any]) -> list[Sequence[Any]]:
    return [numbers[start : start + BATCH] for start in range(0, len(numbers), BATCH)]


def name(number: int) -> str:
    """Of a plain file: 256 folders, as the cache has."""
    return f"{number % 256:02x}/{number:07}"


def timed(count: int, work: Callable[[], object]) -> Result:
    """Seconds, of the clock and of the CPU, for each of so many values."""
    started, cpu = time.perf_counter(), time.process_time()
    work()
    seconds = time.perf_counter() - started
    return {"seconds": seconds / count, "cpu": (time.process_time() - cpu) / count}


# reading


def fill(folder: Path) -> None:
    """Put every value into each contender; what is there stays as it is."""
    for size in SIZES:
        place = folder / size.replace(" ", "-")
        for number in range(256):
            (place / "files" / f"{number:02x}").mkdir(parents=True, exist_ok=True)
        entries = [NewEntry(object_of(number), ETAG, body) for number, body in enumerate(bodies(size))]
        with contextlib.closing(Cache(place / "asyncds")) as cache, diskcache.Cache(str(place / "diskcache")) as stock:
            for some in batches(entries):
                assert cache.put_many(some) == len(some)
            for number, entry in enumerate(entries):
                (place / "files" / name(number)).write_bytes(entry.body)
                stock.add(number, entry.body)
    os.sync()


def read(contender: str, size: str, folder: Path) -> Result:
    """Read everything once, in this process, after one batch that opens what is to be opened."""
    place, numbers = folder / size.replace(" ", "-"), shuffled(size)
    length = sum(map(len, bodies(size))) // len(numbers)
    if contender == "asyncds":
        cache = Cache(place / "asyncds")
        keys = batches([entry_key(object_of(number), ETAG) for number in numbers])
    else:
        one = stock_reader(place / "diskcache") if contender == "stock diskcache" else file_reader(place / "files")
        keys = batches(numbers)

    def get_batch(some: Sequence[Any]) -> list[bytes]:
        if contender == "asyncds":
            return [entry.body for entry in cache.get_many(some)]
        return [one(number) for number in some]

    get_batch(keys[0])
    sizes: list[int] = []
    result = timed(len(numbers), lambda: [sizes.extend(map(len, get_batch(some))) for some in keys])
    assert sizes == [length] * len(numbers)
    return result


def stock_reader(folder: Path) -> Callable[[int], bytes]:
    cache = diskcache.Cache(str(folder))
    return cache.get


def file_reader(folder: Path) -> Callable[[int], bytes]:
    paths = {number: str(folder / name(number)) for number in range(max(count for _, count in SIZES.values()))}

    def read_file(number: int) -> bytes:
        with open(paths[number], "rb", buffering=0) as file:
            return file.read()

    return read_file


# storing


def store(contender: str, size: str, folder: Path) -> Result:
    """Store everything once, in this process, into an empty folder, after one batch of other values."""
    place = Path(tempfile.mkdtemp(dir=folder))
    values = list(bodies(size))
    os.sync()
    try:
        if contender == "asyncds":
            cache = Cache(place)
            entries = batches([NewEntry(object_of(number), ETAG, body) for number, body in enumerate(values)])
            cache.put_many([NewEntry(object_of(-1 - number), ETAG, b"") for number in range(BATCH)])
            return timed(len(values), lambda: [cache.put_many(some) for some in entries])
        if contender == "stock diskcache":
            stock = diskcache.Cache(str(place))
            stock.set(-1, b"")
            return timed(len(values), lambda: [stock.set(number, value) for number, value in enumerate(values)])
        for number in range(256):
            (place / f"{number:02x}").mkdir()
        return timed(len(values), lambda: [publish(place, number, value) for number, value in enumerate(values)])
    finally:
        shutil.rmtree(place)


def publish(folder: Path, number: int, body: bytes) -> None:
    """Write a file that appears whole."""
    path = f"{folder}/{name(number)}"
    with open(f"{path}.tmp", "xb", buffering=0) as file:
        file.write(body)
    os.rename(f"{path}.tmp", path)


# many readers


def read_for_a_while(folder: Path) -> Result:
    """Say that all is ready, wait for a line, and read 1 kB values from the warm cache for a while."""
    cache = Cache(folder / "1-kB" / "asyncds")
    numbers = shuffled("1 kB")
    random.Random(os.getpid()).shuffle(numbers)
    keys = batches([entry_key(object_of(number), ETAG) for number in numbers])
    for some in keys[:5]:
        cache.get_many(some)
    print("ready", flush=True)
    sys.stdin.readline()
    waits, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw, time.process_time()
    started = now = time.perf_counter()
    done, longest = 0, 0.0
    while now < started + READING_S:
        entries = cache.get_many(keys[done % len(keys)])
        assert None not in entries
        done, before, now = done + 1, now, time.perf_counter()
        longest = max(longest, now - before)
    return {
        "values": done * BATCH,
        "rate": done * BATCH / (now - started),
        "longest": longest,
        "cpu": time.process_time() - cpu,
        "waits": resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - waits,
    }


@contextlib.contextmanager
def open_transaction(cache: Path) -> Iterator[None]:
    """A writer, in this process, amid a transaction that has changed rows; undone in the end."""
    database = cache / "asyncds" / "objects" / "cache.db"
    with contextlib.closing(sqlite3.connect(database, isolation_level=None, check_same_thread=False)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("DELETE FROM Cache WHERE rowid IN (SELECT rowid FROM Cache LIMIT 5000)")
        try:
            yield
        finally:
            connection.execute("ROLLBACK")


def together(readers: int, folder: Path, *, writer: bool = False) -> Result:
    """So many processes that read in the same moment, if asked for while a writer's transaction is open."""
    command = [sys.executable, __file__, "--run=reader", f"--folder={folder}"]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(readers)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    with open_transaction(folder / "1-kB" / "asyncds") if writer else contextlib.nullcontext():
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        results = [json.loads(process.communicate()[0]) for process in processes]
    values = sum(result["values"] for result in results)
    return {
        "rate": sum(result["rate"] for result in results),
        "cpu": sum(result["cpu"] for result in results) / values,
        "waits": sum(result["waits"] for result in results) / (values / BATCH),
        "longest": max(result["longest"] for result in results),
    }


# opening


def make_index(entries: int, folder: Path) -> None:
    """Fill a cache with rows of its own making: one in eight names a file, the others hold a few bytes."""
    with contextlib.closing(Cache(folder)) as cache:
        cache.put_many([NewEntry(object_of(-1), ETAG, b"")])
        missing = entries - len(cache)
        database = cache.directory / "objects" / "cache.db"
    if missing <= 0:
        return
    now = time.time()

    def rows() -> Iterator[tuple[object, ...]]:
        for number in range(entries - missing, entries):
            key, hexadecimal = os.urandom(32), f"{number:032x}"[::-1]
            filename = f"{hexadecimal[:2]}/{hexadecimal[2:]}.obj" if number % 8 == 0 else None
            size, value = (65536, None) if filename else (0, key)
            yield key, 1, now, None, now, 0, "s3://bucket/train at http://store", size, 2, filename, value

    columns = "key, raw, store_time, expire_time, access_time, access_count, tag, size, mode, filename, value"
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.executemany(f"INSERT INTO Cache ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows())


def opened(contender: str, folder: Path) -> Result:
    """Open a cache, alone and with a first batch of lookups that all miss."""
    keys = [entry_key(object_of(number), ETAG) for number in range(BATCH)]
    started = time.perf_counter()
    if contender == "stock diskcache":
        stock = diskcache.Cache(str(folder))
        alone = time.perf_counter()
        assert stock.get(keys[0]) is None
    else:
        cache = Cache(folder)
        alone = time.perf_counter()
        assert cache.get_many(keys) == [None] * BATCH
    return {"seconds": alone - started, "first": time.perf_counter() - started}


# rounds and tables


def in_fresh_process(run: str, folder: Path) -> Result:
    command = [sys.executable, __file__, f"--run={run}", f"--folder={folder}"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def in_turns(rounds: int, runs: dict[str, Callable[[], Result]]) -> dict[str, list[Result]]:
    """Every run once per round."""
    results: dict[str, list[Result]] = {run: [] for run in runs}
    for _ in range(rounds):
        for run, work in runs.items():
            results[run].append(work())
    return results


def median(results: list[Result], field: str, scale: float = 1.0) -> str:
    """The median and the spread."""
    values = [result[field] * scale for result in results]
    digits = 1 if statistics.median(values) < 100 else 0
    return f"{statistics.median(values):,.{digits}f} | {min(values):,.{digits}f} to {max(values):,.{digits}f}"


def ratio(results: list[Result], others: list[Result], field: str = "seconds") -> str:
    """The median of the ratios within rounds."""
    return f"{statistics.median(a[field] / b[field] for a, b in zip(results, others, strict=True)):.2f}"


def per_value(what: str, rounds: int, folder: Path, targets: dict[str, Any]) -> None:
    """Tables of reading or storing, one for each size."""
    contenders = ("asyncds", "stock diskcache", "plain files")
    for size, (_, count) in SIZES.items():
        runs = {
            name: lambda name=name, size=size: in_fresh_process(f"{what}:{name}:{size}", folder) for name in contenders
        }
        results = in_turns(rounds, runs)
        print(
            f"\n| {what} {count:,} values of {size} | µs per value | spread | CPU | spread | to plain files | target |"
        )
        print("|---|--:|--:|--:|--:|--:|--:|")
        for name in contenders:
            target = f"{targets[size]}" if name == "asyncds" else ""
            own = results[name]
            columns = [median(own, "seconds", 1e6), median(own, "cpu", 1e6), ratio(own, results["plain files"])]
            print(f"| {name} | {' | '.join(columns)} | {target} |", flush=True)


def many_readers(rounds: int, readers: int, folder: Path) -> None:
    runs = {
        "1 process": lambda: together(1, folder),
        f"{readers} processes": lambda: together(readers, folder),
        f"{readers} processes, a writer's transaction open": lambda: together(readers, folder, writer=True),
    }
    results = in_turns(rounds, runs)
    cores = len(os.sched_getaffinity(0))
    alone = results["1 process"]
    print(f"\n| reading 1 kB, {cores} cores | values/s | spread | per core | to what the cores allow |", end="")
    print(" CPU per value | waits per batch | longest batch |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for run, own in results.items():
        used = 1 if own is alone else min(cores, readers)
        share = statistics.median(a["rate"] / b["rate"] / used for a, b in zip(own, alone, strict=True))
        rate, cpu, waits, longest = (
            statistics.median(result[field] for result in own) for field in ("rate", "cpu", "waits", "longest")
        )
        print(f"| {run} | {median(own, 'rate')} | {rate / used:,.0f} | {share:.2f} |", end="")
        print(f" {cpu * 1e6:.1f} µs | {waits:.3f} | {longest * 1e3:,.0f} ms |", flush=True)
    print("\nA wait is a voluntary context switch: whoever waits for a lock makes at least one.")


def opening(rounds: int, entries: int, folder: Path) -> None:
    million, one, stock = (folder / name for name in ("million", "one", "stock"))
    make_index(entries, million)
    make_index(1, one)
    in_fresh_process("open:stock diskcache", stock)

    def beside_writer() -> Result:
        with contextlib.ExitStack() as transaction:
            transaction.enter_context(open_transaction(one))
            timer = threading.Timer(TRANSACTION_S, transaction.close)
            timer.start()
            try:
                return in_fresh_process("open:asyncds", one)
            finally:
                timer.join()

    runs = {
        f"asyncds, {entries:,} entries": lambda: in_fresh_process("open:asyncds", million),
        "asyncds, 1 entry": lambda: in_fresh_process("open:asyncds", one),
        f"asyncds, 1 entry, a writer's transaction open for {TRANSACTION_S:g} s": beside_writer,
        "stock diskcache, empty": lambda: in_fresh_process("open:stock diskcache", stock),
    }
    results = in_turns(rounds * OPENINGS, runs)
    print("\n| opening | ms | spread | with a first batch | spread | target |")
    print("|---|--:|--:|--:|--:|--:|")
    for run, own in results.items():
        target = f"{OPENING_TARGET} ms" if run == f"asyncds, {entries:,} entries" else ""
        print(f"| {run} | {median(own, 'seconds', 1e3)} | {median(own, 'first', 1e3)} | {target} |")


def run_here(run: str, folder: Path) -> Result:
    what, *rest = run.split(":")
    if what == "reader":
        return read_for_a_while(folder)
    if what == "open":
        return opened(*rest, folder)
    return (read if what == "reading" else store)(*rest, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--entries", type=int, default=1_000_000, help="rows of the cache that is opened")
    parser.add_argument("--readers", type=int, default=16, help="processes that read at once")
    parser.add_argument("--folder", type=Path, help="where to measure, on the disk in question")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run_here(options.run, options.folder)))
        return
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        fill(folder)
        print(f"{os.cpu_count()} cores, {options.rounds} rounds, batches of {BATCH}")
        per_value("reading", options.rounds, folder, {size: f"{most} µs" for size, most in READ_TARGETS.items()})
        per_value("storing", options.rounds, folder, STORE_TARGETS)
        many_readers(options.rounds, options.readers, folder)
        opening(options.rounds, options.entries, folder)


if __name__ == "__main__":
    main()
