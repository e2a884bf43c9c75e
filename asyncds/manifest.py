"""An immutable, compact table of objects: bucket, key, size, ETag, and a label where there is one.

In memory and on disk it is the same handful of flat arrays, 32 bytes per object beside its key, so that ten million
objects open by mapping a file, and all workers share its pages:

    | file                  | bytes                                                                          |
    |-----------------------|--------------------------------------------------------------------------------|
    | magic, header length  | `asyncdsM`, then a little-endian uint32                                        |
    | header                | JSON: format version, origin, counts, and each column's type, place and length |
    | columns               | little-endian arrays, each at a multiple of 64 bytes                           |
"""

import json
import os
import struct
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, Self, overload

import numpy as np
import xxhash
from numpy.typing import NDArray

from asyncds.errors import ConfigurationError

__all__ = [
    "KeyFilter",
    "Label",
    "Manifest",
    "ManifestBuilder",
    "ObjectInfo",
    "normalise_etag",
    "parse_uri",
    "version_id",
]

_MAGIC = b"asyncdsM"
_VERSION = 1
_ALIGNMENT = 64
_MD5_BYTES = 16
_TYPES = {"|u1", "<u2", "<u8", "<i8", "<f8"}

KeyFilter = str | Callable[[str], bool]
Label = int | float | str


class ObjectInfo(NamedTuple):
    """One object. `size` is in bytes, `etag` without quotes; both are None where no listing told them."""

    bucket: str
    key: str
    size: int | None = None
    etag: str | None = None

    @property
    def uri(self) -> str:
        """`s3://bucket/key` as it is, for people; a message shows it through `repr` where the key is odd."""
        text = f"s3://{self.bucket}/{self.key}"
        return text if text.isprintable() else repr(text)


def parse_uri(uri: str) -> tuple[str, str]:
    """Split `s3://bucket/key` into bucket and key (or prefix), neither decoded nor normalised."""
    text = os.fspath(uri) if isinstance(uri, os.PathLike) else uri
    bucket, _, key = text.removeprefix("s3://").partition("/") if isinstance(text, str) else ("", "", "")
    if not isinstance(text, str) or not text.startswith("s3://") or not bucket:
        raise ConfigurationError(f"{text!r} is no S3 URI: write s3://bucket/key")
    return bucket, key


def encode(text: str) -> bytes:
    """UTF-8, also of what a server sent that is no text."""
    return text.encode("utf-8", "surrogatepass")


def decode(data: bytes) -> str:
    """The inverse of `encode`."""
    return data.decode("utf-8", "surrogatepass")


def normalise_etag(etag: str | None) -> str | None:
    """The ETag without its quotes: servers and listings differ in them."""
    return etag.removeprefix("W/").strip('"') if etag else None


def version_id(etag: str | None) -> bytes:
    """16 bytes that stand for an ETag: the MD5 that most are, a hash of any other, zeros for an unknown one."""
    if etag is None:
        return bytes(_MD5_BYTES)
    if len(etag) == 2 * _MD5_BYTES and not etag.strip("0123456789abcdef") and etag.strip("0"):
        return bytes.fromhex(etag)
    return blake2b(encode(etag), digest_size=_MD5_BYTES, person=b"asyncds.etag").digest()


class ManifestBuilder:
    """Collects rows into columns as they stream in, at their final size in memory."""

    def __init__(self, bucket_of_all: str | None = None) -> None:
        self._buckets: dict[str, int] = {bucket_of_all: 0} if bucket_of_all else {}
        self._bucket_ids = array("H")
        self._keys = bytearray()
        self._ends = array("Q", [0])
        self._sizes = array("q")
        self._md5s = bytearray()
        self._other_rows = array("Q")
        self._others = bytearray()
        self._other_ends = array("Q", [0])

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, info: ObjectInfo) -> None:
        """Append one row."""
        self._bucket_ids.append(self._buckets.setdefault(info.bucket, len(self._buckets)))
        self._keys += encode(info.key)
        self._ends.append(len(self._keys))
        self._sizes.append(-1 if info.size is None else info.size)
        identity = version_id(info.etag)
        self._md5s += identity
        if info.etag is not None and identity.hex() != info.etag:
            self._other_rows.append(len(self._sizes) - 1)
            self._others += encode(info.etag)
            self._other_ends.append(len(self._others))

    def build(self, *, endpoint: str, source: str, left_out: Mapping[str, int] | None = None) -> "Manifest":
        """Return the table in the order in which rows came."""
        columns = {
            "keys": np.frombuffer(bytes(self._keys), np.uint8),
            "ends": np.array(self._ends, "<u8"),
            "sizes": np.array(self._sizes, "<i8"),
            "versions": np.frombuffer(bytes(self._md5s), np.uint8),
            "other_rows": np.array(self._other_rows, "<u8"),
            "others": np.frombuffer(bytes(self._others), np.uint8),
            "other_ends": np.array(self._other_ends, "<u8"),
        }
        if len(self._buckets) > 1:
            columns["bucket_ids"] = np.array(self._bucket_ids, "<u2")
        header = {"endpoint": endpoint, "source": source, "buckets": [*self._buckets], "left_out": dict(left_out or {})}
        return Manifest(header, columns)


class Manifest(Sequence[ObjectInfo]):
    """An immutable table of objects, made by listing, from URIs, or by opening a saved file.

    `labels` are numbers, one per object, or None; where they were texts, `classes` holds the texts, sorted, and a
    label is its text's position. Reading is safe from any thread. Pickling is left to whoever knows a file to pickle.
    """

    def __init__(self, header: dict[str, Any], columns: dict[str, NDArray[Any]]) -> None:
        self._header = header
        self._columns = columns
        self._buckets: list[str] = header["buckets"]
        self._keys = columns["keys"].data
        self._versions = columns["versions"].data

    # reading

    def __len__(self) -> int:
        return len(self._columns["sizes"])

    @overload
    def __getitem__(self, index: int) -> ObjectInfo: ...
    @overload
    def __getitem__(self, index: slice) -> list[ObjectInfo]: ...
    def __getitem__(self, index: int | slice) -> ObjectInfo | list[ObjectInfo]:
        if isinstance(index, slice):
            return self.rows(range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a manifest of {len(self)}")
        return self.rows([index % len(self)])[0]

    def __iter__(self) -> Iterator[ObjectInfo]:
        for start in range(0, len(self), 4096):
            yield from self.rows(range(start, min(start + 4096, len(self))))

    def rows(self, positions: Sequence[int] | NDArray[Any]) -> list[ObjectInfo]:
        """Return the objects at these positions, in their order; many at once cost about 2 µs each."""
        where = np.asarray(positions, np.int64)
        ends = self._columns["ends"]
        ids = self._columns["bucket_ids"][where].tolist() if "bucket_ids" in self._columns else [0] * len(where)
        spans = zip(ends[where].tolist(), ends[where + 1].tolist(), strict=True)
        keys = [decode(bytes(self._keys[start:stop])) for start, stop in spans]
        sizes = [None if size < 0 else size for size in self._columns["sizes"][where].tolist()]
        etags = self._etags(where)
        return [ObjectInfo(self._buckets[b], k, s, e) for b, k, s, e in zip(ids, keys, sizes, etags, strict=True)]

    def _etags(self, where: NDArray[np.int64]) -> list[str | None]:
        versions = [bytes(self._versions[_MD5_BYTES * i : _MD5_BYTES * (i + 1)]).hex() for i in where.tolist()]
        etags: list[str | None] = [None if version == "0" * 32 else version for version in versions]
        other_rows = self._columns["other_rows"]
        if len(other_rows):
            places = np.searchsorted(other_rows, where)
            for i, (place, row) in enumerate(zip(places.tolist(), where.tolist(), strict=True)):
                if place < len(other_rows) and other_rows[place] == row:
                    start, stop = self._columns["other_ends"][place : place + 2].tolist()
                    etags[i] = decode(self._columns["others"][start:stop].tobytes())
        return etags

    @property
    def endpoint(self) -> str:
        """The store's identity."""
        return str(self._header["endpoint"])

    @property
    def source(self) -> str:
        """Where the rows come from: a URI, or a description."""
        return str(self._header["source"])

    @property
    def left_out(self) -> dict[str, int]:
        """How many keys of the listing are not rows, by reason: `markers` (`dir/`), `filtered`."""
        return dict(self._header["left_out"])

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each object, -1 where unknown."""
        return self._columns["sizes"]

    @property
    def labels(self) -> NDArray[Any] | None:
        """One number per object, int64 or float64."""
        return self._columns.get("labels")

    @property
    def classes(self) -> list[str] | None:
        """The texts that labels stand for, sorted; None where labels are numbers of their own."""
        classes = self._header.get("classes")
        return None if classes is None else list(classes)

    @property
    def digest(self) -> str:
        """A hash of every row: equal digests mean the same objects in the same order with the same labels."""
        return self._hashed(self._header)

    @property
    def digest_of_rows(self) -> str:
        """As `digest`, but the same wherever the rows come from: another path of a CSV file, another listing."""
        return self._hashed({name: self._header.get(name) for name in ("buckets", "classes")})

    def _hashed(self, header: dict[str, Any]) -> str:
        state = xxhash.xxh3_128(json.dumps(header, sort_keys=True).encode())
        for name in sorted(self._columns):
            state.update(f"{name}{self._columns[name].dtype.str}{len(self._columns[name])}".encode())
            state.update(np.ascontiguousarray(self._columns[name]).data)
        return state.hexdigest()

    def __repr__(self) -> str:
        size = int(self.sizes[self.sizes > 0].sum())
        labels = "" if self.labels is None else f", labelled ({len(self.classes or ()) or 'numeric'})"
        left_out = "".join(f", {count:,} {reason} left out" for reason, count in self.left_out.items() if count)
        return f"<Manifest {self.source}: {len(self):,} objects, {size:,} bytes{labels}{left_out}>"

    # new tables from this one

    def select(self, match: KeyFilter | None = None, limit: int | None = None) -> "Manifest":
        """Keep the rows whose key fits a glob (`*` also spans `/`) or a predicate, at most the first `limit`."""
        if match is None and (limit is None or limit >= len(self)):
            return self
        fits = predicate(match)
        builder, places, filtered = ManifestBuilder(), array("q"), 0
        for place, info in enumerate(self):
            if len(builder) == limit:
                break
            if fits(info.key):
                builder.add(info)
                places.append(place)
            else:
                filtered += 1
        left_out = self.left_out | {"filtered": self.left_out.get("filtered", 0) + filtered}
        chosen = builder.build(endpoint=self.endpoint, source=self.source, left_out=left_out)
        if self.labels is None:
            return chosen
        column = self.labels[np.asarray(places)]
        return Manifest(chosen._header | {"classes": self.classes}, chosen._columns | {"labels": column})

    def with_labels(self, labels: Iterable[Label]) -> "Manifest":
        """Attach one label per row. Texts become positions in their sorted set, as in torchvision's `ImageFolder`."""
        values = [label.item() if isinstance(label, np.generic) else label for label in labels]
        if len(values) != len(self):
            raise ConfigurationError(f"{len(values)} labels for {len(self)} objects: give one label for each, in order")
        kinds = {type(value) for value in values}
        if kinds <= {str}:
            classes = sorted(set(values), key=str)
            number = {text: position for position, text in enumerate(classes)}
            column = np.array([number[value] for value in values], "<i8")
            return Manifest(self._header | {"classes": classes}, self._columns | {"labels": column})
        if not kinds <= {int, float, bool}:
            names = " and ".join(sorted(kind.__name__ for kind in kinds))
            raise ConfigurationError(f"labels are of type {names}: give only str, or only numbers (int, float)")
        try:
            column = np.array(values, "<f8" if float in kinds else "<i8")
        except OverflowError:
            raise ConfigurationError("a label is a number that 64 bits do not hold") from None
        return Manifest(self._header | {"classes": None}, self._columns | {"labels": column})

    # files

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table to a file, which appears whole or not at all, and return its path."""
        place = Path(path)
        with tempfile.NamedTemporaryFile(dir=place.parent, prefix=".manifest-", delete=False) as file:
            try:
                file.writelines(self._pieces())
                file.flush()
                os.replace(file.name, place)
            except BaseException:
                os.unlink(file.name)
                raise
        return place

    def to_bytes(self) -> bytes:
        """What `save` writes."""
        return b"".join(self._pieces())

    def _pieces(self) -> Iterator[bytes | memoryview]:
        """What is in the file, in its order."""
        layout = {name: {"type": column.dtype.str, "length": len(column)} for name, column in self._columns.items()}
        body = {"version": _VERSION, "digest": self.digest, "origin": self._header, "columns": layout}
        header = json.dumps(body).encode()
        yield _MAGIC + struct.pack("<I", len(header)) + header
        offset = len(_MAGIC) + 4 + len(header)
        for column in self._columns.values():
            padding = -offset % _ALIGNMENT
            yield bytes(padding)
            yield np.ascontiguousarray(column).data
            offset += padding + column.nbytes

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Self:
        """Map a saved file. `verify` reads it once and compares its digest.

        Raises `ConfigurationError` if it is no manifest, of another version, cut short or damaged.
        """
        try:
            return cls._read(np.memmap(path, np.uint8, "r").view(np.ndarray), verify)
        except FileNotFoundError:
            raise ConfigurationError(f"{path}: there is no such manifest") from None
        except ConfigurationError as error:
            raise ConfigurationError(f"{path}: {error}") from None
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise ConfigurationError(
                f"{path}: no manifest, or a damaged one ({error}): list the prefix again"
            ) from None

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The table that `to_bytes` wrote, compared with its digest, without a copy."""
        return cls._read(np.frombuffer(data, np.uint8), verify=True)

    @classmethod
    def _read(cls, data: NDArray[np.uint8], verify: bool) -> Self:
        start = data[: len(_MAGIC) + 4].tobytes()
        length = struct.unpack("<I", start[len(_MAGIC) :])[0] if start.startswith(_MAGIC) else 0
        body = json.loads(data[len(start) : len(start) + length].tobytes())
        if body["version"] != _VERSION:
            raise ConfigurationError(f"a manifest of format {body['version']}; this asyncds reads {_VERSION}")
        manifest = cls(body["origin"], _columns(data, body["columns"], len(start) + length))
        if verify and manifest.digest != body["digest"]:
            raise ValueError("the digest differs")
        return manifest


def _columns(data: NDArray[np.uint8], layout: dict[str, Any], offset: int) -> dict[str, NDArray[Any]]:
    columns: dict[str, NDArray[Any]] = {}
    for name, column in layout.items():
        if column["type"] not in _TYPES or column["length"] < 0:
            raise ValueError(f"column {name!r} is of an unknown type")
        kind, length = np.dtype(column["type"]), int(column["length"])
        offset += -offset % _ALIGNMENT
        if offset + length * kind.itemsize > len(data):
            raise ValueError("it is cut short")
        columns[name] = data[offset : offset + length * kind.itemsize].view(kind)
        offset += length * kind.itemsize
    return columns


def predicate(match: KeyFilter | None) -> Callable[[str], bool]:
    if match is None:
        return lambda key: True
    if isinstance(match, str):
        return lambda key: fnmatchcase(key, match)
    return match
