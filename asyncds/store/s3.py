"""S3 and what speaks its language, through aiobotocore: the only code that sends requests."""

import asyncio
import errno
import itertools
import logging
import re
import ssl
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

from botocore.exceptions import BotoCoreError
from botocore.httpsession import get_cert_path
from botocore.utils import get_environ_proxies

from asyncds.errors import (
    AsyncdsError,
    BucketNotFound,
    ConfigurationError,
    DatasetClosed,
    ObjectChanged,
    ObjectNotFound,
    StoreError,
    TransferFailed,
)
from asyncds.manifest import ObjectInfo, normalise_etag
from asyncds.retry import Retry
from asyncds.store.base import Drop, NoParts, Outcome, Page, Reserve, failed, no_bound
from asyncds.store.clients import Clients, has_foreign_handlers
from asyncds.store.connection import Connection
from asyncds.store.integrity import HowVerified, can_verify, compare_md5
from asyncds.store.lean import Credentials, LeanLane, Why
from asyncds.store.masking import hide, said
from asyncds.store.translate import has_expired, status_error, translate
from asyncds.store.wire import Answer, Body, BrokenConnection, Pace

__all__ = ["S3Store"]

_log = logging.getLogger(__name__)
_CHUNK = 1 << 20
_FRESH_S, _STALE_S = 1.0, 60.0
_SIZE = re.compile("[0-9]{1,18}")
_REGION = re.compile("[A-Za-z0-9-]{1,63}")  # what botocore takes for one
_ENCRYPTION = "x-amz-server-side-encryption", "x-amz-server-side-encryption-customer-algorithm"
_ENCRYPTION_BYTES = tuple(name.encode() for name in _ENCRYPTION)
_now_fetching: ContextVar[ObjectInfo | None] = ContextVar("_now_fetching", default=None)
_token_sent: ContextVar[str | None] = ContextVar("_token_sent", default=None)


class S3Store:
    """An `ObjectStore` on S3, MinIO and their like.

    Made anywhere; its clients, connections and credentials come to life on the event loop that first uses it, and
    belong to that loop until `aclose()`, so that it can be forked. Pickles without keys: those of the environment count
    where it is unpickled. `session_factory` is a picklable callable that returns an `aioboto3.Session`
    or an aiobotocore session, which then brings the credentials. Listing and `head` are retried by `retry`; `get` is
    one attempt, and with `verify_md5=True` compares the MD5 of whole bodies with their ETag, where that is one. `lanes`
    counts the GETs that brought something, by lane: "lean", or why it was the full one (`Why`); `on_get` is told of
    each, and how what it brought was verified. With `lean=False` all take the full lane.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        concurrency: int,
        timeout: float,
        retry: Retry,
        session_factory: Callable[[], Any] | None = None,
        lean: bool = True,
        verify_md5: bool = False,
        on_get: Callable[[str, HowVerified], None] | None = None,
    ) -> None:
        self.connection = connection
        self._endpoint = connection.identity
        self.lanes = Counter[str]()
        self._may_be_lean = lean
        self._verify_md5 = verify_md5
        self._on_get = on_get
        self._loop: asyncio.AbstractEventLoop | None = None
        self._concurrency = concurrency
        self._timeout = timeout
        self._retry = retry
        self._session_factory = session_factory
        self._clients: Clients | None = None
        self._client: Any = None
        self._lane: LeanLane | None = None
        self._learning: dict[str, asyncio.Event] = {}
        self._fresh: tuple[Credentials | None, float] | None = None
        self._renewing: asyncio.Task[None] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        options = (self._concurrency, self._timeout, replace(self._retry, on_retry=None), self._session_factory)
        return _rebuild, (self.connection, *options, self._may_be_lean, self._verify_md5)

    def __repr__(self) -> str:
        lean = self.lanes["lean"]
        return f"<S3Store {self.endpoint}: {lean} lean and {self.lanes.total() - lean} full GETs>"

    @property
    def endpoint(self) -> str:
        """The endpoint's identity; all of AWS is one."""
        return self._endpoint

    # the methods of an ObjectStore, and one that asks at once

    async def list(self, bucket: str, prefix: str) -> AsyncGenerator[Sequence[ObjectInfo], None]:
        """Yield pages of up to 1,000 objects, each page retried within the deadline."""
        token, seen = None, set[str]()
        while True:
            page = await self.page(bucket, prefix, token=token)
            yield page.objects
            if page.token is None:
                return
            if page.token in seen:
                what = f"listing s3://{bucket}/{prefix}"
                raise TransferFailed(f"{what}: the store says that there is more, and leads in a circle")
            seen.add(token := page.token)

    async def page(self, bucket: str, prefix: str, *, after: str = "", token: str | None = None) -> Page:
        """Return one page of the listing, which begins behind this key, or where the page before said."""
        what = f"listing s3://{bucket}/{prefix}"
        arguments = {"Bucket": bucket, "Prefix": prefix}
        if token is not None or after:
            arguments |= {"StartAfter": after} if token is None else {"ContinuationToken": token}
        await self._opened(what)
        page = await self._retry(partial(self._page, arguments, what, itertools.count()), what)
        entries = page.get("Contents", ())
        objects = [ObjectInfo(bucket, e["Key"], e["Size"], normalise_etag(e.get("ETag"))) for e in entries]
        token = page.get("NextContinuationToken") if page.get("IsTruncated") else None
        if page.get("IsTruncated") and not token:
            raise TransferFailed(f"{what}: the store says that there is more, and leads in a circle")
        return Page(objects, token)

    async def folders(self, bucket: str, prefix: str) -> Sequence[str]:
        """Return up to 1,000 of the common prefixes up to the next slash."""
        what = f"listing s3://{bucket}/{prefix}"
        arguments = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "/"}
        await self._opened(what)
        page = await self._retry(partial(self._page, arguments, what, itertools.count()), what)
        return [common["Prefix"] for common in page.get("CommonPrefixes", ())]

    async def get(
        self, info: ObjectInfo, reserve: Reserve = no_bound, part: slice | None = None
    ) -> tuple[ObjectInfo, bytes]:
        """Make one attempt to read the object; see `ObjectStore.get`, also for what it raises."""
        return await self._get(info, reserve, part, fresh=False)

    async def again(
        self, info: ObjectInfo, reserve: Reserve = no_bound, part: slice | None = None
    ) -> tuple[ObjectInfo, bytes]:
        """As `get`, where another attempt has failed or is late: over a new connection."""
        return await self._get(info, reserve, part, fresh=True)

    async def _get(
        self, info: ObjectInfo, reserve: Reserve, part: slice | None, *, fresh: bool
    ) -> tuple[ObjectInfo, bytes]:
        await self._opened(info.uri)
        if self._lane is not None:
            await self._turn_to_learn(info.bucket)
        if self._lane is not None and self._lane.knows(info.bucket):
            answer = await self._lean(self._lane, info, reserve, part, fresh=fresh)
            return answer or await self._full(info, reserve, part, "answer", fresh=fresh)
        return await self._full(info, reserve, part, self._why_full(info.bucket), fresh=fresh)

    def ask(self, info: ObjectInfo, outcome: Outcome, until: float) -> Drop | None:
        """Make one attempt to read an object of known size without a task, if that can be done at once.

        It can where the lean lane knows the bucket and has an idle connection: then `outcome` is told, once, and what
        ends the request early is returned. `until` is when the attempt ends, by the loop's clock.
        """
        lane, credentials = self._lane, self._fresh
        if lane is None or credentials is None or self._loop is not asyncio.get_running_loop():
            return None
        if not self._keep_fresh() or not lane.knows(info.bucket):
            return None
        return lane.ask(info, credentials[0], partial(self._answered, lane, info, outcome), until)

    async def head(self, bucket: str, key: str) -> ObjectInfo:
        """Return size and ETag of an object. Raises `ObjectNotFound`, also where the bucket is missing."""
        info = ObjectInfo(bucket, key)
        arguments = {"Bucket": bucket, "Key": key}
        numbers = itertools.count()
        await self._opened(info.uri)
        answer = await self._retry(
            lambda _: self._asked("head_object", arguments, info.uri, anew=next(numbers) > 0), info.uri
        )
        return ObjectInfo(bucket, key, answer["ContentLength"], normalise_etag(answer.get("ETag")))

    async def aclose(self) -> None:
        """Close all connections. The store can be used again after that, also on another loop."""
        clients, lane = self._clients, self._lane
        self._loop = self._clients = self._client = self._lane = self._fresh = None
        if self._renewing is not None:
            self._renewing.cancel()
        if lane is not None:
            await lane.aclose()
        if clients is not None:
            await clients.aclose()

    # the two lanes

    def _why_full(self, bucket: str) -> Why:
        if not self._may_be_lean:
            return "off"
        return "request" if self._lane is None else self._lane.why_not(bucket)

    def _count(self, lane: str, verified: HowVerified) -> None:
        self.lanes[lane] += 1
        try:
            if self._on_get is not None:
                self._on_get(lane, verified)
        except Exception:  # whoever waits for the object must not come to harm by that
            _log.exception("a GET could not be counted")

    async def _lean(
        self, lane: LeanLane, info: ObjectInfo, reserve: Reserve, part: slice | None, *, fresh: bool
    ) -> tuple[ObjectInfo, bytes] | None:
        """One GET on the lean lane, or None where the full lane has to look at what is the matter."""
        try:
            credentials = await self._credentials()
            if not lane.knows(info.bucket):  # any more
                return None
            answer = await lane.get(info, credentials, reserve, part, fresh=fresh)
            if answer.whole:
                return self._served(info, answer, part), answer.body
        except Exception as error:
            raise self._explained(error, info.uri) from error
        if answer.status == 429 or answer.status >= 500:
            raise self._refusal(answer, info)
        return None

    def _served(self, info: ObjectInfo, answer: Answer, part: slice | None = None) -> ObjectInfo:
        """What a whole answer says that it carries, verified."""
        etag, size = normalise_etag(answer.headers.get(b"etag", b"").decode("latin-1")), len(answer.body)
        _same_version(info, etag)
        if part is not None:
            size = _whole_size(answer.headers.get(b"content-range", b"").decode("latin-1"), part, info)
        verified: HowVerified = "checksum" if answer.checked else "length_etag"
        if self._verify_md5 and part is None and not answer.checked:
            encryption, customer_key = (answer.headers.get(name, b"").decode("latin-1") for name in _ENCRYPTION_BYTES)
            if compare_md5(info.uri, etag, encryption, customer_key, answer.body):
                verified = "etag_md5"
        self._count("lean", verified)
        return ObjectInfo(info.bucket, info.key, size, etag)

    def _answered(self, lane: LeanLane, info: ObjectInfo, outcome: Outcome, answer: Answer | BaseException) -> None:
        served: ObjectInfo | None = None
        if not isinstance(answer, BaseException):
            try:
                answer = lane.judged(info.bucket, answer)
                served = self._served(info, answer) if answer.whole else None
            except Exception as error:
                answer = error
        if isinstance(answer, BrokenConnection) and answer.untouched:
            outcome.otherwise(partial(self.again, info))  # it was closed while it was idle
        elif isinstance(answer, Exception):
            outcome.otherwise(failed(self._explained(answer, info.uri)))
        elif isinstance(answer, BaseException):
            outcome.otherwise(failed(answer))
        elif served is not None:
            outcome.came(served, answer.body)
        elif answer.status == 429 or answer.status >= 500:
            outcome.otherwise(failed(self._refusal(answer, info)))
        else:
            outcome.otherwise(partial(self._full, info, no_bound, None, "answer"))

    async def _full(
        self, info: ObjectInfo, reserve: Reserve, part: slice | None, why: Why, *, fresh: bool = False
    ) -> tuple[ObjectInfo, bytes]:
        arguments = {"Bucket": info.bucket, "Key": info.key}
        if info.etag is not None:
            arguments["IfMatch"] = f'"{info.etag}"'
        if part is not None:
            arguments["Range"] = f"bytes={part.start}-{part.stop - 1}"
        reset = _now_fetching.set(info)
        try:
            async with asyncio.timeout(2 * self._timeout):  # to connect, and to answer: a head may drip, too
                answer = await self._send("get_object", arguments, info.uri, anew=fresh)
            stream = answer["Body"]
            async with stream:  # from here on, whatever it is: else its connection is held until it is collected
                served = normalise_etag(answer.get("ETag"))
                _same_version(info, served)
                size, expected = info.size, info
                if part is not None:
                    size = _whole_size(answer.get("ContentRange", ""), part, info)
                    expected = info._replace(size=part.stop - part.start)
                body = await self._read(stream, expected, answer, reserve)
                # botocore compares a checksum while it is read: with a stream of its own, if it knows the algorithm.
                verified: HowVerified = "checksum" if "Checksum" in type(stream).__name__ else "length_etag"
                if self._verify_md5 and part is None and verified != "checksum":
                    headers = answer["ResponseMetadata"]["HTTPHeaders"]
                    encryption, customer_key = (headers.get(name, "") for name in _ENCRYPTION)
                    if compare_md5(info.uri, served, encryption, customer_key, body):
                        verified = "etag_md5"
        except Exception as error:
            raise self._explained(error, info.uri) from error
        finally:
            _now_fetching.reset(reset)
            self._let_others_go(info.bucket)
        self._count(why, verified)
        return ObjectInfo(info.bucket, info.key, len(body) if part is None else size, served), body

    async def _read(self, stream: Any, info: ObjectInfo, answer: dict[str, Any], reserve: Reserve) -> bytes:
        """The whole body, and never more than one byte above the size that is known."""
        announced = answer["ResponseMetadata"]["HTTPHeaders"].get("content-length")
        size = info.size if info.size is not None else announced and int(announced)
        if size is None:
            raise TransferFailed(f"{info.uri}: the answer does not say how long it is")
        if announced is not None and int(announced) != size:
            raise TransferFailed(f"{info.uri}: {announced} bytes are announced, {size} were listed")
        if info.size is None:
            reserve(int(size))
        body, pace, now = Body(int(size)), Pace(self._timeout), asyncio.get_running_loop().time
        pace.begin(now())
        while body.missing >= 0:
            async with asyncio.timeout(self._timeout):  # the framing of chunks may drip, too, and is no progress
                chunk = await stream.read(min(body.missing + 1, _CHUNK))
            if not chunk:
                break
            body.append(chunk)
            pace.came(len(chunk), now())
            if body.missing > 0 and (fault := pace.fault(now())):
                raise BrokenConnection(fault)
        if body.missing != 0:
            raise TransferFailed(f"{info.uri}: {int(size) - body.missing} bytes arrived, {size} were expected")
        return body.whole()

    async def _turn_to_learn(self, bucket: str) -> None:
        """Let the first object of a bucket go ahead, until its request is prepared: the others repeat it."""
        event = self._learning.get(bucket)
        if event is None:
            self._learning[bucket] = asyncio.Event()
        else:
            await event.wait()

    def _let_others_go(self, bucket: str) -> None:
        if bucket in self._learning:
            self._learning[bucket].set()

    async def _learn(self, request: Any, **_: Any) -> None:
        info = _now_fetching.get()
        if info is not None:
            if self._lane is not None:
                self._lane.learn(info.bucket, info.key, request, await self._credentials())
            self._let_others_go(info.bucket)

    async def _credentials(self) -> Credentials | None:
        """What botocore's provider chain holds now, refreshed by it when due."""
        provider, found = self._client._request_signer._credentials, None
        if provider is not None:
            frozen = await provider.get_frozen_credentials()
            found = Credentials(frozen.access_key, frozen.secret_key, frozen.token)
            hide(filter(None, (frozen.secret_key, frozen.token)))
        if self._fresh is not None and found == self._fresh[0]:
            found = self._fresh[0]  # the same object: nothing has to be prepared anew
        self._fresh = found, asyncio.get_running_loop().time()
        return found

    def _keep_fresh(self) -> bool:
        """Look after the credentials that `ask` uses once a second; tell whether they may be used meanwhile."""
        assert self._fresh is not None
        age = asyncio.get_running_loop().time() - self._fresh[1]
        if age > _FRESH_S and (self._renewing is None or self._renewing.done()):
            self._renewing = asyncio.create_task(self._renew())
        return age < _STALE_S

    async def _renew(self) -> None:
        try:
            await self._credentials()
        except Exception:  # the next one who needs them learns why
            self._fresh = None

    async def _renew_what_has_expired(self, response: Any, attempts: int, **_: Any) -> int | None:
        """Have a request sent again, and signed anew, if the store says that its token has expired, and there is one
        that has not: botocore renews what is due by its own clock, and nothing else."""
        if response is None or attempts > 1 or not has_expired(response[1]):
            return None
        provider = self._client._request_signer._credentials
        renew, lock = getattr(provider, "_protected_refresh", None), getattr(provider, "_refresh_lock", None)
        if renew is None or lock is None:  # keys that nobody renews
            return None
        async with lock:  # of many requests in flight, the first renews for all
            if provider._token == _token_sent.get():
                await renew(is_mandatory=True)
        self._fresh = None
        return 0

    def _explained(self, error: Exception, what: str) -> AsyncdsError:
        return translate(error, what, self.connection.hint, self._where)

    def _refusal(self, answer: Answer, info: ObjectInfo) -> AsyncdsError:
        after = answer.headers.get(b"retry-after", b"").decode("latin-1")
        return status_error(answer.status, "", info.uri, where=self._where, retry_after=after)

    @property
    def _where(self) -> str:
        return self.connection.endpoint or "AWS"

    # the client

    async def _page(self, arguments: dict[str, str], what: str, numbers: Iterator[int], _clock: object) -> Any:
        try:
            page = await self._asked("list_objects_v2", arguments, what, anew=next(numbers) > 0)
        except ObjectNotFound:  # a 404 that does not say NoSuchBucket
            raise BucketNotFound(f"{what}: {self._where} is no S3 server (404); check the endpoint") from None
        if "IsTruncated" not in page:  # botocore takes any page of HTML for a listing of nothing
            raise TransferFailed(f"{what}: the answer is no listing").because("check that the endpoint is an S3 server")
        return page

    async def _asked(self, method: str, arguments: dict[str, str], what: str, *, anew: bool = False) -> Any:
        try:
            return await self._send(method, arguments, what, anew=anew)
        except Exception as error:
            raise self._explained(error, what) from error

    async def _send(self, method: str, arguments: dict[str, str], what: str, *, anew: bool) -> Any:
        """Have a client send a request: over a connection of its own, unless no descriptor is left for one."""
        clients = self._clients
        if clients is None:
            raise DatasetClosed(f"{what}: the store was closed meanwhile")
        if anew:
            try:
                return await getattr(await clients.client(anew=True), method)(**arguments)
            except (BotoCoreError, OSError) as error:
                inner = getattr(error, "kwargs", {}).get("error", error)
                if getattr(inner, "errno", None) not in (errno.EMFILE, errno.ENFILE):
                    raise
        return await getattr(await clients.client(), method)(**arguments)

    async def _opened(self, what: str) -> None:
        if self._loop is not asyncio.get_running_loop():  # another process's, after a fork, or another life
            self._loop = asyncio.get_running_loop()
            self._learning = {}
            self._client = self._lane = self._fresh = self._renewing = None
            self._clients = Clients(
                self.connection,
                concurrency=self._concurrency,
                connect_timeout=min(self._timeout, self._retry.first_contact),
                read_timeout=self._timeout,
                session_factory=self._session_factory,
                prepare=self._prepare,
            )
        clients = self._clients
        if self._client is not None or clients is None:
            return
        try:
            client = await clients.client()
            if self._clients is not clients:
                raise DatasetClosed("the store was closed meanwhile")
            if self._client is None:
                self._lane = _lean_lane(client, self._timeout) if self._may_be_lean else None
                self._client = client
        except Exception as error:
            raise self._explained(error, what) from error

    def _prepare(self, client: Any) -> None:
        events = client.meta.events
        events.register("before-send.s3.GetObject", self._learn)
        events.register("before-send.s3", _note_token)
        events.register("needs-retry.s3", self._renew_what_has_expired)
        if self.connection.endpoint is not None:
            events.register_first("needs-retry.s3", _refuse_wrong_region)
        else:
            events.register_first("needs-retry.s3", _refuse_odd_region)


def _same_version(info: ObjectInfo, etag: str | None) -> None:
    if etag is None:
        raise TransferFailed(f"{info.uri}: the answer has no ETag: it does not come from S3")
    if info.etag is not None and etag != info.etag:
        raise ObjectChanged(f"{info.uri}: its ETag is {said(etag)}, not {info.etag}")


def _whole_size(content_range: str, part: slice, info: ObjectInfo) -> int:
    """The size of the object of which this is the part that was asked for."""
    span, _, size = content_range.removeprefix("bytes ").partition("/")
    if not content_range:
        raise NoParts(f"{info.uri}: the store sends whole objects only")
    if span != f"{part.start}-{part.stop - 1}" or not _SIZE.fullmatch(size):
        raise TransferFailed(f"{info.uri}: another part arrived than was asked for ({said(content_range)})")
    return int(size)


def _rebuild(
    connection: Connection,
    concurrency: int,
    timeout: float,
    retry: Retry,
    session_factory: Callable[[], Any] | None,
    lean: bool,
    verify_md5: bool,
) -> S3Store:
    return S3Store(
        connection,
        concurrency=concurrency,
        timeout=timeout,
        retry=retry,
        session_factory=session_factory,
        lean=lean,
        verify_md5=verify_md5,
    )


def _lean_lane(client: Any, timeout: float) -> LeanLane | None:
    """A lane that trusts whom the client trusts, or None where the client goes out in a way it does not know."""
    if has_foreign_handlers(client) or not can_verify():
        return None
    config, verify = client.meta.config, getattr(client._endpoint.http_session, "_verify", None)
    if config.proxies or get_environ_proxies(client.meta.endpoint_url) or config.client_cert:
        return None
    if verify is not True and not isinstance(verify, str):
        return None
    if (getattr(config, "connector_args", None) or {}).keys() - {"keepalive_timeout"}:  # a resolver of the user's, say
        return None
    return LeanLane(timeout=timeout, tls=lambda: ssl.create_default_context(cafile=get_cert_path(verify)))


def _note_token(request: Any, **_: Any) -> None:
    token = request.headers.get("X-Amz-Security-Token")
    _token_sent.set(text := token.decode() if isinstance(token, bytes) else token)
    if text:
        hide([text])


def _refuse_wrong_region(response: Any, request_dict: dict[str, Any], **_: Any) -> None:
    """Name the right region instead of letting botocore ask twice for every first request."""
    if response is None:
        return
    answer, told = response[0], next(iter(_regions_told(response[1])), None)
    ours = request_dict.get("context", {}).get("signing", {}).get("region")
    if answer.status_code in (301, 302, 307, 400) and told and told != ours:
        told = said(told)
        raise ConfigurationError(f"region {ours!r} is wrong: the endpoint expects {told!r}; set AWS_REGION={told}")


def _refuse_odd_region(response: Any, **_: Any) -> None:
    """botocore makes a host's name of it, older ones whatever it is, and sends a signed request there."""
    for told in _regions_told(response[1]) if response is not None else ():
        if not _REGION.fullmatch(told):
            raise StoreError(f"the bucket is said to be in the region {said(told)!r}: refused; check the endpoint")


def _regions_told(parsed: dict[str, Any]) -> list[str]:
    """What an answer says of the bucket's region."""
    header = parsed.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region")
    return [told for told in (parsed.get("Error", {}).get("Region"), header) if told]
