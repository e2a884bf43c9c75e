"""Objects that are too large for memory: written into their file piece by piece, and read from it as a file."""

import io
import os
import weakref
from typing import Any

import xxhash

__all__ = ["LARGE", "PART", "StoredBody", "digest_of"]

LARGE = 16 << 20
"""Bytes above which an object is fetched in parts and never held in memory whole."""
PART = 8 << 20
_CHUNK = 1 << 20


class StoredBody:
    """The bytes of a large object, in a file that stays readable while this lives, whatever becomes of its name.

    `len()` is their number; `open()` returns a buffered binary file, each with a position of its own. Usable from any
    thread, and after a fork.
    """

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor = os.dup(descriptor)
        self._start = start
        self._length = length
        weakref.finalize(self, os.close, self._descriptor).atexit = False

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"<StoredBody of {self._length:,} bytes>"

    def open(self) -> io.BufferedReader:
        """Return a file of the body."""
        return io.BufferedReader(_Window(self), _CHUNK >> 2)

    def read_at(self, position: int, buffer: Any) -> int:
        """Fill the buffer from this position on as far as there are bytes; return how many."""
        view = memoryview(buffer).cast("B")[: max(0, self._length - position)]
        return os.preadv(self._descriptor, [view], self._start + position) if view else 0


class _Window(io.RawIOBase):
    """A file within a file."""

    def __init__(self, body: StoredBody) -> None:
        self._body = body
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        count = self._body.read_at(self._position, buffer)
        self._position += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._body)}[whence]
        if base + offset < 0:
            raise ValueError(f"negative seek position {base + offset}")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position


def digest_of(body: StoredBody) -> int:
    """XXH3 (64 bits) of a body, read piece by piece."""
    digest, buffer, position = xxhash.xxh3_64(), memoryview(bytearray(_CHUNK)), 0
    while count := body.read_at(position, buffer):
        digest.update(buffer[:count])
        position += count
    return digest.intdigest() if position == len(body) else -1
