"""A bounded directory of immutable objects, shared by threads and processes.

It knows bytes and paths, and nothing of S3 or asyncio. What it returns is what was stored, checked on every read; what
fails a check is a miss. diskcache keeps the index, the accounting and the transactions; this module decides what is
written and how it is read back.

A row's key is 16 bytes for the object (endpoint, bucket, key) and 16 for its version (ETag), so that all versions of
an object lie side by side; its tag is the dataset that brought it. Every value, in a row or a file, is a header and the
body (`asyncds.entry`). A row whose version is all zeros holds no bytes, but the ETag under which the object was first
seen: that is how objects that no listing described keep their version.
"""

import os
import stat
from collections.abc import Callable, Iterable, Sequence
from errno import EISDIR, ELOOP, EMFILE, ENFILE, ENOENT, ENOMEM, ENOTDIR, ENXIO
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from asyncds import audit
from asyncds.clearing import Cleared, Clearing, Held
from asyncds.entry import FIRST_SEEN, Entry, NewEntry, entry_key, pack_header, pack_header_of, read_entry, unpack
from asyncds.errors import CacheError
from asyncds.files import NewFile, Written
from asyncds.folder import BLOCK, Folder
from asyncds.index import FAULTS, FILE_NAME, Index
from asyncds.large import StoredBody, digest_of
from asyncds.sweep import Sweeper

__all__ = ["Cache", "LargeEntry", "largest_that_fits"]

INLINE_LIMIT = 32 << 10
_FREE_FLOOR = 0.05
_VARIABLES_PER_QUERY = 500
_READ_ONLY = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NO_FILE_OF_OURS = {ENOENT, ELOOP, EISDIR, ENOTDIR, ENXIO}
_PASSING = {EMFILE, ENFILE, ENOMEM}  # nothing is wrong with the file
_HEADERS, _ROW = 120, 200  # bytes that a value and its row take beside the body, about
_SLACK = 0.01  # of the limit, made free beyond what is needed, so that room is not made for each batch

_Row = tuple[bytes, str | None, bytes | None, str | None]  # key, file name or value, and tag


class Cache:
    """Entries on local disk. Safe to use from any thread and any process, also across `fork`.

    `limit` is in bytes (int), or a share of the disk (float, up to 1); by default 5 % of the disk stays free. What does
    not fit is not stored. Nothing that is in use is evicted: in an epoch every object is read once, and then no policy
    hits more than what simply stays. Room is made from older versions of objects, then from datasets (tags) that no
    living process holds, the one used least recently first. Once open, faults of the disk never raise: they are
    misses, or objects that are not kept, with one warning, and counted in `faults`; values that failed their check are
    counted in `damaged`. Processes that are given the same `notices`, the beginning of a file's name, warn once among
    them.

    A folder that cannot be written is read; with `read_only` any is, also another user's. Opening it takes away what
    killed processes left, in the background, unless `sweeping` is False.

    Raises `CacheError` if the directory cannot be used when it is opened.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        limit: int | float | None = None,
        notices: Path | None = None,
        read_only: bool = False,
        sweeping: bool = True,
    ) -> None:
        self.directory = Path(directory) / "asyncds"
        self.damaged = 0
        self.full = False
        self._refused = False
        self._limit = limit
        self._folder = Folder(self.directory, notices, read_only=read_only)
        self._objects = os.fspath(self._folder.objects)  # joining a Path takes as long as opening the file
        self._coming = set[LargeEntry]()  # what has room already, and is not yet in the accounting
        self._clearing = Clearing(self._folder)
        self._sweeper = Sweeper(self._folder)
        if sweeping and not self.read_only:
            self._sweeper.start_if_needed()

    def __repr__(self) -> str:
        try:
            return f"<Cache {self.directory}: {len(self):,} entries, {self.volume():,} bytes>"
        except FAULTS as error:
            return f"<Cache {self.directory}: {error}>"

    def __len__(self) -> int:
        """Number of rows in the index."""
        ((count,),) = self._folder.query("SELECT sum(CAST(value AS INTEGER)) FROM Settings WHERE key = 'count'")
        return int(count or 0)

    @property
    def read_only(self) -> bool:
        """Whether nothing is written: because that was asked for, or because nothing can be."""
        return self._folder.read_only

    @property
    def faults(self) -> int:
        """How often the disk or the index failed in this process."""
        return self._folder.faults

    @property
    def first_fault(self) -> str | None:
        """What failed first, and what to do about it."""
        return self._folder.first_fault

    def volume(self) -> int:
        """Bytes on disk: the pages of the index, and files rounded up to blocks of 4 KiB."""
        return self._folder.volume()

    def close(self) -> None:
        """Close the connections; the next use opens them again."""
        self._sweeper.stop()
        self._folder.close()

    # reading

    def get_many(self, keys: Sequence[bytes], tag: str | None = None) -> list[Entry | None]:
        """Return what is cached under these keys (`entry_key`), in their order, with one query; None is a miss.

        What another dataset brought, which nobody uses any more, belongs to the dataset `tag` from now on.
        """
        try:
            rows = self._select(keys)
            if tag is not None:
                self._adopt(rows, tag)
            return [self._checked(rows[key]) if key in rows else None for key in keys]
        except FAULTS as error:
            self._folder.failed("read", error)
            return [None] * len(keys)

    def _adopt(self, rows: dict[bytes, _Row], tag: str) -> None:
        foreign: dict[str, list[bytes]] = {}
        for key, _, _, owner in rows.values():
            if owner != tag:
                foreign.setdefault(str(owner), []).append(key)
        if not self.read_only:
            for owner, keys in foreign.items():
                self._clearing.adopt(keys, owner, tag)

    def first_seen(self, objects: Sequence[bytes]) -> list[str | None]:
        """Return the ETag by which each object is known, where no listing told one; None if it was never seen."""
        entries = self.get_many([object + FIRST_SEEN for object in objects])
        return [entry.etag if entry is not None else None for entry in entries]

    def present(self, keys: Sequence[bytes]) -> set[bytes]:
        """Return those keys that have a row, without reading values."""
        try:
            return set(self._select(keys, values=False))
        except FAULTS as error:
            self._folder.failed("read", error)
            return set()

    def _select(self, keys: Sequence[bytes], *, values: bool = True) -> dict[bytes, _Row]:
        columns = "key, filename, value, tag" if values else "key, NULL, NULL, NULL"
        rows: dict[bytes, _Row] = {}
        for start in range(0, len(keys), _VARIABLES_PER_QUERY):
            some = keys[start : start + _VARIABLES_PER_QUERY]
            query = f"SELECT {columns} FROM Cache WHERE raw = 1 AND key IN ({','.join('?' * len(some))})"
            rows |= {row[0]: row for row in self._folder.query(query, *some)}
        return rows

    def _checked(self, row: _Row) -> Entry | None:
        """The entry of a row, or None after what fails a check was removed."""
        try:
            entry = self._read(row)
        except OSError as error:
            if error.errno not in _NO_FILE_OF_OURS:
                self._folder.failed("read", error)
            if error.errno in _PASSING:
                return None
            entry = None
        if entry is None:
            self.damaged += self._discard(row)
        return entry

    def _read(self, row: _Row) -> Entry | None:
        key, filename, value, _ = row
        if filename is not None:
            return self._file(key, filename)
        return unpack(key, value) if isinstance(value, bytes) else None

    def _file(self, key: bytes, filename: str) -> Entry | None:
        if not isinstance(filename, str) or not FILE_NAME.fullmatch(filename):
            return None
        descriptor = os.open(f"{self._objects}/{filename}", _READ_ONLY)
        try:
            status = os.fstat(descriptor)
            return read_entry(key, descriptor, status.st_size) if stat.S_ISREG(status.st_mode) else None
        finally:
            os.close(descriptor)

    def _discard(self, row: _Row) -> bool:
        """Remove a bad row and its file; tell whether it was bad, not just removed or replaced by others meanwhile."""
        filename = row[1]
        if self.read_only:
            return True
        try:
            bad = "DELETE FROM Cache WHERE key = ? AND raw = 1 AND filename IS ? AND value IS ?"
            self._folder.note_unlinking(filename)
            with self._folder.transaction() as index:
                gone = index.execute(bad, row[:3]).rowcount
            if gone:
                self._folder.unlink(filename)
            return bool(gone)
        except FAULTS as error:
            self._folder.failed("written", error)
            return True

    # writing

    def put_many(self, entries: Sequence[NewEntry], tag: str = "") -> int:
        """Store what fits, with one transaction, and return how many were stored or already there.

        Files are complete under their names before the transaction begins; a crash leaves litter, never a lie.
        """
        return sum(self.put_each(entries, tag))

    def put_each(self, entries: Sequence[NewEntry], tag: str = "") -> list[bool]:
        """As `put_many`; tells of each entry whether it is there now."""
        if self.read_only:
            self.full = True
            self._warn_if_full()
            return [False] * len(entries)
        keys = [entry_key(entry.object, entry.etag) for entry in entries]
        try:
            present = self._select(keys, values=False)
            missing = {key: entry for key, entry in zip(keys, entries, strict=True) if key not in present}
            written = self._written(missing, tag)
            noted = [(e.object + FIRST_SEEN, e.etag) for e in entries if e.first_seen]
            notes = [(key, Written(0, None, pack_header(key, etag, b""))) for key, etag in noted]
            stored = self.commit([*written, *notes], tag) if written or notes else set()
            self._warn_if_full()
            kept = present.keys() | stored
            return [key in kept for key in keys]
        except FAULTS as error:
            self._folder.failed("written", error)
            return [False] * len(entries)

    def _written(self, entries: dict[bytes, NewEntry], tag: str) -> list[tuple[bytes, Written]]:
        """Rows for the entries that fit, their files written; a disk that fails ends it with those that were."""
        room, rows = self._room(), list[tuple[bytes, Written]]()
        sizes, most = [_on_disk(len(entry.body)) for entry in entries.values()], self.capacity
        needed = sum(size for size in sizes if most is None or size <= most)
        if room < needed:
            room += self._make_room(min(needed, most or needed) - room, tag)
        for key, entry in entries.items():
            size = _on_disk(len(entry.body))
            if size > room:
                self._refuse(size)
                continue
            try:
                rows.append((key, self._write(key, entry)))
            except OSError as error:
                self._folder.failed("written", error)
                break
            room -= size
        return rows

    def room(self) -> int:
        """Bytes that may still be added; not above 0 where the cache is full, or does not work."""
        try:
            return self._room()
        except FAULTS as error:
            self._folder.failed("written", error)
            return 0

    def _room(self) -> int:
        if self.read_only:
            return 0
        total, free = self._folder.disk()
        spare = int(free - total * _FREE_FLOOR)
        limit, coming = self.capacity, sum(entry.size for entry in list(self._coming))
        return (spare if limit is None else min(spare, limit - self.volume())) - coming

    @property
    def capacity(self) -> int | None:
        """The limit in bytes; None where only the free space of the disk counts."""
        return int(self._folder.disk()[0] * self._limit) if isinstance(self._limit, float) else self._limit

    def make_room(self, needed: int, tag: str) -> int:
        """Make room for so many bytes of a dataset from what nobody uses, and return how much there is then."""
        try:
            room = self._room()
            return room if room >= needed else room + self._make_room(needed - room, tag)
        except FAULTS as error:
            self._folder.failed("written", error)
            return 0

    def _make_room(self, needed: int, tag: str) -> int:
        if self.read_only:
            return 0
        freed = self._clearing.make_room(needed + int((self.capacity or 0) * _SLACK), tag)
        if freed >= needed:
            self.full = False
        return freed

    # among processes

    def claim(self, object: bytes) -> bool:
        """Say that this process is about to bring an object, unless somebody else does; to be followed by `unclaim`."""
        return self._folder.claims.take(object)

    def unclaim(self, object: bytes) -> None:
        """Let others bring it."""
        self._folder.claims.release(object)

    def hold(self, tag: str) -> None:
        """Say that this process uses a dataset, until `release` or its end: meanwhile nobody makes room from it."""
        self._clearing.hold(tag)

    def release(self, tag: str) -> None:
        """Undo one `hold`."""
        self._clearing.release(tag)

    # upkeep

    def datasets(self) -> list[Held]:
        """Return what there is of each dataset, by name. Raises `CacheError` if that cannot be read."""
        try:
            return self._clearing.datasets()
        except FAULTS as error:
            raise CacheError(f"{self.directory} cannot be read ({error}): nothing is known of it") from None

    def in_use(self, among: Callable[[str], bool] = lambda name: True) -> list[str]:
        """Return the names of the datasets that living processes hold, of those that `among` is true for.

        Quick, for it reads no rows, and without a trace: no process finds a dataset in use because of it.
        """
        return self._clearing.in_use(among)

    def clear(self, tag: str, *, force: bool = False, spare: Callable[[], bool] = lambda: False) -> Cleared:
        """Remove a dataset, some rows at a time, and return what that freed.

        What a living process holds stays, unless `force`, and so does what `spare()` says; what comes into use
        meanwhile keeps what is left. Raises `CacheError` if it cannot be removed.
        """
        if self.read_only:
            raise CacheError(f"{self.directory} is read-only: nothing in it can be removed")
        try:
            return self._clearing.clear(tag, force=force, spare=spare)
        except FAULTS as error:
            raise CacheError(f"{self.directory}: {tag} cannot be removed ({error})") from None

    def sweep(self) -> int:
        """Delete files that no row names and nobody is writing, and return how many bytes that freed.

        Happens by itself when a run begins, if somebody has written since the last time.
        """
        return 0 if self.read_only else self._sweeper.sweep()

    def check(
        self, *, fix: bool = False, advance: Callable[[int], object] = lambda count: None
    ) -> dict[str, list[str]]:
        """Compare everything that the cache claims with its folder, and return problems by kind (`audit.PROBLEMS`).

        Reads every value. An empty dict means that all is well. Others may use the cache meanwhile: what they are
        writing is no problem. `fix` removes what is damaged, missing or litter, and corrects accounting and
        permissions; what is foreign is never touched. The problems that were found are returned in any case. `advance`
        is told how many more entries have been looked at.
        """
        if fix and self.read_only:
            raise CacheError(f"{self.directory} is read-only: nothing in it can be mended")
        problems = audit.check(self._folder, self._is_sound, advance)
        if fix and problems:
            try:
                audit.fix(self._folder, problems)
                self.sweep()
            except FAULTS as error:
                raise CacheError(f"{self.directory} cannot be mended now ({error}): try again later") from None
        return problems

    def _is_sound(self, key: bytes) -> bool:
        """Whether the value under this key, if there still is one, passes its check. Nothing is removed."""
        row = self._select([key]).get(key)
        try:
            return row is None or self._read(row) is not None
        except OSError as error:
            if error.errno in _PASSING:
                raise
            return not self._select([key], values=False)

    # removing

    def remove(self, keys: Iterable[bytes]) -> None:
        """Remove rows, and their files after the rows; some at a time, so that others can write meanwhile."""
        remaining = iter(keys)
        try:
            while some := list(islice(remaining, _VARIABLES_PER_QUERY)):
                self._folder.drop(f"raw = 1 AND key IN ({','.join('?' * len(some))})", some)
        except FAULTS as error:
            self._folder.failed("written", error)

    def forget_first_seen(self, objects: Iterable[bytes]) -> None:
        """Drop the record of the ETags by which these objects are known: the next read sees them anew."""
        self.remove(object + FIRST_SEEN for object in objects)

    def _write(self, key: bytes, entry: NewEntry) -> Written:
        header = pack_header(key, entry.etag, entry.body)
        if len(entry.body) < INLINE_LIMIT:
            return Written(0, None, header + entry.body)
        file = NewFile(self._folder)
        try:
            file.write(0, header)
            file.write(len(header), entry.body)
            file.publish()
        except BaseException:
            file.abandon()
            raise
        return Written(_blocks(len(header) + len(entry.body)), file, None)

    def begin(self, object: bytes, etag: str, size: int, tag: str = "") -> "LargeEntry | None":
        """Begin to store an object that arrives in parts; None where it does not fit, or the disk fails."""
        try:
            self._folder.query("SELECT 1")  # notices a folder that was replaced
            room = self._room()
            if room < size <= (self.capacity or size):
                room += self._make_room(size - room, tag)
            if size <= room:
                large = LargeEntry(self, NewFile(self._folder), NewEntry(object, etag, b""), size, tag)
                self._coming.add(large)
                return large
            self._refuse(size)
            self._warn_if_full()
        except FAULTS as error:
            self._folder.failed("written", error)
        return None

    def _refuse(self, size: int) -> None:
        self._refused = True
        if size <= (self.capacity or size):  # what could never fit says nothing about the others
            self.full = True

    def arrived(self, large: "LargeEntry") -> None:
        """It is accounted for, or gone: what was kept free for it is no longer."""
        self._coming.discard(large)

    def say_once(self, kind: str, message: str) -> None:
        """Warn, if no process that was given the same `notices` has said so."""
        self._folder.say(kind, message)

    def failed(self, what: str, error: Exception) -> None:
        """Count a fault of the disk that somebody else has met, and say so once."""
        self._folder.failed(what, error)

    def commit(self, written: Sequence[tuple[bytes, Written]], tag: str) -> set[bytes]:
        """Let rows name what is written, with one transaction, and return their keys; used by those who write it.

        What other processes have stored meanwhile counts: what then does not fit is left out.
        """
        try:
            with self._folder.transaction() as index:
                fitting = self._fitting(index, written)
                index.add(fitting, tag)
        except BaseException:
            for _, value in written:
                if value.file is not None:
                    value.file.abandon()
            raise
        for _, value in written:
            if value.file is not None:
                value.file.settle()
        return {key for key, _ in fitting}

    def _fitting(self, index: Index, written: Sequence[tuple[bytes, Written]]) -> Sequence[tuple[bytes, Written]]:
        limit = self.capacity
        if limit is None:
            return written
        room, fitting = limit - self._folder.volume_of(index), list[tuple[bytes, Written]]()
        for key, value in written:
            room -= value.size if value.value is None else _on_disk(len(value.value))
            if room >= 0 or key.endswith(FIRST_SEEN):
                fitting.append((key, value))
            else:
                self.full = True
        return fitting

    def _warn_if_full(self) -> None:
        if self.full and self.read_only:
            self._folder.say(
                "full",
                f"the cache in {self.directory} is read-only: what it lacks is downloaded again in each epoch; "
                "set ASYNCDS_CACHE_DIR to a directory that can be written",
            )
        elif self.full or self._refused:
            self._folder.say(
                "full",
                f"the cache in {self.directory} is full: what does not fit is downloaded again in each epoch; "
                "raise ASYNCDS_CACHE_SIZE, free the disk, or set ASYNCDS_CACHE_DIR to a "
                "larger disk",
            )


def _on_disk(size: int) -> int:
    """Bytes that a value takes, at most: whole blocks for a file; about an eighth more than it is for a row."""
    return size + size // 8 + _HEADERS + _ROW if size < INLINE_LIMIT else _blocks(size + _HEADERS)


def _blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def largest_that_fits(sizes: NDArray[np.int64], room: int) -> int | None:
    """The size up to which objects of these sizes fit into so many bytes together; None if all of them do."""
    known = np.sort(sizes[sizes >= 0])
    files = -(-(known + _HEADERS) // BLOCK) * BLOCK
    taken = np.cumsum(np.where(known < INLINE_LIMIT, known + known // 8 + _HEADERS + _ROW, files))
    fitting = int(np.searchsorted(taken, room, side="right"))
    return None if fitting == len(known) else int(known[fitting - 1]) if fitting else -1


class LargeEntry:
    """An object that is being stored in parts, in any order, from any thread; ends with `finish` or `abandon`."""

    def __init__(self, cache: Cache, file: NewFile, entry: NewEntry, size: int, tag: str) -> None:
        self._cache = cache
        self._file = file
        self._entry = entry
        self._key = entry_key(entry.object, entry.etag)
        self.size = size
        self.kept = False  # whether a row names it
        self._tag = tag
        self._start = len(pack_header_of(self._key, entry.etag, size, 0))

    def write(self, position: int, data: bytes) -> None:
        """Write a part. Raises what the disk raises."""
        self._file.write(self._start + position, data)

    def finish(self, *, first_seen: bool = False) -> StoredBody:
        """Store it, now that all parts are written, and return its body. Raises what disk and index raise."""
        body = StoredBody(self._file.descriptor, self._start, self.size)
        header = pack_header_of(self._key, self._entry.etag, self.size, digest_of(body))
        self._file.write(0, header)
        self._file.publish()
        rows = [(self._key, Written(_blocks(len(header) + self.size), self._file, None))]
        if first_seen:
            note = self._entry.object + FIRST_SEEN
            rows.append((note, Written(0, None, pack_header(note, self._entry.etag, b""))))
        self.kept = self._key in self._cache.commit(rows, self._tag)
        self._cache.arrived(self)
        return body

    def abandon(self) -> None:
        """Forget what was written."""
        self._file.abandon()
        self._cache.arrived(self)
