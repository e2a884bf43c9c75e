"""Faults as values, and the scripts that say which request meets which fault."""

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Self, get_args
from urllib.parse import quote

from asyncds.errors import ConfigurationError
from asyncds.testing.objects import etag_of
from asyncds.testing.s3 import status_response
from asyncds.testing.wire import Response, check_operation, chunked, with_headers

Ending = Literal["close", "reset", "stall"]
Misprint = Literal["unsorted", "doubled", "no token", "circle"]

_MEBIBYTE = 1 << 20
_ENTRIES = re.compile(rb"(?:<Contents>.*?</Contents>)+", re.DOTALL)
_TRUNCATED = re.compile(rb"<IsTruncated>.*?</IsTruncated>")
_TOKEN = re.compile(rb"<NextContinuationToken>.*?</NextContinuationToken>")
_TO_THE_START = b"<NextContinuationToken>AA==</NextContinuationToken>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One way in which a response goes wrong; `Fault()` is none.

    The class methods name the usual ones. The fields are independent of each other, so that
    `dataclasses.replace(Fault.reset(after=10), delay_s=0.1)` makes any combination. Faults compare by value and pickle.

    The fields change the response that the server would have sent, in their order here; `ending` says what the
    connection does once `after` bytes of the body are on the wire (None: before even the status line). `fill` zero
    bytes, which no memory holds, are announced and sent behind the body. What follows `after` bytes of it comes in
    pieces, if `drip` says how many bytes there are in each, and how many seconds between them.
    """

    delay_s: float = 0.0
    status_code: int | None = None
    s3_code: str | None = None
    replacement: bytes | None = None
    misprint: Misprint | None = None
    own_etag: bool = False
    keep: int | None = None
    tail: bytes = b""
    etag_header: str | None = None
    location: str | None = None
    extra_headers: tuple[tuple[str, str], ...] = ()
    fill: int = 0
    announces_length: bool = True
    chunk: int | None = None
    chunk_lie: int = 0
    first_line: bytes | None = None
    ending: Ending | None = None
    after: int | None = None
    resume_s: float | None = None
    drip: tuple[int, float] | None = None

    def __post_init__(self) -> None:
        for name in ("delay_s", "keep", "after", "resume_s", "fill"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigurationError(f"a fault's {name} is at least 0, not {value}")
        if self.chunk is not None and self.chunk < 1:
            raise ConfigurationError(f"a chunk has at least 1 byte, not {self.chunk}")
        if self.drip is not None and not (self.drip[0] >= 1 and self.drip[1] > 0):
            raise ConfigurationError(f"what drips comes by at least 1 byte, and takes its time, not {self.drip}")
        if self.misprint is not None and self.misprint not in get_args(Misprint):
            raise ConfigurationError(f"a misprint of a listing is one of {get_args(Misprint)}, not {self.misprint!r}")
        if self.status_code is not None and not 200 <= self.status_code <= 999:
            raise ConfigurationError(f"a fault's status is between 200 and 999, not {self.status_code}")

    @classmethod
    def status(
        cls,
        status: int,
        code: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> Self:
        """Answer with a status and an S3 error document for `code`, or with `body` in its place.

        `headers` are added, or replace those of the same name. Status 200 sends the document as if it were the object.
        """
        extra = tuple((headers or {}).items())
        return cls(status_code=status, s3_code=code, replacement=body, extra_headers=extra)

    @classmethod
    def reset(cls, after: int | None = 0) -> Self:
        """Reset the connection (RST) after `after` bytes of the body; None: before the status line."""
        return cls(ending="reset", after=after)

    @classmethod
    def close(cls, after: int | None = 0) -> Self:
        """Close the connection in order (FIN) after `after` bytes of a body whose Content-Length promised all."""
        return cls(ending="close", after=after)

    @classmethod
    def stall(cls, after: int | None = None, *, resume_s: float | None = None) -> Self:
        """Send nothing more after `after` bytes of the body (None: not even the status line).

        The rest follows after `resume_s` seconds; without it never, and the connection stays until the client leaves.
        """
        return cls(ending="stall", after=after, resume_s=resume_s)

    @classmethod
    def truncated(cls, size: int) -> Self:
        """Send the first `size` bytes as if they were all: Content-Length agrees with them, not with the listing."""
        return cls(keep=size)

    @classmethod
    def padded(cls, extra: int | bytes) -> Self:
        """Send more bytes after the object's (a count of zero bytes, or the bytes), and a Content-Length to match."""
        return cls(tail=bytes(extra))

    @classmethod
    def no_length(cls, *, after: int | None = None) -> Self:
        """Send no Content-Length: the body ends with the connection, after `after` bytes or all of them."""
        return cls(announces_length=False, ending=None if after is None else "close", after=after)

    @classmethod
    def body(cls, body: bytes, *, own_etag: bool = False) -> Self:
        """Send other bytes, under the object's ETag or under their own."""
        return cls(replacement=body, own_etag=own_etag)

    @classmethod
    def etag(cls, etag: str) -> Self:
        """Send another ETag header, exactly as given (S3 puts it in double quotes), with the object's bytes."""
        return cls(etag_header=etag)

    @classmethod
    def delay(cls, seconds: float) -> Self:
        """Answer `seconds` later than the server's latency."""
        return cls(delay_s=seconds)

    @classmethod
    def slow_down(cls, retry_after: float | str | None = None) -> Self:
        """Answer with 503 SlowDown, and with a `Retry-After` of so many seconds, or of the text."""
        return cls.status(503, headers={} if retry_after is None else {"Retry-After": f"{retry_after}"})

    @classmethod
    def redirect(cls, location: str | None = None, *, status: int = 307) -> Self:
        """Answer with a redirect to a `Location`, or without one to the very same place, in a loop."""
        return cls(status_code=status, location=location or "")

    @classmethod
    def headers(cls, headers: Mapping[str, str]) -> Self:
        """Send these headers, too, or in place of those of the same name; a megabyte of them if you like."""
        return cls(extra_headers=tuple(headers.items()))

    @classmethod
    def status_line(cls, line: bytes) -> Self:
        """Send another first line, as it is, in front of the right headers and body."""
        return cls(first_line=line)

    @classmethod
    def huge(cls, size: int = 10 * 1024**3) -> Self:
        """Send `size` zero bytes in place of the body, under their Content-Length, for as long as the client reads."""
        return cls(replacement=b"", fill=size)

    @classmethod
    def gzip_bomb(cls, size: int = 256 * _MEBIBYTE) -> Self:
        """Send a thousandth of `size` bytes that unpack to so many (whole MiB), under `Content-Encoding: gzip`."""
        return cls(replacement=_bomb(size // _MEBIBYTE), extra_headers=(("Content-Encoding", "gzip"),))

    @classmethod
    def dripping(cls, size: int = 1, interval_s: float = 1.0, *, after: int = 0) -> Self:
        """Send the body by `size` bytes every `interval_s` seconds, behind `after` bytes that come at once."""
        return cls(drip=(size, interval_s), after=after)

    @classmethod
    def chunked(cls, size: int = 1000, *, lie: int = 0, after: int | None = None) -> Self:
        """Send the body in chunks of `size` bytes, each of which says that it is `lie` bytes longer than it is.

        The connection is closed after `after` bytes, those of the framing included.
        """
        return cls(chunk=size, chunk_lie=lie, ending=None if after is None else "close", after=after)

    @classmethod
    def listing(cls, misprint: Misprint) -> Self:
        """Spoil a page of a listing (`operation="LIST"`).

        Its objects come "unsorted" (backwards) or "doubled" (each twice); or it says that there is more, but has "no
        token" to ask for that, or one that leads back to the start, in a "circle".
        """
        return cls(misprint=misprint)

    def apply(self, response: Response, resource: str) -> Response:
        """Return the response to send instead; the given one stays as it is."""
        if self.status_code is not None:
            response = status_response(self.status_code, self.s3_code, resource)
        body = self._changed_body(response.body)
        changes = {} if self.etag_header is None else {"ETag": self.etag_header}
        if self.own_etag:
            changes = {"ETag": etag_of(body)} | changes
        if self.location is not None:
            changes["Location"] = self.location or quote(resource)
        if self.chunk is not None:
            body, changes["Transfer-Encoding"] = chunked(body, self.chunk, lie=self.chunk_lie), "chunked"
        elif self.fill and self.announces_length:
            changes["Content-Length"] = str(len(body) + self.fill)
        headers = with_headers(response.headers, changes | dict(self.extra_headers))
        return Response(response.status, headers, body, closes=not self.announces_length)

    def changed_head(self, head: bytes) -> bytes:
        """Return the head with another first line, if it has one."""
        return head if self.first_line is None else b"\r\n".join((self.first_line, head.partition(b"\r\n")[2]))

    def _changed_body(self, body: bytes) -> bytes:
        if self.replacement is not None:
            body = self.replacement
        if self.misprint is not None:
            body = _misprinted(body, self.misprint)
        return body[: self.keep] + self.tail


def _misprinted(page: bytes, misprint: Misprint) -> bytes:
    if misprint == "unsorted":
        return _ENTRIES.sub(lambda run: b"".join(_entries(run[0])[::-1]), page)
    if misprint == "doubled":
        return _ENTRIES.sub(lambda run: b"".join(entry + entry for entry in _entries(run[0])), page)
    token = b"" if misprint == "no token" else _TO_THE_START
    return _TRUNCATED.sub(b"<IsTruncated>true</IsTruncated>" + token, _TOKEN.sub(b"", page))


def _entries(run: bytes) -> list[bytes]:
    return [entry + b"</Contents>" for entry in run.split(b"</Contents>")[:-1]]


@lru_cache(maxsize=2)
def _bomb(mebibytes: int) -> bytes:
    packer, zeros = zlib.compressobj(wbits=31), bytes(_MEBIBYTE)  # 31: gzip
    return b"".join([*(packer.compress(zeros) for _ in range(mebibytes)), packer.flush()])


@dataclass(slots=True)
class _Script:
    steps: tuple[Fault, ...]
    shared: bool
    forever: bool
    taken: Counter[bytes]

    def take(self, key: bytes) -> Fault | None:
        counter = b"" if self.shared else key
        step = self.taken[counter]
        if self.forever:
            step = min(step, len(self.steps) - 1)
        if step >= len(self.steps):
            return None
        self.taken[counter] += 1
        return self.steps[step]


class FaultScripts:
    """Which request meets which fault; a script for a key takes the place of the one for all keys."""

    def __init__(self) -> None:
        self._scripts: dict[tuple[str, str, bytes | None], _Script] = {}

    def add(
        self, operation: str, bucket: str, key: str | None, steps: Iterable[Fault], shared: bool, forever: bool
    ) -> None:
        name = (check_operation(operation), bucket, None if key is None else key.encode())
        self._scripts[name] = _Script(tuple(steps), shared, forever, Counter())

    def clear(self) -> None:
        self._scripts.clear()

    def take(self, operation: str, bucket: str, key: bytes) -> Fault | None:
        """Return the fault of this request and count the attempt; None when it is to succeed."""
        if not self._scripts:
            return None
        script = self._scripts.get((operation, bucket, key)) or self._scripts.get((operation, bucket, None))
        return None if script is None else script.take(key)
