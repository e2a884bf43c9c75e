"""Tables of objects in Parquet files, by way of Arrow's columns. Needs pyarrow, the extra `parquet`."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from asyncds.columns import Columns, in_chunks
from asyncds.errors import ConfigurationError
from asyncds.manifest import Manifest, together, version_id

__all__ = ["read_parquet", "write_parquet"]

_NAME = b"asyncds"
_VERSION_BYTES = 16
_ROWS = 1 << 17
_HEX = np.array([f"{number:02x}".encode() for number in range(256)], "S2")
_URI = r"^s3://(?P<bucket>[^/]+)/(?P<key>(?s:.+))$"


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError:
        raise ConfigurationError("Parquet needs pyarrow: pip install 'asyncds[parquet]'") from None
    return pyarrow


@contextmanager
def _explained(name: str, done: str) -> Iterator[Any]:
    arrow = _arrow()
    try:
        yield arrow
    except (OSError, arrow.ArrowException) as error:
        raise ConfigurationError(
            f"{name}: cannot be {done} as Parquet ({' '.join(str(error).split())[:200]})"
        ) from None


# reading


def read_parquet(
    place: str | os.PathLike[str] | IO[bytes],
    name: str,
    *,
    root: str | None = None,
    key: str = "key",
    label: str | None = None,
    etag: str = "etag",
    bucket: str | None = None,
) -> Manifest:
    """The table in a Parquet file, of which a message speaks as `name`; see `Manifest.from_parquet`."""
    with _explained(name, "read") as arrow, arrow.parquet.ParquetFile(place) as file:
        names, origin = set(file.schema_arrow.names), _origin(file.schema_arrow.metadata)
        wanted = [column for column in (key, label) if column is not None and column not in names]
        if wanted:
            have = ", ".join(file.schema_arrow.names)
            raise ConfigurationError(f"{name}: there is no column {wanted[0]!r}; it has {have}")
        columns = {"key": key, "size": "size", "etag": etag, "bucket": "bucket", "label": label or "label"}
        columns |= {"latest": "is_latest", "deleted": "is_delete_marker"}
        columns = {part: column for part, column in columns.items() if column in names}
        tables = []
        for batch in file.iter_batches(_ROWS, columns=[*dict.fromkeys(columns.values())]):
            parts = {part: batch.column(column) for part, column in columns.items()}
            tables.append(_table(arrow, _current(arrow, parts), name, root, bucket, origin))
    header = {"endpoint": "", "source": name, "buckets": [], "left_out": {}} | origin
    return together([*tables, Manifest(header, _empty())])


def _origin(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    """What `write_parquet` noted about the table, if it was that."""
    try:
        found = json.loads((metadata or {}).get(_NAME, b"{}"))
        kept = {name: found[name] for name in ("endpoint", "source") if isinstance(found.get(name), str)}
        classes = found.get("classes")
    except (ValueError, AttributeError):
        return {}
    is_texts = isinstance(classes, list) and all(isinstance(text, str) for text in classes)
    return kept | ({"classes": sorted(set(classes))} if is_texts else {})


def _current(arrow: Any, parts: dict[str, Any]) -> dict[str, Any]:
    """The rows that are objects: an inventory of a bucket with versions has old ones, and marks of deletion."""
    keep = np.ones(len(parts["key"]), np.bool_)
    for part, wanted in (("latest", True), ("deleted", False)):
        if part in parts and parts[part].type == arrow.bool_():
            keep &= parts[part].fill_null(wanted).to_numpy(zero_copy_only=False) == wanted
    return parts if keep.all() else {part: column.filter(arrow.array(keep)) for part, column in parts.items()}


def _table(
    arrow: Any, parts: dict[str, Any], name: str, root: str | None, bucket: str | None, origin: dict[str, Any]
) -> Manifest:
    """A table of some rows."""
    pc = arrow.compute
    keys = pc.cast(parts["key"], arrow.large_string())
    if keys.null_count:
        raise ConfigurationError(f"{name}: a row has no key")
    if "bucket" in parts:
        buckets = pc.cast(parts["bucket"], arrow.string())
    elif bucket is not None:
        buckets = arrow.array([bucket] * len(keys))
    else:
        below = "" if root is None else root.rstrip("/") + "/"
        start, nothing = (arrow.scalar(text, arrow.large_string()) for text in (below, ""))
        uris = pc.if_else(pc.starts_with(keys, "s3://"), keys, pc.binary_join_element_wise(start, keys, nothing))
        found = pc.extract_regex(uris, _URI)
        if found.null_count:
            odd = uris.filter(found.is_null())[0].as_py()
            raise ConfigurationError(f"{name}: {odd!r} is no URI of an object: say root='s3://bucket/'")
        buckets, keys = found.field("bucket"), found.field("key")
    ids, names = _numbered(arrow, buckets, name, "bucket")
    columns = _empty() | _texts(arrow, keys) | _versions(arrow, parts.get("etag"), len(keys))
    sizes = parts["size"].cast(arrow.int64()).fill_null(-1) if "size" in parts else arrow.array([-1] * len(keys))
    columns["sizes"] = sizes.to_numpy(zero_copy_only=False)
    if len(names) > 1:
        columns["bucket_ids"] = ids.astype("<u2")
    header = {"endpoint": "", "source": name, "buckets": names, "left_out": {}} | origin
    if "label" in parts:
        columns["labels"], header["classes"] = _labels(arrow, parts["label"], name, origin.get("classes"))
    return Manifest(header, columns)


def _labels(arrow: Any, column: Any, name: str, classes: list[str] | None) -> tuple[NDArray[Any], list[str] | None]:
    if column.null_count:
        raise ConfigurationError(f"{name}: a row has no label: give labels to all, or name a column that has them")
    kind = column.type
    if arrow.types.is_dictionary(kind) or arrow.types.is_string(kind) or arrow.types.is_large_string(kind):
        ids, names = _numbered(arrow, column, name, "label")
        classes = sorted({*(classes or ()), *names})
        return np.array([classes.index(text) for text in names], "<i8")[ids], classes
    if not (arrow.types.is_integer(kind) or arrow.types.is_floating(kind) or arrow.types.is_boolean(kind)):
        raise ConfigurationError(f"{name}: labels are of type {kind}: they must be texts or numbers")
    wide = arrow.float64() if arrow.types.is_floating(kind) else arrow.int64()
    return column.cast(wide).to_numpy(zero_copy_only=False), None


def _numbered(arrow: Any, column: Any, name: str, what: str) -> tuple[NDArray[np.int64], list[str]]:
    """The different texts of a column, in the order in which they come, and which of them each row has."""
    if column.null_count:
        raise ConfigurationError(f"{name}: a row has no {what}")
    found = arrow.compute.cast(column, arrow.string()).dictionary_encode()
    return found.indices.to_numpy(zero_copy_only=False).astype(np.int64), found.dictionary.to_pylist()


def _texts(arrow: Any, column: Any) -> Columns:
    """The bytes of all texts in a row, and their ends."""
    array = arrow.compute.cast(column, arrow.large_binary())
    _, offsets, data = array.buffers()
    ends = np.frombuffer(offsets, "<i8")[array.offset : array.offset + len(array) + 1]
    kept = np.frombuffer(data or b"", np.uint8)[ends[0] : ends[-1]] if len(array) else np.empty(0, np.uint8)
    return {"keys": kept, "ends": (ends - ends[0]).astype("<u8") if len(array) else np.zeros(1, "<u8")}


def _versions(arrow: Any, column: Any, count: int) -> Columns:
    """What `ManifestBuilder` makes of ETags."""
    if column is None:
        return {"versions": np.zeros(count * _VERSION_BYTES, np.uint8)}
    pc = arrow.compute
    etags = pc.replace_substring_regex(pc.cast(column, arrow.large_string()), "^W/", "")
    etags = pc.utf8_trim(etags, '"')
    plain = pc.fill_null(pc.match_substring_regex(etags, "^[0-9a-f]{32}$"), False)
    plain = pc.and_(plain, pc.fill_null(pc.not_equal(etags, "0" * 32), False)).to_numpy(zero_copy_only=False)
    versions = np.zeros((count, _VERSION_BYTES), np.uint8)
    digits = _texts(arrow, etags.filter(arrow.array(plain)))["keys"]
    versions[plain] = np.frombuffer(bytes.fromhex(digits.tobytes().decode()), np.uint8).reshape(-1, _VERSION_BYTES)
    empty = pc.fill_null(pc.equal(etags, ""), True).to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(~plain & ~empty)
    others = etags.take(arrow.array(rows))
    for row, etag in zip(rows.tolist(), others.to_pylist(), strict=True):
        versions[row] = np.frombuffer(version_id(etag), np.uint8)
    texts = _texts(arrow, others)
    found = {"other_rows": rows.astype("<u8"), "others": texts["keys"], "other_ends": texts["ends"]}
    return {"versions": versions.reshape(-1)} | found


def _empty() -> Columns:
    ends = {name: np.zeros(1, "<u8") for name in ("ends", "other_ends")}
    bytes_ = {name: np.empty(0, np.uint8) for name in ("keys", "versions", "others")}
    return {"keys": bytes_["keys"], "ends": ends["ends"], "sizes": np.empty(0, "<i8"), **bytes_, **ends} | {
        "other_rows": np.empty(0, "<u8")
    }


# writing


def write_parquet(manifest: Manifest, path: str | os.PathLike[str]) -> None:
    """Write columns `bucket`, `key`, `size`, `etag`, and `label`, where there are labels; whole or not at all."""
    place = Path(path)
    with _explained(str(place), "written") as arrow, tempfile.TemporaryDirectory(dir=place.parent) as folder:
        whole = Path(folder, place.name)
        origin = {"endpoint": manifest.endpoint, "source": manifest.source, "classes": manifest.classes}
        metadata = {_NAME: json.dumps(origin).encode()}
        writer = None
        try:
            for chunk in in_chunks(len(manifest) or 1):
                batch = _batch(arrow, manifest, slice(chunk.start, min(chunk.stop, len(manifest))))
                writer = writer or arrow.parquet.ParquetWriter(whole, batch.schema.with_metadata(metadata))
                writer.write_batch(batch.replace_schema_metadata(metadata))
        finally:
            if writer is not None:
                writer.close()
        os.replace(whole, place)


def _batch(arrow: Any, manifest: Manifest, chunk: slice) -> Any:
    count, columns = chunk.stop - chunk.start, manifest._columns
    ends = columns["ends"][chunk.start : chunk.stop + 1].astype(np.int64)
    keys = columns["keys"][ends[0] : ends[-1]].tobytes()
    offsets = (ends - ends[0]).tobytes()
    key = arrow.LargeStringArray.from_buffers(count, arrow.py_buffer(offsets), arrow.py_buffer(keys))
    key.validate(full=True)
    ids = columns["bucket_ids"][chunk] if "bucket_ids" in columns else np.zeros(count, np.uint16)
    buckets = arrow.array(manifest._buckets, arrow.string())
    sizes = columns["sizes"][chunk]
    arrays = {
        "bucket": buckets.take(arrow.array(ids)) if len(buckets) else arrow.array([], arrow.string()),
        "key": key,
        "size": arrow.array(sizes, arrow.int64(), mask=sizes < 0),
        "etag": _etags(arrow, manifest, chunk),
    }
    if manifest.labels is not None:
        labels, classes = manifest.labels[chunk], manifest.classes
        texts = None if classes is None else arrow.array(classes, arrow.string())
        arrays["label"] = arrow.array(labels) if texts is None else texts.take(arrow.array(labels))
    return arrow.record_batch([*arrays.values()], names=[*arrays])


def _etags(arrow: Any, manifest: Manifest, chunk: slice) -> Any:
    columns, count = manifest._columns, chunk.stop - chunk.start
    versions = columns["versions"].reshape(-1, _VERSION_BYTES)[chunk]
    digits = _HEX[versions].view("S32").reshape(-1) if count else np.empty(0, "S32")
    etags = arrow.array(digits).cast(arrow.string())
    known = arrow.array(versions.any(axis=1))
    etags = arrow.compute.if_else(known, etags, arrow.scalar(None, arrow.string()))
    begin, stop = np.searchsorted(columns["other_rows"], [chunk.start, chunk.stop]).tolist()
    if begin == stop:
        return etags
    rows = columns["other_rows"][begin:stop].astype(np.int64)
    mask = np.zeros(count, np.bool_)
    mask[rows - chunk.start] = True
    others = [info.etag for info in manifest.rows(rows)]
    return arrow.compute.replace_with_mask(etags, arrow.array(mask), arrow.array(others, arrow.string()))
