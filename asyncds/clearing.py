"""Make room in a cache from what nobody uses: older versions of objects, and datasets that no living process holds."""

import contextlib
import json
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from asyncds.entry import FIRST_SEEN
from asyncds.folder import Folder, read

__all__ = ["Cleared", "Clearing", "Held"]

_ROWS_AT_ONCE = 500
_SECONDS_BETWEEN = 30.0
_SECONDS_OF_CLEARING = 10.0
_CLEARING = b"\0clearing"  # no dataset is called that


class Held(NamedTuple):
    """What a cache has of a dataset: objects that it brought, and bytes on disk; `used` is a time as of `time.time()`.

    `in_use` says whether a living process holds it.
    """

    name: str
    objects: int
    bytes: int
    used: float | None
    in_use: bool


class Cleared(NamedTuple):
    """What a removal freed on disk; `whole` is false where something is left, because the dataset is in use."""

    bytes: int
    whole: bool


class Clearing:
    """Who uses which dataset, and what may therefore go.

    A dataset is a tag of rows. It is held by a lock that its processes share, and that the kernel frees when they die.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._held = Counter[str]()
        self._held_by_others: dict[str, float] = {}
        self._names: dict[str, str] = {}  # of datasets, by their notes
        self._generation = folder.datasets.generation
        folder.on_renewed.append(self._hold_again)
        self._last = -_SECONDS_BETWEEN

    def hold(self, tag: str) -> None:
        """Say that this process uses a dataset, until `release` or its end."""
        self._hold_again()
        self._held[tag] += 1
        self._hold(tag)

    def _hold_again(self) -> None:
        """Hold in a new folder what was held in one that was deleted; where another cache of this process has seen that
        first, the locks that both have in common have forgotten it."""
        if self._generation == self._folder.datasets.generation:
            return
        self._generation = self._folder.datasets.generation
        for tag, count in self._held.items():
            for _ in range(count):
                self._hold(tag)

    def _hold(self, tag: str) -> None:
        until = time.monotonic() + _SECONDS_OF_CLEARING
        self._folder.datasets.share(_arrival(tag))  # who removes it, or makes room from it, then stops
        try:
            while not self._folder.datasets.share(_bytes(tag)) and time.monotonic() < until:
                time.sleep(0.01)
        finally:
            self._folder.datasets.release(_arrival(tag))
        if self._folder.read_only:
            return
        with contextlib.suppress(OSError):
            self._folder.publish(self._note(tag), json.dumps({"dataset": tag}) + "\n")

    def release(self, tag: str) -> None:
        """Undo one `hold`."""
        self._held[tag] -= 1
        if self._generation == self._folder.datasets.generation:  # else it is another's that would be undone
            self._folder.datasets.release(_bytes(tag))
        if self._folder.read_only:
            return
        with contextlib.suppress(OSError):
            os.utime(self._note(tag))

    def adopt(self, keys: Sequence[bytes], owner: str, tag: str) -> None:
        """Make rows of a dataset that nobody holds those of another. Waits for nobody: the next batch tries again."""
        if time.monotonic() < self._held_by_others.get(owner, 0.0):
            return
        if not self._folder.datasets.take(_bytes(owner)):
            self._held_by_others[owner] = time.monotonic() + _SECONDS_BETWEEN
            return
        try:
            with contextlib.suppress(sqlite3.OperationalError, OSError), self._folder.transaction(wait=False) as index:
                for start in range(0, len(keys), _ROWS_AT_ONCE):
                    some = keys[start : start + _ROWS_AT_ONCE]
                    own = f"raw = 1 AND tag IS ? AND key IN ({','.join('?' * len(some))})"
                    index.execute(f"UPDATE Cache SET tag = ? WHERE {own}", (tag, owner, *some))
        finally:
            self._folder.datasets.release(_bytes(owner))

    def make_room(self, needed: int, tag: str) -> int:
        """Remove what nobody uses, and not of the dataset `tag`, until so many bytes are free; return how many are.

        First older versions, then the dataset that was used least recently. One process at a time does so, and not
        again within half a minute where it found too little. May raise what the disk or the index raise.
        """
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN or not self._folder.datasets.take(_CLEARING):
            return 0
        self._last, freed = now, 0
        try:
            for rows in self._of_nobody(tag):
                freed += self._drop(rows)
                if freed >= needed:
                    self._last = -_SECONDS_BETWEEN
                    break
        finally:
            self._folder.datasets.release(_CLEARING)
        return freed

    def datasets(self) -> list[Held]:
        """All datasets that have brought something, or were used, by name. May raise what the index raises."""
        version = "substr(key, 17) != zeroblob(16)"  # not the notes of which was seen first
        sums = f"SELECT tag, sum({version}), sum(size + ifnull(length(value), 0)) FROM Cache GROUP BY tag"
        rows = {str(tag or ""): (objects, size) for tag, objects, size in self._folder.query(sums)}
        used = {name: when for when, name in self._notes()}
        names = sorted(rows.keys() | used.keys())
        return [Held(name, *rows.get(name, (0, 0)), used.get(name), self._in_use(name)) for name in names]

    def in_use(self, among: Callable[[str], bool] = lambda name: True) -> list[str]:
        """The datasets that living processes hold, of those that `among` is true for. Asks no index."""
        names = (self._named_by(note) for note in (self._folder.directory / "datasets").glob("*.json"))
        return [name for name in names if name is not None and among(name) and self._in_use(name)]

    def clear(self, tag: str, *, force: bool = False, spare: Callable[[], bool] = lambda: False) -> Cleared:
        """Remove a dataset, some rows at a time.

        Nothing of it goes while a living process holds it, nor while `spare()`: both are asked before each time, so
        that what comes into use meanwhile keeps what is left. With `force`, all goes, and those processes find misses.
        May raise what the disk or the index raise.
        """
        alone, freed = self._folder.datasets.take(_bytes(tag)), 0
        try:
            if not force and (not alone or spare()):
                return Cleared(0, whole=False)
            for rows in self._rows_of(tag):
                if not force and (self._is_awaited(tag) or spare()):
                    return Cleared(freed, whole=False)
                freed += self._drop(rows)
            if alone:
                self._note(tag).unlink(missing_ok=True)
        finally:
            if alone:
                self._folder.datasets.release(_bytes(tag))
        return Cleared(freed, whole=True)

    def _in_use(self, tag: str) -> bool:
        return self._folder.datasets.is_shared(_bytes(tag)) or self._is_awaited(tag)

    def _is_awaited(self, tag: str) -> bool:
        """Whether a process is about to hold it, and waits for who holds it alone."""
        return self._folder.datasets.is_shared(_arrival(tag))

    def _of_nobody(self, tag: str) -> Iterator[list[int]]:
        """Numbers of rows that may go, some at a time."""
        yield from self._older_versions()
        for name in self._unheld(tag):
            try:
                for rows in self._rows_of(name):
                    if self._is_awaited(name):
                        break
                    yield rows
                else:
                    self._note(name).unlink(missing_ok=True)
            finally:
                self._folder.datasets.release(_bytes(name))

    def _rows_of(self, tag: str) -> Iterator[list[int]]:
        last, own = 0, "SELECT rowid FROM Cache WHERE rowid > ? AND ifnull(tag, '') = ? ORDER BY rowid LIMIT ?"
        while rows := self._folder.query(own, last, tag, _ROWS_AT_ONCE):
            yield [row for (row,) in rows]
            last = rows[-1][0]

    def _older_versions(self) -> Iterator[list[int]]:
        """All but the version that was stored last, except where an unlisted object is known by its first."""
        last, object, newest, pinned = b"", b"", 0, False
        page = "SELECT key, rowid FROM Cache WHERE raw = 1 AND key > ? ORDER BY key LIMIT ?"
        while rows := self._folder.query(page, last, 10 * _ROWS_AT_ONCE):
            older = []
            for key, row in rows:
                if key[:16] != object:
                    object, newest, pinned = key[:16], 0, key[16:] == FIRST_SEEN  # which sorts before all versions
                elif not pinned and newest:
                    older.append(min(row, newest))
                newest = max(row, newest)
            last = rows[-1][0]
            for start in range(0, len(older), _ROWS_AT_ONCE):
                yield older[start : start + _ROWS_AT_ONCE]

    def _unheld(self, tag: str) -> Iterator[str]:
        """Datasets, held alone while they are dealt with; the one used least recently first."""
        for _, name in sorted(self._notes()):
            if name != tag and self._folder.datasets.take(_bytes(name)):
                yield name

    def _notes(self) -> list[tuple[float, str]]:
        """When which dataset was used last."""
        used = []
        for note in (self._folder.directory / "datasets").glob("*.json"):
            name = self._named_by(note)
            with contextlib.suppress(OSError):
                used += [] if name is None else [(note.stat().st_mtime, name)]
        return used

    def _named_by(self, note: Path) -> str | None:
        """The dataset of a note, which is always the same; None if there is nothing to be read."""
        if note.name not in self._names:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                self._names[note.name] = str(json.loads(read(note))["dataset"])
        return self._names.get(note.name)

    def _drop(self, rows: Sequence[int]) -> int:
        """Remove rows, then their files, and return how many bytes that frees."""
        marks, before = ",".join("?" * len(rows)), self._folder.volume()
        self._folder.drop(f"rowid IN ({marks})", rows)
        return before - self._folder.volume()

    def _note(self, tag: str) -> Path:
        name = blake2b(_bytes(tag), digest_size=16).hexdigest()
        return self._folder.directory / "datasets" / f"{name}.json"


def _bytes(tag: str) -> bytes:
    return tag.encode("utf-8", "surrogatepass")


def _arrival(tag: str) -> bytes:
    """The lock of those who are about to hold a dataset. No dataset is called that."""
    return b"\0arrival " + _bytes(tag)
