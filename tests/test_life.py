"""Life and death: forks beside a live runtime, and every way to leave a loop or process with objects under way."""

import _weakrefset
import asyncio
import contextlib
import gc
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from operator import methodcaller
from pathlib import Path
from queue import SimpleQueue

import pytest
from torch.utils.data import DataLoader, Dataset

from asyncds import CachedS3MapDataset, Settings, fetcher, listing, locks, portal, source
from asyncds.cache import Cache
from asyncds.errors import DatasetClosed
from asyncds.portal import Portal
from asyncds.stats import Counters
from asyncds.testing import Fault, S3Server

pytestmark = [
    # Python 3.12 warns of every fork beside a thread, and the dataset's loop is one.
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning"),
    # torch warns where there are fewer cores than workers.
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.usefixtures("fork_server"),
    pytest.mark.timeout(60),
]

KEYS = sorted(f"train/{number % 10}/{number:03}.bin" for number in range(60))
PREFIX = "s3://mnist/train/"
BATCH = 4
THERE = 2 * BATCH  # objects that a stalled store still gives: those of the first two batches
PROMISED_S = 5.0
ENOUGH_S = 20
FORKED = {"collate_fn": list, "multiprocessing_context": "fork"}
READ = methodcaller("read")


def body(key: str) -> bytes:
    return hashlib.shake_128(key.encode()).digest(64)


EXPECTED = [body(key) for key in KEYS]


@pytest.fixture(scope="module")
def server():
    with S3Server(process=True) as server:
        server.put_many("mnist", {key: body(key) for key in KEYS})
        yield server


@pytest.fixture
def stalled(bucket):
    """The same, where whoever waits for an object after the first few waits for ever."""
    stall(bucket)
    return bucket


def stall(server: S3Server) -> None:
    server.script("mnist", None, [Fault.stall()], forever=True)
    for key in KEYS[:THERE]:
        server.script("mnist", key, [Fault()])


def wait_for_requests(server: S3Server, count: int) -> None:
    while server.stats.in_flight < count:  # for as long as the test has time
        pass


def wait_for_requests_made(server: S3Server, count: int) -> None:
    while server.stats.requests["GET"] < count:  # for as long as the test has time
        pass


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("asyncds")]


def runs(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


# forks


# How often each of the tests forks; all of them together do so 200 times in a thorough run of any one.
FORKS = [30, pytest.param(200, marks=[pytest.mark.thorough, pytest.mark.timeout(300)])]


def expect(dataset, rows: list[int]) -> None:
    assert dataset.__getitems__(rows) == [EXPECTED[row] for row in rows]


def hits_and_a_miss(number: int) -> list[int]:
    """Of the ten rows that are cached, and of the others one after the other."""
    return [number % 10, 10 + number % 50]


@pytest.mark.parametrize("forks", FORKS)
@pytest.mark.parametrize("where", ["main", "thread"])
def test_forking_from_a_process_with_a_live_runtime_never_hangs(bucket, child, where, forks):
    def fork() -> None:
        for number in range(forks):
            child("fork", expect, dataset, hits_and_a_miss(number))

    with CachedS3MapDataset.from_prefix(PREFIX, transform=READ) as dataset:
        expect(dataset, [*range(10)])
        if where == "main":
            fork()
        else:
            thread = threading.Thread(target=fork)  # no executor's, which a forked child would wait for: itself
            thread.start()
            thread.join()
        assert dataset.stats()["samples"] == 10 + 2 * forks
    assert bucket.stats.requests == {"LIST": 1, "GET": 10 + min(forks, 50)}


# Those that a thread may hold when another one forks. SQLite's are taken before a fork: see the fetches below.
LOCKS = {
    "the portal's": lambda dataset: portal._guard,
    "of the runtimes": lambda dataset: source._making,
    "of the listing": lambda dataset: listing._making,
    "of the lock files": lambda dataset: locks._making,
    "of claims": lambda dataset: dataset._parts[0].source.cache._folder.claims._guard,
    "of datasets": lambda dataset: dataset._parts[0].source.cache._folder.datasets._guard,
    "of counters": lambda dataset: dataset._parts[0].source.counters._lock,
}


@pytest.mark.parametrize("forks", [4, pytest.param(200, marks=[pytest.mark.thorough, pytest.mark.timeout(300)])])
@pytest.mark.parametrize("name", LOCKS)
def test_forking_while_another_thread_holds_a_lock_never_hangs(bucket, child, name, forks):
    taken, stop = threading.Event(), threading.Event()

    def hold() -> None:
        with LOCKS[name](dataset):
            taken.set()
            stop.wait()

    with CachedS3MapDataset.from_prefix(PREFIX, transform=READ) as dataset, ThreadPoolExecutor() as pool:
        expect(dataset, [*range(10)])
        holding = pool.submit(hold)
        taken.wait()
        try:
            for number in range(forks):
                child("fork", expect, dataset, hits_and_a_miss(number))
        finally:
            stop.set()
            holding.result()
        expect(dataset, [*range(60)])
    assert set(bucket.stats.gets.values()) == {1}


@pytest.mark.parametrize("forks", FORKS)
def test_forking_while_another_thread_fetches_never_hangs(bucket, child, forks):
    stop, rounds = threading.Event(), []

    def fetch() -> None:
        while not stop.is_set():
            rounds.append(dataset.__getitems__(range(60)))

    with CachedS3MapDataset.from_prefix(PREFIX, transform=READ) as dataset:
        expect(dataset, [*range(10)])
    with CachedS3MapDataset.from_prefix(PREFIX, transform=READ, cache_size="1B") as dataset:
        thread = threading.Thread(target=fetch)
        thread.start()
        try:
            for number in range(forks):
                child("fork", expect, dataset, hits_and_a_miss(number))
        finally:
            stop.set()
            thread.join()
        assert dataset.stats()["uncached"] >= 50 * len(rounds) > 0
    assert all(samples == EXPECTED for samples in rounds)


@pytest.mark.parametrize("forks", FORKS)
def test_forking_while_another_thread_counts_never_hangs(tmp_path, child, forks):
    counters, stop = Counters(tmp_path / "counters"), threading.Event()

    def count() -> None:
        while not stop.is_set():
            counters.add(samples=1)

    thread = threading.Thread(target=count)
    thread.start()
    try:
        for _ in range(forks):
            child("fork", lambda: counters.add(hits=1))
    finally:
        stop.set()
        thread.join()
    assert counters.total()["hits"] == forks


# leaving, in a process of its own


LEAVES = """
import gc, json, os, sys, threading, time, warnings
from multiprocessing import active_children
from operator import methodcaller

import torch, uvloop
from torch.utils.data import DataLoader, _utils

from asyncds import CachedS3MapDataset

gc.freeze()  # or it takes a second of a processor to look through all of torch as the process ends
asked = json.loads(sys.argv[1])
if asked["pinned"] and not torch.accelerator.is_available():  # torch's thread that pins, with nothing to pin for
    torch.accelerator.is_available = lambda: True
    torch.accelerator.current_accelerator = lambda: torch.device("cpu")
    torch.accelerator.current_device_index = lambda: 0
    torch.accelerator.set_device_index = lambda index: None
    _utils.pin_memory.pin_memory = lambda data, device=None: data

def tell(**what):
    print(json.dumps(what), flush=True)

def opened():
    return CachedS3MapDataset.from_prefix("s3://mnist/train/", transform=methodcaller("read"))

def begun(dataset):
    # A loader whose first two batches were taken, and its iterator.
    options = {"batch_size": 4, "collate_fn": list, "num_workers": asked["workers"], "pin_memory": asked["pinned"]}
    if asked["workers"]:
        options |= {"multiprocessing_context": "fork", "persistent_workers": asked["persistent"]}
    loader = dataset.loader(**options) if asked["ahead"] else DataLoader(dataset, **options)
    iterator = iter(loader)
    tell(workers=[worker.pid for worker in getattr(iterator, "_workers", [])])
    next(iterator), next(iterator)
    return loader, iterator

def wait(iterator):
    # For a batch that never comes, or in the body of the loop.
    if asked["stalled"]:
        next(iterator)
    while True:  # Python does not notice a signal that comes just before it blocks
        time.sleep(0.01)

def leave(dataset, way):
    # Returns when it was left, and with nothing of the loop.
    loader, iterator = begun(dataset)
    try:
        if way == "exception":
            raise LookupError
        if way == "interrupt":
            tell(waits=way)
            wait(iterator)
    except (LookupError, KeyboardInterrupt):
        pass
    left = time.monotonic()
    del iterator, loader
    return left

def held():
    files = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            files.add((number, os.readlink(f"/proc/self/fd/{number}")))
        except FileNotFoundError:  # the one of this listing
            pass
    return files, set(threading.enumerate())

def drop():
    dataset = opened()
    loader, iterator = begun(dataset)

uvloop.new_event_loop().close()  # libuv keeps a pipe for signals
files, threads = held()
with opened() as dataset:
    for way in asked["ways"]:
        left = leave(dataset, way)
        tell(left=way, seconds=time.monotonic() - left, children=len(active_children()))
    left = time.monotonic()
tell(left="with", seconds=time.monotonic() - left, children=0)
del dataset
while gc.collect():  # what was held by cycles may hold others
    pass
files_after, threads_after = held()
tell(files=[name for _, name in files_after - files], threads=[thread.name for thread in threads_after - threads])

if asked["end"] == "drop":
    drop()
    gc.collect()
elif asked["end"] is not None:
    dataset = opened()
    loader, iterator = begun(dataset)
tell(waits=asked["end"])
if asked["end"] == "exit":
    sys.exit(3)
if asked["end"] == "uncaught":
    wait(iterator)
"""


@dataclass(frozen=True)
class Leaving:
    """How a process leaves: loops with `break` (or `del`, which is the same), with an exception or Ctrl-C that are
    caught, and then itself, from within a loop, and with all that is under way."""

    workers: int
    end: str
    stalled: bool
    ahead: bool
    persistent: bool = False
    pinned: bool = False
    ways: tuple[str, ...] = ("break", "exception", "interrupt")

    def __str__(self) -> str:
        said = {name: value for name, value in asdict(self).items() if name not in ("workers", "end", "ways")}
        return "-".join([str(self.workers), self.end, *(name for name, value in said.items() if value)])


class Told:
    """What a script says, line by line, and when it ends."""

    def __init__(self, script: str, *arguments: str) -> None:
        command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *arguments]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen(command, bufsize=0, start_new_session=True, **pipes)
        self.workers: list[int] = []

    def __enter__(self) -> "Told":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with self.process:
            pass

    def __iter__(self) -> Iterator[dict]:
        for line in self.process.stdout:
            said = json.loads(line)
            self.workers += said.get("workers", [])
            yield said

    def next(self) -> dict:
        return next(iter(self))

    def interrupt(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> tuple[float, int, str]:
        """Seconds from now until the process has ended and its workers have, too; the exit code; and what it wrote to
        stderr."""
        left = time.monotonic()
        output, errors = self.process.communicate(timeout=ENOUGH_S)  # until nobody has the pipes any more
        while any(map(runs, self.workers)):
            pass
        assert output == b""
        return time.monotonic() - left, self.process.returncode, errors.decode()


def check_leaving(server: S3Server, case: Leaving) -> None:
    if case.stalled:
        stall(server)
    else:
        server.latency = 0.02
    with Told(LEAVES, json.dumps(asdict(case))) as script:
        for said in script:
            if said.get("waits") == "interrupt":
                if case.stalled:  # until each worker has begun, for from then on it leaves Ctrl-C to its parent
                    wait_for_requests(server, max(1, case.workers) * BATCH)
                script.interrupt()
            elif "waits" in said:
                break
            elif "left" in said:
                assert said["seconds"] < PROMISED_S, f"{said}"
                assert said["children"] == 0, f"{said}"
            elif "files" in said:
                assert said == {"files": [], "threads": []}
        if case.end == "uncaught":
            script.interrupt()
        seconds, code, errors = script.end()
    assert seconds < PROMISED_S
    assert code == {"exit": 3, "uncaught": -signal.SIGINT}.get(case.end, 0)
    if case.end == "uncaught":
        assert errors.startswith("Traceback")
        assert errors.endswith("\nKeyboardInterrupt\n")
        assert errors.count("Traceback") == 1, "none but that of the loop"
    else:
        assert errors == ""


COVERING = [
    Leaving(0, "exit", stalled=True, ahead=True),
    Leaving(0, "uncaught", stalled=True, ahead=False),
    Leaving(0, "drop", stalled=False, ahead=True),
    Leaving(2, "exit", stalled=True, ahead=False, persistent=True),
    Leaving(2, "global", stalled=True, ahead=True, persistent=True, pinned=True),
    Leaving(2, "uncaught", stalled=True, ahead=True, pinned=True),
    Leaving(2, "global", stalled=False, ahead=False),
]
ALL = [
    Leaving(workers, end, *rest)
    for workers, end in itertools.product((0, 2), ("exit", "global", "uncaught", "drop"))
    for rest in itertools.product((True, False), repeat=4 if workers else 2)
]


@pytest.mark.parametrize("case", COVERING, ids=str)
def test_leaving_is_quick_and_silent_and_leaves_nothing(bucket, case):
    check_leaving(bucket, case)


@pytest.mark.thorough
@pytest.mark.parametrize("case", [case for case in ALL if case not in COVERING], ids=str)
def test_leaving_in_any_way_is_quick_and_silent_and_leaves_nothing(bucket, case):
    check_leaving(bucket, case)


def interrupted(file) -> bytes:
    os.kill(os.getpid(), signal.SIGINT)
    return file.read()


def test_interrupt_that_reaches_workers_is_left_to_the_training_process(bucket):
    """Else it may come while a worker holds the lock of torch's event, and the training process waits for ever."""
    with CachedS3MapDataset.from_prefix(PREFIX, transform=interrupted) as dataset:
        loader = DataLoader(dataset, batch_size=BATCH, num_workers=2, **FORKED)
        assert [*itertools.chain.from_iterable(loader)] == EXPECTED


def ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def ignores_interrupts(file) -> bool:
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_what_a_worker_does_when_interrupted_stays_as_somebody_has_set_it(bucket):
    with CachedS3MapDataset.from_prefix(PREFIX, transform=ignores_interrupts) as dataset:
        loader = DataLoader(dataset, batch_size=BATCH, num_workers=1, worker_init_fn=ignore_interrupts, **FORKED)
        assert all(itertools.chain.from_iterable(loader))


class InterruptedAt:
    """Interrupts this thread at the n-th of the moments at which it enters a function of Python's, goes on to its next
    line, or leaves it."""

    def __init__(self, moment: int) -> None:
        self.left = moment

    def __enter__(self) -> "InterruptedAt":
        self._before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _enter(self, frame, event: str, argument: object):
        if frame.f_code is Portal.call.__code__ or frame.f_code.co_filename in (__file__, _weakrefset.__file__):
            return None  # before there is anything to interrupt, or where Python swallows it
        return self._count(frame, event, argument)

    def _count(self, frame, event: str, argument: object):
        if event != "exception":
            self.left -= 1
        if self.left == -1:
            self.left -= 1
            raise KeyboardInterrupt
        return self._count


async def slow() -> int:
    await asyncio.sleep(0.01)
    return 1


def test_interrupt_at_any_moment_of_a_call_leaves_the_loop_running(monkeypatch):
    """The interrupt of a thread that has just taken a lock, or is about to let go of it, leaves it taken."""
    monkeypatch.setattr(portal, "SECONDS_BETWEEN_CHECKS", 0.003)
    user, moment, called = Portal.enter(), 0, None
    try:
        while called is None:
            with contextlib.closing(slow()) as work, contextlib.suppress(KeyboardInterrupt), InterruptedAt(moment):
                called = user.call(work)
            answers = SimpleQueue()
            user.post(answers.put, moment)
            assert answers.get(timeout=ENOUGH_S) == moment
            moment += 1
    finally:
        user.leave()
    assert moment > 20


def test_close_that_is_interrupted_leaves_nothing_all_the_same(bucket, monkeypatch):
    """By Ctrl-C, or by torch, which tells the death of a worker to whatever the training process does just then."""
    options = {"transform": READ, "decode_threads": 2}
    both = CachedS3MapDataset.from_prefix(PREFIX, **options) + CachedS3MapDataset.from_prefix(PREFIX, **options)
    assert both.__getitems__([0, 1, 60, 61]) == [*EXPECTED[:2], *EXPECTED[:2]]
    assert len([name for name in our_threads() if "decoder" in name]) >= 2
    litter = [path for each in both._sources() for path in each._litter]
    assert any(path.exists() for path in litter)
    aclose = fetcher.Fetcher.aclose

    async def interrupted(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await aclose(self)

    monkeypatch.setattr(fetcher.Fetcher, "aclose", interrupted)
    with pytest.raises(KeyboardInterrupt):
        both.close()
    assert our_threads() == []
    assert not any(path.exists() for path in litter)
    with pytest.raises(DatasetClosed):
        both[0]
    assert both.stats()["gets"] == 2


def test_interrupt_that_comes_while_a_loop_is_started_leaves_none(monkeypatch):
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Portal.enter()
    for thread in [thread for thread in threading.enumerate() if thread.name in our_threads()]:
        thread.join(ENOUGH_S)
    assert our_threads() == []
    user = Portal.enter()
    assert user.call(slow()) == 1
    user.leave()


@pytest.mark.parametrize("interrupted", ["Fetcher", "Retry"])
def test_dataset_that_is_interrupted_as_it_begins_to_read_leaves_no_loop(bucket, monkeypatch, interrupted):
    with CachedS3MapDataset.from_prefix(PREFIX, transform=READ) as dataset:
        with monkeypatch.context() as patch:
            patch.setattr(source, interrupted, lambda *_, **__: signal.raise_signal(signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                dataset[0]
        assert our_threads() == []
        assert dataset[0] == EXPECTED[0]


class Interrupting:
    """A portal whose loop somebody looks for when the interrupt comes."""

    @property
    def alive(self) -> bool:
        raise KeyboardInterrupt


def test_interrupt_of_a_thread_that_waits_for_an_object_is_told_alone():
    with pytest.raises(KeyboardInterrupt) as caught:
        source.Arrivals(Interrupting()).take(0)
    assert caught.value.__context__ is sys.exc_info()[1], "none but what pytest-xdist may be handling itself"


LEAVES_A_THREAD_BEHIND = """
import contextlib, sys, threading
from asyncds import CachedS3MapDataset
from asyncds.errors import DatasetClosed

def read():
    with contextlib.suppress(DatasetClosed):
        dataset[20]

dataset = CachedS3MapDataset.from_prefix("s3://mnist/train/")
len(dataset)
print({}, flush=True)
threading.Thread(target=read, daemon=True).start()
sys.stdin.read()
"""


def test_interpreter_exits_with_a_dataset_open_and_a_thread_waiting_for_it(stalled):
    with Told(LEAVES_A_THREAD_BEHIND) as script:
        assert script.next() == {}
        wait_for_requests(stalled, 1)
        seconds, *rest = script.end()
    assert rest == [0, ""]
    assert seconds < PROMISED_S


ORPHANS = """
import json, sys
from operator import methodcaller
from torch.utils.data import DataLoader
from asyncds import CachedS3MapDataset

dataset = CachedS3MapDataset.from_prefix("s3://mnist/train/", transform=methodcaller("read"))
len(dataset)
iterator = iter(DataLoader(dataset, batch_size=4, collate_fn=list, num_workers=2, multiprocessing_context="fork"))
print(json.dumps({"workers": [worker.pid for worker in iterator._workers]}), flush=True)
list(iterator)
"""


def test_workers_whose_parent_was_killed_end(stalled):
    with Told(ORPHANS) as script:
        assert len(script.next()["workers"]) == 2
        wait_for_requests(stalled, 2 * BATCH)
        script.process.kill()
        seconds, *_ = script.end()
    assert seconds < PROMISED_S


BEFORE = """
import multiprocessing, os, time

def until_it_is_dead(_):
    while os.getppid() == multiprocessing.parent_process().ident:
        time.sleep(0.01)
"""


def test_workers_whose_parent_was_killed_before_they_began_end(bucket):
    """torch takes whoever is their parent by then for the training process, and lets them wait for it for ever."""
    script = BEFORE + ORPHANS.replace('context="fork"', 'context="fork", worker_init_fn=until_it_is_dead')
    script = script.replace("print(", "assert all(queue._reader.poll(20) for queue in iterator._index_queues)\nprint(")
    with Told(script) as told:
        assert len(told.next()["workers"]) == 2
        told.process.kill()
        seconds, *_ = told.end()
    assert seconds < ENOUGH_S


def test_workers_whose_parent_was_killed_end_with_batches_that_nobody_takes(bucket):
    """A pipe holds 64 KiB of them."""
    script = ORPHANS.replace('methodcaller("read")', "lambda file: bytes(1 << 20)")
    with Told(script.replace("list(iterator)", "next(iterator), sys.stdin.read()")) as told:
        assert len(told.next()["workers"]) == 2
        wait_for_requests_made(bucket, 4 * BATCH)  # of what the loader asks for in advance, beyond the first batch
        told.process.kill()
        seconds, *_ = told.end()
    assert seconds < ENOUGH_S


# What has arrived waits for the writer, until the process is about to end.
ARRIVED = """
import gc, sys, threading, time
from asyncds import CachedS3MapDataset
from asyncds.cache import Cache

put_each, gate = Cache.put_each, threading.Event()

def late(self, *arguments):
    gate.wait()
    time.sleep(0.7)  # a slow disk
    return put_each(self, *arguments)

def main():
    dataset = CachedS3MapDataset.from_prefix("s3://mnist/train/")
    source = dataset._parts[0].source
    source.prefetch(list(source.manifest), 1, alone=False)
    while source.stats()["gets"] < 60:
        pass
    gate.set()
    if sys.argv[1] == "exit":
        globals()["kept"] = dataset
        sys.exit()

Cache.put_each = late
main()
gc.collect()
"""


@pytest.mark.parametrize("way", ["exit", "drop"])
def test_what_has_arrived_when_the_process_ends_is_in_the_cache(bucket, way):
    with Told(ARRIVED, way) as script:
        seconds, *rest = script.end()
    assert rest == [0, ""]
    assert seconds < ENOUGH_S
    with CachedS3MapDataset.from_prefix(PREFIX, transform=READ) as dataset:
        expect(dataset, [*range(60)])
    assert set(bucket.stats.gets.values()) == {1}


DROPPED = """
import gc, threading
from asyncds import CachedS3MapDataset
from asyncds.cache import Cache

put_many = Cache.put_many

def collecting(self, *arguments):
    gc.collect()
    return put_many(self, *arguments)

def fails(object):
    raise LookupError(object.key)

Cache.put_many = collecting
for _ in range(5):
    dataset = CachedS3MapDataset.from_prefix("s3://mnist/train/", transform=fails)
    try:
        dataset.__getitems__(range(40))
    except LookupError:
        pass
    del dataset
print({})
"""


def test_dataset_that_is_collected_on_any_thread_hangs_nobody(bucket):
    with Told(DROPPED) as script:
        assert script.next() == {}
        _, *rest = script.end()
    assert rest == [0, ""]


# leaving, in this process


class Announced(Dataset):
    """Counts the batches that are begun, in all of its processes."""

    def __init__(self, dataset, method: str = "fork") -> None:
        self._dataset = dataset
        self.begun = multiprocessing.get_context(method).Semaphore(0)

    def __getitems__(self, indices):
        self.begun.release()
        return self._dataset.__getitems__(indices)


def seconds_to_leave(loader: DataLoader, taken: int = 0, ready: Callable[[], bool] = lambda: True) -> float:
    """Seconds to leave a loop after so many batches, when all of its workers are in the next one. They have ended."""
    iterator = iter(loader)
    pids = [worker.pid for worker in iterator._workers]
    for _ in range(taken):
        next(iterator)
    for _ in range(taken + len(pids)):
        loader.dataset.begun.acquire()
    while not ready():
        pass
    left = time.monotonic()
    del iterator
    assert not any(map(runs, pids))
    return time.monotonic() - left


@pytest.mark.parametrize("method", ["fork", "forkserver", pytest.param("spawn", marks=pytest.mark.thorough)])
def test_workers_of_any_start_method_end_when_their_loader_is_left(stalled, method):
    with CachedS3MapDataset.from_prefix(PREFIX, transform=READ) as dataset:
        options = {"collate_fn": list, "num_workers": 2, "multiprocessing_context": method}
        loader = DataLoader(Announced(dataset, method), batch_sampler=batches_of(BATCH), **options)
        assert seconds_to_leave(loader, taken=2) < PROMISED_S


def batches_of(size: int) -> list[range]:
    """For a batch sampler, which does not ask for the length, and so does not list."""
    return [range(start, start + size) for start in range(0, 60, size)]


def test_workers_end_while_objects_drip_in(bucket):
    bucket.latency = 0.15
    with CachedS3MapDataset.from_prefix(PREFIX, transform=READ, concurrency=1) as dataset:
        dataset[0]
        loader = DataLoader(Announced(dataset), batch_sampler=batches_of(60), num_workers=1, **FORKED)
        seconds = seconds_to_leave(loader, ready=lambda: bucket.stats.requests["GET"] > 5)
    assert seconds < PROMISED_S, "long before the batch is there"


@pytest.mark.parametrize("lists", ["a worker", "the parent"])
def test_workers_that_wait_for_a_listing_end_when_their_loader_is_left(bucket, lists):
    bucket.script("mnist", None, [Fault.stall()], operation="LIST", forever=True)
    with CachedS3MapDataset.from_prefix(PREFIX, transform=READ) as dataset, ThreadPoolExecutor() as pool:
        if lists == "the parent":
            measured = pool.submit(len, dataset)
            wait_for_requests(bucket, 1)
        loader = DataLoader(Announced(dataset), batch_sampler=batches_of(BATCH), num_workers=2, **FORKED)
        assert seconds_to_leave(loader) < PROMISED_S
        assert bucket.stats.requests["LIST"] <= 1 + (lists == "a worker"), "one at a time"
        if lists == "the parent":
            dataset.close()
            with pytest.raises(DatasetClosed):
                measured.result()


def test_worker_that_waits_for_another_process_ends_when_its_loader_is_left(stalled, child):
    with CachedS3MapDataset.from_prefix(PREFIX, transform=READ) as dataset:
        expect(dataset, [*range(THERE)])
        child("fork", expect, dataset, [*range(THERE, 60)], wait=False)
        wait_for_requests(stalled, 60 - THERE)
        loader = DataLoader(Announced(dataset), batch_sampler=batches_of(BATCH), num_workers=2, **FORKED)
        assert seconds_to_leave(loader, taken=2) < PROMISED_S
        assert max(stalled.stats.gets.values()) == 1, "the workers have waited for it, and not asked themselves"


@pytest.mark.parametrize("ahead", [False, True])
def test_epoch_after_a_break_asks_again_only_for_what_was_in_flight(stalled, ahead):
    options = FORKED | {"batch_size": BATCH, "num_workers": 2}
    with CachedS3MapDataset.from_prefix(PREFIX, transform=READ) as dataset:
        loader = dataset.loader(**options) if ahead else DataLoader(dataset, **options)
        iterator = iter(loader)
        next(iterator), next(iterator)
        wait_for_requests(stalled, 2 * BATCH)
        del iterator
        in_flight = {key: count for (_, key), count in stalled.stats.gets.items() if key not in KEYS[:THERE]}
        assert set(in_flight.values()) == {1}
        stalled.clear_scripts()
        assert [*itertools.chain.from_iterable(loader)] == EXPECTED
    assert stalled.stats.gets == {("mnist", key): 1 + in_flight.get(key, 0) for key in KEYS}


def test_no_thread_is_left_after_close(bucket):
    with (
        CachedS3MapDataset.from_prefix(PREFIX, decode_threads=2) as first,
        CachedS3MapDataset.from_prefix(PREFIX) as second,
    ):
        first.__getitems__([0, 1, 2]), second[1]
        assert 1 <= sum("decoder" in name for name in our_threads()) <= 2
        assert sum("portal" in name for name in our_threads()) == 1, "datasets share one loop"
        first.close()
        assert second[2].key == KEYS[2]
    assert our_threads() == []


def test_dataset_that_is_only_forgotten_leaves_no_thread_and_no_file(bucket):
    dataset = CachedS3MapDataset.from_prefix(PREFIX, decode_threads=2)
    dataset.__getitems__([0, 1, 2])
    assert 1 <= sum("decoder" in name for name in our_threads()) <= 2
    folder = Settings().cache_dir / "asyncds"
    assert [*folder.glob("stats/*")] != []
    del dataset
    gc.collect()  # which waits for nothing: the loop winds up by itself
    for thread in threading.enumerate():
        if thread.name in our_threads():
            thread.join(ENOUGH_S)
    assert our_threads() == []
    assert [*folder.glob("stats/*"), *folder.glob("manifests/run-*")] == []


def test_close_ends_a_batch_that_is_under_way(stalled):
    dataset = CachedS3MapDataset.from_prefix(PREFIX)
    with ThreadPoolExecutor() as pool:
        batch = pool.submit(dataset.__getitems__, [20, 21, 22])
        wait_for_requests(stalled, 1)
        dataset.close()
        with pytest.raises(DatasetClosed):
            batch.result(ENOUGH_S)


def test_close_does_not_wait_for_a_disk_that_stands_still(bucket, monkeypatch):
    gate, put_each = threading.Event(), Cache.put_each

    def stuck(self, *arguments):
        gate.wait()
        return put_each(self, *arguments)

    monkeypatch.setattr(Cache, "put_each", stuck)
    monkeypatch.setattr(fetcher, "_SECONDS_TO_FLUSH", 0.1)
    dataset = CachedS3MapDataset.from_prefix(PREFIX)
    with ThreadPoolExecutor() as pool:
        batch = pool.submit(dataset.__getitems__, range(60))
        while dataset.stats()["gets"] < 60:
            pass
        closing = time.monotonic()
        dataset.close()
        seconds = time.monotonic() - closing
        assert len(batch.result(ENOUGH_S)) == 60, "all that was waited for had arrived"
    gate.set()
    assert seconds < PROMISED_S
