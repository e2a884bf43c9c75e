"""Counters of a dataset that sum over the process that made it and all of its workers, also those that were killed."""

import fcntl
import mmap
import os
import struct
import threading
import weakref
from pathlib import Path

__all__ = ["COUNTERS", "Counters"]

COUNTERS = (
    "samples",  # returned to the loader
    "hits",  # found in the cache
    "misses",  # had to be waited for
    "gets",  # objects that arrived from the store
    "bytes",  # of these
    "retries",  # attempts after a first one
    "failures",  # objects that could not be had
    "uncached",  # objects that the cache did not take
    "blocked_s",  # seconds in which a caller waited for bytes
    "transform_s",  # seconds in transforms
)
_PAGE = mmap.PAGESIZE
_VALUES = struct.Struct(f"<Q{len(COUNTERS)}d")


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
        self._values = [0.0] * len(COUNTERS)
        _counters.add(self)

    def __reduce__(self) -> tuple[type["Counters"], tuple[Path]]:
        return Counters, (self.path,)

    def add(self, **amounts: float) -> None:
        """Add to the counters of this process."""
        with self._lock:
            if self._pid != os.getpid():
                self._pid, self._values, self._page = os.getpid(), [0.0] * len(COUNTERS), self._new_page()
            for name, amount in amounts.items():
                self._values[_PLACE[name]] += amount
            if self._page is not None:
                _VALUES.pack_into(self._page, 0, self._pid, *self._values)

    def total(self) -> dict[str, float]:
        """Sum over all processes; whole numbers are ints."""
        sums = [0.0] * len(COUNTERS)
        try:
            pages = self.path.read_bytes()
        except OSError:
            pages = b""
        for start in range(0, len(pages) - _VALUES.size, _PAGE):
            _, *values = _VALUES.unpack_from(pages, start)
            sums = [total + value for total, value in zip(sums, values, strict=True)]
        if self._page is None and self._pid == os.getpid():
            sums = [total + value for total, value in zip(sums, self._values, strict=True)]
        return {name: s if name.endswith("_s") else int(s) for name, s in zip(COUNTERS, sums, strict=True)}

    def _new_page(self) -> mmap.mmap | None:
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX)
                start = os.fstat(descriptor).st_size
                os.pwrite(descriptor, bytes(_PAGE), start)  # a sparse page would kill who writes to it on a full disk
                return mmap.mmap(descriptor, _PAGE, offset=start)
            finally:
                os.close(descriptor)
        except OSError:
            return None


def _unlock_in_child() -> None:
    """A thread that was counting while the process forked is not there to let go."""
    for counters in _counters:
        counters._lock = threading.Lock()


_counters: weakref.WeakSet[Counters] = weakref.WeakSet()
os.register_at_fork(after_in_child=_unlock_in_child)
_PLACE = {name: place for place, name in enumerate(COUNTERS)}
