"""What a cached value looks like: who it is, what it should be, and then its bytes."""

import io
import struct
from hashlib import blake2b
from typing import NamedTuple, Protocol

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
_CHECKSUM = struct.Struct("<Q")


class Readable(Protocol):
    """A file to read from."""

    def read(self, size: int, /) -> bytes: ...


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
    return read_entry(key, io.BytesIO(value), len(value))


def read_entry(key: bytes, file: Readable, size: int, descriptor: int | None = None) -> Entry | None:
    """As `unpack`, from a file of so many bytes. The body is read by itself: none is held twice.

    One above 16 MiB is not read into memory if the `descriptor` of the file is given: it is checked, and stays there.
    """
    start = file.read(_HEADER.size)
    if len(start) < _HEADER.size:
        return None
    magic, text_length, length, name, checksum = _HEADER.unpack(start)
    if magic != _MAGIC or name != key or size != _HEADER.size + text_length + _CHECKSUM.size + length:
        return None
    text = file.read(text_length)
    if file.read(_CHECKSUM.size) != _CHECKSUM.pack(xxhash.xxh3_64_intdigest(start + text)):
        return None
    if descriptor is not None and length > LARGE:
        stored = StoredBody(descriptor, size - length, length)
        body: bytes | StoredBody = stored
        found = digest_of(stored)
    else:
        body = file.read(length)
        found = xxhash.xxh3_64_intdigest(body)
    if len(body) != length or found != checksum:
        return None
    try:
        return Entry(decode(text), body)
    except UnicodeDecodeError:
        return None
