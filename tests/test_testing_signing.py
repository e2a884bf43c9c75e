"""Signatures that the S3 server checks: right ones of every client pass, and what was changed is told as S3 does."""

import re
import socket
import time
import urllib.request
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from http.client import HTTPConnection
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree

import boto3
import minio
import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncds.errors import AccessDenied, ConfigurationError
from asyncds.manifest import ObjectInfo
from asyncds.retry import Retry
from asyncds.store import Connection, S3Store
from asyncds.testing import S3Server, body_of

KEY, SECRET, TOKEN = "AKIAEXAMPLE", "canary/of+the=secret", "canary/of+the=token=="
ODD_KEYS = [
    "plain",
    "with space",
    "a+b=c&d",
    "100%",
    "%2e%2E/%",
    "a//b",
    "../up/./x",
    "/leading",
    "trailing/",
    "~tilde-_.!*'()",
    "ünï/é😀",
    "e\u0301\u00e9",
    "new\nline\r\t\x01",
    "query?a=b#c;d",
    '&<>"',
    "k" * 1024,
]


@pytest.fixture(scope="module", params=[(KEY, SECRET), (KEY, SECRET, TOKEN)], ids=["keys", "token"])
def server(request):
    with S3Server(credentials=request.param, check_signatures=True) as server:
        server.keys = request.param
        server.create_bucket("bucket")
        server.create_bucket("b")
        yield server


def client(server, **changes):
    key, secret, token = (*server.keys, None)[:3]
    options = {"aws_access_key_id": key, "aws_secret_access_key": secret, "aws_session_token": token} | changes
    config = Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, signature_version="s3v4")
    return boto3.client("s3", endpoint_url=server.endpoint, region_name="eu-west-9", config=config, **options)


@asynccontextmanager
async def store_on(server, lane, **changes):
    key, secret, token = (*server.keys, None)[:3]
    values = {"access_key": key, "secret_key": secret, "session_token": token} | changes
    connection = Connection("AWS", endpoint=server.endpoint, region="eu-west-9", path_style=True, **values)
    retry = Retry(0, deadline=20, first_contact=5)
    store = S3Store(connection, concurrency=8, timeout=5, retry=retry, lean=lane == "lean")
    try:
        yield store
    finally:
        await store.aclose()


def refusal(server, request):
    """Code and elements of the error document with which a request is refused."""
    parts = urlsplit(request.url)
    connection = HTTPConnection(parts.hostname, parts.port, timeout=20)
    try:
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        connection.request(request.method, target, request.body or None, dict(request.headers.items()))
        answer = connection.getresponse()
        root = ElementTree.fromstring(answer.read())
        return answer.status, {element.tag: element.text or "" for element in root}
    finally:
        connection.close()


def signed(server, key="k", *, secret=None, headers=None, body=b"", method="GET"):
    request = AWSRequest(method, f"{server.endpoint}/b/{quote(key)}", headers or {}, data=body)
    access, right, token = (*server.keys, None)[:3]
    S3SigV4Auth(Credentials(access, secret or right, token), "s3", "eu-west-9").add_auth(request)
    return request.prepare()


# who signs well


LANES = pytest.mark.parametrize("lane", ["full", pytest.param("lean", marks=pytest.mark.lean)])


@LANES
async def test_both_lanes_sign_every_key_as_the_server_wants_it(server, lane):
    objects = {key: body_of(key, 300) for key in ODD_KEYS}
    server.put_many("b", objects)
    async with store_on(server, lane) as store:
        listed = [info async for page in store.list("b", "") for info in page]
        assert {info.key for info in listed} == set(objects)
        for info in listed:
            assert (await store.get(info))[1] == objects[info.key]
            assert (await store.get(info, part=slice(7, 90)))[1] == objects[info.key][7:90]
            assert (await store.get(ObjectInfo("b", info.key)))[1] == objects[info.key]
        assert store.lanes["lean"] == (0 if lane == "full" else 3 * len(listed) - 1)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=60)


@LANES
@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@given(keys=st.lists(TEXT, min_size=40, max_size=60, unique=True))
async def test_both_lanes_sign_keys_that_nobody_thought_of(server, lane, keys):
    server.put("b", "first", b"first")
    etags = server.put_many("b", {key: key.encode() for key in keys})
    async with store_on(server, lane) as store:
        assert (await store.get(ObjectInfo("b", "first")))[1] == b"first"
        for key, etag in zip(keys, etags, strict=True):
            assert (await store.get(ObjectInfo("b", key, len(key.encode()), etag.strip('"'))))[1] == key.encode()
        assert store.lanes["lean"] == (0 if lane == "full" else len(keys))
    for key in keys:
        server.delete("b", key)


def test_other_clients_put_list_and_get(server):
    boto, body = client(server), body_of("k", 5000)
    access, secret, token = (*server.keys, None)[:3]
    other = minio.Minio(urlsplit(server.endpoint).netloc, access, secret, token, secure=False, region="eu-west-9")
    for key in ODD_KEYS:
        boto.put_object(Bucket="bucket", Key=key, Body=body, Metadata={"two": "a  b"})
    assert boto.list_objects_v2(Bucket="bucket", Prefix="a", StartAfter="a+")["KeyCount"] == 2
    assert boto.get_object(Bucket="bucket", Key="a+b=c&d", Range="bytes=1-9")["Body"].read() == body[1:10]
    assert other.get_object("bucket", "ünï/é😀").data == body
    boto.delete_object(Bucket="bucket", Key="plain")
    assert "plain" not in {listed.object_name for listed in other.list_objects("bucket", recursive=True)}


@pytest.mark.parametrize("key", ODD_KEYS)
def test_presigned_url_brings_its_object_until_it_expires(server, key):
    server.put("b", key, b"body")
    url = client(server).generate_presigned_url("get_object", Params={"Bucket": "b", "Key": key}, ExpiresIn=60)
    with urllib.request.urlopen(url) as answer:
        assert answer.read() == b"body"
    changed = re.sub("X-Amz-Expires=60", "X-Amz-Expires=61", url)
    assert changed != url
    with pytest.raises(HTTPError, match="403") as caught:
        urllib.request.urlopen(changed)
    assert b"<Code>SignatureDoesNotMatch</Code>" in caught.value.read()
    server.clock_skew = 62
    try:
        with pytest.raises(HTTPError, match="403") as caught:
            urllib.request.urlopen(url)
        assert b"<Message>Request has expired</Message>" in caught.value.read()
    finally:
        server.clock_skew = 0


# what was changed


def other_path(request):
    request.url = request.url.replace("/b/k", "/b/other")


def other_query(request):
    request.url += "?versionId=1"


def other_header(request):
    request.headers["If-Match"] = '"other"'


def other_date(request):
    moved = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(time.time() + 60))
    request.headers["X-Amz-Date"] = moved


def other_region(request):
    request.headers["Authorization"] = request.headers["Authorization"].replace("eu-west-9", "eu-west-1")


@pytest.mark.parametrize("change", [other_path, other_query, other_header, other_date, other_region])
def test_whatever_is_changed_after_signing_is_noticed(server, change):
    request = signed(server, headers={"If-Match": '"x"'})
    change(request)
    status, elements = refusal(server, request)
    assert (status, elements["Code"]) == (403, "SignatureDoesNotMatch")
    assert elements["AWSAccessKeyId"] == KEY
    assert elements["StringToSign"].startswith("AWS4-HMAC-SHA256\n")
    assert elements["CanonicalRequest"].startswith("GET\n/b/")


def test_wrong_secret_and_changed_body_are_noticed(server):
    assert refusal(server, signed(server, secret="other"))[1]["Code"] == "SignatureDoesNotMatch"
    request = signed(server, body=b"body", method="PUT")
    request.body = b"evil"
    assert refusal(server, request)[1]["Code"] == "XAmzContentSHA256Mismatch"


@pytest.mark.parametrize(
    ("drop", "add", "code"),
    [
        ("Authorization", {}, "AccessDenied"),
        ("X-Amz-Content-SHA256", {}, "MissingSecurityHeader"),
        ("X-Amz-Date", {}, "AccessDenied"),
        (None, {"x-amz-meta-more": "1"}, "AccessDenied"),
        ("Authorization", {"Authorization": "AWS AKIA:c2lnbmF0dXJl"}, "InvalidRequest"),
        ("Authorization", {"Authorization": "AWS4-HMAC-SHA256 Credential=k/1/s3, Signature=0"}, None),
    ],
)
def test_half_a_signature_is_refused(server, drop, add, code):
    request = signed(server)
    if drop is not None:
        del request.headers[drop]
    for name, value in add.items():
        request.headers[name] = value
    assert refusal(server, request)[1]["Code"] == (code or "AuthorizationHeaderMalformed")


# A GET, signed as it should be but for the signature.
STAMP = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
RIGHT = {
    b"path": b"/b/k",
    b"query": b"list-type=2",
    b"credential": f"{KEY}/{STAMP[:8]}/eu-west-9/s3/aws4_request".encode(),
    b"names": b"host;x-amz-content-sha256;x-amz-date;x-amz-security-token",
    b"signature": b"0" * 64,
    b"date": STAMP.encode(),
    b"token": TOKEN.encode(),
    b"range": b"bytes=0-5",
}
RAW = (
    b"GET %(path)b?%(query)b HTTP/1.1\r\nConnection: close\r\nHost: h\r\nx-amz-content-sha256: UNSIGNED-PAYLOAD\r\n"
    b"Authorization: AWS4-HMAC-SHA256 Credential=%(credential)b, SignedHeaders=%(names)b, Signature=%(signature)b\r\n"
    b"x-amz-date: %(date)b\r\nx-amz-security-token: %(token)b\r\nRange: %(range)b\r\n\r\n"
)
PRESIGNED = b"X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=%b&X-Amz-Expires=%b"
ABSURD = b"9" * 5000


def raw_refusal(server, **changes):
    """Status and code with which a raw request is refused that differs so from one that lacks a signature only."""
    parts = urlsplit(server.endpoint)
    with socket.create_connection((parts.hostname, parts.port), timeout=20) as connection:
        connection.sendall(RAW % (RIGHT | {name.encode(): value for name, value in changes.items()}))
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, document = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 4"), answer
    code = re.search(b"<Code>(.*?)</Code>", document)  # control characters come back, as with S3, which is no XML 1.0
    return int(head[9:12]), code and code[1].decode()


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({}, 403, "SignatureDoesNotMatch"),
        ({"credential": b"nonsense"}, 400, "AuthorizationHeaderMalformed"),
        ({"credential": b""}, 400, "AuthorizationHeaderMalformed"),
        ({"credential": b"A\xff" + RIGHT[b"credential"][2:]}, 400, "AuthorizationHeaderMalformed"),
        ({"credential": RIGHT[b"credential"].replace(b"eu-", b"\xed\xa0\x80")}, 400, "AuthorizationHeaderMalformed"),
        ({"names": b"host;\xff"}, 400, "AuthorizationHeaderMalformed"),
        ({"signature": b"\xff" * 64}, 400, "AuthorizationHeaderMalformed"),
        ({"date": b"\xff"}, 403, "AccessDenied"),
        ({"date": ABSURD}, 403, "AccessDenied"),
        ({"query": PRESIGNED % (RIGHT[b"credential"], ABSURD)}, 400, "AuthorizationQueryParametersError"),
        ({"query": PRESIGNED % (RIGHT[b"credential"], b"%D9%A3")}, 400, "AuthorizationQueryParametersError"),
        ({"query": PRESIGNED % (b"nonsense", b"60")}, 400, "AuthorizationQueryParametersError"),
        ({"query": b"prefix=%zz"}, 400, "InvalidURI"),
    ],
    ids=lambda value: repr(value)[:70],
)
def test_what_is_malformed_is_refused_and_not_dropped(server, changes, status, code):
    assert raw_refusal(server, **changes) == (status, code)


def test_token_that_is_no_text_is_refused():
    with S3Server(credentials=(KEY, SECRET, TOKEN)) as server:
        assert raw_refusal(server, token=b"\xff") == (400, "InvalidToken")


ODD = st.sampled_from([ABSURD, "٣".encode(), b"\xff", b"\xed\xa0\x80", b"%zz", b"%ED%A0%80", b"-1", b""]) | st.binary(
    max_size=9
)


def spoilt(right):
    """What is right, with something odd in the place of a part of it."""
    ends = st.tuples(st.integers(0, len(right)), st.integers(0, len(right))).map(sorted)
    return st.builds(lambda ends, odd: right[: ends[0]] + odd + right[ends[1] :], ends, ODD)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=st.fixed_dictionaries({}, optional={name.decode(): spoilt(right) for name, right in RIGHT.items()}))
def test_whatever_is_odd_in_a_request_is_refused_and_not_dropped(server, changes):
    assert raw_refusal(server, **changes)[1]


@pytest.mark.parametrize("ahead", [-16 * 60, 16 * 60, 86_400])
def test_clock_that_is_off_is_told_with_both_times(server, ahead):
    server.clock_skew = ahead
    try:
        request = signed(server)
        status, elements = refusal(server, request)
    finally:
        server.clock_skew = 0
    assert (status, elements["Code"]) == (403, "RequestTimeTooSkewed")
    assert elements["RequestTime"] == request.headers["X-Amz-Date"]
    told = datetime.strptime(elements["ServerTime"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
    assert abs(told - time.time() - ahead) < 10
    assert elements["MaxAllowedSkewMilliseconds"] == "900000"


# tokens and keys that change


@LANES
async def test_credentials_that_were_changed_have_expired(lane):
    with S3Server(credentials=(KEY, SECRET, "old token"), check_signatures=True) as server:
        server.put("b", "k", b"body")
        server.keys = KEY, SECRET, "old token"
        async with store_on(server, lane) as store:
            for _ in range(2):
                assert (await store.get(ObjectInfo("b", "k")))[1] == b"body"
            server.change_credentials("AKIANEXT", "next", "new token")
            with pytest.raises(AccessDenied, match="ExpiredToken"):
                await store.get(ObjectInfo("b", "k"))
        async with store_on(server, lane, session_token="never a token") as store:
            with pytest.raises(AccessDenied, match="InvalidAccessKeyId"):
                await store.get(ObjectInfo("b", "k"))
        new = {"access_key": "AKIANEXT", "secret_key": "next"}
        async with store_on(server, lane, **new, session_token="new token") as store:
            assert (await store.get(ObjectInfo("b", "k")))[1] == b"body"
        async with store_on(server, lane, **new, session_token="never a token") as store:
            with pytest.raises(AccessDenied, match="InvalidToken"):
                await store.get(ObjectInfo("b", "k"))


def test_signatures_cannot_be_checked_without_a_secret():
    with pytest.raises(ConfigurationError, match="give credentials"):
        S3Server(check_signatures=True)
    with S3Server() as server, pytest.raises(ConfigurationError, match="an access key, a secret key"):
        server.change_credentials("one")
