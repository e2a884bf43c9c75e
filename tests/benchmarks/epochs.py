"""Epochs over small PNGs: one request per sample, asyncds cold and warm, and the same files on local disk.

    python tests/benchmarks/epochs.py [--rtt 0.01] [--objects 2000] [--workers 0] [--rounds 3]

Every run is a fresh process, contenders take turns, and requests are counted by the server. All decode the same images
in the same way; only the loop over the loader is timed, after one image was decoded. The per-sample way is timed over
its first samples only, because its rate does not change. Prints a Markdown table.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms

from asyncds import CachedS3MapDataset
from asyncds.testing import S3Server

BATCH = 200
BUCKET = "mnist"
PER_SAMPLE_SHARE = 0.2
decode = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])  # as in the tutorials


class OpenedImage:
    """Bytes of a PNG, or an open file of them, to a normalised tensor."""

    def __call__(self, file: Any) -> torch.Tensor:
        return decode(Image.open(io.BytesIO(file.read())))


class PerSample(Dataset[torch.Tensor]):
    """The hand-written way: the MinIO SDK, one client per process, one request per sample."""

    def __init__(self, host: str, keys: list[str], opened: Callable[[Any], Any], bucket: str = BUCKET) -> None:
        self.host, self.keys, self.opened, self.bucket, self.client = host, keys, opened, bucket, None

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.client is None:
            from minio import Minio

            self.client = Minio(self.host, "benchmark", "benchmark", secure=False, region="us-east-1")
        response = self.client.get_object(self.bucket, self.keys[index])
        try:
            return self.opened(response)
        finally:
            response.close()
            response.release_conn()


class LocalFiles(Dataset[torch.Tensor]):
    """The same objects as files."""

    def __init__(self, folder: Path, opened: Callable[[Any], Any]) -> None:
        self.paths, self.opened = sorted(path for path in folder.rglob("*") if path.is_file()), opened

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with self.paths[index].open("rb") as file:
            return self.opened(file)


def images(count: int) -> Iterator[tuple[str, bytes]]:
    """Keys `train/<label>/<number>.png` and 28x28 PNGs of noise and strokes, about 0.5 kB each."""
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = np.zeros((28, 28), np.uint8)
        pixels[6:22, 10:18] = random.integers(0, 255, (16, 8))
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        yield f"train/{number % 10}/{number:06}.png", file.getvalue()


def contender(name: str, options: argparse.Namespace) -> Dataset[torch.Tensor]:
    """The dataset to time."""
    folder = Path(options.folder)
    if name == "local files":
        return LocalFiles(folder / "files", OpenedImage())
    keys = sorted(str(path.relative_to(folder / "files")) for path in (folder / "files").rglob("*.png"))
    if name == "per sample":
        whole = PerSample(os.environ["AWS_ENDPOINT_URL"].removeprefix("http://"), keys, OpenedImage())
        return Subset(whole, range(max(BATCH, int(len(keys) * PER_SAMPLE_SHARE))))
    cache = folder / ("cold-" + str(os.getpid()) if name == "asyncds cold" else "warm")
    return CachedS3MapDataset.from_prefix(
        f"s3://{BUCKET}/train", transform=OpenedImage(), cache_dir=cache, concurrency=options.concurrency
    )


def timed(name: str, options: argparse.Namespace) -> dict[str, float]:
    """One epoch in this process."""
    dataset = contender(name, options)
    torch.manual_seed(0)
    loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=options.workers)
    OpenedImage()(io.BytesIO(next(images(1))[1]))
    samples = len(dataset)  # type: ignore[arg-type]
    started, cpu = time.perf_counter(), time.process_time()
    seen = sum(len(batch) for batch in loader)
    seconds = time.perf_counter() - started
    assert seen == samples
    return {"samples": samples, "seconds": seconds, "cpu": time.process_time() - cpu}


def in_fresh_process(name: str, arguments: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, "--run", name, *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def rounds(options: argparse.Namespace, arguments: list[str], server: S3Server) -> dict[str, list[dict[str, float]]]:
    """Every contender once per round."""
    results: dict[str, list[dict[str, float]]] = {}
    for _ in range(options.rounds):
        for name in ("per sample", "asyncds cold", "asyncds warm", "local files"):
            server.reset_counts()
            result = in_fresh_process(name, arguments)
            stats = server.stats
            result |= {"gets": stats.requests["GET"], "lists": stats.requests["LIST"], "peak": stats.max_in_flight}
            results.setdefault(name, []).append(result)
    return results


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Medians, the spread of rates, and the ratio to the per-sample way within each round."""
    lines = ["| | samples/s | spread | to per sample | GETs per sample | peak in flight | CPU per sample |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|")
    rate: Callable[[dict[str, float]], float] = lambda run: run["samples"] / run["seconds"]  # noqa: E731
    for name, runs in results.items():
        rates = [rate(run) for run in runs]
        ratio = statistics.median(rate(a) / rate(b) for a, b in zip(runs, results["per sample"], strict=True))
        last = runs[-1]
        lines.append(
            f"| {name} | {statistics.median(rates):,.0f} | {min(rates):,.0f} to {max(rates):,.0f} | {ratio:.1f} | "
            f"{last['gets'] / last['samples']:g} | {last['peak']:.0f} | "
            f"{statistics.median(run['cpu'] / run['samples'] for run in runs) * 1e6:,.0f} µs |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rtt", type=float, default=0.010, help="seconds that the server takes to answer")
    parser.add_argument("--objects", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(timed(options.run, options)))
        return
    data = dict(images(options.objects))
    with tempfile.TemporaryDirectory() as folder, S3Server(process=True, latency=options.rtt) as server:
        server.create_bucket(BUCKET)
        server.put_many(BUCKET, data)
        for key, body in data.items():
            path = Path(folder, "files", key)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body)
        os.environ |= {
            "AWS_ENDPOINT_URL": server.endpoint,
            "AWS_ACCESS_KEY_ID": "benchmark",
            "AWS_SECRET_ACCESS_KEY": "benchmark",
            "AWS_REGION": "us-east-1",
        }
        arguments = [f"--workers={options.workers}", f"--concurrency={options.concurrency}", f"--folder={folder}"]
        in_fresh_process("asyncds warm", arguments)
        results = rounds(options, arguments, server)
    print(f"{options.objects:,} PNGs, {options.rtt * 1e3:g} ms, batch {BATCH}, {options.workers} workers,", end=" ")
    print(f"{options.concurrency} requests in flight at most, {os.cpu_count()} cores, {options.rounds} rounds\n")
    print(table(results))
    cold, warm, files = (results[name] for name in ("asyncds cold", "asyncds warm", "local files"))
    share = statistics.median(b["seconds"] / a["seconds"] for a, b in zip(warm, files, strict=True))
    print(f"\nwarm epoch: {share:.2f} times the rate of local files; cold: {cold[-1]['lists']:.0f} LIST")


if __name__ == "__main__":
    main()
