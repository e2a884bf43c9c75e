"""What comes next: a batch sampler that tells the dataset which batches follow, and the side that is told.

torch hands the batch sampler's object to the dataset as it is, also to one in a worker. So a batch is a list that
carries the next batches with it. Nothing else goes from the one process to the other, and the order is that of the
wrapped sampler, which is only asked earlier.
"""

import contextlib
import itertools
import os
import weakref
from array import array
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import torch
from torch.utils.data import BatchSampler, Dataset, get_worker_info

from asyncds.errors import ConfigurationError
from asyncds.ranks import first_word, world_size

__all__ = ["DEPTH", "Batch", "Horizon", "LookaheadBatchSampler", "ReadsAhead"]

DEPTH = 16
_KNOWN = 8  # iterations that a process remembers at a time
_VERSION = 1
_WRAPPED = 4  # samplers within samplers, at most
_samplers: defaultdict[int | None, "itertools.count[int]"] = defaultdict(itertools.count)


class Iteration:
    """One pass over a sampler. A process that reads for itself sees it end; a worker is told of the next one."""

    def __init__(self) -> None:
        self.number = int.from_bytes(os.urandom(8), "little")  # no random number that the training would have drawn
        self._told = set[Callable[[int], object]]()

    def at_end(self, tell: Callable[[int], object]) -> None:
        """Call this with the number when the iteration is over, or dropped."""
        if tell not in self._told:
            self._told.add(tell)
            weakref.finalize(self, tell, self.number).atexit = False


class _Position:
    """Where one iteration is, and what it began from."""

    def __init__(self, resumed: dict[str, Any] | None) -> None:
        self.start = resumed
        self.yielded = 0 if resumed is None else resumed["batches"]
        self.begun = self.ended = False


class Batch(list[Any]):
    """The indices of one batch, which also knows those of the next ones (`ahead`, nearest first).

    `number` counts the batches of an iteration. `shared` says that other processes may get some of them. A slice of a
    batch knows the same slices of the next ones: that is how one batch is shared out among the processes of a job.
    """

    __slots__ = ("ahead", "cut", "iteration", "number", "shared", "source")

    iteration: int
    number: int
    shared: bool
    ahead: Sequence["array[int]"]
    cut: slice | None
    source: Iteration | None

    @classmethod
    def of(
        cls,
        indices: Iterable[Any],
        source: Iteration | None,
        iteration: int,
        number: int,
        shared: bool,
        ahead: Sequence["array[int]"],
        cut: slice | None = None,
    ) -> Self:
        batch = cls(indices)
        batch.source, batch.iteration, batch.number = source, iteration, number
        batch.shared, batch.ahead, batch.cut = shared, ahead, cut
        return batch

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        if not isinstance(place, slice) or self.cut is not None:
            return found
        return Batch.of(found, self.source, self.iteration, self.number, self.shared, self.ahead, place)

    def __reduce__(self) -> tuple[Any, ...]:
        cut = None if self.cut is None else (self.cut.start, self.cut.stop, self.cut.step)
        # The next batches as one string of bytes: 16 of 200 take 13 kB, and no number is made into an object.
        lengths, joined = list(map(len, self.ahead)), b"".join(self.ahead)
        return _unpacked, (list(self), self.iteration, self.number, self.shared, lengths, joined, cut)


def _unpacked(
    indices: list[Any],
    iteration: int,
    number: int,
    shared: bool,
    lengths: list[int],
    joined: bytes,
    cut: tuple[Any, ...] | None,
) -> Batch:
    numbers, ends = array("I", joined), list(itertools.accumulate(lengths))
    ahead = [numbers[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    return Batch.of(indices, None, iteration, number, shared, ahead, None if cut is None else slice(*cut))


class ReadsAhead(Dataset[Any]):
    """A dataset whose `__getitems__` understands a `Batch`."""

    skips = False
    """Whether batches may come out shorter than they were asked for."""

    def __len__(self) -> int:
        raise NotImplementedError

    def subset(self, indices: Sequence[int]) -> Self:
        """The dataset of these samples, in this order."""
        raise NotImplementedError


class LookaheadBatchSampler(BatchSampler):
    """A batch sampler that yields what another yields, in the same order, and with each batch what comes after it.

        sampler = LookaheadBatchSampler(BatchSampler(RandomSampler(dataset), 200, drop_last=False))
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=4)

    `sampler` is any batch sampler; or, with `batch_size` and `drop_last`, any sampler, which is then batched first, as
    torch's `BatchSampler` does. `depth` is how many batches are told in advance: at least twice the number of workers,
    or 0 for a sampler whose order depends on what happens meanwhile (one that draws from the global generator as it
    goes, or learns from losses).

    The wrapped sampler is asked for nothing before the first batch is, and then for `depth` batches more than were
    taken: with the same seed the batches are those that it yields by itself.

    `state_dict()` tells where an iteration is, and `load_state_dict` lets the next one begin there. The state is the
    position, and the state of the random generators when the epoch began, from which the order is drawn again: exact
    for torch's samplers, and for others that draw from torch's global generator when they begin, or from a `generator`
    of their own. It does not depend on the number of workers. `sent_in_advance` says that these are sent batches before
    they are delivered, by a loader without a state of its own: then `state_dict` has to be told how many were.

    Where a `DistributedSampler` shares a dataset out among all ranks of a job, an epoch begins with a look at whether
    they have the same one, and raises `ConfigurationError` otherwise.
    """

    def __init__(
        self,
        sampler: Iterable[Any],
        batch_size: int | None = None,
        drop_last: bool = False,
        *,
        depth: int = DEPTH,
    ) -> None:
        if not isinstance(depth, int) or isinstance(depth, bool) or depth < 0:
            raise ConfigurationError(f"depth={depth!r}: must be a whole number of batches, at least 0")
        if not hasattr(sampler, "__iter__"):
            raise ConfigurationError(
                f"a {type(sampler).__name__} is no batch sampler: give one, or a sampler and batch_size"
            )
        # `BatchSampler.__init__` is not called: its attributes are those of what is wrapped.
        self._batches: Any = sampler if batch_size is None else BatchSampler(sampler, batch_size, drop_last)
        self.depth = depth
        self._resumed: dict[str, Any] | None = None
        self._position = _Position(None)
        self.sent_in_advance = False
        self._count()

    def _count(self) -> None:
        """The n-th sampler of so many ranks, in each of them, is the same sampler."""
        self._number = next(_samplers[self._replicas()])
        self._compared: list[str] = []

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {type(self._batches).__name__}, depth={self.depth}>"

    def __len__(self) -> int:
        return len(self._batches)

    # What wraps, shards or rebuilds batch samplers, such as Lightning and Accelerate, reads and sets these.

    @property
    def sampler(self) -> Any:
        """What the wrapped batch sampler draws from."""
        return self._batches.sampler

    @sampler.setter
    def sampler(self, sampler: Any) -> None:
        self._batches.sampler = sampler
        self._count()

    @property
    def batch_size(self) -> Any:  # type: ignore[override]
        """That of the wrapped batch sampler; None if it has none."""
        return getattr(self._batches, "batch_size", None)

    @property
    def drop_last(self) -> Any:  # type: ignore[override]
        """Whether the wrapped batch sampler leaves out a last batch that is not full."""
        return getattr(self._batches, "drop_last", False)

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the samplers that take one."""
        for sampler in self._samplers():
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[Any]]:
        # A DataLoader with workers makes two iterators and begins the second: the state is for the first that begins.
        self._position = position = _Position(self._resumed)
        return self._run(position, self._resumed)

    def _run(self, position: _Position, claimed: dict[str, Any] | None = None) -> Iterator[list[Any]]:
        if claimed is not None and claimed is not self._resumed:  # another iterator has begun with it
            self._position = position = _Position(None)
        self._resumed = None
        source, shared = Iteration(), self._shared()
        batches, done = self._begun(position), position.yielded
        self._compare(position)
        coming: deque[tuple[Any, array[int]]] = deque()
        for number in itertools.count(done):
            for batch in itertools.islice(batches, self.depth + 1 - len(coming)):
                coming.append((_checked(batch), _packed(batch) if self.depth else array("I")))
            if not coming:
                position.ended = True
                return
            batch, _ = coming.popleft()
            position.begun, position.yielded = True, number + 1
            yield Batch.of(batch, source, source.number, number, shared, [packed for _, packed in coming])

    def _begun(self, position: _Position) -> Iterator[Any]:
        """What is left of an epoch."""
        state = position.start
        if state is None:
            position.start = self._here()
            return iter(self._batches)
        if state["epoch"] is not None:
            self.set_epoch(state["epoch"])
        for generator, its_state in zip(self._generators(), state["generators"], strict=True):
            generator.set_state(its_state)
        if state["random"] is None:  # of an epoch that had not begun
            position.start = self._here()
            return iter(self._batches)
        with _random_state(state["random"]):
            batches = iter(self._batches)
            # Samplers draw when their first batch is asked for.
            rest = list(itertools.islice(batches, position.yielded + 1))[position.yielded :]
        return itertools.chain(rest, batches)

    def _compare(self, position: _Position) -> None:
        """Raise `ConfigurationError` if ranks that share out one dataset have different ones.

        Nobody waits for another here: the first to come says what it has, and those who come later find it.
        """
        assert position.start is not None
        ranks, digest = position.start["replicas"], position.start["dataset"]
        if digest is None or ranks is None or ranks != world_size() or digest in self._compared:
            return
        said = first_word(f"sampler {self._number} {len(self._compared)}", digest)
        if said != digest:
            raise ConfigurationError(
                f"this rank's dataset is not that of the others (digest {digest[:8]}, and {said[:8]} elsewhere): give "
                "all ranks the same prefix, match, limit and labels, or one saved manifest"
            )
        self._compared.append(digest)

    # state

    def state_dict(self, batches_done: int | None = None) -> dict[str, Any]:
        """Where the last iteration that was begun is: plain numbers, texts and tensors.

        `batches_done` is the number of batches that training has had in this epoch. It is needed with a plain
        `DataLoader` that has workers, because those are sent batches in advance; `StatefulDataLoader` knows it, and
        without workers all that was yielded has been delivered. The state of an epoch that has ended is the
        beginning of the next one; what draws from torch's global generator then draws as that is when it begins.
        """
        position = self._position
        if position.ended and batches_done in (None, position.yielded):  # the next epoch, which has not begun
            return {**self._here(), "random": None, "epoch": None}
        if batches_done is None and position.begun and self.sent_in_advance:
            raise ConfigurationError(
                "state_dict() needs batches_done= here: workers are sent batches in advance, so say how many of this "
                "epoch training has had, or make the loader with stateful=True"
            )
        if batches_done is not None and not (isinstance(batches_done, int) and 0 <= batches_done <= position.yielded):
            raise ConfigurationError(f"batches_done={batches_done}: of this epoch {position.yielded} were taken so far")
        start = position.start if position.start is not None else {**self._here(), "random": None}
        return {**start, "batches": position.yielded if batches_done is None else batches_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on where the state says. Raises `ConfigurationError` if it is of something else."""
        if not isinstance(state, dict) or state.get("version") != _VERSION or "batches" not in state:
            raise ConfigurationError("this is no state of a LookaheadBatchSampler: pass what its state_dict() returned")
        own = self._here()
        if state["replicas"] != own["replicas"]:
            raise ConfigurationError(
                f"the state is of a job of {state['replicas'] or 1} ranks, and this one has {own['replicas'] or 1}: "
                "resume with as many, or begin the epoch anew"
            )
        for name in ("sampler", "length", "batch_size", "dataset"):
            if state[name] != own[name]:
                raise ConfigurationError(
                    f"the state is of another sampler or dataset: its {name} was {state[name]}, and is {own[name]}"
                )
        self._resumed = dict(state)
        self._position = _Position(self._resumed)

    def _here(self) -> dict[str, Any]:
        """What an epoch that begins now is drawn from, and what tells it from others."""
        samplers = self._samplers()
        return {
            "version": _VERSION,
            "batches": 0,
            "random": torch.get_rng_state(),
            "generators": [generator.get_state() for generator in self._generators()],
            "epoch": next((s.epoch for s in samplers if hasattr(s, "epoch")), None),
            "replicas": self._replicas(),
            "sampler": " of ".join(type(sampler).__name__ for sampler in samplers),
            "length": self._length(),
            "batch_size": self.batch_size,
            "dataset": next((_digest(s) for s in samplers if _digest(s) is not None), None),
        }

    def _length(self) -> int | None:
        try:
            return len(self)
        except TypeError:  # of what is wrapped: samplers need none
            return None

    def _samplers(self) -> list[Any]:
        """What is wrapped, and what that wraps."""
        found = [self._batches]
        while hasattr(found[-1], "sampler") and len(found) < _WRAPPED:
            found.append(found[-1].sampler)
        return found

    def _generators(self) -> list[torch.Generator]:
        found = [getattr(sampler, "generator", None) for sampler in self._samplers()]
        return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())

    def _replicas(self) -> int | None:
        return next((s.num_replicas for s in self._samplers() if hasattr(s, "num_replicas")), None)

    def _shared(self) -> bool:
        """Whether other ranks may be given some of these batches, as Accelerate does."""
        return self._replicas() is None and world_size() > 1


def _digest(sampler: Any) -> str | None:
    """What the dataset that a sampler draws from says of itself."""
    dataset = getattr(sampler, "data_source", getattr(sampler, "dataset", None))
    return getattr(dataset, "digest", None)


def _checked(batch: Any) -> Any:
    if isinstance(batch, int) or not hasattr(batch, "__iter__"):
        raise ConfigurationError(
            f"the batch sampler yields {batch!r}, not a list of indices: give a batch sampler, or batch_size"
        )
    return batch


def _packed(batch: Iterable[Any]) -> "array[int]":
    """Indices as they are sent; none, where a sampler yields something else than a dataset's indices."""
    try:
        return array("I", batch)
    except (TypeError, ValueError, OverflowError):
        return array("I")


@contextlib.contextmanager
def _random_state(state: torch.Tensor) -> Iterator[None]:
    """With torch's global generator in this state; afterwards it is in the one that it was in."""
    before = torch.get_rng_state()
    torch.set_rng_state(state)
    try:
        yield
    finally:
        torch.set_rng_state(before)


class Horizon:
    """The side that is told: which of the next batches are this process's, and were not heard of before."""

    def __init__(self) -> None:
        self._heard: OrderedDict[int, tuple[int, int]] = OrderedDict()

    def extended(self, batch: Batch) -> list["array[int]"]:
        """The batches that this one brings into sight, nearest first.

        Of W workers each gets every W-th batch. Where ranks share batches out it is every n-th, and the distance to
        the batch before tells n. Without order (`in_order=False`) this is a guess.
        """
        worker = get_worker_info()
        workers = worker.num_workers if worker is not None else 1
        known = self._heard.pop(batch.iteration, None)
        last, seen = known or (batch.number, batch.number)
        stride = batch.number - last
        if stride <= 0 or stride % workers:
            stride = workers
        mine = range(batch.number + stride, batch.number + 1 + len(batch.ahead), stride)
        if batch.shared and known is None:
            mine = range(0)
        self._heard[batch.iteration] = batch.number, max([seen, *mine])
        while len(self._heard) > _KNOWN:
            self._heard.popitem(last=False)
        cut = batch.cut or slice(None)
        return [batch.ahead[number - batch.number - 1][cut] for number in mine if number > seen]
