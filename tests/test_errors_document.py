"""docs/errors.md says what people see: its classes are all there are, and its messages are those of real failures."""

import errno
import os
import re
import socket
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme

from asyncds import CachedS3MapDataset, S3Reader, errors
from asyncds.errors import AsyncdsError
from asyncds.testing import Fault, S3Server

DOCUMENT = (Path(__file__).parent.parent / "docs" / "errors.md").read_text()
PREFIX, KEY, SECRET = "s3://mnist/train/", "AKIAEXAMPLE", "the secret"
VARYING = {  # what differs from one failure to the next, and what stands for it in the document
    r"127\.0\.0\.1:\d+": "minio:9000",
    r"127\.0\.0\.1": "minio",
    r" after \d+ attempts in [\d.]+ s": "",
    r"in \d+ attempts": "in 3 attempts",
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ": "2026-01-31T12:00:00Z",
    r" \(_ssl\.c:\d+\)": "",
    r"\(\[Errno \d+\] ([^)]*)\)": r"(\1)",
    r"/\S*/(cache|taken)": r"/scratch/\1",
    r"IP address mismatch": "Hostname mismatch",
}


ANOTHER_TIME = "2026-01-31T11:00:00Z"


def as_in_the_document(message):
    first = re.search(r"it is (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ) at .*, and (?!\1)\d{4}-", message)
    if first is not None:
        message = message.replace(first[1], "another time")
    for pattern, text in VARYING.items():
        message = re.sub(pattern, text, message)
    return message.replace("another time", ANOTHER_TIME)


def first(**options):
    with CachedS3MapDataset.from_prefix(PREFIX, **{"transform": S3Reader.read} | options) as dataset:
        return dataset[0]


@pytest.fixture
def server(monkeypatch):
    with S3Server(credentials=(KEY, SECRET), check_signatures=True) as server:
        server.put_many("mnist", {f"train/{number}.png": bytes(100) for number in range(5)})
        point_to(server.endpoint, monkeypatch)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        yield server


def point_to(endpoint, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)


def changed(**variables):
    """The same with other variables; None is none."""

    def fail(server, monkeypatch, tmp_path):
        for name, value in variables.items():
            if value is None:
                monkeypatch.delenv(name)
            else:
                monkeypatch.setenv(name, value)
        first(first_contact=0.3)

    return fail


def answered(*steps, operation="GET", **options):
    """Each GET, or each page of the listing, is answered so."""

    def fail(server, monkeypatch, tmp_path):
        key = None if operation == "LIST" else "train/0.png"
        server.script("mnist", key, steps, operation=operation, forever=True)
        first(**{"retries": 3} | options)

    return fail


def at_another_time(server, monkeypatch, tmp_path):
    server.clock_skew = 86_400
    first()


def with_a_token_that_has_expired(server, monkeypatch, tmp_path):
    server.change_credentials(KEY, SECRET, "token")
    server.change_credentials(KEY, SECRET, "new token")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    first()


def after_a_change(change):
    def fail(server, monkeypatch, tmp_path):
        with CachedS3MapDataset.from_prefix(PREFIX) as dataset:
            assert len(dataset) == 5
            change(server)
            dataset[0]

    return fail


def after_it_was_closed(server, monkeypatch, tmp_path):
    with CachedS3MapDataset.from_prefix(PREFIX) as dataset:
        assert len(dataset) == 5
    dataset[0]


def in_another_region(server, monkeypatch, tmp_path):
    with S3Server(region="eu-west-3") as other:
        other.create_bucket("mnist")
        point_to(other.endpoint, monkeypatch)
        first()


def over_tls(certificate):
    def fail(server, monkeypatch, tmp_path):
        authority, path = trustme.CA(), tmp_path / "authority.pem"
        authority.cert_pem.write_to_path(str(path))
        monkeypatch.setenv("AWS_CA_BUNDLE", str(path))
        issued = tmp_path / "issued.pem"
        certificate(authority).private_key_and_cert_chain_pem.write_to_path(str(issued))
        with S3Server(tls=(issued, issued)) as other:
            point_to(other.endpoint, monkeypatch)
            first()

    return fail


def yesterday():
    return datetime.now(UTC) - timedelta(days=1)


def by_https_to_http(server, monkeypatch, tmp_path):
    point_to(server.endpoint.replace("http:", "https:"), monkeypatch)
    first()


@contextmanager
def tls_of_go():
    """A server that tells plain HTTP what MinIO's tells it."""

    def serve():
        for _ in range(1):
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                said = b"Client sent an HTTP request to an HTTPS server.\n"
                connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n" + said)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def by_http_to_https(server, monkeypatch, tmp_path):
    with tls_of_go() as endpoint:
        point_to(endpoint, monkeypatch)
        first()


def from_a_bucket_that_is_none(server, monkeypatch, tmp_path):
    len(CachedS3MapDataset.from_prefix("s3://mnits/train/"))


def from_an_empty_prefix(server, monkeypatch, tmp_path):
    len(CachedS3MapDataset.from_prefix("s3://mnist/trian/"))


def from_what_is_no_uri(server, monkeypatch, tmp_path):
    CachedS3MapDataset.from_prefix("mnist/train/")


def with_a_misspelt_argument(server, monkeypatch, tmp_path):
    first(concurency=4)


def with_a_cache_on_nfs(server, monkeypatch, tmp_path):
    monkeypatch.setattr("asyncds.folder.network_filesystem", lambda path: "nfs4")
    first(cache_dir=tmp_path / "cache")


def with_a_cache_that_is_a_file(server, monkeypatch, tmp_path):
    (tmp_path / "taken").touch()
    first(cache_dir=tmp_path / "taken")


def with_a_cache_that_others_may_write(server, monkeypatch, tmp_path):
    folder = tmp_path / "cache" / "asyncds"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    first(cache_dir=tmp_path / "cache")


def where_nobody_is(server, monkeypatch, tmp_path):
    server.__exit__()
    first(first_contact=0.3)


FAILURES = {
    "an unknown key": changed(AWS_ACCESS_KEY_ID="AKIAOTHER"),
    "a wrong secret": changed(AWS_SECRET_ACCESS_KEY="another"),
    "no keys": changed(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None),
    "half of the keys": changed(AWS_SECRET_ACCESS_KEY=None),
    "an expired token": with_a_token_that_has_expired,
    "another time": at_another_time,
    "a policy": answered(Fault.status(403), operation="LIST"),
    "another region": in_another_region,
    "no server": where_nobody_is,
    "no host": changed(AWS_ENDPOINT_URL="http://minio.invalid.lan:9000"),
    "no scheme": changed(AWS_ENDPOINT_URL="localhost:9000"),
    "no S3": answered(Fault.status(200, body=b"<!DOCTYPE html><p>Welcome<br>"), operation="LIST"),
    "no S3, 404": answered(Fault.status(404, body=b"404 page not found"), operation="LIST"),
    "https to http": by_https_to_http,
    "http to https": by_http_to_https,
    "a redirect": answered(Fault.redirect("http://169.254.169.254/")),
    "TLS of another host": over_tls(lambda authority: authority.issue_cert("s3.example")),
    "TLS of yesterday": over_tls(lambda authority: authority.issue_cert("127.0.0.1", not_after=yesterday())),
    "TLS of somebody": over_tls(lambda _: trustme.CA().issue_cert("127.0.0.1")),
    "no bucket": from_a_bucket_that_is_none,
    "nothing there": from_an_empty_prefix,
    "no URI": from_what_is_no_uri,
    "a misspelt argument": with_a_misspelt_argument,
    "deleted": after_a_change(lambda server: server.delete("mnist", "train/0.png")),
    "overwritten": after_a_change(lambda server: server.put("mnist", "train/0.png", b"new")),
    "closed": after_it_was_closed,
    "a rate limit": answered(Fault.slow_down()),
    "a server that is too old": answered(Fault.status(501, "NotImplemented")),
    "a broken connection": answered(Fault.reset(50)),
    "a short body": answered(Fault.truncated(5)),
    "a listing in a circle": answered(Fault.listing("circle"), operation="LIST"),
    "a deadline": answered(Fault.stall(), deadline=1, timeout=0.3, retries=100),
    "a cache on NFS": with_a_cache_on_nfs,
    "a cache that is a file": with_a_cache_that_is_a_file,
    "a cache of others": with_a_cache_that_others_may_write,
}


@pytest.mark.parametrize("name", FAILURES)
def test_message_of_a_failure_is_in_the_document_word_by_word(server, monkeypatch, tmp_path, name):
    with pytest.raises(AsyncdsError) as caught:
        FAILURES[name](server, monkeypatch, tmp_path)
    told = as_in_the_document(str(caught.value))
    rows = [line for line in DOCUMENT.splitlines() if f"`{told}`" in line]
    assert rows, told
    assert any(f"`{type(caught.value).__name__}`" in row for row in rows)


def test_each_class_is_in_the_document_and_no_other():
    named = set(re.findall(r"^\| `([A-Z]\w+)`", DOCUMENT, re.MULTILINE))
    assert named - {"UserWarning"} == set(errors.__all__) - {"AsyncdsError"}


def test_full_disk_warns_as_the_document_says(server, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    server.put("mnist", "train/0.png", bytes(1 << 20))
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.warns(UserWarning, match="cannot be written") as caught:
        assert first(cache_dir=tmp_path / "cache") == bytes(1 << 20)
    assert f"`{as_in_the_document(str(caught[0].message))}`" in DOCUMENT
