"""Tables of many objects, and how long a listing takes: one paginator, and many places at once.

    python tests/benchmarks/manifest.py [--rows 10_000_000] [--keys 100_000] [--latency 0.01] [--rounds 3]

First, a table of synthetic rows: bytes per object beside its key, and, each in a fresh process that has imported
asyncds, seconds to open the saved file (with and without comparing its digest) and to make a dataset of it. Then, a
bucket of as many keys in 400 prefixes, and one in none, behind a latency: aiobotocore's paginator, asyncds page after
page, and asyncds in many places, in turns; seconds, ratio to the paginator within rounds, and LISTs that the server
has counted. Prints Markdown tables.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
from measuring import CREDENTIALS, ratio, spread, table

from asyncds.manifest import Manifest
from asyncds.testing import S3Server

_OPENING = """
import json, sys, time
import asyncds.manifest, asyncds.dataset
started = time.perf_counter()
manifest = asyncds.Manifest.open(sys.argv[1], verify=sys.argv[2] == "verify")
opened = time.perf_counter()
with asyncds.CachedS3MapDataset.from_manifest(manifest, cache_dir=sys.argv[3]) as dataset:
    length, made = len(dataset), time.perf_counter()
    manifest.rows([length // 2])
print(json.dumps([opened - started, made - opened, length]))
"""


def synthetic(rows: int) -> Manifest:
    """A table of so many rows, made by the column."""
    digits = np.frombuffer("".join(f"train/n{i:08}/img_{i:012}.png" for i in range(1000)).encode(), np.uint8)
    each = len(digits) // 1000
    keys = np.tile(digits.reshape(1000, each), (-(-rows // 1000), 1))[:rows]
    numbers = np.arange(rows)
    for place in range(12):
        keys[:, each - 5 - place] = 48 + numbers % 10
        numbers = numbers // 10
    columns = {
        "keys": keys.reshape(-1),
        "ends": np.arange(0, (rows + 1) * each, each, dtype="<u8"),
        "sizes": np.full(rows, 2000, "<i8"),
        "versions": np.random.default_rng(0).integers(0, 256, rows * 16, np.uint8),
        "other_rows": np.empty(0, "<u8"),
        "others": np.empty(0, np.uint8),
        "other_ends": np.zeros(1, "<u8"),
    }
    return Manifest({"endpoint": "", "source": "synthetic", "buckets": ["b"], "left_out": {}}, columns)


def opening(rows: int, folder: Path) -> str:
    place = synthetic(rows).save(folder / "rows.manifest")
    keys = len("train/n00000000/img_000000000000.png") * rows
    lines = []
    for how in ("verify", "trust"):
        command = [sys.executable, "-c", _OPENING, str(place), how, str(folder)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        opened, made, length = json.loads(output)
        assert length == rows
        beside = (place.stat().st_size - keys) / rows
        lines.append([how, f"{rows:,}", f"{beside:.1f} B", f"{opened:.3f} s", f"{made:.3f} s"])
    return table(["`Manifest.open`", "rows", "beside the key", "open", "make a dataset"], lines)


def operations(rows: int) -> str:
    """What is made of a table, in this process."""
    manifest = synthetic(rows)
    other = manifest._taken(np.arange(rows // 100, rows))
    work: dict[str, Callable[[], object]] = {
        "filter('*7.png')": lambda: manifest.filter("*7.png"),
        "split([0.9, 0.1])": lambda: manifest.split([0.9, 0.1]),
        "partition(1, 8)": lambda: manifest.partition(1, 8),
        "changes(another)": lambda: manifest.changes(other),
    }
    lines = []
    for name, call in work.items():
        started = time.perf_counter()
        call()
        lines.append([f"`{name}`", f"{time.perf_counter() - started:.2f} s"])
    return table([f"of {rows:,} rows", "seconds"], lines)


async def listing(server: S3Server, bucket: str, rounds: int) -> list[list[str]]:
    from aiobotocore.session import get_session

    from asyncds.fanout import list_store
    from asyncds.listing import list_prefix
    from asyncds.recipe import StoreRecipe
    from asyncds.retry import Retry

    store = StoreRecipe.of().make(64, Retry(3, 60, 5))

    async def paginator() -> int:
        async with get_session().create_client("s3", endpoint_url=server.endpoint) as client:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
            return sum([len(page.get("Contents", ())) async for page in pages])

    async def in_sequence() -> int:
        pages = store.list(bucket, "")
        return len(await list_prefix(pages, endpoint=store.endpoint, bucket=bucket, prefix=""))

    async def at_once() -> int:
        return len(await list_store(store, bucket, ""))

    ways: dict[str, Callable[[], Awaitable[int]]] = {
        "aiobotocore's paginator": paginator,
        "asyncds, page after page": in_sequence,
        "asyncds, in many places": at_once,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    counts, lists = set(), {}
    for _ in range(rounds):
        for name, way in ways.items():
            server.reset_counts()
            started = time.perf_counter()
            counts.add(await way())
            seconds[name].append(time.perf_counter() - started)
            lists[name] = server.stats.requests["LIST"]
    await store.aclose()
    assert len(counts) == 1, counts
    base = seconds["aiobotocore's paginator"]
    return [
        [
            f"{bucket}: {name}",
            f"{statistics.median(taken):.2f}",
            spread(taken, 2),
            f"{ratio(base, taken)}",
            str(lists[name]),
        ]
        for name, taken in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--latency", type=float, default=0.01, help="seconds before each answer")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ |= CREDENTIALS
    with tempfile.TemporaryDirectory() as folder:
        print(opening(options.rows, Path(folder)), end="\n\n")
    print(operations(options.rows), end="\n\n", flush=True)
    with S3Server(process=True, latency=options.latency) as server:
        os.environ["AWS_ENDPOINT_URL"] = server.endpoint
        every = range(options.keys)
        server.put_many("prefixes", {f"train/n{i % 400:08}/img_{i:08}.png": b"x" for i in every})
        server.put_many("flat", {f"img_{i:08}.png": b"x" for i in every})
        lines = [line for name in ("prefixes", "flat") for line in asyncio.run(listing(server, name, options.rounds))]
    header = [f"{options.keys:,} keys, {options.latency * 1000:g} ms", "seconds", "spread", "times faster", "LISTs"]
    print(table(header, lines))


if __name__ == "__main__":
    main()
