"""One listing per run: how pages become a table, who lists, and how workers come by the table without listing."""

import contextlib
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any
from uuid import uuid4

from asyncds.errors import CacheError, ConfigurationError, EmptyDataset, TransferFailed
from asyncds.locks import waiting
from asyncds.manifest import KeyFilter, Label, Manifest, ManifestBuilder, ObjectInfo, predicate
from asyncds.ranks import Meeting, Way

__all__ = ["Labeller", "Rows", "Table", "labels_of", "list_prefix", "nothing", "saved_at"]

Labeller = Callable[[str], Label]
_KEPT_S = 7 * 86400


class Table:
    """The manifest of one dataset: listed, filtered, cut and labelled once, then the same for every process of the run.

    The first who needs it makes it, while holding a lock that the kernel releases when that process dies, and leaves it
    in a file of this run; whoever was forked, or unpickled, before or after, maps that file. A complete listing is
    also saved under its prefix, and serves later runs while it is younger than `max_age` seconds. Of the ranks of a job
    one lists (see `ranks`), and each has a file of its own.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        make: Callable[[int | None, KeyFilter | None], Manifest] | None,
        *,
        manifest: Manifest | None = None,
        max_age: float = 0,
        match: KeyFilter | None = None,
        limit: int | None = None,
        label: Labeller | None = None,
    ) -> None:
        self._folder = folder
        self._name = name
        self._make = make
        self._manifest = manifest
        self._max_age = max_age
        self._match = match
        self._limit = limit
        self._label = label
        self.path = folder / f"run-{uuid4().hex}.manifest"
        # Runs list one after the other only where the later ones can use what the first has listed.
        self.lock = (self._saved if max_age > 0 else self.path).with_suffix(".lock")
        self.owner = os.getpid()
        name_of_match = getattr(match, "__qualname__", type(match).__name__) if callable(match) else match
        self._meeting = Meeting(folder, name, limit, name_of_match) if manifest is None else None

    def __getstate__(self) -> dict[str, Any]:
        """Pickle as the place of this run's file: listing happens here, before workers start."""
        self.publish()
        gone = dict.fromkeys(("_manifest", "_make", "_match", "_label", "_meeting"))
        return self.__dict__ | gone | {"owner": 0}

    def publish(self) -> None:
        """Make sure that other processes of the run find the table."""
        manifest = self.manifest()
        if not self.path.exists():
            try:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # the cache may have been deleted meanwhile
                manifest.save(self.path)
            except OSError as error:
                raise CacheError(f"{self.path}: the table cannot be saved for workers ({error.strerror})") from None

    def manifest(self) -> Manifest:
        """Return the table, listing if nobody has. Raises `EmptyDataset` if nothing is left to train from."""
        if self._manifest is not None:
            return self._manifest
        with _making:
            if self._manifest is None:
                self._manifest = self._shared() or self._made()
            return self._manifest

    @property
    def known(self) -> bool:
        """Whether this process has the table already."""
        return self._manifest is not None

    def _shared(self) -> Manifest | None:
        if not self.path.exists():
            return None
        with contextlib.suppress(OSError):
            os.utime(self.path)
        try:
            return Manifest.open(self.path, verify=False)
        except ConfigurationError:
            if self.path.exists():
                raise
            return None  # the cache has been deleted meanwhile

    def _made(self) -> Manifest:
        with waiting(self.lock):
            manifest = self._shared()
            if manifest is None:
                manifest = self._chosen()
                with contextlib.suppress(OSError):
                    manifest.save(self.path)
                    _prune(self._folder.parent)
        return manifest

    def _chosen(self) -> Manifest:
        """List, take the saved listing, or come by that of another rank; then filter, cut and label."""
        way = self._way()
        if way is None:
            manifest = self._listed(self._limit, self._match)
        elif callable(self._match):  # which may differ from another's of the same name: all that is shared is the keys
            manifest = way(partial(self._listed, None, None)).filter(self._match)
        else:
            manifest = way(partial(self._listed, self._limit, self._match))
        if not len(manifest):
            raise EmptyDataset(nothing(manifest))
        return manifest if self._label is None else manifest.with_labels(labels_of(manifest, self._label))

    def _way(self) -> Way | None:
        """How to share with other ranks; None for a worker, and where that would mean to list more than is needed."""
        if self._meeting is None or os.getpid() != self.owner or (callable(self._match) and self._limit is not None):
            return None
        return self._meeting.way()

    def _listed(self, limit: int | None, match: KeyFilter | None) -> Manifest:
        """What the store has now, or had when a listing that is young enough was saved."""
        if self._make is None:
            gone = "the process that pickled this dataset is gone, or its cache was deleted"  # a listing now may differ
            raise ConfigurationError(f"{self._name}: {gone}: make a new one")
        manifest = self._recent()
        if manifest is not None:
            return manifest.filter(match, limit)
        manifest = self._make(limit, match)
        if limit is None and match is None:
            with contextlib.suppress(OSError):
                manifest.save(self._saved)
        return manifest

    @property
    def _saved(self) -> Path:
        return saved_at(self._folder, self._name)

    def _recent(self) -> Manifest | None:
        try:
            age = time.time() - self._saved.stat().st_mtime
            return Manifest.open(self._saved) if 0 <= age < self._max_age else None
        except (OSError, ConfigurationError):
            return None


# Threads wait for each other here, processes for the lock of the file. One for all tables: a lock of each would have to
# be left out of pickles, and a child that was forked while a thread listed must not wait for that thread.
_making = threading.RLock()


def _unlock_in_child() -> None:
    global _making
    _making = threading.RLock()


os.register_at_fork(after_in_child=_unlock_in_child)


def saved_at(folder: Path, name: str) -> Path:
    """Where the last complete listing of a dataset is saved."""
    return folder / f"{blake2b(name.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()}.manifest"


def labels_of(manifest: Manifest, label: Labeller) -> Iterator[Label]:
    """The label of each object; an error of the callable names the key that it stumbled over."""
    for info in manifest:
        try:
            yield label(info.key)
        except Exception as error:
            error.add_note(f"while labelling {info.uri}")
            raise


def nothing(manifest: Manifest) -> str:
    """Why there is nothing to train from."""
    left_out = manifest.left_out
    if left_out.get("filtered"):
        return f"{manifest.source}: none of {left_out['filtered']:,} keys fits the filter; correct match"
    markers = " but folder markers" if left_out.get("markers") else ""
    where = f"{manifest.source} at {manifest.endpoint}"
    return f"{where}: there is nothing{markers} under this prefix; check bucket, prefix and endpoint"


def _prune(folder: Path) -> None:
    """Delete what runs left that were killed, a week later."""
    patterns = ("manifests/run-*", "manifests/job-*", "manifests/.*", "stats/*")
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _KEPT_S:
                path.unlink()


class Rows:
    """What a listing becomes: rows as they come, and counts of the keys that are none.

    Keys that end in `/` mark folders and hold no data; they and those that `match` leaves out are counted.
    """

    def __init__(self, bucket: str, prefix: str, match: KeyFilter | None = None, limit: int | None = None) -> None:
        self._prefix = prefix
        self._source = f"s3://{bucket}/{prefix}"
        self._fits = predicate(match)
        self._limit = limit
        self._builder = ManifestBuilder(bucket)
        self._left_out = {"markers": 0, "filtered": 0}
        self._ordered = True
        self._previous: ObjectInfo | None = None

    @property
    def full(self) -> bool:
        return len(self._builder) == self._limit

    def add(self, page: Sequence[ObjectInfo]) -> None:
        """Take a page. Raises `TransferFailed` where a key lies elsewhere."""
        fits, markers, filtered, kept = self._fits, 0, 0, list[ObjectInfo]()
        room = None if self._limit is None else self._limit - len(self._builder)
        for info in page:
            key = info.key
            if not key.startswith(self._prefix):
                raise TransferFailed(f"listing {self._source}: the store returned {key!r}, which is elsewhere")
            if key.endswith("/"):
                markers += 1
            elif not fits(key):
                filtered += 1
            elif info != self._previous and len(kept) != room:
                kept.append(info)
                self._ordered = self._ordered and (self._previous is None or key > self._previous.key)
                self._previous = info
        self._builder.extend(kept)
        self._left_out["markers"] += markers
        self._left_out["filtered"] += filtered

    def table(self, endpoint: str) -> Manifest:
        """The rows in UTF-8 order of keys, which is that of texts in Python."""
        manifest = self._builder.build(endpoint=endpoint, source=self._source, left_out=self._left_out)
        return manifest if self._ordered else _in_order(manifest)


async def list_prefix(
    pages: AsyncGenerator[Sequence[ObjectInfo], None],
    *,
    endpoint: str,
    bucket: str,
    prefix: str,
    match: KeyFilter | None = None,
    limit: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Manifest:
    """Read the pages of a listing into a table in UTF-8 order of keys, complete or not at all.

    What is no row is counted; see `Rows`. With `limit`, listing ends as soon as so many fit. `progress` is called after
    each page with its number of keys. Raises `TransferFailed` where the listing contradicts itself.
    """
    rows = Rows(bucket, prefix, match, limit)
    async with contextlib.aclosing(pages):
        async for page in pages:
            rows.add(page)
            if progress is not None:
                progress(len(page))
            if rows.full:
                break
    return rows.table(endpoint)


def _in_order(manifest: Manifest) -> Manifest:
    """The same rows sorted; a row that pages repeated counts once, if they agree about it."""
    builder, previous = ManifestBuilder(), None
    for info in sorted(manifest, key=lambda info: info.key):
        if previous is not None and info.key == previous.key:
            if info != previous:
                raise TransferFailed(f"listing {manifest.source}: {info.key!r} is there twice, with different ETags")
            continue
        builder.add(info)
        previous = info
    return builder.build(endpoint=manifest.endpoint, source=manifest.source, left_out=manifest.left_out)
