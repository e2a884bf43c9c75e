"""What a cached value looks like: who it is, what it should be, and then its bytes."""

import os
import struct
from hashlib import blake2b
from typing import NamedTuple

import xxhash

from asyncds.large import LARGE, StoredBody, digest_of
from asyncds.manifest import decode, encode, version_id

__all__ = [
    "FIRST_SEEN",
    "Entry",
    "NewEntry",
    "entry_key",
    "object_id",
    "pack_header",
    "pack_header_of",
    "read_entry",
    "unpack",
]

FIRST_SEEN = bytes(16)
"""The version of the row that holds no bytes, but the ETag under which an object was first seen."""

# magic and format version, length of the ETag, length of the body, key of the row, checksum of the body; after it the
# ETag, a checksum of all that came before, and the body. Integers are little-endian, checksums XXH3 with 64 bits.
_HEADER = struct.Struct("<4sIQ32sQ")
_MAGIC = b"ads\x01"
_TEXT_LENGTH = struct.Struct("<I")
_CHECKSUM = struct.Struct("<Q")
_PEEK = 512  # bytes in which the head of a value ends, as a rule


class Entry(NamedTuple):
    """What is cached of one object; a large one is still on disk."""

    etag: str
    body: bytes | StoredBody


class NewEntry(NamedTuple):
    """An object to store; `first_seen` also records its ETag as the one this object is known by."""

    object: bytes
    etag: str
    body: bytes
    first_seen: bool = False


def object_id(endpoint: str, bucket: str, key: str) -> bytes:
    """16 bytes that stand for an object: BLAKE2b, so that nobody can find two keys that share an entry."""
    name = f"{endpoint}\0{bucket}\0{key}"
    return blake2b(encode(name), digest_size=16, person=b"asyncds.object").digest()


def entry_key(object: bytes, etag: str) -> bytes:
    """The key of the row that holds this version of an object."""
    return object + version_id(etag)


def pack_header(key: bytes, etag: str, body: bytes) -> bytes:
    """What stands before the body of a value, in a row and in a file."""
    return pack_header_of(key, etag, len(body), xxhash.xxh3_64_intdigest(body))


def pack_header_of(key: bytes, etag: str, length: int, checksum: int) -> bytes:
    """What stands before a body of this length and XXH3."""
    text = encode(etag)
    start = _HEADER.pack(_MAGIC, len(text), length, key, checksum) + text
    return start + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(start))


def unpack(key: bytes, value: bytes) -> Entry | None:
    """The entry in a value, or None if it is not the one asked for, or not exactly as it was written."""
    head = _parse(key, value, len(value))
    if head is None:
        return None
    etag, start, checksum = head
    body = value[start:]
    return Entry(etag, body) if xxhash.xxh3_64_intdigest(body) == checksum else None


def read_entry(key: bytes, descriptor: int, size: int) -> Entry | None:
    """As `unpack`, from a file of so many bytes. The body is read by itself, so that it is never held twice.

    One above 16 MiB is not read into memory: it is checked, and stays in the file.
    """
    start = os.pread(descriptor, _PEEK, 0)
    if len(start) == _PEEK < (end := _body_begins(start)) <= size:
        start = os.pread(descriptor, end, 0)
    head = _parse(key, start, size)
    if head is None:
        return None
    etag, begin, checksum = head
    if size - begin > LARGE:
        stored = StoredBody(descriptor, begin, size - begin)
        return Entry(etag, stored) if digest_of(stored) == checksum else None
    body = os.pread(descriptor, size - begin, begin)
    # The checksum of what was cut off meanwhile is another one.
    return Entry(etag, body) if xxhash.xxh3_64_intdigest(body) == checksum else None


def _body_begins(start: bytes) -> int:
    return _HEADER.size + _TEXT_LENGTH.unpack_from(start, len(_MAGIC))[0] + _CHECKSUM.size  # type: ignore[no-any-return]


def _parse(key: bytes, start: bytes, size: int) -> tuple[str, int, int] | None:
    """The ETag, where the body begins, and its checksum, in a value of so many bytes of which these are the first."""
    if len(start) < _HEADER.size:
        return None
    magic, text_length, length, name, checksum = _HEADER.unpack_from(start)
    text_ends = _HEADER.size + text_length
    begin = text_ends + _CHECKSUM.size
    if magic != _MAGIC or name != key or size != begin + length or len(start) < begin:
        return None
    if _CHECKSUM.unpack_from(start, text_ends)[0] != xxhash.xxh3_64_intdigest(start[:text_ends]):
        return None
    try:
        return decode(start[_HEADER.size : text_ends]), begin, checksum
    except UnicodeDecodeError:
        return None
