"""The lean lane: repeat the GET that botocore prepared, with another key and a fresh signature, without botocore.

aiobotocore spends most of a small GET's CPU on resolving, signing and parsing what is the same for every object of a
bucket. This lane learns the request from the first one that goes out on the full lane, proves that it can reproduce
botocore's own signature of it, and from then on builds the request itself. What it does not understand (`wire`) is left
to the full lane, which explains it.
"""

import hashlib
import hmac
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple
from urllib.parse import quote, urlsplit

from asyncds.manifest import ObjectInfo
from asyncds.store.base import Drop, Reserve
from asyncds.store.integrity import matches_checksum
from asyncds.store.wire import Answer, BrokenConnection, Done, Pool, length_of

__all__ = ["Credentials", "LeanLane", "Template", "Why"]

Why = Literal["off", "first", "request", "answer"]
"""Why an object takes the full lane: the lean one is switched off; it is the first of its bucket, from which the
request is learnt; the request is none that can be repeated; or the answer is one that only the full lane understands.
"""

_NOT_REPEATED = {"authorization", "x-amz-date", "x-amz-security-token", "if-match", "range", "host"}
_TO_BE_UNDERSTOOD = (0, 200, 206)
# Answers that were not understood, less a quarter for each that was: two requests for an object are no way to go on.
_PATIENCE, _FORGIVEN = 8.0, 0.25
_ALGORITHM = "AWS4-HMAC-SHA256"


@dataclass(frozen=True)
class Credentials:
    """What signs a request."""

    access_key: str
    secret_key: str = field(repr=False)
    token: str | None = field(repr=False)


class _Shape(NamedTuple):
    """A request and its canonical form, with `%s` in the place of the path, of the ETag if any, and of the signature;
    and what signs: the text to sign up to the hash of the canonical form, and the key of the day.

    The canonical form is None if requests are not signed.
    """

    request: str
    canonical: str | None = None
    to_sign: str = ""
    key: bytes = b""

    def __repr__(self) -> str:  # a session token is in it
        return "<_Shape>"


class Template:
    """A GET of one bucket, as botocore prepared it, minus the key, the date and the signature."""

    def __init__(self, url: str, key: str, headers: dict[str, str]) -> None:
        parts = urlsplit(url)
        quoted = quote(key, safe="/~")
        if not parts.path.endswith(quoted) or parts.query or not parts.hostname or "%" in parts.netloc:
            raise ValueError("the URL is more than a place and a path that ends in the key")
        self.secure = parts.scheme == "https"
        self.place = parts.hostname, parts.port or (443 if self.secure else 80)
        self._folder = parts.path.removesuffix(quoted)
        self._host = parts.netloc
        scope, _, rest = headers.get("authorization", "").partition("SignedHeaders=")
        self._signs = bool(scope)
        signed = {"user-agent", *rest.partition(",")[0].split(";")}
        self._constant = {  # what is not signed traces one request
            name: value
            for name, value in headers.items()
            if name not in _NOT_REPEATED and not name.startswith("amz-sdk-") and (name in signed or not self._signs)
        }
        self._agent = self._constant.pop("user-agent", "asyncds")
        if self._signs:
            credential = scope.removeprefix(_ALGORITHM + " Credential=").partition(",")[0]
            _, _, self._region, self._service, _ = credential.rsplit("/", 4)
        self._day = ""
        self._day_of: Credentials | None = None
        self._signing_key = b""
        self._shapes_of: tuple[str, Credentials | None] = "", None
        self._shapes: dict[bool, _Shape] = {}

    def request(
        self, key: str, etag: str | None, credentials: Credentials | None, stamp: str, part: slice | None = None
    ) -> bytes:
        """Return the bytes of a GET, of a part only if one is given. `stamp` is the time as `20261231T235959Z`.

        SigV4 as in AWS's "Signature Version 4 signing process"; what botocore leaves unsigned is so here.
        """
        path = self._folder + quote(key, safe="/~")
        tagged = etag is not None and etag.isascii() and etag.isprintable()  # a shortcut: the answer's ETag is compared
        fill = (path, f'"{etag}"') if tagged else (path,)
        shape = self._shape(stamp, credentials, tagged, part)
        if shape.canonical is not None:
            fill = *fill, _signature(shape.canonical % fill, shape.to_sign, shape.key)
        return (shape.request % fill).encode()

    def _shape(self, stamp: str, credentials: Credentials | None, tagged: bool, part: slice | None) -> "_Shape":
        """What all requests of the same second have in common."""
        if part is not None:
            return self._shaped(stamp, credentials, tagged, part)
        last_stamp, last_credentials = self._shapes_of
        if stamp != last_stamp or credentials is not last_credentials:
            self._shapes_of, self._shapes = (stamp, credentials), {}
        shape = self._shapes.get(tagged)
        if shape is None:
            shape = self._shapes[tagged] = self._shaped(stamp, credentials, tagged, part)
        return shape

    def _shaped(self, stamp: str, credentials: Credentials | None, tagged: bool, part: slice | None) -> "_Shape":
        headers, signing = dict(self._constant), dict[str, Any]()
        if part is not None:
            headers["range"] = f"bytes={part.start}-{part.stop - 1}"
        if self._signs and credentials is not None:
            headers["x-amz-date"] = stamp
            if credentials.token:
                headers["x-amz-security-token"] = credentials.token
        headers = {name: value.replace("%", "%%") for name, value in headers.items()}
        if tagged:
            headers = {"if-match": "%s"} | headers
        if self._signs and credentials is not None:
            names, canonical = self._canonical("%s", headers)
            key = self._key_of_the_day(stamp[:8], credentials)
            signing = {"canonical": canonical, "to_sign": self._to_sign(stamp), "key": key}
            scope = f"{credentials.access_key}/{self._scope(stamp)}".replace("%", "%%")
            headers["authorization"] = f"{_ALGORITHM} Credential={scope}, SignedHeaders={names}, Signature=%s"
        headers |= {"host": self._host, "user-agent": self._agent.replace("%", "%%"), "accept-encoding": "identity"}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return _Shape(f"GET %s HTTP/1.1\r\n{lines}\r\n", **signing)

    def _canonical(self, path: str, headers: dict[str, str]) -> tuple[str, str]:
        """The names of the signed headers, and the canonical request of a GET with these headers."""
        signed = sorted({**headers, "host": self._host}.items())
        names = ";".join(name for name, _ in signed)
        lines = "".join(f"{name}:{value}\n" for name, value in signed)
        return names, f"GET\n{path}\n\n{lines}\n{names}\n{headers['x-amz-content-sha256']}"

    def _to_sign(self, stamp: str) -> str:
        return f"{_ALGORITHM}\n{stamp}\n{self._scope(stamp)}\n"

    def _scope(self, stamp: str) -> str:
        return f"{stamp[:8]}/{self._region}/{self._service}/aws4_request"

    def _key_of_the_day(self, day: str, credentials: Credentials) -> bytes:
        if (day, credentials) != (self._day, self._day_of):
            key = ("AWS4" + credentials.secret_key).encode()
            for part in (day, self._region, self._service, "aws4_request"):
                key = hmac.digest(key, part.encode(), "sha256")
            self._day, self._day_of, self._signing_key = day, credentials, key
        return self._signing_key

    def reproduces(self, headers: dict[str, str], path: str, credentials: Credentials | None) -> bool:
        """Whether signing the learnt request anew gives botocore's signature: if not, this lane must not be used."""
        if not self._signs:
            return True
        if credentials is None or "x-amz-content-sha256" not in headers:
            return False
        theirs = headers["authorization"]
        names = theirs.partition("SignedHeaders=")[2].partition(",")[0].split(";")
        signed = {name: headers[name] for name in names if name != "host"}
        ours, canonical = self._canonical(path, signed)
        stamp = headers["x-amz-date"]
        signature = _signature(canonical, self._to_sign(stamp), self._key_of_the_day(stamp[:8], credentials))
        return ours == ";".join(names) and theirs.endswith(f"Signature={signature}")


def _signature(canonical: str, to_sign: str, key: bytes) -> str:
    hashed = hashlib.sha256(canonical.encode()).hexdigest()
    return hmac.digest(key, (to_sign + hashed).encode(), "sha256").hex()


class LeanLane:
    """A template and a pool of connections for each bucket. Lives on one event loop."""

    def __init__(self, *, timeout: float, tls: Callable[[], ssl.SSLContext]) -> None:
        self._timeout = timeout
        self._tls = tls
        self._misunderstood: dict[str, float] = {}
        self._templates: dict[str, Template | None] = {}  # None for one that cannot be repeated
        self._pools: dict[tuple[str, int], Pool] = {}
        self._stamp = (0, "")

    def learn(self, bucket: str, key: str, request: Any, credentials: Credentials | None) -> None:
        """Take botocore's prepared and signed GET as the bucket's template, if it can be reproduced exactly."""
        headers = {name.lower(): _text(value) for name, value in request.headers.items()}
        self._templates[bucket] = None
        try:
            template = Template(request.url, key, headers)
            if template.reproduces(headers, urlsplit(request.url).path, credentials):
                self._templates[bucket] = template
        except (ValueError, KeyError):
            pass  # SigV4a, S3 Express, a query: the full lane serves this bucket

    def knows(self, bucket: str) -> bool:
        """Whether a request for an object of this bucket can be made here."""
        return self._templates.get(bucket) is not None and self._misunderstood.get(bucket, 0.0) < _PATIENCE

    def why_not(self, bucket: str) -> Why:
        """What keeps objects of this bucket on the full lane."""
        if bucket not in self._templates:
            return "first"
        return "request" if self._templates[bucket] is None else "answer"

    async def get(
        self,
        info: ObjectInfo,
        credentials: Credentials | None,
        reserve: Reserve,
        part: slice | None = None,
        *,
        fresh: bool = False,
    ) -> Answer:
        """Send one GET, and return the answer; see `Pool.get` for errors. A body that fails its checksum is one."""
        template = self._template(info.bucket)
        request, pool = template.request(info.key, info.etag, credentials, self._now(), part), self._pool(template)
        if part is None:
            return self.judged(info.bucket, await pool.get(request, info.size, reserve, fresh=fresh))
        answer = await pool.get(request, part.stop - part.start, reserve, 206, fresh=fresh)
        return self.judged(info.bucket, answer, part)

    def ask(self, info: ObjectInfo, credentials: Credentials | None, done: Done, until: float) -> Drop | None:
        """As `get`, for a whole object of known size, at once or not at all; see `Pool.ask`. `done` has it judged."""
        assert info.size is not None
        template = self._template(info.bucket)
        request = template.request(info.key, info.etag, credentials, self._now())
        return self._pool(template).ask(request, info.size, done, until)

    def _template(self, bucket: str) -> Template:
        template = self._templates[bucket]
        assert template is not None  # it is known
        return template

    def _pool(self, template: Template) -> Pool:
        pool = self._pools.get(template.place)
        if pool is None:
            tls = self._tls() if template.secure else None
            pool = self._pools[template.place] = Pool(*template.place, timeout=self._timeout, tls=tls)
        return pool

    def judged(self, bucket: str, answer: Answer, part: slice | None = None) -> Answer:
        """Count answers that were not understood, and compare a whole body with its checksum, if one came along.

        Raises `BrokenConnection` for one that fails it.
        """
        if part is None and answer.whole:
            matches = matches_checksum(answer.headers, answer.body)
            if matches is False:
                raise BrokenConnection("the body does not match its checksum")
            if matches:
                answer = answer._replace(checked=True)
        if answer.whole:
            if bucket in self._misunderstood:
                self._misunderstood[bucket] = max(0.0, self._misunderstood[bucket] - _FORGIVEN)
        elif answer.status in _TO_BE_UNDERSTOOD and length_of(answer.headers) is None:  # or another object has come
            self._misunderstood[bucket] = self._misunderstood.get(bucket, 0.0) + 1
        return answer

    async def aclose(self) -> None:
        """Close all connections."""
        for pool in self._pools.values():
            await pool.aclose()

    def _now(self) -> str:
        second = int(time.time())
        if second != self._stamp[0]:
            self._stamp = second, time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(second))
        return self._stamp[1]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
