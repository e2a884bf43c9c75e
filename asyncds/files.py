"""Files of values while they are written: under another name until whole, and locked until a row names them."""

import contextlib
import os
import secrets
from typing import NamedTuple

from asyncds.folder import DIRECTORY, Folder

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
        self._place = f"{folder.objects}/{name[:2]}"
        self._name, self._temporary = f"{name[2:]}.obj", f"{name[2:]}.tmp"
        self._settled = False
        self._directory = -1
        self.descriptor = -1
        folder.files.take(self.filename.encode())
        try:
            folder.note_writing()
            self._directory = self._opened_place()
            self.descriptor = os.open(self._temporary, _CREATE, 0o600, dir_fd=self._directory)
        except BaseException:
            self.abandon()
            raise

    def _opened_place(self) -> int:
        """The directory, made if need be; what is written must not go where a link leads."""
        try:
            return os.open(self._place, DIRECTORY)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self._place, 0o700)
            return os.open(self._place, DIRECTORY)

    def write(self, position: int, data: bytes) -> None:
        """Write these bytes there."""
        view = memoryview(data)
        while view:
            count = os.pwrite(self.descriptor, view, position)
            view, position = view[count:], position + count

    def publish(self) -> None:
        """Give it its name. It is whole now."""
        os.rename(self._temporary, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        self._close()

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
        for name in (self._temporary, self._name):
            with contextlib.suppress(OSError):
                os.unlink(f"{self._place}/{name}")
        self._settled = True
        self._folder.files.release(self.filename.encode())

    def _close(self) -> None:
        for descriptor in {self.descriptor, self._directory} - {-1}:
            os.close(descriptor)
        self.descriptor = self._directory = -1


class Written(NamedTuple):
    """A value that is already where it belongs: in `file`, or else to be put into the row."""

    size: int
    file: NewFile | None
    value: bytes | None
