"""Objects above 16 MiB: in parts, of one version, straight to disk, never whole in memory."""

import asyncio
import hashlib
import io
import os
import pickle
import random
import resource
import tracemalloc
import warnings
from contextlib import asynccontextmanager

import pytest

from asyncds import CachedS3MapDataset, S3Reader
from asyncds.cache import Cache
from asyncds.errors import DatasetClosed, ObjectChanged, TransferFailed
from asyncds.fetcher import Fetcher
from asyncds.large import LARGE, PART, StoredBody
from asyncds.lookup import lookup
from asyncds.manifest import ObjectInfo
from asyncds.retry import Retry
from asyncds.store.base import NoParts
from asyncds.testing import FakeStore, Fault, local_s3

SIZE = LARGE + PART + 12_345
PARTS = -(-SIZE // PART)
BODY = random.Random(0).randbytes(SIZE)


def digest(reader):
    """Of what a transform is given, read as a file, a little at a time."""
    found = hashlib.sha256()
    while chunk := reader.read(100_000):
        found.update(chunk)
    return found.hexdigest()


RIGHT = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def bucket(s3_process):
    s3_process.put("mnist", "large", BODY)
    s3_process.reset_counts()
    return s3_process


def dataset(listed=True, **options):
    make = CachedS3MapDataset.from_prefix if listed else CachedS3MapDataset.from_objects
    return make("s3://mnist/large", transform=digest, **options)


def cache():
    return Cache(os.environ["ASYNCDS_CACHE_DIR"])


# through the dataset


@pytest.mark.parametrize("listed", [True, False])
def test_large_object_arrives_in_parts_and_is_read_from_disk_from_then_on(bucket, listed):
    with dataset(listed) as first:
        assert [first[0], first[0]] == [RIGHT, RIGHT]
        assert first.stats()["gets"] == 1
        assert first.stats()["bytes"] == SIZE
    assert bucket.stats.requests["GET"] == PARTS + (not listed), "whose first answer told the size"
    assert bucket.stats.max_in_flight > 1
    with dataset(listed) as second:
        assert second[0] == RIGHT
        assert second.stats()["hits"] == 1
    assert bucket.stats.requests["GET"] == PARTS + (not listed)
    assert cache().check() == {}


@pytest.mark.parametrize("listed", [True, False])
def test_large_object_is_never_whole_in_memory(s3_process, listed):
    s3_process.put("mnist", "large", body := BODY * 5)
    with dataset(listed) as one:
        len(one)
        tracemalloc.start()
        try:
            assert [one[0], one[0]] == [hashlib.sha256(body).hexdigest()] * 2
            assert tracemalloc.get_traced_memory()[1] < 56 << 20 < len(body) / 2
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("listed", [True, False])
def test_large_object_that_the_cache_does_not_take_arrives_whole(bucket, listed):
    with warnings.catch_warnings(action="ignore"), dataset(listed, cache_size="1MB") as one:
        assert [one[0], one[0]] == [RIGHT, RIGHT]
        assert one.stats()["uncached"] == 2
    assert cache().check() == {}


@pytest.mark.parametrize("fault", [Fault.status(503), Fault.reset(5000), Fault.truncated(1000)])
def test_part_that_fails_is_asked_for_again(bucket, fault):
    bucket.script("mnist", "large", [fault, fault])
    with dataset() as one:
        assert one[0] == RIGHT
    assert bucket.stats.requests["GET"] == PARTS + 2


def test_parts_of_two_versions_are_never_mixed(bucket):
    with dataset() as one:
        len(one)
        bucket.put("mnist", "large", BODY[::-1])
        with pytest.raises(ObjectChanged, match="again"):
            one[0]
    assert cache().check() == {}
    assert cache().sweep() == 0, "nothing is left behind"


def test_server_that_knows_no_parts_sends_the_whole(monkeypatch):
    with local_s3("rclone") as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.access_key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret_key)
        upload(server)
        for listed in (True, False):
            with dataset(listed) as one:
                assert [one[0], one[0]] == [RIGHT, RIGHT]
                assert one.stats()["hits"] >= 1
    assert cache().check() == {}


def upload(server):
    from minio import Minio

    host = server.endpoint.removeprefix("http://")
    client = Minio(host, server.access_key, server.secret_key, secure=False, region=server.region)
    client.make_bucket("mnist")
    client.put_object("mnist", "large", io.BytesIO(BODY), SIZE)


def short_of_disk(folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (12 << 20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with warnings.catch_warnings(action="ignore"), dataset() as one:
        assert one[0] == RIGHT
        assert one.stats()["uncached"] == 1
    assert Cache(folder).check() == {}


def test_disk_that_is_full_in_the_midst_of_a_large_object_costs_only_the_cache(bucket, child):
    child("spawn", short_of_disk, os.environ["ASYNCDS_CACHE_DIR"])


@pytest.mark.parametrize("damage", [b"", b"\xff"])
def test_damaged_file_of_a_large_object_is_a_miss(bucket, damage):
    with dataset() as one:
        assert one[0] == RIGHT
        (path,) = cache().directory.glob("objects/*/*.obj")
        with open(path, "r+b") as file:
            file.seek(-7_000_000, io.SEEK_END)
            byte = file.read(1)
            file.seek(-1, io.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1])) if damage else file.truncate()
        bucket.reset_counts()
        assert one[0] == RIGHT
    assert bucket.stats.requests["GET"] == PARTS
    assert cache().check() == {}


def test_closing_while_a_large_object_arrives_leaves_nothing(bucket):
    bucket.script("mnist", "large", [Fault.stall()], forever=True)
    one = dataset()
    len(one)
    arrivals = one._parts[0].source.request([*one.manifest])
    while bucket.stats.requests["GET"] < PARTS:  # for as long as the test has time
        pass
    one.close()
    with pytest.raises(DatasetClosed):
        arrivals.take(0)
    assert cache().check() == {}
    assert [*cache().directory.glob("objects/*/*")] == []


# the fetcher, and other stores


@asynccontextmanager
async def fetching(store, cache):
    async with Fetcher(store, cache, concurrency=4, retry=Retry(3, 20, 5)) as fetcher:
        yield fetcher


@pytest.mark.parametrize("known", [True, False])
async def test_any_store_may_send_parts(tmp_path, known):
    store, cache = FakeStore({("b", "k"): BODY}), Cache(tmp_path)
    info = store.info("b", "k") if known else ObjectInfo("b", "k")
    async with fetching(store, cache) as fetcher:
        fetched = await fetcher.get(info)
        await fetcher.flush()
    assert isinstance(fetched.body, StoredBody)
    assert (fetched.info, fetched.body.open().read()) == (store.info("b", "k"), BODY)
    _, (found,) = lookup(cache, store.endpoint, [info])
    assert found.body.open().read() == BODY


class Whole(FakeStore):
    parts = 0

    async def get(self, info, reserve=None, part=None):
        if part is not None:
            self.parts += 1
            raise NoParts("whole objects only")
        return await super().get(info, reserve)


@pytest.mark.parametrize("known", [True, False])
async def test_store_that_cannot_is_asked_for_the_whole(tmp_path, known):
    store, cache = Whole({("b", "k"): BODY}), Cache(tmp_path)
    info = store.info("b", "k") if known else ObjectInfo("b", "k")
    async with fetching(store, cache) as fetcher:
        assert (await fetcher.get(info)).body == BODY
        await fetcher.start(info).settled
    assert len(cache) == (1 if known else 2)
    assert cache.check() == {}


async def test_store_that_cannot_is_asked_for_parts_of_one_object_only(tmp_path):
    store, cache = Whole({("b", key): BODY for key in "xyz"}), Cache(tmp_path)
    async with fetching(store, cache) as fetcher:
        for key in "xyz":
            assert (await fetcher.get(store.info("b", key))).body == BODY
    assert store.parts <= -(-SIZE // PART)


class Wrong(FakeStore):
    async def get(self, info, reserve=None, part=None):
        served, body = await super().get(info, reserve, part)
        return served, body if part is None or part.start == 0 else body[:-1]


async def test_part_of_the_wrong_length_is_no_part(tmp_path):
    store, cache = Wrong({("b", "k"): BODY}), Cache(tmp_path)
    async with fetching(store, cache) as fetcher:
        with pytest.raises(TransferFailed, match="bytes of a part of"):
            await fetcher.get(store.info("b", "k"))
    assert cache.check() == {}
    assert len(cache) == 0


async def test_one_who_waits_and_gives_up_does_not_end_a_large_download(tmp_path):
    store, cache = FakeStore({("b", "k"): BODY}), Cache(tmp_path)
    store.gates = {"k": asyncio.Event()}
    async with fetching(store, cache) as fetcher:
        info = store.info("b", "k")
        impatient, patient = (asyncio.create_task(fetcher.get(info)) for _ in range(2))
        await store.reached(PARTS if PARTS < 4 else 4)
        impatient.cancel()
        store.gates["k"].set()
        assert len((await patient).body) == SIZE


# the file that a transform is given


@pytest.fixture
def reader(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before" + BODY[:100_000])
    descriptor = os.open(path, os.O_RDONLY)
    body = StoredBody(descriptor, 6, 100_000)
    os.close(descriptor)
    path.unlink()
    return S3Reader("bucket", "key", body, "etag")


def test_stored_body_reads_as_a_file(reader):
    assert (reader.size, reader.read(3), reader.tell()) == (100_000, BODY[:3], 3)
    assert reader.seek(-5, io.SEEK_END) == 99_995
    assert reader.read(100) == BODY[99_995:100_000]
    assert reader.seek(10**9) == 100_000
    assert (reader.read(), reader.seek(10)) == (b"", 10)
    buffer = bytearray(50_000)
    assert reader.readinto(buffer) == 50_000
    assert buffer == BODY[10:50_010]
    assert (reader.seek(1, io.SEEK_CUR), reader.read(-1)) == (50_011, BODY[50_011:100_000])
    with pytest.raises(ValueError, match="negative seek"):
        reader.seek(-1)


def test_stored_body_pickles_with_its_bytes_and_stays_where_it_is(reader):
    reader.seek(7)
    again = pickle.loads(pickle.dumps(reader))
    assert (again.read(), again.key, again.etag, again.size) == (BODY[:100_000], "key", "etag", 100_000)
    assert reader.tell() == 7


def test_files_of_a_body_have_positions_of_their_own(reader):
    body = reader._file.raw._body
    one, other = body.open(), body.open()
    one.read(1000)
    assert other.read(10) == BODY[:10]


def test_descriptor_is_closed_with_the_last_who_uses_it(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 100)
    before = len(os.listdir("/dev/fd"))
    with open(tmp_path / "file", "rb") as file:
        body = StoredBody(file.fileno(), 0, 100)
    reader = S3Reader("b", "k", body)
    del body
    assert reader.read() == b"x" * 100
    assert len(os.listdir("/dev/fd")) == before + 1
    reader.close()
    del reader
    assert len(os.listdir("/dev/fd")) == before
