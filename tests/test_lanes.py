"""Which lane an object takes and why, what is checked on the way in, and to which address of a host a request goes."""

import asyncio
import base64
import contextlib
import hashlib
import socket
import zlib
from collections import Counter
from dataclasses import replace

import aiobotocore.session
import pytest
from awscrt import checksums

from asyncds import CachedS3MapDataset, Fetcher
from asyncds.errors import ConfigurationError, TransferFailed
from asyncds.manifest import ObjectInfo
from asyncds.store.wire import NoConnection, Pool
from asyncds.testing import Fault

BODY = hashlib.shake_128(b"body").digest(10_000)
FLIPPED = BODY[:-1] + bytes([BODY[-1] ^ 1])
KEYS = [f"train/{number:02}" for number in range(12)]
LANES = pytest.mark.parametrize("lane", ["auto", "full"])


@pytest.fixture
def server(s3):
    s3.put_many("mnist", dict.fromkeys(KEYS, BODY))
    return s3


def lanes_of(dataset):
    """How many GETs took which lane, those that none took left out."""
    return {name: count for name, count in dataset.stats().items() if name.startswith("gets_") and count}


def read_all(**options):
    with CachedS3MapDataset.from_prefix("s3://mnist/train/", transform=lambda file: file.read(), **options) as dataset:
        assert dataset.__getitems__(range(len(dataset))) == [BODY] * len(KEYS)
        return lanes_of(dataset)


# which lane


def test_first_object_of_a_bucket_teaches_the_lane_of_the_others(server):
    assert read_all() == {"gets_lean": 11, "gets_full_first": 1}


@pytest.mark.parametrize("by", ["argument", "variable"])
def test_lane_can_be_switched_off(server, monkeypatch, by):
    if by == "variable":
        monkeypatch.setenv("ASYNCDS_LANE", "full")
    assert read_all(**({"lane": "full"} if by == "argument" else {})) == {"gets_full_off": 12}


def test_unknown_lane_is_told_which_there_are(monkeypatch):
    monkeypatch.setenv("ASYNCDS_LANE", "fast")
    with pytest.raises(ConfigurationError, match="ASYNCDS_LANE='fast': must be auto or full"):
        CachedS3MapDataset.from_prefix("s3://mnist/train/")


def adds_a_header(request, **_):
    request.headers["x-mine"] = request.url[-2:]


def session_with_a_hook():
    session = aiobotocore.session.AioSession()
    session.set_credentials("AKIAEXAMPLE", "secret")
    session.register("before-sign.s3.GetObject", adds_a_header)
    return session


def test_hook_of_the_user_sees_every_request(server):
    assert read_all(session_factory=session_with_a_hook) == {"gets_full_request": 12}


def test_answer_that_only_the_full_lane_understands_goes_there(server):
    server.script("mnist", KEYS[5], [Fault.no_length()])
    assert read_all() == {"gets_lean": 10, "gets_full_first": 1, "gets_full_answer": 1}


def test_lanes_of_workers_are_summed(server):
    with CachedS3MapDataset.from_prefix("s3://mnist/train/", transform=len_of) as dataset:
        for _ in dataset.loader(3, num_workers=2):
            pass
        assert lanes_of(dataset) == {"gets_lean": 10, "gets_full_first": 2}


def len_of(file):
    return len(file.read())


# what is checked

CHECKSUMS = {
    "crc32": lambda body: zlib.crc32(body).to_bytes(4, "big"),
    "crc32c": lambda body: checksums.crc32c(body).to_bytes(4, "big"),
    "crc64nvme": lambda body: checksums.crc64nvme(body).to_bytes(8, "big"),
    "sha1": lambda body: hashlib.sha1(body).digest(),
    "sha256": lambda body: hashlib.sha256(body).digest(),
}


def test_checksums_are_those_of_their_standards():
    # The check values of the catalogue of parametrised CRC algorithms.
    assert CHECKSUMS["crc32c"](b"123456789").hex() == "e3069283"
    assert CHECKSUMS["crc64nvme"](b"123456789").hex() == "ae8b14860a799888"


@LANES
@pytest.mark.parametrize("algorithm", CHECKSUMS)
def test_flipped_bit_is_found_by_each_checksum_that_a_server_may_send(server, lane, algorithm):
    right = base64.b64encode(CHECKSUMS[algorithm](BODY)).decode()
    told = Fault(extra_headers=((f"x-amz-checksum-{algorithm}", right),))
    for key in KEYS:
        server.script("mnist", key, [replace(told, replacement=FLIPPED), told])
    read_all(lane=lane)
    assert server.stats.requests["GET"] == 2 * len(KEYS)


def test_checksum_of_parts_is_not_taken_for_one_of_the_whole(server):
    told = base64.b64encode(b"none").decode() + "-3"
    for key in KEYS:
        server.script("mnist", key, [Fault(extra_headers=(("x-amz-checksum-crc32", told),))])
    assert read_all(lane="auto")["gets_lean"] == 11
    assert server.stats.requests["GET"] == len(KEYS)


@LANES
def test_flipped_bit_is_found_by_the_md5_in_an_etag_where_that_is_asked_for(server, lane):
    for key in KEYS:
        server.script("mnist", key, [Fault(replacement=FLIPPED)])
    read_all(lane=lane, verify_md5=True)
    assert server.stats.requests["GET"] == 2 * len(KEYS)


async def test_body_that_never_has_its_md5_is_an_error_that_names_the_setting(server, tmp_path):
    server.script("mnist", KEYS[0], [Fault(replacement=FLIPPED)], forever=True)
    async with Fetcher.open(verify_md5=True, cache_dir=tmp_path, retries=2) as fetcher:
        with pytest.raises(TransferFailed, match=r"MD5 .*verify_md5"):
            await fetcher.get(ObjectInfo("mnist", KEYS[0]))


@pytest.mark.parametrize("etag", ["0" * 32 + "-2", "not-an-md5"])
def test_etag_that_is_no_md5_is_not_compared(server, etag):
    for key in KEYS:
        server.script("mnist", key, [Fault.etag(f'"{etag}"')], forever=True)
    uris = [f"s3://mnist/{key}" for key in KEYS]
    with CachedS3MapDataset.from_objects(uris, transform=lambda file: file.read(), verify_md5=True) as dataset:
        assert dataset.__getitems__(range(12)) == [BODY] * 12


# to which address

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Addresses:
    """A host with several addresses, and how many connections each got; `asked` counts questions for its name."""

    def __init__(self, monkeypatch, live, dead=()):
        self.live, self.dead, self.asked, self.connections = live, dead, 0, Counter()
        self._servers, self._tasks = [], []
        resolve = socket.getaddrinfo

        def answer(host, port, *arguments, **options):
            if host != "bucket.test":
                return resolve(host, port, *arguments, **options)
            self.asked += 1
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (place, port)) for place in [*self.dead, *self.live]]

        monkeypatch.setattr(socket, "getaddrinfo", answer)

    async def __aenter__(self):
        port = 0
        for address in self.live:
            server = await asyncio.start_server(self._serve, address, port)
            port = server.sockets[0].getsockname()[1]
            self._servers.append(server)
        self.pool = Pool("bucket.test", port, timeout=5, tls=None)
        return self

    async def __aexit__(self, *_):
        await self.pool.aclose()
        for server in self._servers:
            server.close()
        await asyncio.wait_for(asyncio.gather(*self._tasks), 10)

    async def _serve(self, reader, writer):
        self._tasks.append(asyncio.current_task())
        self.connections[writer.get_extra_info("sockname")[0]] += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(ANSWER)
        writer.close()

    async def get_at_once(self, count):
        answers = await asyncio.gather(*[self.pool.get(b"GET\r\n\r\n", 2, lambda _: None) for _ in range(count)])
        assert [answer.body for answer in answers] == [b"ok"] * count


async def test_connections_are_shared_out_over_the_addresses_of_a_host(monkeypatch):
    async with Addresses(monkeypatch, ["127.0.0.1", "127.0.0.2", "127.0.0.3"]) as host:
        await host.get_at_once(12)
        assert host.connections == dict.fromkeys(host.live, 4)
        assert host.asked == 1


async def test_address_that_cannot_be_reached_is_left_out(monkeypatch):
    async with Addresses(monkeypatch, ["127.0.0.1", "127.0.0.2"], dead=["127.0.0.9"]) as host:
        await host.get_at_once(12)
        assert host.connections.total() == 12
        assert host.connections.keys() == {*host.live}
        assert host.asked == 1


async def test_name_that_stands_for_nothing_is_told_and_asked_for_again(monkeypatch):
    async with Addresses(monkeypatch, ["127.0.0.1"]) as host:
        with monkeypatch.context() as patch:
            patch.setattr(socket, "getaddrinfo", refuse)
            with pytest.raises(NoConnection, match=r"bucket\.test"):
                await host.get_at_once(3)
        await host.get_at_once(3)


def refuse(*_, **__):
    raise socket.gaierror("no such host")
