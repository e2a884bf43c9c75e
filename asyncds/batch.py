"""Samples that are asked for together: find their objects, wait for what is missing, transform."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from asyncds.errors import DatasetClosed
from asyncds.lookup import Fetched
from asyncds.reader import S3Reader
from asyncds.source import Source

__all__ = ["Part", "PartBatch", "in_turn", "side_by_side"]


@dataclass(frozen=True)
class Part:
    """Objects that share a source and are turned into samples in the same way."""

    source: Source
    transform: Callable[[S3Reader], Any]
    target_transform: Callable[[Any], Any] | None


class PartBatch:
    """Samples of one part that were asked for together."""

    def __init__(self, part: Part, rows: NDArray[np.int64]) -> None:
        self._part = part
        manifest = part.source.manifest
        labels = manifest.labels
        self._labels = None if labels is None else labels[rows].tolist()
        self._infos, self._found = part.source.find(manifest.rows(rows))
        missing = [position for position, found in enumerate(self._found) if found is None]
        self._arrivals = part.source.request([self._infos[position] for position in missing]) if missing else None
        self._place = {position: place for place, position in enumerate(missing)}
        self._blocked, self._transforming = 0.0, list[float]()

    def sample(self, position: int) -> Any:
        """Wait for the object if need be, and turn it into a sample; to be called once for each position, in order."""
        return self.transformed(position, self.fetched(position))

    def fetched(self, position: int) -> Fetched:
        """Wait for the object if need be; to be called once for each position, in order."""
        found, self._found[position] = self._found[position], None
        if found is not None:
            return found
        assert self._arrivals is not None
        started = time.perf_counter()
        fetched = self._arrivals.take(self._place[position])
        self._blocked += time.perf_counter() - started
        return fetched

    def transformed(self, position: int, fetched: Fetched) -> Any:
        """Turn an object into a sample, in any thread."""
        info, body = fetched
        reader = S3Reader(info.bucket, info.key, body, info.etag)
        started = time.perf_counter()
        try:
            sample = self._part.transform(reader)
            if self._labels is not None:
                target_transform, label = self._part.target_transform, self._labels[position]
                sample = sample, label if target_transform is None else target_transform(label)
        except Exception as error:
            error.add_note(f"while transforming {info.uri}")
            raise
        self._transforming.append(time.perf_counter() - started)
        return sample

    def settle(self) -> None:
        """Wait until the cache has the batch, and count it."""
        if self._arrivals is not None:
            started = time.perf_counter()
            self._arrivals.settle()
            self._blocked += time.perf_counter() - started
        misses = len(self._place)
        self._part.source.counters.add(
            samples=len(self._infos),
            hits=len(self._infos) - misses,
            misses=misses,
            blocked_s=self._blocked,
            transform_s=math.fsum(self._transforming),
        )
        self._part.source.insist()


def in_turn(wanted: Sequence[tuple[PartBatch, int]]) -> Iterator[Callable[[], Any]]:
    """What makes each sample, in the calling thread."""
    return (partial(batch.sample, position) for batch, position in wanted)


def side_by_side(wanted: Sequence[tuple[PartBatch, int]], threads: Executor) -> list[Callable[[], Any]]:
    """What waits for each sample, which is made by one of the threads as soon as it and those before it are there."""
    return [_begun(batch, position, threads) for batch, position in wanted]


def _begun(batch: PartBatch, position: int, threads: Executor) -> Callable[[], Any]:
    try:
        fetched = batch.fetched(position)
    except Exception as error:
        return partial(_raise, error)
    try:
        return threads.submit(batch.transformed, position, fetched).result
    except RuntimeError:
        return partial(_raise, DatasetClosed("the dataset was closed while a batch was under way"))


def _raise(error: Exception) -> NoReturn:
    raise error
