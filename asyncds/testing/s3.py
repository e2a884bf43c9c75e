"""S3's answers: a pure function from a request and the stored objects to a response."""

import base64
import itertools
import re
from collections.abc import Callable
from typing import Protocol
from urllib.parse import quote_plus

from asyncds.errors import ConfigurationError
from asyncds.testing.objects import Bucket, Page, Store, StoredObject, after_key, iso_date
from asyncds.testing.wire import Request, Response, reason

_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
_XML = '<?xml version="1.0" encoding="UTF-8"?>\n'
_MAX_KEYS = 1000
_MOST_KEYS = (1 << 31) - 1
_RANGE = re.compile(rb"bytes=(\d*)-(\d*)")
_NO_ESCAPE = re.compile("%(?![0-9a-fA-F]{2})")
# Control characters are no XML 1.0, but S3 sends them as references too: that is why encoding-type=url exists.
_ESCAPES = {code: f"&#x{code:x};" for code in range(32)} | {ord(char): f"&#{ord(char)};" for char in "&<>\"'"}

_ERRORS = {
    "AccessDenied": (403, "Access Denied"),
    "AuthorizationHeaderMalformed": (400, "The authorization header is malformed"),
    "AuthorizationQueryParametersError": (400, "The authorization in the query is malformed"),
    "BucketAlreadyOwnedByYou": (409, "The bucket that you tried to create already exists, and you own it."),
    "ExpiredToken": (400, "The provided token has expired."),
    "IncompleteBody": (400, "The request body is malformed"),
    "InternalError": (500, "We encountered an internal error. Please try again."),
    "InvalidAccessKeyId": (403, "The AWS Access Key Id you provided does not exist in our records."),
    "InvalidArgument": (400, "Invalid Argument"),
    "InvalidRange": (416, "The requested range is not satisfiable"),
    "InvalidRequest": (400, "Invalid Request"),
    "InvalidToken": (400, "The provided token is malformed or otherwise invalid."),
    "InvalidURI": (400, "Couldn't parse the specified URI."),
    "MethodNotAllowed": (405, "The specified method is not allowed against this resource."),
    "MissingSecurityHeader": (400, "Your request is missing a required header"),
    "NoSuchBucket": (404, "The specified bucket does not exist"),
    "NoSuchKey": (404, "The specified key does not exist."),
    "NotImplemented": (501, "A header or query you provided implies functionality that is not implemented"),
    "PreconditionFailed": (412, "At least one of the pre-conditions you specified did not hold"),
    "RequestTimeTooSkewed": (403, "The difference between the request time and the current time is too large."),
    "SignatureDoesNotMatch": (
        403,
        "The request signature we calculated does not match the signature you provided. Check your key and signing "
        "method.",
    ),
    "SlowDown": (503, "Please reduce your request rate."),
    "XAmzContentSHA256Mismatch": (400, "The provided 'x-amz-content-sha256' header does not match what was computed."),
}
_DEFAULT_CODES = {
    400: "InvalidRequest",
    403: "AccessDenied",
    404: "NoSuchKey",
    405: "MethodNotAllowed",
    412: "PreconditionFailed",
    416: "InvalidRange",
    500: "InternalError",
    501: "NotImplemented",
    503: "SlowDown",
}
_ECHOED = {
    "continuation-token": "ContinuationToken",
    "delimiter": "Delimiter",
    "encoding-type": "EncodingType",
    "start-after": "StartAfter",
}
_request_ids = itertools.count(1)


class S3Error(Exception):
    """An answer that is an error document; `details` become elements, `headers` are sent beside it."""

    def __init__(
        self,
        code: str,
        message: str | None = None,
        *,
        details: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(code)
        self.code = code
        self.status, default_message = _ERRORS[code]
        self.message = message or default_message
        self.details = details or {}
        self.headers = headers or {}


def error_response(status: int, code: str, message: str, resource: str, details: dict[str, str]) -> Response:
    request_id = f"{next(_request_ids):016X}"
    elements = {"Code": code, "Message": message, "Resource": resource, "RequestId": request_id} | details
    document = f"{_XML}<Error>{''.join(_element(*pair) for pair in elements.items())}</Error>"
    return Response(status, {"Content-Type": "application/xml", "x-amz-request-id": request_id}, document.encode())


def status_response(status: int, code: str | None, resource: str) -> Response:
    """Return the error document for any status; without a code, the one that S3 sends most often under it."""
    code = code or _DEFAULT_CODES.get(status) or reason(status).replace(" ", "")
    message = _ERRORS[code][1] if code in _ERRORS else reason(status)
    return error_response(status, code, message, resource, {})


class Refuses(Protocol):
    """Who may ask."""

    def check(self, request: Request) -> None:
        """Raise the S3Error with which AWS would refuse the request."""


def respond(request: Request, store: Store, access: Refuses) -> Response:
    """Answer one request; a PUT or DELETE changes the store."""
    try:
        if _NO_ESCAPE.search(request.target):
            raise S3Error("InvalidURI")
        access.check(request)
        return _HANDLERS[request.operation](request, store)
    except S3Error as exc:
        response = error_response(exc.status, exc.code, exc.message, request.resource, exc.details)
        response.headers |= exc.headers
        return response


def _bucket(request: Request, store: Store) -> Bucket:
    try:
        return store.buckets[request.bucket]
    except KeyError:
        raise S3Error("NoSuchBucket", details={"BucketName": request.bucket}) from None


def _stored(request: Request, store: Store) -> StoredObject:
    try:
        return _bucket(request, store).objects[request.key]
    except KeyError:
        raise S3Error("NoSuchKey", details={"Key": request.key.decode("utf-8", "replace")}) from None


def _get(request: Request, store: Store) -> Response:
    stored = _stored(request, store)
    headers = request.headers
    if b"if-match" in headers and not _names(headers[b"if-match"], stored.etag):
        raise S3Error("PreconditionFailed", details={"Condition": "If-Match"})
    if b"if-none-match" in headers and _names(headers[b"if-none-match"], stored.etag):
        return Response(304, stored.headers())
    span = _span(headers[b"range"], len(stored.body)) if b"range" in headers else None
    if span is None:
        return stored.response()
    content_range = {"Content-Range": f"bytes {span.start}-{span.stop - 1}/{len(stored.body)}"}
    return Response(206, stored.headers() | content_range, stored.body[span.start : span.stop])


def _names(condition: bytes, etag: str) -> bool:
    wanted = {part.strip().removeprefix("W/").strip('"') for part in condition.decode("latin-1").split(",")}
    return "*" in wanted or etag.strip('"') in wanted


def _span(header: bytes, size: int) -> range | None:
    """Return the bytes that a Range header asks for, or None where S3 ignores the header."""
    match = _RANGE.fullmatch(header)
    if match is None or match.groups() == (b"", b""):
        return None
    first, last = (_place(digits) if digits else None for digits in match.groups())
    if first is None:
        span = range(max(0, size - (last or 0)), size)
    elif last is not None and last < first:
        return None
    else:
        span = range(first, size if last is None else min(size, last + 1))
    if not span:
        details = {"RangeRequested": header.decode("latin-1"), "ActualObjectSize": str(size)}
        raise S3Error("InvalidRange", details=details, headers={"Content-Range": f"bytes */{size}"})
    return span


def _place(digits: bytes) -> int:
    """The number, if it has up to 19 digits; else one that is beyond the end of every object, too."""
    return int(digits.lstrip(b"0")[:19] or b"0")


def _put(request: Request, store: Store) -> Response:
    if b"x-amz-copy-source" in request.headers:
        raise S3Error("NotImplemented")
    try:
        request.key.decode()
    except UnicodeDecodeError:
        raise S3Error("InvalidURI") from None
    content_type = request.headers.get(b"content-type", b"application/octet-stream").decode("latin-1")
    stored = StoredObject(request.body, content_type)
    _changing(_bucket(request, store).put, request.key, stored)
    return Response(200, {"ETag": stored.etag})


def _delete(request: Request, store: Store) -> Response:
    _changing(_bucket(request, store).delete, request.key)
    return Response(204)


def _changing(change: Callable[..., None], *args: object) -> None:
    try:
        change(*args)
    except ConfigurationError as error:
        raise S3Error("AccessDenied", str(error)) from None


def _create_bucket(request: Request, store: Store) -> Response:
    if request.bucket in store.buckets:
        raise S3Error("BucketAlreadyOwnedByYou", details={"BucketName": request.bucket})
    store.create_bucket(request.bucket)
    return Response(200, {"Location": f"/{request.bucket}"})


def _head_bucket(request: Request, store: Store) -> Response:
    _bucket(request, store)
    headers = {"Content-Type": "application/xml"}
    return Response(200, headers | {"x-amz-bucket-region": store.region or "us-east-1"})


def _location(request: Request, store: Store) -> Response:
    _bucket(request, store)
    # S3 names its first region by an empty constraint.
    region = "" if store.region in (None, "us-east-1") else str(store.region)
    return _document(f'<LocationConstraint xmlns="{_NAMESPACE}">{_escape(region)}</LocationConstraint>')


def _unsupported(request: Request, store: Store) -> Response:
    raise S3Error("NotImplemented" if request.query else "MethodNotAllowed")


def _list(request: Request, store: Store) -> Response:
    bucket = _bucket(request, store)
    query = request.query
    if query.get("list-type") != "2":
        raise S3Error("NotImplemented", "Only ListObjectsV2 is implemented (list-type=2)")
    limit = _max_keys(query.get("max-keys", str(_MAX_KEYS)))
    start = _start(query.get("continuation-token"), query.get("start-after", ""))
    page = bucket.page(query.get("prefix", "").encode(), query.get("delimiter", "").encode(), start, limit)
    return _document(_listing(request, bucket, page, limit))


def _max_keys(text: str) -> int:
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) > _MOST_KEYS:
        raise S3Error("InvalidArgument", f"Argument max-keys must be an integer between 0 and {_MOST_KEYS}")
    return min(int(text), _MAX_KEYS)


def _start(token: str | None, start_after: str) -> bytes:
    if token is None:
        return after_key(start_after.encode()) if start_after else b""
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True)
    except ValueError:  # not in base64, or not even in ASCII
        raise S3Error("InvalidArgument", "The continuation token provided is incorrect") from None


def _listing(request: Request, bucket: Bucket, page: Page, limit: int) -> str:
    query = request.query
    encode = _url_encode if query.get("encoding-type") == "url" else str
    count = len(page.keys) + len(page.prefixes)
    fields = {"Name": request.bucket, "Prefix": encode(query.get("prefix", "")), "KeyCount": str(count)}
    fields |= {"MaxKeys": str(limit), "IsTruncated": "false" if page.resume is None else "true"}
    fields |= {_ECHOED[name]: encode(query[name]) for name in ("delimiter", "start-after") if query.get(name)}
    fields |= {_ECHOED[name]: query[name] for name in ("encoding-type", "continuation-token") if name in query}
    if page.resume is not None:
        fields["NextContinuationToken"] = base64.b64encode(page.resume, altchars=b"-_").decode()
    parts = [_element(*pair) for pair in fields.items()]
    parts += [_contents(encode(key.decode()), bucket.objects[key]) for key in page.keys]
    parts += [f"<CommonPrefixes>{_element('Prefix', encode(p.decode()))}</CommonPrefixes>" for p in page.prefixes]
    return f'<ListBucketResult xmlns="{_NAMESPACE}">{"".join(parts)}</ListBucketResult>'


def _contents(key: str, stored: StoredObject) -> str:
    return (
        f"<Contents><Key>{_escape(key)}</Key><LastModified>{iso_date(stored.modified)}</LastModified>"
        f"<ETag>&#34;{stored.etag[1:-1]}&#34;</ETag><Size>{stored.size}</Size>"
        "<StorageClass>STANDARD</StorageClass></Contents>"
    )


def _document(root: str) -> Response:
    return Response(200, {"Content-Type": "application/xml"}, (_XML + root).encode())


def _element(name: str, text: str) -> str:
    return f"<{name}>{_escape(text)}</{name}>"


def _escape(text: str) -> str:
    return text.translate(_ESCAPES)


def _url_encode(text: str) -> str:
    return quote_plus(text, safe="/*")


_HANDLERS: dict[str, Callable[[Request, Store], Response]] = {
    "GET": _get,
    "HEAD": _get,
    "PUT": _put,
    "DELETE": _delete,
    "LIST": _list,
    "HEAD_BUCKET": _head_bucket,
    "LOCATION": _location,
    "CREATE_BUCKET": _create_bucket,
    "OTHER": _unsupported,
}
