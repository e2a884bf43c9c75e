"""What only a real server shows: MinIO with its own checks, checksums, encryption, policies, versions, and ends."""

import contextlib
import hashlib
import io
import os
import shutil
import signal
import socket
import subprocess
import threading
import time

import aiobotocore.session
import boto3
import pytest
import trustme
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from asyncds import CachedS3MapDataset, Connection, S3Store
from asyncds.errors import AccessDenied, ConfigurationError, ObjectChanged, StoreError
from asyncds.manifest import ObjectInfo
from asyncds.retry import Retry

pytestmark = pytest.mark.skipif(
    shutil.which("minio") is None, reason="MinIO is not there: `make servers` builds it, which takes Go"
)
READ = {"transform": lambda file: file.read()}
KEYS = [f"train/{number:03}" for number in range(200)]
LANES = pytest.mark.parametrize("lane", ["auto", "full"])
CUSTOMER_KEY = "0123456789abcdef0123456789abcdef"
PATIENCE_S = 30


def body(key: str) -> bytes:
    return hashlib.shake_128(key.encode()).digest(3000)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Minio:
    """A MinIO with a folder and a port of its own, which it keeps when it is stopped and started again."""

    def __init__(self, folder, monkeypatch, *, tls=False, **environment):
        self.folder, self.port, self.process = folder, free_port(), None
        self.scheme, self.environment = ("https" if tls else "http"), environment
        (folder / "certs").mkdir()
        if tls:
            authority = trustme.CA()
            issued = authority.issue_cert("localhost", "127.0.0.1")
            issued.cert_chain_pems[0].write_to_path(folder / "certs" / "public.crt")
            issued.private_key_pem.write_to_path(folder / "certs" / "private.key")
            authority.cert_pem.write_to_path(folder / "authority.pem")
            monkeypatch.setenv("AWS_CA_BUNDLE", str(folder / "authority.pem"))
        monkeypatch.setenv("AWS_ENDPOINT_URL", self.endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "minio-of-the-tests")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-the-tests")
        monkeypatch.setenv("AWS_REGION", environment.get("MINIO_SITE_REGION", "us-east-1"))

    @property
    def endpoint(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    @property
    def client(self):
        config = Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1})
        return boto3.client("s3", config=config)

    def start(self) -> None:
        place = ("--address", f"127.0.0.1:{self.port}", "--certs-dir", str(self.folder / "certs"))
        own = {"MINIO_ROOT_USER": "minio-of-the-tests", "MINIO_ROOT_PASSWORD": "a-secret-of-the-tests"}
        quiet = {"MINIO_BROWSER": "off", "MINIO_UPDATE": "off"}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                ["minio", "server", *place, str(self.folder / "data")],
                env=os.environ | own | quiet | self.environment,
                stdout=log,
                stderr=log,
            )
        until = time.monotonic() + PATIENCE_S
        while not self._is_ready():
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < until, (self.folder / "log").read_text()

    def _is_ready(self) -> bool:
        with contextlib.suppress(BotoCoreError, ClientError):  # it listens before it serves
            self.client.list_buckets()
            return True
        return False

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(PATIENCE_S)

    def put(self, bucket: str, keys, **options) -> None:
        client = self.client
        with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=bucket)
        for key in keys:
            client.put_object(Bucket=bucket, Key=key, Body=body(key), **options)
        client.close()


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start a MinIO, with variables of its own; it is gone when the test ends."""
    started = []

    def make(**options) -> Minio:
        minio = Minio(tmp_path, monkeypatch, **options)
        started.append(minio)
        minio.start()
        return minio

    yield make
    for minio in started:
        minio.stop(signal.SIGKILL)


def samples(dataset) -> list[bytes]:
    return dataset.__getitems__(range(len(dataset)))


@LANES
@pytest.mark.parametrize("algorithm", ["CRC32", "CRC32C", "CRC64NVME", "SHA1", "SHA256"])
def test_stored_checksum_of_each_kind_is_compared(start, lane, algorithm):
    minio = start()
    minio.put("mnist", KEYS[:5], ChecksumAlgorithm=algorithm)
    with CachedS3MapDataset.from_prefix("s3://mnist/train/", lane=lane, **READ) as dataset:
        assert samples(dataset) == [body(key) for key in KEYS[:5]]
        assert dataset.stats()["verified_checksum"] == 5


@LANES
def test_object_without_a_checksum_is_compared_by_its_md5_where_that_is_asked_for(start, lane):
    minio = start()
    minio.put("mnist", [])
    config = Config(request_checksum_calculation="when_required", s3={"addressing_style": "path"})
    client = boto3.client("s3", config=config)
    client.put_object(Bucket="mnist", Key="k", Body=body("k"))
    client.upload_fileobj(
        io.BytesIO(bytes(11 << 20)), "mnist", "parts", Config=TransferConfig(multipart_chunksize=5 << 20)
    )
    client.close()
    with CachedS3MapDataset.from_prefix("s3://mnist/", lane=lane, verify_md5=True, **READ) as dataset:
        assert samples(dataset) == [body("k"), bytes(11 << 20)]
        assert [info.etag.count("-") for info in dataset.manifest] == [0, 1]
        stats = dataset.stats()
    assert (stats["verified_etag_md5"], stats["verified_length_etag"]) == (1, 1)


@LANES
def test_overwritten_version_is_never_taken_for_the_listed_one(start, lane):
    minio = start()
    minio.put("mnist", KEYS[:3])
    client = minio.client
    client.put_bucket_versioning(Bucket="mnist", VersioningConfiguration={"Status": "Enabled"})
    with CachedS3MapDataset.from_prefix("s3://mnist/train/", lane=lane, **READ) as dataset:
        assert dataset[0] == body(KEYS[0])
        client.put_object(Bucket="mnist", Key=KEYS[1], Body=b"another version")
        with pytest.raises(ObjectChanged, match="refresh"):
            dataset[1]
        assert dataset[2] == body(KEYS[2])
    with CachedS3MapDataset.from_prefix("s3://mnist/train/", lane=lane, **READ) as dataset:
        assert samples(dataset) == [body(KEYS[0]), b"another version", body(KEYS[2])]
    client.close()


@pytest.mark.parametrize("megabytes", [40, pytest.param(200, marks=pytest.mark.thorough)])
def test_empty_and_large_objects_arrive_whole(start, megabytes):
    minio = start()
    minio.put("mnist", [])
    client, large = minio.client, os.urandom(1 << 20) * megabytes
    client.put_object(Bucket="mnist", Key="empty", Body=b"")
    client.upload_fileobj(io.BytesIO(large), "mnist", "large", Config=TransferConfig(multipart_chunksize=8 << 20))
    client.close()
    with CachedS3MapDataset.from_prefix("s3://mnist/", **READ) as dataset:
        assert samples(dataset) == [b"", large]
        assert dataset.stats()["gets_lean"] >= 5


@pytest.mark.parametrize("count", [1500, pytest.param(20_000, marks=[pytest.mark.thorough, pytest.mark.timeout(600)])])
def test_listing_of_many_keys_is_complete(start, count):
    minio = start()
    keys = [f"many/{number % 7}/{number:05} +%é" for number in range(count)]
    minio.put("mnist", keys)
    with CachedS3MapDataset.from_prefix("s3://mnist/many/", **READ) as dataset:
        assert [info.key for info in dataset.manifest] == sorted(keys, key=str.encode)


# who may do what, and where


def test_wrong_region_is_named_with_the_right_one(start, monkeypatch):
    start(MINIO_SITE_REGION="eu-central-1").put("mnist", KEYS[:1])
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    dataset = CachedS3MapDataset.from_prefix("s3://mnist/", **READ)
    with dataset, pytest.raises(ConfigurationError, match=r"region 'us-east-1' is wrong.* AWS_REGION=eu-central-1"):
        len(dataset)


def allow(client, *actions: str) -> None:
    statements = [
        f'{{"Effect": "Allow", "Principal": {{"AWS": ["*"]}}, "Action": ["{action}"], "Resource": ["{place}"]}}'
        for action, place in zip(actions, ["arn:aws:s3:::mnist/*", "arn:aws:s3:::mnist"][: len(actions)], strict=True)
    ]
    policy = f'{{"Version": "2012-10-17", "Statement": [{", ".join(statements)}]}}'
    client.put_bucket_policy(Bucket="mnist", Policy=policy)


def test_public_bucket_is_read_without_keys_as_far_as_its_policy_allows(start, monkeypatch):
    minio = start()
    minio.put("mnist", KEYS[:3])
    client = minio.client
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    uris = [f"s3://mnist/{key}" for key in KEYS[:3]]
    with CachedS3MapDataset.from_objects(uris, unsigned=True, **READ) as dataset, pytest.raises(AccessDenied):
        samples(dataset)
    allow(client, "s3:GetObject")
    with CachedS3MapDataset.from_objects(uris, unsigned=True, **READ) as dataset:
        assert samples(dataset) == [body(key) for key in KEYS[:3]]
        assert dataset.stats()["gets_lean"] == 2
    with CachedS3MapDataset.from_prefix("s3://mnist/", unsigned=True, **READ) as dataset, pytest.raises(AccessDenied):
        len(dataset)
    allow(client, "s3:GetObject", "s3:ListBucket")
    with CachedS3MapDataset.from_prefix("s3://mnist/", unsigned=True, **READ) as dataset:
        assert samples(dataset) == [body(key) for key in KEYS[:3]]
    client.close()


async def test_buckets_in_host_names(start, monkeypatch):
    minio = start(MINIO_DOMAIN="minio.example")
    minio.put("mnist", KEYS[:3])
    resolve = socket.getaddrinfo

    def as_dns_would(host, *arguments, **options):
        return resolve("127.0.0.1" if str(host).endswith("minio.example") else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", as_dns_would)
    connection = Connection(
        "AWS",
        endpoint=f"http://minio.example:{minio.port}",
        region="us-east-1",
        access_key="minio-of-the-tests",
        secret_key="a-secret-of-the-tests",
        path_style=False,
    )
    store = S3Store(connection, concurrency=2, timeout=10, retry=Retry(3, 20, 10))
    for key in KEYS[:3]:
        _, found = await store.get(ObjectInfo("mnist", key, 3000))
        assert found == body(key)
    assert store.lanes == {"first": 1, "lean": 2}
    await store.aclose()


@LANES
def test_https_by_an_authority_of_ones_own(start, monkeypatch, lane):
    start(tls=True).put("mnist", KEYS[:5])
    with CachedS3MapDataset.from_prefix("s3://mnist/", lane=lane, **READ) as dataset:
        assert samples(dataset) == [body(key) for key in KEYS[:5]]
    monkeypatch.delenv("AWS_CA_BUNDLE")
    refused = pytest.raises(StoreError, match=r"TLS is refused .*AWS_CA_BUNDLE")
    with CachedS3MapDataset.from_prefix("s3://mnist/", lane=lane, **READ) as dataset, refused:
        len(dataset)


def add_customer_key(params, **_) -> None:
    params |= {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": CUSTOMER_KEY}


def session_with_a_customer_key():
    session = aiobotocore.session.AioSession()
    session.register("provide-client-params.s3.GetObject", add_customer_key)
    return session


def test_objects_under_a_customers_key(start, tmp_path):
    minio = start(tls=True)
    key = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": CUSTOMER_KEY}
    minio.put("mnist", KEYS[:3], **key)
    options = {"session_factory": session_with_a_customer_key, "verify_md5": True}
    with CachedS3MapDataset.from_prefix("s3://mnist/", **options, **READ) as dataset:
        assert samples(dataset) == [body(key) for key in KEYS[:3]]
        assert dataset.stats()["verified_etag_md5"] == 0
    without = CachedS3MapDataset.from_prefix("s3://mnist/", cache_dir=tmp_path / "another", **READ)
    with without as dataset, pytest.raises(StoreError):
        samples(dataset)


# how it ends, and comes back


@pytest.mark.parametrize(
    ("lane", "number"),
    [
        ("auto", signal.SIGKILL),
        ("full", signal.SIGTERM),
        pytest.param("auto", signal.SIGTERM, marks=pytest.mark.thorough),
        pytest.param("full", signal.SIGKILL, marks=pytest.mark.thorough),
    ],
)
def test_server_that_is_started_anew_in_an_epoch_costs_no_sample(start, lane, number):
    minio = start()
    minio.put("mnist", KEYS)
    with CachedS3MapDataset.from_prefix("s3://mnist/train/", lane=lane, concurrency=8, **READ) as dataset:
        loader = iter(dataset.loader(20))
        found = list(next(loader))
        minio.stop(number)
        again = threading.Thread(target=minio.start)
        again.start()
        for batch in loader:
            found += batch
        again.join()
    assert found == [body(key) for key in KEYS]


@pytest.mark.thorough
@pytest.mark.timeout(120)
def test_server_that_is_away_for_twenty_seconds_costs_no_sample(start):
    minio = start()
    minio.put("mnist", KEYS)
    with CachedS3MapDataset.from_prefix("s3://mnist/train/", concurrency=8, **READ) as dataset:
        loader = iter(dataset.loader(20))
        found = list(next(loader))
        minio.stop()
        again = threading.Timer(20, minio.start)
        again.start()
        for batch in loader:
            found += batch
        again.join()
    assert found == [body(key) for key in KEYS]
