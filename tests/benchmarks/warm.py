"""How near `asyncds warm` comes to what `asyncds tune` expects of the same bucket.

    python tests/benchmarks/warm.py [--objects 10000] [--size 700] [--rtt 0.01] [--rounds 3]

In each round the command `asyncds tune --json` measures a bucket of an `S3Server` in another process, behind that many
seconds of latency; then `asyncds warm --json` fills an empty cache, once with `ASYNCDS_CONCURRENCY=auto`, and once with
the number that tune has named. Times are those that warm reports, from the first look into the cache to the last
object in it; the ratios are these by the time of an epoch that tune expects. Requests are those that the server counts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

from measuring import CREDENTIALS, Result, ratio, spread, table

from asyncds.testing import S3Server

BUCKET = "warm"
URI = f"s3://{BUCKET}/train/"


def asyncds(command: str, endpoint: str, folder: str, *arguments: str, **environment: str) -> Result:
    """What a command prints."""
    place = {"AWS_ENDPOINT_URL": endpoint, "ASYNCDS_CACHE_DIR": folder}
    done = subprocess.run(
        [sys.executable, "-m", "asyncds", command, URI, "--json", *arguments],
        stdout=subprocess.PIPE,
        env=os.environ | CREDENTIALS | place | environment,
        cwd=folder,
        check=True,
    )
    result: Result = json.loads(done.stdout)
    return result


def warmed(server: S3Server, **environment: str) -> float:
    """Seconds that filling an empty cache takes."""
    server.reset_counts()
    with tempfile.TemporaryDirectory() as folder:
        (report,) = asyncds("warm", server.endpoint, folder, **environment)["datasets"]
    asked = server.stats.requests["GET"]
    if asked != report["objects"] or report["failures"]:
        raise SystemExit(f"{asked} GETs for {report['objects']} objects, {len(report['failures'])} failures")
    return float(report["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objects", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=700)
    parser.add_argument("--rtt", type=float, default=0.01)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    expected, auto, fixed, names = list[float](), list[float](), list[float](), list[str]()
    with S3Server(latency=options.rtt, process=True) as server:
        body = os.urandom(options.size)
        server.put_many(BUCKET, {f"train/{number:06}": body for number in range(options.objects)})
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as folder:
                found = asyncds("tune", server.endpoint, folder, "--objects=100000")
            expected.append(options.objects / found["rate"])
            names.append(f"{found['best']} ({found['limit']})")
            auto.append(warmed(server))
            fixed.append(warmed(server, **found["export"]))
    print(
        f"{options.objects:,} objects of {options.size:,} bytes, {1000 * options.rtt:g} ms, {options.rounds} rounds\n"
    )
    header = ["", "tune expects", "warm, auto", "warm, tune's number", "auto / tune", "fixed / tune", "tune's number"]
    times = [f"{statistics.median(each):.2f} s ({spread(each, 2)})" for each in (expected, auto, fixed)]
    print(table(header, [["seconds", *times, ratio(auto, expected), ratio(fixed, expected), ", ".join(names)]]))


if __name__ == "__main__":
    main()
