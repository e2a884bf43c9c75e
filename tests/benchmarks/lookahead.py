"""What reading ahead brings: cold epochs with and without it, and the time that a training loop waits for bytes.

    python tests/benchmarks/lookahead.py [--objects 10000] [--rounds 3] [--workers 0,2] [--rtt 0,0.01,0.05]
        [--only cold|waiting|hints] [--slack 1.25]

Every run is a fresh process, contenders take turns, and requests are counted by the server. All of them decode the same
PNGs in the same way and get the same batches from the same seed. The garbage collector goes through all that torch and
others have loaded before the clock starts: once in a process it will, and that takes as long as to fetch 1,000 objects.

* Cold epochs: `DataLoader(dataset, ...)` and `dataset.loader(...)` on an empty cache, with nothing between batches.
* Waiting: between batches the loop sleeps, as if an accelerator worked, for `--slack` times as long as a batch takes to
  fetch and to decode (1.25). What it waits for the loader beyond that, in percent of the epoch, is compared with a
  dataset that has the same bytes in memory; without workers, the seconds that the dataset itself was blocked on bytes
  count.
* Hints: what the main process spends on telling a worker which batches come next, beyond what the batches themselves
  take: drawing them in advance, packing, pickling.

Prints Markdown tables.
"""

import argparse
import contextlib
import gc
import io
import json
import math
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from epochs import BATCH, BUCKET, OpenedImage, images
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from asyncds import CachedS3MapDataset, LookaheadBatchSampler
from asyncds.testing import LogNormal, S3Server

Result = dict[str, float]


class InMemory(Dataset[torch.Tensor]):
    """The same images, in memory."""

    def __init__(self, count: int) -> None:
        self.bodies = [body for _, body in sorted(images(count))]

    def __len__(self) -> int:
        return len(self.bodies)

    def __getitem__(self, index: int) -> torch.Tensor:
        return OpenedImage()(io.BytesIO(self.bodies[index]))


def made(name: str, options: argparse.Namespace, folder: str) -> tuple[Any, Any]:
    """The dataset and the loader of a contender."""
    if name == "in memory":
        memory = InMemory(options.objects)
        return memory, DataLoader(memory, BATCH, shuffle=True, num_workers=options.workers)
    dataset = CachedS3MapDataset.from_prefix(f"s3://{BUCKET}/train", transform=OpenedImage(), cache_dir=folder)
    if name == "ahead":
        return dataset, dataset.loader(BATCH, shuffle=True, num_workers=options.workers)
    return dataset, DataLoader(dataset, BATCH, shuffle=True, num_workers=options.workers)


def run(name: str, options: argparse.Namespace) -> Result:
    """One epoch in this process, with `options.step` seconds of sleep after each batch."""
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores
    with tempfile.TemporaryDirectory() as folder:
        dataset, loader = made(name, options, folder)
        samples = len(dataset)
        OpenedImage()(io.BytesIO(next(images(1))[1]))
        torch.manual_seed(0)
        waits = list[tuple[float, float]]()
        gc.collect()
        started, cpu = time.perf_counter(), time.process_time()
        batches = iter(loader)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            waits.append((asked, time.perf_counter() - asked))
            if batch is None:
                break
            time.sleep(options.step)
        seconds = time.perf_counter() - started
        assert len(waits) == len(loader) + 1
        first = max(1, options.workers)
        result = {"samples": samples, "seconds": seconds, "cpu": time.process_time() - cpu}
        result |= {"waited": share(waits[first:]), "under_way": share(waits[10 * first : -1])}
        if name != "in memory":
            result |= dataset.stats()
            dataset.close()
    return result


def share(waits: list[tuple[float, float]]) -> float:
    """What part of the time was waited, in percent."""
    if len(waits) < 2:
        return math.nan
    return 100 * sum(wait for _, wait in waits) / (sum(waits[-1]) - waits[0][0])


def in_fresh_process(name: str, arguments: list[str]) -> Result:
    command = [sys.executable, __file__, "--run", name, *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def in_turns(names: tuple[str, ...], options: argparse.Namespace, workers: int, step: float, server: S3Server) -> Any:
    """Every contender once per round."""
    arguments = [f"--objects={options.objects}", f"--workers={workers}", f"--step={step}"]
    results: dict[str, list[Result]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            server.reset_counts()
            result = in_fresh_process(name, arguments)
            results[name].append(result | {"GET": server.stats.requests["GET"]})
    return results


def cold(options: argparse.Namespace) -> None:
    print(f"Cold epochs of {options.objects:,} PNGs, batches of {BATCH}, {options.rounds} rounds\n")
    print("| round trip | workers | samples/s | spread | looking ahead | spread | ratio | in each round | GETs |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for rtt in map(float, options.rtt.split(",")):
        with serving(options, rtt) as server:
            for workers in map(int, options.workers.split(",")):
                results = in_turns(("plain", "ahead"), options, workers, 0.0, server)
                rates = {name: [r["samples"] / r["seconds"] for r in runs] for name, runs in results.items()}
                ratios = [a / b for a, b in zip(rates["ahead"], rates["plain"], strict=True)]
                columns = [
                    f"{statistics.median(rates[name]):,.0f} | {min(rates[name]):,.0f} to {max(rates[name]):,.0f}"
                    for name in ("plain", "ahead")
                ]
                gets = " ".join(sorted({f"{r['GET']:,.0f}" for runs in results.values() for r in runs}))
                each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
                cells = [f"{rtt * 1e3:g} ms", workers, *columns, f"{statistics.median(ratios):.2f}", each, gets]
                print(f"| {' | '.join(map(str, cells))} |", flush=True)


def waiting(options: argparse.Namespace) -> None:
    print("\nWaiting for the loader, in percent of the epoch after the first batch of each worker")
    print(f"({options.objects:,} PNGs)\n")
    print(
        "| latency | workers | step | in memory | with look-ahead | points more | under way | blocked on bytes | GETs |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for label, latency in (("10 ms", 0.010), ("10 ms, p99 50 ms", LogNormal(0.010, 0.050))):
        with serving(options, latency) as server:
            for workers in (0, 1, 4):
                alone = in_turns(("ahead",), argparse.Namespace(**vars(options) | {"rounds": 1}), workers, 0.0, server)
                step = options.slack * alone["ahead"][0]["seconds"] * BATCH / options.objects
                results = in_turns(("in memory", "ahead"), options, workers, step, server)
                shares = {name: [r["waited"] for r in runs] for name, runs in results.items()}
                blocked = [100 * r["blocked_s"] / r["seconds"] for r in results["ahead"]]
                gets = " ".join(sorted({f"{r['GET']:,.0f}" for r in results["ahead"]}))
                cells = [label, workers, f"{step * 1e3:.0f} ms", *map(spread, shares.values())]
                cells += [more(results, "waited"), more(results, "under_way"), spread(blocked), gets]
                print(f"| {' | '.join(map(str, cells))} |", flush=True)


def more(results: dict[str, list[Result]], what: str) -> str:
    """By how many points it is more than with everything in memory."""
    points = statistics.median(a[what] - b[what] for a, b in zip(results["ahead"], results["in memory"], strict=True))
    return f"{points:+.1f}"


def hints(options: argparse.Namespace) -> None:
    """Microseconds of a batch in the main process: drawn, and pickled for the worker."""
    rates: dict[str, list[float]] = {"plain": [], "ahead": []}
    for _ in range(max(5, options.rounds)):
        for name in rates:
            order = BatchSampler(RandomSampler(range(100_000)), BATCH, drop_last=False)
            batches = LookaheadBatchSampler(order) if name == "ahead" else order
            started = time.process_time()
            sizes = [len(pickle.dumps(batch)) for batch in batches]
            rates[name].append((time.process_time() - started) / len(sizes) * 1e6)
    extra = statistics.median(a - b for a, b in zip(rates["ahead"], rates["plain"], strict=True))
    print(f"\nHints: {extra:.0f} us of CPU more per batch of {BATCH} in the main process, of {max(sizes):,} bytes; ")
    print(f"that is {extra / 1e6 * 10_000 / BATCH:.2%} of it at 10,000 samples/s (plain {spread(rates['plain'])} us)")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


@contextlib.contextmanager
def serving(options: argparse.Namespace, latency: float | LogNormal) -> Iterator[S3Server]:
    with S3Server(process=True, latency=latency) as server:
        server.create_bucket(BUCKET)
        server.put_many(BUCKET, dict(images(options.objects)))
        os.environ |= {
            "AWS_ENDPOINT_URL": server.endpoint,
            "AWS_ACCESS_KEY_ID": "benchmark",
            "AWS_SECRET_ACCESS_KEY": "benchmark",
            "AWS_REGION": "us-east-1",
        }
        yield server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", default="0,2")
    parser.add_argument("--rtt", default="0,0.01,0.05", help="round trips of the cold epochs, in seconds")
    parser.add_argument("--slack", type=float, default=1.25, help="step between batches, in times that a batch takes")
    parser.add_argument("--step", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=["cold", "waiting", "hints"])
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        options.workers = int(options.workers)
        print(json.dumps(run(options.run, options)))
        return
    for part in (cold, waiting, hints):
        if options.only in (None, part.__name__):
            part(options)


if __name__ == "__main__":
    main()
