"""What a burst of refusals and a tail of slow answers cost: goodput after a storm, waits for batches, requests made.

    python tests/benchmarks/tail.py [--rounds 3] [--storm 5]

First table: an `S3Server` (10 ms) gives 10 kB objects to a fetcher; then it refuses 64 requests by a 503, or all for
`--storm` seconds. Goodput is given before, and from two seconds after the last refusal on; `back after` is when it was
first 90 % of that before, over half a second. Requests are those that the server has counted for each object.

Second table: one object in a hundred is answered twenty times as late as the others. An epoch of batches of 200 without
workers, and a step of 50 ms: how long the loop waited for batches, the first ten left out, with look-ahead and
without, with hedging and without. A stalled batch is one that waited longer than half of what a slow answer takes.
Each run is a fresh process with an empty cache; the server is a process of its own.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator

from measuring import CREDENTIALS, Result, in_fresh_process, table

from asyncds import CachedS3MapDataset, Fetcher, ObjectInfo, Retry
from asyncds.recipe import StoreRecipe
from asyncds.testing import Fault, S3Server

BUCKET, SIZE, OBJECTS = "tail", 10_000, 4_000
BURST = 64
BEFORE_S, PAUSE_S, AFTER_S = 4.0, 2.0, 3.0
WINDOW_S, SHARE = 0.5, 0.9
BATCH, STEP_S, WARM_UP = 200, 0.05, 10
SLOW_ONE_IN, TIMES_SLOWER = 100, 20


def rate(times: list[float], begin: float, end: float) -> float:
    """Objects per second that came between two moments."""
    return sum(begin <= moment < end for moment in times) / (end - begin)


async def stormed(server: S3Server, seconds: float) -> Result:
    """Fetch without end, let the server refuse, and see what came when."""
    times, wanted = list[float](), (ObjectInfo(BUCKET, f"train/{n % OBJECTS:06}", SIZE) for n in itertools.count())
    retry = Retry(retries=1000, deadline=60, first_contact=5)
    store = StoreRecipe.of(endpoint=server.endpoint, env_file=None).make(1024, retry)
    async with Fetcher(store, None, concurrency="auto", retry=retry) as fetcher:

        async def fetch() -> None:
            async for _ in fetcher.fetch(wanted):
                times.append(time.perf_counter())

        fetching = asyncio.create_task(fetch())
        await asyncio.sleep(BEFORE_S)
        refusal = [Fault.status(503)]
        begun = time.perf_counter()
        await asyncio.to_thread(server.reset_counts)
        if seconds:
            await asyncio.to_thread(server.script, BUCKET, None, refusal, shared=True, forever=True)
            await asyncio.sleep(seconds)
            await asyncio.to_thread(server.clear_scripts)
        else:
            await asyncio.to_thread(server.script, BUCKET, None, refusal * BURST, shared=True)
        over = time.perf_counter()
        await asyncio.sleep(PAUSE_S + AFTER_S)
        fetching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await fetching
    before = rate(times, begun - BEFORE_S / 2, begun)
    windows = (over + step * 0.1 for step in range(int((PAUSE_S + AFTER_S - WINDOW_S) * 10)))
    back = next((at - over for at in windows if rate(times, at, at + WINDOW_S) >= SHARE * before), None)
    after, came = rate(times, over + PAUSE_S, over + PAUSE_S + AFTER_S), sum(moment > begun for moment in times)
    return {"before": before, "after": after, "back": back, "requests": server.stats.requests["GET"] / came}


def trained(endpoint: str, look_ahead: bool, hedging: bool, folder: str) -> Result:
    """An epoch; how long the loop waited for each batch but the first ones, and how many requests were second ones."""
    data = CachedS3MapDataset.from_prefix(
        f"s3://{BUCKET}/train/", endpoint=endpoint, cache_dir=folder, hedging=hedging, env_file=None, transform=_body
    )
    waits, asked = list[float](), time.perf_counter()
    for _ in data.loader(batch_size=BATCH, shuffle=True, collate_fn=len, depth=None if look_ahead else 0):
        waits.append(time.perf_counter() - asked)
        time.sleep(STEP_S)
        asked = time.perf_counter()
    return {"waits": waits[WARM_UP:], "hedges": data.stats()["hedges"]}


def _body(reader: object) -> bytes:
    return reader.read()  # type: ignore[attr-defined,no-any-return]


def storms(options: argparse.Namespace) -> Iterator[str]:
    rows = []
    for name, seconds in ((f"{BURST} refusals", 0.0), (f"all refused for {options.storm:g} s", options.storm)):
        runs = []
        for _ in range(options.rounds):
            with served(0.01) as server:
                runs.append(asyncio.run(stormed(server, seconds)))
        medians = {key: statistics.median(run[key] for run in runs) for key in ("before", "after", "requests")}
        backs = sorted(run["back"] if run["back"] is not None else float("inf") for run in runs)
        share = statistics.median(run["after"] / run["before"] for run in runs)
        goodput = f"{medians['before']:,.0f}", f"{medians['after']:,.0f}", f"{share:.2f}"
        rows.append([name, *goodput, f"{backs[0]:.1f} to {backs[-1]:.1f} s", f"{medians['requests']:.2f}"])
    yield table(["storm", "objects/s before", "2 s after", "ratio", "back after", "GETs per object"], rows)


def tails(options: argparse.Namespace) -> Iterator[str]:
    rows = []
    for rtt in options.rtt:
        for look_ahead, hedging in itertools.product((True, False), (True, False)):
            runs = [epoch(rtt, look_ahead, hedging) for _ in range(options.rounds)]
            errors = [run["error"] for run in runs if "error" in run]
            if errors:
                rows.append([f"{1000 * rtt:g} ms", errors[0], "", "", "", "", ""])
                continue
            waits = [sorted(run["waits"]) for run in runs]
            stalled = [sum(wait > TIMES_SLOWER * rtt / 2 for wait in each) for each in waits]
            extra = statistics.median(run["gets"] / OBJECTS - 1 for run in runs)
            how = f"{1000 * rtt:g} ms", "yes" if look_ahead else "no", "on" if hedging else "off"
            usual, longest = statistics.median(map(statistics.median, waits)), max(each[-1] for each in waits)
            stalls = f"{max(stalled)} of {len(waits[0])}"
            rows.append([*how, f"{1000 * usual:,.0f} ms", f"{1000 * longest:,.0f} ms", stalls, f"{extra:.2%}"])
    yield table(["others", "look-ahead", "hedging", "median wait", "longest", "stalled batches", "more GETs"], rows)


@contextlib.contextmanager
def served(latency: float, slower: float = 0.0) -> Iterator[S3Server]:
    with S3Server(latency=latency, process=True) as server:
        body = bytes(SIZE)
        server.put_many(BUCKET, {f"train/{number:06}": body for number in range(OBJECTS)})
        for number in range(0, OBJECTS if slower else 0, SLOW_ONE_IN):
            server.script(BUCKET, f"train/{number:06}", [Fault.delay(slower)])
        yield server


def epoch(rtt: float, look_ahead: bool, hedging: bool) -> Result:
    with served(rtt, (TIMES_SLOWER - 1) * rtt) as server, tempfile.TemporaryDirectory() as folder:
        how = [f"--endpoint={server.endpoint}", f"--folder={folder}"]
        how += ["--look-ahead"] * look_ahead + ["--hedging"] * hedging
        result = in_fresh_process(sys.executable, __file__, "epoch", how, **CREDENTIALS)
        return result | {"gets": server.stats.requests["GET"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--storm", type=float, default=5.0)
    parser.add_argument("--rtt", type=lambda text: [float(each) for each in text.split(",")], default=[0.01, 0.05])
    for name in ("--run", "--endpoint", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    for name in ("--look-ahead", "--hedging"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(trained(options.endpoint, options.look_ahead, options.hedging, options.folder)))
        return
    os.environ.update(CREDENTIALS)
    for text in itertools.chain(storms(options), tails(options)):
        print(text, end="\n\n", flush=True)


if __name__ == "__main__":
    main()
