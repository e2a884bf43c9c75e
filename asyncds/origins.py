"""Where a table of objects comes from, if not from a file of its own: a listing, URIs, a CSV file, an inventory."""

import csv
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

from asyncds.budget import Slots
from asyncds.errors import ConfigurationError, EmptyDataset
from asyncds.fanout import list_store
from asyncds.labels import labeller, read_csv
from asyncds.listing import Labeller, labels_of, nothing
from asyncds.manifest import (
    KeyFilter,
    Label,
    Manifest,
    ManifestBuilder,
    ObjectInfo,
    check_choice,
    normalise_etag,
    parse_uri,
    together,
)
from asyncds.parquet import read_parquet
from asyncds.portal import Portal
from asyncds.progress import progress_bar
from asyncds.recipe import StoreRecipe
from asyncds.retry import Retry
from asyncds.store import ObjectStore

__all__ = ["of_csv", "of_inventory", "of_prefix", "of_uris"]

_NEEDED = ("Bucket", "Key")


def of_prefix(
    uri: str,
    match: KeyFilter | None,
    limit: int | None,
    label: str | Labeller | None,
    progress: bool,
    options: dict[str, Any],
) -> Manifest:
    """See `Manifest.from_prefix`."""
    (bucket, prefix), of_key = parse_uri(uri), labeller(label)
    check_choice(match, limit)
    with _store(options) as (portal, store, _), progress_bar(f"listing {uri}", show=progress, unit="keys") as advance:
        manifest = portal.call(list_store(store, bucket, prefix, match=match, limit=limit, progress=advance))
    if not len(manifest):
        raise EmptyDataset(nothing(manifest))
    return manifest if of_key is None else manifest.with_labels(labels_of(manifest, of_key))


@contextmanager
def _store(options: dict[str, Any]) -> Iterator[tuple[Portal, ObjectStore, Retry]]:
    """A store for as long as the context is open, by the arguments that datasets take."""
    recipe = StoreRecipe.of(**options)
    settings = recipe.settings
    retry = Retry(settings.retries, settings.deadline, settings.first_contact)
    portal = Portal.enter()
    try:
        store = recipe.make(Slots.of(settings.concurrency).most, retry)
        try:
            yield portal, store, retry
        finally:
            if recipe.store is None:
                portal.call(store.aclose())  # type: ignore[attr-defined]
    finally:
        portal.leave()


def of_uris(uris: Iterable[str], labels: Iterable[Label] | None, label: str | Labeller | None) -> Manifest:
    """See `Manifest.from_uris`."""
    builder = ManifestBuilder()
    for uri in [uris] if isinstance(uris, str) else uris:
        bucket, key = parse_uri(uri)
        if not key:
            raise ConfigurationError(f"{uri!r} names a bucket, not an object: use from_prefix")
        builder.add(ObjectInfo(bucket, key))
    manifest, of_key = builder.build(endpoint="", source="objects"), labeller(label)
    if labels is not None and label is not None:
        raise ConfigurationError("both labels= and label= are given: give one of them")
    if of_key is not None:
        labels = labels_of(manifest, of_key)
    return manifest if labels is None else manifest.with_labels(labels)


def of_csv(path: str | os.PathLike[str], root: str | None, key: str | int, label: str | int | None) -> Manifest:
    """See `Manifest.from_csv`."""
    keys, labels = read_csv(path, key, label)
    builder, below = ManifestBuilder(), "" if root is None else root.rstrip("/") + "/"
    for name in keys:
        if root is None and not name.startswith("s3://"):
            raise ConfigurationError(f"{os.fspath(path)}: {name!r} is no S3 URI: say root='s3://bucket/'")
        builder.add(ObjectInfo(*parse_uri(name if name.startswith("s3://") else f"{below}{name}")))
    manifest = builder.build(endpoint="", source=os.fspath(path))
    return manifest if labels is None else manifest.with_labels(labels)


# S3 Inventory


def of_inventory(place: str | os.PathLike[str], label: str | Labeller | None, options: dict[str, Any]) -> Manifest:
    """See `Manifest.from_inventory`."""
    name, of_key = os.fspath(place), labeller(label)
    if name.startswith("s3://"):
        with _store(options) as (portal, store, retry):
            read = partial(_downloaded, portal, store, retry)
            manifest = _inventory(name, read(*parse_uri(name)), read)
    else:
        folder = Path(name).parent
        manifest = _inventory(name, _local(Path(name)), lambda _, key: _beside(folder, key))
    manifest = _without_markers(manifest)
    return manifest if of_key is None else manifest.with_labels(labels_of(manifest, of_key))


def _inventory(name: str, document: bytes, read: Callable[[str, str], bytes]) -> Manifest:
    """The table in the files of an inventory, in their order."""
    try:
        about = json.loads(document)
        bucket, kind = str(about["sourceBucket"]), str(about["fileFormat"])
        home = str(about["destinationBucket"]).rpartition(":")[2]
        columns = [column.strip() for column in str(about["fileSchema"]).split(",")]
        files = [(str(file["key"]), file.get("size"), file.get("MD5checksum")) for file in about["files"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{name}: no manifest.json of an S3 Inventory ({error!r})") from None
    if kind not in ("CSV", "Parquet"):
        raise ConfigurationError(f"{name}: an inventory as {kind}: configure it as CSV or Parquet")
    tables = [ManifestBuilder(bucket).build(endpoint="", source=name)]
    for key, size, md5 in files:
        data = read(home, key)
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if size not in (None, len(data)) or md5 not in (None, digest):
            raise ConfigurationError(f"{name}: {key!r} is not the file it names: cut short, or of another inventory")
        if kind == "CSV":
            tables.append(_csv_part(name, key, data, columns))
        else:
            tables.append(read_parquet(io.BytesIO(data), name, etag="e_tag", bucket=bucket))
    return together(tables)


def _csv_part(name: str, key: str, data: bytes, columns: list[str]) -> Manifest:
    missing = [column for column in _NEEDED if column not in columns]
    if missing:
        raise ConfigurationError(f"{name}: its files have no column {missing[0]!r}: configure the inventory anew")
    place = {column: number for number, column in enumerate(columns)}
    size, etag, latest, deleted = map(place.get, ("Size", "ETag", "IsLatest", "IsDeleteMarker"))
    builder = ManifestBuilder()
    try:
        with gzip.open(io.BytesIO(data), "rt", encoding="utf-8", newline="") as file:
            for row in csv.reader(file):
                if (latest is not None and row[latest] == "false") or (deleted is not None and row[deleted] == "true"):
                    continue
                number = int(row[size]) if size is not None and row[size] else None
                version = normalise_etag(row[etag]) if etag is not None else None
                builder.add(ObjectInfo(row[place["Bucket"]], unquote_plus(row[place["Key"]]), number, version))
    except (OSError, EOFError, zlib.error, csv.Error, ValueError, IndexError) as error:
        raise ConfigurationError(f"{name}: {key!r} is no such CSV file, or is cut short ({error})") from None
    return builder.build(endpoint="", source=name)


def _without_markers(manifest: Manifest) -> Manifest:
    kept = manifest.filter(exclude="*/")
    markers = kept.left_out.get("filtered", 0)
    return kept.counting({"markers": markers, "filtered": 0})


def _downloaded(portal: Portal, store: ObjectStore, retry: Retry, bucket: str, key: str) -> bytes:
    info = ObjectInfo(bucket, key)
    _, body = portal.call(retry(lambda _: store.get(info), info.uri))
    return body


def _local(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read ({error.strerror})") from None


def _beside(folder: Path, key: str) -> bytes:
    """The file of this key's last part, where an inventory that was copied to disk has it: nothing else of a key says
    where to look."""
    last = key.rpartition("/")[2]
    if last in ("", ".", "..") or "\0" in last:
        raise ConfigurationError(f"{folder}: the inventory names a file {key!r}")
    places = [folder / last, folder / "data" / last, folder.parent / "data" / last]
    for place in places:
        if place.is_file():
            return _local(place)
    raise ConfigurationError(f"{places[0]}: there is no such file, nor in data/ here or beside: copy it there")
