"""Which lane an object takes and why, what is checked on the way in, and to which address of a host a request goes."""

import asyncio
import base64
import contextlib
import hashlib
import pickle
import socket
import zlib
from collections import Counter
from dataclasses import replace

import aiobotocore.session
import pytest
import xxhash
from aiobotocore.config import AioConfig
from awscrt import checksums
from botocore import httpchecksum

from asyncds import CachedS3MapDataset, Connection, Fetcher, S3Store, Settings
from asyncds.errors import AccessDenied, ConfigurationError, ObjectChanged, TransferFailed
from asyncds.manifest import ObjectInfo
from asyncds.retry import Retry
from asyncds.store.wire import NoConnection, Pool
from asyncds.testing import FakeStore, Fault

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


def read_all(count=lanes_of, **options):
    with CachedS3MapDataset.from_prefix("s3://mnist/train/", transform=lambda file: file.read(), **options) as dataset:
        assert dataset.__getitems__(range(len(dataset))) == [BODY] * len(KEYS)
        return count(dataset)


def verified(dataset):
    """How many GETs were verified how, ways that were not taken left out."""
    name = "verified_"
    return {key.removeprefix(name): n for key, n in dataset.stats().items() if key.startswith(name) and n}


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


def test_answers_that_are_never_understood_leave_the_bucket_to_the_full_lane(server):
    for key in KEYS:
        server.script("mnist", key, [Fault.no_length()], forever=True)
    with CachedS3MapDataset.from_prefix("s3://mnist/train/", transform=lambda file: file.read()) as dataset:
        assert [dataset[n] for n in range(12)] == [BODY] * 12
        assert lanes_of(dataset) == {"gets_full_first": 1, "gets_full_answer": 11}
    assert server.stats.requests["GET"] == 12 + 8, "eight in a row are asked for twice, and then no more"


def test_objects_that_have_changed_do_not_lose_the_lane(server):
    changed = [Fault(replacement=BODY[:-1], own_etag=True)]
    for key in KEYS[1:11]:
        server.script("mnist", key, changed, forever=True)
    with CachedS3MapDataset.from_prefix("s3://mnist/train/", transform=lambda file: file.read()) as dataset:
        assert dataset[0] == BODY
        for number in range(1, 11):
            with pytest.raises(ObjectChanged):
                dataset[number]
        assert dataset[11] == BODY
        assert lanes_of(dataset) == {"gets_lean": 1, "gets_full_first": 1}


@LANES
def test_headers_that_are_no_utf_8_cost_no_connection(server, lane):
    told = Fault(extra_headers=(("x-amz-meta-place", "caf\udce9"),))  # the byte E9, as ISO 8859-1 has it
    large = BODY * 100
    server.put_many("mnist", dict.fromkeys(KEYS, large))
    server.script("mnist", None, [told], forever=True)
    options = {"lane": lane, "concurrency": 2, "deadline": 10}
    with CachedS3MapDataset.from_prefix("s3://mnist/train/", transform=lambda file: file.read(), **options) as dataset:
        assert dataset.__getitems__(range(12)) == [large] * 12
    assert server.stats.requests["GET"] == 12


@LANES
def test_refusal_with_such_headers_is_told_as_what_it_is(server, lane):
    server.script("mnist", None, [replace(Fault.status(403, "AccessDenied"), extra_headers=(("x", "\udce9"),))] * 99)
    options = {"lane": lane, "concurrency": 2, "deadline": 10}
    with CachedS3MapDataset.from_prefix("s3://mnist/train/", transform=lambda file: file.read(), **options) as dataset:
        for number in range(12):
            with pytest.raises(AccessDenied):
                dataset[number]


def test_lane_that_is_switched_off_is_so_in_another_process():
    store = S3Store(Connection("AWS"), concurrency=1, timeout=1, retry=Retry(0, 1, 1), lean=False)
    assert pickle.loads(pickle.dumps(store))._why_full("b") == "off"


async def test_counting_that_fails_harms_nobody(server, caplog):
    def fail(lane, verified):
        raise RuntimeError(lane)

    store = S3Store(Connection.resolve(Settings()), concurrency=2, timeout=5, retry=Retry(0, 5, 5), on_get=fail)
    async with asyncio.timeout(10), Fetcher(store, None, concurrency=2, retry=Retry(0, 5, 5)) as fetcher:
        for key in KEYS:
            assert (await fetcher.get(ObjectInfo("mnist", key, len(BODY)))).body == BODY
    assert "could not be counted" in caplog.text


def session_with_connections_of_its_own():
    session = aiobotocore.session.AioSession()
    session.set_credentials("AKIAEXAMPLE", "secret")
    session.set_default_client_config(AioConfig(connector_args={"use_dns_cache": False}))
    return session


def test_how_the_user_connects_counts_for_every_request(server):
    assert read_all(session_factory=session_with_connections_of_its_own) == {"gets_full_request": 12}


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
    "sha512": lambda body: hashlib.sha512(body).digest(),
    "xxhash64": lambda body: xxhash.xxh64_digest(body),
    "xxhash3": lambda body: xxhash.xxh3_64_digest(body),
    "xxhash128": lambda body: xxhash.xxh3_128_digest(body),
}


def test_checksums_are_those_of_their_standards():
    # The check values of the catalogue of parametrised CRC algorithms.
    assert CHECKSUMS["crc32c"](b"123456789").hex() == "e3069283"
    assert CHECKSUMS["crc64nvme"](b"123456789").hex() == "ae8b14860a799888"


@LANES
@pytest.mark.parametrize("algorithm", sorted(httpchecksum._CHECKSUM_CLS))
def test_flipped_bit_is_found_by_each_checksum_that_a_server_may_send(server, lane, algorithm):
    right = base64.b64encode(CHECKSUMS[algorithm](BODY)).decode()
    told = Fault(extra_headers=((f"x-amz-checksum-{algorithm}", right),))
    for key in KEYS:
        server.script("mnist", key, [replace(told, replacement=FLIPPED), told])
    assert read_all(verified, lane=lane) == {"checksum": len(KEYS)}
    assert server.stats.requests["GET"] == 2 * len(KEYS)


@pytest.mark.lean
@pytest.mark.parametrize(
    "fault",
    [
        Fault.status(503),
        Fault(replacement=FLIPPED, extra_headers=(("x-amz-checksum-crc32", "AAAAAA=="),)),
    ],
    ids=["refused", "flipped"],
)
async def test_second_attempt_takes_another_connection(server, tmp_path, fault):
    async with Fetcher.open(cache_dir=tmp_path, concurrency=1) as fetcher:
        for key in KEYS[:3]:
            await fetcher.get(ObjectInfo("mnist", key, len(BODY)))
        server.reset_counts()
        before = server.stats.connections_total
        server.script("mnist", KEYS[5], [fault])
        _, body = await fetcher.get(ObjectInfo("mnist", KEYS[5], len(BODY)))
        assert body == BODY
        assert server.stats.requests["GET"] == 2
        assert server.stats.connections_total == before + 1


def test_checksum_of_parts_is_not_taken_for_one_of_the_whole(server):
    told = base64.b64encode(b"none").decode() + "-3"
    for key in KEYS:
        server.script("mnist", key, [Fault(extra_headers=(("x-amz-checksum-crc32", told),))])
    assert read_all(verified, lane="auto") == {"length_etag": len(KEYS)}
    assert server.stats.requests["GET"] == len(KEYS)


@LANES
def test_flipped_bit_is_found_by_the_md5_in_an_etag_where_that_is_asked_for(server, lane):
    for key in KEYS:
        server.script("mnist", key, [Fault(replacement=FLIPPED)])
    assert read_all(verified, lane=lane, verify_md5=True) == {"etag_md5": len(KEYS)}
    assert server.stats.requests["GET"] == 2 * len(KEYS)


async def test_body_that_never_has_its_md5_is_an_error_that_names_the_setting(server, tmp_path):
    server.script("mnist", KEYS[0], [Fault(replacement=FLIPPED)], forever=True)
    async with Fetcher.open(verify_md5=True, cache_dir=tmp_path, retries=2) as fetcher:
        with pytest.raises(TransferFailed, match=r"MD5 .*verify_md5"):
            await fetcher.get(ObjectInfo("mnist", KEYS[0]))


NO_MD5 = {
    "of parts": Fault.etag('"' + "0" * 32 + '-2"'),
    "a store's own": Fault.etag('"not-an-md5"'),
    "of SSE-KMS": replace(Fault.etag(f'"{"0" * 32}"'), extra_headers=(("x-amz-server-side-encryption", "aws:kms"),)),
    "of SSE-C": replace(
        Fault.etag(f'"{"0" * 32}"'), extra_headers=(("x-amz-server-side-encryption-customer-algorithm", "AES256"),)
    ),
}


@LANES
@pytest.mark.parametrize("etag", NO_MD5)
def test_etag_that_is_no_md5_is_not_compared(server, etag, lane):
    for key in KEYS:
        server.script("mnist", key, [NO_MD5[etag]], forever=True)
    uris = [f"s3://mnist/{key}" for key in KEYS]
    options = {"verify_md5": True, "lane": lane}
    with CachedS3MapDataset.from_objects(uris, transform=lambda file: file.read(), **options) as dataset:
        assert dataset.__getitems__(range(12)) == [BODY] * 12
        assert verified(dataset) == {"length_etag": 12}


def test_no_md5_is_compared_for_a_store_that_is_not_s3():
    with pytest.raises(ConfigurationError, match=r"verify_md5 .* ASYNCDS_VERIFY_MD5"):
        CachedS3MapDataset.from_prefix("s3://mnist/", store=FakeStore(), verify_md5=True)


def test_checksum_counts_before_the_md5(server):
    right = base64.b64encode(CHECKSUMS["sha256"](BODY)).decode()
    server.script("mnist", None, [Fault(extra_headers=(("x-amz-checksum-sha256", right),))], forever=True)
    assert read_all(verified, verify_md5=True) == {"checksum": 12}


# to which address

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Addresses:
    """A host with several addresses, and how many connections each got; `asked` counts questions for its name."""

    def __init__(self, monkeypatch, live, dead=()):
        self.live, self.addresses, self.asked, self.connections = live, [*dead, *live], 0, Counter()
        self._servers, self._tasks = [], []
        resolve = socket.getaddrinfo

        def answer(host, port, *arguments, flags=0, **options):
            if host != "bucket.test":
                return resolve(host, port, *arguments, flags=flags, **options)
            if flags & socket.AI_NUMERICHOST:
                raise socket.gaierror("that is a name")
            self.asked += 1
            if not self.addresses:
                raise socket.gaierror("no such host")
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (place, port)) for place in self.addresses]

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

    async def get(self):
        answer = await self.pool.get(b"GET\r\n\r\n", 2, lambda _: None, fresh=True)
        assert answer.body == b"ok"

    async def get_at_once(self, count):
        await asyncio.gather(*[self.get() for _ in range(count)])

    def grow_older(self, seconds):
        self.pool._addresses._asked -= seconds


async def test_connections_are_shared_out_over_the_addresses_of_a_host(monkeypatch):
    async with Addresses(monkeypatch, ["127.0.0.1", "127.0.0.2", "127.0.0.3"]) as host:
        await host.get_at_once(12)
        assert host.connections == dict.fromkeys(host.live, 4)
        assert host.asked == 1


@pytest.mark.parametrize("kind", ["refuses", "is silent"])
async def test_address_that_cannot_be_reached_is_left_out(monkeypatch, kind):
    tried = Counter()

    async def connect(self, wire, address, connect=asyncio.SelectorEventLoop.sock_connect):
        tried[address[0]] += 1
        if address[0] == "127.0.0.9" and kind == "is silent":
            await asyncio.Event().wait()
        await connect(self, wire, address)

    monkeypatch.setattr(asyncio.SelectorEventLoop, "sock_connect", connect)
    async with Addresses(monkeypatch, ["127.0.0.1", "127.0.0.2"], dead=["127.0.0.9"]) as host:
        for _ in range(12):
            await host.get()
        assert host.connections.total() == 12
        assert host.connections.keys() == {*host.live}
        assert (host.asked, tried["127.0.0.9"]) == (1, 1)


async def test_name_that_stands_for_nothing_is_told_and_asked_for_again(monkeypatch):
    async with Addresses(monkeypatch, ["127.0.0.1"]) as host:
        host.addresses = []
        with pytest.raises(NoConnection, match=r"bucket\.test"):
            await host.get_at_once(3)
        host.addresses = host.live
        await host.get_at_once(3)


async def test_host_that_has_moved_is_found(monkeypatch):
    async with Addresses(monkeypatch, ["127.0.0.1"]) as host:
        host.addresses = ["127.0.0.9"]
        with pytest.raises(NoConnection):
            await host.get()
        host.addresses = host.live
        await host.get()  # what has failed is not believed any more
        host.addresses = ["127.0.0.9"]
        host.grow_older(3600)
        with pytest.raises(NoConnection):  # nor what is an hour old
            await host.get()


async def test_name_is_asked_for_again_beside_what_is_known_and_may_fail(monkeypatch):
    async with Addresses(monkeypatch, ["127.0.0.1", "127.0.0.2"]) as host:
        await host.get()
        host.addresses = []
        host.grow_older(30)
        await host.get()
        await asyncio.wait([host.pool._addresses._asking])
        await host.get()
        assert host.asked == 2


async def test_address_stands_for_itself(monkeypatch):
    asked = []
    monkeypatch.setattr(asyncio.SelectorEventLoop, "getaddrinfo", lambda *arguments, **_: asked.append(arguments))
    async with Addresses(monkeypatch, ["127.0.0.1"]) as host:
        host.pool = Pool("127.0.0.1", host.pool._port, timeout=5, tls=None)
        await host.get()
    assert not asked


async def test_pool_that_is_closed_while_it_asks_for_a_name_leaves_no_task(monkeypatch):
    async with Addresses(monkeypatch, ["127.0.0.1"]) as host:
        asking = asyncio.Event()

        async def ask(*_, **__):
            asking.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(asyncio.SelectorEventLoop, "getaddrinfo", ask)
        getting = asyncio.create_task(host.get())
        await asking.wait()
        getting.cancel()
        await asyncio.wait([getting])
    assert asyncio.all_tasks() == {asyncio.current_task()}
