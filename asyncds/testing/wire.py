"""HTTP/1.1 between bytes and values: requests parsed, bodies assembled, responses rendered."""

import re
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Protocol
from urllib.parse import parse_qsl, unquote_to_bytes

from asyncds.errors import ConfigurationError

OPERATIONS = ("GET", "HEAD", "PUT", "DELETE", "LIST", "HEAD_BUCKET", "LOCATION", "CREATE_BUCKET", "OTHER")

_CHUNK_SIZE = re.compile(rb"[0-9a-fA-F]{1,15}")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_BUCKET_OPERATIONS = {"GET": "LIST", "HEAD": "HEAD_BUCKET", "PUT": "CREATE_BUCKET"}
_OBJECT_OPERATIONS = frozenset({"GET", "HEAD", "PUT", "DELETE"})
_SUBRESOURCES = frozenset(
    {"acl", "attributes", "cors", "legal-hold", "policy", "restore", "retention", "tagging", "torrent"}
    | {"uploadId", "uploads", "versioning", "versions"}
)


class MalformedRequestError(Exception):
    """The bytes on the connection are no HTTP/1.1 request; the connection cannot go on."""


@dataclass(slots=True)
class Request:
    """One S3 request; header names are in lower case, the key is percent-decoded and otherwise untouched."""

    method: str
    bucket: str
    key: bytes
    query: dict[str, str]
    headers: dict[bytes, bytes]
    operation: str
    body: bytes = b""
    target: str = ""
    """Path and query as they came."""

    @property
    def keeps_alive(self) -> bool:
        return self.headers.get(b"connection", b"").lower() != b"close"

    @property
    def resource(self) -> str:
        return f"/{self.bucket}/{self.key.decode('utf-8', 'replace')}" if self.key else f"/{self.bucket}"


def parse_head(head: bytes) -> Request:
    """Parse a request's head, without the blank line that ends it."""
    lines = head.split(b"\r\n")
    try:
        method, target, version = lines[0].decode("ascii").split(" ")
    except ValueError as exc:
        raise MalformedRequestError(f"request line {lines[0][:200]!r}") from exc
    if not target.startswith("/") or not target.isprintable() or version not in ("HTTP/1.1", "HTTP/1.0"):
        raise MalformedRequestError(f"request line {lines[0][:200]!r}")
    headers = _parse_headers(lines[1:])
    if version == "HTTP/1.0":
        headers[b"connection"] = b"close"
    path, _, raw_query = target.partition("?")
    bucket, _, raw_key = path[1:].partition("/")
    key = unquote_to_bytes(raw_key) if "%" in raw_key else raw_key.encode()
    query = dict(parse_qsl(raw_query, keep_blank_values=True)) if raw_query else {}
    operation = _operation(method, bucket, key, query)
    return Request(method, bucket, key, query, headers, operation, target=target)


def _parse_headers(lines: list[bytes]) -> dict[bytes, bytes]:
    headers = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon:
            raise MalformedRequestError(f"header line {line[:200]!r}")
        headers[name.lower()] = value.strip()
    return headers


def _operation(method: str, bucket: str, key: bytes, query: dict[str, str]) -> str:
    if not bucket or (query and not _SUBRESOURCES.isdisjoint(query)):
        return "OTHER"
    if key:
        return method if method in _OBJECT_OPERATIONS else "OTHER"
    if method == "GET" and "location" in query:
        return "LOCATION"
    return _BUCKET_OPERATIONS.get(method, "OTHER")


class Body(Protocol):
    """A request body that grows as bytes arrive."""

    data: bytearray

    def feed(self, data: bytes) -> bytes | None:
        """Take bytes; return what follows the body once it is complete, and None before."""


class SizedBody:
    """A body announced by Content-Length."""

    def __init__(self, length: int) -> None:
        self.data = bytearray()
        self._length = length

    def feed(self, data: bytes) -> bytes | None:
        missing = self._length - len(self.data)
        self.data += data[:missing]
        return data[missing:] if len(data) >= missing else None


class ChunkedBody:
    """A body in chunks: HTTP's transfer coding, and S3's aws-chunked, which adds signatures and trailers to it."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._pending = bytearray()
        self._in_trailer = False

    def feed(self, data: bytes) -> bytes | None:
        self._pending += data
        while (line_end := self._pending.find(b"\r\n")) >= 0:
            if self._in_trailer:
                del self._pending[: line_end + 2]
                if line_end == 0:
                    return bytes(self._pending)
            elif not self._take_chunk(line_end):
                return None
        return None

    def _take_chunk(self, line_end: int) -> bool:
        size_text = bytes(self._pending[:line_end]).partition(b";")[0]
        if not _CHUNK_SIZE.fullmatch(size_text.strip()):
            raise MalformedRequestError(f"chunk size {size_text[:40]!r}")
        size = int(size_text, 16)
        start = line_end + 2
        if size == 0:
            self._in_trailer = True
            del self._pending[:start]
            return True
        if len(self._pending) < start + size + 2:
            return False
        self.data += self._pending[start : start + size]
        del self._pending[: start + size + 2]
        return True


def body_reader(request: Request) -> Body | None:
    """Return the reader for the body that the request announces, or None when it has none."""
    if b"chunked" in request.headers.get(b"transfer-encoding", b"").lower():
        return ChunkedBody()
    length = request.headers.get(b"content-length", b"0")
    if not _LENGTH.fullmatch(length):
        raise MalformedRequestError(f"Content-Length {length[:40]!r}")
    return SizedBody(int(length)) if int(length) else None


def payload(request: Request, body: Body) -> bytes:
    """Return the object's bytes: the body, without aws-chunked framing where the client used it."""
    encoding = request.headers.get(b"content-encoding", b"")
    signing = request.headers.get(b"x-amz-content-sha256", b"")
    if b"aws-chunked" not in encoding and not signing.startswith(b"STREAMING-"):
        return bytes(body.data)
    chunked = ChunkedBody()
    if chunked.feed(bytes(body.data)) is None:
        raise MalformedRequestError("aws-chunked body without its last chunk")
    return bytes(chunked.data)


@dataclass(slots=True)
class Response:
    """One response; it is rendered once, so do not change it after it was sent."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    closes: bool = False
    """The body ends with the connection: no Content-Length is sent."""
    _parts: tuple[bytes, bytes, bool] | None = field(default=None, init=False)

    def head(self, date: bytes, *, close: bool) -> bytes:
        """Render status line and headers; `date` is a whole header line, left out when the headers have their own."""
        start, rest, dated = self._parts or self._render()
        closing = b"Connection: close\r\n" if close or self.closes else b""
        return b"".join((start, b"" if dated else date, closing, rest))

    def _render(self) -> tuple[bytes, bytes, bool]:
        lines = [f"{name}: {value}\r\n" for name, value in self.headers.items()]
        measured = not self.closes and self.status not in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED)
        told = has_header(self.headers, "Content-Length") or has_header(self.headers, "Transfer-Encoding")
        if measured and not told:
            lines.append(f"Content-Length: {len(self.body)}\r\n")
        lines.append("\r\n")
        status_line = f"HTTP/1.1 {self.status} {reason(self.status)}\r\n"
        rest = "".join(lines).encode("utf-8", "surrogateescape")
        self._parts = status_line.encode(), rest, has_header(self.headers, "Date")
        return self._parts


def chunked(body: bytes, size: int, *, lie: int = 0, ends: bool = True) -> bytes:
    """Frame a body in chunks of `size` bytes, each announced as `lie` bytes longer; without `ends`, not to the end."""
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    framed = b"".join(b"%x\r\n%b\r\n" % (max(0, len(piece) + lie), piece) for piece in pieces)
    return framed + b"0\r\n\r\n" if ends else framed


def has_header(headers: dict[str, str], name: str) -> bool:
    return any(name.lower() == present.lower() for present in headers)


def with_headers(headers: dict[str, str], changes: dict[str, str]) -> dict[str, str]:
    """Return a copy in which `changes` replace the headers of the same name in any case."""
    kept = {name: value for name, value in headers.items() if not has_header(changes, name)}
    return kept | changes


def reason(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"


def check_operation(operation: str) -> str:
    if operation not in OPERATIONS:
        raise ConfigurationError(f"unknown operation {operation!r}; it is one of {', '.join(OPERATIONS)}")
    return operation
