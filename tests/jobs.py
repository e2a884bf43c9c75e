"""One rank of a job that test_ranks.py starts: `jobs.py JOB FOLDER`, with what torch wants to know in the environment.

In the job `all` each rank goes through the steps, and writes what it found into `RANK.json` in the folder. In the job
`lost` it lists the prefixes that it reads from standard input, and prints what it was told.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from asyncds import CachedS3MapDataset, S3Reader, loader, ranks
from asyncds.errors import AsyncdsError

RANKS, BATCH, SEED = 4, 2, 3
RANK = int(os.environ["RANK"])


def number(object: S3Reader) -> int:
    return int(object.key[-2:])


def made(prefix: str, **options: Any) -> CachedS3MapDataset:
    return CachedS3MapDataset.from_prefix(f"s3://mnist/{prefix}/", transform=number, **options)


def two_epochs(dataset: CachedS3MapDataset, workers: int) -> list[list[int]]:
    sampler = DistributedSampler(dataset, RANKS, RANK, seed=SEED)
    batches = loader(dataset, BATCH, sampler=sampler, num_workers=workers)
    found = []
    for epoch in range(2):
        batches.batch_sampler.set_epoch(epoch)
        found.append([row for batch in batches for row in batch.tolist()])
    return found


def workers() -> list[list[int]]:
    with made("workers") as dataset:
        return two_epochs(dataset, 2)


def one() -> list[int]:
    """A dataset for validation, which only one rank makes, and reads whole."""
    if RANK != 0:
        return []
    with made("one") as dataset:
        return [row for batch in loader(dataset, BATCH) for row in batch.tolist()]


def absent() -> list[str]:
    """A listing that fails, twice."""
    said = []
    with CachedS3MapDataset.from_prefix("s3://absent/") as dataset:
        for _ in range(2):
            try:
                len(dataset)
            except AsyncdsError as error:
                said.append(f"{type(error).__name__}: {error}")
    return said


def ending_in(parity: int) -> list[str]:
    with made("lambdas", match=lambda key: int(key[-1]) % 2 == parity) as dataset:
        return [info.key for info in dataset.manifest]


def lambdas() -> list[list[str]]:
    """The first such dataset of one rank is not the first of the others."""
    return [ending_in(parity) for parity in ((1, 0) if RANK == 0 else (0,))]


def different() -> dict[str, Any]:
    with made("different", match="*1" if RANK == 3 else None) as dataset:
        try:
            two_epochs(dataset, 0)
            said = None
        except AsyncdsError as error:
            said = f"{type(error).__name__}: {error}"
        return {"said": said, "samples": dataset.stats()["samples"]}


def csv(folder: str) -> list[list[int]]:
    """Each rank has a copy of the same rows, in a place of its own."""
    place = Path(folder, f"{RANK}.csv")
    place.write_text("key\n" + "".join(f"one/{row:02}\n" for row in range(8)))
    with CachedS3MapDataset.from_csv(place, root="s3://mnist", label=None, transform=number) as dataset:
        return two_epochs(dataset, 0)


def found(step: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return step(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def all_steps(folder: str) -> None:
    before, alone = made("before", match="before*"), found(one)
    answers = {"length": len(before), "alone": alone}
    torch.distributed.init_process_group("gloo")
    answers |= {
        "before": found(two_epochs, before, 0),
        "workers": found(workers),
        "one": found(one),
        "empty": found(length, "nothing"),
        "absent": found(absent),
        "lambdas": found(lambdas),
        "different": found(different),
        "csv": found(csv, folder),
    }
    Path(folder, f"{RANK}.json").write_text(json.dumps(answers))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def length(prefix: str) -> int:
    return len(made(prefix))


def lost() -> None:
    awaited, ranks.PATIENCE_S = ranks._awaited, 2.0

    def await_and_say(*arguments: Any) -> dict[str, Any]:
        print("waiting", flush=True)
        return awaited(*arguments)

    ranks._awaited = await_and_say
    torch.distributed.init_process_group("gloo")
    for line in sys.stdin:
        print(found(length, line.strip()), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "all":
        all_steps(sys.argv[2])
    else:
        lost()
