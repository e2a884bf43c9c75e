"""What asyncds hangs into aiobotocore and aiohttp: where a version has no place for it, nothing is sent at all."""

import contextlib
import os
import select
import socket
import socketserver
import threading
from collections import Counter

import aiobotocore.httpsession
import aiohttp
import pytest
import trustme

from asyncds import CachedS3MapDataset, S3Reader
from asyncds.errors import EndpointUntrusted, StoreError
from asyncds.manifest import ObjectInfo
from asyncds.retry import Retry
from asyncds.settings import Settings
from asyncds.store import Connection, S3Store
from asyncds.testing import Fault, S3Server

Session = aiobotocore.httpsession.AIOHTTPSession
CANNOT = "this version of aiobotocore cannot be guarded: install one from 2.25.1 on, below 4"


def renamed(monkeypatch):
    """`send` gets its sessions by another name."""
    monkeypatch.setattr(Session, "_sessions_for", Session._get_session, raising=False)
    monkeypatch.delattr(Session, "_get_session")


def left_behind(monkeypatch):
    """`send` gets its sessions in another way, and the old one is still there."""

    async def send(self, request):
        raise AssertionError("sent")

    monkeypatch.setattr(Session, "send", send)


def copied(monkeypatch):
    """A session shows a copy of its traces."""
    traces = property(lambda session: list(session._trace_configs))
    monkeypatch.setattr(aiohttp.ClientSession, "trace_configs", traces)


def no_context(monkeypatch):
    """A connector keeps its TLS context under another name."""
    get_session = Session._get_session

    async def hidden(self, proxy):
        session = await get_session(self, proxy)
        session.connector._ssl = True
        return session

    monkeypatch.setattr(Session, "_get_session", hidden)


def test_version_of_aiohttp_whose_headers_cannot_be_read_is_refused(s3, monkeypatch):
    s3.put("mnist", "a", b"a")
    monkeypatch.setattr(aiohttp.ClientResponse, "_raw_headers", property(lambda _: None, lambda *_: None))
    with (
        CachedS3MapDataset.from_prefix("s3://mnist/", transform=S3Reader.read) as dataset,
        pytest.raises(StoreError, match="this version of aiohttp cannot be guarded: install one from 3"),
    ):
        len(dataset)


@pytest.mark.parametrize("change", [renamed, left_behind, copied, no_context])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of aiohttp, of who sets attributes
def test_version_that_has_no_place_for_a_guard_is_refused_before_anything_is_sent(s3, monkeypatch, change):
    s3.put("mnist", "x", b"x")
    change(monkeypatch)
    for options in ({}, {"retries": 0}):
        for make in (CachedS3MapDataset.from_prefix, CachedS3MapDataset.from_objects):
            with make("s3://mnist/x", **options) as dataset, pytest.raises(StoreError, match=CANNOT):
                dataset[0]
    assert s3.stats.total == 0


def test_sender_that_somebody_has_wrapped_is_still_recognised(s3, monkeypatch):
    import functools

    send = Session.send

    @functools.wraps(send)
    async def traced(*arguments):
        return await send(*arguments)

    monkeypatch.setattr(Session, "send", traced)
    s3.put("mnist", "x", b"x")
    with CachedS3MapDataset.from_prefix("s3://mnist/", transform=S3Reader.read) as dataset:
        assert dataset[0] == b"x"


def test_who_asks_not_to_verify_is_not_made_to(tmp_path, monkeypatch):
    path = tmp_path / "certificate.pem"
    trustme.CA().issue_cert("elsewhere.example").private_key_and_cert_chain_pem.write_to_path(str(path))
    with S3Server(tls=(path, path)) as server:
        server.put("mnist", "x", b"x")
        options = {"endpoint": server.endpoint, "session_factory": Trusting}
        with CachedS3MapDataset.from_prefix("s3://mnist/", transform=S3Reader.read, **options) as dataset:
            assert dataset[0] == b"x"


class Trusting:
    """A session whose clients believe every certificate."""

    def __init__(self):
        from aiobotocore.session import AioSession

        self._session = AioSession()
        self._session.set_credentials("AKIA", "secret")

    def __getattr__(self, name):
        return getattr(self._session, name)

    def create_client(self, *arguments, **options):
        return self._session.create_client(*arguments, **options, verify=False)


# AWS itself: the region of a bucket, and nothing else, leads to another endpoint

HERE, THERE = "us-west-2", "eu-central-1"
KEYS = "AKIAEXAMPLE", "the secret"
BODIES = {f"x/{number}": b"%d" % number for number in range(6)}
ELSEWHERE = "https://metadata.example/latest"


class AWS:
    """A server for each of two regions, which answers to the names that AWS has, over TLS."""

    def __init__(self, folder):
        self.authority = authority = trustme.CA()
        path = folder / "aws.pem"
        self.bundle = folder / "authority.pem"
        authority.cert_pem.write_to_path(os.fspath(self.bundle))
        names = [f"{star}s3.{region}.amazonaws.com" for star in ("", "*.") for region in (HERE, THERE)]
        authority.issue_cert(*names).private_key_and_cert_chain_pem.write_to_path(os.fspath(path))
        options = {"credentials": KEYS, "check_signatures": True, "tls": (path, path)}
        self.servers = {region: S3Server(region=region, **options) for region in (HERE, THERE)}
        self.asked = Counter()

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            for server in self.servers.values():
                stack.enter_context(server).put_many("my.bucket", BODIES)  # with a dot: no part of the host's name
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info):
        self._stack.close()

    def __getitem__(self, region):
        return self.servers[region]

    def port(self, host):
        """Where the server listens that a name stands for; notes who was asked for."""
        self.asked[host] += 1
        region = host.removesuffix(".amazonaws.com").rpartition(".")[2]
        return int(self.servers[region].endpoint.rpartition(":")[2])

    def requests(self):
        return {region: server.stats.requests for region, server in self.servers.items()}

    def say(self, region, *steps, forever=True):
        for operation in ("GET", "LIST", "HEAD"):
            self[region].script("my.bucket", None, steps, operation=operation, forever=forever)


@pytest.fixture
def aws(tmp_path, monkeypatch):
    variables = zip(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"), (*KEYS, HERE), strict=True)
    for name, value in variables:
        monkeypatch.setenv(name, value)
    with AWS(tmp_path) as aws:
        monkeypatch.setenv("AWS_CA_BUNDLE", os.fspath(aws.bundle))
        yield aws


@pytest.fixture
def proxy(aws, monkeypatch):
    """Leads to `aws` whoever asks for one of its names; `HTTPS_PROXY` says where it is."""

    class Tunnel(socketserver.StreamRequestHandler):
        def handle(self):
            host = self.rfile.readline().split()[1].decode().rpartition(":")[0]
            while self.rfile.readline().strip():
                pass
            with socket.create_connection(("127.0.0.1", aws.port(host))) as server:
                self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
                join(self.connection, server)

    class Proxy(socketserver.ThreadingTCPServer):
        daemon_threads = True  # nobody waits for a client that keeps its connection

    with Proxy(("127.0.0.1", 0), Tunnel) as listener:
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{listener.server_address[1]}")
        yield aws
        listener.shutdown()
        thread.join()


def join(one, other):
    """Send on what comes from each of two sockets to the other, until one of them ends."""
    with contextlib.suppress(OSError):
        while True:
            for ready in select.select([one, other], [], [])[0]:
                data = ready.recv(65536)
                if not data:
                    return
                (other if ready is one else one).sendall(data)


@pytest.fixture
def dns(aws, monkeypatch):
    """The names of AWS stand for `aws`: there the lean lane is used, which uses no proxy."""
    resolve = socket.getaddrinfo

    def answer(host, port, *arguments, **options):
        name = host.decode() if isinstance(host, bytes) else host
        if not name.endswith(".amazonaws.com"):
            return resolve(host, port, *arguments, **options)
        if options.get("flags", 0) & socket.AI_NUMERICHOST:
            raise socket.gaierror("that is a name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", aws.port(name)))]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    return aws


@contextlib.asynccontextmanager
async def store_of_aws(**options):
    connection = Connection.resolve(Settings())
    assert connection.endpoint is None
    store = S3Store(connection, concurrency=4, timeout=5, retry=Retry(3, deadline=20, first_contact=5), **options)
    try:
        yield store
    finally:
        await store.aclose()


async def keys_of(store):
    return [info.key async for page in store.list("my.bucket", "x/") for info in page]


MALFORMED = f"<Error><Code>AuthorizationHeaderMalformed</Code><Region>{THERE}</Region></Error>".encode()
REGION = {"x-amz-bucket-region": THERE}
TOLD = {
    "301": Fault.status(301, "PermanentRedirect", headers=REGION),
    "301 with a Location": Fault.status(301, "PermanentRedirect", headers=REGION | {"Location": ELSEWHERE}),
    "301 with a URI": Fault.status(301, "PermanentRedirect", headers=REGION | {"URI": ELSEWHERE}),
    "307 with a Location": Fault.status(307, "TemporaryRedirect", headers=REGION | {"Location": ELSEWHERE}),
    "400": Fault.status(400, headers=REGION, body=MALFORMED),
}


@pytest.mark.parametrize("told", TOLD)
def test_region_of_a_bucket_leads_to_its_endpoint_and_nowhere_else(proxy, told):
    proxy.say(HERE, TOLD[told])
    with CachedS3MapDataset.from_prefix("s3://my.bucket/x/", transform=S3Reader.read) as dataset:
        assert [*dataset] == [*BODIES.values()]
        assert dataset.stats()["retries"] == 0
    assert proxy.asked.keys() == {f"s3.{HERE}.amazonaws.com", f"s3.{THERE}.amazonaws.com"}
    requests = proxy.requests()
    assert requests[HERE] == {"LIST": 1}, "it is remembered"
    assert requests[THERE]["GET"] == 6, "signed for that region"


@pytest.mark.parametrize("wrong", ["another host", "unknown authority"])
def test_certificates_are_verified_behind_a_proxy_too(proxy, tmp_path, wrong):
    path, name = tmp_path / "wrong.pem", f"s3.{HERE}.amazonaws.com"
    issue = proxy.authority.issue_cert if wrong == "another host" else trustme.CA().issue_cert
    issued = issue("s3.example" if wrong == "another host" else name)
    issued.private_key_and_cert_chain_pem.write_to_path(os.fspath(path))
    proxy[HERE].change_certificate(path, path)
    refused = pytest.raises(EndpointUntrusted, match=r"listing s3://my.bucket/x/: .* .*CERTIFICATE_VERIFY_FAILED")
    with CachedS3MapDataset.from_prefix("s3://my.bucket/x/") as dataset, refused:
        len(dataset)
    assert not proxy.requests()[HERE]


@pytest.mark.parametrize("lane", ["full", pytest.param("lean", marks=pytest.mark.lean)])
async def test_bucket_that_moves_is_followed_on_both_lanes(dns, lane):
    async with store_of_aws(lean=lane == "lean") as store:
        assert await keys_of(store) == [*BODIES]
        for key in [*BODIES][:3]:
            assert (await store.get(ObjectInfo("my.bucket", key)))[1] == BODIES[key]
        assert store.lanes == ({"first": 1, "lean": 2} if lane == "lean" else {"off": 3})
        dns.say(HERE, TOLD["307 with a Location"])
        for server in dns.servers.values():
            server.reset_counts()
        for key in [*BODIES][3:]:
            assert (await store.get(ObjectInfo("my.bucket", key)))[1] == BODIES[key]
    assert store.lanes == ({"first": 1, "lean": 4, "answer": 1} if lane == "lean" else {"off": 6})
    assert dns.requests() == {HERE: {"GET": 2 if lane == "lean" else 1}, THERE: {"GET": 3}}
    assert dns.asked.keys() == {f"s3.{HERE}.amazonaws.com", f"s3.{THERE}.amazonaws.com"}


@pytest.mark.parametrize("lane", ["full", pytest.param("lean", marks=pytest.mark.lean)])
async def test_regions_that_name_each_other_are_an_error_after_a_request_to_each(dns, lane):
    info = ObjectInfo("my.bucket", "x/0")
    async with store_of_aws(lean=lane == "lean") as store:
        assert (await store.get(info))[1] == BODIES["x/0"]
        for region, other in ((HERE, THERE), (THERE, HERE)):
            dns[region].reset_counts()
            dns.say(region, Fault.status(301, "PermanentRedirect", headers={"x-amz-bucket-region": other}))
        for ask in (lambda: store.get(info), lambda: keys_of(store), lambda: store.head("my.bucket", "x/0")):
            with pytest.raises(StoreError, match=r"s3://my.bucket/x/.*: (status )?301"):
                await ask()
    requests = dns.requests()
    assert requests[HERE] == {"GET": 2 if lane == "lean" else 1, "LIST": 1, "HEAD": 1}
    assert requests[THERE] == {"GET": 1, "LIST": 1, "HEAD": 1}


UNTOLD = {
    "no region": ({}, "redirects to ''"),
    "a Location": ({"Location": ELSEWHERE}, "metadata.example.*refused"),
    "a Location of AWS": ({"Location": f"https://s3.{THERE}.amazonaws.com/"}, "amazonaws.*refused"),
    "a region that is another host": ({"x-amz-bucket-region": "x.evil.example/"}, "x.evil.example/': refused"),
    "a region that leads to another port": ({"x-amz-bucket-region": "x:1@evil.example"}, "evil.*refused"),
    "an empty region": ({"x-amz-bucket-region": ""}, "redirects to ''"),
}


@pytest.mark.parametrize("lane", ["full", pytest.param("lean", marks=pytest.mark.lean)])
@pytest.mark.parametrize("untold", UNTOLD)
async def test_whatever_is_no_region_leads_nowhere(dns, lane, untold):
    headers, said = UNTOLD[untold]
    info = ObjectInfo("my.bucket", "x/0")
    async with store_of_aws(lean=lane == "lean") as store:
        assert (await store.get(info))[1] == BODIES["x/0"]
        dns.say(HERE, Fault.status(301, "PermanentRedirect", headers=headers))
        for ask in (lambda: store.get(info), lambda: keys_of(store), lambda: store.head("my.bucket", "x/0")):
            with pytest.raises(StoreError, match=said):
                await ask()
    assert dns.asked.keys() == {f"s3.{HERE}.amazonaws.com"}
    assert dns.requests()[HERE].total() <= 8
    assert not dns.requests()[THERE]


BERLIN = {"x-amz-bucket-region": "Berlin"}


async def test_region_that_an_endpoint_of_ones_own_says_at_every_answer_is_as_it_likes(s3, monkeypatch):
    monkeypatch.setenv("AWS_REGION", "Berlin")
    s3.put("mnist", "x/a", b"one")
    s3.script("mnist", None, [Fault.headers(BERLIN)], operation="LIST", forever=True)
    s3.script("mnist", None, [Fault.headers(BERLIN)], forever=True)
    with CachedS3MapDataset.from_prefix("s3://mnist/x/", transform=S3Reader.read) as dataset:
        assert list(dataset) == [b"one"]


@pytest.mark.parametrize("lane", ["full", pytest.param("auto", marks=pytest.mark.lean)])
def test_redirect_of_an_endpoint_of_ones_own_names_its_place_whatever_region_it_says(s3, lane):
    s3.put_many("mnist", {"x/a": b"one", "x/b": b"two"})
    elsewhere = {"Location": "http://127.0.0.1:9/elsewhere", "x-amz-bucket-region": "us-east-1"}
    with CachedS3MapDataset.from_prefix("s3://mnist/x/", transform=S3Reader.read, lane=lane) as dataset:
        assert dataset[0] == b"one"
        s3.reset_counts()
        s3.script("mnist", "x/b", [Fault.status(307, headers=elsewhere)], forever=True)
        with pytest.raises(StoreError, match=r"redirects to 'http://127\.0\.0\.1:9/elsewhere': refused"):
            dataset[1]
    assert s3.stats.requests["GET"] == (1 if lane == "full" else 2)
