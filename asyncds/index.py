"""The index of a cache: diskcache, made to know bytes only, and trusted only where it is what diskcache makes."""

import contextlib
import os
import re
import sqlite3
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import diskcache

if TYPE_CHECKING:
    from asyncds.files import Written

__all__ = ["DATABASE", "FAULTS", "FILE_NAME", "Index", "connect", "is_damage", "is_made", "is_sealed", "is_trustworthy"]

DATABASE = diskcache.core.DBNAME
FILE_NAME = re.compile(r"[0-9a-f]{2}/[0-9a-f]{30}\.obj")
FAULTS = (OSError, sqlite3.Error, UnicodeDecodeError)  # the last: of names in a damaged schema
_FILE_INDEX = "Cache_filename"
_TABLES = {"Cache", "Settings", "Cache_key_raw", "Cache_expire_time", "sqlite_autoindex_Settings_1", _FILE_INDEX}
_TRIGGER = re.compile(
    r"CREATE TRIGGER Settings_(?:count|size)_(?:insert|update|delete) AFTER (?:INSERT|UPDATE|DELETE) ON Cache"
    r" FOR EACH ROW BEGIN UPDATE Settings SET value = value (?:[-+] 1|\+ NEW\.size(?: - OLD\.size)?|- OLD\.size)"
    r" WHERE key = \"(?:count|size)\"; END"
)
_INSERT = (
    "INSERT INTO Cache (key, raw, store_time, access_time, access_count, tag, size, mode, filename, value) VALUES "
)
_ROW = f"(?, 1, ?, ?, 0, ?, ?, {diskcache.core.MODE_BINARY}, ?, ?)"
_UPSERT = (
    " ON CONFLICT (key, raw) DO UPDATE SET tag = excluded.tag, size = excluded.size, value = excluded.value"
    " WHERE filename IS NULL AND excluded.filename IS NULL"
)
_ADD = _INSERT + _ROW + _UPSERT
_ROWS_AT_ONCE = 32  # of 7 variables each
_ADD_MANY = _INSERT + ", ".join([_ROW] * _ROWS_AT_ONCE) + _UPSERT
_PATIENCE_MS = 5000  # that a writer has with another one, which may have been stopped
_SHORTER = sqlite3.SQLITE_IOERR_SHORT_READ  # than its own header says, while somebody else makes it so
_DAMAGE = {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, _SHORTER, sqlite3.SQLITE_ERROR}  # the last: it lacks a table
_LACKS = ("no such table", "no such column", "malformed database schema", "has no column named")
_BROKEN = {
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_CORRUPT,
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


class Index:
    """The index, for writing: one connection, which any thread may use while it holds the owner's lock.

    diskcache makes the database, its triggers keep the accounting. What else its own class does is not used: it stores
    with one query and one statement per row, waits for a minute for a lock, expands variables in paths, and hides why
    SQLite failed.
    """

    def __init__(self, folder: Path) -> None:
        if not is_made(folder / DATABASE):
            with diskcache.Cache(str(folder), **_SETTINGS) as made:
                made._con.execute(
                    f"CREATE INDEX IF NOT EXISTS {_FILE_INDEX} ON Cache (filename) WHERE filename IS NOT NULL"
                )  # finds what no row names without reading the table; the last thing that is made
        self._connection = connect(folder / DATABASE)

    def execute(self, statement: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        """Run a statement; several within `transact()`."""
        return self._connection.execute(statement, values)

    @contextlib.contextmanager
    def transact(self, *, wait: bool = True) -> Iterator[None]:
        """One transaction, undone if anything fails. Raises `sqlite3.OperationalError` where others hold the lock."""
        self.execute(f"PRAGMA busy_timeout = {_PATIENCE_MS if wait else 0}")
        self.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # SQLite has undone it already after some errors
                self.execute("ROLLBACK")
            raise

    def add(self, written: Sequence[tuple[bytes, "Written"]], tag: str) -> None:
        """Add rows, within `transact()`. A row that is there already stays, unless it has no file: then its value goes.

        A statement is of many rows because the interpreter's lock is let go and taken again for each statement, also
        by `executemany`.
        """
        now = time.time()
        small = [(key, now, now, tag, w.size, None, w.value) for key, w in written if w.file is None]
        whole = len(small) - len(small) % _ROWS_AT_ONCE
        for start in range(0, whole, _ROWS_AT_ONCE):
            self.execute(_ADD_MANY, list(chain.from_iterable(small[start : start + _ROWS_AT_ONCE])))
        self._connection.executemany(_ADD, small[whole:])
        for key, (size, file, _) in written:
            if file is not None:
                added = self.execute(_ADD, (key, now, now, tag, size, file.filename, None)).rowcount
                file.named = bool(added)

    def close(self) -> None:
        self._connection.close()


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """Open the database; `read_only` in a folder that cannot be written, where SQLite can make neither log nor lock."""
    mode = "immutable=1" if read_only else "mode=rw"  # which makes none where there is none
    place = f"{path.absolute().as_uri()}?{mode}"
    connection = sqlite3.connect(place, uri=True, timeout=10, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA trusted_schema = 0")
    connection.execute("PRAGMA synchronous = 1")  # like the others per connection; without it commits wait for the disk
    return connection


def is_sealed(path: Path) -> bool:
    """Whether the database is there, in a folder that cannot be written."""
    return path.exists() and not os.access(path.parent, os.W_OK)


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
    code = getattr(error, "sqlite_errorcode", None)
    if not isinstance(error, sqlite3.Error):
        return False
    if code is None:  # Python's own
        return "Could not decode" in str(error)
    if code == sqlite3.SQLITE_ERROR:
        return any(text in str(error) for text in _LACKS)
    return code & 0xFF in _BROKEN or code == _SHORTER
