"""A real MinIO behind toxiproxy, which makes the network between them slow, or breaks it in an epoch."""

import hashlib
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from botocore.config import Config

from asyncds import CachedS3MapDataset
from asyncds.errors import DeadlineExceeded, EndpointUnreachable
from asyncds.testing import local_s3

pytestmark = [
    pytest.mark.skipif(
        shutil.which(program) is None, reason=f"{program} is not there: `make servers` builds it, which takes Go"
    )
    for program in ("minio", "toxiproxy-server")
]
KEYS = [f"train/{number:03}" for number in range(120)]
SIZE = 3000
ENOUGH_S = 15.0
OUTAGE_S = 0.7
PATIENCE_S = 10.0
OPTIONS = {"transform": lambda file: file.read(), "concurrency": 16, "timeout": 1.0, "deadline": 20.0}


def body(key: str) -> bytes:
    return hashlib.shake_128(key.encode()).digest(SIZE)


EXPECTED = [body(key) for key in KEYS]


class Toxiproxy:
    """One proxy of a toxiproxy, spoken to over its API."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, upstream: str) -> None:
        self._api = f"http://127.0.0.1:{port}"
        until = time.monotonic() + PATIENCE_S
        while not self._answers():
            assert process.poll() is None
            assert time.monotonic() < until
        proxy = {"name": "minio", "listen": "127.0.0.1:0", "upstream": upstream, "enabled": True}
        self.address = self._ask("/proxies", proxy)["listen"]

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._api}/version"):
                return True
        except OSError:
            return False

    def _ask(self, path: str, document: dict[str, Any]) -> Any:
        raw = urllib.request.Request(f"{self._api}{path}", json.dumps(document).encode(), method="POST")
        with urllib.request.urlopen(raw) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def add(self, kind: str, *, toxicity: float = 1, stream: str = "downstream", **attributes: int) -> None:
        """Let connections be toxic, such a share of them; by default in what the server sends."""
        toxic = {"type": kind, "name": kind, "stream": stream, "toxicity": toxicity, "attributes": attributes}
        self._ask("/proxies/minio/toxics", toxic)

    def enable(self, enabled: bool) -> None:
        """Accept connections, or end those that are there and refuse others."""
        # With its address: else it would listen at another port than before.
        self._ask("/proxies/minio", {"listen": self.address, "enabled": enabled})

    def reset(self) -> None:
        self._ask("/reset", {})


@pytest.fixture(scope="module")
def proxied() -> Iterator[tuple[Toxiproxy, dict[str, str]]]:
    """MinIO with objects, a proxy before it, and the variables by which it is found."""
    with local_s3("minio") as server:
        style = Config(s3={"addressing_style": "path"})
        keys = {"aws_access_key_id": server.access_key, "aws_secret_access_key": server.secret_key}
        client = boto3.client("s3", endpoint_url=server.endpoint, region_name=server.region, config=style, **keys)
        client.create_bucket(Bucket="mnist")
        for key in KEYS:
            client.put_object(Bucket="mnist", Key=key, Body=body(key))
        client.close()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        command = ["toxiproxy-server", "-host", "127.0.0.1", "-port", str(port)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                yield Toxiproxy(process, port, server.endpoint.removeprefix("http://")), server.environment
            finally:
                process.kill()


@pytest.fixture
def proxy(proxied, monkeypatch) -> Iterator[Toxiproxy]:
    proxy, environment = proxied
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{proxy.address}")
    yield proxy
    proxy.reset()


# What makes it slow, and what breaks it: each fault is met by connections whose data then come a second time.
SLOW = {
    "latency": {"latency": 30, "jitter": 5},
    "bandwidth": {"rate": 80},  # kB per second
    "slicer": {"average_size": 500, "size_variation": 100, "delay": 5000},  # microseconds
}
BROKEN = {
    "reset_peer": {"timeout": 30, "toxicity": 0.3},
    "timeout": {"timeout": 0, "toxicity": 0.3},  # nothing comes any more
    "limit_data": {"bytes": 10_000},  # three objects and a part of the fourth, then it is closed
    "limit_data of requests": {"bytes": 1500, "stream": "upstream"},
}
# A connection that ends before any answer is taken for one that was closed while it was idle: by the lean lane, and by
# aiohttp, which asks once more by itself.
REPEATED_UNSEEN = {("auto", "limit_data of requests"), ("full", "limit_data of requests"), ("full", "reset_peer")}


def epoch(dataset: CachedS3MapDataset) -> list[bytes]:
    return [sample for batch in dataset.loader(20, collate_fn=list) for sample in batch]


@pytest.mark.parametrize("kind", SLOW)
def test_slow_network_costs_time_only(proxy, kind):
    proxy.add(kind, **SLOW[kind])
    with CachedS3MapDataset.from_prefix("s3://mnist/train/", **OPTIONS) as dataset:
        assert epoch(dataset) == EXPECTED
        stats = dataset.stats()
    assert (stats["gets"], stats["retries"]) == (len(KEYS), 0)
    assert stats["latency_p50_s"] > 0.02


@pytest.mark.parametrize("lane", ["auto", "full"])
@pytest.mark.parametrize("kind", BROKEN)
def test_connections_that_break_cost_no_sample(proxy, kind, lane):
    # So many connections that some are toxic, so many attempts that no object meets toxic ones only.
    options = OPTIONS | {"lane": lane, "concurrency": 40, "timeout": 0.5, "deadline": 50.0}
    with CachedS3MapDataset.from_prefix("s3://mnist/train/", **options) as dataset:
        assert len(dataset) == len(KEYS)  # the listing is one answer, of more bytes than come through
        proxy.add(kind.split()[0], **BROKEN[kind])
        assert epoch(dataset) == EXPECTED
        stats = dataset.stats()
    assert stats["gets"] == len(KEYS)
    assert stats["retries"] > 0 or (lane, kind) in REPEATED_UNSEEN


def test_connections_that_are_slow_to_close_hold_nobody_up(proxy):
    with CachedS3MapDataset.from_prefix("s3://mnist/train/", **OPTIONS | {"timeout": 0.5}) as dataset:
        assert len(dataset) == len(KEYS)
        proxy.add("slow_close", delay=2000)
        proxy.add("limit_data", bytes=20_000)
        began = time.monotonic()
        assert epoch(dataset) == EXPECTED
        assert time.monotonic() - began < ENOUGH_S


@pytest.mark.parametrize("workers", [0, 1])
def test_outage_within_an_epoch_costs_no_sample(proxy, workers):
    with CachedS3MapDataset.from_prefix("s3://mnist/train/", **OPTIONS | {"concurrency": 2}) as dataset:
        batches = iter(dataset.loader(10, collate_fn=list, num_workers=workers, depth=2))
        found = next(batches)
        proxy.enable(False)
        back = threading.Timer(OUTAGE_S, proxy.enable, [True])
        back.start()
        for batch in batches:
            found += batch
        back.join()
        assert found == EXPECTED
        assert dataset.stats()["retries"] > 0


def test_outage_that_does_not_end_is_an_error_within_the_deadline(proxy):
    with CachedS3MapDataset.from_prefix("s3://mnist/train/", **OPTIONS | {"deadline": 2.0}) as dataset:
        assert dataset.__getitems__(range(10)) == EXPECTED[:10]
        proxy.enable(False)
        began = time.monotonic()
        with pytest.raises((EndpointUnreachable, DeadlineExceeded), match="s3://mnist/train/"):
            dataset.__getitems__(range(10, 20))
        assert time.monotonic() - began < 10, "the deadline of 2 s, and what a busy machine adds"
        assert dataset.__getitems__(range(10)) == EXPECTED[:10]
