"""A bounded directory of immutable objects, shared by threads and processes.

It knows bytes and paths, and nothing of S3 or asyncio. What it returns is what was stored, checked on every read; what
fails a check is a miss. diskcache keeps the index, the accounting and the transactions; this module decides what is
written and how it is read back. Layout, below the directory that the user names:

    asyncds/
    ├── CACHEDIR.TAG        so that backups skip it (https://bford.info/cachedir/)
    ├── format.json         what made this folder, and in which format
    ├── objects/cache.db    one row per entry (diskcache), small values inside
    ├── objects/ab/….obj    one file per large value, under a random name: no path is ever made from a key
    ├── manifests/          saved listings
    └── stats/              counters of running datasets

A row's key is 16 bytes for the object (endpoint, bucket, key) and 16 for its version (ETag), so that all versions of
an object lie side by side; its tag is the dataset that brought it. Every value, in a row or a file, is a header and the
body (`asyncds.entry`). A row whose version is all zeros holds no bytes, but the ETag under which the object was first
seen: that is how objects that no listing described keep their version.
"""

import contextlib
import json
import os
import re
import secrets
import sqlite3
import threading
import warnings
import weakref
from collections.abc import Iterable, Sequence
from errno import EISDIR, ELOOP, ENOENT, ENOTDIR, ENXIO
from pathlib import Path
from typing import Any, NamedTuple

import diskcache

from asyncds.entry import FIRST_SEEN, Entry, NewEntry, entry_key, pack_header, read_entry, unpack
from asyncds.errors import CacheError

__all__ = ["Cache"]

FORMAT = 1
INLINE_LIMIT = 32 << 10
_FILE_NAME = re.compile(r"[0-9a-f]{2}/[0-9a-f]{30}\.obj")
_DATABASE = diskcache.core.DBNAME
_TABLES = {"Cache", "Settings", "Cache_key_raw", "Cache_expire_time", "sqlite_autoindex_Settings_1"}
_TRIGGER = re.compile(
    r"CREATE TRIGGER Settings_\w+ AFTER (?:INSERT|UPDATE|DELETE) ON Cache FOR EACH ROW BEGIN"
    r" UPDATE Settings SET value = value [-+ .\w]+ WHERE key = \"(?:count|size)\"; END"
)
_DAMAGE = {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR}  # the last: a table is not there
_BLOCK = 4096
_FREE_FLOOR = 0.05
_VARIABLES_PER_QUERY = 500
_NO_FILE_OF_OURS = {ENOENT, ELOOP, EISDIR, ENOTDIR, ENXIO}
_FAULTS = (OSError, sqlite3.Error, diskcache.Timeout)
_SETTINGS = {
    "eviction_policy": "none",
    "cull_limit": 0,
    "statistics": 0,
    "tag_index": 0,
    "size_limit": 1 << 62,
    **{name: value for name, value in diskcache.DEFAULT_SETTINGS.items() if name.startswith(("sqlite_", "disk_"))},
    "sqlite_mmap_size": 0,
}


class _Written(NamedTuple):
    """A value that is already where it belongs: in `filename`, or else to be put into the row."""

    size: int
    filename: str | None
    value: bytes | None


class _Disk(diskcache.Disk):  # type: ignore[misc]
    """Serialization for diskcache that knows bytes only: nothing is ever pickled or unpickled."""

    def put(self, key: bytes) -> tuple[memoryview, bool]:
        return sqlite3.Binary(key), True

    def get(self, key: bytes, raw: object) -> bytes:
        return bytes(key)

    def store(self, value: _Written, read: bool, key: object = None) -> tuple[int, int, str | None, bytes | None]:
        return value.size, diskcache.core.MODE_BINARY, value.filename, value.value

    def fetch(self, mode: int, filename: str | None, value: object, read: bool) -> Any:
        raise TypeError("values are read, and checked, by asyncds.cache.Cache only")

    def remove(self, file_path: object) -> None:
        if isinstance(file_path, str) and _FILE_NAME.fullmatch(file_path):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self._directory, file_path))


class _Index(diskcache.Cache):  # type: ignore[misc]
    """diskcache with one connection, which any thread may use while it holds the owner's lock."""

    _connection: sqlite3.Connection | None = None

    @property
    def _con(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = _connect(Path(self._directory) / _DATABASE)
        return self._connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA trusted_schema = 0")
    connection.execute("PRAGMA synchronous = 1")  # like the others per connection; without it commits wait for the disk
    return connection


class Cache:
    """Entries on local disk. Safe to use from any thread and any process, also across `fork`.

    `limit` is in bytes (int), or a share of the disk (float, up to 1); by default 5 % of the disk stays free. What does
    not fit is not stored. Nothing is evicted to make room: in an epoch every object is read once, and then no policy
    hits more than what simply stays. Once open, faults of the disk never raise: they are misses, or objects that are
    not kept, with one warning, and counted in `faults`. Processes that are given the same `notices`, the beginning of
    a file's name, warn once among them.

    Raises `CacheError` if the directory cannot be used when it is opened.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, limit: int | float | None = None, notices: Path | None = None
    ) -> None:
        self.directory = Path(directory) / "asyncds"
        self.faults = 0
        self._objects = self.directory / "objects"
        self._limit = limit
        self._full = False
        self._notices = notices
        self._said: set[str] = set()
        self._reading = threading.Lock()
        self._writing = threading.Lock()
        self._reader: sqlite3.Connection | None = None
        self._index: _Index | None = None
        self._prepare()
        _caches.add(self)

    def __repr__(self) -> str:
        try:
            return f"<Cache {self.directory}: {len(self):,} entries, {self.volume():,} bytes>"
        except _FAULTS as error:
            return f"<Cache {self.directory}: {error}>"

    def __len__(self) -> int:
        """Number of rows in the index."""
        return self._counter("count")

    def volume(self) -> int:
        """Bytes on disk: the pages of the index, and files rounded up to blocks of 4 KiB."""
        with self._reading:
            pages = self._connected().execute("SELECT page_count * page_size FROM pragma_page_count, pragma_page_size")
            (index,) = pages.fetchone()
        return int(index) + self._counter("size")

    # reading

    def get_many(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """Return what is cached under these keys (`entry_key`), in their order, with one query; None is a miss."""
        try:
            rows = self._select(keys)
            return [self._checked(key, rows[key]) if key in rows else None for key in keys]
        except _FAULTS as error:
            self._degrade("read", error)
            return [None] * len(keys)

    def first_seen(self, objects: Sequence[bytes]) -> list[str | None]:
        """Return the ETag by which each object is known, where no listing told one; None if it was never seen."""
        entries = self.get_many([object + FIRST_SEEN for object in objects])
        return [entry.etag if entry is not None else None for entry in entries]

    def present(self, keys: Sequence[bytes]) -> set[bytes]:
        """Return those keys that have a row, without reading values."""
        try:
            return set(self._select(keys, values=False))
        except _FAULTS as error:
            self._degrade("read", error)
            return set()

    def _select(self, keys: Sequence[bytes], *, values: bool = True) -> dict[bytes, tuple[str | None, bytes | None]]:
        rows: dict[bytes, tuple[str | None, bytes | None]] = {}
        with self._reading:
            connection = self._connected()
            for start in range(0, len(keys), _VARIABLES_PER_QUERY):
                some = keys[start : start + _VARIABLES_PER_QUERY]
                columns = "key, filename, value" if values else "key, NULL, NULL"
                query = f"SELECT {columns} FROM Cache WHERE raw = 1 AND key IN ({','.join('?' * len(some))})"
                rows.update((key, (filename, value)) for key, filename, value in connection.execute(query, some))
        return rows

    def _checked(self, key: bytes, row: tuple[str | None, bytes | None]) -> Entry | None:
        """The entry of a row, or None after what fails a check was removed."""
        filename, value = row
        try:
            if filename is not None:
                entry = self._file(key, filename)
            else:
                entry = unpack(key, value) if isinstance(value, bytes) else None
        except OSError as error:
            if error.errno not in _NO_FILE_OF_OURS:
                self._degrade("read", error)
                return None
            entry = None
        if entry is None:
            self.remove([key])
        return entry

    def _file(self, key: bytes, filename: str) -> Entry | None:
        if not isinstance(filename, str) or not _FILE_NAME.fullmatch(filename):
            return None
        descriptor = os.open(self._objects / filename, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb", buffering=0) as file:
            return read_entry(key, file, os.fstat(descriptor).st_size)

    # writing

    def put_many(self, entries: Sequence[NewEntry], tag: str = "") -> int:
        """Store what fits, with one transaction, and return how many were stored or already there.

        Files are complete under their names before the transaction begins; a crash leaves litter, never a lie.
        """
        try:
            present = self._select([entry_key(entry.object, entry.etag) for entry in entries], values=False)
            written = self._written([e for e in entries if entry_key(e.object, e.etag) not in present])
            noted = [(e.object + FIRST_SEEN, e.etag) for e in entries if e.first_seen]
            notes = [(key, _Written(0, None, pack_header(key, etag, b""))) for key, etag in noted]
            if written or notes:
                self._commit([*written, *notes], tag)
            self._warn_if_full()
            kept = present.keys() | {key for key, _ in written}
            return sum(entry_key(entry.object, entry.etag) in kept for entry in entries)
        except _FAULTS as error:
            self._degrade("written", error)
            return 0

    def _written(self, entries: Sequence[NewEntry]) -> list[tuple[bytes, _Written]]:
        """Rows for the entries that fit, their files written; a disk that fails ends it with those that were."""
        room, rows = self._room(), dict[bytes, _Written]()
        for entry in entries:
            key, size = entry_key(entry.object, entry.etag), _on_disk(len(entry.body))
            if key in rows:
                continue
            if size > room:
                self._full = True
                continue
            try:
                rows[key] = self._write(key, entry)
            except OSError as error:
                self._degrade("written", error)
                break
            room -= size
        return list(rows.items())

    def room(self) -> int:
        """Bytes that may still be added; not above 0 where the cache is full, or does not work."""
        try:
            return self._room()
        except _FAULTS as error:
            self._degrade("written", error)
            return 0

    def _room(self) -> int:
        disk = os.statvfs(self._objects)
        total, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
        spare = int(free - total * _FREE_FLOOR)
        if self._limit is None:
            return spare
        limit = int(total * self._limit) if isinstance(self._limit, float) else self._limit
        return min(spare, limit - self.volume())

    def remove(self, keys: Iterable[bytes]) -> None:
        """Remove rows, and their files after the rows."""
        try:
            with self._writing, self._opened().transact():
                for key in keys:
                    self._opened().delete(key)
        except _FAULTS as error:
            self._degrade("written", error)

    def forget_first_seen(self, objects: Iterable[bytes]) -> None:
        """Drop the record of the ETags by which these objects are known: the next read sees them anew."""
        self.remove(object + FIRST_SEEN for object in objects)

    def _write(self, key: bytes, entry: NewEntry) -> _Written:
        header = pack_header(key, entry.etag, entry.body)
        if len(entry.body) < INLINE_LIMIT:
            return _Written(0, None, header + entry.body)
        name = secrets.token_hex(16)
        filename = f"{name[:2]}/{name[2:]}.obj"
        path = self._objects / filename
        temporary = path.with_suffix(".tmp")
        try:
            with contextlib.suppress(FileExistsError):
                path.parent.mkdir(mode=0o700)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(descriptor, "wb", buffering=0) as file:
                for part in (header, entry.body):
                    view = memoryview(part)
                    while view:
                        view = view[file.write(view) :]
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return _Written(_on_disk(len(header) + len(entry.body)), filename, None)

    def _commit(self, written: Sequence[tuple[bytes, _Written]], tag: str) -> None:
        with self._writing:
            index = self._opened()
            try:
                with index.transact():
                    for key, value in written:
                        index.set(key, value, tag=tag)
            except BaseException:
                for _, value in written:
                    if value.filename is not None:
                        index.disk.remove(value.filename)
                raise

    # the folder and its index

    def _prepare(self) -> None:
        try:
            self._objects.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.directory.chmod(0o700)
            for name in ("manifests", "stats"):
                (self.directory / name).mkdir(mode=0o700, exist_ok=True)
            owner = self.directory.stat().st_uid
            if owner != os.geteuid():
                raise CacheError(
                    f"{self.directory} belongs to user {owner}: set ASYNCDS_CACHE_DIR to a directory of yours"
                )
            self._mark()
            self._inspect()
            os.close(os.open(self._objects / _DATABASE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except CacheError:
            raise
        except (OSError, sqlite3.Error) as error:
            reason = getattr(error, "strerror", None) or error
            raise CacheError(
                f"{self.directory} cannot be used as a cache ({reason}): set ASYNCDS_CACHE_DIR to a directory that can"
            ) from None

    def _mark(self) -> None:
        """Say in the folder what it is, or refuse one that a newer asyncds has made."""
        marker = self.directory / "format.json"
        if not marker.exists():
            tag = "Signature: 8a477f597d28d172789f06886806bc55\n# Made by asyncds: may be deleted when no job runs.\n"
            _publish(self.directory / "CACHEDIR.TAG", tag)
            _publish(marker, json.dumps({"made by": "asyncds", "format": FORMAT}) + "\n")
            return
        try:
            made = json.loads(marker.read_text())["format"]
        except (ValueError, KeyError, TypeError):
            raise CacheError(f"{marker} is damaged: delete {self.directory}, or set ASYNCDS_CACHE_DIR") from None
        if made != FORMAT:
            raise CacheError(
                f"{self.directory} is of format {made}, this asyncds knows {FORMAT}: set ASYNCDS_CACHE_DIR elsewhere"
            )

    def _inspect(self) -> None:
        """Set an index aside that diskcache did not make, or that is damaged, before diskcache would act on it."""
        if not (self._objects / _DATABASE).exists() or _is_trustworthy(self._objects / _DATABASE):
            return
        aside = self.directory / f"damaged-{secrets.token_hex(4)}"
        self._objects.rename(aside)
        self._objects.mkdir(mode=0o700)
        warnings.warn(f"the cache's index was damaged: it was moved to {aside}, which you may delete", stacklevel=5)

    def _connected(self) -> sqlite3.Connection:
        """The connection that reads; to be called while holding `_reading`."""
        if self._reader is None:
            with self._writing:
                self._opened()
            self._reader = _connect(self._objects / _DATABASE)
        return self._reader

    def _opened(self) -> _Index:
        """The index for writing; to be called while holding `_writing`."""
        if self._index is None:
            self._index = _Index(str(self._objects), timeout=10, disk=_Disk, **_SETTINGS)
        return self._index

    def _counter(self, name: str) -> int:
        with self._reading:
            (value,) = self._connected().execute("SELECT value FROM Settings WHERE key = ?", (name,)).fetchone()
        return int(value)

    def _warn_if_full(self) -> None:
        if self._full:
            self._say(
                "full",
                f"the cache in {self.directory} is full: what does not fit is downloaded again in each epoch; "
                "delete that folder if older data may go, raise ASYNCDS_CACHE_SIZE, or set ASYNCDS_CACHE_DIR to a "
                "larger disk",
            )

    def _degrade(self, what: str, error: Exception) -> None:
        self.faults += 1
        reason = getattr(error, "strerror", None) or error
        self._say(
            "fault",
            f"the cache in {self.directory} cannot be {what} ({reason}): objects come straight from the store; "
            "free the disk, or set ASYNCDS_CACHE_DIR",
        )

    def _say(self, kind: str, message: str) -> None:
        """Warn, if no process of the run has said so."""
        if kind in self._said:
            return
        self._said.add(kind)
        if self._notices is not None:
            try:
                os.close(os.open(f"{self._notices}.{kind}", os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            except FileExistsError:
                return
            except OSError:
                pass  # a directory that takes no files is what there is to warn of
        warnings.warn_explicit(message, UserWarning, "asyncds", 1)  # no line of code has caused it

    def close(self) -> None:
        """Close the connections; the next use opens them again."""
        with self._reading, self._writing:
            self._close()

    def _close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        if self._index is not None:
            self._index.close()
        self._reader = None


def _is_trustworthy(path: Path) -> bool:
    """Whether the schema is diskcache's own, and no setting is there that diskcache would pass on to SQLite."""
    try:
        with contextlib.closing(_connect(path)) as connection:
            schema = connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
            settings = connection.execute("SELECT key FROM Settings").fetchall() if schema else []
    except sqlite3.Error as error:
        if error.sqlite_errorcode not in _DAMAGE:
            raise
        return False
    known = {*diskcache.DEFAULT_SETTINGS, *diskcache.core.METADATA, *_SETTINGS}
    return {key for (key,) in settings} <= known and all(
        _TRIGGER.fullmatch(sql or "") if kind == "trigger" else kind in ("table", "index") and name in _TABLES
        for kind, name, sql in schema
    )


def _publish(path: Path, text: str) -> None:
    """Write a small private file, which appears whole."""
    temporary = path.with_suffix(f".{secrets.token_hex(8)}.tmp")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
        file.write(text)
    temporary.replace(path)


def _on_disk(size: int) -> int:
    """Bytes that a value is accounted for: whole blocks for a file, what it is for a row."""
    return size if size < INLINE_LIMIT else -(-size // _BLOCK) * _BLOCK


# SQLite keeps locks per process and must not be carried across a fork with a connection open: the child would believe
# that it holds locks which it does not, and the parent's last close would take the write-ahead log from under it.
# So connections are closed before a fork, while no thread is inside SQLite, and come back when they are next used.

_caches: weakref.WeakSet[Cache] = weakref.WeakSet()
_forking = threading.Lock()
_held: list[Cache] = []


def _before_fork() -> None:
    _forking.acquire()
    for cache in list(_caches):
        cache._reading.acquire()
        cache._writing.acquire()
        cache._close()
        _held.append(cache)


def _after_fork() -> None:
    while _held:
        cache = _held.pop()
        cache._writing.release()
        cache._reading.release()
    _forking.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
