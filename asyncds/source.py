"""What a dataset reads from: a store, a cache, a table of objects, and each process's means to fetch. No torch."""

import asyncio
import contextlib
import operator
import os
import shutil
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from functools import partial
from multiprocessing import util
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import quote
from uuid import uuid4

from asyncds.budget import Memory, Slots
from asyncds.cache import Cache, largest_that_fits
from asyncds.entry import object_id
from asyncds.errors import CacheError, DatasetClosed, StoreError
from asyncds.fanout import list_store
from asyncds.fetcher import Fetcher
from asyncds.listing import Labeller, Table
from asyncds.lookup import Fetched, identify, lookup, resident
from asyncds.manifest import KeyFilter, Manifest, ObjectInfo, parse_uri
from asyncds.portal import Portal
from asyncds.progress import progress_bar
from asyncds.recipe import StoreRecipe
from asyncds.retry import Retry
from asyncds.selection import Selection
from asyncds.stats import Counters
from asyncds.store import ObjectStore
from asyncds.warm import Missing, Plan, WarmReport, planned, warm
from asyncds.workers import SECONDS_BETWEEN_CHECKS, insist_on_a_loader, settle_in, spare_the_collector, workers

__all__ = ["Arrivals", "Source"]

# Exit handlers of multiprocessing run in workers, too, where those of atexit do not; the greater number goes first.
_FIRST_TO_CLOSE, _LAST_TO_CLOSE = 100, 90
_PATIENCE_S = 5.0
_LOOKUP = 1000
_TRIPS = 3
_MOST_EARLY, _EARLY_BYTES, _SMALL = 100_000, 16 << 20, 256 << 10


class Arrivals:
    """The objects of one batch, coming in while their first ones are already used."""

    def __init__(self, portal: Portal) -> None:
        self._portal = portal
        self._queue: SimpleQueue[tuple[int, Fetched | BaseException | None]] = SimpleQueue()
        self._early: dict[int, Fetched | BaseException | None] = {}
        self._next_check = time.monotonic() + SECONDS_BETWEEN_CHECKS

    def put(self, position: int, result: Fetched | BaseException | None) -> None:
        """Called on the loop."""
        self._queue.put((position, result))

    def take(self, position: int) -> Fetched:
        """Wait for the object at this position, and return it or raise its error.

        Raises `DatasetClosed`, too, where the dataset is closed meanwhile, or nobody waits for the batch any more.
        """
        result = self._wait(position)
        if isinstance(result, BaseException):
            raise result
        assert result is not None
        return result

    def settle(self) -> None:
        """Wait until the cache has what it will have of this batch, so that no other worker asks for it again."""
        self._wait(-1)

    def _wait(self, position: int) -> Fetched | BaseException | None:
        while position not in self._early:
            place = None
            try:
                place, result = self._queue.get(timeout=SECONDS_BETWEEN_CHECKS)
                self._early[place] = result
            except Empty:  # nothing is done in here: an interrupt would be told together with this
                pass
            if place is None and not self._portal.alive:
                raise DatasetClosed("the dataset was closed while a batch was under way")
            if time.monotonic() > self._next_check:
                insist_on_a_loader()
                self._next_check = time.monotonic() + SECONDS_BETWEEN_CHECKS
        return self._early.pop(position)


class _Early:
    """Objects that were brought into the cache in advance, and not asked for since. Safe to use from any thread.

    The bodies of small ones are kept as well, up to 16 MiB: reading them back from the index, row by row, while the
    loop's thread wants the interpreter, too, takes longer than all the rest of a hit.
    """

    def __init__(self) -> None:
        _earlies.add(self)
        self.renew()

    def renew(self) -> None:
        """Begin anew: in a child, whose parent may have forked amid something."""
        self._lock = threading.Lock()
        self.objects: dict[tuple[str, str], Fetched | None] = {}
        self._bytes = 0
        self._outdated = False

    def __reduce__(self) -> tuple[type["_Early"], tuple[()]]:
        return _Early, ()

    def add(self, fetched: Fetched) -> None:
        size, body = len(fetched.body), fetched.body
        with self._lock:
            if self._outdated or len(self.objects) >= _MOST_EARLY:  # those whom nobody asked for in the end
                self._clear()
            fits = isinstance(body, bytes) and size <= _SMALL and self._bytes + size <= _EARLY_BYTES
            self._bytes += size if fits else 0
            self._pop((fetched.info.bucket, fetched.info.key))
            self.objects[fetched.info.bucket, fetched.info.key] = fetched if fits else None

    def take(self, infos: Sequence[ObjectInfo]) -> tuple[list[bool], list[Fetched | None]]:
        """Take objects out. Returns which of them were brought in advance, and what is at hand of each."""
        with self._lock:
            if self._outdated:
                self._clear()
            early = [(info.bucket, info.key) in self.objects for info in infos]
            found = [self._pop((info.bucket, info.key)) for info in infos]
        for place, (info, there) in enumerate(zip(infos, found, strict=True)):
            if there is not None and info.etag not in (None, there.info.etag):
                found[place] = None
        return early, found

    def clear(self) -> None:
        """Let go of everything at the next use. The garbage collector calls this: it must not wait for the lock."""
        self._outdated = True

    def _pop(self, place: tuple[str, str]) -> Fetched | None:
        fetched = self.objects.pop(place, None)
        self._bytes -= len(fetched.body) if fetched is not None else 0
        return fetched

    def _clear(self) -> None:
        self.objects.clear()
        self._bytes, self._outdated = 0, False


class _Runtime:
    """The live handles of one process. Made lazily, never pickled, not carried across a fork."""

    def __init__(self, source: "Source") -> None:
        self.pid = os.getpid()
        self.portal = Portal.enter()
        try:
            self._open(source)
        except BaseException:  # an interrupt, say
            self.portal.leave()
            raise
        self.close = util.Finalize(None, self._shut, exitpriority=_FIRST_TO_CLOSE)
        weakref.finalize(source, self._dropped).atexit = False

    def _open(self, source: "Source") -> None:
        settings = source.settings
        self.slots = self.portal.shared(settings.concurrency, lambda: Slots.of(settings.concurrency, workers()))
        retry = Retry(
            settings.retries,
            settings.deadline,
            settings.first_contact,
            on_retry=lambda: source_counters.add(retries=1),
        )
        source_counters = source.counters
        self.store = source.recipe.make(self.slots.most, retry, source_counters.count_get)
        self.fetcher = Fetcher(
            self.store,
            source.cache,
            concurrency=settings.concurrency,
            retry=retry,
            tag=source.tag,
            counters=source_counters,
            slots=self.slots,
            memory=self.portal.shared(Memory, Memory),
            admits=partial(Source.admits, weakref.proxy(source)) if settings.admit == "smallest" else None,
            hedging=settings.hedging,
            on_early=source.early.add,
        )
        spare_the_collector()

    def _shut(self) -> None:
        try:
            if not self.portal.is_current:
                self.portal.close(self.fetcher.aclose())
        finally:
            self.portal.leave()

    def _dropped(self) -> None:
        """The garbage collector comes by on any thread, also on one that closing waits for: leave it to the loop."""
        if self.close.still_active() and self.pid == os.getpid() and self.portal.alive:
            self.close.cancel()
            with contextlib.suppress(RuntimeError):
                ending = self.portal.start(self._wind_up())
                at_exit = util.Finalize(None, wait, ([ending], _PATIENCE_S), exitpriority=_FIRST_TO_CLOSE)
                ending.add_done_callback(lambda _: at_exit.cancel())

    async def _wind_up(self) -> None:
        with contextlib.suppress(Exception):
            await self.fetcher.aclose()
        self.portal.leave()


class Source:
    """A table of objects, the store that has them and the cache that keeps them.

    Usable from any thread, and from any process that it is forked or pickled into: each builds its own connections on
    first use. Rows are looked up and warmed by position in the table.
    """

    def __init__(
        self,
        recipe: StoreRecipe,
        uri: str,
        *,
        manifest: Manifest | None = None,
        match: KeyFilter | None = None,
        limit: int | None = None,
        label: Labeller | None = None,
    ) -> None:
        self.recipe = recipe
        self.settings = recipe.settings
        self.endpoint = recipe.identity
        self.tag = f"{uri} at {self.endpoint}"
        name, place = uuid4().hex, Path(self.settings.cache_dir, "asyncds")
        self.cache = self._open(place / "stats" / name)
        if self.cache.read_only:  # the processes of the run share a few files all the same
            place = Path(tempfile.mkdtemp(prefix="asyncds-"))
            for part in ("stats", "manifests"):
                (place / part).mkdir(mode=0o700)
        notices = place / "stats" / name
        self.counters = Counters(notices)
        self.early = _Early()
        self._uri = uri
        self.table = Table(
            place / "manifests",
            self.tag,
            self._listed,
            manifest=manifest,
            max_age=self.settings.manifest_max_age,
            match=match,
            limit=limit,
            label=label,
        )
        self._runtimes: list[_Runtime] = []  # the last is this process's; those before it were inherited and lie still
        self._threads: tuple[int, Executor] | None = None  # and the process that has them
        self._hold()
        self._closed = False
        self._smallest: int | None = None
        self.progress = True  # of listing
        self._lists = 0
        self._final: dict[str, float] | None = None
        self._final_latencies: list[float] | None = None
        self._failures = notices.with_suffix(".failures")
        said = [notices.with_suffix(f".{kind}") for kind in ("full", "fault", "failure")]
        self._litter = [self.table.path, notices, self._failures, *said]
        if self.table.lock.stem == self.table.path.stem:
            self._litter.append(self.table.lock)
        if self.cache.read_only:
            self._litter.append(place)
        util.Finalize(self, _remove, (self._litter,), exitpriority=_LAST_TO_CLOSE)

    def __getstate__(self) -> dict[str, Any]:
        if self._closed:
            raise DatasetClosed(f"{self._uri}: a closed dataset cannot be sent to another process")
        if self._litter:  # the pickle may outlive this object: its files stay until this process ends
            util.Finalize(None, _remove, (self._litter[:],), exitpriority=_LAST_TO_CLOSE)
            self._litter.clear()
        state = self.__dict__ | {"_runtimes": [], "_threads": None, "_litter": []}
        del state["cache"], state["_release"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.cache = self._open(self.counters.path)
        self._hold()

    def _open(self, notices: Path) -> Cache:
        settings = self.settings
        return Cache(settings.cache_dir, limit=settings.cache_size, notices=notices, read_only=settings.cache_read_only)

    def _hold(self) -> None:
        """Keep others from making room at the cost of this dataset, until it is closed or gone."""
        self.cache.hold(self.tag)
        self._release = weakref.finalize(self, self.cache.release, self.tag)

    def __repr__(self) -> str:
        return f"<Source {self.tag}>"

    @property
    def manifest(self) -> Manifest:
        """The table; listed now if nobody in this run has listed it yet."""
        return self.table.manifest()

    def runtime(self) -> _Runtime:
        """This process's connections, made on first use. Raises `DatasetClosed`."""
        if self._closed:
            raise DatasetClosed(f"{self._uri}: the dataset was closed; make a new one")
        with _making:
            if not self._runtimes or self._runtimes[-1].pid != os.getpid():
                self._runtimes.append(_Runtime(self))
            return self._runtimes[-1]

    def threads(self) -> Executor | None:
        """This process's threads for transforms, made on first use; None if none are asked for."""
        count = self.settings.decode_threads
        if count == 0:
            return None
        with _making:
            if self._threads is None or self._threads[0] != os.getpid():
                self._threads = os.getpid(), ThreadPoolExecutor(count, thread_name_prefix="asyncds-decoder")
            return self._threads[1]

    def find(self, infos: Sequence[ObjectInfo]) -> tuple[list[ObjectInfo], list[Fetched | None]]:
        """Look up a batch in the cache, in the calling thread; see `lookup`."""
        if self._closed:
            raise DatasetClosed(f"{self._uri}: the dataset was closed; make a new one")
        settle_in()
        if not self.early.objects:
            found = lookup(self.cache, self.endpoint, infos, self.tag)
        else:
            found = self._find_early(infos)
        self.insist()
        return found

    def _find_early(self, infos: Sequence[ObjectInfo]) -> tuple[list[ObjectInfo], list[Fetched | None]]:
        """As `find`, where some may have been brought in advance."""
        early, found = self.early.take(infos)
        known, missing = list(infos), [place for place, there in enumerate(found) if there is None]
        if missing:
            answers = lookup(self.cache, self.endpoint, [infos[place] for place in missing], self.tag)
            for place, info, there in zip(missing, *answers, strict=True):
                known[place], found[place] = info, there
        hits = sum(was and there is not None for was, there in zip(early, found, strict=True))
        self.counters.add(prefetch_hits=hits)
        return known, found

    def insist(self) -> None:
        """Raise `CacheError` if the cache has failed in this process, and `strict` does not let it go at that."""
        if self.settings.strict and self.cache.first_fault is not None:
            raise CacheError(self.cache.first_fault)

    def request(self, infos: Sequence[ObjectInfo]) -> Arrivals:
        """Start to download a batch, or join what is under way, and return what to wait on."""
        runtime = self.runtime()
        if self.settings.admit == "smallest":
            self.admits(0)  # which takes time at first: here, not on the loop
        arrivals = Arrivals(runtime.portal)
        # Not as a task, which would begin a turn later: what is waited for goes before what is only expected.
        runtime.portal.post(_serve, runtime.fetcher, infos, arrivals)
        return arrivals

    def note_failure(self, error: Exception, info: ObjectInfo, samples: int) -> None:
        """Write down that a failure of this object is let pass, and warn once; raise it where too many objects of so
        many samples have failed in this run."""
        limit, name = self.settings.max_failures, quote(info.uri, safe="/:")
        allowed = int(limit * samples) if isinstance(limit, float) else limit
        text = "; ".join(" ".join(f"{part}".split()) for part in (error, *getattr(error, "__notes__", ())))
        failed = self._failed()
        if name not in failed:
            with contextlib.suppress(OSError), open(_private_file(self._failures), "a", encoding="utf-8") as file:
                file.write(f"{name}\t{type(error).__name__}: {text}\n")
        if len(failed | {name: ""}) > allowed:
            of = "" if limit == allowed else f", that is {allowed} of {samples:,}"
            error.add_note(f"more objects than max_failures={limit}{of} have failed in this run")
            raise error
        self.cache.say_once("failure", f"a sample was left out or replaced, as on_error says ({text})")

    def failures(self) -> list[str]:
        """One line for each object whose failure was let pass in this run: what was wrong for the first time."""
        return list(self._failed().values())

    def _failed(self) -> dict[str, str]:
        try:
            lines = self._failures.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return {}
        failed: dict[str, str] = {}
        for name, _, text in (line.partition("\t") for line in lines):
            failed.setdefault(name, text)  # of two workers at once, the first
        return failed

    def prefetch(self, infos: Sequence[ObjectInfo], group: int, *, alone: bool) -> None:
        """Bring what is not cached of these objects, after all that is waited for.

        What was to be brought for a group can be forgotten; with `alone`, all other groups are.
        """
        known, keys = identify(self.cache, self.endpoint, infos)
        present = self.cache.present([key for key in keys if key is not None])
        missing = [info for info, key in zip(known, keys, strict=True) if key not in present]
        if missing:
            runtime = self.runtime()
            if alone:
                runtime.portal.post(runtime.fetcher.forget, partial(operator.ne, group))
            runtime.portal.post(runtime.fetcher.prefetch, missing, group)

    def forget(self, group: int) -> None:
        """Drop what was to be brought for this group, and is not under way; in the process that asked for it."""
        self.early.clear()
        if self._runtimes and self._runtimes[-1].pid == os.getpid():
            self._runtimes[-1].portal.post(self._runtimes[-1].fetcher.forget, partial(operator.eq, group))

    def warm(self, selection: Selection | None = None, *, progress: bool = True) -> WarmReport:
        """Bring everything that is not cached into the cache; interrupted, it keeps what arrived.

        Failures of single objects are reported, not raised; a store that cannot be reached at all is.
        """
        manifest, runtime = self.manifest, self.runtime()
        rows = (selection or Selection()).rows(manifest)
        admits = self.admits if self.settings.admit == "smallest" else lambda size: True
        admits(0)
        with progress_bar(f"warming {self._uri}", len(rows), show=progress) as advance:
            missing = Missing(self.cache, self.endpoint, manifest, rows, admits, self.tag, advance)
            report = runtime.portal.call(warm(runtime.fetcher, missing, advance))
        self.insist()
        return report

    def plan(self, selection: Selection) -> Plan:
        """What `warm` would do. Lists, unless a saved listing will do, and measures the round trip by HEADs."""
        manifest, runtime = self.manifest, self.runtime()
        rows = selection.rows(manifest)
        with progress_bar(f"looking for {self._uri}", len(rows), show=self.progress) as advance:
            plan, one = planned(self.cache, self.endpoint, manifest, rows, advance)
        if one is None:
            return plan._replace(lists=self._lists, seconds=0.0)
        trip = runtime.portal.call(_round_trip(runtime.store, one))
        seconds = None if trip is None else trip * max(1.0, plan.gets / runtime.slots.size)
        return plan._replace(lists=self._lists, seconds=seconds)

    def list_anew(self) -> Manifest:
        """What the store has now under the prefix; the saved listing stays."""
        return self._listed(None, None)

    def refresh(self) -> None:
        """Forget which versions of unlisted objects were seen first, so that the next read takes what is there now."""
        self.cache.forget_first_seen(object_id(self.endpoint, info.bucket, info.key) for info in self.manifest)

    def admits(self, size: int) -> bool:
        """Whether an object of so many bytes is one of the smallest, which fit into the cache together."""
        if self._smallest is None and self.listed:
            self._smallest = self._largest_admitted()
        return self._smallest is None or size <= self._smallest

    def _largest_admitted(self) -> int:
        manifest, own = self.manifest, 0
        for start in range(0, len(manifest), _LOOKUP):
            infos = manifest[start : start + _LOOKUP]
            present = resident(self.cache, self.endpoint, infos)
            own += sum(info.size or 0 for info, there in zip(infos, present, strict=True) if there)
        room = self.cache.make_room(int(manifest.sizes[manifest.sizes > 0].sum()) - own, self.tag)
        largest = largest_that_fits(manifest.sizes, room + own)
        return sys.maxsize if largest is None else largest

    @property
    def listed(self) -> bool:
        """Whether the table is there without asking the store."""
        return self.table.known

    def stats(self) -> dict[str, float]:
        """Counters of all processes of the run, and what the listing left out."""
        left_out = self.manifest.left_out if self.listed else {}
        counted = self._final if self._final is not None else self.counters.total()
        return counted | {reason: left_out.get(reason, 0) for reason in ("markers", "filtered")}

    def latencies(self) -> list[float]:
        """How many requests took how long, for `stats.percentiles`."""
        return self._final_latencies if self._final_latencies is not None else self.counters.latencies()

    def close(self) -> None:
        """Cancel what is under way, close connections and delete this run's files. Calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        with contextlib.ExitStack() as steps:  # the last one first; where one is interrupted, the others are taken
            if os.getpid() == self.table.owner:
                steps.callback(_remove, self._litter)
            steps.callback(self.cache.close)
            steps.callback(self._release)
            steps.callback(self.early.renew)
            steps.callback(self._keep_counts)
            if self._threads is not None and self._threads[0] == os.getpid():
                steps.callback(self._threads[1].shutdown)
            if self._runtimes and self._runtimes[-1].pid == os.getpid():
                steps.callback(self._runtimes[-1].close)

    def _keep_counts(self) -> None:
        self._final, self._final_latencies = self.counters.total(), self.counters.latencies()

    def _listed(self, limit: int | None, match: KeyFilter | None) -> Manifest:
        bucket, prefix = parse_uri(self._uri)
        runtime = self.runtime()
        self._lists = 0
        with progress_bar(f"listing {self._uri}", show=self.progress, unit="keys") as advance:

            def answered(keys: int) -> None:
                self._lists += keys >= 0  # fewer are taken back, before it begins anew
                advance(keys)

            listing = list_store(runtime.store, bucket, prefix, match=match, limit=limit, progress=answered)
            manifest = runtime.portal.call(listing)
        return manifest


async def _round_trip(store: ObjectStore, info: ObjectInfo) -> float | None:
    """Seconds that the shortest of a few small requests takes; None where the store does not answer them."""
    seconds = []
    for _ in range(_TRIPS):
        started = time.monotonic()
        try:
            await store.head(info.bucket, info.key)
        except StoreError:
            return None
        seconds.append(time.monotonic() - started)
    return min(seconds)


def _serve(fetcher: Fetcher, infos: Sequence[ObjectInfo], arrivals: Arrivals) -> None:
    """Deliver each object when it arrives, and word when all are settled."""
    try:
        flights = [fetcher.start(info) for info in infos]
    except DatasetClosed as error:
        for position in range(-1, len(infos)):
            arrivals.put(position, error)
        return
    for position, flight in enumerate(flights):
        flight.arrived.add_done_callback(partial(_deliver, arrivals, position))
    unsettled = {flight.settled for flight in flights}

    def settle(flight: asyncio.Future[bool]) -> None:
        unsettled.discard(flight)
        if not unsettled:
            arrivals.put(-1, None)

    for settled in list(unsettled):
        settled.add_done_callback(settle)


def _private_file(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _deliver(arrivals: Arrivals, position: int, arrived: asyncio.Future[Fetched]) -> None:
    arrivals.put(position, arrived.exception() or arrived.result())


def _remove(paths: list[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


_making = threading.Lock()
_earlies: weakref.WeakSet[_Early] = weakref.WeakSet()


def _forget_in_child() -> None:
    global _making
    _making = threading.Lock()
    for early in _earlies:
        early.renew()


os.register_at_fork(after_in_child=_forget_in_child)
