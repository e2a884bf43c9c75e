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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from hashlib import blake2b
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self, overload

import numpy as np
import xxhash
from numpy.typing import NDArray

from asyncds.changes import Changes, places
from asyncds.columns import Columns, hashes, in_chunks, joined, made_of, taken
from asyncds.errors import ConfigurationError

__all__ = [
    "Changes",
    "KeyFilter",
    "Label",
    "Manifest",
    "ManifestBuilder",
    "ObjectInfo",
    "normalise_etag",
    "parse_uri",
    "together",
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

    def extend(self, infos: Sequence[ObjectInfo]) -> None:
        """Append rows: a page of a listing at a time takes a third of the time."""
        text = "".join([info.etag or "" for info in infos])
        plain = all(info.etag is not None and len(info.etag) == 2 * _MD5_BYTES for info in infos)
        if not plain or text.strip("0123456789abcdef") or any(info.etag == "0" * 2 * _MD5_BYTES for info in infos):
            for info in infos:
                self.add(info)
            return
        keys = [encode(info.key) for info in infos]
        self._bucket_ids.extend([self._buckets.setdefault(info.bucket, len(self._buckets)) for info in infos])
        self._ends.extend(accumulate(map(len, keys[1:]), initial=len(self._keys) + len(keys[0])) if keys else ())
        self._keys += b"".join(keys)
        self._sizes.extend([-1 if info.size is None else info.size for info in infos])
        self._md5s += bytes.fromhex(text)

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

    # where tables come from; only here does this module know of those that stand on it

    @classmethod
    def from_prefix(
        cls,
        uri: str,
        *,
        match: KeyFilter | None = None,
        limit: int | None = None,
        label: str | Callable[[str], Label] | None = None,
        progress: bool = True,
        **options: Any,
    ) -> "Manifest":
        """List `s3://bucket/prefix` now, in many places at once, in UTF-8 order of keys.

        `match`, `limit`, `label`, and all that says where the store is and how to ask it, are those of
        `CachedS3MapDataset.from_prefix`. Folder markers (`dir/`) are no rows. `progress` shows a bar on a terminal.
        Raises `EmptyDataset`, and what the store raises.
        """
        from asyncds.origins import of_prefix

        return of_prefix(uri, match, limit, label, progress, options)

    @classmethod
    def from_uris(
        cls,
        uris: Iterable[str],
        labels: Iterable[Label] | None = None,
        *,
        label: str | Callable[[str], Label] | None = None,
    ) -> "Manifest":
        """Make a table of these objects, `s3://bucket/key`, in this order; sizes and ETags are unknown."""
        from asyncds.origins import of_uris

        return of_uris(uris, labels, label)

    @classmethod
    def from_csv(
        cls,
        path: str | os.PathLike[str],
        *,
        root: str | None = None,
        key: str | int = "key",
        label: str | int | None = "label",
    ) -> "Manifest":
        """Make a table of the keys and labels in a CSV file, as `CachedS3MapDataset.from_csv` does."""
        from asyncds.origins import of_csv

        return of_csv(path, root, key, label)

    @classmethod
    def from_parquet(
        cls, path: str | os.PathLike[str], *, root: str | None = None, key: str = "key", label: str | None = None
    ) -> "Manifest":
        """Make a table of a Parquet file: what `to_parquet` wrote, or another's. Needs the extra `parquet`.

        Columns `bucket`, `size`, `etag` and `label` (or the one named) count where they are there; without `bucket`,
        a key is an `s3://` URI, or looked for below `root`. Labels are texts or numbers.
        """
        from asyncds.parquet import read_parquet

        return read_parquet(path, os.fspath(path), root=root, key=key, label=label)

    @classmethod
    def from_inventory(
        cls, place: str | os.PathLike[str], *, label: str | Callable[[str], Label] | None = None, **options: Any
    ) -> "Manifest":
        """Make a table of an S3 Inventory, whose `manifest.json` is on disk or, as `s3://…`, in a bucket.

        In CSV, or in Parquet (extra `parquet`), in the order of its files; of versions, the latest. Files on disk are
        looked for beside it, and in `data/`; `options` say where the store is, as for `from_prefix`. Each is compared
        with the MD5 that the inventory names.
        """
        from asyncds.origins import of_inventory

        return of_inventory(place, label, options)

    # new tables from this one, which keep its labels and classes

    def filter(
        self, match: KeyFilter | None = None, limit: int | None = None, *, exclude: KeyFilter | None = None
    ) -> "Manifest":
        """Keep the rows whose key fits `match` and not `exclude`, at most the first `limit`, in their order.

        Both are globs (`*` also spans `/`) or predicates. Those passed over are counted in `left_out`.
        """
        check_choice(match, limit)
        check_choice(exclude, None)
        if match is None and exclude is None and (limit is None or limit >= len(self)):
            return self
        kept, count, passed = [np.empty(0, np.int64)], 0, 0
        wanted, unwanted = ([] if fit is None else [fit] for fit in (match, exclude))
        for chunk in in_chunks(len(self)):
            fits = self._chosen(wanted, unwanted, chunk)
            kept.append((np.flatnonzero(fits) + chunk.start)[: None if limit is None else limit - count])
            count += len(kept[-1])
            passed = chunk.stop
            if count == limit:
                passed = int(kept[-1][-1]) + 1
                break
        filtered = self.left_out.get("filtered", 0) + passed - count
        return self._taken(np.concatenate(kept), self.left_out | {"filtered": filtered})

    def fitting(self, match: Sequence[KeyFilter], exclude: Sequence[KeyFilter]) -> NDArray[np.int64]:
        """The positions of the rows whose key fits one of `match`, or any if there are none, and none of `exclude`."""
        chunks = in_chunks(len(self))
        found = [np.flatnonzero(self._chosen(match, exclude, chunk)) + chunk.start for chunk in chunks]
        return np.concatenate([np.empty(0, np.int64), *found])

    def shares(self, n: int) -> NDArray[np.uint64]:
        """Which of `n` shares each row belongs to, by a hash of its bucket and key: all tables agree about that.

        Shares are about equal in number.
        """
        return hashes(self._columns, self._buckets, 0) % np.uint64(n)

    def split(self, fractions: Sequence[float], seed: int = 0) -> list["Manifest"]:
        """Split at random into tables of these shares, which sum to 1: each row is in one of them, in its order here.

        The same seed splits the same table in the same way. Lengths are rounded down; the first tables get what is
        left, one row each.
        """
        try:
            shares = np.array(fractions, float)
        except (TypeError, ValueError):
            shares = np.zeros(0)
        if shares.ndim != 1 or not (shares >= 0).all() or abs(shares.sum() - 1) > 1e-6:
            raise ConfigurationError(f"fractions={fractions!r}: give shares from 0 to 1 that sum to 1")
        lengths = np.floor(shares * len(self) + 1e-6).astype(np.int64)
        lengths[: len(self) - lengths.sum()] += 1
        order = np.random.default_rng(seed).permutation(len(self))
        return [self._taken(np.sort(rows)) for rows in np.split(order, np.cumsum(lengths)[:-1])]

    def sample(self, n: int, seed: int = 0) -> "Manifest":
        """Choose `n` different rows at random, the same ones for the same seed, in their order here."""
        if not isinstance(n, int) or not 0 <= n <= len(self):
            raise ConfigurationError(f"sample({n!r}): must be a whole number from 0 to {len(self)}, the rows there are")
        rows = np.random.default_rng(seed).choice(len(self), n, replace=False, shuffle=False)
        return self._taken(np.sort(rows))

    def partition(self, i: int, n: int) -> "Manifest":
        """The `i`-th of `n` runs of rows, from 0, of equal length to within one; added in order they are this table."""
        if not isinstance(n, int) or not isinstance(i, int) or not 0 <= i < n:
            raise ConfigurationError(f"partition({i!r}, {n!r}): the first counts from 0 and is below the second")
        return self._taken(np.arange(len(self) * i // n, len(self) * (i + 1) // n))

    def __add__(self, other: object) -> "Manifest":
        """The rows of both, one after the other, with those that both have twice.

        Both are of one endpoint, or one names none; both have labels, or none has. Where texts stand for other numbers
        in the two, the sum numbers them anew, over the classes of both. Raises `ConfigurationError`.
        """
        return together([self, other]) if isinstance(other, Manifest) else NotImplemented

    def __radd__(self, other: object) -> "Manifest":
        return self if other == 0 else NotImplemented  # so that sum() works

    def changes(self, old: "Manifest") -> Changes:
        """What this table has that an older one of the same objects had not, by bucket and key.

        Changed is what has another ETag, or, where one of the two is unknown, another size. Labels do not count.
        """
        first, there, their_first = places(self._columns, self._buckets, old._columns, old._buckets)
        own = first == np.arange(len(self))
        common = np.flatnonzero(own & (there >= 0))
        changed = common[self._differs(common, old, there[common])]
        only = their_first == np.arange(len(old))
        only[there[common]] = False
        added, gone = np.flatnonzero(own & (there < 0)), np.flatnonzero(only)
        return Changes(self._taken(added), self._taken(changed), old._taken(gone))

    def _differs(self, rows: NDArray[np.int64], old: "Manifest", their_rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        pairs = ((self, rows), (old, their_rows))
        ours, theirs = (m._columns["versions"].reshape(-1, _MD5_BYTES)[r] for m, r in pairs)
        size, their_size = self.sizes[rows], old.sizes[their_rows]
        told = ours.any(axis=1) & theirs.any(axis=1)
        differs: NDArray[np.bool_] = told & (ours != theirs).any(axis=1)
        differs |= (size != their_size) & (size >= 0) & (their_size >= 0)
        return differs

    def _taken(self, rows: NDArray[np.int64], left_out: Mapping[str, int] | None = None) -> "Manifest":
        columns, buckets = taken(self._columns, rows), self._buckets
        if "bucket_ids" in columns:  # numbered in the order in which they come, as `ManifestBuilder` does
            ids, first, inverse = np.unique(columns["bucket_ids"], return_index=True, return_inverse=True)
            order = np.argsort(first)
            buckets = [self._buckets[number] for number in ids[order].tolist()]
            columns["bucket_ids"] = np.argsort(order).astype("<u2")[inverse]
            if len(buckets) < 2:
                del columns["bucket_ids"]
        return Manifest(self._header | {"buckets": buckets, "left_out": dict(left_out or {})}, columns)

    def _chosen(self, match: Sequence[KeyFilter], exclude: Sequence[KeyFilter], chunk: slice) -> NDArray[np.bool_]:
        fits = np.full(chunk.stop - chunk.start, not match)
        for wanted in match:
            fits |= self._fits(wanted, chunk)
        for unwanted in exclude:
            fits &= ~self._fits(unwanted, chunk)
        return fits

    def _fits(self, match: KeyFilter, chunk: slice) -> NDArray[np.bool_]:
        if isinstance(match, str) and not set("?[") & set(match):
            return made_of(self._columns, chunk, [encode(piece) for piece in match.split("*")])
        fits = predicate(match)
        found = (bool(fits(key)) for key in self._texts(chunk))
        return np.fromiter(found, np.bool_, chunk.stop - chunk.start)

    def _texts(self, chunk: slice) -> Iterator[str]:
        """The keys of these rows."""
        ends = self._columns["ends"][chunk.start : chunk.stop + 1].tolist()
        for start, stop in pairwise(ends):
            yield decode(bytes(self._keys[start:stop]))

    def counting(self, left_out: Mapping[str, int]) -> "Manifest":
        """The same rows, with other counts of what was left out."""
        return Manifest(self._header | {"left_out": dict(left_out)}, self._columns)

    def _joining(self, buckets: list[str], classes: list[str] | None) -> Columns:
        """The columns with buckets and labels numbered as in a larger table."""
        columns = dict(self._columns)
        if len(buckets) > 1:
            numbers = np.array([buckets.index(name) for name in self._buckets], "<u2")
            ids = columns.get("bucket_ids")
            columns["bucket_ids"] = numbers[np.zeros(len(self), np.int64) if ids is None else ids]
        if classes is not None and classes != self.classes:
            places = np.array([classes.index(name) for name in self.classes or ()], "<i8")
            columns["labels"] = places[columns["labels"]]
        return columns

    def with_labels(self, labels: Iterable[Label]) -> "Manifest":
        """Attach one label per row. Texts become positions in their sorted set, as in torchvision's `ImageFolder`."""
        if isinstance(labels, np.ndarray):
            labels = labels.tolist()  # at once; label by label takes ten times as long
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

    def to_parquet(self, path: str | os.PathLike[str]) -> Path:
        """Write columns `bucket`, `key`, `size`, `etag`, and `label` for other tools. Needs the extra `parquet`.

        Raises `ConfigurationError` where a key is no UTF-8, which Parquet's texts are; `save` keeps such.
        """
        from asyncds.parquet import write_parquet

        write_parquet(self, path)
        return Path(path)

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
            reason = getattr(error, "strerror", None) or error
            raise ConfigurationError(
                f"{path}: no manifest, or a damaged one ({reason}): list the prefix again"
            ) from None

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The table that `to_bytes` wrote, compared with its digest, without a copy."""
        return cls._read(np.frombuffer(data, np.uint8), verify=True)

    @classmethod
    def _read(cls, data: NDArray[np.uint8], verify: bool) -> Self:
        start = data[: len(_MAGIC) + 4].tobytes()
        if not start.startswith(_MAGIC):
            raise ValueError("it does not begin as one")
        length = struct.unpack("<I", start[len(_MAGIC) :])[0]
        body = json.loads(data[len(start) : len(start) + length].tobytes())
        if body["version"] != _VERSION:
            raise ConfigurationError(
                f"a manifest of format {body['version']}; this asyncds reads {_VERSION}: list the prefix again"
            )
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


def together(tables: Sequence[Manifest]) -> Manifest:
    """The rows of all tables, one after the other; see `Manifest.__add__`."""
    endpoints = [*dict.fromkeys(table.endpoint for table in tables if table.endpoint)]
    if len(endpoints) > 1:
        raise ConfigurationError(f"tables of {' and '.join(endpoints)} cannot be added: these are different stores")
    source = " + ".join(dict.fromkeys(table.source for table in tables))
    left_out = Counter[str]()
    for table in tables:
        left_out.update(table.left_out)
    tables = [table for table in tables if len(table)] or tables[:1]
    classes = _classes_of_all(tables)
    buckets = [*dict.fromkeys(name for table in tables for name in table._buckets)]
    header: dict[str, Any] = {"endpoint": "".join(endpoints), "source": source, "buckets": buckets}
    header["left_out"] = dict(left_out)
    if tables[0].labels is not None:
        header["classes"] = classes
    return Manifest(header, joined([table._joining(buckets, classes) for table in tables]))


def _classes_of_all(tables: Sequence[Manifest]) -> list[str] | None:
    if len({table.labels is None for table in tables}) > 1:
        raise ConfigurationError("only some of the tables have labels: give labels to all, or to none")
    classes = [table.classes for table in tables]
    texts = [names for names in classes if names is not None]
    if not texts:
        return None
    if len(texts) < len(classes):
        raise ConfigurationError("labels are texts in some of the tables and numbers in others: give all the same kind")
    same = all(names == texts[0] for names in texts)
    return texts[0] if same else sorted({name for names in texts for name in names})


def check_choice(match: KeyFilter | None, limit: int | None) -> None:
    """Raise `ConfigurationError` where these cannot choose among keys."""
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ConfigurationError(f"limit={limit!r}: must be a whole number, at least 1")
    if match is not None and not isinstance(match, str) and not callable(match):
        raise ConfigurationError(f"match={match!r}: must be a glob or a callable of the key")


def predicate(match: KeyFilter | None) -> Callable[[str], bool]:
    if match is None:
        return lambda key: True
    if isinstance(match, str):
        return lambda key: fnmatchcase(key, match)
    return match
