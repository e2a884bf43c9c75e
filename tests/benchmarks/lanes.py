"""What one GET costs the client: CPU and rate of asyncds' two lanes, and of the libraries that people use instead.

    python tests/benchmarks/lanes.py [--sizes 700,10000,110000,1000000] [--objects 3000] [--rounds 5] [--only obstore]
        [--concurrency 64] [--tls 10000,1000000] [--environments .venv-peers] [--json lanes.json]

Every run is a fresh process, contenders take turns, and the server counts the requests. The CPU is what the client's
process uses, all of its threads, from the first GET to the last, after as many GETs as there are connections. That is
signing, sending, parsing, and comparing the length; asyncds compares the ETag, too. A few bodies of each run are
compared with what was stored. All that have an event loop have uvloop's. Prints a Markdown table for each size, and for
those of `--tls` another one, over TLS.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from environments import FOLDER, python_for, reason
from measuring import (
    CORES,
    CREDENTIALS,
    Result,
    ceiling,
    certificates,
    cpu_seconds,
    in_fresh_process,
    installed,
    ratio,
    spread,
    table,
)

BUCKET = "lanes"
ONE_IN = 97  # bodies that are compared with what was stored
CONTENDERS = {  # and the library that it takes
    "asyncds, lean lane": "asyncds",
    "asyncds, full lane": "asyncds",
    "aiobotocore": "aiobotocore",
    "boto3, 64 threads": "boto3",
    "obstore": "obstore",
    "s3torchconnector, 16 threads": "s3torchconnector",
}


def key_of(number: int) -> str:
    return f"{number:06}"


def body_of(number: int, size: int) -> bytes:
    return random.Random(number).randbytes(size)


class Received:
    """Compares the length of every body when it comes, and the bytes of some when time no longer counts."""

    def __init__(self, size: int) -> None:
        self.size, self.count = size, 0
        self.kept: dict[int, Any] = {}

    def __call__(self, number: int, body: Any) -> None:
        if len(body) != self.size:
            raise ValueError(f"object {number}: {len(body)} bytes, {self.size} were stored")
        self.count += 1
        if number % ONE_IN == 0:
            self.kept[number] = body

    def compare(self, expected: int) -> None:
        assert self.count == expected, f"{self.count} bodies came of {expected}"
        for number, body in self.kept.items():
            assert bytes(body) == body_of(number, self.size), f"object {number}: other bytes than were stored"


class Flight:
    """One connection's worth of GETs, one after the other, in the way that asyncds itself asks for small objects."""

    def __init__(self, store: Any, infos: Iterator[Any], received: Received) -> None:
        from asyncds.download import verify

        self.store, self.infos, self.received, self.verify = store, infos, received, verify
        self.loop = asyncio.get_running_loop()
        self.landed: asyncio.Future[None] = self.loop.create_future()
        self.tasks: set[asyncio.Task[None]] = set()
        self.depart()

    def depart(self) -> None:
        self.info = next(self.infos, None)
        if self.info is None:
            self.landed.set_result(None)
        elif not self.store.ask(self.info, self, self.loop.time() + 30):
            self.otherwise(partial(self.store.get, self.info))

    def came(self, served: Any, body: bytes) -> None:
        self.verify(self.info, served, body)
        self.received(int(self.info.key), body)
        self.depart()

    def otherwise(self, first: Callable[[], Awaitable[tuple[Any, bytes]]]) -> None:
        async def go_on() -> None:
            try:
                self.came(*await first())
            except Exception as error:
                self.landed.set_exception(error)

        task = asyncio.create_task(go_on())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


@asynccontextmanager
async def asyncds_lane(lane: str, options: argparse.Namespace) -> AsyncIterator[Any]:
    from asyncds.retry import Retry
    from asyncds.settings import Settings
    from asyncds.stats import Counters
    from asyncds.store.connection import Connection
    from asyncds.store.s3 import S3Store

    connection, retry = Connection.resolve(Settings()), Retry(0, deadline=60, first_contact=10)
    folder = tempfile.TemporaryDirectory()
    counters = Counters(Path(folder.name) / "counters")  # as a dataset counts
    more = {"lean": lane == "lean", "on_get": counters.count_get}
    store = S3Store(connection, concurrency=options.concurrency, timeout=30, retry=retry, **more)
    infos = {int(info.key): info async for page in store.list(BUCKET, "") for info in page}

    async def fetch(numbers: Iterator[int], received: Received) -> None:
        wanted = (infos[number] for number in numbers)
        first = await store.get(next(wanted))  # the lean lane learns from it
        received(int(first[0].key), first[1])
        flights = [Flight(store, wanted, received) for _ in range(options.concurrency)]
        await asyncio.gather(*(flight.landed for flight in flights))

    yield fetch
    others = store.lanes.total() - store.lanes["lean" if lane == "lean" else "off"]
    assert others <= (lane == "lean"), f"{others} objects came on the other lane"
    await store.aclose()
    folder.cleanup()


@asynccontextmanager
async def aiobotocore_client(options: argparse.Namespace) -> AsyncIterator[Any]:
    from aiobotocore.config import AioConfig
    from aiobotocore.session import get_session

    config = AioConfig(max_pool_connections=options.concurrency, s3={"addressing_style": "path"})
    async with get_session().create_client("s3", config=config) as client:

        async def get(number: int) -> bytes:
            answer = await client.get_object(Bucket=BUCKET, Key=key_of(number))
            async with answer["Body"] as stream:
                return await stream.read()

        yield partial(in_coroutines, get, options.concurrency)


@asynccontextmanager
async def obstore_client(options: argparse.Namespace) -> AsyncIterator[Any]:
    from obstore.store import S3Store

    endpoint, style = os.environ["AWS_ENDPOINT_URL"], {"virtual_hosted_style_request": False}
    store = S3Store(BUCKET, endpoint=endpoint, client_options={"allow_http": True}, **style)

    async def get(number: int) -> Any:
        return await (await store.get_async(key_of(number))).bytes_async()

    yield partial(in_coroutines, get, options.concurrency)


async def in_coroutines(
    get: Callable[[int], Awaitable[Any]], concurrency: int, numbers: Iterator[int], received: Received
) -> None:
    async def one_by_one() -> None:
        for number in numbers:
            received(number, await get(number))

    await asyncio.gather(*(one_by_one() for _ in range(concurrency)))


def boto3_get(_: argparse.Namespace) -> tuple[Callable[[int], bytes], int]:
    import boto3
    from botocore.config import Config

    config = Config(max_pool_connections=64, s3={"addressing_style": "path"})
    client = boto3.client("s3", config=config)
    return lambda number: client.get_object(Bucket=BUCKET, Key=key_of(number))["Body"].read(), 64


def s3torchconnector_get(options: argparse.Namespace) -> tuple[Callable[[int], bytes], int]:
    from s3torchconnector import S3ClientConfig, S3MapDataset

    dataset = S3MapDataset.from_objects(
        [f"s3://{BUCKET}/{key_of(number)}" for number in range(options.objects)],
        region=os.environ["AWS_REGION"],
        endpoint=os.environ["AWS_ENDPOINT_URL"],
        transform=lambda reader: reader.read(),
        s3client_config=S3ClientConfig(force_path_style=True),
    )
    return dataset.__getitem__, 16


@asynccontextmanager
async def in_threads(get: Callable[[int], bytes], threads: int) -> AsyncIterator[Any]:
    with ThreadPoolExecutor(threads) as pool:

        async def fetch(numbers: Iterator[int], received: Received) -> None:
            wanted = list(numbers)
            for number, body in zip(wanted, pool.map(get, wanted), strict=True):
                received(number, body)

        yield fetch


def contender(name: str, options: argparse.Namespace) -> Any:
    """What yields `fetch(numbers, received)`."""
    match name.split(",")[0]:
        case "asyncds":
            return asyncds_lane("lean" if "lean" in name else "full", options)
        case "aiobotocore":
            return aiobotocore_client(options)
        case "obstore":
            return obstore_client(options)
        case "boto3":
            return in_threads(*boto3_get(options))
    return in_threads(*s3torchconnector_get(options))


async def run(name: str, options: argparse.Namespace) -> Result:
    """All objects once, in this process."""
    async with contender(name, options) as fetch:
        size, warm = options.size, min(options.concurrency, options.objects)
        await fetch(iter(range(warm)), Received(size))
        received = Received(size)
        started, cpu = time.perf_counter(), cpu_seconds()
        await fetch(iter(range(options.objects)), received)
        seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
        received.compare(options.objects)
    asked = warm + options.objects
    return {"objects": options.objects, "seconds": seconds, "cpu": cpu, "asked": asked} | {
        "version": installed(CONTENDERS[name])
    }


def in_turns(options: argparse.Namespace, size: int, objects: int, server: Any) -> dict[str, list[Result]]:
    """Every contender once per round; the rounds of one that fails end with that."""
    arguments = [f"--size={size}", f"--objects={objects}", f"--concurrency={options.concurrency}"]
    results: dict[str, list[Result]] = {}
    for _ in range(options.rounds):
        for name in options.only or CONTENDERS:
            if any("error" in result for result in results.get(name, ())):
                continue
            server.reset_counts()
            python = python_for(CONTENDERS[name], options.environments)
            result = in_fresh_process(python, __file__, name, arguments)
            if "error" in result:
                result["error"] = reason(CONTENDERS[name], options.environments) or result["error"]
            results.setdefault(name, []).append(result | {"requests": dict(server.stats.requests)})
    return results


def rows(results: dict[str, list[Result]]) -> Iterator[list[object]]:
    """Medians and spreads, and the ratios to obstore within each round."""
    whole = {name: runs for name, runs in results.items() if "error" not in runs[-1]}
    cost = {name: [1e6 * run["cpu"] / run["objects"] for run in runs] for name, runs in whole.items()}
    rate = {name: [run["objects"] / run["seconds"] for run in runs] for name, runs in whole.items()}
    for name, runs in results.items():
        if name not in whole:
            yield [name, runs[-1]["error"], *[""] * 7]
            continue
        beside = [ratio(values[name], values["obstore"]) if "obstore" in whole else "" for values in (cost, rate)]
        last = runs[-1]
        gets, others = last["requests"].get("GET", 0), sum(last["requests"].values()) - last["requests"].get("GET", 0)
        yield [
            name,
            f"{statistics.median(cost[name]):,.0f} µs",
            spread(cost[name]),
            beside[0],
            f"{statistics.median(rate[name]):,.0f}",
            spread(rate[name]),
            beside[1],
            f"{gets / last['asked']:.3g}",
            others,
        ]


HEADER = ["", "CPU per GET", "spread", "to obstore", "GETs/s", "spread", "to obstore", "GETs per object", "others"]


def measure(options: argparse.Namespace) -> None:
    from asyncds.testing import S3Server

    kept: list[Result] = []
    sizes = [(int(size), False) for size in options.sizes.split(",") if size]
    sizes += [(int(size), True) for size in options.tls.split(",") if size]
    for size, tls in sizes:
        objects = max(1, min(options.objects, options.bytes // size))
        with certificates() if tls else nullcontext() as files, S3Server(process=True, tls=files) as server:
            server.put_many(BUCKET, {key_of(number): body_of(number, size) for number in range(objects)})
            os.environ |= CREDENTIALS | {"AWS_ENDPOINT_URL": server.endpoint}
            top = ceiling(server.endpoint, [f"/{BUCKET}/{key_of(number)}" for number in range(objects)], 16)
            results = in_turns(options, size, objects, server)
        over = " over TLS" if tls else ""
        print(f"\n{objects:,} objects of {size:,} bytes{over}; rounds: {options.rounds}; the server answers ", end="")
        print(f"{top:,.0f} GETs/s to a client that only counts bytes\n")
        print(table(HEADER, rows(results)), flush=True)
        kept += [
            {"size": size, "tls": tls, "contender": name, "round": number, "ceiling": top} | run
            for name, runs in results.items()
            for number, run in enumerate(runs)
        ]
        if options.json:
            options.json.write_text(json.dumps(kept, indent=1))
    print(f"\n{CORES} cores, which the server shares; {options.concurrency} GETs in flight at most, and in threads as")
    print(f"many as there are; {', '.join(sorted({run['version'] for run in kept if 'version' in run}))}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="700,10000,110000,1000000", help="bytes of an object")
    parser.add_argument("--tls", default="10000,1000000", help="of these also over TLS; '' for none")
    parser.add_argument("--objects", type=int, default=3000, help="objects of a run")
    parser.add_argument("--bytes", type=int, default=300_000_000, help="bytes of a run at most: fewer objects then")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--only", action="append", choices=list(CONTENDERS), help="and again for another contender")
    parser.add_argument("--environments", type=Path, default=FOLDER, help="where environments.py has made them")
    parser.add_argument("--json", type=Path, help="a file for all figures of all runs")
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.run:
        measure(options)
        return
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(run(options.run, options))))


if __name__ == "__main__":
    sys.exit(main())
