"""Take back what killed processes leave: files that no row names and nobody is writing."""

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from asyncds.folder import BLOCK, WRITING, Folder
from asyncds.index import FAULTS, FILE_NAME

__all__ = ["Sweeper", "is_litter"]

_FILES_AT_ONCE = 500
_SWEEPING = b"\0sweeping"  # no file is called that


class Sweeper:
    """Sweeps a folder: by itself, in a thread, when the main process of a run opens one in which somebody has written
    since the last time, and whenever it is told to. One process at a time does so; readers and writers go on meanwhile.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def start_if_needed(self) -> None:
        """Begin to sweep in the background."""
        folder = self._folder
        if multiprocessing.parent_process() is None and (folder.dirty.exists() or folder.sweeping.exists()):
            self._thread = threading.Thread(target=self._sweep_quietly, name="asyncds-sweeper", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End what goes on in the background; the next run begins anew."""
        self._ending.set()
        self._join()

    def sweep(self) -> int:
        """Sweep now, and return how many bytes that freed; 0 also where another process does so."""
        self._join()
        self._ending.clear()
        return self._sweep()

    def _join(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            self._thread.join()

    def _sweep_quietly(self) -> None:
        with contextlib.suppress(Warning):  # which some make errors: there is nobody here to catch them
            self._sweep()

    def _sweep(self) -> int:
        folder = self._folder
        if not folder.files.take(_SWEEPING):
            return 0
        try:
            if folder.files.take(WRITING):  # nobody writes now: whoever does so later says so again
                with contextlib.suppress(FileNotFoundError):
                    folder.dirty.rename(folder.sweeping)
                folder.files.release(WRITING)
            freed = sum(self._swept(place) for place in sorted(folder.objects.glob("[0-9a-f][0-9a-f]")))
            for name in (".", "datasets"):
                _sweep_notes(folder, folder.directory / name)
            if not self._ending.is_set():
                folder.sweeping.unlink(missing_ok=True)
            return freed
        except FAULTS as error:
            folder.failed("swept", error)
            return 0
        finally:
            folder.files.release(_SWEEPING)

    def _swept(self, place: Path) -> int:
        if place.is_symlink() or not place.is_dir():
            return 0
        with os.scandir(place) as entries:
            names = [f"{place.name}/{entry.name}" for entry in entries if entry.is_file(follow_symlinks=False)]
        freed = 0
        for start in range(0, len(names), _FILES_AT_ONCE):
            if self._ending.is_set():
                break
            some = names[start : start + _FILES_AT_ONCE]
            known = _named(self._folder, some)
            freed += sum(self._swept_file(name) for name in some if name not in known)
        return freed

    def _swept_file(self, name: str) -> int:
        with _litter(self._folder, name) as is_litter, contextlib.suppress(FileNotFoundError):
            if is_litter:
                path = self._folder.objects / name
                size = path.stat().st_size
                path.unlink()
                return -(-size // BLOCK) * BLOCK
        return 0


def _sweep_notes(folder: Folder, place: Path) -> None:
    """Delete small files that somebody began to publish, and who is not there any more."""
    for path in place.glob("*.tmp"):
        if folder.files.take(path.name.encode()):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            folder.files.release(path.name.encode())


def is_litter(folder: Folder, name: str) -> bool:
    """Whether no row names this file of the cache, and nobody is writing it."""
    with _litter(folder, name) as is_litter:
        return is_litter and (folder.objects / name).exists()


@contextlib.contextmanager
def _litter(folder: Folder, name: str) -> Iterator[bool]:
    """Whether it is litter, and stays so: writers hold a lock on the name from before the file until after the row."""
    filename = (name.removesuffix(".tmp") + ".obj" if name.endswith(".tmp") else name).encode()
    if not FILE_NAME.fullmatch(filename.decode()) or not folder.files.take(filename):
        yield False
        return
    try:
        yield not _named(folder, [name])
    finally:
        folder.files.release(filename)


def _named(folder: Folder, names: Sequence[str]) -> set[str]:
    """Those files that a row names."""
    marks = ",".join("?" * len(names))
    return {name for (name,) in folder.query(f"SELECT filename FROM Cache WHERE filename IN ({marks})", *names)}
