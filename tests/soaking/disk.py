"""Damage to a cache's folder while others use it."""

import contextlib
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

_HEADER = 100  # bytes of a database


def mangle(way: str, folder: Path, chance: random.Random) -> int:
    """Damage the folder in this way; return how many things were damaged. What is gone already stays so."""
    try:
        return WAYS[way](folder, chance)
    except (OSError, ValueError, sqlite3.Error):  # others remove, empty or lock the same thing
        return 0


def _files(folder: Path, chance: random.Random) -> list[Path]:
    found = sorted((folder / "objects").glob("??/*.obj"))
    return chance.sample(found, min(len(found), 3))


def _cut(folder: Path, chance: random.Random) -> int:
    found = _files(folder, chance)
    for path in found:
        os.truncate(path, chance.randrange(path.stat().st_size))
    return len(found)


def _empty(folder: Path, chance: random.Random) -> int:
    found = _files(folder, chance)
    for path in found:
        os.truncate(path, 0)
    return len(found)


def _delete(folder: Path, chance: random.Random) -> int:
    found = _files(folder, chance)
    for path in found:
        path.unlink()
    return len(found)


def _flip(folder: Path, chance: random.Random) -> int:
    found = _files(folder, chance)
    for path in found:
        _flip_bits(path, chance, 0, 1)
    return len(found)


def _flip_bits(path: Path, chance: random.Random, start: int, count: int) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        size = os.fstat(descriptor).st_size
        for _ in range(count):
            place = chance.randrange(start, size)
            (byte,) = os.pread(descriptor, 1, place)
            os.pwrite(descriptor, bytes([byte ^ 1 << chance.randrange(8)]), place)
    finally:
        os.close(descriptor)


def _flip_row(folder: Path, chance: random.Random) -> int:
    """One bit of the value in each of ten rows, by SQLite itself."""
    path, damaged = folder / "objects" / "cache.db", 0
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=1)) as connection, connection:
        rows = connection.execute(
            "SELECT rowid, value FROM Cache WHERE filename IS NULL ORDER BY random() LIMIT 10"
        ).fetchall()
        for row, value in rows:
            if isinstance(value, bytes) and value:
                place = chance.randrange(len(value))
                flipped = value[:place] + bytes([value[place] ^ 1 << chance.randrange(8)]) + value[place + 1 :]
                connection.execute("UPDATE Cache SET value = ? WHERE rowid = ?", (flipped, row))
                damaged += 1
    return damaged


def _database(folder: Path) -> Path:
    return folder / "objects" / "cache.db"


def _flip_index(folder: Path, chance: random.Random) -> int:
    _flip_bits(_database(folder), chance, _HEADER, 30)
    return 1


def _cut_index(folder: Path, chance: random.Random) -> int:
    path = _database(folder)
    os.truncate(path, chance.randrange(path.stat().st_size))
    return 1


def _garbage_index(folder: Path, chance: random.Random) -> int:
    with _database(folder).open("r+b") as file:
        file.write(chance.randbytes(4096))
    return 1


def _delete_index(folder: Path, chance: random.Random) -> int:
    _database(folder).unlink()
    return 1


def _delete_folder(folder: Path, chance: random.Random) -> int:
    shutil.rmtree(folder, ignore_errors=True)
    return 1


WAYS: dict[str, Callable[[Path, random.Random], int]] = {
    "cut a file": _cut,
    "empty a file": _empty,
    "flip a bit of a file": _flip,
    "delete a file": _delete,
    "flip a bit of a row": _flip_row,
    "flip bits of the index": _flip_index,
    "cut the index": _cut_index,
    "garbage for an index": _garbage_index,
    "delete the index": _delete_index,
    "delete the folder": _delete_folder,
}
