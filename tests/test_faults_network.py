"""What networks and servers do, end to end: a dataset brings the right bytes, or an error that says what to do.

Each test tells the server what goes wrong, reads through a dataset on each lane, and compares the bytes, what the
server was asked, and the error. `test_store.py` has such faults where a store meets them, and `test_wire_fuzz.py` more.
"""

import asyncio
import contextlib
import os
import re
import resource
import socket
import threading
import time
from datetime import UTC, datetime, timedelta

import aiobotocore.credentials
import aiobotocore.session
import pytest
import trustme
from torch.utils.data import DataLoader

from asyncds import CachedS3MapDataset, S3Reader
from asyncds.errors import (
    AccessDenied,
    AsyncdsError,
    EndpointUnreachable,
    EndpointUntrusted,
    ObjectChanged,
    ObjectNotFound,
    StoreError,
    TransferFailed,
)
from asyncds.fetcher import Fetcher
from asyncds.manifest import ObjectInfo
from asyncds.testing import Fault, S3Server, body_of

KEYS = [f"x/{number:03}" for number in range(100)]
SIZE = 3000
PREFIX = "s3://mnist/x/"
BODIES = [body_of(key, SIZE) for key in KEYS]
HTML = b"<html><body><h1>502 Bad Gateway</h1></body></html>"

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")


@pytest.fixture(scope="module")
def server():
    with S3Server(process=True) as server:
        server.put_many("mnist", dict(zip(KEYS, BODIES, strict=True)))
        yield server


@pytest.fixture(params=["full", pytest.param("auto", marks=pytest.mark.lean)])
def lane(request, monkeypatch):
    """The lane of all objects but the first: the one that the variable names."""
    monkeypatch.setenv("ASYNCDS_LANE", request.param)
    return request.param


def opened(**options):
    return CachedS3MapDataset.from_prefix(PREFIX, transform=S3Reader.read, **options)


def failure_in_a_worker(dataset, indices=range(2, 4)):
    """The error that comes out of a worker for a batch of these samples."""
    loader = DataLoader(
        dataset, batch_sampler=[list(indices)], collate_fn=list, num_workers=1, multiprocessing_context="fork"
    )
    try:
        list(loader)
    except AsyncdsError as error:
        error.__cause__ = error.__context__ = None  # their frames would keep the worker
        return error.with_traceback(None)
    raise AssertionError("the batch came")


# what passes: right bytes, and as many requests as there were faults


PASSING = {
    "500 and 504": [Fault.status(500), Fault.status(504, "GatewayTimeout")],
    "502 with a page of HTML": [Fault.status(502, headers={"Content-Type": "text/html"}, body=HTML)],
    "429": [Fault.status(429, "TooManyRequests")],
    "503 that says when to come back": [Fault.slow_down(0.1), Fault.slow_down("Fri, 31 Dec 1999 23:59:59 GMT")],
    "a page of HTML under 200": [Fault.status(200, headers={"Content-Type": "text/html"}, body=HTML)],
    "an error document under 200": [Fault.status(200, "InternalError")],
    "reset at byte 0": [Fault.reset(0)],
    "reset at byte 1": [Fault.reset(1)],
    "reset in the middle": [Fault.reset(SIZE // 2)],
    "reset at the last byte": [Fault.reset(SIZE - 1)],
    "short under its true length": [Fault.close(SIZE // 2)],
    "chunks that are cut off": [Fault.chunked(after=SIZE // 2)],
    "chunks that say they are longer": [Fault.chunked(lie=7)],
    "chunks that say they are shorter": [Fault.chunked(lie=-7)],
    "no length, and short": [Fault.no_length(after=SIZE // 2)],
    "longer than listed": [Fault.padded(1)],
    "shorter than listed": [Fault.truncated(SIZE - 1)],
    "another body": [Fault.body(b"another")],
    "a first line that is no HTTP": [Fault.status_line(b"HTTP/1.1 2OO OK"), Fault.status_line(b"ICY 200 OK")],
    "10 GB": [Fault.huge(10 << 30)],
    "1 MB of headers": [Fault.headers({f"x-{number}": "y" * 1000 for number in range(1000)})],
    "a bomb": [Fault.gzip_bomb(32 << 20)],
}


def test_what_passes_costs_as_many_requests_as_there_were_faults_and_no_byte(bucket, lane):
    """Server errors, pages of HTML, resets, short, long and forged answers: a key each, all in one batch."""
    keys = dict(zip(PASSING, KEYS[1:], strict=False))
    for name, key in keys.items():
        bucket.script("mnist", key, PASSING[name])
    with opened() as dataset:
        assert dataset[0] == BODIES[0]
        assert dataset.__getitems__(range(len(keys) + 1)) == BODIES[: len(keys) + 1]
        stats = dataset.stats()
    asked = {name: bucket.stats.gets["mnist", key] for name, key in keys.items()}
    for name, faults in PASSING.items():  # what the lean lane does not understand, the full lane looks at
        assert len(faults) < asked[name] <= 2 * len(faults) + 1, name
        assert lane == "auto" or asked[name] == len(faults) + 1, name
    assert stats["retries"] <= sum(map(len, PASSING.values()))
    assert stats["failures"] == 0


def test_chunked_body_of_the_right_size_is_right(bucket, lane):
    bucket.script("mnist", None, [Fault.chunked(700)], forever=True)
    with opened() as dataset:
        assert dataset.__getitems__(range(5)) == BODIES[:5]
        assert dataset.stats()["retries"] == 0


def test_burst_of_64_refusals_surfaces_no_error_and_costs_64_requests(bucket, lane):
    with opened() as dataset:
        assert dataset[0] == BODIES[0]
        bucket.script("mnist", None, [Fault.status(503)] * 64, shared=True)
        started = time.monotonic()
        assert dataset.__getitems__(range(100)) == BODIES
        assert time.monotonic() - started < 10
        assert dataset.stats()["retries"] == 64
    assert bucket.stats.requests["GET"] == 100 + 64
    assert sum(bucket.stats.faulted.values()) == 64


def storm(bucket, seconds):
    """Every GET is refused for so long, which begins amid an epoch; returns the seconds that the rest then takes."""
    calm = threading.Event()

    def end():
        time.sleep(seconds)
        calm.set()
        bucket.clear_scripts()

    with opened() as dataset:
        assert dataset[0] == BODIES[0]
        bucket.script("mnist", None, [Fault.status(503)], forever=True)
        weather = threading.Thread(target=end)
        weather.start()
        assert dataset.__getitems__(range(100)) == BODIES
        ended = time.monotonic()
        assert calm.is_set()
        weather.join()
        retries = dataset.stats()["retries"]
    assert bucket.stats.requests["GET"] == 100 + retries
    assert retries == sum(bucket.stats.faulted.values())
    return ended, retries


def test_storm_of_refusals_surfaces_no_error_and_asks_less_and_less(bucket):
    started = time.monotonic()
    ended, retries = storm(bucket, 3)
    assert ended - started < 15
    assert retries < 99 * 12, "full jitter up to 1.5 s"


@pytest.mark.thorough
@pytest.mark.timeout(120)
def test_storm_of_half_a_minute_surfaces_no_error(bucket):
    started = time.monotonic()
    ended, retries = storm(bucket, 30)
    assert ended - started < 36
    assert retries < 99 * 50


def test_rate_limit_of_the_server_surfaces_no_error(lane, monkeypatch, bucket):
    with S3Server(rate_limit=200) as limited:
        limited.put_many("mnist", dict(zip(KEYS, BODIES, strict=True)))
        monkeypatch.setenv("AWS_ENDPOINT_URL", limited.endpoint)
        with opened() as dataset:
            assert dataset.__getitems__(range(100)) == BODIES
            assert limited.stats.refused > 0
            assert limited.stats.requests["GET"] == 100 + dataset.stats()["retries"]


def test_stall_ends_with_its_attempt_and_is_asked_for_again(bucket, lane):
    for key, fault in zip(KEYS[1:], (Fault.stall(), Fault.stall(0), Fault.stall(SIZE // 2)), strict=False):
        bucket.script("mnist", key, [fault])
    with opened(timeout=0.4) as dataset:
        assert dataset.__getitems__(range(10)) == BODIES[:10]
        assert dataset.stats()["retries"] == 3


def test_drip_is_given_up_and_asked_for_again(bucket, lane):
    bucket.script("mnist", KEYS[3], [Fault.dripping(1, 0.1)])  # the whole of it would take five minutes
    with opened(timeout=1, deadline=300) as dataset:
        assert dataset[0] == BODIES[0]
        assert dataset[3] == BODIES[3]
        assert dataset.stats()["retries"] == 1


def test_each_retry_takes_another_connection(bucket, lane):
    with opened() as dataset:
        assert dataset.__getitems__(range(3)) == BODIES[:3]
        bucket.script("mnist", KEYS[7], [Fault.status(503)] * 3)
        before = bucket.stats.connections_total
        assert dataset[7] == BODIES[7]
        assert bucket.stats.connections_total == before + 3


@pytest.mark.lean
def test_bucket_whose_answers_are_odd_every_other_time_costs_one_request_for_each_soon(bucket):
    """What the lean lane does not understand is asked for twice: for a while, not for ever."""
    with S3Server() as odd:
        infos = odd.derive("mnist", 300, SIZE, prefix="x/") or [f"x/{number:03}" for number in range(300)]
        for key in infos[::2]:
            odd.script("mnist", key, [Fault.chunked(700)], forever=True)
        with opened(endpoint=odd.endpoint, concurrency=4) as dataset:
            assert len(dataset.__getitems__(range(300))) == 300
        assert 300 < odd.stats.requests["GET"] < 330


def test_store_that_says_when_to_ask_again_is_not_asked_before(bucket, lane):
    bucket.script("mnist", KEYS[3], [Fault.slow_down(retry_after=1)])
    with opened() as dataset:
        assert dataset[0] == BODIES[0]
        started = time.monotonic()
        assert dataset[3] == BODIES[3]
        assert time.monotonic() - started >= 1


# connections


def test_connections_that_the_server_closed_while_idle_cost_no_retry(lane, monkeypatch, bucket):
    with S3Server(idle_timeout=0.1) as closing:
        closing.put_many("mnist", dict(zip(KEYS, BODIES, strict=True)))
        monkeypatch.setenv("AWS_ENDPOINT_URL", closing.endpoint)
        with opened() as dataset:
            for start in range(0, 60, 20):
                assert dataset.__getitems__(range(start, start + 20)) == BODIES[start : start + 20]
                while closing.stats.connections_open:
                    time.sleep(0.005)
            assert dataset.stats()["retries"] == 0
        assert closing.stats.requests["GET"] == 60


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Stocked(S3Server):
    """Has all objects before it listens."""

    def _factory(self):
        make = super()._factory()

        def stocked():
            service = make()
            service.put_many("mnist", dict(zip(KEYS, BODIES, strict=True)))
            return service

        return stocked


@contextlib.contextmanager
def coming_back(server, dataset, seconds):
    """The server ends, and is there again so many seconds later, once it has been missed."""

    def come_back():
        time.sleep(seconds)
        while not dataset.stats()["retries"]:
            time.sleep(0.01)
        server.__enter__()

    server.__exit__()
    again = threading.Thread(target=come_back)
    again.start()
    try:
        yield
    finally:
        again.join()


def rest_of_an_epoch_while_the_endpoint_is_away(seconds, lane, monkeypatch):
    """Returns how many seconds it took."""
    with Stocked(port=free_port()) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        with opened() as dataset:
            assert dataset.__getitems__(range(10)) == BODIES[:10]
            started = time.monotonic()
            with coming_back(server, dataset, seconds):
                assert dataset.__getitems__(range(100)) == BODIES
            stats = dataset.stats()
        assert server.stats.requests["GET"] == 90 + stats["hedges"], "none twice"
    assert (stats["failures"], stats["gets_lean"]) == (0, 0 if lane == "full" else 99)
    return time.monotonic() - started


def test_endpoint_that_is_away_for_a_while_costs_no_sample(lane, monkeypatch, bucket):
    assert rest_of_an_epoch_while_the_endpoint_is_away(1, lane, monkeypatch) > 1


@pytest.mark.thorough
@pytest.mark.timeout(120)
def test_endpoint_that_is_away_for_20_seconds_costs_no_sample(lane, monkeypatch, bucket):
    assert 20 < rest_of_an_epoch_while_the_endpoint_is_away(20, lane, monkeypatch) < 45


class Name:
    """A host's name that stands for a server, or for none: as many questions as `unknown` says have no answer."""

    def __init__(self, monkeypatch):
        self.server, self.unknown, self.asked = None, 0, 0
        self._resolve = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self._answer)

    def _answer(self, host, port, *arguments, **options):
        if host not in ("store.lan", b"store.lan"):
            return self._resolve(host, port, *arguments, **options)
        if options.get("flags", 0) & socket.AI_NUMERICHOST:
            raise socket.gaierror("that is a name")
        self.asked += 1
        if self.asked <= self.unknown or self.server is None:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port_of(self.server)))]


def port_of(server):
    return int(server.endpoint.rpartition(":")[2])


@pytest.fixture
def name(monkeypatch, bucket):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store.lan")
    return Name(monkeypatch)


async def bodies(fetcher, keys):
    return [body for _, body in await asyncio.gather(*(fetcher.get(ObjectInfo("mnist", key, SIZE)) for key in keys))]


async def test_name_that_means_nothing_at_first_is_asked_for_again(lane, name, bucket):
    name.server, name.unknown = bucket, 3
    async with Fetcher.open(hedging=False) as fetcher:
        assert await bodies(fetcher, KEYS[:20]) == BODIES[:20]
    assert name.asked > 3
    assert bucket.stats.requests["GET"] == 20, "none twice"


async def test_name_that_goes_on_to_mean_nothing_is_an_error_that_names_it(lane, name):
    async with Fetcher.open(first_contact=0.5) as fetcher:
        with pytest.raises(EndpointUnreachable, match=r"s3://mnist/x/000: no connection to store\.lan:80.*check that"):
            await bodies(fetcher, KEYS[:1])
    assert name.asked


@pytest.mark.thorough
@pytest.mark.timeout(120)
async def test_server_that_has_moved_while_its_name_meant_nothing_for_20_seconds_costs_no_sample(lane, name):
    """Connections end, the name is not resolved for a while, and then stands for another place."""
    async with Fetcher.open(hedging=False) as fetcher:
        with Stocked() as name.server:
            assert await bodies(fetcher, KEYS[:10]) == BODIES[:10]
        name.server = None
        rest = asyncio.create_task(bodies(fetcher, KEYS[10:]))
        await asyncio.sleep(20)
        assert not rest.done()
        with Stocked() as name.server:
            assert await rest == BODIES[10:]
            assert name.server.stats.requests["GET"] == 90, "none twice"


def test_endpoint_that_stays_away_is_an_error_that_names_host_and_port_out_of_a_worker(lane, monkeypatch, bucket):
    with S3Server() as server:
        server.put_many("mnist", dict(zip(KEYS, BODIES, strict=True)))
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        place = server.endpoint.removeprefix("http://")
        dataset = opened(deadline=1, first_contact=0.5)
        assert len(dataset) == 100
    with dataset:
        error = failure_in_a_worker(dataset)
    assert type(error) is EndpointUnreachable
    assert re.search(
        rf"s3://mnist/x/00[23]: no connection to {re.escape(place)}.*check that the server runs", str(error)
    )


# what does not pass: an error of the right class at once, which names the object and the remedy


LASTING = {
    "403": (Fault.status(403), AccessDenied, r"403 AccessDenied \(Access Denied\) .*and the bucket's policy"),
    "404": (Fault.status(404), ObjectNotFound, "list the prefix again"),
    "412": (Fault.status(412), ObjectChanged, "refresh"),
    "another ETag": (Fault.etag('"0123"'), ObjectChanged, "refresh"),
    "416": (Fault.status(416), StoreError, "416 InvalidRange"),
}


def test_what_does_not_pass_is_told_at_once_out_of_a_worker_and_never_cached(bucket, lane):
    with opened() as dataset:
        assert dataset[0] == BODIES[0]
        for index, (step, kind, said) in enumerate(LASTING.values(), 3):
            bucket.script("mnist", KEYS[index], [step], forever=True)
            error = failure_in_a_worker(dataset, [1, 2, index])
            assert type(error) is kind
            assert re.search(f"s3://mnist/{KEYS[index]}: .*{said}", str(error))
            assert bucket.stats.gets["mnist", KEYS[index]] <= (1 if lane == "full" else 2)
        bucket.clear_scripts()
        assert dataset.__getitems__(range(9)) == BODIES[:9]


def test_overwritten_object_is_told_and_comes_with_a_new_listing(lane, monkeypatch, bucket):
    with S3Server() as server:
        server.put_many("mnist", dict(zip(KEYS, BODIES, strict=True)))
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        with opened() as dataset:
            assert dataset[0] == BODIES[0]
            server.put("mnist", KEYS[3], b"new")
            error = failure_in_a_worker(dataset)
        assert type(error) is ObjectChanged
        assert "s3://mnist/x/003: the object changed" in str(error)
        with opened() as dataset:
            assert dataset.__getitems__([0, 3]) == [BODIES[0], b"new"]


LOCATIONS = {
    "another server": None,
    "a link-local address": "http://169.254.169.254/latest/meta-data/",
    "itself": None,
}


@pytest.mark.parametrize("location", LOCATIONS)
def test_redirects_are_refused_and_nothing_is_sent_elsewhere(bucket, lane, location):
    with S3Server() as other:
        place = f"{other.endpoint}/mnist/k" if location == "another server" else LOCATIONS[location]
        started = time.monotonic()
        for index, status in enumerate((301, 302, 307), 3):
            step = Fault.redirect(place, status=status)
            bucket.clear_scripts()
            bucket.reset_counts()
            with opened() as dataset:
                assert dataset[0] == BODIES[0]
                bucket.script("mnist", KEYS[index], [step], forever=True)
                with pytest.raises(StoreError, match=f"s3://mnist/{KEYS[index]}: 127.0.0.1 redirects to .*: refused"):
                    dataset[index]
                assert bucket.stats.gets["mnist", KEYS[index]] <= (1 if lane == "full" else 2)
            bucket.script("mnist", None, [step], operation="LIST", forever=True)
            with opened() as dataset, pytest.raises(StoreError, match=r"listing s3://mnist/x/: .* redirects to"):
                len(dataset)
            assert bucket.stats.requests["LIST"] == 2
        assert time.monotonic() - started < 25, "somebody was waited for"
        assert other.stats.connections_total == 0


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


def certificate(authority, folder, name="127.0.0.1", **options):
    issued, path = authority.issue_cert(name, **options), folder / f"{time.monotonic_ns()}.pem"
    issued.private_key_and_cert_chain_pem.write_to_path(os.fspath(path))
    return path, path


@pytest.mark.parametrize("wrong", ["another host", "expired", "unknown authority"])
def test_tls_that_turns_bad_is_refused_without_a_retry(authority, tmp_path, monkeypatch, lane, wrong, bucket):
    trusted = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(os.fspath(trusted))
    monkeypatch.setenv("AWS_CA_BUNDLE", os.fspath(trusted))
    yesterday = datetime.now(UTC) - timedelta(days=1)
    bad = {
        "another host": lambda: certificate(authority, tmp_path, "s3.example"),
        "expired": lambda: certificate(authority, tmp_path, not_after=yesterday),
        "unknown authority": lambda: certificate(trustme.CA(), tmp_path),
    }[wrong]()
    with S3Server(tls=certificate(authority, tmp_path), idle_timeout=0.1) as server:
        server.put_many("mnist", dict(zip(KEYS, BODIES, strict=True)))
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        with opened() as dataset:
            assert dataset.__getitems__(range(5)) == BODIES[:5]
            assert dataset.stats()["gets_lean"] == (0 if lane == "full" else 4)
            server.change_certificate(*bad)
            while server.stats.connections_open:
                time.sleep(0.005)
            server.reset_counts()
            with pytest.raises(EndpointUntrusted, match=r"s3://mnist/x/007: TLS is refused .*, or AWS_CA"):
                dataset[7]
            assert dataset.stats()["retries"] == 0
        with opened() as dataset, pytest.raises(EndpointUntrusted, match="listing s3://mnist/x/: TLS is refused"):
            len(dataset)
        assert server.stats.total == 0
        assert server.stats.connections_total <= 2


def test_tls_that_is_refused_for_another_reason_is_no_matter_of_trust(authority, tmp_path, monkeypatch, bucket):
    """A server that wants TLS 1.1 and nothing newer, say."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{listener.getsockname()[1]}")

        def alert():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(b"\x15\x03\x01\x00\x02\x02\x46")  # fatal: protocol version

        threading.Thread(target=alert, daemon=True).start()
        with opened(first_contact=0.5) as dataset, pytest.raises(StoreError) as caught:
            len(dataset)
        listener.shutdown(socket.SHUT_RDWR)
    assert type(caught.value) is StoreError
    assert "TLS is refused" in str(caught.value)


def test_clock_that_is_off_is_told_with_both_dates_out_of_a_worker(lane, monkeypatch, bucket):
    with S3Server(credentials=(os.environ["AWS_ACCESS_KEY_ID"], "the secret"), check_signatures=True) as server:
        server.put_many("mnist", dict(zip(KEYS, BODIES, strict=True)))
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the secret")
        with opened() as dataset:
            assert dataset[0] == BODIES[0]
            server.clock_skew = 86_400
            server.reset_counts()
            error = failure_in_a_worker(dataset, [3])
        assert type(error) is AccessDenied
        here, there = (datetime.now(UTC) + timedelta(days=days) for days in (0, 1))
        assert f"{here:%Y-%m-%d}T" in str(error)
        assert f"{there:%Y-%m-%d}T" in str(error)
        assert "set the clock" in str(error)
        assert "policy" not in str(error)
        assert server.stats.total <= 2, "not retried"


# credentials that end


class Renewed:
    """Credentials as an instance's role has them: temporary, and renewed by asking for others when they are due."""

    def __init__(self, server) -> None:
        self.server = server
        self.asked = 0
        self.ahead = timedelta(0)

    def now(self):
        return datetime.now(UTC) + self.ahead

    def current(self):
        expires = (self.now() + timedelta(hours=1)).isoformat()
        keys = {"access_key": f"AKIA{self.asked}", "secret_key": f"secret {self.asked}", "token": f"token {self.asked}"}
        return keys | {"expiry_time": expires}

    async def renew(self):
        self.asked += 1
        self.server.change_credentials(f"AKIA{self.asked}", f"secret {self.asked}", f"token {self.asked}")
        return self.current()

    def session(self):
        made = aiobotocore.session.AioSession()
        first = self.current()
        made._credentials = aiobotocore.credentials.AioRefreshableCredentials(
            first["access_key"],
            first["secret_key"],
            first["token"],
            self.now() + timedelta(hours=1),
            self.renew,
            method="test",
            time_fetcher=self.now,
        )
        return made


@pytest.fixture
def temporary(monkeypatch, bucket):
    with S3Server(credentials=("AKIA0", "secret 0", "token 0"), check_signatures=True) as server:
        server.put_many("mnist", dict(zip(KEYS, BODIES, strict=True)))
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        yield server


def test_credentials_that_are_due_are_renewed_once_amid_an_epoch(lane, temporary):
    role = Renewed(temporary)
    with opened(session_factory=role.session) as dataset:
        assert dataset.__getitems__(range(20)) == BODIES[:20]
        role.ahead += timedelta(hours=1)
        assert dataset.__getitems__(range(100)) == BODIES
        assert (role.asked, dataset.stats()["failures"]) == (1, 0)


def test_credentials_that_the_server_lets_expire_early_are_renewed_once(lane, temporary):
    role = Renewed(temporary)
    with opened(session_factory=role.session) as dataset:
        assert dataset.__getitems__(range(20)) == BODIES[:20]
        temporary.change_credentials("AKIA1", "secret 1", "token 1")
        assert dataset.__getitems__(range(100)) == BODIES
        assert (role.asked, dataset.stats()["failures"]) == (1, 0)


def test_keys_of_the_environment_that_expire_are_told_at_once(lane, temporary, monkeypatch):
    for name, value in {"ACCESS_KEY_ID": "AKIA0", "SECRET_ACCESS_KEY": "secret 0", "SESSION_TOKEN": "token 0"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with opened() as dataset:
        assert dataset.__getitems__(range(2)) == BODIES[:2]
        temporary.change_credentials("AKIA1", "secret 1", "token 1")
        temporary.reset_counts()
        error = failure_in_a_worker(dataset, [3])
    assert type(error) is AccessDenied
    assert re.search(r"s3://mnist/x/003: 400 ExpiredToken .*AWS_SESSION_TOKEN", str(error))
    assert "token 0" not in str(error)
    assert temporary.stats.total <= 2


# listings


def test_pages_that_are_unsorted_or_doubled_make_the_same_dataset(bucket):
    for misprint in ("unsorted", "doubled"):
        bucket.script("mnist", None, [Fault.listing(misprint)], operation="LIST", forever=True)
        with opened() as dataset:
            assert [*dataset] == BODIES


@pytest.mark.parametrize("misprint", ["no token", "circle"])
def test_listing_without_end_is_refused_and_nothing_of_it_is_kept(bucket, misprint, monkeypatch):
    monkeypatch.setenv("ASYNCDS_MANIFEST_MAX_AGE", "3600")
    bucket.script("mnist", None, [Fault.listing(misprint)], operation="LIST", forever=True)
    with opened(retries=1) as dataset, pytest.raises(TransferFailed, match="leads in a circle"):
        len(dataset)
    bucket.clear_scripts()
    with opened() as dataset:
        assert len(dataset) == 100


def test_page_that_drips_is_given_up_and_asked_for_again(bucket):
    bucket.script("mnist", None, [Fault.dripping(1, 0.1)], operation="LIST")  # the whole of it would take an hour
    with opened(timeout=1, deadline=300) as dataset:
        assert len(dataset) == len(KEYS)
    assert bucket.stats.requests["LIST"] == 2


def test_page_that_fails_is_asked_for_again_or_leaves_no_table(monkeypatch, bucket):
    monkeypatch.setenv("ASYNCDS_MANIFEST_MAX_AGE", "3600")
    with S3Server() as server:
        server.derive("mnist", 2500, 10, prefix="x/")
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        server.script("mnist", None, [Fault(), Fault.status(403)], operation="LIST", forever=True)
        with opened() as dataset, pytest.raises(AccessDenied, match="listing s3://mnist/x/"):
            len(dataset)
        server.script("mnist", None, [Fault(), Fault.status(503), Fault.reset(100), Fault()], operation="LIST")
        with opened() as dataset:
            assert len(dataset) == 2500
            assert dataset[2499] == body_of("x/2499", 10)


def test_odd_objects_of_a_listing_are_samples_of_their_own_and_markers_are_none(lane, monkeypatch, bucket):
    objects = {"x/": b"", "x/dir/": b"", "x/empty": b"", "x/new\nline": b"1", "x/\u00e9": b"2", "x/e\u0301": b"3"}
    objects |= {
        "x/../../etc/passwd": b"4",
        "x//b": b"5",
        "x/B": b"6",
        "x/b": b"7",
        "x/%2e": b"8",
        "x/" + "k" * 1000: b"9",
    }
    with S3Server() as server:
        server.put_many("mnist", objects)
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        for _ in range(2):
            with opened() as dataset:
                assert sorted(dataset) == sorted(body for key, body in objects.items() if not key.endswith("/"))
        assert set(server.stats.gets.values()) == {1}


# memory


def in_megabytes_more(ask):
    """What asking takes at its peak, in a child, in MB."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            ask()
            os.write(writer, b"%d" % ((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024))
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        told = pipe.read()
    os.waitpid(pid, 0)
    assert told, "what was to fail did not, or not as it should"
    return int(told)


HOSTILE = {
    "10 GB": Fault.huge(10 << 30),
    "a bomb": Fault.gzip_bomb(),
    "1 MB of headers": Fault.headers({f"x-{number}": "y" * 1000 for number in range(1000)}),
    "a header of 1 MB": Fault.headers({"x": "y" * 1_000_000}),
}


def refused(ask):
    try:
        ask()
    except AsyncdsError:
        return
    raise AssertionError("it came")


def test_hostile_objects_take_little_memory(bucket, lane):
    for key, fault in zip(KEYS[3:], HOSTILE.values(), strict=False):
        bucket.script("mnist", key, [fault], forever=True)
    options = {"retries": 1, "deadline": 3, "transform": S3Reader.read}

    def ask():
        listed = CachedS3MapDataset.from_prefix(PREFIX, **options)
        unlisted = CachedS3MapDataset.from_objects([f"s3://mnist/{key}" for key in KEYS], **options)
        for dataset in (listed, unlisted):
            assert dataset[0] == BODIES[0]
            for index, name in enumerate(HOSTILE, 3):
                if (dataset, name) == (unlisted, "a bomb"):
                    assert len(dataset[index]) < 1 << 20, "it was unpacked"
                else:
                    refused(lambda dataset=dataset, index=index: dataset[index])

    assert in_megabytes_more(ask) < 64


def test_hostile_listings_take_little_memory(bucket):
    bucket.script("mnist", None, [Fault(), *HOSTILE.values()], operation="LIST", shared=True)

    def ask():
        assert len(opened(retries=0)) == 100
        for number in range(len(HOSTILE)):
            refused(lambda number=number: len(CachedS3MapDataset.from_prefix(f"s3://mnist/x/{number}", retries=0)))

    assert in_megabytes_more(ask) < 64
