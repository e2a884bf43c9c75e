"""How many requests in flight are best, and how near `ASYNCDS_CONCURRENCY=auto` comes to it without being told.

    python tests/benchmarks/limiter.py [--objects 10000] [--size 10000] [--rounds 3] [--fixed 1,4,16,64,256]
        [--rtt 0,0.001,0.01,0.05,0.15] [--rate 1000] [--seconds 60]
    python tests/benchmarks/limiter.py --plot docs/images/limiter.png

Each run is a fetcher in a fresh process with an empty cache, which fetches all objects once from an `S3Server` in
another process, with that many seconds of latency; in the last row the server refuses what is above `--rate` requests
per second. The rate is that of all objects, from the first request to the last byte in the cache: the time in which
`auto` searches is in it. Fixed values and `auto` take turns, `--rounds` times; the table has the medians. A fixed value
that would take longer than `--seconds` for all objects is left out. `auto / best` is the median of ratios within
rounds. `GETs` is how many the server has counted for each object in the runs with `auto`.

With `--plot` nothing is measured: limit and goodput are drawn over time in the simulated networks of the tests.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from measuring import CORES, CREDENTIALS, Result, in_fresh_process, ratio, table

from asyncds import Fetcher, ObjectInfo
from asyncds.testing import S3Server

BUCKET = "limiter"


async def fetched(concurrency: str, endpoint: str, objects: int, size: int, folder: str) -> Result:
    """Fetch everything once; how many objects per second came, and the limit at the end."""
    async with Fetcher.open(
        endpoint=endpoint, cache_dir=folder, concurrency=concurrency, env_file=None, deadline=600
    ) as fetcher:
        await fetcher.get(ObjectInfo(BUCKET, "first", size))
        started = time.perf_counter()
        async for _ in fetcher.fetch(ObjectInfo(BUCKET, f"{number:06}", size) for number in range(objects)):
            pass
        seconds = time.perf_counter() - started
        return {"rate": objects / seconds, "limit": repr(fetcher).partition("at most ")[2].partition(",")[0]}


def measured(server: S3Server, concurrency: str, options: argparse.Namespace) -> Result:
    """A run in a process of its own, and the GETs that the server counted."""
    server.reset_counts()
    with tempfile.TemporaryDirectory() as folder:
        arguments = [f"--objects={options.objects}", f"--size={options.size}", f"--folder={folder}"]
        result = in_fresh_process(
            sys.executable, __file__, concurrency, [*arguments, f"--endpoint={server.endpoint}"], **CREDENTIALS
        )
    return result | {"gets": (server.stats.requests["GET"] - 1) / options.objects}


def row(name: str, latency: float, rate: float | None, options: argparse.Namespace) -> list[object]:
    """All values beside each other on one server."""
    fixed = [value for value in options.fixed if options.objects * latency / int(value) <= options.seconds]
    runs: dict[str, list[Result]] = {value: [] for value in [*fixed, "auto"]}
    with S3Server(latency=latency, rate_limit=rate, process=True) as server:
        body = os.urandom(options.size)
        server.put_many(BUCKET, {"first": body} | {f"{number:06}": body for number in range(options.objects)})
        for _ in range(options.rounds):
            for value in runs:
                result = measured(server, value, options)
                if "error" in result:
                    return [name, f"{value}: {result['error']}", *[""] * (len(options.fixed) + 4)]
                runs[value].append(result)
    rates = {value: [result["rate"] for result in results] for value, results in runs.items()}
    best = [max(rates[value][turn] for value in fixed) for turn in range(options.rounds)]
    medians = {value: f"{statistics.median(rates[value]):,.0f}" for value in rates}
    limits = ", ".join(result["limit"] for result in runs["auto"])
    gets = statistics.median(result["gets"] for result in runs["auto"])
    columns = [medians.get(value, "") for value in options.fixed]
    return [name, *columns, medians["auto"], ratio(rates["auto"], best), limits, f"{gets:.2f}"]


def plot(path: str) -> None:
    """Draw what the limiter does in simulated networks."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from networks import TICK_S, Network, Simulation

    from asyncds.limiter import Limiter
    from asyncds.testing import LogNormal

    usual = Network(latency=LogNormal(0.01, 0.03))
    slow = Network(latency=LogNormal(0.1, 0.3))
    wide, narrow = Network(latency=0.05, bandwidth=20e6), Network(latency=0.05, bandwidth=10e6)
    limited = Network(rate=2000)
    scenarios: list[tuple[str, list[Network], int]] = [
        ("10 ms, p99 30 ms; then 100 ms, p99 300 ms; then 10 ms again", [usual, slow, usual], 0),
        ("50 ms and 20 MB/s, then 10 MB/s, then 20 MB/s again", [wide, narrow, wide], 0),
        ("503 for all above 2,000 requests per second", [limited, limited, limited], 0),
        ("10 ms; 64 answers of 503 at 5 s, and 2,000 at 10 s", [usual, usual, usual], 64),
    ]
    figure, places = pyplot.subplots(2, 2, figsize=(11, 6.5), layout="constrained")
    for place, (title, networks, refuses) in zip(places.flat, scenarios, strict=True):
        simulation, ticks = Simulation(networks[0], Limiter()), []
        for network in networks:
            simulation.network = network
            ticks += simulation.run(5)
            simulation.refuses, refuses = refuses, 2000 if refuses else 0
        times = [tick.time for tick in ticks]
        totals = list(itertools.accumulate((tick.objects for tick in ticks), initial=0))
        rates = [(totals[n] - totals[max(0, n - 10)]) / (min(n, 10) * TICK_S) for n in range(1, len(totals))]
        place.set_title(title, fontsize=9)
        place.plot(times, rates, color="tab:blue", linewidth=1)
        place.set_ylabel("objects per second", color="tab:blue", fontsize=8)
        place.set_ylim(0)
        place.set_xlabel("seconds", fontsize=8)
        other = place.twinx()
        other.step(times, [tick.limit for tick in ticks], color="tab:orange", linewidth=1.5, where="post")
        other.set_ylabel("limit", color="tab:orange", fontsize=8)
        other.set_ylim(0)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fixed", type=lambda text: text.split(","), default=[str(2**n) for n in range(9)])
    parser.add_argument("--rtt", type=lambda text: text.split(","), default=["0", "0.001", "0.01", "0.05", "0.15"])
    parser.add_argument("--rate", type=float, default=1000.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--plot", metavar="FILE")
    for hidden in ("--run", "--endpoint", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plot:
        plot(options.plot)
        return
    if options.run:
        asked = fetched(options.run, options.endpoint, options.objects, options.size, options.folder)
        print(json.dumps(asyncio.run(asked)))
        return
    print(
        f"{options.objects:,} objects of {options.size:,} bytes, {options.rounds} rounds, {CORES} cores that the server"
    )
    print("shares; objects per second\n")
    rows = [row(f"{float(rtt) * 1000:g} ms", float(rtt), None, options) for rtt in options.rtt]
    rows.append(row(f"10 ms, 503 above {options.rate:,.0f}/s", 0.01, options.rate, options))
    header = ["latency", *options.fixed, "auto", "auto / best", "its limit at the end", "GETs"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
