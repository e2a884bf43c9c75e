"""Files of values while they are written: under another name until whole, and locked until a row names them."""

import contextlib
import os
import secrets
from typing import NamedTuple

from asyncds.folder import Folder

__all__ = ["NewFile", "Written"]


class NewFile:
    """A file on its way into the cache. Ends with `settle` or `abandon`; who dies between leaves litter to a sweep."""

    def __init__(self, folder: Folder) -> None:
        name = secrets.token_hex(16)
        self.filename = f"{name[:2]}/{name[2:]}.obj"
        self._folder = folder
        self._path = folder.objects / self.filename
        self._temporary = self._path.with_suffix(".tmp")
        self._settled = False
        self.descriptor = -1
        folder.files.take(self.filename.encode())
        try:
            folder.note_writing()
            with contextlib.suppress(FileExistsError):
                self._path.parent.mkdir(mode=0o700)
            self.descriptor = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except BaseException:
            self.abandon()
            raise

    def write(self, position: int, data: bytes) -> None:
        """Write these bytes there."""
        view = memoryview(data)
        while view:
            count = os.pwrite(self.descriptor, view, position)
            view, position = view[count:], position + count

    def publish(self) -> None:
        """Give it its name. It is whole now."""
        self._close()
        self._temporary.rename(self._path)

    def settle(self) -> None:
        """A row names it now."""
        self._settled = True
        self._folder.files.release(self.filename.encode())

    def abandon(self) -> None:
        """Delete it, unless a row names it."""
        self._close()
        if self._settled:
            return
        for path in (self._temporary, self._path):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        self.settle()

    def _close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class Written(NamedTuple):
    """A value that is already where it belongs: in `file`, or else to be put into the row."""

    size: int
    file: NewFile | None
    value: bytes | None
