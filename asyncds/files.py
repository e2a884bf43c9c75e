"""Files of values while they are written: under another name until whole, and locked until a row names them."""

import contextlib
import os
import secrets
from typing import NamedTuple

from asyncds.folder import Folder

__all__ = ["NewFile", "Written"]


_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class NewFile:
    """A file on its way into the cache. Ends with `settle` or `abandon`; who dies between leaves litter to a sweep.

    `named` says whether the index has given it a row.
    """

    def __init__(self, folder: Folder) -> None:
        name = secrets.token_hex(16)
        self.filename = f"{name[:2]}/{name[2:]}.obj"
        self.named = False
        self._folder = folder
        # Strings, because paths would take as long as what is done with them.
        self._directory = f"{folder.objects}/{name[:2]}"
        self._path = f"{folder.objects}/{self.filename}"
        self._temporary = f"{self._directory}/{name[2:]}.tmp"
        self._settled = False
        self.descriptor = -1
        folder.files.take(self.filename.encode())
        try:
            folder.note_writing()
            self.descriptor = self._open()
        except BaseException:
            self.abandon()
            raise

    def _open(self) -> int:
        try:
            return os.open(self._temporary, _CREATE, 0o600)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self._directory, 0o700)
            return os.open(self._temporary, _CREATE, 0o600)

    def write(self, position: int, data: bytes) -> None:
        """Write these bytes there."""
        view = memoryview(data)
        while view:
            count = os.pwrite(self.descriptor, view, position)
            view, position = view[count:], position + count

    def publish(self) -> None:
        """Give it its name. It is whole now."""
        self._close()
        os.rename(self._temporary, self._path)

    def settle(self) -> None:
        """The transaction is over: a row names it, or another file is there for the same value, and this one goes."""
        if not self.named:
            self.abandon()
            return
        self._settled = True
        self._folder.files.release(self.filename.encode())

    def abandon(self) -> None:
        """Delete it, unless a row names it."""
        self._close()
        if self._settled:
            return
        for path in (self._temporary, self._path):
            with contextlib.suppress(OSError):
                os.unlink(path)
        self._settled = True
        self._folder.files.release(self.filename.encode())

    def _close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class Written(NamedTuple):
    """A value that is already where it belongs: in `file`, or else to be put into the row."""

    size: int
    file: NewFile | None
    value: bytes | None
