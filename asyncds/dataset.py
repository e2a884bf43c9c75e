"""The synchronous, map-style face of it all: index → key → sample."""

import contextlib
import itertools
import math
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any, NotRequired, Self, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, random_split

from asyncds.batch import Part, PartBatch, in_turn, side_by_side
from asyncds.errors import CacheError, ConfigurationError, DatasetClosed, StoreError
from asyncds.labels import labeller
from asyncds.listing import Labeller
from asyncds.loading import loader
from asyncds.lookahead import Batch, Horizon, ReadsAhead
from asyncds.manifest import KeyFilter, Label, Manifest, ObjectInfo, check_choice, parse_uri
from asyncds.reader import S3Reader
from asyncds.recipe import StoreRecipe
from asyncds.selection import Choice, Selection
from asyncds.settings import Options, or_close_to
from asyncds.source import Source
from asyncds.stats import percentiles
from asyncds.store import ObjectStore
from asyncds.warm import WarmReport

__all__ = ["CachedS3MapDataset"]


_SUBSTITUTES = 10  # that are tried


def _identity(sample: Any) -> Any:
    return sample


class _Common(Options):
    """What every constructor accepts by keyword."""

    region: NotRequired[str | None]
    endpoint: NotRequired[str | None]
    transform: NotRequired[Callable[[S3Reader], Any] | None]
    target_transform: NotRequired[Callable[[Any], Any] | None]
    s3client_config: NotRequired[Any]
    profile: NotRequired[str | None]
    unsigned: NotRequired[bool]
    session_factory: NotRequired[Callable[[], Any] | None]
    store: NotRequired[ObjectStore | None]
    reader_constructor: NotRequired[Any]


_OF_CONSTRUCTORS = ("label", "labels", "match", "limit", "refresh", "root", "key")


class CachedS3MapDataset(ReadsAhead):
    """A map-style dataset whose samples are objects of a bucket, read through a cache on local disk.

    A sample is `transform(object)`, where the object is a file (`S3Reader`); with labels it is the pair
    `(transform(object), target_transform(label))`. A batch that the DataLoader asks for (`__getitems__`) is looked up
    with one query, and what is missing is downloaded concurrently while its first samples are already transformed.
    Transforms run one after another, in the order of the batch, so random ones draw what they would without asyncds.
    With `decode_threads` they run in so many threads: that pays where they release the interpreter's lock, and those
    that draw random numbers then do so in another order each time.

    Made by `from_prefix`, `from_objects`, `from_manifest` or `from_csv`, which all accept by keyword:

    * `transform`, `target_transform`: callables, picklable if workers are spawned;
    * `region`, `endpoint`, `profile`, `unsigned=True` (for public buckets), `session_factory`, `s3client_config` (as
      for `S3MapDataset`), `store` (an `ObjectStore` of your own): where the objects are, and who asks. Credentials
      come from the environment;
    * every setting of `asyncds.Settings`, such as `concurrency`, `cache_dir`, `cache_size`.

    Works in any thread, and in worker processes under fork, spawn and forkserver: each builds its own connections.
    Reading raises what `asyncds.errors` lists; an error of `transform` keeps its type and gains the object's URI as a
    note.
    """

    def __init__(self, parts: Sequence[Part], rows: NDArray[np.int64] | None = None) -> None:
        if isinstance(parts, str):
            raise ConfigurationError("use CachedS3MapDataset.from_prefix(uri), from_objects, from_csv or from_manifest")
        self._parts = tuple(parts)
        self._rows = rows
        self._horizon = Horizon()

    # constructors

    @classmethod
    def from_prefix(
        cls,
        s3_uri: str,
        *,
        label: str | Labeller | None = None,
        match: KeyFilter | None = None,
        limit: int | None = None,
        **common: Unpack[_Common],
    ) -> Self:
        """Make a dataset of all objects under `s3://bucket/prefix`, in UTF-8 order of their keys.

        The prefix is listed once per run, when the dataset is first measured or read, and once for all ranks of a job,
        which make their datasets in the same order; end it with a slash, or `train` also takes what is under
        `train-old`. `match` keeps the keys that fit a glob (in which `*` also spans `/`) or a predicate, `limit` the
        first so many of them. `label` is `"parent"`, the name of the folder that holds the object, or a callable of the
        key that returns a str, int or float.
        """
        bucket, prefix = parse_uri(s3_uri)
        check_choice(match, limit)
        uri = f"s3://{bucket}/{prefix}"
        return cls._of(common, uri, match=match, limit=limit, label=labeller(label))

    @classmethod
    def from_objects(
        cls,
        object_uris: str | Iterable[str],
        labels: Iterable[Label] | None = None,
        *,
        label: str | Labeller | None = None,
        refresh: bool = False,
        **common: Unpack[_Common],
    ) -> Self:
        """Make a dataset of these objects, in this order, without listing.

        `labels` gives one label for each. An object keeps the version in which it was first seen on this machine;
        `refresh` drops that record, so that the next read takes what the store has then.
        """
        return cls._of_table(Manifest.from_uris(object_uris, labels, label=label), refresh, common)

    @classmethod
    def from_manifest(cls, manifest: Manifest | str | os.PathLike[str], **common: Unpack[_Common]) -> Self:
        """Make a dataset of a table of objects, or of the file that one was saved to."""
        table = manifest if isinstance(manifest, Manifest) else Manifest.open(manifest)
        return cls._of(common, table.source, manifest=table)

    @classmethod
    def from_csv(
        cls,
        path: str | os.PathLike[str],
        *,
        root: str | None = None,
        key: str | int = "key",
        label: str | int | None = "label",
        refresh: bool = False,
        **common: Unpack[_Common],
    ) -> Self:
        """Make a dataset of the objects and labels in a CSV file.

        `key` and `label` are names in its first row, or numbers of columns, from 0, in a file without such a row;
        `label=None` means no labels. A key that is no `s3://` URI is looked for below `root`, such as
        `root="s3://bucket/images"`.
        Labels that all are whole numbers, or all numbers, are numbers; others are texts.
        """
        return cls._of_table(Manifest.from_csv(path, root=root, key=key, label=label), refresh, common)

    @classmethod
    def _of_table(cls, manifest: Manifest, refresh: bool, common: _Common) -> Self:
        dataset = cls._of(common, manifest.source, manifest=manifest)
        if refresh:
            dataset._parts[0].source.refresh()
        return dataset

    @classmethod
    def _of(cls, common: _Common, uri: str, **table: Any) -> Self:
        arguments: dict[str, Any] = dict(common)
        arguments.pop("reader_constructor", None)  # S3MapDataset's: objects are whole here, and need no advice
        known = [*_Common.__annotations__, *_OF_CONSTRUCTORS]
        for name in arguments.keys() & set(_OF_CONSTRUCTORS):
            raise ConfigurationError(f"{name}= is an argument of another constructor than this one")
        for name in arguments.keys() - _Common.__annotations__.keys():
            raise ConfigurationError(f"no argument or setting is called {name!r}{or_close_to(name, known)}")
        transform = arguments.pop("transform", None) or _identity
        target_transform = arguments.pop("target_transform", None)
        return cls([Part(Source(StoreRecipe.of(**arguments), uri, **table), transform, target_transform)])

    # reading

    def __len__(self) -> int:
        return len(self._manifest()) if self._rows is None else len(self._rows)

    def __getitem__(self, index: int) -> Any:
        (owner,), (row,) = self._owned(self._checked([index]))
        batch = PartBatch(self._parts[owner], np.array([row]))
        sample = batch.sample(0)
        batch.settle()
        return sample

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return one sample for each index, in their order. Negative indices count from the end."""
        owners, rows = self._owned(self._checked(indices))
        batches = {owner: PartBatch(self._parts[owner], rows[owners == owner]) for owner in np.unique(owners).tolist()}
        if isinstance(indices, Batch):
            self._look_ahead(indices)
        places = {owner: itertools.count() for owner in batches}
        wanted = [(batches[owner], next(places[owner])) for owner in owners.tolist()]
        threads = max(
            (part.source for part in self._parts), key=lambda source: source.settings.decode_threads
        ).threads()
        made = in_turn(wanted) if threads is None else side_by_side(wanted, threads)
        samples = []
        for index, owner, sample in zip(indices, owners.tolist(), made, strict=True):
            try:
                samples.append(sample())
            except Exception as error:
                samples += self._instead(operator.index(index) % len(self), self._parts[owner].source, error)
        for batch in batches.values():
            batch.settle()
        if not samples and len(indices):
            raise StoreError("none of the samples of a batch could be had: see the warnings, or dataset.failures()")
        return samples

    def _instead(self, index: int, source: Source, error: Exception) -> list[Any]:
        """What is returned in the place of a sample that failed; raises the error where that is asked for."""
        if source.settings.on_error == "raise" or isinstance(error, DatasetClosed | CacheError):
            raise error
        source.note_failure(error, self._info(index), len(self))
        if source.settings.on_error == "skip":
            source.counters.add(skipped=1)
            return []
        # Which one depends on the index alone: the same in every run, with any number of workers.
        for other in np.random.default_rng(index).integers(0, len(self), _SUBSTITUTES).tolist():
            if other == index:
                continue
            try:
                sample = self[other]
            except Exception as again:
                source.note_failure(again, self._info(other), len(self))
            else:
                source.counters.add(replaced=1)
                return [sample]
        raise error

    def _info(self, index: int) -> ObjectInfo:
        (owner,), rows = self._owned(self._checked([index]))
        found: list[ObjectInfo] = self._parts[owner].source.manifest.rows(rows)
        return found[0]

    def _look_ahead(self, batch: Batch) -> None:
        """Have the next batches brought, as far as this process has not heard of them."""
        for indices in self._horizon.extended(batch):
            try:
                owners, rows = self._owned(self._checked(indices))
            except IndexError:  # for the batch itself to tell
                continue
            for owner in np.unique(owners).tolist():
                source = self._parts[owner].source
                infos = source.manifest.rows(rows[owners == owner])
                source.prefetch(infos, batch.iteration, alone=batch.source is None)
                if batch.source is not None:
                    batch.source.at_end(source.forget)

    def _owned(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The part that each row belongs to, and its row there."""
        if len(self._parts) == 1:
            return np.zeros(len(rows), np.int64), rows
        starts = self._starts()
        owners = np.searchsorted(starts, rows, side="right") - 1
        return owners, rows - starts[owners]

    def _checked(self, indices: Sequence[int]) -> NDArray[np.int64]:
        """Rows of the table, for indices into this dataset."""
        size = len(self)
        numbers = [operator.index(index) for index in indices]
        for number in numbers:
            if not -size <= number < size:
                raise IndexError(f"index {number} of a dataset of {size}")
        places = np.array(numbers, np.int64)
        places[places < 0] += size
        return places if self._rows is None else self._rows[places]

    def _manifest(self) -> Manifest:
        return self._parts[0].source.manifest

    def _starts(self) -> NDArray[np.int64]:
        """The first row of each part, in the numbering that spans all of them."""
        sizes = [len(part.source.manifest) for part in self._parts]
        return np.cumsum([0, *sizes[:-1]])

    def _all_rows(self) -> NDArray[np.int64]:
        return np.arange(len(self), dtype=np.int64) if self._rows is None else self._rows

    # labels, as in torchvision

    @property
    def targets(self) -> list[int] | list[float]:
        """The label of every sample, before `target_transform`: a number, or the place of its text in `classes`."""
        columns = [self._labels(part) for part in self._parts]
        return np.concatenate(columns)[self._all_rows()].tolist()  # type: ignore[no-any-return]

    @property
    def classes(self) -> list[str]:
        """The names of the classes, sorted: the texts of the labels, or their numbers as texts."""
        return list(self.class_to_idx)

    @property
    def class_to_idx(self) -> dict[str, int]:
        """The label that stands for each class."""
        names = self._parts[0].source.manifest.classes
        if names is not None:
            return {name: place for place, name in enumerate(names)}
        columns = [self._labels(part) for part in self._parts]
        return {str(label): label for label in np.unique(np.concatenate(columns)).tolist()}

    @staticmethod
    def _labels(part: Part) -> NDArray[Any]:
        labels = part.source.manifest.labels
        if labels is None:
            raise AttributeError("this dataset has no labels: give label= or labels= when it is made")
        return labels

    # datasets made of this one; all of them share its connections, cache and counters

    def subset(self, indices: Sequence[int]) -> Self:
        """Return the dataset of these samples, in this order."""
        return type(self)(self._parts, self._checked(indices))

    def split(self, lengths: Sequence[int | float], generator: torch.Generator | None = None) -> list[Self]:
        """Split at random into datasets of these lengths, or shares that sum to 1, as `torch`'s `random_split` does."""
        halves = random_split(self, lengths, generator if generator is not None else torch.default_generator)
        return [self.subset(half.indices) for half in halves]

    def with_transform(
        self, transform: Callable[[S3Reader], Any], target_transform: Callable[[Any], Any] | None = None
    ) -> Self:
        """Return the same samples, transformed in another way; `target_transform` stays if it is None."""
        return type(self)(
            [
                replace(part, transform=transform, target_transform=target_transform or part.target_transform)
                for part in self._parts
            ],
            self._rows,
        )

    def __add__(self, other: Dataset[Any]) -> Any:
        """Return the samples of both, one after the other. Texts as labels must be numbered alike in both.

        The sum with a dataset of another kind is torch's `ConcatDataset`, which reads sample by sample.
        """
        if not isinstance(other, Dataset):
            raise ConfigurationError(f"a {type(other).__name__} cannot be added to a dataset: add another dataset")
        if not isinstance(other, CachedS3MapDataset):
            return super().__add__(other)
        ours, theirs = (d._manifest() for d in (self, other))
        if (ours.labels is None) != (theirs.labels is None):
            raise ConfigurationError("only one of the two datasets has labels: give labels to both, or to none")
        if ours.classes != theirs.classes:
            raise ConfigurationError(
                "the labels of the two datasets number different classes: give both integer labels"
            )
        offset = sum(len(part.source.manifest) for part in self._parts)
        rows = np.concatenate([self._all_rows(), other._all_rows() + offset])
        return type(self)(self._parts + other._parts, rows)

    # around training

    def warm(self, *, progress: bool = True, **choice: Unpack[Choice]) -> WarmReport:
        """Download everything that is not in the cache yet, and return what was found and done.

        Warms the whole of what the dataset was made from, also when called on a subset. Interrupted, it keeps what
        arrived, and goes on from there when called again. Objects that cannot be had are named in `failures`.

        Less than the whole is chosen by `match` and `exclude`, globs of keys, one or several, in which `*` also spans
        `/`; by `limit`, a number of objects, a share of them such as `"10%"`, or bytes such as `"5GB"`, in the order
        `"listing"`, `"smallest"` or `"shuffle"` (by `seed`); and by `partition`, where several processes of a node warm
        one cache: `"i/n"`, or `"auto"` under torchrun, Slurm and Open MPI. A sum of datasets is chosen from one by one.
        """
        selection = Selection.of(**choice)
        reports = [source.warm(selection, progress=progress) for source in self._sources()]
        return WarmReport(
            sum(r.objects for r in reports),
            sum(r.resident for r in reports),
            sum(r.fetched for r in reports),
            sum(r.shared for r in reports),
            sum(r.bytes for r in reports),
            sum(r.uncached for r in reports),
            tuple(failure for r in reports for failure in r.failures),
            sum(r.seconds for r in reports),
        )

    def loader(self, batch_size: int | None = 1, shuffle: bool | None = None, **options: Any) -> DataLoader[Any]:
        """Return `asyncds.loader(self, batch_size, shuffle, ...)`: a `DataLoader` that reads ahead."""
        return loader(self, batch_size, shuffle, **options)  # type: ignore[no-any-return]

    @property
    def skips(self) -> bool:  # type: ignore[override]
        """Whether `on_error="skip"` may make batches shorter."""
        return any(source.settings.on_error == "skip" for source in self._sources())

    @property
    def digest(self) -> str:
        """A hash of the objects, their versions, labels and order."""
        state = blake2b(digest_size=16)
        for part in self._parts:
            state.update(part.source.manifest.digest_of_rows.encode())
        if self._rows is not None:
            state.update(self._rows.tobytes())
        return state.hexdigest()

    def stats(self) -> dict[str, float]:
        """Return counters since the dataset was made, summed over this process and all of its workers.

        Datasets made of one another (`subset`, `split`, `with_transform`) have them in common.

        Counts are ints, and names that end in `_s` seconds, summed over processes: `samples`, `hits` and `misses`
        (samples found in the cache, or waited for), `prefetch_hits` (those that were brought before they were asked
        for), `gets` and `bytes` (objects that arrived), `retries`, `failures`, `replaced` and `skipped` (see
        `on_error`), `uncached` (objects that the cache did not take), `blocked_s` (waiting for bytes), `transform_s`;
        `latency_p50_s`, `latency_p90_s`, `latency_p99_s` of successful requests, to within a tenth; and, of the
        listing, `markers` and `filtered`: keys that were left out.
        """
        totals = [source.stats() for source in self._sources()]
        sums = {
            name: math.fsum(t[name] for t in totals) if name.endswith("_s") else sum(t[name] for t in totals)
            for name in totals[0]
        }
        return sums | percentiles([source.latencies() for source in self._sources()])

    def failures(self) -> list[str]:
        """One line for each object whose failure `on_error` has let pass: which, and what was wrong; of all workers."""
        return [line for source in self._sources() for line in source.failures()]

    def close(self) -> None:
        """Close connections and cancel what is under way; this dataset and those made of it then raise `DatasetClosed`.

        Workers that are running have connections of their own and are not affected.
        """
        with contextlib.ExitStack() as sources:  # all of them, also where one is interrupted
            for source in self._sources():
                sources.callback(source.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def manifest(self) -> Manifest:
        """The table of objects that this dataset was made from: `dataset.manifest.save("train.manifest")`."""
        if len(self._parts) > 1:
            raise ConfigurationError("a sum of datasets has no manifest of its own")
        return self._manifest()

    @property
    def region(self) -> str | None:
        """The region that was asked for, if any."""
        recipe = self._parts[0].source.recipe
        return recipe.region or recipe.settings.region

    @property
    def endpoint(self) -> str | None:
        """The endpoint's URL; None for AWS."""
        return self._parts[0].source.recipe.url

    def _sources(self) -> list[Source]:
        return list({id(part.source): part.source for part in self._parts}.values())

    def __repr__(self) -> str:
        sources = " + ".join(dict.fromkeys(source.tag for source in self._sources()))
        listed = all(source.listed for source in self._sources())
        samples = f"{len(self):,} samples" if self._rows is not None or listed else "not listed yet"
        stats = self.stats()
        return f"<{type(self).__name__} {sources}: {samples}, {stats['hits']:,} hits, {stats['gets']:,} GETs>"
