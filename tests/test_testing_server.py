"""The scripted S3 server: what it answers, how it fails on purpose, what it counts, and how it ends."""

import base64
import concurrent.futures
import contextlib
import dataclasses
import gc
import hashlib
import http.client
import io
import os
import pickle
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree

import boto3
import minio
import pytest
import trustme
from aiobotocore.session import get_session
from botocore.config import Config
from botocore.exceptions import ClientError

from asyncds.errors import ConfigurationError
from asyncds.testing import Fault, S3Server
from asyncds.testing.host import ProcessHost

BODY = hashlib.shake_128(b"body").digest(10_000)
ETAG = f'"{hashlib.md5(BODY).hexdigest()}"'
ABSURD = "9" * 5000  # more digits than Python makes an int of
ODD_KEYS = [
    "plain",
    "with space",
    "a+b",
    "100%",
    "%2e%2E/%",
    "a//b",
    "../up",
    "a/./b/../c",
    "/leading",
    "trailing/",
    "ünï/é😀",
    "e\u0301",
    "\u00e9",
    "new\nline\r",
    "tab\t\x01",
    "&<>\"'",
    "query?a=b#c",
    "k" * 1024,
]
NAMESPACE = {"s3": "http://s3.amazonaws.com/doc/2006-03-01/"}

pytestmark = pytest.mark.filterwarnings("error")


@dataclasses.dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def code(self) -> str | None:
        return ElementTree.fromstring(self.body).findtext("Code")


@pytest.fixture(params=[False, True], ids=["thread", "process"])
def any_server(request) -> Iterator[S3Server]:
    with S3Server(process=request.param) as server:
        yield server


@pytest.fixture
def server() -> Iterator[S3Server]:
    with S3Server() as server:
        server.put("b", "k", BODY)
        yield server


@pytest.fixture
async def client(server) -> AsyncIterator[object]:
    async with get_session().create_client("s3", **settings(server)) as client:
        yield client


def settings(server: S3Server, **changes: object) -> dict[str, object]:
    return {
        "endpoint_url": server.endpoint,
        "region_name": "us-east-1",
        "aws_access_key_id": "AK",
        "aws_secret_access_key": "secret",
        "config": Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
    } | changes


def address(server: S3Server) -> tuple[str, int]:
    url = urlsplit(server.endpoint)
    assert url.hostname
    assert url.port
    return url.hostname, url.port


def connect(server: S3Server) -> socket.socket:
    return socket.create_connection(address(server), timeout=20)


def ask(
    server: S3Server,
    target: str = "/b/k",
    method: str = "GET",
    headers: Mapping[str, str | bytes] | None = None,
    body: bytes | None = None,
) -> Answer:
    connection = http.client.HTTPConnection(*address(server), timeout=20)
    try:
        connection.request(method, target, body, dict(headers or {}))
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())
    finally:
        connection.close()


def exchange(connection: socket.socket, request: bytes) -> bytes:
    """Send bytes, and return all that comes until the server closes."""
    connection.sendall(request)
    return b"".join(iter(lambda: connection.recv(65536), b""))


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"


def refuses(endpoint: str) -> bool:
    url = urlsplit(endpoint)
    try:
        socket.create_connection((url.hostname, url.port), timeout=5).close()
    except OSError:
        return True
    return False


# What it answers


def test_get_returns_what_was_put_directly(any_server):
    etag = any_server.put("b", "k", BODY)
    answer = ask(any_server)
    assert (answer.status, answer.body, answer.headers["ETag"]) == (200, BODY, etag)
    assert etag == ETAG
    assert answer.headers["Content-Length"] == "10000"
    assert answer.headers["Last-Modified"].endswith("GMT")


def test_head_returns_the_headers_of_get_without_body(server):
    get, head = ask(server), ask(server, method="HEAD")
    assert head.body == b""
    assert dict(head.headers) == dict(get.headers)


@pytest.mark.parametrize(
    ("value", "span"),
    [
        ("bytes=0-0", slice(0, 1)),
        ("bytes=10-99", slice(10, 100)),
        ("bytes=9990-", slice(9990, 10000)),
        ("bytes=-5", slice(9995, 10000)),
        ("bytes=5-99999", slice(5, 10000)),
        pytest.param(f"bytes=5-{ABSURD}", slice(5, 10000), id="absurd end"),
        pytest.param(f"bytes=-{ABSURD}", slice(0, 10000), id="absurd suffix"),
        pytest.param(f"bytes={'0' * 5000}5-9", slice(5, 10), id="absurd zeros"),
    ],
)
def test_range_returns_its_bytes_under_206(server, value, span):
    answer = ask(server, headers={"Range": value})
    assert (answer.status, answer.body) == (206, BODY[span])
    assert answer.headers["Content-Range"] == f"bytes {span.start}-{span.stop - 1}/10000"
    assert answer.headers["ETag"] == ETAG


@pytest.mark.parametrize("value", ["bytes=5-2", "bytes=-", "lines=1-2", "bytes=0-1,3-4", "bytes=٣-".encode()])
def test_range_that_s3_does_not_understand_returns_everything(server, value):
    assert ask(server, headers={"Range": value}).status == 200


@pytest.mark.parametrize(
    "value", ["bytes=10000-", "bytes=-0", "bytes=20000-20001", pytest.param(f"bytes={ABSURD}-", id="absurd")]
)
def test_range_outside_the_object_is_416(server, value):
    answer = ask(server, headers={"Range": value})
    assert (answer.status, answer.code) == (416, "InvalidRange")
    assert answer.headers["Content-Range"] == "bytes */10000"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"If-Match": ETAG}, 200),
        ({"If-Match": ETAG.strip('"')}, 200),
        ({"If-Match": "*"}, 200),
        ({"If-Match": f'"other", {ETAG}'}, 200),
        ({"If-Match": '"other"'}, 412),
        ({"If-None-Match": '"other"'}, 200),
        ({"If-None-Match": ETAG}, 304),
        ({"If-None-Match": "*"}, 304),
    ],
)
def test_conditions_compare_etags(server, headers, status):
    answer = ask(server, headers=headers)
    assert answer.status == status
    assert answer.body == (BODY if status == 200 else answer.body if status == 412 else b"")
    if status == 412:
        assert answer.code == "PreconditionFailed"


@pytest.mark.parametrize(
    ("method", "target", "status", "code"),
    [
        ("GET", "/b/absent", 404, "NoSuchKey"),
        ("GET", "/absent/k", 404, "NoSuchBucket"),
        ("PUT", "/absent/k", 404, "NoSuchBucket"),
        ("GET", "/absent?list-type=2", 404, "NoSuchBucket"),
        ("GET", "/b", 501, "NotImplemented"),
        ("GET", "/b/k?tagging", 501, "NotImplemented"),
        ("POST", "/b/k?uploads", 501, "NotImplemented"),
        ("POST", "/b/k", 405, "MethodNotAllowed"),
        ("DELETE", "/b", 405, "MethodNotAllowed"),
        ("GET", "/b?list-type=2&max-keys=x", 400, "InvalidArgument"),
        ("GET", "/b?list-type=2&max-keys=-1", 400, "InvalidArgument"),
        ("GET", "/b?list-type=2&max-keys=2147483648", 400, "InvalidArgument"),
        pytest.param("GET", f"/b?list-type=2&max-keys={ABSURD}", 400, "InvalidArgument", id="absurd max-keys"),
        ("GET", f"/b?list-type=2&max-keys={quote('٣')}", 400, "InvalidArgument"),
        ("GET", "/b?list-type=2&continuation-token=*", 400, "InvalidArgument"),
        ("GET", f"/b?list-type=2&continuation-token={quote('ü')}", 400, "InvalidArgument"),
        ("GET", "/b?list-type=2&prefix=%zz", 400, "InvalidURI"),
        ("GET", "/b?list-type=2&prefix=100%", 400, "InvalidURI"),
        ("GET", "/b/%e", 400, "InvalidURI"),
        ("PUT", "/b", 409, "BucketAlreadyOwnedByYou"),
        ("PUT", "/b/%ff", 400, "InvalidURI"),
    ],
)
def test_errors_are_s3_documents(server, method, target, status, code):
    answer = ask(server, target, method)
    assert (answer.status, answer.code) == (status, code)
    assert answer.headers["Content-Type"] == "application/xml"


def test_head_of_a_missing_object_is_404_without_body(server):
    answer = ask(server, "/b/absent", "HEAD")
    assert (answer.status, answer.body) == (404, b"")


def test_object_overwritten_has_a_new_etag_and_deleted_is_gone(server):
    server.put("b", "k", b"new")
    assert ask(server).body == b"new"
    server.delete("b", "k")
    server.delete("b", "k")
    assert ask(server).status == 404


async def test_odd_keys_survive_put_list_and_get(client, server):
    await client.create_bucket(Bucket="odd")
    for key in ODD_KEYS:
        await client.put_object(Bucket="odd", Key=key, Body=key.encode())
    listed = await client.list_objects_v2(Bucket="odd")
    assert [entry["Key"] for entry in listed["Contents"]] == sorted(ODD_KEYS, key=str.encode)
    for entry in listed["Contents"]:
        got = await client.get_object(Bucket="odd", Key=entry["Key"])
        assert await got["Body"].read() == entry["Key"].encode()
        assert got["ETag"] == entry["ETag"] == f'"{hashlib.md5(entry["Key"].encode()).hexdigest()}"'
        assert entry["Size"] == len(entry["Key"].encode())
        assert entry["StorageClass"] == "STANDARD"
    assert server.stats.gets == {("odd", key): 1 for key in ODD_KEYS}


async def test_keys_put_directly_are_those_put_over_http(client, server):
    server.put_many("odd", {key: key.encode() for key in ODD_KEYS})
    for key in ODD_KEYS:
        got = await client.get_object(Bucket="odd", Key=key)
        assert await got["Body"].read() == key.encode()


async def test_bucket_operations_answer_as_s3(client):
    await client.create_bucket(Bucket="fresh")
    assert (await client.head_bucket(Bucket="fresh"))["BucketRegion"] == "us-east-1"
    assert (await client.get_bucket_location(Bucket="fresh"))["LocationConstraint"] is None
    with pytest.raises(ClientError, match="404"):
        await client.head_bucket(Bucket="absent")
    await client.put_object(Bucket="fresh", Key="x", Body=b"x", ContentType="image/png")
    assert (await client.head_object(Bucket="fresh", Key="x"))["ContentType"] == "image/png"
    await client.delete_object(Bucket="fresh", Key="x")
    assert (await client.list_objects_v2(Bucket="fresh"))["KeyCount"] == 0


# How it lists


def listing(server: S3Server, query: str = "") -> tuple[list[str], list[str], str | None]:
    root = ElementTree.fromstring(ask(server, f"/l?list-type=2{query}").body)
    keys = [node.text or "" for node in root.findall("s3:Contents/s3:Key", NAMESPACE)]
    prefixes = [node.text or "" for node in root.findall("s3:CommonPrefixes/s3:Prefix", NAMESPACE)]
    assert root.findtext("s3:KeyCount", None, NAMESPACE) == str(len(keys) + len(prefixes))
    token = root.findtext("s3:NextContinuationToken", None, NAMESPACE)
    assert root.findtext("s3:IsTruncated", None, NAMESPACE) == ("true" if token else "false")
    return keys, prefixes, token


@pytest.fixture
def listed(server) -> S3Server:
    keys = ["a", "d/1", "d/2", "d/e/3", "d-", "dz", "z/9", "\ue000", "😀"]
    server.put_many("l", dict.fromkeys(keys, b"x"))
    return server


@pytest.mark.parametrize(
    ("query", "keys", "prefixes"),
    [
        # U+E000 sorts before the emoji in UTF-8, and after it in UTF-16.
        ("", ["a", "d-", "d/1", "d/2", "d/e/3", "dz", "z/9", "\ue000", "😀"], []),
        ("&prefix=d/", ["d/1", "d/2", "d/e/3"], []),
        ("&delimiter=/", ["a", "d-", "dz", "\ue000", "😀"], ["d/", "z/"]),
        ("&prefix=d/&delimiter=/", ["d/1", "d/2"], ["d/e/"]),
        ("&prefix=d&delimiter=/", ["d-", "dz"], ["d/"]),
        ("&start-after=d/2", ["d/e/3", "dz", "z/9", "\ue000", "😀"], []),
        ("&start-after=d/1&delimiter=/", ["dz", "\ue000", "😀"], ["d/", "z/"]),
        ("&prefix=none", [], []),
        ("&max-keys=0", [], []),
    ],
)
def test_listing_selects_and_orders_by_bytes(listed, query, keys, prefixes):
    assert listing(listed, query) == (keys, prefixes, None)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize("query", ["", "&delimiter=/", "&prefix=d/", "&start-after=d-"])
def test_pages_add_up_to_the_whole_listing(listed, query, size):
    pages, token = [], ""
    while token is not None:
        page = listing(listed, f"{query}&max-keys={size}" + (f"&continuation-token={quote(token)}" if token else ""))
        pages.append(page)
        token = page[2]
    whole = listing(listed, query)
    assert [key for page in pages for key in page[0]] == whole[0]
    assert [prefix for page in pages for prefix in page[1]] == whole[1]
    assert all(len(page[0]) + len(page[1]) == size for page in pages[:-1])


def test_listing_goes_on_where_a_deleted_key_was(listed):
    *_, token = listing(listed, "&max-keys=3")
    listed.delete("l", "d/1")
    listed.delete("l", "d/2")
    assert listing(listed, f"&continuation-token={token}")[0][0] == "d/e/3"


def test_listing_encodes_keys_when_asked(server):
    server.put("l", "a b+c\n", b"")
    assert listing(server, "&encoding-type=url")[0] == ["a+b%2Bc%0A"]


async def test_a_thousand_keys_are_a_page(client, server):
    server.put_many("l", {f"{number:05}": b"" for number in range(2500)})
    pages = [page async for page in client.get_paginator("list_objects_v2").paginate(Bucket="l")]
    assert [page["KeyCount"] for page in pages] == [1000, 1000, 500]
    assert server.stats.requests["LIST"] == 3


# How it takes uploads


def test_boto3_put_sends_what_arrives(server):
    body = os.urandom(3_000_000)
    boto3.client("s3", **settings(server)).put_object(Bucket="b", Key="up", Body=io.BytesIO(body))
    assert ask(server, "/b/up").body == body


def test_minio_sdk_puts_and_gets(server):
    sdk = minio.Minio(urlsplit(server.endpoint).netloc, "AK", "secret", secure=False)
    sdk.make_bucket("uploads")
    sdk.put_object("uploads", "dir/up", io.BytesIO(BODY), len(BODY))
    response = sdk.get_object("uploads", "dir/up")
    assert response.read() == BODY
    response.close()
    response.release_conn()
    assert [entry.object_name for entry in sdk.list_objects("uploads", recursive=True)] == ["dir/up"]


@pytest.mark.parametrize("trailer", [b"", b"x-amz-checksum-crc32:AAAAAA==\r\n"], ids=["plain", "trailer"])
@pytest.mark.parametrize("signature", [b"", b";chunk-signature=" + b"0" * 64], ids=["unsigned", "signed"])
def test_aws_chunked_framing_is_not_stored(server, signature, trailer):
    body = b"%x%s\r\n%s\r\n0%s\r\n%s\r\n" % (len(BODY), signature, BODY, signature, trailer)
    headers = {"x-amz-content-sha256": "STREAMING-UNSIGNED-PAYLOAD-TRAILER", "Content-Encoding": "aws-chunked"}
    assert ask(server, "/b/up", "PUT", headers, body).status == 200
    assert ask(server, "/b/up").body == BODY


def test_transfer_encoding_may_wrap_aws_chunked(server):
    inner = b"4\r\nabcd\r\n0\r\nx-amz-checksum-crc32:AAAAAA==\r\n\r\n"
    outer = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (inner[:5], inner[5:])) + b"0\r\n\r\n"
    head = b"PUT /b/up HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Encoding: aws-chunked\r\n\r\n"
    get = b"GET /b/up HTTP/1.1\r\nConnection: close\r\n\r\n"
    with connect(server) as connection:
        for byte in head + outer:
            connection.sendall(bytes([byte]))
        assert exchange(connection, get).endswith(b"\r\n\r\nabcd")


def test_client_that_expects_100_continue_gets_it_before_its_body(server):
    with connect(server) as connection:
        connection.sendall(b"PUT /b/up HTTP/1.1\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"body")
        assert connection.recv(100).startswith(b"HTTP/1.1 200 OK\r\n")
    assert ask(server, "/b/up").body == b"body"


# How it speaks HTTP


def test_pipelined_requests_are_answered_in_order(server):
    server.latency = 0.001
    server.put_many("b", {str(number): b"<%d>" % number for number in range(100)})
    requests = b"".join(b"GET /b/%d HTTP/1.1\r\n\r\n" % number for number in range(100))
    with connect(server) as connection:
        answer = exchange(connection, requests + b"GET /b/0 HTTP/1.1\r\nConnection: close\r\n\r\n")
    expected = [b"<%d>" % number for number in [*range(100), 0]]
    assert [part.partition(b"\r\n\r\n")[2] for part in answer.split(b"HTTP/1.1 200 OK")[1:]] == expected


def test_one_connection_serves_many_requests(server):
    connection = http.client.HTTPConnection(*address(server))
    for _ in range(10):
        connection.request("GET", "/b/k")
        assert connection.getresponse().read() == BODY
    connection.close()
    assert server.stats.connections_total == 1


def test_http_1_0_closes_after_the_answer(server):
    with connect(server) as connection:
        answer = exchange(connection, b"GET /b/k HTTP/1.0\r\n\r\n")
    assert b"Connection: close\r\n" in answer
    assert answer.endswith(BODY)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"GET /b/k HTTP/3\r\n\r\n",
        b"GET b HTTP/1.1\r\n\r\n",
        b"GET /b/\n HTTP/1.1\r\n\r\n",
        b"GET /b/k HTTP/1.1\r\nno colon\r\n\r\n",
        b"PUT /b/k HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"PUT /b/k HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"PUT /b/k HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"PUT /b/k HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-6\r\n",
        b"PUT /b/k HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 5000 + b"\r\n",
        b"PUT /b/k HTTP/1.1\r\nContent-Encoding: aws-chunked\r\nContent-Length: 4\r\n\r\n9\r\nx",
        b"GET /" + b"x" * 70_000,
        b"GET / HTTP/1.1\r\nx: " + b"x" * 1_000_000,
    ],
    ids=lambda request: repr(request[:60]),
)
def test_what_is_no_http_is_refused_and_closed(server, request_bytes):
    with connect(server) as connection:
        assert exchange(connection, request_bytes).startswith(b"HTTP/1.1 400 ")
    assert ask(server).status == 200


def test_large_bodies_arrive_whole_at_slow_readers(server):
    body = os.urandom(20_000_000)
    server.put("b", "large", body)
    with connect(server) as connection:
        connection.sendall(b"GET /b/large HTTP/1.1\r\nConnection: close\r\n\r\n")
        eventually(lambda: server.stats.in_flight == 1)
        assert exchange(connection, b"").endswith(body)
    eventually(lambda: server.stats.in_flight == 0)


# Who may ask


def authorization(access_key: str = "AK", region: str = "us-east-1") -> dict[str, str]:
    return {"Authorization": f"AWS4-HMAC-SHA256 Credential={access_key}/20250101/{region}/s3/aws4_request, Signature=0"}


def test_other_region_is_refused_with_the_right_one():
    with S3Server(region="eu-central-1") as server:
        server.put("b", "k", BODY)
        answer = ask(server, headers=authorization())
        assert (answer.status, answer.code) == (400, "AuthorizationHeaderMalformed")
        assert ElementTree.fromstring(answer.body).findtext("Region") == "eu-central-1"
        assert answer.headers["x-amz-bucket-region"] == "eu-central-1"
        assert ask(server, headers=authorization(region="eu-central-1")).status == 200
        assert ask(server).status == 200
        assert b">eu-central-1</LocationConstraint>" in ask(server, "/b?location").body


def test_botocore_finds_the_region_by_itself():
    with S3Server(region="eu-central-1") as server:
        server.put("b", "k", BODY)
        client = boto3.client("s3", **settings(server))
        assert client.get_object(Bucket="b", Key="k")["Body"].read() == BODY


def test_credentials_are_asked_for_when_they_are_set():
    with S3Server(credentials=("AK", "canary")) as server:
        server.put("b", "k", BODY)
        assert ask(server).code == "AccessDenied"
        assert ask(server, headers=authorization("OTHER")).code == "InvalidAccessKeyId"
        assert ask(server, headers=authorization("AK")).status == 200
        config = Config(signature_version="s3v4", s3={"addressing_style": "path"})
        client = boto3.client("s3", **settings(server, config=config))
        url = urlsplit(client.generate_presigned_url("get_object", Params={"Bucket": "b", "Key": "k"}))
        assert ask(server, f"{url.path}?{url.query}").body == BODY
        assert "canary" not in repr(server)


def test_environment_says_where_it_is_and_with_which_keys(monkeypatch):
    with S3Server() as server:
        assert server.environment.keys() == {
            "AWS_ENDPOINT_URL",
            "AWS_REGION",
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
        }
    with S3Server(region="eu-west-3", credentials=("K", "old", "token"), check_signatures=True) as server:
        server.put("b", "k", BODY)
        for change in (None, ("K", "new", "other token")):
            if change is not None:
                server.change_credentials(*change)
            for name, value in server.environment.items():
                monkeypatch.setenv(name, value)
            client = boto3.session.Session().client("s3", region_name=os.environ["AWS_REGION"])
            assert client.get_object(Bucket="b", Key="k")["Body"].read() == BODY


# How it fails on purpose


def test_steps_apply_attempt_by_attempt_and_then_all_is_fine(any_server):
    any_server.put("b", "k", BODY)
    any_server.put("b", "other", BODY)
    any_server.script("b", "k", [Fault.status(503, "SlowDown"), Fault(), Fault.status(500)])
    assert [ask(any_server).status for _ in range(5)] == [503, 200, 500, 200, 200]
    assert ask(any_server, "/b/other").status == 200
    assert ask(any_server, method="HEAD").status == 200


def test_script_for_all_keys_counts_each_key_by_itself(server):
    server.put("b", "other", BODY)
    server.script("b", None, [Fault.status(503)])
    assert [ask(server).status, ask(server, "/b/other").status] == [503, 503]
    assert [ask(server).status, ask(server, "/b/other").status] == [200, 200]


def test_shared_script_is_used_up_by_whichever_keys_come(server):
    server.put("b", "other", BODY)
    server.script("b", None, [Fault.status(503), Fault.status(500)], shared=True)
    assert [ask(server).status, ask(server, "/b/other").status, ask(server).status] == [503, 500, 200]


def test_script_of_a_key_takes_the_place_of_the_one_for_all(server):
    server.script("b", None, [Fault.status(500)], forever=True)
    server.script("b", "k", [Fault.status(503)])
    assert [ask(server).status for _ in range(2)] == [503, 200]
    server.clear_scripts()
    assert ask(server, "/b/absent").code == "NoSuchKey"


def test_last_step_repeats_for_ever(server):
    server.script("b", "k", [Fault(), Fault.status(403)], forever=True)
    assert [ask(server).status for _ in range(4)] == [200, 403, 403, 403]


@pytest.mark.parametrize(
    ("operation", "method", "target", "key"),
    [
        ("LIST", "GET", "/b?list-type=2", None),
        ("HEAD", "HEAD", "/b/k", "k"),
        ("PUT", "PUT", "/b/k", "k"),
        ("DELETE", "DELETE", "/b/k", "k"),
        ("HEAD_BUCKET", "HEAD", "/b", None),
        ("LOCATION", "GET", "/b?location", None),
    ],
)
def test_scripts_apply_to_other_operations(server, operation, method, target, key):
    server.script("b", key, [Fault.status(503)], operation=operation)
    assert ask(server).status == 200
    assert ask(server, target, method).status == 503
    assert ask(server, target, method).status in (200, 204)
    assert server.stats.requests[operation] == 2


@pytest.mark.parametrize(
    ("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (404, "NoSuchKey"), (429, "TooManyRequests")]
)
def test_status_carries_the_usual_code(server, status, code):
    server.script("b", "k", [Fault.status(status)])
    answer = ask(server)
    assert (answer.status, answer.code) == (status, code)


def test_status_takes_code_headers_and_body(server):
    page = b"<html>bad gateway</html>"
    server.script(
        "b",
        "k",
        [
            Fault.status(403, "RequestTimeTooSkewed", headers={"date": "Thu, 01 Jan 1970 00:00:00 GMT"}),
            Fault.status(502, body=page, headers={"Content-Type": "text/html", "Retry-After": "1"}),
            Fault.status(200, "InternalError"),
            Fault.status(307, headers={"Location": "http://169.254.169.254/"}),
        ],
    )
    skewed, gateway, hidden, redirect = (ask(server) for _ in range(4))
    assert skewed.code == "RequestTimeTooSkewed"
    assert skewed.headers.get_all("Date") == ["Thu, 01 Jan 1970 00:00:00 GMT"]
    assert (gateway.body, gateway.headers["Content-Type"], gateway.headers["Retry-After"]) == (page, "text/html", "1")
    assert (hidden.status, hidden.code) == (200, "InternalError")
    assert redirect.headers["Location"] == "http://169.254.169.254/"


def read_until_reset(connection: socket.socket) -> bytes:
    received = b""
    while True:
        try:
            chunk = connection.recv(65536)
        except ConnectionResetError:
            return received
        assert chunk, "the connection was closed in order"
        received += chunk


@pytest.mark.parametrize("after", [0, 1, 5000, 9999])
def test_reset_comes_after_that_many_body_bytes(server, after):
    server.script("b", "k", [Fault.reset(after=after)])
    with connect(server) as connection:
        connection.sendall(b"GET /b/k HTTP/1.1\r\n\r\n")
        head, _, body = read_until_reset(connection).partition(b"\r\n\r\n")
    assert b"Content-Length: 10000" in head
    assert body == BODY[:after]


def test_reset_waits_until_a_large_part_has_arrived(server):
    body = os.urandom(8_000_000)
    server.put("b", "k", body)
    server.script("b", "k", [Fault.reset(after=7_000_000)])
    with connect(server) as connection:
        connection.sendall(b"GET /b/k HTTP/1.1\r\n\r\n")
        assert read_until_reset(connection).endswith(body[:7_000_000])


def test_reset_before_the_status_line_sends_nothing(server):
    server.script("b", "k", [Fault.reset(after=None)])
    with connect(server) as connection:
        connection.sendall(b"GET /b/k HTTP/1.1\r\n\r\n")
        assert read_until_reset(connection) == b""


def test_close_ends_the_body_early_under_its_true_length(server):
    server.script("b", "k", [Fault.close(after=100)])
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(server)
    assert caught.value.partial == BODY[:100]
    assert caught.value.expected == 9900


def test_truncated_and_padded_bodies_announce_their_own_length(server):
    server.script("b", "k", [Fault.truncated(10), Fault.padded(3), Fault.padded(b"xyz")])
    short, zeros, tail = (ask(server) for _ in range(3))
    assert (short.body, short.headers["Content-Length"], short.headers["ETag"]) == (BODY[:10], "10", ETAG)
    assert (zeros.body, zeros.headers["Content-Length"]) == (BODY + bytes(3), "10003")
    assert tail.body == BODY + b"xyz"


@pytest.mark.parametrize("after", [None, 100])
def test_body_without_length_ends_with_the_connection(server, after):
    server.script("b", "k", [Fault.no_length(after=after)])
    answer = ask(server)
    assert answer.headers["Content-Length"] is None
    assert answer.body == BODY[:after]


def test_other_body_comes_under_the_true_etag_or_its_own(server):
    server.script("b", "k", [Fault.body(b"other"), Fault.body(b"other", own_etag=True), Fault.etag('"0"')])
    true, own, changed = (ask(server) for _ in range(3))
    assert (true.body, true.headers["ETag"]) == (b"other", ETAG)
    assert (own.body, own.headers["ETag"]) == (b"other", f'"{hashlib.md5(b"other").hexdigest()}"')
    assert (changed.body, changed.headers["ETag"]) == (BODY, '"0"')


@pytest.mark.parametrize(("after", "seen"), [(None, b""), (0, b""), (500, BODY[:500])])
def test_stall_sends_nothing_more_and_ends_with_the_client(server, after, seen):
    server.script("b", "k", [Fault.stall(after=after)])
    with connect(server) as connection:
        connection.sendall(b"GET /b/k HTTP/1.1\r\n\r\n")
        received = b""
        while after is not None and not received.endswith(b"\r\n\r\n" + seen):
            received += connection.recv(65536)
        eventually(lambda: server.stats.in_flight == 1)
        connection.settimeout(0.05)
        with pytest.raises(TimeoutError):
            connection.recv(1)
    eventually(lambda: server.stats.in_flight == 0)
    eventually(lambda: server.stats.connections_open == 0)


@pytest.mark.parametrize("after", [None, 0, 500])
def test_stall_may_resume(server, after):
    server.script("b", "k", [Fault.stall(after=after, resume_s=0.05)])
    started = time.monotonic()
    assert ask(server).body == BODY
    assert time.monotonic() - started >= 0.04


def test_delay_adds_to_the_latency(server):
    server.latency = 0.03
    server.script("b", "k", [Fault.delay(0.05)])
    started = time.monotonic()
    assert ask(server).body == BODY
    assert time.monotonic() - started >= 0.075


def test_faults_combine_compare_and_pickle(server):
    fault = dataclasses.replace(Fault.close(after=3), delay_s=0.01, replacement=b"abcdef")
    assert pickle.loads(pickle.dumps(fault)) == fault
    server.script("b", "k", [fault])
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(server)
    assert caught.value.partial == b"abc"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fault.delay(-1),
        lambda: Fault.reset(after=-1),
        lambda: Fault.stall(resume_s=-1),
        lambda: Fault.status(42),
        lambda: S3Server(latency=-1),
        lambda: S3Server(latency=float("nan")),
        lambda: S3Server(rate_limit=0),
    ],
)
def test_impossible_values_are_refused(make):
    with pytest.raises(ConfigurationError):
        make()


def test_unknown_operation_is_refused_in_both_forms(any_server):
    with pytest.raises(ConfigurationError, match="LIST"):
        any_server.script("b", "k", [Fault()], operation="FETCH")
    with pytest.raises(ConfigurationError):
        any_server.script("b", "k", [], forever=True)


# TLS


@pytest.fixture(scope="module")
def tls(tmp_path_factory) -> tuple[os.PathLike[str], os.PathLike[str], os.PathLike[str]]:
    """Files: a certificate for the loopback address, its key, and the authority that signed it."""
    place, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(place / "certificate.pem")
    issued.private_key_pem.write_to_path(place / "key.pem")
    authority.cert_pem.write_to_path(place / "authority.pem")
    return place / "certificate.pem", place / "key.pem", place / "authority.pem"


@pytest.mark.parametrize("process", [False, True], ids=["thread", "process"])
def test_tls_carries_what_plain_http_does(tls, process):
    *pair, authority = tls
    body = BODY * 500
    with S3Server(tls=tuple(pair), process=process) as server:
        assert server.endpoint.startswith("https://127.0.0.1:")
        server.put_many("b", {"k": BODY, "large": body})
        client = boto3.client("s3", verify=os.fspath(authority), **settings(server))
        assert client.get_object(Bucket="b", Key="k")["Body"].read() == BODY
        assert client.get_object(Bucket="b", Key="large")["Body"].read() == body
        client.put_object(Bucket="b", Key="new", Body=body)
        assert client.head_object(Bucket="b", Key="new")["ContentLength"] == len(body)
        client.close()
        assert server.stats.requests == {"GET": 2, "PUT": 1, "HEAD": 1}


def exchange_under_tls(connection: socket.socket, context: ssl.SSLContext, request: bytes) -> tuple[bytes, bool]:
    """As `exchange`; and tell whether the connection was reset, which an SSLSocket does not."""
    incoming, outgoing, received = ssl.MemoryBIO(), ssl.MemoryBIO(), b""
    tls = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    steps = iter([tls.do_handshake, lambda: tls.write(request)])
    step = next(steps)
    while True:
        with contextlib.suppress(ssl.SSLWantReadError):
            while step is not None:
                step()
                step = next(steps, None)
            while piece := tls.read(65536):
                received += piece
            return received, False  # it said that it closes
        connection.sendall(outgoing.read())
        try:
            arrived = connection.recv(65536)
        except ConnectionResetError:
            return received, True
        if not arrived:
            return received, False
        incoming.write(arrived)


@pytest.mark.parametrize("fault", [Fault.reset(5000), Fault.close(5000), Fault.close(None)], ids=repr)
def test_faults_end_connections_under_tls_too(tls, fault):
    certificate, key, authority = tls
    with S3Server(tls=(certificate, key)) as server:
        server.put("b", "k", BODY)
        server.script("b", "k", [fault])
        context = ssl.create_default_context(cafile=authority)
        with connect(server) as connection:
            received, was_reset = exchange_under_tls(connection, context, b"GET /b/k HTTP/1.1\r\n\r\n")
        body = received.partition(b"\r\n\r\n")[2]
        assert body == (BODY[: fault.after] if fault.after is not None else b"")
        assert was_reset == (fault.ending == "reset")
        eventually(lambda: server.stats.connections_open == 0)


def test_client_that_does_not_trust_it_harms_no_other(tls):
    certificate, key, authority = tls
    with S3Server(tls=(certificate, key)) as server:
        server.put("b", "k", BODY)
        with pytest.raises(ssl.SSLError), connect(server) as plain:
            ssl.create_default_context().wrap_socket(plain, server_hostname="127.0.0.1")
        with connect(server) as plain:
            plain.sendall(b"GET /b/k HTTP/1.1\r\n\r\n")
        client = boto3.client("s3", verify=os.fspath(authority), **settings(server))
        assert client.get_object(Bucket="b", Key="k")["Body"].read() == BODY
        client.close()


def test_clients_amid_their_handshake_are_left_to_nobody_when_it_stops(tls):
    """A warning of what the loop left open would be an error here."""
    with S3Server(tls=(tls[0], tls[1])) as server:
        place = server.endpoint.rpartition("/")[2].split(":")
        clients = [socket.create_connection((place[0], int(place[1]))) for _ in range(3)]
        clients[0].sendall(b"\x16\x03\x01\x02\x00")  # the first bytes of a hello
        clients[1].close()
        with socket.create_connection((place[0], int(place[1]))) as whole:
            context = ssl.create_default_context(cafile=tls[2])
            with context.wrap_socket(whole, server_hostname="127.0.0.1"):  # those before it have been accepted
                pass
    for client in (clients[0], clients[2]):
        with client, contextlib.suppress(ConnectionResetError):
            assert client.recv(99) == b""


def test_files_that_are_no_certificate_and_key_are_named(tls, tmp_path):
    certificate, key, _ = tls
    for pair in [(tmp_path / "none.pem", key), (key, certificate)]:
        with pytest.raises(ConfigurationError, match=r"tls: .*\.pem and .*\.pem are no certificate"):
            S3Server(tls=pair)


# What it counts


def test_counts_cover_operations_keys_bytes_and_connections(any_server):
    any_server.put("b", "k", BODY)
    for _ in range(3):
        ask(any_server)
    ask(any_server, method="HEAD")
    ask(any_server, "/b?list-type=2")
    ask(any_server, "/b/up", "PUT", body=b"x")
    stats = any_server.stats
    assert stats.requests == {"GET": 3, "HEAD": 1, "LIST": 1, "PUT": 1}
    assert stats.requests["DELETE"] == 0
    assert (stats.gets["b", "k"], stats.gets["b", "absent"], stats.total) == (3, 0, 6)
    assert stats.bytes_sent > 3 * len(BODY)
    assert stats.connections_total == 6
    eventually(lambda: any_server.stats.connections_open == 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.in_flight = 1
    any_server.reset_counts()
    assert any_server.stats.requests == {}
    assert any_server.stats.bytes_sent == 0


def test_stats_are_a_snapshot(server):
    before = server.stats
    ask(server)
    assert before.total == 0


def test_high_water_mark_counts_requests_in_flight_at_once(any_server):
    any_server.put("b", "k", BODY)
    any_server.script("b", "k", [Fault.stall()], forever=True)
    connections = [connect(any_server) for _ in range(50)]
    for connection in connections:
        connection.sendall(b"GET /b/k HTTP/1.1\r\n\r\n")
    eventually(lambda: any_server.stats.in_flight == 50)
    for connection in connections[10:]:
        connection.close()
    eventually(lambda: any_server.stats.in_flight == 10)
    assert any_server.stats.max_in_flight == 50
    any_server.reset_counts()
    assert any_server.stats.max_in_flight == 10
    for connection in connections[:10]:
        connection.close()


def test_latency_delays_each_request_and_none_of_the_others(any_server):
    any_server.put("b", "k", BODY)
    any_server.latency = 0.1
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        assert {answer.status for answer in pool.map(lambda _: ask(any_server), range(20))} == {200}
    elapsed = time.monotonic() - started
    assert 0.095 <= elapsed < 20 * 0.1
    assert any_server.stats.max_in_flight > 1
    assert any_server.latency == 0.1


def test_more_requests_than_the_rate_limit_are_answered_by_slow_down_and_counted():
    with S3Server(rate_limit=0.001) as server:
        server.put("b", "k", BODY)
        first, *others = [ask(server) for _ in range(3)]
        assert (first.status, first.body) == (200, BODY)
        assert [(answer.status, answer.code) for answer in others] == [(503, "SlowDown")] * 2
        assert server.stats.requests["GET"] == 3


# How it starts and ends


def test_exit_closes_connections_and_leaves_no_thread(server):
    with S3Server() as own:
        own.put("b", "k", BODY)
        own.script("b", "k", [Fault.stall()])
        idle, stalled = connect(own), connect(own)
        stalled.sendall(b"GET /b/k HTTP/1.1\r\n\r\n")
        eventually(lambda: own.stats.in_flight == 1)
        endpoint = own.endpoint
        threads = threading.active_count()
    assert threading.active_count() == threads - 1
    for connection in (idle, stalled):
        with connection:
            assert read_to_end(connection) == b""
    assert refuses(endpoint)
    gc.collect()


def read_to_end(connection: socket.socket) -> bytes:
    try:
        return exchange(connection, b"")
    except ConnectionResetError:
        return b""


def test_process_ends_with_the_context():
    with S3Server(process=True) as server:
        endpoint = server.endpoint
        with connect(server) as idle:
            server.__exit__(None, None, None)
            assert read_to_end(idle) == b""
    assert refuses(endpoint)


PARENT = """
import os, sys
from asyncds.testing import S3Server
with S3Server(process=True) as server:
    forked = 0
    if sys.argv[1] == "fork":
        forked = os.fork()
        if not forked:
            sys.stdin.read()
            os._exit(0)
    print(server.endpoint, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("children", ["alone", "fork"])
def test_process_dies_with_a_parent_that_is_killed(children):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, children],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    with parent:
        assert parent.stdout
        endpoint = parent.stdout.readline().decode().strip()
        assert not refuses(endpoint)
        parent.send_signal(signal.SIGKILL)
        eventually(lambda: refuses(endpoint))


def test_process_that_was_killed_is_reported_with_its_exit_code():
    with S3Server(process=True) as server:
        assert isinstance(server._host, ProcessHost)
        server._host._process.kill()
        with pytest.raises(RuntimeError, match="exit code -9"):
            _ = server.stats


def test_server_outside_its_context_says_so():
    server = S3Server()
    for use in (lambda: server.endpoint, lambda: server.stats, lambda: server.put("b", "k", b"")):
        with pytest.raises(ConfigurationError, match="context manager"):
            use()
    with server, pytest.raises(ConfigurationError, match="already"):
        server.__enter__()
    with server:
        assert server.stats.total == 0


def test_forked_child_is_told_to_use_the_endpoint(any_server, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(ConfigurationError, match="pass its endpoint"):
        _ = any_server.stats
    monkeypatch.undo()


def test_many_objects_cross_to_the_process_in_batches():
    body = bytes(1 << 20)
    with S3Server(process=True) as server:
        etags = server.put_many("b", {f"{number:03}": body for number in range(40)})
        assert etags == [f'"{hashlib.md5(body).hexdigest()}"'] * 40
        assert ask(server, "/b/039").body == body


def test_import_loads_none_of_the_heavy_libraries():
    heavy = {"torch", "moto", "aiobotocore", "boto3"}
    program = f"import sys, asyncds.testing; print(*sorted({heavy!r} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_continuation_tokens_are_url_safe(server):
    server.put_many("l", {"😀" * number: b"" for number in range(1, 5)})
    *_, token = listing(server, "&max-keys=2")
    assert token
    assert base64.urlsafe_b64decode(token).startswith("😀".encode())
