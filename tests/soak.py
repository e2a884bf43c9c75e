"""Train for a stated time through faults of network, disk and processes at random, and compare every byte.

    python tests/soak.py [--seconds 60] [--seed N] [--json]

Two processes train on one cache, from an S3 server that draws a fault for about half of its answers. In rounds of some
seconds there are also: files, rows and the index of the cache damaged while they are in use; its folder deleted; a disk
that is full; a cache that is small, read-only, or none; workers and a training process killed by SIGKILL; a server that
is away. At the end stands a table, or a document of JSON. Exits with 1 if a promise was broken, and names it, and the
seed, which draws the same rounds again; which request meets which fault then depends on who comes first. Linux only.
"""

import argparse
import json
import secrets
import sys
import tempfile
from pathlib import Path

from soaking.run import Soak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of training, about (60)")
    parser.add_argument("--seed", type=int, help="of all that is drawn; by default another one each time")
    parser.add_argument("--json", action="store_true", help="print a document instead of a table")
    arguments = parser.parse_args()
    if sys.platform != "linux":
        parser.error("this needs Linux: /proc, and processes that take on orphans")
    seed = secrets.randbelow(2**32) if arguments.seed is None else arguments.seed
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        report = Soak(seed, arguments.seconds, Path(folder), _say).run()
    print(json.dumps(report.document(), indent=2) if arguments.json else report.table())
    violations = report.violations()
    for line in violations:
        print(f"soak: {line}", file=sys.stderr)
    if violations:
        print(f"soak: {len(violations)} promises were broken; again with --seed {seed}", file=sys.stderr)
    return 1 if violations else 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
