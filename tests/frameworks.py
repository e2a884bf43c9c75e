"""One rank of a job of two under Lightning or Accelerate: which rows each loader gave it, beside those of a stock one.

Run by test_lookahead.py as `frameworks.py FRAMEWORK FOLDER WAY...`, with what torch wants to know of a job in the
environment. Each way finds its objects below a prefix of its own name. Writes `RANK.json` into the folder. With
Lightning, "hook" before a way lets a hook make the loader.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, WeightedRandomSampler

from asyncds import CachedS3MapDataset, S3Reader, loader

COUNT, BATCH, RANKS, DEPTH = 60, 5, 2, 9
PATIENCE_S = 20
WEIGHTS = [1 + row % 3 for row in range(COUNT)]

Read = Callable[[Callable[[], DataLoader]], tuple[list[int], DataLoader]]


class Rows:
    """A transform: the number in the key. From the second batch on it waits until all that is coming has arrived."""

    def __init__(self, dataset: CachedS3MapDataset) -> None:
        self._dataset = dataset
        self._seen = 0
        self.arrived = 0

    def __call__(self, object: S3Reader) -> int:
        self._seen += 1
        end = time.monotonic() + PATIENCE_S
        while self._seen > BATCH and not self._all_there():
            assert time.monotonic() < end, "nothing was read ahead"
        return int(object.key[-2:])

    def _all_there(self) -> bool:
        fetcher = self._dataset._parts[0].source.runtime().fetcher
        return self._dataset.stats()["gets"] >= self.arrived and "<Fetcher 0 in flight" in repr(fetcher)


class Backwards(BatchSampler):
    """A user's own batch sampler, made as Lightning wants them."""

    def __iter__(self):
        return ([*reversed(batch)] for batch in super().__iter__())


WAYS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "shuffled": lambda _: {"batch_size": BATCH, "shuffle": True},
    "workers": lambda _: {
        "batch_size": BATCH,
        "shuffle": True,
        "num_workers": 2,
        "multiprocessing_context": "fork",
    },
    "split": lambda _: {"batch_size": RANKS * BATCH, "shuffle": True},
    "weighted": lambda _: {"batch_size": BATCH, "sampler": WeightedRandomSampler(WEIGHTS, COUNT)},
    "distributed": lambda dataset: {
        "batch_size": BATCH,
        "sampler": DistributedSampler(dataset, RANKS, int(os.environ["RANK"]), seed=3),
    },
    "batch sampler": lambda dataset: {"batch_sampler": Backwards(range(COUNT), BATCH, False)},
}


def accelerate(way: str) -> Read:
    from accelerate import Accelerator, DataLoaderConfiguration

    def read(make: Callable[[], DataLoader]) -> tuple[list[int], DataLoader]:
        torch.manual_seed(7)
        split = DataLoaderConfiguration(split_batches=way == "split")
        prepared = Accelerator(cpu=True, dataloader_config=split).prepare(make())
        return [row for batch in prepared for row in batch.tolist()], prepared

    return read


def lightning(way: str) -> Read:
    from lightning.pytorch import LightningModule, Trainer, seed_everything

    class Training(LightningModule):
        def __init__(self, make: Callable[[], DataLoader]) -> None:
            super().__init__()
            self.rows: list[int] = []
            self._make = make
            self._layer = torch.nn.Linear(1, 1)

        def train_dataloader(self) -> DataLoader:
            return self._make()

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            self.rows += batch.tolist()
            return self._layer(torch.ones(1)).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)

    def read(make: Callable[[], DataLoader]) -> tuple[list[int], DataLoader]:
        seed_everything(7, verbose=False)
        trainer = Trainer(accelerator="cpu", devices=RANKS, strategy="ddp", max_epochs=1, **quiet)
        training = Training(make)
        trainer.fit(training, *([] if way.startswith("hook ") else [make()]))
        return training.rows, trainer.train_dataloader

    return read


def depth_of(loader: DataLoader) -> int | None:
    sampler = loader.batch_sampler
    return getattr(getattr(sampler, "batch_sampler", sampler), "depth", None)


def run(read: Read, way: str, cache_dir: str) -> dict[str, Any]:
    """What a stock loader gives this rank, and what ours does, in a cold epoch."""
    make, rows = WAYS[way.removeprefix("hook ")], range(COUNT)
    expected, _ = read(lambda: DataLoader(rows, **make(rows)))
    with CachedS3MapDataset.from_prefix(f"s3://mnist/{way}/", cache_dir=cache_dir) as dataset:
        transform = Rows(dataset)
        transform.arrived = len({*expected}) if "weighted" not in way else 0
        mine = dataset.with_transform(transform)
        found, prepared = read(lambda: loader(mine, **make(mine), depth=DEPTH))
        return {"expected": expected, "found": found, "depth": depth_of(prepared), **dataset.stats()}


def attempt(read: Read, way: str, cache_dir: str) -> dict[str, Any]:
    try:
        return run(read, way, cache_dir)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main(framework: str, folder: str, *ways: str) -> None:
    torch.distributed.init_process_group("gloo")
    use = {"accelerate": accelerate, "lightning": lightning}[framework]
    found = {way: attempt(use(way), way, f"{folder}/{way}") for way in ways}
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
