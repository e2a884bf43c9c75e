"""Several ranks: one listing for all of them, and the same table, or an error."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import FileStore, HashStore, TCPStore
from torch.utils.data import DistributedSampler, SequentialSampler

from asyncds import LookaheadBatchSampler, lookahead, ranks
from asyncds.errors import AccessDenied, ConfigurationError, EmptyDataset, RankLost
from asyncds.listing import Table
from asyncds.manifest import Manifest, ManifestBuilder, ObjectInfo
from asyncds.ranks import Meeting
from asyncds.testing import Fault, S3Server

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.timeout(150),  # the first to ask about the job waits for it
]

RANKS = 4
SIZES = {"before": 20, "workers": 18, "one": 8, "lambdas": 10, "different": 12}
LISTINGS = {"before": 1, "alone": 1, "workers": 1, "one": 1, "empty": 1, "absent": 2, "lambdas": 2, "different": 2}
SCRIPT = str(Path(__file__).with_name("jobs.py"))
ENOUGH_S = 40


def environment(server: S3Server, cache: Path, **names: str) -> dict[str, str]:
    return os.environ | {
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-tests",
        "AWS_REGION": "us-east-1",
        "ASYNCDS_CACHE_DIR": str(cache),
        "OMP_NUM_THREADS": "1",
        **names,
    }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


# whole jobs


class Job:
    """What a job of four ranks found, what the server saw of it, and what it left in the cache directory."""

    def __init__(self, folder: Path, nodes: int = 1) -> None:
        meet = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-id job --rdzv-endpoint localhost:{free_port()}"
        how = f"{meet if nodes > 1 else '--standalone'} --nproc-per-node {RANKS // nodes}"
        with S3Server(process=True) as server:
            for prefix, size in SIZES.items():
                server.put_many("mnist", {f"{prefix}/{row:02}": b"x" for row in range(size)})
            launchers = [
                subprocess.Popen(
                    [sys.executable, "-m", "torch.distributed.run", *how.split(), SCRIPT, "all", str(folder)],
                    env=environment(server, folder / f"cache-{node}"),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                for node in range(nodes)
            ]
            try:
                said = [launcher.communicate(timeout=120)[0] for launcher in launchers]
            finally:
                for launcher in launchers:
                    launcher.terminate()
                    launcher.wait()
            assert [launcher.returncode for launcher in launchers] == [0] * nodes, "".join(said)
            self.server = server.stats
        self.answers = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]
        self.left = sorted(path.name for path in folder.glob("cache-*/asyncds/manifests/*-*"))

    def each(self, step: str) -> list[Any]:
        return [answer[step] for answer in self.answers]

    def asked(self, prefix: str) -> list[int]:
        return [self.server.gets["mnist", f"{prefix}/{row:02}"] for row in range(SIZES[prefix])]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("job"))


def shares(epoch: int, size: int) -> list[list[int]]:
    """What torch gives each of the ranks."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(3 + epoch)).tolist()
    padded = order + order[: -size % RANKS]
    return [padded[rank::RANKS] for rank in range(RANKS)]


@pytest.mark.parametrize("step", ["before", "workers"])
def test_epochs_are_shared_out_and_each_object_is_fetched_once(job, step):
    epochs = [list(epoch) for epoch in zip(*job.each(step), strict=True)]
    assert epochs == [shares(0, SIZES[step]), shares(1, SIZES[step])]
    assert epochs[0] != epochs[1]
    assert job.asked(step) == [1] * SIZES[step]


def test_ranks_list_once_before_and_after_they_know_of_each_other(job):
    assert job.each("length") == [20] * RANKS
    assert job.server.requests["LIST"] == sum(LISTINGS.values())


@pytest.mark.parametrize("step", ["alone", "one"])
def test_dataset_that_only_one_rank_makes_holds_nobody_up(job, step):
    assert job.each(step) == [[*range(SIZES["one"])], [], [], []]


def test_listing_that_fails_or_finds_nothing_does_so_in_all_ranks(job):
    first, again = job.each("absent")[0]
    assert first.startswith("BucketNotFound: ")
    assert job.each("absent") == [[first, again]] * RANKS
    assert job.each("empty")[0].startswith("EmptyDataset: s3://mnist/nothing/")
    assert len(set(job.each("empty"))) == 1


def test_filters_of_one_name_are_not_taken_for_one_another(job):
    even, odd = ([f"lambdas/{row:02}" for row in range(start, 10, 2)] for start in (0, 1))
    assert job.each("lambdas") == [[odd, even], [even], [even], [even]]


def test_different_datasets_are_refused_before_the_first_batch(job):
    refused = [rank for rank, answer in enumerate(job.each("different")) if answer["said"] is not None]
    assert refused in ([3], [0, 1, 2])
    for rank in refused:
        answer = job.each("different")[rank]
        assert answer["said"].startswith("ConfigurationError: this rank's dataset is not that of the others (digest ")
        assert answer["samples"] == 0


def test_same_rows_from_different_files_are_the_same_dataset(job):
    assert job.each("csv") == [list(epochs) for epochs in zip(shares(0, 8), shares(1, 8), strict=True)]


def test_job_leaves_no_table_behind(job):
    assert job.left == []


@pytest.mark.thorough
def test_nodes_list_once_as_soon_as_they_know_of_each_other(tmp_path):
    job = Job(tmp_path, nodes=2)
    for step in ("before", "workers"):
        epochs = [list(epoch) for epoch in zip(*job.each(step), strict=True)]
        assert epochs == [shares(0, SIZES[step]), shares(1, SIZES[step])]
    assert job.server.requests["LIST"] == sum(LISTINGS.values()) + 1, "before, each node lists for itself"
    assert job.left == []


@pytest.fixture
def started(s3_process, tmp_path) -> Iterator[list[subprocess.Popen[str]]]:
    """Three ranks that list what they are told to, while no listing ends."""
    names = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    s3_process.script("mnist", None, [Fault(delay_s=ENOUGH_S)], operation="LIST", forever=True)
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, "lost"],
            env=environment(s3_process, tmp_path / rank, RANK=rank, **names),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "012"
    ]
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def tell(process: subprocess.Popen[str], prefix: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{prefix}\n")
    process.stdin.flush()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + ENOUGH_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_ranks_end_when_the_one_that_lists_is_killed_or_takes_the_store_with_it(s3_process, started):
    zero, one, two = started
    tell(one, "first")
    wait_for(lambda: s3_process.stats.requests["LIST"] == 1)
    for rank in (zero, two):
        tell(rank, "first")
        assert rank.stdout.readline() == "waiting\n"
    one.kill()
    said = [rank.stdout.readline() for rank in (zero, two)]
    assert said[0] == said[1]
    assert said[0].startswith("RankLost: s3://mnist/first/ at ")
    assert "no sign of life for 2 s: it was killed, or stands still; look at its output" in said[0]

    tell(zero, "second")
    wait_for(lambda: s3_process.stats.requests["LIST"] == 2)
    tell(two, "second")
    assert two.stdout.readline() == "waiting\n"
    zero.kill()
    assert "fails (" in (line := two.stdout.readline())
    assert line.startswith("RankLost: the store by which the ranks of this job find each other ")


# the exchange


def rows(*keys: str) -> Manifest:
    builder = ManifestBuilder("b")
    for key in keys:
        builder.add(ObjectInfo("b", key, 1, "odd"))
    return builder.build(endpoint="e", source="s3://b/", left_out={"markers": 1, "filtered": 0})


@pytest.fixture(params=["hash", "file", "tcp"])
def connected(request, tmp_path) -> Callable[[], Any]:
    """Makes a connection to one store."""
    if request.param == "hash":
        store = HashStore()
        return lambda: store
    if request.param == "file":
        return partial(FileStore, str(tmp_path / "store"), RANKS)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda server=server: TCPStore("127.0.0.1", server.port, is_master=False)


@pytest.fixture
def in_job(monkeypatch, tmp_path):
    """Make what each rank of a job calls to come by a table, all in this process."""

    def ways(*stores: Any, subject: str = "s3://b/") -> list[ranks.Way]:
        made = []
        for store in stores:
            monkeypatch.setattr(ranks, "_default_store", lambda store=store: store)
            monkeypatch.setattr(ranks, "world_size", lambda: len(stores))
            ranks._numbers.clear()
            made.append(Meeting(tmp_path, subject).way())
        return made

    return ways


def in_store(part: str, count: int = RANKS) -> str:
    """The key of what ranks leave there for the first dataset of this prefix."""
    return f"asyncds/{count}/{ranks._hash(repr(('s3://b/',)) + ' 0 0')}/{part}"


def all_at_once(ways: list[ranks.Way], make: Callable[[], Manifest]) -> list[Any]:
    """What each rank gets: a table, or its error."""

    def get(way: ranks.Way) -> Any:
        try:
            return way(make)
        except BaseException as error:
            return error

    with ThreadPoolExecutor(len(ways)) as pool:
        return [*pool.map(get, ways)]


def test_one_makes_the_table_for_all_and_the_store_is_empty_afterwards(connected, in_job):
    calls = []

    def make() -> Manifest:
        calls.append(threading.get_ident())
        return rows("a", "b").with_labels(["x", "y"])

    stores = [connected() for _ in range(RANKS)]
    tables = all_at_once(in_job(*stores), make)
    assert len(calls) == 1
    assert {table.digest for table in tables} == {make().digest}
    assert [*tables[0]] == [*tables[3]] == [*make()]
    assert not any(stores[0].check([in_store(part)]) for part in ("claims", "beats", "outcome", "taken", "0"))


def test_table_of_any_size_goes_through_the_store_of_a_job(in_job):
    count = 1_500_000
    columns = {
        "keys": np.full(count, ord("k"), np.uint8),
        "ends": np.arange(count + 1, dtype="<u8"),
        "sizes": np.ones(count, "<i8"),
        "versions": np.random.default_rng(1).integers(0, 256, 16 * count, np.uint8),
        "other_rows": np.empty(0, "<u8"),
        "others": np.empty(0, np.uint8),
        "other_ends": np.zeros(1, "<u8"),
    }
    table = Manifest({"endpoint": "", "source": "", "buckets": ["b"], "left_out": {}}, columns)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = TCPStore("127.0.0.1", server.port, is_master=False)
    assert {found.digest for found in all_at_once(in_job(server, client), lambda: table)} == {table.digest}


@pytest.mark.parametrize(
    ("failure", "kind", "text"),
    [
        (AccessDenied("s3://b/: 403"), AccessDenied, "s3://b/: 403"),
        (EmptyDataset("nothing \udc80"), EmptyDataset, "nothing \udc80"),
        (ZeroDivisionError("in a store of your own"), RankLost, "s3://b/: the rank that lists for all failed (ZeroDi"),
        (KeyboardInterrupt(), RankLost, "s3://b/: the rank that lists for all failed (KeyboardInterrupt: ); look at "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_error_of_one_is_the_error_of_all(in_job, failure, kind, text):
    def make() -> Manifest:
        raise failure

    said = all_at_once(in_job(*[HashStore()] * 3), make)
    said.remove(failure)
    assert [type(error) for error in said] == [kind] * 2
    assert all(str(error).startswith(text) for error in said)


def test_failure_is_that_of_one_attempt_and_the_next_lists_again(monkeypatch, tmp_path):
    store, meetings, failures = HashStore(), [], [AccessDenied("no")]
    monkeypatch.setattr(ranks, "_default_store", lambda: store)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    for _ in range(2):
        ranks._numbers.clear()
        meetings.append(Meeting(tmp_path, "s3://b/"))

    def make() -> Manifest:
        if failures:
            raise failures.pop()
        return rows("a")

    for meeting in meetings:  # the first has done both before the other comes
        with pytest.raises(AccessDenied, match="no"):
            meeting.way()(make)
        assert [*meeting.way()(make)] == [*rows("a")]


def test_rank_that_lists_for_long_is_waited_for(in_job, monkeypatch):
    monkeypatch.setattr(ranks, "PATIENCE_S", 0.3)
    store = HashStore()

    def make() -> Manifest:
        wait_for(lambda: store.add(in_store("beats", 2), 0) > 40)  # twice as long as others are patient
        return rows("a")

    tables = all_at_once(in_job(store, store), make)
    assert [[*table] for table in tables] == [[*rows("a")]] * 2


def test_saved_listing_of_one_node_serves_all(monkeypatch, tmp_path):
    store, tables = HashStore(), []
    monkeypatch.setattr(ranks, "_default_store", lambda: store)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    for name in "one", "two":
        Path(tmp_path, name).mkdir()
        ranks._numbers.clear()
        tables.append(Table(tmp_path / name, "s3://b/", lambda limit, match: rows("new"), max_age=100))
    rows("old", "older").save(tables[0]._saved)
    assert [*tables[0].manifest()] == [*tables[1].manifest()] == [*rows("old", "older")]


def test_first_word_is_the_same_for_all_and_forgotten_when_all_have_heard_it(connected, monkeypatch):
    stores = [connected() for _ in range(3)]
    monkeypatch.setattr(ranks, "world_size", lambda: 3)

    def said(store: Any, text: str) -> str:
        monkeypatch.setattr(ranks, "_default_store", lambda: store)
        return ranks.first_word("sampler 0", text)

    assert [said(store, text) for store, text in zip(stores, "aba", strict=True)] == ["a", "a", "a"]
    assert said(stores[1], "c") == "c"


def serve_store(port: int) -> None:
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    wait_for(lambda: store.check(["never"]))


def test_store_that_has_ended_is_a_warning_for_who_comes_late(monkeypatch, tmp_path, child):
    server = child("fork", serve_store, port := free_port(), wait=False)
    client = TCPStore("127.0.0.1", port, is_master=False)
    monkeypatch.setattr(ranks, "_default_store", lambda: client)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    way = Meeting(tmp_path, "s3://b/").way()
    server.kill()
    server.join(ENOUGH_S)
    with pytest.warns(
        UserWarning, match="s3://b/: listed by this rank alone: the store by which the ranks of this job"
    ):
        assert [*way(lambda: rows("a"))] == [*rows("a")]
    assert ranks.first_word("sampler", "mine") == "mine"


def test_alone_one_has_the_first_word_and_nobody_to_share_with(tmp_path):
    assert ranks.first_word("sampler", "mine") == "mine"
    assert Meeting(tmp_path, "s3://b/").way() is None


def expect_no_store() -> None:
    assert ranks._Store.of_job() is None


def test_store_is_not_used_by_a_forked_child(monkeypatch, child):
    store = HashStore()
    monkeypatch.setattr(ranks, "_default_store", lambda: store)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    assert ranks._Store.of_job() is not None
    child("fork", expect_no_store)


# the same dataset in all ranks


class Rows(list):
    """A dataset of eight samples that says what it is."""

    def __init__(self, digest: str) -> None:
        super().__init__(range(8))
        self.digest = digest


@pytest.fixture
def as_rank(monkeypatch):
    """Let this process take itself for another rank of a job of two, which has made no sampler yet."""
    store, asked = HashStore(), []
    monkeypatch.setattr(ranks, "_default_store", lambda: asked.append("asked") or store)
    for module in (ranks, lookahead):
        monkeypatch.setattr(module, "world_size", lambda: 2)

    def become() -> list[str]:
        lookahead._samplers.clear()
        return asked

    return become


def shared_out(digest: str, count: int = 2) -> LookaheadBatchSampler:
    return LookaheadBatchSampler(DistributedSampler(Rows(digest), count, 0), 2)


def test_dataset_of_another_rank_is_refused_before_the_first_batch(as_rank):
    as_rank()
    assert len([*shared_out("one")]) == 2
    as_rank()
    with pytest.raises(ConfigurationError, match=r"not that of the others \(digest two, and one elsewhere\): give all"):
        next(iter(shared_out("two")))


def test_datasets_are_compared_once(as_rank):
    asked = as_rank()
    sampler = shared_out("one")
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert len([*sampler]) == 2
    assert len(asked) == 1


def test_what_is_not_shared_out_among_all_ranks_is_not_compared(as_rank):
    for digest in "one", "two":
        as_rank()
        for batches in (shared_out(digest, 1), LookaheadBatchSampler(SequentialSampler(Rows(digest)), 2)):
            assert len([*batches]) == 4


@pytest.mark.parametrize(
    "alone",
    [lambda: LookaheadBatchSampler(SequentialSampler(Rows("own")), 2), lambda: shared_out("own", 1)],
    ids=["plain", "distributed"],
)
def test_sampler_of_one_rank_alone_does_not_put_the_others_out_of_step(as_rank, alone):
    as_rank()
    assert all([*batches] for batches in (alone(), shared_out("one"), shared_out("two")))
    as_rank()
    one, two = shared_out("one"), shared_out("two")
    assert [*two]
    assert [*one]


# the cache directory


@pytest.fixture
def launched(monkeypatch):
    monkeypatch.setattr(ranks, "_launched", lambda: "one job")


class Rank:
    """A process of this node that comes by the table, and stays until it is told to end."""

    def __init__(self, child: Callable[..., Any], folder: Path, gate: int) -> None:
        self.log, self._end = folder.with_name("log"), os.pipe()
        self.process = child("fork", self.run, folder, gate, wait=False)

    def run(self, folder: Path, gate: int) -> None:
        def make(limit: int | None, match: Any) -> Manifest:
            self.say("listing")
            os.read(gate, 1)
            return rows("a")

        ranks._numbers.clear()
        table = Table(folder, "s3://b/", make)
        assert [*table.manifest()] == [*rows("a")]
        self.say("there")
        os.read(self._end[0], 1)

    def say(self, text: str) -> None:
        with open(self.log, "a") as file:
            file.write(f"{text}\n")

    def end(self) -> None:
        os.write(self._end[1], b"x")
        self.process.join(ENOUGH_S)
        assert self.process.exitcode == 0


class Node:
    """Where ranks run that a launcher has started. A listing ends when it is let through the gate."""

    def __init__(self, folder: Path, child: Callable[..., Any]) -> None:
        self._folder, self._child, self._gate = folder, child, os.pipe()

    def start(self) -> Rank:
        return Rank(self._child, self._folder, self._gate[0])

    def let_through(self) -> None:
        os.write(self._gate[1], b"x")

    def said(self, text: str) -> int:
        log = self._folder.with_name("log")
        return log.read_text().splitlines().count(text) if log.exists() else 0

    def left(self) -> list[str]:
        return [path.suffix for path in sorted(self._folder.glob("job-*"))]


@pytest.fixture
def node(tmp_path, child, launched):
    folder = tmp_path / "manifests"
    folder.mkdir()
    return Node(folder, child)


def test_ranks_of_a_node_list_once_and_the_last_to_end_takes_the_table_away(node):
    one, two = node.start(), node.start()
    node.let_through()
    wait_for(lambda: node.said("there") == 2)
    one.end()
    three = node.start()
    wait_for(lambda: node.said("there") == 3)
    two.end()
    assert node.left() == [".lock", ".manifest"]
    three.end()
    assert node.left() == []
    assert node.said("listing") == 1


def test_rank_that_is_killed_while_it_lists_holds_nobody_up(node):
    killed = node.start()
    wait_for(lambda: node.said("listing") == 1)
    other = node.start()
    os.kill(killed.process.pid, signal.SIGKILL)
    wait_for(lambda: node.said("listing") == 2)
    node.let_through()
    other.end()


def test_table_of_those_who_were_killed_serves_nobody(node):
    killed = node.start()
    node.let_through()
    wait_for(lambda: node.said("there") == 1)
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.process.join(ENOUGH_S)
    assert node.left() == [".lock", ".manifest"]
    later = node.start()
    node.let_through()
    later.end()
    assert node.said("listing") == 2


def expect_nobody(table: Table) -> None:
    assert table._way() is None


def test_worker_takes_no_part(node, tmp_path, child):
    table = Table(tmp_path, "s3://b/", None)
    assert table._way() is not None
    child("fork", expect_nobody, table)


def test_without_a_folder_each_lists_for_itself(tmp_path, launched):
    assert [*Meeting(tmp_path / "gone", "s3://b/").way()(lambda: rows("a"))] == [*rows("a")]


def launch(monkeypatch, **names: str) -> str | None:
    """What tells the job, in this environment."""
    for name in [name for name in os.environ if name.startswith(("SLURM", "TORCHELASTIC", "WORLD_SIZE"))]:
        monkeypatch.delenv(name)
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    return ranks._launched()


def test_job_of_slurm_is_a_step_of_several_tasks_of_which_this_process_is_one(monkeypatch):
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_TASK_PID": f"{os.getpid()}"}
    assert launch(monkeypatch) is None
    job = launch(monkeypatch, **step)
    assert job is not None
    assert launch(monkeypatch, **step | {"SLURM_STEP_ID": "1"}) not in (job, None)
    assert launch(monkeypatch, **step | {"SLURM_RESTART_COUNT": "1"}) not in (job, None)
    assert launch(monkeypatch, **step | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert launch(monkeypatch, **step | {"SLURM_TASK_PID": f"{os.getppid()}"}) is None


IDENTITY = "from asyncds import ranks; print(ranks._launched())"
RANK_OF_RANK = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {IDENTITY!r}])"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells a parent's environment")
def test_job_of_torchrun_is_told_by_its_launcher_and_not_inherited(monkeypatch):
    names = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "0"}

    def said(script: str, **changed: str) -> str:
        environment = os.environ | names | changed
        return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True).stdout

    job = said(IDENTITY)
    assert f"/proc/{os.getpid()} " in job
    assert said(IDENTITY) == job
    assert said(IDENTITY, TORCHELASTIC_RESTART_COUNT="1") not in (job, "None\n")
    assert said(IDENTITY, WORLD_SIZE="1") == "None\n"
    assert said(RANK_OF_RANK) == "None\n", "what a rank has started has its environment, and is no rank"
