"""What it takes until work begins: the import, the command line, a dataset of a saved table, and its workers.

    python tests/benchmarks/start.py [--rows 1000,10_000_000] [--rounds 5]

First, seconds of `python -c "import asyncds"` and of `asyncds --help`, each a fresh process, beside `python -c pass`.
Then, for a saved table of so many rows, seconds to open it and make a dataset of it, and from asking the stock
DataLoader for its first batch, with two workers, until the batch is there. What is in the store comes at once, without
a network. The tables take turns; medians, and the lowest and highest. The files are in the page cache.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from manifest import synthetic
from measuring import spread, table

BATCH, METHODS = 8, ("fork", "spawn")


class Instant:
    """A store that has everything at once."""

    endpoint = "instant://"

    async def list(self, bucket: str, prefix: str) -> AsyncGenerator[Sequence[object], None]:
        for nothing in ():
            yield nothing

    async def get(self, info: object, reserve: object = None, part: object = None) -> tuple[object, bytes]:
        return info, bytes(info.size)  # type: ignore[attr-defined]

    async def head(self, bucket: str, key: str) -> object:
        raise NotImplementedError


def length(reader: object) -> int:
    return len(reader.read())  # type: ignore[attr-defined]


def started(file: str, method: str) -> dict[str, float]:
    """Open a table in this process, and start workers on it."""
    from torch.utils.data import DataLoader

    from asyncds import CachedS3MapDataset, Manifest

    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        manifest = Manifest.open(file)
        dataset = CachedS3MapDataset.from_manifest(
            manifest, store=Instant(), cache_dir=folder, transform=length, env_file=None
        )
        made = time.perf_counter()
        batches = iter(DataLoader(dataset, batch_size=BATCH, num_workers=2, multiprocessing_context=method))
        next(batches)
        there = time.perf_counter()
        del batches
        dataset.close()
    return {"open": made - begun, "first batch": there - made}


def seconds(*command: str) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begun


def cell(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({spread(values, 2)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=[1000, 10_000_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(started(*options.run)))
        return
    commands = {"pass": ("-c", "pass"), "import asyncds": ("-c", "import asyncds")}
    commands |= {"asyncds --help": ("-m", "asyncds", "--help")}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(options.rounds):
        for name, command in commands.items():
            times[name].append(seconds(*command))
    print(table(["process", "seconds"], [[name, cell(each)] for name, each in times.items()]), end="\n\n")
    with tempfile.TemporaryDirectory() as folder:
        files = {rows: Path(folder, f"{rows}.manifest") for rows in options.rows}
        for rows, file in files.items():
            synthetic(rows).save(file)
        runs = {(rows, method): list[dict[str, float]]() for rows in files for method in METHODS}
        for _ in range(options.rounds):
            for (rows, method), results in runs.items():
                command = [sys.executable, __file__, "--run", str(files[rows]), method]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ)
                results.append(json.loads(done.stdout))
    lines = [
        [f"{rows:,}", method, cell([each["open"] for each in results]), cell([each["first batch"] for each in results])]
        for (rows, method), results in runs.items()
    ]
    print(table(["rows", "workers by", "open, s", "first batch, s"], lines))


if __name__ == "__main__":
    main()
