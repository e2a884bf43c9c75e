"""Measure a bucket from this machine: how many requests in flight pay, and what then is the limit."""

import asyncio
import contextlib
import random
import resource
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, closing, contextmanager
from itertools import cycle
from pathlib import Path
from typing import Literal, NamedTuple

from asyncds.budget import Memory
from asyncds.cache import Cache
from asyncds.entry import NewEntry
from asyncds.errors import AsyncdsError, CacheError, DeadlineExceeded, EmptyDataset
from asyncds.fetcher import Fetcher
from asyncds.large import StoredBody
from asyncds.limiter import most
from asyncds.listing import list_prefix
from asyncds.lookup import Fetched
from asyncds.manifest import Manifest, ObjectInfo
from asyncds.recipe import StoreRecipe
from asyncds.retry import Retry
from asyncds.store import ObjectStore

__all__ = ["Limit", "Step", "Tuning", "binding", "knee", "tune"]

Limit = Literal["store", "cache", "cpu", "memory", "network", "concurrency"]
"""What holds the rate where it is: the store, which refuses more; writing to the cache; the CPU of one process; the
bytes that asyncds lets be between socket and disk; the network, or the store without saying so; or how many requests
were in flight, of which more would have brought more.
"""

_LISTED = 10_000
_ROUND_TRIPS = 20  # that a step takes, at least, so that its beginning does not count
_SHORTEST_S, _LONGEST_S = 0.5, 3.0
_PAYS = 1.05  # more than that has to come of twice as many requests
_VAIN = 2  # doublings that may bring less, before no more are tried
_SATURATED = 0.85  # of a core, which is all that the event loop of a process can use
_REFUSED = 0.01  # of the requests
_KEPT, _KEPT_BYTES = 2_000, 64 << 20
_LISTING = 0.3  # of the time that there is; what has come by then is enough
_COLD, _COLD_S = 0.2, 3.0  # share of objects and of seconds, and seconds at most, that are for fetching and writing
_HELD_BACK = 0.85  # of what comes without a cache
_HOPELESS = 10  # objects that cannot be had, before any could
_PREFIX, _LITTER_S = "asyncds-tune-", 3600.0
_GRACE_S = 5.0  # for what is in flight when a step ends, and for connections before it begins
_WRITTEN = 64  # at a time


class Step(NamedTuple):
    """What came with so many requests in flight: objects, and their bytes, in so many seconds, of which `cpu` were
    seconds of this process's CPU. `refused` are attempts that had to be repeated."""

    concurrency: int
    objects: int
    bytes: int
    seconds: float
    cpu: float
    refused: int

    @property
    def rate(self) -> float:
        """Objects per second."""
        return self.objects / self.seconds

    @property
    def time_of_one(self) -> float:
        """Mean seconds from a request to its object, by Little's law: those in flight, by those that come."""
        return self.concurrency / self.rate if self.objects else float("inf")


class Tuning(NamedTuple):
    """What was measured. `objects` are those listed, of a mean size of so many bytes; there are more if not
    `complete`. `cold` is what came with the best number in flight and was written to a cache at the same time, and
    `written` how many objects a second the cache takes alone. `cut` says that the budget ended it."""

    objects: int
    complete: bool
    mean_size: float
    steps: tuple[Step, ...]
    cold: Step
    written: float
    cut: bool

    @property
    def best(self) -> Step:
        return knee(self.steps)

    @property
    def limit(self) -> Limit:
        return binding(self.steps, self.cold, self.written)

    @property
    def rate(self) -> float:
        """Objects per second of a cold epoch, which fetches and writes at the same time."""
        return self.cold.rate or self.best.rate

    @property
    def epoch_s(self) -> float:
        """Seconds that a cold epoch over what was listed takes, if nothing else holds it up."""
        return self.objects / self.rate if self.rate else float("inf")


def knee(steps: Sequence[Step]) -> Step:
    """The step of fewest requests in flight of which twice as many bring next to nothing more."""
    highest = max(step.rate for step in steps)
    return next(step for step in steps if step.rate * _PAYS >= highest)


def binding(steps: Sequence[Step], cold: Step, written: float) -> Limit:
    """Name the limit of a cold epoch with the best number in flight."""
    best = knee(steps)
    if any(step.refused > _REFUSED * step.objects for step in steps):
        return "store"
    if 0 < written < best.rate:
        return "cache"
    if best.cpu > _SATURATED * best.seconds or cold.cpu > _SATURATED * cold.seconds:
        return "cpu"
    if 0 < cold.rate < _HELD_BACK * best.rate:
        return "cache"
    if best.concurrency * best.bytes > Memory().size * best.objects:
        return "memory"
    return "concurrency" if best is steps[-1] else "network"


async def tune(
    recipe: StoreRecipe,
    bucket: str,
    prefix: str,
    *,
    highest: int = 512,
    objects: int = 50_000,
    seconds: float = 30.0,
    tell: Callable[[Step], object] = lambda step: None,
) -> Tuning:
    """Measure, within so many objects and seconds; `tell` is told of each step.

    Lists up to 10,000 keys, and gets them in random order with 1, 2, 4 … requests in flight, until twice as many no
    longer pay, the store refuses, or the budget is spent. Then fetches with the best number once more, into a cache of
    its own beside the one in use, and writes some of what came to another one; deletes both. Writes nothing to the
    bucket. A step takes a few seconds more where answers stall. Objects that cannot be had are left out.
    Raises what a fetcher raises, `EmptyDataset`, `CacheError`, and `DeadlineExceeded` where nothing came at all.
    """
    settings, refusals, started = recipe.settings, _Refusals(), time.monotonic()
    highest = min(highest, most())
    try:
        settings.cache_dir.mkdir(parents=True, exist_ok=True)
        _tidy(settings.cache_dir)
    except OSError as error:
        raise CacheError(f"{settings.cache_dir}: {error.strerror}; name another folder by ASYNCDS_CACHE_DIR") from None
    retry = Retry(settings.retries, settings.deadline, settings.first_contact, on_retry=refusals.add)
    store = recipe.make(highest, retry)
    async with Fetcher(store, None, concurrency=highest, retry=retry, hedging=False) as fetcher:
        manifest, complete = await _listed(store, bucket, prefix, seconds * _LISTING)
        wanted = manifest.rows(random.Random(0).sample(range(len(manifest)), len(manifest)))
        kept_back = min(len(manifest), int(objects * _COLD))
        run = _Run(fetcher.get, cycle(wanted), refusals, objects - kept_back)
        steps, highest = list[Step](), min(highest, max(1, len(manifest) // 2))  # or one would be asked for twice
        while _pays(steps) and (concurrency := _next(steps, highest)):
            left = seconds * (1 - _COLD) - (time.monotonic() - started)
            length = min(_LONGEST_S, max(_SHORTEST_S, _ROUND_TRIPS * steps[0].time_of_one)) if steps else _SHORTEST_S
            if steps and (left < length or run.left < 2 * concurrency):
                break  # half a step would say less than none
            step = await run.step(concurrency, length)
            if not step.objects:
                break
            steps.append(step)
            tell(step)
        if not steps:
            raise DeadlineExceeded(f"s3://{bucket}/{prefix}: no object came within {seconds:g} s; raise --seconds")
        cut = _pays(steps) and steps[-1].concurrency < highest
        best = knee(steps).concurrency
        try:
            with _cache_in(settings.cache_dir) as cache:
                writing = Fetcher(store, cache, concurrency=best, retry=retry, hedging=False)
                cold = await _cold(writing, best, wanted[:kept_back], min(_COLD_S, seconds * _COLD))
            written = await asyncio.to_thread(_written, settings.cache_dir, run.bodies)
        except AsyncdsError:  # of the store, many of which are OSErrors, too
            raise
        except OSError as error:
            raise CacheError(f"{settings.cache_dir}: {error}; name another folder by ASYNCDS_CACHE_DIR") from None
    mean = float(manifest.sizes.clip(0).mean())
    return Tuning(len(manifest), complete, mean, tuple(steps), cold, written, cut)


def _pays(steps: Sequence[Step]) -> bool:
    """Whether more in flight may bring more still: not after two doublings in vain, nor where the store refuses."""
    if any(step.refused > _REFUSED * step.objects for step in steps[-1:]):
        return False
    return len(steps) <= _VAIN or knee(steps) in steps[-_VAIN:]


def _next(steps: Sequence[Step], highest: int) -> int | None:
    """Twice as many as in the last step; the highest is the last."""
    concurrency = min(2 * steps[-1].concurrency, highest) if steps else 1
    return concurrency if not steps or concurrency > steps[-1].concurrency else None


async def _listed(store: ObjectStore, bucket: str, prefix: str, seconds: float) -> tuple[Manifest, bool]:
    """The first keys, as many as come within so many seconds, and whether that is all."""
    until, complete = time.monotonic() + seconds, True

    async def pages() -> AsyncGenerator[Sequence[ObjectInfo], None]:
        nonlocal complete
        async with aclosing(store.list(bucket, prefix)) as listing:
            async for page in listing:
                complete = True
                yield page
                complete = False  # as far as anybody knows
                if time.monotonic() > until:
                    return
            complete = True

    manifest = await list_prefix(pages(), endpoint=store.endpoint, bucket=bucket, prefix=prefix, limit=_LISTED)
    if not len(manifest):
        raise EmptyDataset(f"s3://{bucket}/{prefix}: there is nothing to measure under this prefix")
    return manifest, complete and len(manifest) < _LISTED


async def _cold(fetcher: Fetcher, concurrency: int, wanted: Sequence[ObjectInfo], seconds: float) -> Step:
    """Fetch and write these objects, or as many as come in so many seconds; one counts when the cache has it."""
    objects = size = 0
    last = started = time.monotonic()
    cpu = _cpu()
    async with fetcher, aclosing(fetcher.outcomes(wanted)) as outcomes:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds + _GRACE_S):
                async for _, result in outcomes:
                    if not isinstance(result, AsyncdsError):
                        objects, size, last = objects + 1, size + len(result.body), time.monotonic()
                    if time.monotonic() - started > seconds:
                        break
        cpu = _cpu() - cpu
    return Step(concurrency, objects, size, max(last - started, 1e-6), cpu, 0)


class _Refusals:
    """Counts attempts that had to be repeated."""

    def __init__(self) -> None:
        self.count = 0

    def add(self) -> None:
        self.count += 1


class _Run:
    """Asks for one object after the other, so many at a time, and counts what comes once all of these are under way.

    The first bodies of all are kept, to be written.
    """

    def __init__(
        self,
        get: Callable[[ObjectInfo], Awaitable[Fetched]],
        wanted: Iterator[ObjectInfo],
        refusals: _Refusals,
        left: int,
    ) -> None:
        self.left = left
        self.bodies: list[bytes] = []
        self._failed = 0
        self._get = get
        self._wanted = wanted
        self._refusals = refusals
        self._room = _KEPT_BYTES

    async def step(self, concurrency: int, seconds: float) -> Step:
        """Measure for so many seconds, or until no objects are left that may be asked for."""
        self._arrived = self._bytes = 0
        self._warming = concurrency
        self._seconds = seconds
        self._begin()
        self._until = float("inf")  # until all have had one
        asking = [asyncio.create_task(self._keep_asking()) for _ in range(concurrency)]
        try:
            await asyncio.wait(asking, timeout=2 * seconds + _GRACE_S, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in asking:
                task.cancel()
        ended = await asyncio.gather(*asking, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):
                raise error
        return Step(concurrency, self._arrived, self._bytes, *self._last, self._refusals.count - self._refused)

    def _begin(self) -> None:
        """Start the clock, and a second time, when all who ask have got something: a connection, above all."""
        self._started, self._cpu, self._refused = time.monotonic(), _cpu(), self._refusals.count
        self._until = self._started + self._seconds
        self._last = self._seconds, 0.0

    async def _keep_asking(self) -> None:
        while self.left > 0 and time.monotonic() < self._until:
            self.left -= 1
            try:
                fetched = await self._get(next(self._wanted))
            except AsyncdsError:
                self._failed += 1
                if not self.bodies and self._failed >= _HOPELESS:
                    raise
            else:
                self._count(fetched.body)

    def _count(self, body: bytes | StoredBody) -> None:
        now = time.monotonic()
        self._keep(body)
        if self._warming:
            self._warming -= 1
            if not self._warming:
                self._begin()
        elif now < self._until or not self._arrived:
            self._arrived, self._bytes = self._arrived + 1, self._bytes + len(body)
            self._last = now - self._started, _cpu() - self._cpu

    def _keep(self, body: bytes | StoredBody) -> None:
        if isinstance(body, bytes) and len(self.bodies) < _KEPT and (self._room >= len(body) or not self.bodies):
            self._room -= len(body)
            self.bodies.append(body)


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def _cache_in(directory: Path) -> Iterator[Cache]:
    """A cache of its own, in a folder that is gone afterwards."""
    with (
        tempfile.TemporaryDirectory(prefix=_PREFIX, dir=directory) as place,
        closing(Cache(place, sweeping=False)) as cache,
    ):
        yield cache


def _tidy(directory: Path) -> None:
    """Remove what was left behind by who was killed."""
    for place in directory.glob(f"{_PREFIX}*"):
        if not place.is_symlink() and time.time() - place.stat().st_mtime > _LITTER_S:
            shutil.rmtree(place, ignore_errors=True)


def _written(directory: Path, bodies: Sequence[bytes]) -> float:
    """Objects per second that a cache in this directory takes."""
    with _cache_in(directory) as cache:
        entries = [NewEntry(number.to_bytes(16, "big"), "0", body) for number, body in enumerate(bodies)]
        started = time.monotonic()
        stored = sum(cache.put_many(entries[start : start + _WRITTEN]) for start in range(0, len(entries), _WRITTEN))
        return stored / (time.monotonic() - started)
