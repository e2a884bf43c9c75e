"""A process that trains, compares every byte that it gets, and says what it has seen."""

import contextlib
import ctypes
import gc
import os
import random
import resource
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from torch.utils.data import DataLoader, Sampler

from asyncds import CachedS3MapDataset, S3Reader
from asyncds.errors import AsyncdsError
from soaking.objects import PER_PREFIX, body, keys
from soaking.rounds import WORKER_KILLED, Round
from soaking.server import BUCKET

TIMEOUT_S, DEADLINE_S = 5.0, 40.0  # a machine that is busy must not look like a stall
_SECONDS_BETWEEN_REPORTS = 0.2
_SECONDS_TO_SETTLE = 5.0
_DIE_WITH_PARENT = 1  # see prctl(2)
_SHOWN = 20  # of a process's mistakes; there may be thousands
_OF_TORCH = "DataLoader worker"


def sample(file: S3Reader) -> tuple[str, bool]:
    """A key, and whether its bytes are right.

    The bytes are compared where they arrive, and not sent on: a worker whose training process is killed amid a message
    of more than a pipe takes waits for ever for somebody to read it, and torch does not help it.
    """
    return file.key, file.read() == body(file.key)


class Order(Sampler[int]):
    """An order of rows, which the next epoch changes."""

    def __init__(self) -> None:
        self.rows = list(range(PER_PREFIX))

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def class_of(error: BaseException) -> str | None:
    """The name under which an error is counted; None for one that nobody should ever see."""
    if isinstance(error, AsyncdsError):
        return type(error).__name__
    if isinstance(error, RuntimeError) and _OF_TORCH in str(error):
        return WORKER_KILLED
    return None


def ours() -> list[threading.Thread]:
    """The library's threads in this process."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("asyncds")]


def handles() -> dict[str, int]:
    """What this process holds now."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return {
        "rss": pages * resource.getpagesize(),
        "threads": len(os.listdir("/proc/self/task")),
        "ours": len(ours()),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }


class Trainer:
    """Goes through the rounds that it is told of; what it sends are sums since its start, so that none can be lost."""

    def __init__(self, pipe: Connection, number: int) -> None:
        self._pipe = pipe
        self._number = number
        self._reads = self._wrong = 0
        self._errors = Counter[str]()
        self._examples: dict[str, str] = {}
        self._begun = Counter[str]()
        self._left = Counter[str]()
        self._untyped: list[str] = []
        self._mistakes: list[str] = []
        self._workers: list[int] = []
        self._reported = 0.0
        self._left_behind: set[threading.Thread] = set()

    def run(self) -> None:
        while (told := self._pipe.recv()) is not None:
            round_, until = told
            with _file_size(round_.file_size), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a cache was damaged, is full and so on
                self._train(round_, until)
            held = settled()
            self._name_those_left_behind()
            self._report(done=round_.number, **held)

    def _report(self, **more: Any) -> None:
        self._reported = time.monotonic()
        self._pipe.send(
            {
                "reads": self._reads,
                "wrong": self._wrong,
                "errors": dict(self._errors),
                "examples": self._examples,
                "begun": dict(self._begun),
                "left": dict(self._left),
                "untyped": self._untyped,
                "mistakes": self._mistakes,
                "workers": self._workers,
            }
            | more
        )

    def _train(self, round_: Round, until: float) -> None:
        """One dataset after the other, each for a cold and a warm epoch."""
        number = 0
        self._begun.clear()
        self._left.clear()
        while time.monotonic() < until:
            prefix = f"round-{round_.number}/{number}/"
            try:
                self._use(round_, prefix, until)
            except Exception as error:
                self._left[prefix] += 1
                self._note(error)
                time.sleep(0.01)  # an error at once must not become a storm of datasets
            number += 1

    def _use(self, round_: Round, prefix: str, until: float) -> None:
        times = {"timeout": TIMEOUT_S, "deadline": DEADLINE_S, "first_contact": DEADLINE_S, "env_file": None}
        options = {"max_failures": 1_000_000, **times, **round_.options}
        uri = f"s3://{BUCKET}/{prefix}"
        with CachedS3MapDataset.from_prefix(uri, transform=sample, **options) as dataset:
            dataset._parts[0].source.progress = False
            order, loading = Order(), dict(round_.loading)
            make = dataset.loader if loading.pop("reads_ahead") else _plain(dataset)
            loader = make(sampler=order, collate_fn=list, **loading)
            for epoch in range(2):
                random.Random(f"{round_.seed} {self._number} {prefix} {epoch}").shuffle(order.rows)
                self._begun[prefix] += 1
                if not self._epoch(loader, order.rows, until, strict=round_.options["on_error"] == "raise"):
                    self._left[prefix] += 1
                    break

    def _epoch(self, loader: Any, rows: list[int], until: float, *, strict: bool) -> bool:
        """Go through an epoch, and tell whether it was gone through: not if the time is up amid it."""
        batches = iter(loader)
        self._workers = [worker.pid for worker in getattr(batches, "_workers", ())]
        self._report()
        step, names = loader.batch_sampler.batch_size, keys_of(loader.dataset)
        for start in range(0, len(rows), step):
            if start and time.monotonic() > until:
                return False  # with what is under way
            try:
                batch = next(batches)
            except AsyncdsError as error:
                self._note(error)
                continue
            self._check(batch, [names[row] for row in rows[start : start + step]], strict)
        if next(batches, None) is not None:
            self._mistake("an epoch had more batches than it has rows for")
        return True

    def _check(self, batch: list[tuple[str, bool]], expected: list[str], strict: bool) -> None:
        self._reads += len(batch)
        for key, right in batch:
            if not right:
                self._wrong += 1
                self._mistake(f"{key}: wrong bytes")
        if strict and [key for key, _ in batch] != expected:
            self._mistake(f"other samples came than those asked for, {expected[0]} and so on")
        if time.monotonic() - self._reported > _SECONDS_BETWEEN_REPORTS:
            self._report()

    def _name_those_left_behind(self) -> None:
        """Each thread once, in the first round after which it is there."""
        frames, left = sys._current_frames(), [thread for thread in ours() if thread not in self._left_behind]
        for thread in left:
            if frame := frames.get(thread.ident or 0):
                where = "".join(traceback.format_stack(frame, 5))
                self._mistake(f"{thread.name} is left when all is closed:\n{where}")
                self._left_behind.add(thread)

    def _mistake(self, text: str) -> None:
        if len(self._mistakes) < _SHOWN:
            self._mistakes.append(text)

    def _note(self, error: Exception) -> None:
        name = class_of(error)
        self._errors[name or type(error).__name__] += 1
        cause = f" ({error.__cause__})" if error.__cause__ else ""  # torch's says with which code a worker ended
        self._examples.setdefault(name or type(error).__name__, f"{error}{cause}")
        if name is None:
            self._untyped.append("".join(traceback.format_exception(error)))


def keys_of(dataset: CachedS3MapDataset) -> list[str]:
    prefix = dataset.manifest.source.removeprefix(f"s3://{BUCKET}/")
    return keys(prefix)


def _plain(dataset: CachedS3MapDataset) -> Any:
    return lambda **options: DataLoader(dataset, **options)


@contextlib.contextmanager
def _file_size(most: int | None) -> Iterator[None]:
    """Let no file grow beyond so many bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft if most is None else most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def settled() -> dict[str, int]:
    """What is left once the datasets are closed, and what ends in the background has ended."""
    gc.collect()
    until = time.monotonic() + _SECONDS_TO_SETTLE
    while (found := handles())["ours"] and time.monotonic() < until:
        time.sleep(0.01)
    return found


def main(pipe: Connection, number: int) -> None:
    """What the process runs; it ends when it is told None, or when nobody is there to tell it anything."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, BrokenPipeError):
        Trainer(pipe, number).run()
