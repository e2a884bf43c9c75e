"""Faults as values, and the scripts that say which request meets which fault."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Self

from asyncds.errors import ConfigurationError
from asyncds.testing.objects import etag_of
from asyncds.testing.s3 import status_response
from asyncds.testing.wire import Response, check_operation, with_headers

Ending = Literal["close", "reset", "stall"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One way in which a response goes wrong; `Fault()` is none.

    The class methods name the usual ones. The fields are independent of each other, so that
    `dataclasses.replace(Fault.reset(after=10), delay_s=0.1)` makes any combination. Faults compare by value and pickle.

    The fields change the response that the server would have sent, in their order here; `ending` says what the
    connection does once `after` bytes of the body are on the wire (None: before even the status line).
    """

    delay_s: float = 0.0
    status_code: int | None = None
    s3_code: str | None = None
    replacement: bytes | None = None
    own_etag: bool = False
    keep: int | None = None
    tail: bytes = b""
    etag_header: str | None = None
    extra_headers: tuple[tuple[str, str], ...] = ()
    announces_length: bool = True
    ending: Ending | None = None
    after: int | None = None
    resume_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("delay_s", "keep", "after", "resume_s"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigurationError(f"a fault's {name} is at least 0, not {value}")
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

    def apply(self, response: Response, resource: str) -> Response:
        """Return the response to send instead; the given one stays as it is."""
        if self.status_code is not None:
            response = status_response(self.status_code, self.s3_code, resource)
        body = self._changed_body(response.body)
        changes = {} if self.etag_header is None else {"ETag": self.etag_header}
        if self.own_etag:
            changes = {"ETag": etag_of(body)} | changes
        headers = with_headers(response.headers, changes | dict(self.extra_headers))
        return Response(response.status, headers, body, closes=not self.announces_length)

    def _changed_body(self, body: bytes) -> bytes:
        if self.replacement is not None:
            body = self.replacement
        return body[: self.keep] + self.tail


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
