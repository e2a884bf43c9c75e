"""The cache's audit of itself: everything that it claims about its folder, compared with the folder."""

import contextlib
import os
import re
import stat
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from asyncds.errors import CacheError
from asyncds.folder import BLOCK, Folder
from asyncds.index import DATABASE, FAULTS, FILE_NAME, is_damage
from asyncds.sweep import is_litter

__all__ = ["PROBLEMS", "check", "fix"]

PROBLEMS = {
    "index": "the index is damaged, or says of itself what is not so",
    "damaged": "a value is not exactly what was stored; it is served as a miss",
    "missing": "a row names a file that is not there; it is served as a miss",
    "orphan": "a file that no row names",
    "temporary": "a file that somebody began to write, and who is not there any more",
    "foreign": "something in the folder of objects that asyncds did not put there; it is never touched",
    "accounting": "the bytes or rows that are accounted are not those that a recount finds",
    "permissions": "a file or folder that others may read or write",
}
"""The kinds of problems, and what each means."""

_ROWS_AT_ONCE = 200
_OURS = re.compile(
    r"\.|CACHEDIR\.TAG|format\.json|(CACHEDIR|format)\.[0-9a-f]{16}\.tmp"
    r"|objects(/cache\.db(-\w+)?|/[0-9a-f]{2}(/[0-9a-f]{30}\.(obj|tmp))?)?"
    r"|datasets(/[0-9a-f]{32}\.(json|[0-9a-f]{16}\.tmp))?"
    r"|locks(/(datasets|files|claims|dirty|sweeping))?"
    r"|manifests(/((run-|job-)?[0-9a-f]{32}\.(manifest|lock)|ranks\.lock|\.manifest-\w+))?"
    r"|stats(/[0-9a-f]{32}(\.[a-z]+)?)?"
    r"|damaged-[0-9a-f]{8}(/cache\.db(-\w+)?)?"
)  # what asyncds makes, by its place in the folder


def check(folder: Folder, is_sound: Callable[[bytes], bool], advance: Callable[[int], object]) -> dict[str, list[str]]:
    """Compare what a cache claims with its folder, reading every value by `is_sound`; see `Cache.check`.

    `advance` is told how many more rows have been looked at.
    """
    problems: dict[str, list[str]] = defaultdict(list)
    try:
        _check_index(folder, problems)
        _check_rows(folder, is_sound, problems, advance)
        _check_files(folder, problems)
    except FAULTS as error:
        if not is_damage(error):
            raise CacheError(f"{folder.directory} cannot be read ({error}): nothing is known of it") from None
        problems["index"].append(str(error))
    _check_permissions(folder.directory, problems)
    return {kind: problems[kind] for kind in PROBLEMS if problems[kind]}


def _check_index(folder: Folder, problems: dict[str, list[str]]) -> None:
    problems["index"] += [line for (line,) in folder.query("PRAGMA integrity_check") if line != "ok"]
    counted = "(SELECT value FROM Settings WHERE key = 'count'), (SELECT value FROM Settings WHERE key = 'size')"
    ((*accounted, rows, size),) = folder.query(f"SELECT {counted}, count(*), ifnull(sum(size), 0) FROM Cache")
    if accounted != [rows, size]:
        problems["accounting"].append(f"accounted are {accounted} rows and bytes, and there are {[rows, size]}")


def _check_rows(
    folder: Folder,
    is_sound: Callable[[bytes], bool],
    problems: dict[str, list[str]],
    advance: Callable[[int], object],
) -> None:
    last, page = 0, "SELECT rowid, key, filename, size FROM Cache WHERE rowid > ? ORDER BY rowid LIMIT ?"
    while rows := folder.query(page, last, _ROWS_AT_ONCE):
        last = rows[-1][0]
        for row, key, filename, size in rows:
            if _check_file(folder, problems, _name(row, key), row, filename, size) and not (
                isinstance(key, bytes) and is_sound(key)
            ):
                problems["damaged"].append(_name(row, key))
        advance(len(rows))


def _check_file(
    folder: Folder, problems: dict[str, list[str]], name: str, row: int, filename: object, size: object
) -> bool:
    """Compare a row with its file, if it names one; tell whether there is a value to look at."""
    if not isinstance(filename, str) or not FILE_NAME.fullmatch(filename):
        return True
    try:
        blocks = -(-os.lstat(folder.objects / filename).st_size // BLOCK) * BLOCK
    except (FileNotFoundError, NotADirectoryError):
        if folder.query("SELECT 1 FROM Cache WHERE rowid = ? AND filename = ?", row, filename):
            problems["missing"].append(f"{name} in {filename}")
        return False
    if blocks != size:
        problems["accounting"].append(f"{name}: {size} bytes are accounted, its file takes {blocks}")
    return True


def _name(row: int, key: object) -> str:
    return f"row {row}: {key.hex() if isinstance(key, bytes) else repr(key)}"


def _check_files(folder: Folder, problems: dict[str, list[str]]) -> None:
    for place in sorted(folder.objects.iterdir()):
        if place.name.startswith(DATABASE):
            continue
        if not _is_folder_of_ours(place):
            problems["foreign"].append(str(place))
            continue
        for path in sorted(place.iterdir()):
            name = f"{place.name}/{path.name}"
            kind = _kind(path, name)
            if kind == "foreign":
                problems["foreign"].append(str(path))
            elif kind is not None and is_litter(folder, name):
                problems[kind].append(name)


def _is_folder_of_ours(folder: Path) -> bool:
    is_folder = stat.S_ISDIR(folder.lstat().st_mode)
    return is_folder and len(folder.name) == 2 and all(digit in "0123456789abcdef" for digit in folder.name)


def _kind(path: Path, name: str) -> str | None:
    """What a file would be if nobody named it; None if it has gone meanwhile."""
    try:
        regular = stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return None
    temporary = name.endswith(".tmp")
    if not regular or not FILE_NAME.fullmatch(name.removesuffix(".tmp") + ".obj" if temporary else name):
        return "foreign"
    return "temporary" if temporary else "orphan"


def _check_permissions(directory: Path, problems: dict[str, list[str]]) -> None:
    for folder, _, files in os.walk(directory):
        for path in (folder, *(os.path.join(folder, name) for name in files)):
            if not _OURS.fullmatch(os.path.relpath(path, directory)):
                continue  # whoever put it there knows who may read it
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(path)
                if not stat.S_ISLNK(status.st_mode) and status.st_mode & 0o077:
                    problems["permissions"].append(f"{path}: {stat.filemode(status.st_mode)}")


def fix(folder: Folder, problems: Mapping[str, Sequence[str]]) -> None:
    """Mend what `check` has found, but for litter, which a sweep takes away, and what is foreign."""
    if "index" in problems:
        folder.replace_index()
    else:
        rows = [int(text.split()[1][:-1]) for kind in ("damaged", "missing") for text in problems.get(kind, ())]
        with folder.transaction() as index:
            for row in rows:
                index.execute("DELETE FROM Cache WHERE rowid = ?", (row,))
            recount = "SELECT count(*) AS count, ifnull(sum(size), 0) AS size FROM Cache"
            for name in ("count", "size"):
                index.execute(f"UPDATE Settings SET value = (SELECT {name} FROM ({recount})) WHERE key = '{name}'")
    for text in problems.get("permissions", ()):
        path = text.rpartition(":")[0]
        with contextlib.suppress(OSError):
            if os.path.isdir(path):
                os.chmod(path, 0o700)
            elif os.lstat(path).st_nlink == 1:  # another name of it may lie outside
                os.chmod(path, 0o600)
