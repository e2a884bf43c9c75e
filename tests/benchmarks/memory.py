"""How much memory asyncds takes while it fills a cache: the peak of resident memory, above what it was before.

    python tests/benchmarks/memory.py [--concurrency 256]

Every case is a fresh process. `opening` is what it took to import asyncds, list, and read one object of one byte (most
of it is botocore's description of S3); `filling` and `reading` are peaks on top of that, with all that is added:
buffers, bodies on their way to disk, the index. Linux only. Prints a Markdown table.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch.utils.data  # noqa: F401 - the user has it anyway

from asyncds.testing import S3Server

BUCKET = "memory"
CASES: dict[str, tuple[str, int, int, bool]] = {  # objects, bytes of each, whether they are listed
    "20,000 of 2 kB, listed": ("tiny", 20_000, 2_000, True),
    "20,000 of 2 kB, not listed": ("tiny", 20_000, 2_000, False),
    "300 of 2 MB, listed": ("many", 300, 2_000_000, True),
    "300 of 2 MB, not listed": ("many", 300, 2_000_000, False),
    "4 of 30 MB, not listed": ("large", 4, 30_000_000, False),
    "1 of 200 MB, listed": ("giant", 1, 200_000_000, True),
    "1 of 200 MB, not listed": ("giant", 1, 200_000_000, False),
}


def memory(field: str) -> int:
    """Bytes of resident memory, now (`VmRSS`) or at its peak (`VmHWM`)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) << 10


def above(work: Callable[[], object]) -> int:
    """The peak of resident memory during `work`, above what it was before."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far; see proc(5)
    before = memory("VmRSS")
    work()
    return memory("VmHWM") - before


def measure(case: str, concurrency: int, folder: str) -> dict[str, int]:
    """Open a dataset, fill its cache, and then read from it, in this process."""
    prefix, count, _, listed = CASES[case]
    before = memory("VmRSS")
    from asyncds import CachedS3MapDataset

    options = {"transform": lambda file: file.size, "cache_dir": folder, "concurrency": concurrency}
    if listed:
        dataset = CachedS3MapDataset.from_prefix(f"s3://{BUCKET}/{prefix}/", **options)
    else:
        uris = [f"s3://{BUCKET}/{prefix}/{number:06}" for number in range(count + 1)]
        dataset = CachedS3MapDataset.from_objects(uris, **options)
    with dataset:
        assert dataset[0] == 1
        opened = memory("VmRSS") - before
        filling = above(lambda: dataset.warm(progress=False))
        reading = above(lambda: [dataset[index] for index in range(1, min(count, 100) + 1)])
    return {"opening": opened, "filling": filling, "reading": reading}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.concurrency, options.folder)))
        return
    with S3Server(process=True) as server:
        server.create_bucket(BUCKET)
        for prefix, count, size in dict.fromkeys(case[:3] for case in CASES.values()):
            body = os.urandom(size)
            server.put_many(BUCKET, {f"{prefix}/{number:06}": body if number else b"1" for number in range(count + 1)})
        os.environ |= {
            "AWS_ENDPOINT_URL": server.endpoint,
            "AWS_ACCESS_KEY_ID": "benchmark",
            "AWS_SECRET_ACCESS_KEY": "benchmark",
            "AWS_REGION": "us-east-1",
        }
        print(f"| warm(), {options.concurrency} requests in flight at most | opening | filling | reading one by one |")
        print("|---|--:|--:|--:|")
        for case in CASES:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, __file__, f"--case={case}", f"--concurrency={options.concurrency}"]
                output = subprocess.run([*command, f"--folder={folder}"], check=True, stdout=subprocess.PIPE).stdout
                result = json.loads(output)
            columns = " | ".join(f"+{result[name] / 2**20:.0f} MiB" for name in ("opening", "filling", "reading"))
            print(f"| {case} | {columns} |")


if __name__ == "__main__":
    main()
