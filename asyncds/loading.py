"""A stock DataLoader whose batches are brought before they are asked for."""

import os
import warnings
from collections.abc import Iterable
from functools import reduce
from operator import add
from typing import Any

import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from asyncds.errors import ConfigurationError
from asyncds.lookahead import DEPTH, LookaheadBatchSampler, ReadsAhead
from asyncds.ranks import world_size

__all__ = ["loader"]


def loader(
    dataset: Dataset[Any],
    batch_size: int | None = 1,
    shuffle: bool | None = None,
    sampler: Iterable[Any] | None = None,
    batch_sampler: Iterable[Any] | None = None,
    num_workers: int = 0,
    *,
    drop_last: bool = False,
    generator: torch.Generator | None = None,
    depth: int | None = None,
    stateful: bool = False,
    **options: Any,
) -> Any:
    """Return `DataLoader(dataset, ...)`, with a `LookaheadBatchSampler` in it: the same batches for the same seed.

    Takes what `torch.utils.data.DataLoader` takes. `depth` is how many batches are brought in advance: by default 16,
    or 4 per worker if that is more; 0 is none. `stateful` makes it torchdata's `StatefulDataLoader`, which resumes
    within an epoch.

    `Subset` (that of `random_split`, too) and `ConcatDataset` of datasets of asyncds are turned into datasets of
    asyncds, which read whole batches at once. Another wrapper, which asks for samples one by one or in batches of its
    own making, gets a warning, and a loader that does not read ahead. Nor does one with `batch_size=None`. Raises
    `ConfigurationError` for a dataset that has nothing to do with asyncds, and what `DataLoader` raises.
    """
    _refuse_skipping(dataset)
    make: Any = _stateful() if stateful else DataLoader
    flat: Any = flattened(dataset)
    if flat is None and _wraps_one(dataset) and _passes_on(dataset):
        flat = dataset
    options |= {"num_workers": num_workers, "generator": generator}
    if isinstance(sampler, LookaheadBatchSampler):
        raise ConfigurationError("a LookaheadBatchSampler yields batches: give it as batch_sampler=")
    if flat is None or batch_size is None:
        if flat is None:
            _warn_or_refuse(dataset)
        own = {"batch_size": batch_size, "shuffle": shuffle, "sampler": sampler, "batch_sampler": batch_sampler}
        return make(flat if flat is not None else dataset, drop_last=drop_last, **own, **options)
    depth = max(DEPTH, 4 * num_workers) if depth is None else depth
    if batch_sampler is not None:
        if batch_size != 1 or shuffle or sampler is not None or drop_last:
            raise ConfigurationError(
                "batch_sampler= decides on batch_size, shuffle, sampler, drop_last: leave these out"
            )
        ahead = LookaheadBatchSampler(batch_sampler, depth=depth)
    else:
        if sampler is not None and shuffle:
            raise ConfigurationError("sampler= excludes shuffle=True: the sampler is what shuffles")
        if sampler is None:
            sampler = RandomSampler(flat, generator=generator) if shuffle else SequentialSampler(flat)
        ahead = LookaheadBatchSampler(sampler, batch_size, drop_last, depth=depth)
    ahead.sent_in_advance = num_workers > 0 and not stateful
    made = make(flat, batch_sampler=ahead, **options)
    # It has no place for the sampler of a batch sampler, but Lightning, which shards loaders, looks for it there.
    object.__setattr__(made, "sampler", getattr(ahead, "sampler", made.sampler))
    return made


def flattened(dataset: Dataset[Any]) -> ReadsAhead | None:
    """The dataset of asyncds that has the same samples in the same order, if there is one."""
    if isinstance(dataset, ReadsAhead):
        return dataset
    if type(dataset) is Subset:
        whole = flattened(dataset.dataset)
        return None if whole is None else whole.subset(dataset.indices)
    if type(dataset) is ConcatDataset:
        parts = [flattened(part) for part in dataset.datasets]
        own = [part for part in parts if part is not None]
        return reduce(add, own) if len(own) == len(parts) else None
    return None


def _passes_on(dataset: object) -> bool:
    """Whether a wrapper asks for whole batches, and, as far as can be told, for the very ones it is asked for."""
    own = getattr(type(dataset), "__getitems__", None)
    return own is not None and own is not Subset.__getitems__


def _refuse_skipping(dataset: object) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1") or 1)
    if getattr(dataset, "skips", False) and max(world, world_size()) > 1:
        raise ConfigurationError('on_error="skip" makes batches of unequal length, on which ranks hang: use "replace"')


def _warn_or_refuse(dataset: Dataset[Any]) -> None:
    kind = type(dataset).__name__
    if not _wraps_one(dataset):
        raise ConfigurationError(f"a {kind} is no dataset of asyncds: use DataLoader, or make a CachedS3MapDataset")
    warnings.warn(
        f"{kind} does not hand the batches on that it is asked for, so nothing is read ahead: give it a __getitems__ "
        "that passes its argument on, or use with_transform and subset",
        stacklevel=3,
    )


def _wraps_one(dataset: object, depth: int = 3) -> bool:
    if isinstance(dataset, ReadsAhead):
        return True
    inner = getattr(dataset, "__dict__", {}).values()
    inside = [item for value in inner for item in (value if isinstance(value, list | tuple) else [value])]
    return depth > 0 and any(_wraps_one(item, depth - 1) for item in inside if isinstance(item, Dataset))


def _stateful() -> Any:
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError:
        raise ConfigurationError("stateful=True needs torchdata: pip install torchdata") from None
    return StatefulDataLoader
