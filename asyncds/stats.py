"""Counters of a dataset that sum over the process that made it and all of its workers, also those that were killed."""

import bisect
import fcntl
import itertools
import math
import mmap
import os
import struct
import threading
import weakref
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

__all__ = ["COUNTERS", "Counters", "percentiles"]

COUNTERS = (
    "samples",  # returned to the loader
    "hits",  # found in the cache
    "misses",  # not found there: on their way, or to be sent for
    "gets",  # objects that arrived from the store
    "bytes",  # of these
    "gets_lean",  # GETs that brought something by the lean lane: an object, or a part of a large one
    "gets_full_off",  # by the full lane: because the lean one is switched off,
    "gets_full_first",  # because it was the first of its bucket, from which the request is learnt,
    "gets_full_request",  # because the request is none that the lean lane can repeat,
    "gets_full_answer",  # or because an answer was one that only the full lane understands
    "verified_checksum",  # of all these GETs, those whose body was compared with a checksum that the server had stored,
    "verified_etag_md5",  # with its ETag, which is its MD5,
    "verified_length_etag",  # or by length and ETag only
    "retries",  # attempts after a first one
    "hedges",  # second requests for objects that took much longer than others
    "failures",  # objects that the store could not be made to give, each time they were asked for
    "replaced",  # samples that could not be had, in whose place another one was returned
    "skipped",  # samples that could not be had, and were left out
    "uncached",  # objects that the cache did not take
    "prefetch_hits",  # hits and misses whose bytes had arrived in advance when they were asked for
    "blocked_s",  # seconds in which a caller waited for bytes
    "transform_s",  # seconds in transforms
)
_PAGE = mmap.PAGESIZE
_BUCKETS, _FASTEST, _GROWTH = (
    64,
    0.0005,
    1.2,
)  # of latencies: the first is up to half a millisecond, the last above 40 s
_VALUES = struct.Struct(f"<Q{len(COUNTERS) + _BUCKETS}d")
_VALUE = struct.Struct("<d")


def mark_of(*layout: object) -> int:
    """What a page begins with: a version that counts anything else writes another mark."""
    return int.from_bytes(blake2b(repr(layout).encode(), digest_size=8).digest(), "little")


_MARK = mark_of(COUNTERS, _BUCKETS, _FASTEST, _GROWTH)


class Counters:
    """One file, one mapped page per process in it: every process adds to its own, and reading sums all of them.

    Works under fork, spawn and forkserver; pickles as the file's path. Where the file cannot be used, a process counts
    for itself alone. Safe to use from any thread.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._pid = 0
        self._page: mmap.mmap | None = None
        self._values = [0.0] * (len(COUNTERS) + _BUCKETS)
        _counters.add(self)

    def __reduce__(self) -> tuple[type["Counters"], tuple[Path]]:
        return Counters, (self.path,)

    def add(self, **amounts: float) -> None:
        """Add to the counters of this process."""
        with self._lock:
            self._begin()
            for name, amount in amounts.items():
                self._add(_PLACE[name], amount)

    def count_get(self, lane: str, verified: str) -> None:
        """Count a GET that brought something: by the lane `lean`, or by the full one, for the reason given; and how
        that was verified."""
        with self._lock:
            self._begin()
            self._add(_PLACE_OF_LANE[lane], 1)
            self._add(_PLACE_OF_VERIFIED[verified], 1)

    def observe(self, seconds: float) -> None:
        """Count a request that took so long."""
        bucket = math.ceil(math.log(max(seconds, _FASTEST) / _FASTEST, _GROWTH))
        place = len(COUNTERS) + min(_BUCKETS - 1, bucket)
        with self._lock:
            self._begin()
            self._add(place, 1)

    def _add(self, place: int, amount: float) -> None:
        value = self._values[place] = self._values[place] + amount
        if self._page is not None:
            _VALUE.pack_into(self._page, _VALUE.size * (1 + place), value)

    def _begin(self) -> None:
        if self._pid != os.getpid():
            self._pid, self._page = os.getpid(), self._new_page()
            self._values = [0.0] * (len(COUNTERS) + _BUCKETS)

    def total(self) -> dict[str, float]:
        """Sum over all processes; whole numbers are ints."""
        sums = self._sums()[: len(COUNTERS)]
        return {name: s if name.endswith("_s") else int(s) for name, s in zip(COUNTERS, sums, strict=True)}

    def latencies(self) -> list[float]:
        """How many requests of all processes took how long; see `percentiles`."""
        return self._sums()[len(COUNTERS) :]

    def _sums(self) -> list[float]:
        sums = [0.0] * (len(COUNTERS) + _BUCKETS)
        for values in self._pages():
            sums = [total + value for total, value in zip(sums, values, strict=True)]
        if self._page is None and self._pid == os.getpid():
            sums = [total + value for total, value in zip(sums, self._values, strict=True)]
        return sums

    @property
    def readable(self) -> bool:
        """Whether the file holds counters that are understood: those of another version are not."""
        return any(True for _ in self._pages())

    def _pages(self) -> Iterator[list[float]]:
        """What each process has counted so far."""
        try:
            pages = self.path.read_bytes()
        except OSError:
            return
        for start in range(0, len(pages) - _VALUES.size, _PAGE):
            mark, *values = _VALUES.unpack_from(pages, start)
            if mark == _MARK:
                yield values

    def _new_page(self) -> mmap.mmap | None:
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX)
                start = os.fstat(descriptor).st_size
                page = _MARK.to_bytes(8, "little").ljust(_PAGE, b"\0")
                os.pwrite(descriptor, page, start)  # a sparse page would kill who writes to it on a full disk
                return mmap.mmap(descriptor, _PAGE, offset=start)
            finally:
                os.close(descriptor)
        except OSError:
            return None


def percentiles(latencies: Sequence[Sequence[float]]) -> dict[str, float]:
    """`latency_p50_s`, `latency_p90_s` and `latency_p99_s` of what was counted, to within a tenth; 0.0 of nothing."""
    counts = [sum(bucket) for bucket in zip(*latencies, strict=True)]
    reached, total = list(itertools.accumulate(counts)), sum(counts)
    return {
        f"latency_p{percent}_s": _middle(bisect.bisect_left(reached, total * percent / 100)) if total else 0.0
        for percent in (50, 90, 99)
    }


def _middle(bucket: int) -> float:
    """Seconds in the middle of a bucket, of which each begins where the one before ends."""
    return float(_FASTEST * _GROWTH ** (bucket - 0.5))


def _unlock_in_child() -> None:
    """A thread that was counting while the process forked is not there to let go."""
    for counters in _counters:
        counters._lock = threading.Lock()


_counters: weakref.WeakSet[Counters] = weakref.WeakSet()
os.register_at_fork(after_in_child=_unlock_in_child)
_PLACE = {name: place for place, name in enumerate(COUNTERS)}
_PLACE_OF_LANE = {name.removeprefix("gets_").removeprefix("full_"): _PLACE[name] for name in _PLACE if "gets_" in name}
_PLACE_OF_VERIFIED = {name.removeprefix("verified_"): _PLACE[name] for name in _PLACE if "verified_" in name}
