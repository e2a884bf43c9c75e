"""Stores: one contract for the fake and for real servers, on both lanes; and whatever a server or network may do."""

import asyncio
import base64
import datetime
import errno
import functools
import gzip
import hashlib
import os
import re
import socket
import ssl
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import aiobotocore.session
import aiohttp
import aiohttp.abc
import botocore.session
import pytest
from aiobotocore.config import AioConfig
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest, AWSResponse
from botocore.config import Config
from botocore.credentials import Credentials as BotocoreCredentials
from botocore.utils import percent_encode
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncds.download import verify
from asyncds.errors import (
    AccessDenied,
    AsyncdsError,
    BucketNotFound,
    ConfigurationError,
    DeadlineExceeded,
    EndpointUnreachable,
    ObjectChanged,
    ObjectNotFound,
    StoreError,
    TransferFailed,
)
from asyncds.fetcher import Fetcher
from asyncds.manifest import ObjectInfo
from asyncds.retry import Retry
from asyncds.settings import Settings
from asyncds.store import Connection, ObjectStore, S3Store
from asyncds.store.clients import Clients
from asyncds.store.lean import Credentials, Template
from asyncds.testing import FakeStore, Fault, S3Server, local_s3

ACCESS_KEY, SECRET_KEY, TOKEN = "AKIAEXAMPLE", "canary-of-the-secret-key", "canary-of-the-token"
BODY = hashlib.shake_128(b"body").digest(10_000)
SMALL = hashlib.shake_128(b"small").digest(100)


def connection_to(endpoint, **options):
    values = {"region": "us-east-1", "access_key": ACCESS_KEY, "secret_key": SECRET_KEY, "path_style": True}
    return Connection("AWS", **(values | {"endpoint": endpoint} | options))


@asynccontextmanager
async def opened(connection, *, concurrency=8, timeout=5.0, retry=None, session_factory=None):
    retry = retry or Retry(0, deadline=20, first_contact=5)
    store = S3Store(connection, concurrency=concurrency, timeout=timeout, retry=retry, session_factory=session_factory)
    try:
        yield store
    finally:
        await store.aclose()


async def listed(store, bucket, prefix=""):
    return [info async for page in store.list(bucket, prefix) for info in page]


def certificate(path, name):
    """Write key and self-signed certificate of a host."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), 1)
    builder = builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), False)
    signed = builder.add_extension(x509.BasicConstraints(True, None), True).sign(key, hashes.SHA256())
    plain = serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    path.write_bytes(signed.public_bytes(serialization.Encoding.PEM) + private)
    return path


@pytest.fixture(scope="module")
def authorities(tmp_path_factory):
    return certificate(tmp_path_factory.mktemp("tls") / "authorities.pem", "authority.example")


@pytest.fixture(autouse=True)
def few_authorities(authorities, monkeypatch):
    """Trust one authority and not the world's, which take each client a tenth of a second to read."""
    monkeypatch.setenv("AWS_CA_BUNDLE", os.fspath(authorities))


# one contract


@dataclass
class Backend:
    """A running server, or the fake; `bucket` holds what tests put."""

    kind: str
    endpoint: str = ""
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY
    bucket: str = "contract"
    fake: dict[tuple[str, str], bytes] = field(default_factory=dict)
    server: S3Server | None = None

    @functools.cached_property
    def client(self):
        config = Config(
            s3={"addressing_style": "path"},
            connect_timeout=5,
            read_timeout=5,
            retries={"total_max_attempts": 1},
        )
        client = botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=config,
        )
        client.meta.events.register("before-send.s3.PutObject", _expect_nothing)
        client.create_bucket(Bucket=self.bucket)
        return client

    def put(self, objects):
        if self.kind == "fake":
            self.fake |= {(self.bucket, key): body for key, body in objects.items()}
        elif self.server is not None:
            self.server.put_many(self.bucket, objects)
        else:
            client = self.client
            with ThreadPoolExecutor(8) as threads:
                list(
                    threads.map(lambda key: client.put_object(Bucket=self.bucket, Key=key, Body=objects[key]), objects)
                )

    @property
    def connection(self):
        return connection_to(self.endpoint, access_key=self.access_key, secret_key=self.secret_key)

    @asynccontextmanager
    async def store(self, **options):
        if self.kind == "fake":
            yield FakeStore(self.fake)
        else:
            async with opened(self.connection, **options) as store:
                yield store


def _expect_nothing(request, **_):
    """Old botocore loses track of rclone's answers when it waits for "100 Continue" before it sends no body."""
    if "Expect" in request.headers:
        del request.headers["Expect"]


@pytest.fixture(scope="module", params=["fake", "server", "moto", "rclone", "minio"])
def backend(request):
    kind = request.param
    if kind == "fake":
        yield Backend(kind)
    elif kind == "server":
        with S3Server() as server:
            yield Backend(kind, server.endpoint, server=server)
    else:
        try:
            server = local_s3(kind)
            running = server.__enter__()
        except ConfigurationError as missing:
            pytest.skip(str(missing))
        yield Backend(kind, running.endpoint, running.access_key, running.secret_key)
        server.__exit__(None, None, None)


@pytest.fixture
def real(backend):
    """As `backend`, without the fake."""
    if backend.kind == "fake":
        pytest.skip("the fake has no lanes")
    return backend


async def test_store_is_an_object_store(backend):
    async with backend.store() as store:
        assert isinstance(store, ObjectStore)
        assert store.endpoint == (backend.endpoint or "fake://store")


async def test_listing_is_complete_over_pages(backend):
    if backend.kind == "moto":
        pytest.skip("moto takes too long to fill")
    bodies = {f"many/{number:04}": b"x" * (number % 7) for number in range(1001)}
    backend.put(bodies)
    async with backend.store() as store:
        infos = await listed(store, backend.bucket, "many/")
        assert {info.key: info.size for info in infos} == {key: len(body) for key, body in bodies.items()}
        assert len(infos) == 1001
        assert [len(page) async for page in store.list(backend.bucket, "many/")] == [1000, 1]
        assert infos[7] == await store.head(backend.bucket, infos[7].key)


async def test_prefix_is_exact(backend):
    backend.put(dict.fromkeys(["p/a/1", "p/a/2", "p/ab/1", "p/A/1", "p/b"], b"x"))
    expected = {
        "p/a/": ["p/a/1", "p/a/2"],
        "p/a": ["p/a/1", "p/a/2", "p/ab/1"],
        "p/b": ["p/b"],
        "p/": ["p/A/1", "p/a/1", "p/a/2", "p/ab/1", "p/b"],
        "p/none/": [],
    }
    async with backend.store() as store:
        found = {prefix: sorted([i.key for i in await listed(store, backend.bucket, prefix)]) for prefix in expected}
    assert found == expected


ODD_KEYS = {
    "space": "odd/with space",
    "plus": "odd/a+b",
    "percent": "odd/100%",
    "escaped": "odd/%2e%2E%",
    "double slash": "odd/a//b",
    "dots": "odd/a/../b",
    "only dots": "..",
    "leading slash": "/odd",
    "nfc": "odd/\u00e9",
    "nfd": "odd/e\u0301",
    "emoji": "odd/😀",
    "xml": "odd/&<>\"'",
    "query": "odd/q?a=b#c",
    "punctuation": "odd/~a=b;c,d@e:f!$()*[]{}|^`",
    "newline": "odd/new\nline",
    "long": "odd/" + "k" * 1000,
}
NOT_STORED = {  # by the server itself, whoever asks
    "moto": {"newline"},
    "rclone": {"double slash", "dots", "only dots", "leading slash", "long"},
    "minio": {"double slash", "dots", "only dots", "leading slash", "newline", "long"},
}


@pytest.mark.lean
@pytest.mark.parametrize("oddity", ODD_KEYS)
async def test_odd_key_is_one_key_on_both_lanes(backend, oddity):
    if oddity in NOT_STORED.get(backend.kind, ()):
        pytest.skip(f"{backend.kind} stores no such key")
    key = ODD_KEYS[oddity]
    backend.put({key: key.encode(), "odd/other": b"other"})
    async with backend.store() as store:
        (info,) = [info for info in await listed(store, backend.bucket, key) if info.key == key]
        assert await store.head(backend.bucket, key) == info
        for _ in range(2):
            assert await store.get(info) == (info, key.encode())
        if backend.kind != "fake":
            assert store.lanes == {"lean": 1, "first": 1}


@pytest.mark.parametrize("size", [0, 1, 300_000])
async def test_every_size_arrives_whole_on_both_lanes(backend, size):
    body = hashlib.shake_128(b"%d" % size).digest(size)
    backend.put({f"size/{size}": body})
    async with backend.store() as store:
        info = await store.head(backend.bucket, f"size/{size}")
        assert (info.size, info.etag) == (size, hashlib.md5(body).hexdigest())
        unlisted = ObjectInfo(info.bucket, info.key)
        for asked in (info, info, unlisted):
            assert await store.get(asked) == (info, body)


@pytest.mark.parametrize("warmed", [False, True])
async def test_overwritten_object_is_never_taken_for_the_old_one(backend, warmed):
    backend.put({"version": b"old", "other": b"other"})
    async with backend.store() as store:
        old = await store.head(backend.bucket, "version")
        backend.put({"version": b"new"})
        if warmed:
            await store.get(ObjectInfo(backend.bucket, "other"))
        with pytest.raises(ObjectChanged):  # some servers ignore If-Match: then the answer's ETag tells
            verify(old, *await store.get(old))
        assert (await store.get(await store.head(backend.bucket, "version")))[1] == b"new"


@pytest.mark.parametrize("warmed", [False, True])
async def test_what_is_missing_says_so(backend, warmed):
    backend.put({"there": b"x"})
    async with backend.store() as store:
        if warmed:
            await store.get(ObjectInfo(backend.bucket, "there"))
        with pytest.raises(ObjectNotFound, match=f"^s3://{backend.bucket}/not there: "):
            await store.get(ObjectInfo(backend.bucket, "not there"))
        with pytest.raises(ObjectNotFound, match=f"^s3://{backend.bucket}/not there: "):
            await store.head(backend.bucket, "not there")
        with pytest.raises(BucketNotFound):
            await store.get(ObjectInfo("no-such-bucket", "key"))
        with pytest.raises(BucketNotFound):
            await listed(store, "no-such-bucket")


@pytest.mark.lean
async def test_second_get_of_a_bucket_takes_the_lean_lane(real):
    real.put({f"lane/{number}": b"%d" % number for number in range(30)})
    async with real.store() as store:
        infos = await listed(store, real.bucket, "lane/")
        answers = await asyncio.gather(*(store.get(info) for info in infos))
        assert answers == [(info, info.key.removeprefix("lane/").encode()) for info in infos]
        assert store.lanes == {"lean": 29, "first": 1}
        assert repr(store) == f"<S3Store {real.endpoint}: 29 lean and 1 full GETs>"


@pytest.mark.lean
async def test_store_can_be_used_again_after_it_was_closed(real):
    real.put({"again": b"x"})
    async with real.store() as store:
        for _ in range(2):
            for _ in range(2):
                assert (await store.get(ObjectInfo(real.bucket, "again")))[1] == b"x"
            await store.aclose()
        assert store.lanes == {"lean": 2, "first": 2}


async def test_wrong_credentials_are_refused_where_they_are_checked(real):
    if real.kind in ("server", "moto"):
        pytest.skip(f"{real.kind} checks no signature")
    real.put({"secret": b"x"})
    wrong = replace(real.connection, secret_key="canary-of-a-wrong-key", hint="check THIS")
    async with opened(wrong) as store:
        with pytest.raises(AccessDenied, match=r"SignatureDoesNotMatch.*check THIS") as caught:
            await store.get(ObjectInfo(real.bucket, "secret"))
        assert "canary" not in str(caught.value)
        with pytest.raises(AccessDenied, match=r"SignatureDoesNotMatch.*check THIS"):
            await listed(store, real.bucket)


def aiobotocore_session(access_key, secret_key):
    session = aiobotocore.session.AioSession()
    session.set_credentials(access_key, secret_key)
    return session


def aioboto3_session(access_key, secret_key):
    import aioboto3

    return aioboto3.Session(aws_access_key_id=access_key, aws_secret_access_key=secret_key, region_name="us-east-1")


@pytest.mark.lean
@pytest.mark.parametrize("make", [aiobotocore_session, aioboto3_session])
async def test_session_of_the_user_brings_its_own_credentials(real, make):
    if make is aioboto3_session:
        pytest.importorskip("aioboto3")
    real.put({"mine": b"x"})
    connection = replace(real.connection, access_key="WRONG", secret_key="wrong")
    factory = functools.partial(make, real.access_key, real.secret_key)
    async with opened(connection, session_factory=factory) as store:
        for _ in range(2):
            assert (await store.get(ObjectInfo(real.bucket, "mine")))[1] == b"x"
        assert store.lanes == {"lean": 1, "first": 1}


async def test_pages_are_read_without_dates_and_those_of_other_clients_as_botocore_does(s3, monkeypatch):
    session = aiobotocore.session.AioSession()
    monkeypatch.setattr(Clients, "_own_session", lambda _: session)
    s3.put("mnist", "k", b"x")
    async with opened(connection_to(s3.endpoint)) as store:
        assert [info.key for info in await listed(store, "mnist")] == ["k"]
        (entry,) = (await store._client.list_objects_v2(Bucket="mnist"))["Contents"]
        assert entry.keys() == {"Key", "Size", "ETag"}
        async with session.create_client("s3", endpoint_url=s3.endpoint) as other:
            page = await other.list_objects_v2(Bucket="mnist")
            assert isinstance(page["Contents"][0]["LastModified"], datetime.datetime)


@pytest.mark.lean
async def test_unsigned_requests_carry_no_credentials():
    with S3Server() as server, S3Server(credentials=(ACCESS_KEY, SECRET_KEY)) as closed:
        for place in (server, closed):
            place.put("b", "k", b"x")
        async with opened(connection_to(server.endpoint, access_key=None, secret_key=None, unsigned=True)) as store:
            for _ in range(2):
                assert (await store.get(ObjectInfo("b", "k")))[1] == b"x"
            assert store.lanes == {"lean": 1, "first": 1}
        async with opened(connection_to(closed.endpoint, access_key=None, secret_key=None, unsigned=True)) as store:
            with pytest.raises(AccessDenied):
                await store.get(ObjectInfo("b", "k"))


# the lean lane's request is botocore's

UTF8 = st.characters(codec="utf-8")
KEYS = st.text(UTF8, min_size=1, max_size=60) | st.sampled_from(
    [*ODD_KEYS.values(), ".", "a/.", "//", "~", "a/b" * 300]
)
TOKENS = st.none() | st.text("abcXYZ0189+/=%", min_size=1, max_size=200)
ETAGS = st.none() | st.text("0123456789abcdef-", min_size=1, max_size=40)
SECRETS = st.text("abcXYZ019+/", min_size=1, max_size=40)
BASES = ["http://127.0.0.1:9000/b/", "https://b.s3.eu-west-1.amazonaws.com/", "https://minio.example/deep/path/b/"]
NOT_COMPARED = ("amz-sdk-", "user-agent", "accept-encoding")


def parsed(request):
    """Path and headers of a request on the wire; fails for what is not a GET with each header once."""
    head, _, rest = request.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    method, path, version = first.split(" ")
    headers = [line.split(": ", 1) for line in lines]
    assert (method, version, rest, len(dict(headers))) == ("GET", "HTTP/1.1", b"", len(headers))
    return path, {name: value for name, value in headers if not name.startswith(NOT_COMPARED)}


def signed_by_botocore(base, key, etag, region, credentials, *, stamp="20260228T235959Z", part=None, extra=()):
    """URL and headers of a GET, prepared and signed by botocore alone."""
    request = AWSRequest("GET", base + percent_encode(key, safe="/~"), headers=dict(extra))
    request.context.update(client_config=Config(s3={"payload_signing_enabled": False}), timestamp=stamp)
    if etag is not None:
        request.headers["If-Match"] = f'"{etag}"'
    if part is not None:
        request.headers["Range"] = f"bytes={part.start}-{part.stop - 1}"
    auth = S3SigV4Auth(BotocoreCredentials(*credentials), "s3", region)
    auth._modify_request_before_signing(request)  # as `add_auth` does, at another time than now
    text = auth.string_to_sign(request, auth.canonical_request(request))
    auth._inject_signature_to_request(request, auth.signature(text, request))
    prepared = request.prepare()
    host = prepared.url.split("/")[2]
    return prepared.url, {"host": host} | {name.lower(): value for name, value in prepared.headers.items()}


EXTRAS = st.dictionaries(
    st.sampled_from(["x-amz-request-payer", "x-amz-expected-bucket-owner", "x-amz-checksum-mode", "X-Odd"])
    | st.sampled_from([f"x-amz-server-side-encryption-customer-{name}" for name in ("algorithm", "key", "key-MD5")]),
    st.sampled_from(["requester", "ENABLED", "123456789012", "AES256", "a+b/c==", "100%", "%s", "%(x)d"]),
)
PARTS = st.none() | st.builds(lambda start, size: slice(start, start + size), st.integers(0), st.integers(1))
STAMPS = st.just("20260228T235959Z") | st.datetimes(datetime.datetime(2000, 1, 1), datetime.datetime(2099, 1, 1)).map(
    lambda moment: moment.strftime("%Y%m%dT%H%M%SZ")
)
REGIONS = st.sampled_from(["us-east-1", "eu-west-1", "cn-north-1", "us-gov-west-1", "garage", "a b", "100%s"])
ASKED = st.tuples(KEYS, ETAGS, SECRETS, TOKENS, STAMPS, PARTS)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(BASES), REGIONS, KEYS, ETAGS, PARTS, EXTRAS, st.lists(ASKED, min_size=1, max_size=3))
def test_lean_request_is_what_botocore_would_sign(base, region, learnt, learnt_etag, learnt_part, extra, asked):
    signed = functools.partial(signed_by_botocore, base, region=region, extra=extra)
    first = signed(learnt, learnt_etag, credentials=("OLD", "old", "old"), part=learnt_part)
    template = Template(*_swap(learnt, first))
    for key, etag, secret, token, stamp, part in [*asked, *asked]:
        url, expected = signed(key, etag, credentials=("AK%IA", secret, token), stamp=stamp, part=part)
        path, headers = parsed(template.request(key, etag, Credentials("AK%IA", secret, token), stamp, part))
        assert (url.partition("/")[0] + "//" + headers["host"] + path, headers) == (url, expected)


@pytest.mark.parametrize("name", ["X-Amzn-Trace-Id", "traceparent"])
def test_what_botocore_says_of_one_request_and_does_not_sign_is_not_repeated(name):
    signed = functools.partial(signed_by_botocore, BASES[0], "k", None, "us-east-1", ("AKIA", "secret", None))
    url, learnt = signed(extra={name: "of-the-first", "x-amz-request-payer": "requester"})
    if name.lower() in learnt["authorization"]:
        pytest.skip(f"this version of botocore signs {name}")
    path, headers = parsed(
        Template(url, "k", learnt).request("k", None, Credentials("AKIA", "secret", None), learnt["x-amz-date"])
    )
    assert (path, headers) == ("/b/k", signed(extra={"x-amz-request-payer": "requester"})[1])


def _swap(key, signed):
    url, headers = signed
    return url, key, headers


@settings(max_examples=30, deadline=None)
@given(KEYS, SECRETS, TOKENS)
def test_signature_that_cannot_be_reproduced_is_noticed(key, secret, token):
    url, headers = signed_by_botocore(BASES[0], key, None, "us-east-1", ("AKIA", secret, token))
    template, path = Template(url, key, headers), url.removeprefix("http://127.0.0.1:9000")
    assert template.reproduces(headers, path, Credentials("AKIA", secret, token))
    assert not template.reproduces(headers, path + "x", Credentials("AKIA", secret, token))
    assert not template.reproduces(headers, path, Credentials("AKIA", secret + "x", token))
    assert not template.reproduces(headers, path, None)


@functools.cache
def capturing_client(style, token):
    """A real client whose requests go nowhere: `requests` collects them as they would be sent."""
    endpoint = "http://127.0.0.1:9000" if style == "path" else None
    client = botocore.session.Session().create_client(
        "s3",
        endpoint_url=endpoint,
        region_name="eu-west-1",
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        aws_session_token=token,
        config=Config(s3={"addressing_style": style}),
    )
    requests: list[Any] = []

    def capture(request, **_):
        requests.append(request)

        class Raw:
            def stream(self, **_):
                return iter([b""])

        return AWSResponse(request.url, 200, {}, Raw())

    client.meta.events.register("before-send.s3.GetObject", capture)
    return client, requests


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "RequestPayer": st.just("requester"),
        "ExpectedBucketOwner": st.just("123456789012"),
        "ChecksumMode": st.just("ENABLED"),
    },
)
OWN_KEY = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": "k" * 32}  # is sent over TLS only


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["path", "virtual"]),
    st.sampled_from([None, TOKEN]),
    KEYS,
    KEYS,
    ETAGS,
    PARTS,
    OPTIONS,
    st.booleans(),
)
def test_lean_request_is_what_a_client_would_send(style, token, learnt, key, etag, part, options, encrypted):
    client, requests = capturing_client(style, token)
    del requests[:]
    options = options | (OWN_KEY if encrypted and style == "virtual" else {})
    conditions = {} if etag is None else {"IfMatch": f'"{etag}"'}
    if part is not None:
        conditions["Range"] = f"bytes={part.start}-{part.stop - 1}"
    client.get_object(Bucket="bucket", Key=learnt, **options)
    client.get_object(Bucket="bucket", Key=key, **options, **conditions)
    first, second = ({name.lower(): _text(value) for name, value in r.headers.items()} for r in requests)
    template = Template(requests[0].url, learnt, first)
    request = template.request(key, etag, Credentials(ACCESS_KEY, SECRET_KEY, token), second["x-amz-date"], part)
    path, headers = parsed(request)
    assert requests[1].url.endswith(headers["host"] + path)
    assert second.pop("host", headers["host"]) == headers.pop("host")  # awscrt, where it is installed, names it
    assert headers == {name: value for name, value in second.items() if not name.startswith(NOT_COMPARED)}


def _text(value):
    return value.decode() if isinstance(value, bytes) else value


def test_etag_cannot_smuggle_a_header():
    url, headers = signed_by_botocore(BASES[0], "k", None, "us-east-1", ("AKIA", "secret", None))
    template = Template(url, "k", headers)
    try:
        request = template.request("k", 'x"\r\nx-evil: "1', Credentials("AKIA", "secret", None), "20260101T000000Z")
    except ValueError:
        return
    assert "x-evil" not in parsed(request)[1]


# faults, through fetcher and store


@asynccontextmanager
async def fetching(endpoint, *, retries=5, deadline=20.0, first_contact=5.0, **options):
    """A fetcher without a cache; `fetcher.told` collects a mark for each retry."""
    told: list[str] = []
    retry = Retry(retries, deadline, first_contact, on_retry=lambda: told.append("retry"))
    connection = options.pop("connection", None) or connection_to(endpoint, session_token=TOKEN)
    async with (
        opened(connection, retry=retry, **options) as store,
        Fetcher(store, None, concurrency=options.get("concurrency", 8), retry=retry) as fetcher,
    ):
        fetcher.store, fetcher.told = store, told
        yield fetcher


def put(server, key="k", body=BODY):
    return ObjectInfo("mnist", key, len(body), server.put("mnist", key, body).strip('"'))


async def warm(fetcher, server, lane):
    """Make the lane of the next GET the one that is asked for."""
    if lane == "lean":
        await fetcher.get(put(server, "first", b"first"))
        assert fetcher.store.lanes == Counter(first=1)
    server.reset_counts()


LANES = pytest.mark.parametrize("lane", ["full", pytest.param("lean", marks=pytest.mark.lean)])
HTML = b"<html><body><h1>502 Bad Gateway</h1></body></html>"
SURVIVED = {
    "503 twice": [Fault.status(503), Fault.status(503)],
    "500": [Fault.status(500)],
    "504": [Fault.status(504, "GatewayTimeout")],
    "429": [Fault.status(429, "TooManyRequests")],
    "HTML page with 502": [Fault.status(502, headers={"Content-Type": "text/html"}, body=HTML)],
    "HTML page with 200": [Fault.status(200, headers={"Content-Type": "text/html"}, body=HTML)],
    "error document with 200": [Fault.status(200, "InternalError")],
    "reset before the answer": [Fault.reset(None)],
    "reset at byte 0": [Fault.reset(0)],
    "reset at byte 1": [Fault.reset(1)],
    "reset in the middle": [Fault.reset(5000)],
    "reset before the last byte": [Fault.reset(9999)],
    "closed before the answer": [Fault.close(None)],
    "closed in the middle": [Fault.close(5000)],
    "short, with a length to match": [Fault.truncated(9999)],
    "empty": [Fault.truncated(0)],
    "too long, with a length to match": [Fault.padded(1)],
    "ten megabytes": [Fault.padded(10_000_000)],
    "no length": [Fault.no_length()],
    "no length and short": [Fault.no_length(after=5000)],
    "no length and too long": [replace(Fault.padded(1_000_000), announces_length=False)],
    "stall before the answer": [Fault.stall(None)],
    "stall in the middle": [Fault.stall(5000)],
    "one after the other": [Fault.reset(1), Fault.status(503), Fault.truncated(7), Fault.stall(3)],
}


@LANES
@pytest.mark.parametrize("fault", SURVIVED)
async def test_passing_fault_costs_retries_and_no_byte(s3, fault, lane):
    steps = SURVIVED[fault]
    stalls = any(step.ending == "stall" for step in steps)
    for timeout in (0.3, 4) if stalls else (5,):
        told = await survive(s3, steps, lane, timeout)
        if told <= len(steps):  # or the machine was so busy that a good answer took longer than 0.3 s
            break
    assert len(steps) + 2 <= s3.stats.gets["mnist", "k"] + (1 if fault == "no length" else 0) <= 2 * len(steps) + 2
    assert told <= len(steps)


async def survive(server, steps, lane, timeout):
    """How many retries it takes to get an object that is faulty so many times."""
    async with asyncio.timeout(15), fetching(server.endpoint, timeout=timeout) as fetcher:
        await warm(fetcher, server, lane)
        info = put(server)
        server.script("mnist", "k", steps)
        assert await fetcher.get(info) == (info, BODY)
        again = await fetcher.get(info)
        assert again.body == BODY
        return len(fetcher.told)


@LANES
@pytest.mark.parametrize("fault", ["503 twice", "reset in the middle", "closed in the middle", "stall in the middle"])
async def test_unlisted_object_survives_too(s3, fault, lane):
    async with asyncio.timeout(15), fetching(s3.endpoint, timeout=0.3) as fetcher:
        await warm(fetcher, s3, lane)
        info = put(s3)
        s3.script("mnist", "k", SURVIVED[fault])
        assert await fetcher.get(ObjectInfo("mnist", "k")) == (info, BODY)


LASTING = {  # what is raised at once, and what the message must say
    "other ETag": (Fault.etag('"' + "0" * 31 + '1"'), ObjectChanged, "refresh"),
    "other body under its own ETag": (Fault.body(BODY[::-1], own_etag=True), ObjectChanged, "refresh"),
    "412": (Fault.status(412), ObjectChanged, "refresh"),
    "403": (Fault.status(403), AccessDenied, "check the credentials"),
    "401": (Fault.status(401, "Unauthorized"), AccessDenied, "check the credentials"),
    "expired token": (Fault.status(400, "ExpiredToken"), AccessDenied, "ExpiredToken"),
    "404": (Fault.status(404), ObjectNotFound, "list the prefix again"),
    "bucket gone": (Fault.status(404, "NoSuchBucket"), BucketNotFound, "check its name"),
    "bad bucket name": (Fault.status(400, "InvalidBucketName"), ConfigurationError, "3 to 63 small letters"),
    "405": (Fault.status(405), StoreError, "405"),
}


@LANES
@pytest.mark.parametrize("fault", LASTING)
async def test_lasting_fault_is_told_at_once(s3, fault, lane):
    step, error, said = LASTING[fault]
    async with fetching(s3.endpoint) as fetcher:
        await warm(fetcher, s3, lane)
        info = put(s3)
        s3.script("mnist", "k", [step], forever=True)
        with pytest.raises(AsyncdsError, match=f"^s3://mnist/k: .*{said}") as caught:
            await fetcher.get(info)
    assert type(caught.value) is error
    assert fetcher.told == []
    assert s3.stats.gets["mnist", "k"] <= (1 if lane == "full" else 2)


@LANES
@pytest.mark.parametrize("fault", ["503 twice", "reset in the middle", "short, with a length to match", "empty"])
async def test_fault_without_end_is_told_with_its_attempts(s3, fault, lane):
    async with fetching(s3.endpoint, retries=2) as fetcher:
        await warm(fetcher, s3, lane)
        info = put(s3)
        s3.script("mnist", "k", SURVIVED[fault], forever=True)
        with pytest.raises(TransferFailed, match=r"^s3://mnist/k: .* after 3 attempts in \d+\.\d s"):
            await fetcher.get(info)
    assert len(fetcher.told) == 2


@LANES
async def test_stall_without_end_meets_the_deadline(s3, lane):
    async with fetching(s3.endpoint, deadline=1.0, timeout=0.3) as fetcher:
        await warm(fetcher, s3, lane)
        info = put(s3)
        s3.script("mnist", "k", [Fault.stall(10)], forever=True)
        started = time.monotonic()
        with pytest.raises((DeadlineExceeded, TransferFailed), match=r"^s3://mnist/k: "):
            await fetcher.get(info)
        assert time.monotonic() - started < 8, "not the 10 s of the stall, let alone four of them"


@LANES
async def test_stored_compression_is_not_undone(s3, lane):
    packed = gzip.compress(bytes(100_000))
    async with fetching(s3.endpoint) as fetcher:
        await warm(fetcher, s3, lane)
        info = put(s3, body=packed)
        s3.script("mnist", "k", [Fault(extra_headers=(("Content-Encoding", "gzip"),))], forever=True)
        assert await fetcher.get(info) == (info, packed)


CHECKSUMS = {
    "crc32": lambda body: zlib.crc32(body).to_bytes(4, "big"),
    "sha256": lambda body: hashlib.sha256(body).digest(),
}


@LANES
@pytest.mark.parametrize("algorithm", CHECKSUMS)
async def test_flipped_bit_is_found_by_the_checksum_the_server_sends(s3, lane, algorithm):
    right = base64.b64encode(CHECKSUMS[algorithm](BODY)).decode()
    told = Fault(extra_headers=((f"x-amz-checksum-{algorithm}", right),))
    flipped = replace(told, replacement=BODY[:-1] + bytes([BODY[-1] ^ 1]))
    async with fetching(s3.endpoint) as fetcher:
        await warm(fetcher, s3, lane)
        info = put(s3)
        s3.script("mnist", "k", [flipped, told], forever=True)
        assert await fetcher.get(info) == (info, BODY)
    assert s3.stats.gets["mnist", "k"] == 2


@pytest.mark.lean
async def test_rejected_answer_gives_its_connection_back(s3):
    rejected = [Fault.etag('"other"'), Fault.truncated(5), Fault.status(403), Fault.status(200, body=HTML)]
    rejected += [Fault.status(302, headers={"Location": "/mnist/other"})]
    async with asyncio.timeout(10), fetching(s3.endpoint, concurrency=1) as fetcher:
        info, errors = put(s3), []
        s3.put("fresh", "k", b"x")
        for step in rejected:
            s3.script("mnist", "k", [step, step])
            with pytest.raises(StoreError) as caught:
                await fetcher.store.get(info)
            errors.append(caught)
        assert (await fetcher.store.get(ObjectInfo("fresh", "k")))[1] == b"x"
        assert fetcher.store.lanes["first"] == 1


@LANES
async def test_cancelled_get_does_not_spoil_the_next(s3, lane):
    async with asyncio.timeout(10), fetching(s3.endpoint, concurrency=1) as fetcher:
        await warm(fetcher, s3, lane)
        info = put(s3)
        s3.script("mnist", "k", [Fault.stall(5000)])
        waiter = asyncio.create_task(fetcher.store.get(info))
        while s3.stats.bytes_sent < 5000:
            await asyncio.sleep(0.005)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        for _ in range(3):
            assert await fetcher.store.get(info) == (info, BODY)


async def test_first_get_of_a_bucket_that_fails_does_not_hold_up_the_others(s3):
    async with asyncio.timeout(10), fetching(s3.endpoint, retries=0) as fetcher:
        infos = [put(s3, f"k{number}", SMALL) for number in range(20)]
        s3.script("mnist", "k0", [Fault.stall(None)])
        s3.script("mnist", "k1", [Fault.status(403)], forever=True)
        first = asyncio.create_task(fetcher.store.get(infos[0]))
        others = await asyncio.gather(*(fetcher.store.get(info) for info in infos[1:]), return_exceptions=True)
        assert isinstance(others[0], AccessDenied)
        assert [body for _, body in others[1:]] == [SMALL] * 18
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


# listing


@pytest.mark.parametrize("fault", ["503 twice", "HTML page with 502", "HTML page with 200", "error document with 200"])
async def test_listing_survives_a_passing_fault(s3, fault):
    infos = [put(s3, f"k{number:04}", SMALL) for number in range(1001)]
    async with asyncio.timeout(15), fetching(s3.endpoint, timeout=1) as fetcher:
        s3.script("mnist", None, [Fault(), *SURVIVED[fault]], operation="LIST")
        assert await listed(fetcher.store, "mnist") == infos


@pytest.mark.parametrize(
    ("step", "error", "said"),
    [
        (Fault.status(403), AccessDenied, "check the credentials"),
        (Fault.status(404, "NoSuchBucket"), BucketNotFound, "check its name"),
        (Fault.status(200, body=HTML), TransferFailed, "check that the endpoint is an S3 server"),
        (Fault.status(503), TransferFailed, "3 attempts"),
    ],
)
async def test_listing_that_fails_says_why(s3, step, error, said):
    async with fetching(s3.endpoint, retries=2) as fetcher:
        s3.script("mnist", None, [step], operation="LIST", forever=True)
        with pytest.raises(error, match=f"^listing s3://mnist/p: .*{said}"):
            await listed(fetcher.store, "mnist", "p")


@pytest.mark.parametrize("token", ["", "<NextContinuationToken>again</NextContinuationToken>"])
async def test_listing_that_does_not_go_on_is_refused(s3, token):
    page = f"<ListBucketResult><IsTruncated>true</IsTruncated>{token}</ListBucketResult>".encode()
    async with asyncio.timeout(10), fetching(s3.endpoint, retries=0) as fetcher:
        s3.script("mnist", None, [Fault.status(200, body=page)], operation="LIST", forever=True)
        with pytest.raises(TransferFailed, match="more, and leads in a circle"):
            await listed(fetcher.store, "mnist")


# the way to the server


@pytest.mark.parametrize("operation", ["get", "list", "head"])
async def test_wrong_region_is_told_with_the_right_one(operation):
    with S3Server(region="eu-west-1") as server:
        server.put("b", "k", b"x")
        async with opened(connection_to(server.endpoint)) as store:
            ask = {
                "get": lambda: store.get(ObjectInfo("b", "k")),
                "list": lambda: listed(store, "b"),
                "head": lambda: store.head("b", "k"),
            }
            with pytest.raises(ConfigurationError, match="AWS_REGION=eu-west-1"):
                await ask[operation]()
        async with opened(connection_to(server.endpoint, region="eu-west-1")) as store:
            assert (await store.get(ObjectInfo("b", "k")))[1] == b"x"


async def test_unknown_key_is_denied_with_the_hint_and_without_secrets():
    with S3Server(credentials=("OTHER", "other")) as server:
        server.put("b", "k", b"x")
        connection = connection_to(server.endpoint, session_token=TOKEN, hint="check MINIO_ACCESS_KEY")
        async with opened(connection) as store:
            with pytest.raises(AccessDenied, match=r"InvalidAccessKeyId .*check MINIO_ACCESS_KEY") as caught:
                await store.get(ObjectInfo("b", "k"))
            assert "canary" not in repr(caught.value) + repr(caught.value.__cause__)


@pytest.mark.parametrize(
    ("bucket", "options", "error", "said"),
    [
        ("b", {"access_key": None, "secret_key": None}, AccessDenied, "no credentials; set AWS_ACCESS_KEY_ID"),
        ("b", {"profile": "nobody", "access_key": None}, ConfigurationError, "nobody"),
        ("Not a bucket", {}, ConfigurationError, "Not a bucket"),
    ],
)
async def test_what_cannot_be_asked_is_told_before_anything_is_sent(s3, monkeypatch, bucket, options, error, said):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    async with opened(connection_to(s3.endpoint, **options)) as store:
        with pytest.raises(error, match=said):
            await store.get(ObjectInfo(bucket, "k"))
        with pytest.raises(error, match=said):
            await listed(store, bucket)
    assert s3.stats.total == 0


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.mark.parametrize("operation", ["get", "list"])
async def test_refused_connection_is_given_up_after_first_contact(operation):
    place = f"127.0.0.1:{free_port()}"
    started = time.monotonic()
    async with fetching(f"http://{place}", retries=50, deadline=60, first_contact=0.5) as fetcher:
        ask = fetcher.get(ObjectInfo("b", "k")) if operation == "get" else listed(fetcher.store, "b")
        with pytest.raises(EndpointUnreachable, match=f"no connection to {re.escape(place)}"):
            await ask
    assert time.monotonic() - started < 15


@pytest.mark.lean
async def test_server_that_goes_away_is_waited_for_and_then_named():
    async with asyncio.timeout(10):
        with S3Server() as server:
            place = server.endpoint.removeprefix("http://")
            server.create_bucket("mnist")
            info = put(server)
            async with fetching(server.endpoint, deadline=1.5, first_contact=0.1, retries=50) as fetcher:
                await warm(fetcher, server, "lean")
                server.__exit__()
                with pytest.raises(EndpointUnreachable, match=f"no connection to {re.escape(place)}"):
                    await fetcher.get(info)
                assert len(fetcher.told) > 1


async def test_unknown_host_is_named(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    async with fetching("http://minio.invalid:9000", first_contact=0.5) as fetcher:
        with pytest.raises(EndpointUnreachable, match=r"no connection to minio\.invalid:9000"):
            await fetcher.get(ObjectInfo("b", "k"))


async def test_kept_connection_that_the_server_closed_is_replaced_without_a_retry():
    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer(b"body"))

    async with asyncio.timeout(10), serving(handle) as endpoint, fetching(endpoint) as fetcher:
        for _ in range(5):
            assert (await fetcher.get(ObjectInfo("b", "k"))).body == b"body"
        assert fetcher.told == []


def answer(body, *headers, version="1.1"):
    lines = "".join(f"{header}\r\n" for header in ('ETag: "abc"', f"Content-Length: {len(body)}", *headers))
    return f"HTTP/{version} 200 OK\r\n{lines}\r\n".encode() + body


@asynccontextmanager
async def serving(handle, tls=None):
    """A server of a few lines: `handle` gets reader and writer of each connection."""

    async def guarded(reader, writer):
        try:
            await handle(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(guarded, "127.0.0.1", 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"{'https' if tls else 'http'}://localhost:{port}"
    finally:
        server.close()


HEADS = {
    "a header twice": answer(b"body", "Vary: Origin", "Vary: Accept-Encoding"),  # as MinIO sends it
    "two cookies": answer(b"body", "Set-Cookie: a=1", "Set-Cookie: b=2"),
    "HTTP/1.0": answer(b"body", "Connection: close", version="1.0"),
    "chunked": b'HTTP/1.1 200 OK\r\nETag: "abc"\r\nTransfer-Encoding: chunked\r\n\r\n',
    "other case": answer(b"body").replace(b"Content-Length", b"CONTENT-LENGTH").replace(b"ETag", b"etag"),
    "no space": answer(b"body").replace(b": ", b":"),
    "a header that is no ASCII": answer(b"body", "x-amz-meta-name: caf\u00e9"),
}


@pytest.mark.parametrize("head", HEADS)
async def test_answer_that_is_odd_but_right_is_understood(head):
    async def handle(reader, writer):
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(HEADS[head])
            if head == "chunked":
                writer.write(b"4\r\nbody\r\n0\r\n\r\n")
            if head == "HTTP/1.0":
                return

    async with asyncio.timeout(10), serving(handle) as endpoint, fetching(endpoint, retries=0) as fetcher:
        for _ in range(3):
            assert (await fetcher.get(ObjectInfo("b", "k", 4, "abc"))).body == b"body"


async def test_answer_to_nothing_is_not_taken_for_the_next():
    forged = answer(b"evil")

    async def handle(reader, writer):
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(answer(b"good") + forged)

    async with asyncio.timeout(10), serving(handle) as endpoint, fetching(endpoint, retries=1) as fetcher:
        for _ in range(4):
            try:
                assert (await fetcher.get(ObjectInfo("b", "k", 4))).body == b"good"
            except TransferFailed:
                continue


async def test_head_without_end_is_not_kept_in_memory():
    asked = []

    async def handle(reader, writer):
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        if len(asked) == 1:
            writer.write(answer(b"body"))
            return
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"x: " + b"y" * 60_000 + b"\r\n")
            await writer.drain()

    async with asyncio.timeout(10), serving(handle) as endpoint, fetching(endpoint, retries=0) as fetcher:
        assert (await fetcher.get(ObjectInfo("b", "k"))).body == b"body"
        with pytest.raises(TransferFailed):
            await fetcher.get(ObjectInfo("b", "k"))


@LANES
@pytest.mark.parametrize("status", [301, 302, 307])
async def test_redirect_to_another_host_is_not_followed(s3, status, lane):
    with S3Server() as other:
        other.put("mnist", "k", BODY)
        async with fetching(s3.endpoint, retries=1) as fetcher:
            await warm(fetcher, s3, lane)
            info = put(s3)
            step = Fault.status(status, headers={"Location": f"{other.endpoint}/mnist/k"})
            s3.script("mnist", "k", [step], forever=True)
            s3.script("mnist", None, [step], operation="LIST", forever=True)
            with pytest.raises(StoreError):
                await fetcher.get(info)
            with pytest.raises(StoreError):
                await listed(fetcher.store, "mnist")
        assert other.stats.total == 0


@pytest.mark.parametrize(
    ("name", "trusted", "served"),
    [("localhost", True, True), ("evil.example", True, False), ("localhost", False, False)],
)
async def test_tls_is_refused_for_the_wrong_host_or_an_unknown_authority(tmp_path, monkeypatch, name, trusted, served):
    place, asked = certificate(tmp_path / "cert.pem", name), []
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(place)
    if trusted:
        monkeypatch.setenv("AWS_CA_BUNDLE", os.fspath(place))

    async def handle(reader, writer):
        while True:
            asked.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(answer(b"body"))

    async with serving(handle, tls) as endpoint, fetching(endpoint) as fetcher:
        for _ in range(2):
            if served:
                assert (await fetcher.get(ObjectInfo("b", "k"))).body == b"body"
            else:
                with pytest.raises(StoreError, match=r"TLS is refused .*check the host name, or AWS_CA_BUNDLE"):
                    await fetcher.get(ObjectInfo("b", "k"))
        assert fetcher.told == []
        assert len(asked) == (2 if served else 0)


async def test_kept_connection_is_used_on_the_full_lane_where_no_descriptor_is_left_for_a_new_one(s3, monkeypatch):
    s3.put("mnist", "a", b"body")
    info, opened = ObjectInfo("mnist", "a", 4), aiohttp.TCPConnector._create_connection
    store = S3Store(Connection.resolve(Settings()), concurrency=1, timeout=5, retry=Retry(0, 5, 5), lean=False)

    async def scarce(connector, request, *arguments, **options):
        if connector.force_close:
            raise aiohttp.ClientConnectorError(request.connection_key, OSError(errno.EMFILE, "Too many open files"))
        return await opened(connector, request, *arguments, **options)

    assert (await store.get(info))[1] == b"body"
    monkeypatch.setattr(aiohttp.TCPConnector, "_create_connection", scarce)
    assert (await store.again(info))[1] == b"body"
    assert s3.stats.connections_total == 1
    await store.aclose()


class Known(aiohttp.abc.AbstractResolver):
    """Knows where store.invalid.lan is, and nobody else does."""

    async def resolve(self, host, port=0, family=socket.AF_INET):
        return [{"hostname": host, "host": "127.0.0.1", "port": port, "family": family, "proto": 0, "flags": 0}]

    async def close(self):
        pass


def session_with_a_resolver():
    session = aiobotocore.session.AioSession()
    session.set_default_client_config(AioConfig(connector_args={"resolver": Known()}))
    return session


def store_on(endpoint, **options):
    retry = Retry(2, 5, 5)
    return S3Store(Connection.resolve(Settings(), endpoint=endpoint), concurrency=2, timeout=5, retry=retry, **options)


async def test_retries_reach_the_store_as_the_users_session_says(s3):
    s3.put("mnist", "a", b"body")
    endpoint = s3.endpoint.replace("127.0.0.1", "store.invalid.lan")
    store, info = store_on(endpoint, session_factory=session_with_a_resolver), ObjectInfo("mnist", "a", 4)
    assert (await store.get(info))[1] == (await store.again(info))[1] == b"body"
    s3.script("mnist", None, [Fault.status(503)], operation="LIST", shared=True)
    assert [info.key async for page in store.list("mnist", "") for info in page] == ["a"]
    await store.aclose()


@pytest.mark.parametrize("anew", [False, True])
async def test_store_that_is_closed_while_a_client_is_made_leaves_nothing_open(s3, monkeypatch, anew):
    s3.put("mnist", "a", b"body")
    store, info = store_on(s3.endpoint, lean=False), ObjectInfo("mnist", "a", 4)
    making, go_on = asyncio.Event(), asyncio.Event()
    if anew:
        await store.get(info)
    opened = Clients._open

    async def slowly(clients, anew):
        making.set()
        await go_on.wait()
        return await opened(clients, anew)

    monkeypatch.setattr(Clients, "_open", slowly)
    asking = asyncio.create_task(store.again(info) if anew else store.get(info))
    await making.wait()
    async with asyncio.timeout(10):
        await store.aclose()  # which waits for nobody
    go_on.set()
    with pytest.raises(AsyncdsError, match="closed meanwhile"):
        await asking
    monkeypatch.undo()
    await until_all_are_closed(s3)


async def until_all_are_closed(server):
    async with asyncio.timeout(10):
        while server.stats.connections_open:
            await asyncio.sleep(0.01)


async def test_store_that_is_closed_while_a_listing_waits_is_not_opened_again(s3):
    s3.put("mnist", "a", b"body")
    store = store_on(s3.endpoint)
    s3.script("mnist", None, [Fault.slow_down(retry_after=1)], operation="LIST", shared=True)
    listing = asyncio.create_task(store.page("mnist", ""))
    async with asyncio.timeout(10):
        while not s3.stats.requests["LIST"]:
            await asyncio.sleep(0.01)
    await store.aclose()
    with pytest.raises(AsyncdsError):
        await listing
    assert s3.stats.requests["LIST"] == 1
    assert store._clients is None
    await until_all_are_closed(s3)


async def test_head_is_asked_for_again_over_another_connection(s3):
    s3.put("mnist", "a", b"body")
    store = store_on(s3.endpoint)
    s3.script("mnist", "a", [Fault.status(503)], operation="HEAD")
    assert (await store.head("mnist", "a")).size == 4
    assert s3.stats.connections_total == 2
    await store.aclose()
