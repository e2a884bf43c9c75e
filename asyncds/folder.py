"""The folder of a cache: its layout, its index and the connections to it, its locks, and what becomes of its faults.

Below the directory that the user names:

    asyncds/
    ├── CACHEDIR.TAG        so that backups skip it (https://bford.info/cachedir/)
    ├── format.json         what made this folder, and in which format
    ├── objects/cache.db    one row per entry (diskcache), small values inside
    ├── objects/ab/….obj    one file per large value, under a random name: no path is ever made from a key
    ├── datasets/           one small file per dataset, whose time says when it was last used
    ├── locks/              what processes hold while they live: datasets they use, objects they bring, files they write
    ├── manifests/          saved listings
    └── stats/              counters of running datasets
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import sqlite3
import stat
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from errno import EBUSY, EROFS
from operator import methodcaller
from pathlib import Path
from typing import Any

from asyncds.errors import CacheError
from asyncds.index import DATABASE, FAULTS, FILE_NAME, Index, connect, is_damage, is_made, is_sealed, is_trustworthy
from asyncds.locks import Locks
from asyncds.mounts import network_filesystem

__all__ = ["BLOCK", "DIRECTORY", "FORMAT", "WRITING", "Folder", "held_back", "read"]

FORMAT = 1
BLOCK = 4096
WRITING = b"\0writing"
"""The lock that everyone shares who may leave files behind when killed. No file is called that."""
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_SECONDS_WITHOUT_WRITING = 30.0
_SECONDS_OF_REPAIR = 5.0
_VARIABLE = re.compile(r"\$(\w|\{)")
_REPAIRING, _MAKING = b"\0repairing", b"\0making"
_LOG = ("-wal", "-shm")
_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Made by asyncds: may be deleted when no job runs.\n"
_VOLUME = (
    "SELECT (SELECT page_count * page_size FROM pragma_page_count, pragma_page_size) "
    "+ ifnull((SELECT CAST(value AS INTEGER) FROM Settings WHERE key = 'size'), 0)"
)


class Folder:
    """A folder that processes share. Safe to use from any thread, also across `fork`.

    Raises `CacheError` if it cannot be used when it is opened. `notices`, the beginning of a file's name, makes the
    processes that are given the same one warn once among them. In a folder that is `read_only`, or cannot be written,
    nothing is; it may then belong to another user, if `read_only` is asked for.
    """

    def __init__(self, directory: Path, notices: Path | None, *, read_only: bool = False) -> None:
        self.directory = directory
        self.read_only = read_only
        self.objects = directory / "objects"
        self.faults = 0
        self.first_fault: str | None = None
        self.datasets, self.files, self.claims = (
            Locks.at(directory / "locks" / name) for name in ("datasets", "files", "claims")
        )
        self._notices = notices
        self._said: set[str] = set()
        self._reading = threading.Lock()
        self._writing = threading.Lock()
        self._reader: sqlite3.Connection | None = None
        self._index: Index | None = None
        self._reads = self._writes = self._prepared = (0, 0)  # device and inode of the database that is open for each
        self._locked_until = 0.0
        self._generation = self.datasets.generation
        self.on_renewed: list[Callable[[], object]] = []
        self._noted = 0  # the process that has said that it writes
        self._prepare()
        self._renew()  # others of this process may have had the locks since before the folder was deleted
        _folders.add(self)

    # the index

    def query(self, statement: str, *values: object) -> list[Any]:
        """Return all rows that the index answers with."""
        with self._reading:
            return self._connected().execute(statement, values).fetchall()

    @contextlib.contextmanager
    def transaction(self, *, wait: bool = True) -> Iterator[Index]:
        """The index, for one transaction that this process's threads take in turns.

        Somebody else's transaction is waited for 5 s, or not at all; where that was in vain, none is tried for half a
        minute: whoever holds the lock for so long has been stopped.
        """
        if self.read_only:
            raise OSError(EROFS, os.strerror(EROFS))
        if not self._writing.acquire(blocking=wait):
            raise OSError(EBUSY, "another thread writes to the index")
        try:
            if time.monotonic() < self._locked_until:
                raise OSError(EBUSY, "a process holds the index's lock, and stands still")
            index = self._opened()
            with index.transact(wait=wait):
                yield index
        except sqlite3.OperationalError as error:
            if wait and getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
                self._locked_until = time.monotonic() + _SECONDS_WITHOUT_WRITING
            raise
        finally:
            self._writing.release()

    def drop(self, where: str, values: Sequence[object]) -> None:
        """Remove rows, and their files after them."""
        with self.transaction() as index:
            files = index.execute(f"SELECT filename FROM Cache WHERE {where}", values).fetchall()
            for (filename,) in files:
                self.note_unlinking(filename)
            index.execute(f"DELETE FROM Cache WHERE {where}", values)
        for (filename,) in files:
            self.unlink(filename)

    def volume(self) -> int:
        """Bytes on disk: the pages of the index, and files rounded up to blocks of 4 KiB."""
        ((size,),) = self.query(_VOLUME)
        return int(size)

    @staticmethod
    def volume_of(index: Index) -> int:
        """The same, within a transaction."""
        ((size,),) = index.execute(_VOLUME).fetchall()
        return int(size)

    def disk(self) -> tuple[int, int]:
        """Bytes of the disk, in all and free."""
        disk = os.statvfs(self.objects)
        return disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize

    def note_unlinking(self, filename: object) -> None:
        """Say that the file which a row names may be left behind, before the row is removed."""
        if isinstance(filename, str) and FILE_NAME.fullmatch(filename):
            self.note_writing()

    def unlink(self, filename: object) -> None:
        """Delete the file that a row named, after the row, if the name is one that rows have."""
        if isinstance(filename, str) and FILE_NAME.fullmatch(filename):
            with contextlib.suppress(OSError), _directory(f"{self.objects}/{filename[:2]}") as place:
                os.unlink(filename[3:], dir_fd=place)

    def _connected(self) -> sqlite3.Connection:
        """The connection that reads; to be called while holding `_reading`."""
        identity = self._identity()
        if self._reader is not None and self._reads != identity:
            self._reader.close()
            self._reader = None
        if self._reader is None:
            if not self.read_only and not is_made(self.objects / DATABASE):
                with self._writing:
                    self._opened()
            self._reads = self._identity()
            self._reader = connect(self.objects / DATABASE, read_only=self.read_only)
        return self._reader

    def _opened(self) -> Index:
        """The index for writing; to be called while holding `_writing`."""
        identity = self._identity()
        if self._index is not None and self._writes != identity:
            self._index.close()
            self._index = None
        if self._index is None:
            self._index = Index(self.objects)
            self._writes = identity
        return self._index

    def _identity(self) -> tuple[int, int]:
        """Device and inode of the database: another one, if somebody has replaced the folder; anew, if it is gone."""
        try:
            identity = _inode(self.objects / DATABASE)
        except FileNotFoundError:
            identity = (0, 0)
        if identity != self._prepared or self._generation != self.datasets.generation:
            self._prepare()  # what has come into its place is trusted no more than at first
            self._renew()
            identity = _inode(self.objects / DATABASE)
        return identity

    def _renew(self) -> None:
        """Take again what was held in a folder that was deleted or replaced, where others can see it."""
        self._noted = 0
        for locks in (self.datasets, self.files, self.claims):
            locks.renew()
        if self._generation != self.datasets.generation:
            self._generation = self.datasets.generation
            for tell in self.on_renewed:
                tell()

    def close(self) -> None:
        """Close the connections; the next use opens them again."""
        with self._reading, self._writing:
            self._close()

    def _close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        if self._index is not None:
            self._index.close()
        self._reader = self._index = None

    # the layout

    def _prepare(self) -> None:
        path = str(self.directory)
        if _VARIABLE.search(path):
            raise CacheError(f"{path} names a variable, which nobody has filled in: write the path itself")
        network = network_filesystem(self.directory)
        if network is not None:
            raise CacheError(
                f"{self.directory} lies on a network filesystem ({network}), where locks cannot be relied on: "
                "set ASYNCDS_CACHE_DIR to a local directory"
            )
        database, aside = self.objects / DATABASE, None
        try:
            if self.read_only or is_sealed(database):
                self._prepare_to_read(database)
                return
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check_owner()
            self._refuse_newer()  # before anything in it is touched
            self.directory.chmod(0o700)
            for name in _remove_links(self.directory):
                what = f"{self.directory / name} was a link or a pipe, and was removed"
                self.warn(f"{what}: to have the cache elsewhere, set ASYNCDS_CACHE_DIR")
            self._mark()
            for name in ("objects", "datasets", "locks", "manifests", "stats"):
                (self.directory / name).mkdir(mode=0o700, exist_ok=True)
            _remove_links(self.objects)
            _remove_links(self.directory / "locks")
            if database.exists() and not self._trusts(database):
                aside = self._replaced(database)
            if not database.exists():
                self._make(database)
            self._prepared = _inode(database)
        except CacheError:
            raise
        except (OSError, sqlite3.Error) as error:
            reason = getattr(error, "strerror", None) or error
            raise CacheError(
                f"{self.directory} cannot be used as a cache ({reason}): set ASYNCDS_CACHE_DIR to a directory that can"
            ) from None
        if aside is not None:
            self._tell_of(aside)

    @staticmethod
    def _trusts(database: Path) -> bool:
        try:
            return is_trustworthy(database)
        except sqlite3.Error:  # somebody moves it away in this moment, as damaged, and has made another one
            time.sleep(0.1)
            return not database.exists() or is_trustworthy(database)

    def _replaced(self, database: Path) -> Path | None:
        """Set a damaged index aside, unless somebody else does so."""
        with self._taken(_REPAIRING):
            return None if not database.exists() or is_trustworthy(database) else self._set_aside()

    def _make(self, database: Path) -> None:
        """Begin with an empty database, without what one that was deleted by itself has left.

        Whoever still has the old one open would share the map of its log with the new one: SQLite's locks on that file
        go with the first of the two that is closed, and the next process shrinks it under all who have it mapped, which
        ends them with SIGBUS.
        """
        self.files.renew()  # of a folder that was deleted: those of the one that has come into its place
        with self._taken(_MAKING):
            if database.exists():
                return
            for suffix in _LOG:
                database.with_name(f"{DATABASE}{suffix}").unlink(missing_ok=True)
            if any(self.objects.glob("[0-9a-f][0-9a-f]")):  # what only the old one could name
                self.note_litter()
            with contextlib.suppress(FileExistsError):  # the lock's file was deleted with the folder in this moment
                # Only what was just made is closed: that drops all locks of this process on the file, SQLite's, too.
                os.close(os.open(database, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))

    @contextlib.contextmanager
    def _taken(self, name: bytes) -> Iterator[None]:
        """Hold a lock that everybody holds for moments only."""
        until = time.monotonic() + _SECONDS_OF_REPAIR
        while not self.files.take(name):
            if time.monotonic() > until:
                raise OSError(EBUSY, "another process makes or repairs it")
            time.sleep(0.01)
        try:
            yield
        finally:
            self.files.release(name)

    def _prepare_to_read(self, database: Path) -> None:
        """Use a folder as it is: it must be there, and of this format."""
        self._check_owner()
        if database.is_symlink() or self.objects.is_symlink():
            raise CacheError(f"{self.directory} holds links, which are not followed: set ASYNCDS_CACHE_DIR elsewhere")
        if self._made() != FORMAT or not is_trustworthy(database, read_only=True):
            raise CacheError(f"{self.directory} holds no cache that can be read: set ASYNCDS_CACHE_DIR elsewhere")
        self.read_only = True
        self.datasets, self.files, self.claims = Locks(None), Locks(None), Locks(None)
        self._prepared = _inode(database)

    def _check_owner(self) -> None:
        status = self.directory.stat()
        if status.st_uid != os.geteuid() and not self.read_only:
            raise CacheError(
                f"{self.directory} belongs to user {status.st_uid}: set ASYNCDS_CACHE_DIR to a directory of yours, "
                "or ASYNCDS_CACHE_READ_ONLY=true if you trust them"
            )
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise CacheError(
                f"{self.directory} may be written by others ({stat.filemode(status.st_mode)}), who may have done so: "
                "delete it, or, if you trust them, chmod -R go-rwx it"
            )

    def _mark(self) -> None:
        """Say in the folder what it is; set an older format aside."""
        marker, made = self.directory / "format.json", self._made()
        if made is not None:
            if made == FORMAT:
                return
            aside = self.directory / f"objects-of-format-{made}-{secrets.token_hex(4)}"
            self.objects.rename(aside)
            self.warn(f"the cache was of format {made}: it was moved to {aside}, which you may delete")
        (self.directory / "locks").mkdir(mode=0o700, exist_ok=True)
        self.publish(self.directory / "CACHEDIR.TAG", _TAG)
        self.publish(marker, json.dumps({"made by": "asyncds", "format": FORMAT}) + "\n")

    def _refuse_newer(self) -> None:
        try:
            made = self._made()
        except CacheError:  # a link in the place of the marker, say, which goes in a moment
            return
        if made is not None and made > FORMAT:
            raise CacheError(
                f"{self.directory} is of format {made}, this asyncds knows {FORMAT}: "
                "install a newer one, or set ASYNCDS_CACHE_DIR elsewhere"
            )

    def _made(self) -> int | None:
        """The format in which the folder was made; None for a new one."""
        marker = self.directory / "format.json"
        try:
            return int(json.loads(read(marker))["format"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OverflowError, OSError):
            raise CacheError(f"{marker} is damaged: delete {self.directory}, or set ASYNCDS_CACHE_DIR") from None

    # who may leave something behind

    @property
    def dirty(self) -> Path:
        """The file that is there if somebody has written since the folder was last swept."""
        return self.directory / "locks" / "dirty"

    @property
    def sweeping(self) -> Path:
        """The name of that file while, and after, a sweep that has not come to its end."""
        return self.directory / "locks" / "sweeping"

    def note_writing(self) -> None:
        """Say, once per process, that it may leave files behind when it is killed."""
        if self._noted != os.getpid():
            until = time.monotonic() + 1.0
            while not self.files.share(WRITING) and time.monotonic() < until:
                time.sleep(0.001)  # a sweeper has it for as long as unlinking takes
            self.note_litter()
            self._noted = os.getpid()

    def note_litter(self) -> None:
        """Let the next run sweep."""
        flags = os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        os.close(os.open(self.dirty, flags, 0o600))

    def publish(self, path: Path, text: str) -> None:
        """Write a small private file, which appears whole."""
        temporary = path.with_suffix(f".{secrets.token_hex(8)}.tmp")
        self.files.take(temporary.name.encode())  # what is left by one who died is swept
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
                file.write(text)
            temporary.replace(path)
        finally:
            self.files.release(temporary.name.encode())

    # faults

    def failed(self, what: str, error: Exception) -> None:
        """Count a fault; repair what can be repaired, or say once that the cache is bypassed."""
        self.faults += 1
        reason = getattr(error, "strerror", None) or error
        fault = f"the cache in {self.directory} cannot be {what} ({reason})"
        self.first_fault = self.first_fault or f"{fault}: free the disk, or set ASYNCDS_CACHE_DIR"
        damaged = is_damage(error) and not self.read_only and os.access(self.objects / DATABASE, os.W_OK)
        if damaged and self.replace_index(only_if_open=True):
            return
        self.say("fault", f"{fault}: objects come straight from the store; free the disk, or set ASYNCDS_CACHE_DIR")

    def replace_index(self, *, only_if_open: bool = False) -> bool:
        """Set the index aside and begin with an empty one; tell whether that was done. One process does so, once."""
        if not self.files.take(_REPAIRING):
            return False
        aside = None
        try:
            with self._reading, self._writing:
                if not only_if_open or self._identity() in (self._reads, self._writes):
                    self._close()
                    aside = self._set_aside()
                    self._prepare()
        except FAULTS:
            return False
        finally:
            self.files.release(_REPAIRING)
        if aside is not None:
            self._tell_of(aside)
        return True

    def _set_aside(self) -> Path:
        """Move the index away; the files that only it could name are litter from now on."""
        for older in self.directory.glob("damaged-*"):  # one is kept, to be looked at
            shutil.rmtree(older, ignore_errors=True)
        aside = self.directory / f"damaged-{secrets.token_hex(4)}"
        aside.mkdir(mode=0o700)
        for suffix in (*_LOG, ""):  # the database last: who finds it gone finds none of its log
            with contextlib.suppress(FileNotFoundError):
                (self.objects / f"{DATABASE}{suffix}").rename(aside / f"{DATABASE}{suffix}")
        self.note_litter()
        return aside

    def _tell_of(self, aside: Path) -> None:
        self.warn(f"the cache's index was damaged: it was moved to {aside}, which you may delete")

    def say(self, kind: str, message: str) -> None:
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
        self.warn(message)

    @staticmethod
    def warn(message: str) -> None:
        warnings.warn_explicit(message, UserWarning, "asyncds", 1)  # no line of code has caused it


def _inode(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _directory(path: str) -> Iterator[int]:
    """A descriptor of a directory that is no link."""
    descriptor = os.open(path, DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _remove_links(folder: Path) -> list[str]:
    """Remove what asyncds never puts there: links, that lead outside, and pipes, that keep one waiting. Name them."""
    with os.scandir(folder) as entries:
        foreign = [e.name for e in entries if not (e.is_dir(follow_symlinks=False) or e.is_file(follow_symlinks=False))]
    for name in foreign:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(folder / name)
    return foreign


def read(path: Path) -> str:
    """The text of a small regular file: what else lies in its place is not waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, encoding="utf-8") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("no regular file")
        return file.read(1 << 16)


# SQLite keeps locks per process and must not be carried across a fork with a connection open: the child would believe
# that it holds locks which it does not, and the parent's last close would take the write-ahead log from under it.
# So connections are closed before a fork, while no thread is inside SQLite, and come back when they are next used.

_folders: weakref.WeakSet[Folder] = weakref.WeakSet()
_forking = threading.Lock()
held_back: list[BaseException] = []
"""What handlers of signals have raised within a fork's hooks, which the last of them gives back."""
_held: list[threading.Lock] = []


def _acquire(lock: threading.Lock) -> None:
    """Python swallows what a hook raises, and forks all the same: what the handler of a signal raises, for Ctrl-C, or
    torch's when a worker has died, must not leave SQLite open. Whether the lock was taken is written down before Python
    looks for signals again: it would be waited for for ever."""
    taken: list[object] = []
    while not taken:
        try:
            taken.extend(map(methodcaller("acquire"), (lock,)))
        except BaseException as error:
            held_back.append(error)


def _before_fork() -> None:
    folders = list(_folders)
    for lock in (_forking, *(lock for folder in folders for lock in (folder._reading, folder._writing))):
        _acquire(lock)
        _held.append(lock)
    for folder in folders:
        folder._close()


def _after_fork() -> None:
    while _held:
        _held.pop().release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
