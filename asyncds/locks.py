"""Locks between processes that the kernel lets go of when their process dies, however it dies.

POSIX record locks at offsets of a file: one per name, without a file per name. They belong to the process: they do not
tell its threads apart (`Locks` does), a forked child does not inherit them, and closing *any* descriptor of the file
drops all of them. So this module alone opens the file, once per process. What can wait is `waiting`, with a file per
lock.
"""

import contextlib
import errno
import fcntl
import os
import struct
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path

from asyncds.workers import insist_on_a_loader, is_worker

__all__ = ["Locks", "waiting"]

_SECONDS_BETWEEN_TRIES = 0.05
_BUSY = {errno.EACCES, errno.EAGAIN}
_ON_MACOS = sys.platform == "darwin"
_QUESTION = struct.Struct("qqihh" if _ON_MACOS else "hhqqi")  # the C library's `struct flock`


class Locks:
    """Exclusive and shared locks by name, in one file; `Locks.at(path)` makes or finds those of a file.

    Safe to use from any thread; never waits. Where the file cannot be locked, or there is none, locks are the process's
    own: they save work, and no fault of theirs may stop training.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._guard = threading.RLock()  # the garbage collector may come by, and release something
        self._descriptor = -1
        self._close: Callable[[], object] = lambda: None
        self._pid = 0
        self.generation = 0  # how often everything that was held has been lost
        _all.add(self)
        self._held: dict[int, int] = {}  # offset: how many share it in this process; -1 for one who has it alone

    @classmethod
    def at(cls, path: Path) -> "Locks":
        """The locks of this file, which all of the process have in common."""
        name = os.path.realpath(path)
        with _making:
            locks = _known.get(name)
            if locks is None:
                locks = _known[name] = cls(path)
            return locks

    def take(self, name: bytes) -> bool:
        """Take the lock alone, unless anybody holds it, in this process or another; tell whether it was taken."""
        with self._guard:
            offset = _offset(name)
            if offset in self._mine() or not self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB, offset):
                return False
            self._held[offset] = -1
            return True

    def share(self, name: bytes) -> bool:
        """Take the lock together with others who share it; tell whether it was taken."""
        with self._guard:
            offset = _offset(name)
            count = self._mine().get(offset, 0)
            if count < 0 or (count == 0 and not self._lock(fcntl.LOCK_SH | fcntl.LOCK_NB, offset)):
                return False
            self._held[offset] = count + 1
            return True

    def is_shared(self, name: bytes) -> bool:
        """Tell whether anybody shares the lock, in this process or another. Takes nothing: nobody is in the way of who
        asks, or finds the lock taken because of it."""
        with self._guard:
            offset = _offset(name)
            count = self._mine().get(offset, 0)
            return count > 0 or (count == 0 and self._kind(offset) == fcntl.F_RDLCK)

    def release(self, name: bytes) -> None:
        """Let go, once for each time it was taken."""
        with self._guard:
            offset = _offset(name)
            count = self._mine().pop(offset, 0)
            if count > 1:
                self._held[offset] = count - 1
            elif count:
                self._lock(fcntl.LOCK_UN, offset)

    def renew(self) -> None:
        """Begin with a new file, where the old one was deleted or replaced: whoever comes new would not see
        its locks. Nothing is held then, and `generation` has grown.
        """
        with self._guard:
            if self._descriptor < 0 or self.path is None:
                return
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(self._descriptor), os.stat(self.path)):
                    return
            self._close()  # or each time that the folder is deleted costs this process a descriptor, for good
            self._descriptor, self._held = -1, {}
            self.generation += 1

    def _mine(self) -> dict[int, int]:
        """What this process holds: nothing, after a fork, though it has the descriptor."""
        if self._pid != os.getpid():
            self._pid, self._held = os.getpid(), {}
        if self._descriptor < 0 and self.path is not None:
            with contextlib.suppress(OSError):
                self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
                close = self._close = weakref.finalize(self, os.close, self._descriptor)
                close.atexit = False
        return self._held

    def _lock(self, how: int, offset: int) -> bool:
        try:
            fcntl.lockf(self._descriptor, how, 1, offset)
            return True
        except (OSError, ValueError) as error:
            return getattr(error, "errno", None) not in _BUSY

    def _kind(self, offset: int) -> int:
        """Which lock another process has there, if any."""
        kind, place = (fcntl.F_WRLCK, os.SEEK_SET), (offset, 1, 0)
        question = (*place, *kind) if _ON_MACOS else (*kind, *place)
        try:
            answer = fcntl.fcntl(self._descriptor, fcntl.F_GETLK, _QUESTION.pack(*question))
        except (OSError, ValueError):
            return fcntl.F_UNLCK
        return int(_QUESTION.unpack_from(answer)[3 if _ON_MACOS else 0])


@contextlib.contextmanager
def waiting(path: Path) -> Iterator[None]:
    """Hold the lock of this file, which ends with its process and which a forked child does not inherit; or none, where
    the folder is gone: then each does for itself what one could have done for all."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        yield
        return
    try:
        _wait_for(descriptor)
        yield
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int) -> None:
    """Wait for the lock; in a worker, only for as long as there is a loader that waits for it."""
    while is_worker():
        with contextlib.suppress(BlockingIOError, PermissionError):
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        insist_on_a_loader()
        time.sleep(_SECONDS_BETWEEN_TRIES)
    fcntl.lockf(descriptor, fcntl.LOCK_EX)


def _offset(name: bytes) -> int:
    return int.from_bytes(blake2b(name, digest_size=8).digest(), "little") >> 2


_making = threading.Lock()
_all: weakref.WeakSet[Locks] = weakref.WeakSet()
_known: weakref.WeakValueDictionary[str, Locks] = weakref.WeakValueDictionary()


def _unlock_in_child() -> None:
    global _making
    _making = threading.Lock()
    for locks in list(_all):
        locks._guard = threading.RLock()


os.register_at_fork(after_in_child=_unlock_in_child)
