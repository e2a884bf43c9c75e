"""The index of a cache: diskcache, made to know bytes only, and trusted only where it is what diskcache makes."""

import contextlib
import re
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diskcache

if TYPE_CHECKING:
    from asyncds.files import Written

__all__ = ["DATABASE", "FAULTS", "FILE_NAME", "Index", "connect", "is_damage", "is_made", "is_trustworthy"]

DATABASE = diskcache.core.DBNAME
FILE_NAME = re.compile(r"[0-9a-f]{2}/[0-9a-f]{30}\.obj")
FAULTS = (OSError, sqlite3.Error, diskcache.Timeout, UnicodeDecodeError)  # the last: of names in a damaged schema
_FILE_INDEX = "Cache_filename"
_TABLES = {"Cache", "Settings", "Cache_key_raw", "Cache_expire_time", "sqlite_autoindex_Settings_1", _FILE_INDEX}
_TRIGGER = re.compile(
    r"CREATE TRIGGER Settings_(?:count|size)_(?:insert|update|delete) AFTER (?:INSERT|UPDATE|DELETE) ON Cache"
    r" FOR EACH ROW BEGIN UPDATE Settings SET value = value (?:[-+] 1|\+ NEW\.size(?: - OLD\.size)?|- OLD\.size)"
    r" WHERE key = \"(?:count|size)\"; END"
)
_ADD = (
    "INSERT INTO Cache (key, raw, store_time, access_time, access_count, tag, size, mode, filename, value)"
    f" VALUES (?, 1, ?, ?, 0, ?, ?, {diskcache.core.MODE_BINARY}, ?, ?)"
    " ON CONFLICT (key, raw) DO UPDATE SET tag = excluded.tag, size = excluded.size, value = excluded.value"
    " WHERE filename IS NULL AND excluded.filename IS NULL"
)
_DAMAGE = {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR}  # the last: a table is not there
_BROKEN = {
    *_DAMAGE,
    sqlite3.SQLITE_CONSTRAINT,
    sqlite3.SQLITE_MISMATCH,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_FORMAT,
}
_SETTINGS = {
    "eviction_policy": "none",
    "cull_limit": 0,
    "statistics": 0,
    "tag_index": 0,
    "size_limit": 1 << 62,
    **{name: value for name, value in diskcache.DEFAULT_SETTINGS.items() if name.startswith(("sqlite_", "disk_"))},
    "sqlite_mmap_size": 0,
}


class _Disk(diskcache.Disk):  # type: ignore[misc]
    """Serialization for diskcache that knows bytes only: nothing is ever pickled or unpickled."""

    def __init__(self, directory: str, **settings: Any) -> None:
        super().__init__(directory, **settings)
        self.doomed: list[object] = []

    def put(self, key: bytes) -> tuple[memoryview, bool]:
        return sqlite3.Binary(key), True

    def get(self, key: bytes, raw: object) -> bytes:
        return bytes(key)

    def store(self, value: object, read: bool, key: object = None) -> Any:
        raise TypeError("values are stored by `Index.add` only")

    def fetch(self, mode: int, filename: str | None, value: object, read: bool) -> Any:
        raise TypeError("values are read, and checked, by asyncds.cache.Cache only")

    def remove(self, file_path: object) -> None:
        self.doomed.append(file_path)  # diskcache would delete it before the transaction ends, in which its row goes


class Index(diskcache.Cache):  # type: ignore[misc]
    """diskcache with one connection, which any thread may use while it holds the owner's lock."""

    _connection: sqlite3.Connection | None = None

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), timeout=10, disk=_Disk, **_SETTINGS)
        self._con.execute(
            f"CREATE INDEX IF NOT EXISTS {_FILE_INDEX} ON Cache (filename) WHERE filename IS NOT NULL"
        )  # finds what no row names without reading the table

    def execute(self, statement: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        """Run a statement; several within `transact()`."""
        return self._con.execute(statement, values)

    def add(self, written: Sequence[tuple[bytes, "Written"]], tag: str) -> None:
        """Add rows, within `transact()`. A row that is there already stays, unless it has no file: then its value goes.

        diskcache's own `set` is one query and one statement per row, which takes twice as long.
        """
        now = time.time()
        small = [(key, now, now, tag, w.size, None, w.value) for key, w in written if w.file is None]
        self._con.executemany(_ADD, small)
        for key, (size, file, _) in written:
            if file is not None:
                added = self._con.execute(_ADD, (key, now, now, tag, size, file.filename, None)).rowcount
                file.named = bool(added)

    @property
    def _con(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = connect(Path(self._directory) / DATABASE)
        return self._connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """Open the database; `read_only` in a folder that cannot be written, where SQLite can make neither log nor lock."""
    place = f"{path.absolute().as_uri()}?immutable=1" if read_only else path
    connection = sqlite3.connect(place, uri=read_only, timeout=10, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA trusted_schema = 0")
    connection.execute("PRAGMA synchronous = 1")  # like the others per connection; without it commits wait for the disk
    return connection


def is_trustworthy(path: Path, *, read_only: bool = False) -> bool:
    """Whether the schema is diskcache's own, and no setting is there that diskcache would pass on to SQLite."""
    try:
        with contextlib.closing(connect(path, read_only=read_only)) as connection:
            schema = connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
            settings = connection.execute("SELECT key, value FROM Settings NOT INDEXED").fetchall() if schema else []
    except UnicodeDecodeError:
        return False
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) not in _DAMAGE:
            raise
        return False
    if not any(name == "Cache" for _, name, _ in schema) and any(dict(settings).get(n) for n in ("count", "size")):
        return False  # it lost its table; one whose making was interrupted never counted anything
    known = {*diskcache.DEFAULT_SETTINGS, *diskcache.core.METADATA, *_SETTINGS}
    return {key for key, _ in settings} <= known and all(
        _TRIGGER.fullmatch(sql or "") if kind == "trigger" else kind in ("table", "index") and name in _TABLES
        for kind, name, sql in schema
    )


def is_made(path: Path) -> bool:
    """Whether the tables are there. Finding out waits for nobody; diskcache writes when it opens, and waits."""
    with contextlib.closing(connect(path)) as connection:
        last_made = "SELECT 1 FROM sqlite_master WHERE name = ?"
        return connection.execute(last_made, (_FILE_INDEX,)).fetchone() is not None


def is_damage(error: Exception) -> bool:
    """Whether SQLite says that the database is none, or broken: all that it finds fault with is ours alone."""
    if isinstance(error, UnicodeDecodeError):
        return True
    return isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 1) & 0xFF in _BROKEN
