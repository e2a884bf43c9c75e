"""The dataset behind the stock DataLoader: in workers, when one of them dies, and inside a running loop."""

import asyncio
import contextlib
import gc
import hashlib
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from asyncds import CachedS3MapDataset, Connection, S3Reader, S3Store, Settings
from asyncds.errors import (
    AccessDenied,
    ConfigurationError,
    DatasetClosed,
    DeadlineExceeded,
    ObjectChanged,
    ObjectNotFound,
    TransferFailed,
)
from asyncds.retry import Retry
from asyncds.testing import Fault, S3Server

pytestmark = [
    # Python 3.12 warns of every fork beside a thread, and the dataset's loop is one.
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning"),
    # torch warns where there are fewer cores than workers.
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.usefixtures("fork_server"),
]

KEYS = [f"train/{number % 10}/{number:03}.bin" for number in range(60)]
PREFIX = "s3://mnist/train/"
ENOUGH_S = 20


def body(key: str) -> bytes:
    return hashlib.shake_128(key.encode()).digest(64)


class Augment:
    """Draws from each of the global generators, as augmentations do."""

    def __call__(self, object: S3Reader) -> torch.Tensor:
        drawn = [torch.rand(1).item(), random.random(), np.random.rand()]
        return torch.tensor([*object.read(), *drawn], dtype=torch.float64)


class Plain:
    """Needs no generator: the same sample in any process."""

    def __call__(self, object: S3Reader) -> torch.Tensor:
        return torch.tensor([*object.read()], dtype=torch.uint8)


class InMemory(Dataset):
    """What the epochs of asyncds are compared with."""

    def __init__(self, transform) -> None:
        self._keys = sorted(KEYS)
        self._transform = transform

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> torch.Tensor:
        key = self._keys[index]
        return self._transform(S3Reader("mnist", key, body(key)))


class Breaks:
    """Fails for one key."""

    def __call__(self, object: S3Reader) -> torch.Tensor:
        if object.key == KEYS[17]:
            raise ValueError("this one cannot be decoded")
        return Plain()(object)


class KillsItsProcess:
    """Takes its process with it at one key, as long as a file is there."""

    def __init__(self, path) -> None:
        self._path = path

    def __call__(self, object: S3Reader) -> bytes:
        if object.key == KEYS[17]:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
                os.kill(os.getpid(), signal.SIGKILL)
        return object.read()


@pytest.fixture(scope="module")
def server():
    with S3Server(process=True) as server:
        server.put_many("mnist", {key: body(key) for key in KEYS})
        yield server


def epochs(dataset, *, workers: int, persistent: bool = False, method: str | None = None) -> list[torch.Tensor]:
    """Two shuffled epochs under one seed."""
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    loader = DataLoader(
        dataset,
        batch_size=8,
        shuffle=True,
        num_workers=workers,
        persistent_workers=persistent,
        multiprocessing_context=method,
        pin_memory=torch.cuda.is_available(),
    )
    return [torch.cat([*loader]), torch.cat([*loader])]


@cache
def expected_epochs(workers: int, persistent: bool) -> list[torch.Tensor]:
    return epochs(InMemory(Augment()), workers=workers, persistent=persistent, method="fork" if workers else None)


def failure(loader: DataLoader) -> Exception:
    """The error that ends an epoch, without the frames that would keep the workers alive."""
    try:
        for _ in loader:
            pass
    except Exception as error:
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)
    raise AssertionError("the epoch did not fail")


# the same epoch as without asyncds


@pytest.mark.parametrize(
    ("method", "workers", "persistent"),
    [
        (None, 0, False),
        ("fork", 1, False),
        ("fork", 4, True),
        ("forkserver", 4, False),
        ("spawn", 2, True),
        pytest.param("fork", 1, True, marks=pytest.mark.thorough),
        pytest.param("fork", 4, False, marks=pytest.mark.thorough),
        pytest.param("forkserver", 1, False, marks=pytest.mark.thorough),
        pytest.param("forkserver", 1, True, marks=pytest.mark.thorough),
        pytest.param("forkserver", 4, True, marks=pytest.mark.thorough),
        pytest.param("spawn", 1, False, marks=pytest.mark.thorough),
    ],
)
def test_shuffled_epochs_with_random_transforms_are_those_of_a_plain_dataset(bucket, method, workers, persistent):
    with CachedS3MapDataset.from_prefix(PREFIX, transform=Augment()) as dataset:
        ours = epochs(dataset, workers=workers, persistent=persistent, method=method)
        stats = dataset.stats()
    assert all(map(torch.equal, ours, expected_epochs(workers, persistent)))
    assert bucket.stats.requests == {"LIST": 1, "GET": len(KEYS)}, "one listing, one GET per object, no HEAD"
    assert set(bucket.stats.gets.values()) == {1}
    assert (stats["samples"], stats["gets"]) == (2 * len(KEYS), len(KEYS)), "the parent sums what its workers count"
    assert (stats["hits"], stats["misses"]) == (len(KEYS), len(KEYS))


def test_epoch_after_an_item_was_read_in_the_parent_is_that_of_a_plain_dataset(bucket):
    with CachedS3MapDataset.from_prefix(PREFIX, transform=Augment()) as dataset:
        assert len(dataset[0]) == 67
        ours = epochs(dataset, workers=4, method="fork")
    assert all(map(torch.equal, ours, expected_epochs(4, False)))
    assert bucket.stats.requests == {"LIST": 1, "GET": len(KEYS)}


# requests


IN_ORDER = torch.stack([Plain()(S3Reader("mnist", key, body(key))) for key in sorted(KEYS)])


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_that_start_before_anyone_asked_for_the_length_list_once(bucket, method):
    bucket.latency = 0.05
    with CachedS3MapDataset.from_prefix(PREFIX, transform=Plain()) as dataset:
        loader = DataLoader(dataset, batch_size=8, num_workers=4, multiprocessing_context=method)
        assert torch.equal(torch.cat([*loader]), IN_ORDER)
    assert bucket.stats.requests == {"LIST": 1, "GET": len(KEYS)}


def test_batch_sampler_that_never_asks_for_the_length_lists_once(bucket):
    bucket.latency = 0.05
    batches = [range(start, start + 6) for start in range(0, 60, 6)]
    with CachedS3MapDataset.from_prefix(PREFIX, transform=Plain()) as dataset:
        loader = DataLoader(dataset, batch_sampler=batches, num_workers=4, multiprocessing_context="fork")
        assert torch.equal(torch.cat([*loader]), IN_ORDER)
    assert bucket.stats.requests == {"LIST": 1, "GET": len(KEYS)}


def test_threads_that_ask_for_the_length_at_once_list_once(bucket):
    bucket.latency = 0.1
    start = threading.Barrier(4)

    def measure(_: int) -> int:
        start.wait()
        return len(dataset)

    with CachedS3MapDataset.from_prefix(PREFIX) as dataset, ThreadPoolExecutor(4) as pool:
        assert [*pool.map(measure, range(4))] == [60] * 4
    assert bucket.stats.requests["LIST"] == 1


def test_workers_share_the_concurrency_of_their_parent(bucket):
    bucket.latency = 0.1
    with CachedS3MapDataset.from_prefix(PREFIX, transform=Plain(), concurrency=6) as dataset:
        dataset[0]
        bucket.reset_counts()
        loader = DataLoader(dataset, batch_size=15, num_workers=3, multiprocessing_context="fork")
        assert torch.equal(torch.cat([*loader]), IN_ORDER)
    assert 4 <= bucket.stats.max_in_flight <= 6


GENERATORS = """
import random
import numpy, torch
from asyncds import CachedS3MapDataset

def states():
    return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

before = states()
with CachedS3MapDataset.from_prefix("s3://mnist/train/") as dataset:
    dataset[0]
    dataset.__getitems__(range(1, 30))
    dataset.warm()
    print(states() == before)
"""


# threads for transforms


class Together:
    """Decodes only once as many threads as there are do so at the same time."""

    def __init__(self, threads):
        self.threads = threads
        self.barrier = None

    def __call__(self, file):
        if self.barrier is None:
            with _making:
                self.barrier = self.barrier or threading.Barrier(self.threads)
        self.barrier.wait(20)
        return file.key, threading.current_thread().name


_making = threading.Lock()


@pytest.mark.parametrize(("workers", "method"), [(0, None), (2, "fork"), (2, "spawn")])
def test_decode_threads_work_side_by_side_and_samples_keep_their_order(bucket, workers, method):
    with CachedS3MapDataset.from_prefix("s3://mnist/train/", transform=Together(3), decode_threads=3) as dataset:
        once = {"num_workers": workers, "multiprocessing_context": method, "persistent_workers": method == "spawn"}
        loading = DataLoader(dataset, 60, collate_fn=list, **once)
        for epoch in range(2):
            samples = [sample for batch in loading for sample in batch]
            assert [key for key, _ in samples] == sorted(KEYS), epoch
            assert len({name for _, name in samples}) == 3
            assert all(name.startswith("asyncds-decoder") for _, name in samples)
        assert dataset.stats()["samples"] == 2 * len(KEYS)


def test_threads_that_decoded_before_a_fork_decode_in_the_child(bucket, child):
    with CachedS3MapDataset.from_prefix("s3://mnist/train/", transform=Together(2), decode_threads=2) as dataset:
        assert len(dataset.__getitems__([*range(10)])) == 10
        child("fork", dataset.__getitems__, [*range(10)])


def test_global_generators_are_left_alone(bucket):
    done = run_script(GENERATORS)
    assert (done.stdout, done.stderr) == (b"True\n", b"")


WARM_EPOCH = """
from torch.utils.data import DataLoader
from asyncds import CachedS3MapDataset

with CachedS3MapDataset.from_prefix("s3://mnist/train/", transform=lambda object: object.read().hex()) as dataset:
    for batch in DataLoader(dataset, batch_size=8, num_workers=2, multiprocessing_context="fork"):
        print(*batch)
"""


def run_script(script: str, *arguments: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *arguments],
        input=stdin,
        capture_output=True,
        timeout=ENOUGH_S,
        check=False,
    )


def test_fresh_process_with_a_warm_cache_sends_no_get(bucket):
    with CachedS3MapDataset.from_prefix(PREFIX) as dataset:
        dataset.__getitems__(range(60))
    assert bucket.stats.requests == {"LIST": 1, "GET": len(KEYS)}
    warm = run_script(WARM_EPOCH)
    assert warm.stdout.decode().split() == [body(key).hex() for key in sorted(KEYS)]
    assert warm.stderr == b""
    assert bucket.stats.requests == {"LIST": 2, "GET": len(KEYS)}


# fork


EXPECTED = [body(key) for key in sorted(KEYS)]


def expect(dataset, rows: list[int]) -> None:
    assert dataset.__getitems__(rows) == [EXPECTED[row] for row in rows]


def test_child_that_closes_the_dataset_leaves_the_parents_open(bucket, child):
    def close() -> None:
        expect(dataset, [0, 1])
        dataset.close()

    with CachedS3MapDataset.from_prefix(PREFIX, transform=S3Reader.read) as dataset:
        expect(dataset, [0])
        child("fork", close)
        expect(dataset, [0, 1, 2, 3])
        assert dataset.stats()["samples"] == 1 + 2 + 4
    assert bucket.stats.requests == {"LIST": 1, "GET": 4}


def test_store_that_was_made_and_used_before_the_fork_works_in_a_worker(bucket):
    store = S3Store(Connection.resolve(Settings()), concurrency=4, timeout=5, retry=Retry(3, 10, 5))
    with CachedS3MapDataset.from_prefix(PREFIX, transform=Plain(), store=store) as dataset:
        dataset.__getitems__([0, 1, 2, 3])
        loader = DataLoader(dataset, batch_size=8, num_workers=2, multiprocessing_context="fork")
        assert torch.equal(torch.cat([*loader]), IN_ORDER)
    assert bucket.stats.requests == {"LIST": 1, "GET": len(KEYS)}


# a worker dies, a worker raises


def test_worker_killed_in_a_batch_makes_the_loader_raise_and_the_next_run_is_clean(bucket, tmp_path):
    # Bytes, not tensors: torch shares tensors by descriptors that a dead worker cannot hand over.
    options = {"batch_size": 8, "collate_fn": list, "num_workers": 2, "multiprocessing_context": "fork"}
    trap = tmp_path / "trap"
    trap.touch()
    with CachedS3MapDataset.from_prefix(PREFIX, transform=KillsItsProcess(trap)) as dataset:
        raised = failure(DataLoader(dataset, **options))
    assert type(raised) is RuntimeError
    assert not trap.exists()
    with CachedS3MapDataset.from_prefix(PREFIX, transform=S3Reader.read) as dataset:
        for _ in range(2):
            assert [sample for batch in DataLoader(dataset, **options) for sample in batch] == EXPECTED
        stats = dataset.stats()
    assert stats["samples"] == 2 * len(KEYS)
    assert stats["misses"] == stats["gets"]
    assert stats["hits"] >= len(KEYS)


@pytest.mark.parametrize(
    ("method", "fault", "options", "error"),
    [
        ("fork", Fault.status(404, "NoSuchKey"), {}, ObjectNotFound),
        ("forkserver", Fault.status(404, "NoSuchKey"), {}, ObjectNotFound),
        ("fork", Fault.status(403, "AccessDenied"), {}, AccessDenied),
        ("fork", Fault.status(412, "PreconditionFailed"), {}, ObjectChanged),
        ("fork", Fault.status(503, "SlowDown"), {"retries": 1}, TransferFailed),
        ("fork", Fault.stall(), {"deadline": 2}, DeadlineExceeded),
    ],
)
def test_store_error_in_a_worker_keeps_its_class_and_names_the_object(bucket, method, fault, options, error):
    bucket.script("mnist", KEYS[17], [fault], forever=True)
    with CachedS3MapDataset.from_prefix(PREFIX, transform=Plain(), **options) as dataset:
        loader = DataLoader(dataset, batch_size=8, num_workers=1, multiprocessing_context=method)
        raised = failure(loader)
    assert type(raised) is error
    assert f"s3://mnist/{KEYS[17]}" in str(raised)


@pytest.mark.parametrize("workers", [0, 1])
def test_error_of_a_transform_keeps_its_class_and_names_the_object(bucket, workers):
    with CachedS3MapDataset.from_prefix(PREFIX, transform=Breaks()) as dataset:
        loader = DataLoader(
            dataset, batch_size=8, num_workers=workers, multiprocessing_context="fork" if workers else None
        )
        raised = failure(loader)
    assert type(raised) is ValueError
    said = [str(raised), *getattr(raised, "__notes__", ())]
    assert "this one cannot be decoded" in said[0]
    assert any(f"while transforming s3://mnist/{KEYS[17]}" in text for text in said)
    assert sum(text.count("while transforming") for text in said) == 1


def test_loader_goes_on_after_an_error_of_a_transform(bucket):
    with CachedS3MapDataset.from_prefix(PREFIX, transform=Breaks()) as dataset:
        with pytest.raises(ValueError, match="cannot be decoded"):
            list(DataLoader(dataset, batch_size=60))
        again = dataset.with_transform(Plain())
        assert torch.equal(torch.cat([*DataLoader(again, batch_size=8)]), IN_ORDER)
    assert bucket.stats.requests["GET"] == len(KEYS)


# where it is called from


def test_works_inside_a_running_event_loop(bucket):
    async def train() -> torch.Tensor:
        with CachedS3MapDataset.from_prefix(PREFIX, transform=Plain()) as dataset:
            assert torch.equal(dataset[-1], IN_ORDER[-1])
            return torch.cat([*DataLoader(dataset, batch_size=8, num_workers=1, multiprocessing_context="fork")])

    assert torch.equal(asyncio.run(train()), IN_ORDER)


def test_works_in_a_thread_that_is_not_the_main_one(bucket):
    with CachedS3MapDataset.from_prefix(PREFIX, transform=Plain()) as dataset, ThreadPoolExecutor() as pool:
        assert torch.equal(pool.submit(lambda: torch.cat([*DataLoader(dataset, batch_size=8)])).result(), IN_ORDER)


# pickles


CANARY = "canary-of-the-credentials"


@pytest.fixture
def canaries(bucket, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    for name in ("MINIO_ACCESS_KEY", "MINIO_SECRET_KEY"):
        monkeypatch.setenv(name, f"{CANARY}-{name}")


@pytest.mark.usefixtures("canaries")
def test_pickled_dataset_holds_no_credentials_and_reads_in_a_fresh_process(bucket):
    with CachedS3MapDataset.from_prefix(PREFIX, label="parent") as dataset:
        assert dataset[0][0].read() == body(KEYS[0])
        pickled = pickle.dumps(dataset)
        assert CANARY.encode() not in pickled
        script = """
            import pickle, sys
            with pickle.load(sys.stdin.buffer) as dataset:
                object, label = dataset[-1]
                print(len(dataset), object.key, object.read().hex(), label, dataset.classes[0])
        """
        done = run_script(script, stdin=pickled)
        assert done.stderr.decode() == ""
        key = sorted(KEYS)[-1]
        assert done.stdout.decode() == f"60 {key} {body(key).hex()} 9 0\n"
        assert dataset.stats()["samples"] == 2, "the copy counts for the original"
        assert dataset[1][0].read() == body(sorted(KEYS)[1]), "closing the copy leaves the original open"
    assert bucket.stats.requests["LIST"] == 1


@pytest.mark.usefixtures("canaries")
def test_pickled_dataset_with_a_store_of_its_own_holds_no_credentials():
    store = S3Store(Connection.resolve(Settings()), concurrency=4, timeout=5, retry=Retry(3, 10, 5))
    with CachedS3MapDataset.from_objects(f"s3://mnist/{KEYS[0]}", store=store) as dataset:
        assert CANARY.encode() not in pickle.dumps(dataset)


def test_pickle_outlives_the_dataset_that_it_was_made_from(bucket):
    with CachedS3MapDataset.from_prefix(PREFIX) as dataset:
        pickled = pickle.dumps(dataset)
    with pickle.loads(pickled) as again:
        assert again[0].read() == body(KEYS[0])


def test_pickling_a_closed_dataset_says_that_it_is_closed(bucket):
    dataset = CachedS3MapDataset.from_prefix(PREFIX)
    dataset.close()
    with pytest.raises(DatasetClosed, match="closed"):
        pickle.dumps(dataset)


CALLBACKS = """
from asyncds import CachedS3MapDataset

first = CachedS3MapDataset.from_prefix("s3://mnist/train/")
second = CachedS3MapDataset.from_prefix("s3://mnist/train/", label=lambda key: len(first))
print(len(second) == len(first))
keys = {info.key for info in first.manifest}
third = CachedS3MapDataset.from_prefix("s3://mnist/train/", match=lambda key: key in {i.key for i in first.manifest})
print(len(third) == len(keys))
"""


def test_label_and_match_may_look_at_another_dataset(bucket):
    done = run_script(CALLBACKS)
    assert (done.stdout, done.stderr) == (b"True\nTrue\n", b"")


def test_pickle_that_outlives_the_process_says_so(bucket):
    script = "import sys, pickle; from asyncds import CachedS3MapDataset\n"
    script += "sys.stdout.buffer.write(pickle.dumps(CachedS3MapDataset.from_prefix('s3://mnist/train/')))"
    dataset = pickle.loads(run_script(script).stdout)
    with pytest.raises(ConfigurationError, match="the process that pickled this dataset is gone"):
        len(dataset)


# a cache that is only read


@pytest.mark.parametrize("method", [None, "fork", "spawn"])
def test_epoch_over_a_cache_that_is_only_read(bucket, method):
    with CachedS3MapDataset.from_prefix(PREFIX, transform=Plain()) as dataset:
        dataset.__getitems__(range(0, len(dataset), 2))
    bucket.reset_counts()
    with (
        warnings.catch_warnings(action="ignore"),
        CachedS3MapDataset.from_prefix(PREFIX, transform=Plain(), cache_read_only=True) as dataset,
    ):
        workers = {None: 0, "fork": 2, "spawn": 1}[method]
        loader = DataLoader(dataset, 10, num_workers=workers, multiprocessing_context=method)
        assert torch.equal(torch.cat([*loader]), IN_ORDER)
        stats = dataset.stats()
        place = dataset._parts[0].source.counters.path
    assert stats["samples"] == len(IN_ORDER)
    assert bucket.stats.requests["GET"] == len(IN_ORDER) // 2 == stats["uncached"]
    if method != "spawn":  # whose pickle may outlive the dataset, so that it stays until the process ends
        assert not place.parent.parent.exists(), "what the run shared is gone with it"


class Frozen:
    """How many objects the garbage collector leaves alone in the process that transforms; counting takes long."""

    def __call__(self, object: S3Reader) -> int:
        return gc.get_freeze_count()


@pytest.mark.parametrize("workers", [0, 1])
def test_collector_leaves_alone_what_a_worker_has_inherited_and_only_there(bucket, workers):
    with CachedS3MapDataset.from_prefix(PREFIX, transform=Frozen()) as dataset:
        few = {"batch_size": 2, "sampler": range(4), "num_workers": workers}
        cold = torch.cat([*dataset.loader(**few)])
        warm = torch.cat([*dataset.loader(**few)])  # nothing is brought, and no client is made
    for counts in (cold, warm):
        assert (counts.min() > 10_000) == (workers > 0)
        assert counts.max() == 0 or workers
