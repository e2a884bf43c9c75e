"""Objects whose bytes follow from their keys, so that every wrong byte shows without a stored reference."""

import functools
import hashlib

PER_PREFIX = 1000
_SMALLEST, _LARGEST = 100, 20_000
_AS_FILE = 40_000  # one object in twenty is so large that the cache keeps it in a file


def keys(prefix: str) -> list[str]:
    """The keys under a prefix, in the order of a listing."""
    return [f"{prefix}{number:04}" for number in range(PER_PREFIX)]


def size_of(key: str) -> int:
    """Bytes of an object: as many small ones as large ones, by their logarithm."""
    chance = int.from_bytes(hashlib.shake_128(b"size of " + key.encode()).digest(4)) / 2**32
    return _AS_FILE if chance < 0.05 else round(_SMALLEST * (_LARGEST / _SMALLEST) ** chance)


@functools.lru_cache(2 * PER_PREFIX)
def body(key: str) -> bytes:
    """The only bytes that are right."""
    return hashlib.shake_128(key.encode()).digest(size_of(key))
