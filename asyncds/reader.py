"""The object as a file: what a transform is given."""

import io
from typing import Any

from asyncds.large import StoredBody
from asyncds.manifest import ObjectInfo

__all__ = ["S3Reader"]


class S3Reader(io.BufferedIOBase):
    """A read-only binary file that also knows where it came from.

    `bucket`, `key`, `etag` (without quotes) and `size` (bytes) describe the object. Feeds PIL, `torch.load`, `tarfile`,
    NumPy and whatever else reads from files; an object above 16 MiB that is cached is read from disk as it is needed.
    Seeking beyond the end stops at the end. Pickles with its bytes.
    """

    def __init__(self, bucket: str, key: str, body: bytes | StoredBody, etag: str | None = None) -> None:
        self.bucket = bucket
        self.key = key
        self.etag = etag
        self.size = len(body)
        self._file = body.open() if isinstance(body, StoredBody) else io.BytesIO(body)

    def __repr__(self) -> str:
        return f"<S3Reader {ObjectInfo(self.bucket, self.key).uri}: {self.size:,} bytes>"

    def __reduce__(self) -> tuple[Any, ...]:
        place = self._file.tell()
        self._file.seek(0)
        body = self._file.read()
        self._file.seek(place)
        return S3Reader, (self.bucket, self.key, body, self.etag)

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next `size` bytes; None and negative numbers read to the end."""
        return self._file.read(size)

    def read1(self, size: int = -1, /) -> bytes:
        return self._file.read1(size)

    def readinto(self, buffer: Any, /) -> int:
        """Fill the buffer as far as there are bytes, and return how many."""
        return self._file.readinto(buffer)

    def readline(self, size: int | None = -1, /) -> bytes:
        return self._file.readline(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move, at most to the end, and return the position."""
        position = self._file.seek(offset, whence)
        return position if position <= self.size else self._file.seek(self.size)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def close(self) -> None:
        super().close()
        self._file.close()
