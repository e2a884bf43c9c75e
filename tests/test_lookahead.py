"""Look-ahead: the batches stay what they were, arrive before they are asked for, and go on where they were left."""

import asyncio
import gc
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Iterable
from functools import cache
from hashlib import shake_128
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

from asyncds import CachedS3MapDataset, Fetcher, LookaheadBatchSampler, S3Reader, loader
from asyncds.errors import ConfigurationError, ObjectNotFound
from asyncds.lookahead import Batch, Horizon
from asyncds.source import Source
from asyncds.testing import FakeStore, Fault, S3Server

pytestmark = [
    # Python 3.12 warns of every fork beside a thread, and the dataset's loop is one.
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning"),
    # torch warns where there are fewer cores than workers.
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    # torchdata 0.11 calls what torch has given up since.
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
]

COUNT = 60
ROWS = range(COUNT)
KEYS = [f"train/{number:02}" for number in ROWS]
OTHERS = [f"test/{number:02}" for number in range(20)]
PREFIX = "s3://mnist/train/"
BATCH = 7
ENOUGH_S = 30
PATIENCE_S = 10


def body(key: str) -> bytes:
    return shake_128(key.encode()).digest(64)


def until(reached) -> None:
    """Wait for what somebody else does; a test that waits in vain fails."""
    end = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < end, "it did not come to that"


def key_of(object: S3Reader) -> str:
    return object.key


class Augment:
    """Draws from each of the global generators, as augmentations do."""

    def __call__(self, object: S3Reader) -> torch.Tensor:
        drawn = [torch.rand(1).item(), random.random(), np.random.rand()]
        return torch.tensor([*object.read(), *drawn], dtype=torch.float64)


class InMemory(Dataset):
    """What the epochs of asyncds are compared with."""

    def __init__(self, transform) -> None:
        self._transform = transform

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._transform(S3Reader("mnist", KEYS[index], body(KEYS[index])))


class Held:
    """A transform that lets no sample go before so many objects have arrived in all processes, and are put away."""

    def __init__(self, *datasets: CachedS3MapDataset) -> None:
        self._datasets = datasets
        self.arrived = 0

    def __call__(self, object: S3Reader) -> str:
        until(lambda: sum(dataset.stats()["gets"] for dataset in self._datasets) >= self.arrived)
        until(lambda: all("<Fetcher 0 in flight" in repr(fetcher_of(dataset)) for dataset in self._datasets))
        return object.key


def fetcher_of(dataset: CachedS3MapDataset) -> Fetcher:
    return dataset._parts[0].source.runtime().fetcher


@pytest.fixture(scope="module")
def server():
    with S3Server(process=True) as server:
        server.put_many("mnist", {key: body(key) for key in KEYS + OTHERS})
        yield server


@pytest.fixture
def dataset(bucket):
    with CachedS3MapDataset.from_prefix(PREFIX, transform=key_of) as dataset:
        yield dataset


@pytest.fixture
def store() -> FakeStore:
    """A store in memory, for what does not depend on how objects travel."""
    return FakeStore({("mnist", key): body(key) for key in KEYS})


@pytest.fixture
def stored(store):
    with CachedS3MapDataset.from_prefix(PREFIX, store=store, transform=key_of) as dataset:
        yield dataset


def method(workers: int) -> str | None:
    return "fork" if workers else None


def keys(batches) -> list[str]:
    return [key for batch in batches for key in batch]


def each_once(server: S3Server, names: list[str] = KEYS) -> bool:
    return dict(server.stats.gets) == {("mnist", name): 1 for name in names}


# frameworks that rebuild samplers and share batches out


JOBS = {
    "accelerate": ("shuffled", "workers", "split", "batch sampler"),
    "lightning": ("hook shuffled", "workers", "hook weighted", "batch sampler"),
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@cache
def job(framework: str, server: S3Server) -> dict[str, list[dict[str, Any]]]:
    """What each of two ranks says of each way to make a loader; each way has objects of its own."""
    ways = JOBS[framework]
    server.put_many("mnist", {f"{way}/{row:02}": body(way) for way in ways for row in ROWS})
    names = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    script = str(Path(__file__).with_name("frameworks.py"))
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(
                [sys.executable, script, framework, folder, *ways],
                env=os.environ | names | {"RANK": rank, "LOCAL_RANK": rank},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in "01"
        ]
        try:
            said = [rank.communicate(timeout=200)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        if any(rank.returncode for rank in ranks):
            return {way: [{"error": text} for text in said] for way in ways}
        answers = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in "01"]
    gets = server.stats.gets
    asked = {way: [gets["mnist", f"{way}/{row:02}"] for row in ROWS] for way in ways}
    return {way: [answer[way] | {"asked": asked[way]} for answer in answers] for way in ways}


@pytest.fixture
def ranks(bucket):
    """Ask what two ranks were given; the job runs when it is first asked about."""

    def ask(framework: str, way: str) -> list[dict[str, Any]]:
        if importlib.util.find_spec(framework) is None:
            pytest.skip(f"{framework} is not installed")
        found = job(framework, bucket)[way]
        for rank in found:
            assert "error" not in rank, rank["error"]
        return found

    return ask


@pytest.mark.thorough
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("framework", "way"),
    [
        ("accelerate", "shuffled"),
        ("accelerate", "workers"),
        ("accelerate", "split"),
        ("accelerate", "batch sampler"),
        ("lightning", "hook shuffled"),
        ("lightning", "workers"),
    ],
)
def test_ranks_get_what_a_stock_loader_gives_them_and_each_reads_its_own_ahead(ranks, framework, way):
    one, other = ranks(framework, way)
    assert (one["found"], other["found"]) == (one["expected"], other["expected"])
    assert sorted(one["found"] + other["found"]) == [*ROWS], "no row twice, and none left out"
    assert one["prefetch_hits"] > 0
    assert other["prefetch_hits"] > 0
    assert (one["gets"], other["gets"]) == (COUNT / 2, COUNT / 2), "each rank fetches its own objects, and once"
    assert one["asked"] == [1] * COUNT, "says the server"


@pytest.mark.thorough
@pytest.mark.timeout(240)
def test_sampler_that_was_given_is_the_one_that_lightning_shares_out(ranks):
    for rank in ranks("lightning", "hook weighted"):
        assert rank["found"] == rank["expected"]


@pytest.mark.thorough
@pytest.mark.timeout(240)
@pytest.mark.xfail(strict=True, reason="Lightning puts its sampler into ours, in the place of the user's batch sampler")
def test_batch_sampler_that_was_given_is_the_one_that_lightning_shares_out(ranks):
    for rank in ranks("lightning", "batch sampler"):
        assert rank["found"] == rank["expected"]


@pytest.mark.thorough
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("framework", "way"),
    [
        ("accelerate", "shuffled"),
        ("lightning", "hook shuffled"),
        pytest.param(
            *("lightning", "workers"),
            marks=pytest.mark.xfail(strict=True, reason="Lightning rebuilds it from three arguments"),
        ),
    ],
)
def test_depth_survives_the_framework(ranks, framework, way):
    assert [rank["depth"] for rank in ranks(framework, way)] == [9, 9]


# the batches


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Own:
    """A user's own batch sampler: batches of varying length from a generator, which draws when it begins."""

    def __iter__(self):
        order = torch.randperm(COUNT).tolist()
        for size in itertools.cycle((1, 9, 4)):
            if not order:
                return
            yield order[:size]
            del order[:size]


WEIGHTS = [1 + row % 3 for row in ROWS]
SAMPLERS = {
    "sequential": lambda _: SequentialSampler(ROWS),
    "random": lambda _: RandomSampler(ROWS),
    "random-generator": lambda seed: RandomSampler(ROWS, generator=drawn(seed)),
    "random-fewer": lambda _: RandomSampler(ROWS, num_samples=40),
    "random-more": lambda _: RandomSampler(ROWS, num_samples=150),
    "random-more-generator": lambda seed: RandomSampler(ROWS, num_samples=150, generator=drawn(seed)),
    "random-drop": lambda _: RandomSampler(ROWS),
    "replacement": lambda _: RandomSampler(ROWS, replacement=True, num_samples=100),
    "replacement-generator": lambda seed: RandomSampler(ROWS, replacement=True, num_samples=99, generator=drawn(seed)),
    "weighted": lambda _: WeightedRandomSampler(WEIGHTS, 70),
    "weighted-generator": lambda seed: WeightedRandomSampler(WEIGHTS, 50, replacement=False, generator=drawn(seed)),
    "subset": lambda _: SubsetRandomSampler(ROWS[10:50]),
    "subset-generator": lambda seed: SubsetRandomSampler(ROWS[10:50], generator=drawn(seed)),
    "distributed": lambda _: DistributedSampler(ROWS, num_replicas=2, rank=1, seed=5),
    "own": lambda _: Own(),
}
OF_THEIR_OWN = [name for name in SAMPLERS if name.endswith("generator")]
WITHOUT_CHANCE = ["sequential", "distributed"]


def plain(name: str, seed: int = 3):
    """A batch sampler of torch, or the user's own; `seed` is that of its generator, if it has one."""
    sampler = SAMPLERS[name](seed)
    return sampler if name == "own" else BatchSampler(sampler, BATCH, drop_last=name == "random-drop")


def ahead(name: str, seed: int = 3, depth: int = 16) -> LookaheadBatchSampler:
    return LookaheadBatchSampler(plain(name, seed), depth=depth)


@pytest.mark.parametrize("depth", [0, 1, 16, 1000])
@pytest.mark.parametrize("name", SAMPLERS)
def test_epochs_are_those_of_the_wrapped_sampler_and_leave_the_global_generator_as_it_does(name, depth):
    def epochs(batches) -> list:
        torch.manual_seed(7)
        return [([*batches], torch.get_rng_state().tolist()) for _ in range(2)]

    assert epochs(ahead(name, depth=depth)) == epochs(plain(name))


@pytest.mark.parametrize("name", SAMPLERS)
def test_nothing_is_drawn_before_the_first_batch_is_asked_for(name):
    before = torch.get_rng_state()
    batches = iter(ahead(name))
    assert torch.equal(torch.get_rng_state(), before)
    next(batches)


@pytest.mark.parametrize("depth", [0, 1, 16, 1000])
def test_wrapped_sampler_is_asked_for_depth_batches_more_than_were_taken(depth):
    asked = []
    batches = iter(LookaheadBatchSampler((asked.append(row) or [row] for row in ROWS), depth=depth))
    assert asked == []
    for taken, batch in enumerate(batches, 1):
        assert batch == [taken - 1]
        assert len(asked) == min(taken + depth, COUNT)


def test_batches_are_the_same_whether_batched_before_or_by_the_wrapper():
    for drop_last in (False, True):
        sampler = SequentialSampler(ROWS)
        wrapped = LookaheadBatchSampler(sampler, BATCH, drop_last)
        assert [*wrapped] == [*BatchSampler(sampler, BATCH, drop_last)]
        assert (wrapped.sampler, wrapped.batch_size, wrapped.drop_last) == (sampler, BATCH, drop_last)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in OF_THEIR_OWN])
def test_two_iterators_at_once_do_not_disturb_each_other(name):
    def both(batches) -> list:
        torch.manual_seed(7)
        return [*zip(batches, batches, strict=False)]

    assert both(ahead(name)) == both(plain(name))


def test_epoch_reaches_the_distributed_sampler():
    batches, orders = ahead("distributed"), []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        orders.append([*batches])
    assert orders[0] == orders[2] != orders[1]
    assert batches.sampler.epoch == 0


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "own"])
def test_length_is_that_of_the_wrapped_sampler(name):
    assert len(ahead(name)) == len(plain(name)) == len([*plain(name)])


def test_sampler_without_a_length_has_none():
    with pytest.raises(TypeError, match="len"):
        len(ahead("own"))


class Endless:
    """A sampler that nobody asked for a length."""

    def __iter__(self):
        return iter(ROWS)


def test_sampler_without_a_length_can_be_batched(stored):
    assert keys(DataLoader(stored, BATCH, sampler=Endless(), collate_fn=list)) == KEYS
    assert keys(loader(stored, BATCH, sampler=Endless(), collate_fn=list)) == KEYS


@pytest.mark.parametrize(
    "batches",
    [
        [["a", "b"], ["c"]],
        [[(0, 1), (2, 3)], [(4, 5)]],
        [[], [1], []],
        [[-1, 3], [-2]],
        [[1 << 40], [None]],
    ],
)
def test_batches_that_are_no_rows_pass_unchanged(batches):
    found = [pickle.loads(pickle.dumps(batch)) for batch in LookaheadBatchSampler(batches)]
    assert found == batches


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor, lambda rows: array("q", rows)])
def test_batches_may_be_of_any_kind_that_holds_rows(kind):
    rows = [[3, 1, 2], [5, 4]]
    batches = [*LookaheadBatchSampler([kind(batch) for batch in rows])]
    assert [[int(row) for row in batch] for batch in batches] == rows
    assert [told.tolist() for told in Horizon().extended(batches[0])] == [rows[1]]


def facts(batch: Batch) -> tuple:
    return [*batch], batch.iteration, batch.number, batch.shared, [told.tolist() for told in batch.ahead], batch.cut


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("part", [slice(None), slice(2, 5), slice(None, None, 2)])
def test_batch_survives_pickling(protocol, part):
    batch = [*ahead("random", depth=4)][2][part]
    sent = pickle.loads(pickle.dumps(batch, protocol))
    assert type(sent) is Batch
    assert facts(sent) == facts(batch)
    assert [len(told) for told in sent.ahead] == [BATCH] * 4
    assert sent.source is None
    assert facts(pickle.loads(pickle.dumps(sent, protocol))) == facts(batch)


def test_slice_of_a_batch_knows_the_same_slices_of_the_next_ones():
    batches = [*ahead("random", depth=4)]
    for part in (slice(3), slice(3, None), slice(None, None, -2)):
        told = Horizon().extended(pickle.loads(pickle.dumps(batches[0][part])))
        assert [rows.tolist() for rows in told] == [batch[part] for batch in batches[1:5]]
    assert type(batches[0][1]) is int


def test_sixteen_batches_of_200_are_sent_in_14_kilobytes():
    batch = next(iter(LookaheadBatchSampler(RandomSampler(range(1_000_000)), 200)))
    assert len(batch.ahead) == 16
    assert len(pickle.dumps(batch)) < 14_500


# the side that is told


@pytest.fixture
def in_worker(monkeypatch):
    """Let this process take itself for a worker of so many; 0 is none."""

    def become(workers: int) -> None:
        told = SimpleNamespace(num_workers=workers) if workers else None
        monkeypatch.setattr("asyncds.lookahead.get_worker_info", lambda: told)

    return become


@pytest.fixture
def in_job(monkeypatch):
    """Let this process take itself for one of so many ranks."""

    def become(ranks: int) -> None:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)

    return become


def pairs(depth: int = 16) -> list[Batch]:
    """An epoch of thirty batches of two."""
    return [*LookaheadBatchSampler(SequentialSampler(ROWS), 2, depth=depth)]


def joined(lists: Iterable[list]) -> list:
    return [*itertools.chain.from_iterable(lists)]


def told(horizon: Horizon, batches: list[Batch]) -> list[list[list[int]]]:
    """What each of these batches says of the next ones, after its way to a worker."""
    return [[rows.tolist() for rows in horizon.extended(pickle.loads(pickle.dumps(batch)))] for batch in batches]


@pytest.mark.parametrize("depth", [8, 16, 100])
@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_each_batch_is_told_once_and_only_to_the_worker_that_gets_it(in_worker, workers, depth):
    in_worker(workers)
    batches, share = pairs(depth), workers or 1
    for worker in range(share):
        mine = batches[worker::share]
        news = told(Horizon(), mine)
        assert joined(news) == mine[1:], "all but the first, nearest first"
        assert news[0] == mine[1 : 1 + depth // share]
        assert all(len(new) <= 1 for new in news[1:])


def test_batches_beyond_the_depth_are_not_told(in_worker):
    in_worker(4)
    assert told(Horizon(), pairs(3)[1::4]) == [[]] * 8
    in_worker(0)
    assert told(Horizon(), pairs(0)) == [[]] * 30


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("ranks", [2, 3])
def test_where_ranks_share_batches_out_the_second_batch_tells_which_are_mine(in_worker, in_job, ranks, workers):
    in_worker(workers)
    in_job(ranks)
    batches, share = pairs(), workers or 1
    for rank, worker in itertools.product(range(ranks), range(share)):
        mine = batches[rank::ranks][worker::share]
        assert joined(told(Horizon(), mine)) == mine[2:]


@pytest.mark.parametrize("workers", [0, 2])
def test_where_ranks_share_each_batch_out_the_slices_are_told(in_worker, in_job, workers):
    in_worker(workers)
    in_job(2)
    batches, share = [*LookaheadBatchSampler(SequentialSampler(ROWS), 4)], workers or 1
    for rank, worker in itertools.product(range(2), range(share)):
        mine = [batch[2 * rank : 2 * rank + 2] for batch in batches[worker::share]]
        assert joined(told(Horizon(), mine)) == mine[2:]


def test_ranks_with_samplers_of_their_own_share_no_batches(in_job):
    in_job(2)
    batches = [*ahead("distributed")]
    assert joined(told(Horizon(), batches)) == batches[1:]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("workers", [0, 2, 4])
def test_batches_out_of_order_are_told_at_most_once(in_worker, in_job, workers, ranks):
    in_worker(workers)
    in_job(ranks)
    for seed in range(20):
        batches = pairs()
        news = joined(told(Horizon(), random.Random(seed).sample(batches, 20)))
        assert len(news) == len({*map(tuple, news)}) <= 30


def test_several_iterations_at_once_are_told_apart():
    horizon, iterations = Horizon(), [pairs() for _ in range(8)]
    news = [told(horizon, [*batches]) for batches in zip(*iterations, strict=True)]
    for place, batches in enumerate(iterations):
        assert joined(new[place] for new in news) == batches[1:]


def test_iterations_without_end_take_no_memory():
    horizon = Horizon()
    for batch in (next(iter(ahead("sequential"))) for _ in range(1000)):
        horizon.extended(batch)
    assert len(pickle.dumps(horizon)) < 1000


# where an epoch is


def saved(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(name: str, state: dict, depth: int = 3) -> LookaheadBatchSampler:
    """A sampler in another process, so to speak: its generators are elsewhere."""
    torch.manual_seed(99)
    random.seed(99)
    sampler = ahead(name, 99, depth)
    sampler.load_state_dict(saved(state))
    return sampler


def interrupted(name: str, taken: int, batches_done: int | None = None) -> tuple[dict, list, list[list]]:
    """The state after so many batches of the first epoch, these batches, and two epochs without interruption."""
    torch.manual_seed(7)
    sampler = ahead(name)
    sampler.set_epoch(2)
    batches = iter(sampler)
    first = [*itertools.islice(batches, taken)]
    state = sampler.state_dict(batches_done)
    epochs = [[*first, *batches]]
    torch.manual_seed(8)
    return state, first[:batches_done], [*epochs, [*sampler]]


def samples(batches: list) -> list[int]:
    return sorted(row for batch in batches for row in batch)


@pytest.mark.parametrize("name", SAMPLERS)
def test_epoch_that_was_interrupted_anywhere_and_resumed_elsewhere_is_the_whole_epoch(name):
    length = len([*plain(name)])
    for taken in range(1, length + 1):
        state, first, (whole, following) = interrupted(name, taken)
        again = resumed(name, state)
        before = torch.get_rng_state()
        assert [*first, *again] == whole
        assert torch.equal(torch.get_rng_state(), before), "the training's chance is its own"
        fresh = [*again]
        assert len(samples(fresh)) == len(samples(whole))
        if name in OF_THEIR_OWN + WITHOUT_CHANCE:
            assert fresh == following
        elif name in ("random", "subset", "own"):
            assert samples(fresh) == samples(whole)
            assert fresh != whole


@pytest.mark.parametrize("name", SAMPLERS)
def test_epoch_is_resumed_after_the_batches_that_training_has_had(name):
    for done in range(6):
        state, first, (whole, _) = interrupted(name, 5, done)
        assert len(first) == done == state["batches"]
        assert [*first, *resumed(name, state)] == whole


@pytest.mark.parametrize("name", SAMPLERS)
def test_epoch_may_be_interrupted_again(name):
    state, first, (whole, _) = interrupted(name, 2)
    again = resumed(name, state)
    assert facts_of(again.state_dict()) == facts_of(state)
    second = [*itertools.islice(iter(again), 2)]
    assert first + second + [*resumed(name, again.state_dict())] == whole


def facts_of(state: dict) -> dict:
    return {name: str(value) for name, value in state.items()}


@pytest.mark.parametrize("name", SAMPLERS)
def test_state_before_the_first_batch_is_that_of_a_whole_epoch(name):
    for begin in (iter, len):
        sampler = ahead(name)
        batches = begin(sampler) if name != "own" else None
        again = resumed(name, sampler.state_dict())
        assert len(samples(again)) == len(samples(plain(name)))
        del batches


@pytest.mark.parametrize("name", [*OF_THEIR_OWN, "distributed"])
def test_state_before_the_first_batch_knows_the_order_that_does_not_hang_on_the_global_generator(name):
    sampler = ahead(name)
    sampler.set_epoch(2)
    state = sampler.state_dict()
    assert [*resumed(name, state)] == [*sampler]


def test_state_of_an_epoch_that_has_begun_is_not_that_of_the_one_before():
    sampler = ahead("random")
    assert samples(sampler) == [*ROWS]
    batches = iter(sampler)
    state = sampler.state_dict()
    assert samples(batches) == [*ROWS]
    assert samples(resumed("random", state)) == [*ROWS]


def test_state_is_that_of_the_iteration_that_was_begun_last():
    sampler = ahead("random")
    earlier = iter(sampler)
    next(earlier), next(earlier)
    later = iter(sampler)
    next(later)
    next(earlier)
    assert sampler.state_dict()["batches"] == 1


def test_state_is_plain_numbers_texts_and_tensors():
    for name in SAMPLERS:
        state, _, _ = interrupted(name, 2)
        for value in state.values():
            for item in value if isinstance(value, list) else [value]:
                assert isinstance(item, int | str | torch.Tensor | None)


@pytest.mark.parametrize(
    "workers",
    [0, 4],
)
def test_plain_loader_with_workers_resumes_after_what_it_delivered_with_any_number_of_workers(workers):
    def read(sampler: LookaheadBatchSampler, workers: int, count: int | None = None) -> list[list[int]]:
        loader = DataLoader(ROWS, batch_sampler=sampler, num_workers=workers, multiprocessing_context=method(workers))
        return [batch.tolist() for batch in itertools.islice(loader, count)]

    torch.manual_seed(7)
    sampler = ahead("random")
    first = read(sampler, 2, 3)
    assert sampler.state_dict()["batches"] > 3, "the workers are sent batches in advance"
    again = resumed("random", sampler.state_dict(batches_done=3))
    rest = read(again, workers)
    torch.manual_seed(7)
    assert first + rest == read(ahead("random"), 0)
    assert samples(read(again, workers)) == [*ROWS]


def test_state_at_the_end_of_an_epoch_means_the_same_with_any_number_of_workers():
    sampler = ahead("random")
    assert samples(sampler) == [*ROWS]
    found = [
        len([*DataLoader(ROWS, batch_sampler=again, num_workers=workers, multiprocessing_context=method(workers))])
        for workers in (0, 2)
        for again in [resumed("random", sampler.state_dict())]
    ]
    assert found == [len(sampler)] * 2, "it is the beginning of the next epoch"


@pytest.mark.parametrize("workers", [0, 2])
def test_state_at_the_end_of_an_epoch_goes_on_with_the_draws_of_the_next(workers):
    def sampler():
        order = RandomSampler(ROWS, generator=torch.Generator().manual_seed(3))
        return LookaheadBatchSampler(order, BATCH, drop_last=False)

    def read(batches):
        context = method(workers)
        return [
            *DataLoader(
                ROWS, batch_sampler=batches, num_workers=workers, multiprocessing_context=context, collate_fn=list
            )
        ]

    whole = sampler()
    first = read(whole)
    state = whole.state_dict(batches_done=len(first))
    second = read(whole)
    again = sampler()
    again.load_state_dict(state)
    assert read(again) == second != first


@pytest.fixture
def stateful(stored):
    """Make a loader of torchdata; the number of workers is fixed in its state."""
    pytest.importorskip("torchdata.stateful_dataloader")

    def make(workers: int, **options):
        order = {} if "batch_sampler" in options else {"batch_size": BATCH, "shuffle": True}
        return stored.loader(
            num_workers=workers,
            multiprocessing_context=method(workers),
            collate_fn=list,
            stateful=True,
            **order,
            **options,
        )

    return make


@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_loader_resumes_within_an_epoch(stateful, workers):
    for taken in (1, 4, 8):
        torch.manual_seed(7)
        whole = stateful(workers)
        batches = iter(whole)
        first = [*itertools.islice(batches, taken)]
        state = saved(whole.state_dict())
        rest = [*batches]
        assert sorted(keys(first + rest)) == KEYS
        torch.manual_seed(99)
        again = stateful(workers)
        again.load_state_dict(state)
        assert [*again] == rest
        assert sorted(keys(again)) == KEYS, "the next epoch is a whole one"


@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_loader_resumes_between_snapshots(stateful, workers):
    torch.manual_seed(7)
    whole = stateful(workers, snapshot_every_n_steps=3)
    batches = iter(whole)
    next(batches), next(batches), next(batches), next(batches), next(batches)
    state = saved(whole.state_dict())
    rest = [*batches]
    again = stateful(workers, snapshot_every_n_steps=3)
    again.load_state_dict(state)
    assert [*again] == rest


@pytest.mark.parametrize(
    ("workers", "options"),
    [
        (0, dict),
        (2, dict),
        (0, lambda: {"batch_sampler": Own()}),
        (2, lambda: {"batch_sampler": Own()}),
    ],
)
def test_stateful_loader_at_the_end_of_an_epoch_begins_the_next(stateful, workers, options):
    whole = stateful(workers, **options())
    assert sorted(keys(whole)) == KEYS
    state = saved(whole.state_dict())
    again = stateful(workers, **options())
    again.load_state_dict(state)
    assert sorted(keys(again)) == KEYS


@pytest.mark.parametrize(
    "epochs",
    [0, 1],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_loader_resumes_before_the_first_batch_of_any_epoch(stateful, workers, epochs):
    whole = stateful(workers)
    for _ in range(epochs):
        assert sorted(keys(whole)) == KEYS
    batches = iter(whole)
    state = saved(whole.state_dict())
    assert sorted(keys(batches)) == KEYS
    again = stateful(workers)
    again.load_state_dict(state)
    assert sorted(keys(again)) == KEYS


# what is refused


@pytest.mark.parametrize("depth", [-1, True, False, 1.5, "3", None])
def test_depth_is_a_whole_number_of_batches(depth):
    with pytest.raises(ConfigurationError, match=f"depth={depth!r}: must be a whole number of batches, at least 0"):
        LookaheadBatchSampler([[1]], depth=depth)


@pytest.mark.parametrize("sampler", [5, None, object(), len])
def test_what_cannot_be_iterated_over_is_no_sampler(sampler):
    with pytest.raises(ConfigurationError, match=f"a {type(sampler).__name__} is no batch sampler"):
        LookaheadBatchSampler(sampler)


@pytest.mark.parametrize("depth", [0, 16])
def test_sampler_of_single_rows_needs_a_batch_size(depth):
    with pytest.raises(ConfigurationError, match="yields 0, not a list of indices: give a batch sampler, or batch_siz"):
        next(iter(LookaheadBatchSampler(SequentialSampler(ROWS), depth=depth)))


@pytest.mark.parametrize("state", [None, [], {}, "state", {"version": 1}, {"version": 2, "batches": 3}])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ConfigurationError, match="no state of a LookaheadBatchSampler"):
        ahead("random").load_state_dict(state)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: BatchSampler(SequentialSampler(ROWS), BATCH, False), "its sampler was BatchSampler of RandomSampler"),
        (lambda: BatchSampler(RandomSampler(ROWS[1:]), BATCH - 1, False), "its length was 9, and is 10"),
        (lambda: BatchSampler(RandomSampler(range(70)), BATCH + 1, False), "its batch_size was 7, and is 8"),
        (lambda: Own(), "sampler was BatchSampler of RandomSampler, and is Own"),
        (lambda: BatchSampler(DistributedSampler(ROWS, 2, 0), BATCH, False), "of a job of 1 ranks, and this one has 2"),
    ],
)
def test_state_of_another_sampler_is_refused_and_changes_nothing(other, said):
    state, _, _ = interrupted("random", 3)
    sampler = LookaheadBatchSampler(other())
    torch.manual_seed(7)
    expected = [*other()]
    torch.manual_seed(7)
    with pytest.raises(ConfigurationError, match=said):
        sampler.load_state_dict(state)
    assert [*sampler] == expected


def test_state_of_another_number_of_ranks_is_refused():
    state, _, _ = interrupted("distributed", 3)
    four = LookaheadBatchSampler(DistributedSampler(ROWS, 4, 0), BATCH)
    with pytest.raises(ConfigurationError, match="of a job of 2 ranks, and this one has 4: resume with as many"):
        four.load_state_dict(state)


def test_state_of_another_dataset_is_refused(stored):
    def sampler(dataset) -> LookaheadBatchSampler:
        return dataset.loader(BATCH, shuffle=True).batch_sampler

    mine = sampler(stored.subset(range(0, 40)))
    next(iter(mine))
    sampler(stored.subset(range(0, 40)).with_transform(len)).load_state_dict(mine.state_dict())
    with pytest.raises(ConfigurationError, match="another sampler or dataset: its dataset was"):
        sampler(stored.subset(range(1, 41))).load_state_dict(mine.state_dict())


@pytest.mark.parametrize("stateful", [False, True])
def test_state_of_batches_that_were_sent_in_advance_has_to_be_told_what_was_delivered(store, stateful):
    with CachedS3MapDataset.from_prefix(PREFIX, store=store, transform=key_of) as dataset:
        alone, served = dataset.loader(BATCH), dataset.loader(BATCH, num_workers=1, stateful=stateful)
        for loader in (alone, served):
            assert loader.batch_sampler.state_dict()["batches"] == 0
        next(iter(alone))
        assert alone.batch_sampler.state_dict()["batches"] == 1
        batches = iter(served)
        next(batches)
        if stateful:
            assert served.state_dict()
        else:
            with pytest.raises(ConfigurationError, match="needs batches_done= here"):
                served.batch_sampler.state_dict()
            assert served.batch_sampler.state_dict(1)["batches"] == 1
        del batches


def test_sampler_of_batches_is_not_taken_for_one_of_samples(store):
    with CachedS3MapDataset.from_prefix(PREFIX, store=store) as dataset:
        sampler = LookaheadBatchSampler(range(COUNT), BATCH)
        with pytest.raises(ConfigurationError, match="give it as batch_sampler="):
            dataset.loader(sampler=sampler)


@pytest.mark.parametrize("batches_done", [-1, 4, 1000, "x"])
def test_batches_that_training_cannot_have_had_are_refused(batches_done):
    sampler = ahead("random")
    _ = [*itertools.islice(iter(sampler), 3)]
    assert sampler.state_dict(3)["batches"] == 3
    with pytest.raises(ConfigurationError, match=f"batches_done={batches_done}: of this epoch 3 were taken so far"):
        sampler.state_dict(batches_done)


# the loader


LOADERS = {
    "in order": lambda: {"batch_size": 8},
    "one by one": lambda: {},
    "shuffled": lambda: {"batch_size": 8, "shuffle": True},
    "dropping the last": lambda: {"batch_size": 8, "shuffle": True, "drop_last": True},
    "generator": lambda: {"batch_size": 8, "shuffle": True, "generator": drawn(5)},
    "sampler": lambda: {"batch_size": 8, "sampler": WeightedRandomSampler(WEIGHTS, 50)},
    "replacement": lambda: {"batch_size": 8, "sampler": RandomSampler(ROWS, replacement=True, num_samples=90)},
    "list": lambda: {"batch_size": 8, "sampler": [*reversed(ROWS)]},
    "batch sampler": lambda: {"batch_sampler": Own()},
    "no batches": lambda: {"batch_size": None, "shuffle": True},
}


def two_epochs(make, dataset, way: str, workers: int, **options) -> list[torch.Tensor]:
    """Two epochs of random transforms under one seed."""
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    loader = make(dataset, **LOADERS[way](), num_workers=workers, multiprocessing_context=method(workers), **options)
    return [batch for _ in range(2) for batch in loader]


@cache
def expected_epochs(way: str, workers: int, **options) -> list[torch.Tensor]:
    return two_epochs(DataLoader, InMemory(Augment()), way, workers, **options)


@pytest.mark.parametrize(
    ("way", "workers"),
    [
        *((way, 0) for way in LOADERS),
        *itertools.product(("shuffled", "generator", "sampler"), (1, 2)),
        ("batch sampler", 2),
        ("no batches", 2),
    ],
)
def test_batches_with_random_transforms_are_those_of_a_plain_loader(bucket, way, workers):
    expected = expected_epochs(way, workers)
    with CachedS3MapDataset.from_prefix(PREFIX, transform=Augment()) as dataset:
        found = two_epochs(loader, dataset, way, workers)
    assert len(found) == len(expected) > 0
    assert all(map(torch.equal, found, expected))
    assert {*bucket.stats.gets.values()} == {1}


def test_batches_of_persistent_workers_are_those_of_a_plain_loader(bucket):
    with CachedS3MapDataset.from_prefix(PREFIX, transform=Augment()) as dataset:
        found = two_epochs(loader, dataset, "shuffled", 2, persistent_workers=True)
    assert all(map(torch.equal, found, expected_epochs("shuffled", 2, persistent_workers=True)))
    assert each_once(bucket)


def test_loader_is_the_stock_one_and_the_method_makes_the_same(stored):
    for made in (loader(stored, 8, drop_last=True, depth=3), stored.loader(8, drop_last=True, depth=3)):
        assert type(made) is DataLoader
        assert made.dataset is stored
        assert type(made.batch_sampler) is LookaheadBatchSampler
        assert (made.batch_sampler.batch_size, made.batch_sampler.drop_last, made.batch_sampler.depth) == (8, True, 3)
        assert len(made) == 7
    sampler = [*reversed(ROWS)]
    assert loader(stored, 8, sampler=sampler).sampler is DataLoader(stored, 8, sampler=sampler).sampler
    assert type(loader(stored, 8, shuffle=True).sampler) is RandomSampler


@pytest.mark.parametrize(("workers", "depth"), [(0, 16), (4, 16), (8, 32)])
def test_depth_suits_the_number_of_workers(stored, workers, depth):
    assert loader(stored, 8, num_workers=workers).batch_sampler.depth == depth
    assert loader(stored, 8, num_workers=workers, depth=0).batch_sampler.depth == 0


WAYS = {
    "dataset": lambda a, b: a,
    "subset": lambda a, b: a.subset(range(50, 5, -1)),
    "split": lambda a, b: a.split([0.5, 0.5], drawn(1))[1],
    "Subset": lambda a, b: Subset(a, range(50, 5, -1)),
    "nested Subset": lambda a, b: Subset(Subset(a, range(1, 55)), range(0, 54, 2)),
    "random_split": lambda a, b: random_split(a, [0.25, 0.75], drawn(1))[1],
    "split of random_split": lambda a, b: random_split(random_split(a, [50, 10], drawn(1))[0], [20, 30], drawn(2))[1],
    "sum": lambda a, b: a + b,
    "sum of subsets": lambda a, b: a.subset(range(30, 50)) + b.subset(range(5, 15)),
    "ConcatDataset": lambda a, b: ConcatDataset([b, a]),
    "Subset of ConcatDataset of Subsets": lambda a, b: Subset(
        ConcatDataset([Subset(a, range(10, 40)), b]), [*range(20), *range(35, 45)]
    ),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("way", WAYS)
def test_whole_cold_epoch_arrives_while_the_first_batch_is_transformed(bucket, way, workers):
    with (
        CachedS3MapDataset.from_prefix(PREFIX) as train,
        CachedS3MapDataset.from_prefix("s3://mnist/test/") as test,
    ):
        held = Held(train, test)
        made = WAYS[way](train.with_transform(held), test.with_transform(held))
        held.arrived = len(made)
        order = torch.randperm(len(made)).tolist()
        batches = loader(
            made, 5, sampler=order, num_workers=workers, multiprocessing_context=method(workers), collate_fn=list
        )
        found = keys(batches)
        hits = train.stats()["prefetch_hits"] + test.stats()["prefetch_hits"]
        assert hits == len(made) - 5 * max(workers, 1), "all but what the first batches wait for"
        assert found == [made[index] for index in order]
    assert each_once(bucket, found)


def test_sum_of_datasets_is_read_ahead_in_both_where_requests_are_few(bucket):
    with (
        CachedS3MapDataset.from_prefix(PREFIX, concurrency=1) as train,
        CachedS3MapDataset.from_prefix("s3://mnist/test/", concurrency=1) as test,
    ):
        held = Held(train, test)
        held.arrived = 50
        both = train.with_transform(held).subset(range(30)) + test.with_transform(held)
        found = keys(loader(both, 5, sampler=torch.randperm(50).tolist(), collate_fn=list))
    assert each_once(bucket, found)
    assert len(found) == 50


class Hides(Dataset):
    """Asks for one sample at a time, as most wrappers do."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        return self.dataset[index]


class PassesOn(Hides):
    def __getitems__(self, indices: list[int]) -> list:
        return self.dataset.__getitems__(indices)


class OwnSubset(Subset):
    """Hands on lists of its own making, as torch's Subset does, and may have changed anything."""


@pytest.mark.parametrize(
    "wrap",
    [
        Hides,
        lambda dataset: ConcatDataset([dataset, TensorDataset(torch.zeros(1))]),
        lambda dataset: Hides(Hides(dataset)),
        lambda dataset: OwnSubset(dataset, ROWS),
    ],
)
def test_wrapper_that_does_not_hand_batches_on_is_warned_of_once(stored, wrap):
    with pytest.warns(UserWarning, match="does not hand the batches on .* so nothing is read ahead") as caught:
        made = loader(wrap(stored), 8, collate_fn=list)
    assert [warning.filename for warning in caught] == [__file__]
    assert keys(made)[:COUNT] == KEYS


def test_wrapper_that_passes_batches_on_is_read_ahead(bucket):
    with CachedS3MapDataset.from_prefix(PREFIX) as dataset:
        held = Held(dataset)
        held.arrived = COUNT
        assert keys(loader(PassesOn(dataset.with_transform(held)), 5, collate_fn=list)) == KEYS


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


@pytest.mark.parametrize(
    "foreign", [TensorDataset(torch.zeros(3)), Subset(TensorDataset(torch.zeros(3)), [0]), Stream()]
)
def test_dataset_that_has_nothing_to_do_with_asyncds_is_refused(foreign):
    with pytest.raises(ConfigurationError, match=f"a {type(foreign).__name__} is no dataset of asyncds"):
        loader(foreign)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_sampler": [[1]], "batch_size": 8}, "batch_sampler= decides"),
        ({"batch_sampler": [[1]], "shuffle": True}, "batch_sampler= decides"),
        ({"batch_sampler": [[1]], "drop_last": True}, "batch_sampler= decides"),
        ({"batch_sampler": [[1]], "sampler": [1]}, "batch_sampler= decides"),
        ({"sampler": [1], "shuffle": True}, "sampler= excludes shuffle=True"),
        ({"depth": -1}, "depth=-1"),
    ],
)
def test_arguments_that_exclude_each_other_are_refused(stored, options, said):
    with pytest.raises(ConfigurationError, match=said):
        loader(stored, **options)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"num_workers": -1}, {"batch_size": None, "drop_last": True}])
def test_what_the_stock_loader_refuses_is_refused_alike(stored, options):
    def refusal(make) -> str:
        with pytest.raises(ValueError, match=r"should|option") as raised:
            make(stored, **options)
        return str(raised.value)

    assert refusal(loader) == refusal(DataLoader)


# how often an object is fetched


@pytest.fixture
def fork_server():
    """A fork server with this test's environment, which nobody after it meets."""
    gc.collect()
    forkserver._forkserver._stop()
    multiprocessing.set_forkserver_preload(["torch.utils.data", "asyncds.dataset"])
    yield
    multiprocessing.set_forkserver_preload(["__main__"])
    gc.collect()
    forkserver._forkserver._stop()


@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize(
    ("start", "workers", "persistent"),
    [
        (None, 0, False),
        ("fork", 1, False),
        ("fork", 4, True),
        ("forkserver", 2, False),
        ("spawn", 2, True),
        pytest.param("fork", 2, False, marks=pytest.mark.thorough),
        pytest.param("fork", 2, True, marks=pytest.mark.thorough),
        pytest.param("fork", 4, False, marks=pytest.mark.thorough),
    ],
)
def test_each_object_is_fetched_once_in_two_epochs(bucket, start, workers, persistent):
    with CachedS3MapDataset.from_prefix(PREFIX, transform=key_of) as dataset:
        batches = dataset.loader(
            5,
            shuffle=True,
            num_workers=workers,
            multiprocessing_context=start,
            persistent_workers=persistent,
            collate_fn=list,
        )
        assert sorted(keys(batches)) == KEYS
        assert bucket.stats.requests == {"LIST": 1, "GET": COUNT}
        assert sorted(keys(batches)) == KEYS
        assert dataset.stats()["samples"] == 2 * COUNT
    assert bucket.stats.requests == {"LIST": 1, "GET": COUNT}
    assert each_once(bucket)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["replacement", "weighted", "subset", "distributed", "own"])
def test_each_object_that_a_sampler_draws_is_fetched_once(bucket, dataset, name, workers):
    drawn = [*ahead(name)]
    batches = loader(
        dataset, batch_sampler=drawn, num_workers=workers, multiprocessing_context=method(workers), collate_fn=list
    )
    assert [*batches] == [[KEYS[row] for row in batch] for batch in drawn]
    assert each_once(bucket, [KEYS[row] for row in {*samples(drawn)}])


@pytest.mark.parametrize(
    "cache_size",
    [None, "1B"],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_objects_that_were_never_listed_are_fetched_once(bucket, workers, cache_size):
    with CachedS3MapDataset.from_objects(
        [f"s3://mnist/{key}" for key in KEYS], transform=key_of, cache_size=cache_size
    ) as dataset:
        batches = dataset.loader(5, num_workers=workers, multiprocessing_context=method(workers), collate_fn=list)
        assert keys(batches) == KEYS
    assert bucket.stats.requests == {"GET": COUNT}
    assert each_once(bucket)


@pytest.mark.parametrize("workers", [0, 2])
def test_two_loaders_on_one_dataset_in_turns_fetch_each_object_once(bucket, dataset, workers):
    options = {"num_workers": workers, "multiprocessing_context": method(workers), "collate_fn": list}
    up, down = dataset.loader(5, **options), dataset.loader(4, sampler=[*reversed(ROWS)], **options)
    pairs = [*itertools.zip_longest(up, down, fillvalue=[])]
    assert keys(one for one, _ in pairs) == KEYS
    assert keys(other for _, other in pairs) == KEYS[::-1]
    assert each_once(bucket)


@pytest.mark.parametrize("workers", [0, 2])
def test_one_loader_iterated_over_twice_at_once_fetches_each_object_once(bucket, dataset, workers):
    both = dataset.loader(
        5, shuffle=True, num_workers=workers, multiprocessing_context=method(workers), collate_fn=list
    )
    pairs = [*zip(both, both, strict=True)]
    assert sorted(keys(one for one, _ in pairs)) == sorted(keys(other for _, other in pairs)) == KEYS
    assert each_once(bucket)


def test_workers_that_deliver_out_of_order_fetch_each_object_once(bucket, dataset):
    batches = dataset.loader(3, num_workers=2, multiprocessing_context="fork", in_order=False, collate_fn=list)
    for _ in range(2):
        assert sorted(keys(batches)) == KEYS
    assert each_once(bucket)


@pytest.mark.parametrize("workers", [0, 2])
def test_labels_and_negative_rows_come_with_their_objects(bucket, workers):
    rows = [[-1, 3], [2, -60], [5], [59, 58]]
    with CachedS3MapDataset.from_prefix(PREFIX, label=lambda key: int(key[-2:]), transform=key_of) as dataset:
        batches = loader(
            dataset, batch_sampler=rows, num_workers=workers, multiprocessing_context=method(workers), collate_fn=list
        )
        assert [*batches] == [[(KEYS[row], row % COUNT) for row in batch] for batch in rows]


# what comes first


def test_objects_that_are_waited_for_are_asked_for_before_those_that_are_not(store, monkeypatch):
    posted, prefetch = threading.Event(), Source.prefetch

    def post(*arguments, **options) -> None:
        prefetch(*arguments, **options)
        posted.set()

    monkeypatch.setattr(Source, "prefetch", post)
    with CachedS3MapDataset.from_prefix(PREFIX, store=store, transform=key_of, concurrency=4) as dataset:
        assert len(dataset) == COUNT
        dataset._parts[0].source.runtime().portal.post(posted.wait, PATIENCE_S)  # a loop that is busy meanwhile
        assert next(iter(dataset.loader(4, collate_fn=list))) == KEYS[:4]
    assert [*store.gets][:4] == KEYS[:4]


# leaving early


@pytest.fixture
def gate(store):
    """Shut the objects off that these rows name, and open them all."""
    open = asyncio.Event()

    def shut(rows) -> None:
        store.gates.update({KEYS[row]: open for row in rows})

    def let_go(dataset) -> None:
        dataset._parts[0].source.runtime().portal.post(open.set)

    return SimpleNamespace(shut=shut, open=let_go)


def test_what_waits_its_turn_is_dropped_after_a_break_and_what_is_under_way_is_kept(store, gate):
    gate.shut(ROWS[4:])
    with CachedS3MapDataset.from_prefix(PREFIX, store=store, transform=key_of, concurrency=4) as dataset:
        dataset.__getitems__(ROWS[:4])
        for batch in dataset.loader(4, collate_fn=list):
            assert batch == KEYS[:4]
            until(lambda: store.in_flight == 4)
            break
        gate.open(dataset)
        assert dataset.__getitems__(range(4, 8)) == KEYS[4:8]
        assert [*store.gets] == KEYS[:8], "nobody asked for more"
        assert keys(dataset.loader(4, collate_fn=list)) == KEYS
    assert {*store.gets.values()} == {1}


def test_break_of_one_iterator_leaves_the_other_its_look_ahead(store, gate):
    gate.shut(ROWS[4:])
    with CachedS3MapDataset.from_prefix(PREFIX, store=store, transform=key_of, concurrency=4) as dataset:
        dataset.__getitems__(ROWS[:4])
        rest = iter(dataset.loader(4, sampler=[*ROWS[:4], *ROWS[30:50]], collate_fn=list))
        assert next(rest) == KEYS[:4]
        for batch in dataset.loader(4, sampler=[*ROWS[:4], *ROWS[10:30]], collate_fn=list):
            assert batch == KEYS[:4]
            break
        gate.open(dataset)
        until(lambda: dataset.stats()["gets"] >= 24)
        assert dataset[55] == KEYS[55]
        assert keys(rest) == KEYS[30:50]
    assert sorted(store.gets) == [*KEYS[:4], *KEYS[30:50], KEYS[55]]
    assert {*store.gets.values()} == {1}


def test_worker_that_hears_of_a_new_iteration_drops_what_waits_for_the_one_before(store, gate):
    def first_batch(rows: range) -> Batch:
        batches = LookaheadBatchSampler([*ROWS[:4], *rows], 4)
        return pickle.loads(pickle.dumps(next(iter(batches))))

    gate.shut(ROWS[4:])
    with CachedS3MapDataset.from_prefix(PREFIX, store=store, transform=key_of, concurrency=4) as dataset:
        dataset.__getitems__(ROWS[:4])
        assert dataset.__getitems__(first_batch(ROWS[10:30])) == KEYS[:4]
        until(lambda: store.in_flight == 4)
        assert dataset.__getitems__(first_batch(ROWS[30:50])) == KEYS[:4]
        gate.open(dataset)
        until(lambda: dataset.stats()["gets"] >= 28)
        assert dataset[55] == KEYS[55]
    assert sorted(store.gets) == [*KEYS[:4], *KEYS[10:14], *KEYS[30:50], KEYS[55]]


def test_what_arrives_after_a_break_and_no_cache_takes_is_not_held_in_memory(store, gate):
    gate.shut(ROWS[4:8])
    with CachedS3MapDataset.from_prefix(PREFIX, store=store, transform=key_of, cache_size="1B") as dataset:
        for batch in dataset.loader(4, sampler=ROWS[:8], collate_fn=list):
            assert batch == KEYS[:4]
            until(lambda: store.in_flight == 4)
            break
        gate.open(dataset)
        until(lambda: "<Fetcher 0 in flight" in repr(fetcher_of(dataset)))
        assert dataset.__getitems__(ROWS[4:8]) == KEYS[4:8]
    assert [store.gets[key] for key in KEYS[:8]] == [1] * 4 + [2] * 4


@pytest.mark.parametrize("persistent", [False, True])
def test_epoch_after_a_break_with_workers_is_whole(bucket, dataset, persistent):
    batches = dataset.loader(
        3,
        shuffle=True,
        num_workers=2,
        multiprocessing_context="fork",
        persistent_workers=persistent,
        collate_fn=list,
    )
    for _ in range(2):
        for batch in batches:
            assert len(batch) == 3
            break
    assert sorted(keys(batches)) == KEYS
    if persistent:
        assert each_once(bucket)
    bucket.reset_counts()
    assert sorted(keys(batches)) == KEYS
    assert bucket.stats.total == 0


LEAVES = """
import atexit, sys, time
from asyncds import CachedS3MapDataset

def slow_to_leave():
    end = time.monotonic() + 10
    while dataset.stats()["gets"] < 60 and time.monotonic() < end:
        pass
    print(dataset.stats()["gets"])

dataset = CachedS3MapDataset.from_prefix("s3://mnist/train/", transform=lambda object: object.key)
batches = iter(dataset.loader(4, collate_fn=list))
print(len(next(batches)))
atexit.register(slow_to_leave)
"""


def test_process_that_leaves_while_objects_arrive_is_silent(bucket):
    for key in KEYS[4:]:
        bucket.script("mnist", key, [Fault.delay(1)])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LEAVES], capture_output=True, text=True, timeout=ENOUGH_S, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "4\n60\n", "")


# a cache that is full


@pytest.mark.parametrize("workers", [0, 2])
def test_object_that_no_cache_takes_is_fetched_once_per_epoch(bucket, workers):
    with CachedS3MapDataset.from_prefix(PREFIX, transform=key_of, cache_size="1B") as dataset:
        batches = dataset.loader(
            5, shuffle=True, num_workers=workers, multiprocessing_context=method(workers), collate_fn=list
        )
        for _ in range(2):
            bucket.reset_counts()
            assert sorted(keys(batches)) == KEYS
            assert each_once(bucket)
        assert dataset.stats()["uncached"] == 2 * COUNT


@pytest.mark.parametrize("workers", [0, 2])
def test_cold_epoch_without_a_cache_is_held_in_memory_until_it_is_asked_for(bucket, workers):
    with CachedS3MapDataset.from_prefix(PREFIX, cache_size="1B") as dataset:
        held = Held(dataset)
        held.arrived = COUNT
        batches = dataset.with_transform(held).loader(
            5, num_workers=workers, multiprocessing_context=method(workers), collate_fn=list
        )
        assert keys(batches) == KEYS
        assert dataset.stats()["prefetch_hits"] == COUNT - 5 * max(workers, 1)
    assert each_once(bucket)


@pytest.mark.parametrize(
    ("cache_size", "known"),
    [("20MiB", True), ("20MiB", False), ("1MiB", True)],
)
def test_what_no_cache_takes_fills_64_mib_of_memory_and_no_more(store, cache_size, known):
    large = bytes(16 << 20)
    store.objects = {("mnist", key): large for key in KEYS[:9]}
    with CachedS3MapDataset.from_prefix(PREFIX, store=store, transform=key_of, cache_size=cache_size) as dataset:
        dataset.__getitems__([8, 7] if known else [8])
        store.gets.clear()
        batches = iter(dataset.loader(1, sampler=ROWS[:8], collate_fn=list))
        assert next(batches) == KEYS[:1]
        until(lambda: store.gets.total() >= 5)
        until(lambda: "<Fetcher 0 in flight" in repr(fetcher_of(dataset)))
        brought = store.gets.total()
        assert keys(batches) == KEYS[1:8]
    assert brought == 5, "the first, and four that are kept"
    assert {*store.gets.values()} == {1}


@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_over_a_cache_that_takes_some_fetches_the_others_once(s3_process, workers):
    s3_process.put_many("mnist", {key: body(key) * 100 for key in KEYS})
    with CachedS3MapDataset.from_prefix(PREFIX, transform=key_of, cache_size="256KiB") as dataset:
        batches = dataset.loader(
            5, shuffle=True, num_workers=workers, multiprocessing_context=method(workers), collate_fn=list
        )
        assert sorted(keys(batches)) == KEYS
        assert each_once(s3_process)
        uncached = dataset.stats()["uncached"]
        assert 0 < uncached < COUNT
        s3_process.reset_counts()
        assert sorted(keys(batches)) == KEYS
        assert s3_process.stats.requests["GET"] == uncached
        assert {*s3_process.stats.gets.values()} == {1}


# objects that cannot be had


@pytest.mark.parametrize("workers", [0, 2])
def test_object_that_is_gone_fails_the_batch_that_asks_for_it_and_none_before(s3_process, workers):
    s3_process.put_many("mnist", {key: body(key) for key in KEYS})
    with CachedS3MapDataset.from_prefix(PREFIX) as dataset:
        held = Held(dataset)
        held.arrived = COUNT - 1
        assert len(dataset) == COUNT
        s3_process.delete("mnist", KEYS[33])
        batches = iter(
            dataset.with_transform(held).loader(
                5, num_workers=workers, multiprocessing_context=method(workers), collate_fn=list
            )
        )
        assert keys(itertools.islice(batches, 5)) == KEYS[:25]
        until(lambda: s3_process.stats.gets["mnist", KEYS[33]] > 0)
        assert next(batches) == KEYS[25:30]
        with pytest.raises(ObjectNotFound, match=KEYS[33]):
            next(batches)
        assert keys(batches) == KEYS[35:], "who goes on gets the others"
        assert dataset.stats()["failures"] == 1, "the one that was told"


def test_row_outside_fails_the_batch_that_asks_for_it_and_none_before(stored):
    batches = iter(loader(stored, batch_sampler=[[0, 1], [2, 3], [COUNT]], collate_fn=list))
    assert [next(batches), next(batches)] == [KEYS[0:2], KEYS[2:4]]
    with pytest.raises(IndexError, match=f"index {COUNT} of a dataset of {COUNT}"):
        next(batches)
