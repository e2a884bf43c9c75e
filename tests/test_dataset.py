"""The dataset in one process: constructors, labels, sums and parts of datasets, the batch path, and what is counted."""

import asyncio
import contextlib
import csv
import errno
import hashlib
import itertools
import operator
import os
import random
import signal
import threading
import tracemalloc
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    random_split,
)

from asyncds import CachedS3MapDataset, Manifest, ObjectInfo, ObjectStore, S3Reader, Settings
from asyncds.errors import (
    AccessDenied,
    CacheError,
    ConfigurationError,
    DatasetClosed,
    EmptyDataset,
    ObjectChanged,
    ObjectNotFound,
    TransferFailed,
)
from asyncds.manifest import ManifestBuilder
from asyncds.testing import FakeStore, Fault, S3Server

PREFIX = "s3://mnist/train/"
KEYS = [f"train/{label}/{number}.bin" for label in ("cat", "dog", "owl") for number in range(4)]
LATENCY_S = 0.2


def body(key: str) -> bytes:
    return hashlib.shake_128(key.encode()).digest(20)


def key_of(object: S3Reader) -> str:
    return object.key


def uris(keys: list[str] = KEYS) -> list[str]:
    return [f"s3://mnist/{key}" for key in keys]


@pytest.fixture
def bucket(s3) -> S3Server:
    s3.put_many("mnist", {key: body(key) for key in KEYS})
    return s3


@pytest.fixture
def store() -> FakeStore:
    """A store in memory, for what does not depend on how objects travel."""
    return FakeStore({("mnist", key): body(key) for key in KEYS})


@pytest.fixture
def dataset(store):
    with CachedS3MapDataset.from_prefix(PREFIX, store=store, transform=key_of) as dataset:
        yield dataset


# from_prefix


def test_sample_is_the_object_in_the_order_of_keys(bucket):
    with CachedS3MapDataset.from_prefix(PREFIX) as dataset:
        objects = list(dataset)
    assert [object.key for object in objects] == KEYS
    assert [object.read() for object in objects] == [body(key) for key in KEYS]
    assert {object.bucket for object in objects} == {"mnist"}
    assert [object.size for object in objects] == [20] * len(KEYS)
    assert [object.etag for object in objects] == [hashlib.md5(body(key)).hexdigest() for key in KEYS]


@pytest.mark.parametrize("uri", ["s3://mnist", "s3://mnist/", "s3://mnist/tr", "s3://mnist/train"])
def test_prefix_is_a_prefix_of_keys_and_no_folder(store, uri):
    with CachedS3MapDataset.from_prefix(uri, store=store) as dataset:
        assert len(dataset) == len(KEYS)


def test_nothing_is_asked_before_the_first_length_or_index(bucket):
    with CachedS3MapDataset.from_prefix(PREFIX) as dataset:
        repr(dataset), dataset.stats(), dataset.endpoint, dataset.region
        assert bucket.stats.total == 0
        len(dataset)
        assert bucket.stats.requests == {"LIST": 1}
    with CachedS3MapDataset.from_prefix(PREFIX) as dataset:
        dataset[0]
        assert bucket.stats.requests == {"LIST": 2, "GET": 1}
    with CachedS3MapDataset.from_prefix(PREFIX):
        pass
    assert bucket.stats.total == 3


def test_match_keeps_keys_that_fit_a_glob_or_a_predicate(store):
    store.objects["mnist", "train/cat/notes.txt"] = b"text"
    for match in ("*.bin", lambda key: key.endswith(".bin")):
        with CachedS3MapDataset.from_prefix(PREFIX, store=store, match=match, transform=key_of) as dataset:
            assert list(dataset) == KEYS
            assert dataset.stats()["filtered"] == 1


def test_limit_is_of_the_keys_that_fit(store):
    with CachedS3MapDataset.from_prefix(PREFIX, store=store, match="*/dog/*", limit=3, transform=key_of) as dataset:
        assert list(dataset) == KEYS[4:7]
    with CachedS3MapDataset.from_prefix(PREFIX, store=store, limit=1000) as dataset:
        assert len(dataset) == len(KEYS)


def test_limit_ends_the_listing_early(s3):
    s3.put_many("mnist", {f"{number:04}": b"" for number in range(2500)})
    with CachedS3MapDataset.from_prefix("s3://mnist", limit=1200) as dataset:
        assert len(dataset) == 1200
    assert s3.stats.requests == {"LIST": 2}


def test_listing_of_several_pages_is_complete(s3):
    s3.put_many("mnist", {f"{number:04}": b"" for number in range(2500)})
    with CachedS3MapDataset.from_prefix("s3://mnist", transform=key_of) as dataset:
        assert (len(dataset), dataset[2499]) == (2500, "2499")
    assert s3.stats.requests["GET"] == 1
    assert 3 <= s3.stats.requests["LIST"] <= 6  # pages, a look for folders, and a range for each full page at most


def test_markers_of_folders_are_no_samples_and_are_counted(store):
    store.objects |= {("mnist", "train/"): b"", ("mnist", "train/cat/"): b""}
    with CachedS3MapDataset.from_prefix(PREFIX, store=store, transform=key_of) as dataset:
        assert list(dataset) == KEYS
        assert dataset.stats()["markers"] == 2


def test_empty_object_is_a_sample(s3):
    s3.put("mnist", "empty", b"")
    with CachedS3MapDataset.from_prefix("s3://mnist/", transform=S3Reader.read) as dataset:
        assert [dataset[0], dataset[0]] == [b"", b""]
    assert s3.stats.requests["GET"] == 1


@pytest.mark.parametrize("options", [{}, {"match": "*/dog/*"}, {"limit": 5}])
def test_saved_listing_is_used_while_it_is_young_enough(store, options):
    with CachedS3MapDataset.from_prefix(PREFIX, store=store) as dataset:
        len(dataset)
    store.objects["mnist", "train/dog/new.bin"] = b"new"
    with CachedS3MapDataset.from_prefix(
        PREFIX, store=store, manifest_max_age=1000, transform=key_of, **options
    ) as dataset:
        assert "train/dog/new.bin" not in list(dataset)
    assert store.calls["list"] == 1
    with CachedS3MapDataset.from_prefix(PREFIX, store=store, transform=key_of) as dataset:
        assert "train/dog/new.bin" in list(dataset)


# indices


def test_negative_index_counts_from_the_end(dataset):
    assert [dataset[-1], dataset[-len(KEYS)]] == [KEYS[-1], KEYS[0]]
    assert dataset.__getitems__([-1, 0]) == [KEYS[-1], KEYS[0]]


@pytest.mark.parametrize("index", [len(KEYS), -len(KEYS) - 1])
def test_index_outside_says_how_long_the_dataset_is(dataset, index):
    with pytest.raises(IndexError, match=f"{index} of a dataset of {len(KEYS)}"):
        dataset[index]


def test_iteration_ends_after_the_last_sample(dataset):
    assert [key for key in dataset] == KEYS  # noqa: C416 - a loop, not list(), which asks for the length
    assert len(list(enumerate(dataset))) == len(KEYS)


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8, torch.tensor])
def test_index_may_be_any_whole_number(dataset, kind):
    assert dataset[kind(3)] == KEYS[3]
    assert dataset.__getitems__([kind(3), kind(0)]) == [KEYS[3], KEYS[0]]


@pytest.mark.parametrize("index", [1.0, "1", None, slice(2)])
def test_index_that_is_no_whole_number_is_a_type_error(dataset, index):
    with pytest.raises(TypeError):
        dataset[index]


def test_empty_batch_is_empty(dataset):
    assert dataset.__getitems__([]) == []
    assert (dataset + dataset).__getitems__([]) == []


# from_objects


@pytest.mark.parametrize("make", [list, tuple, iter, lambda keys: (key for key in keys)])
def test_objects_come_in_the_order_that_was_given_without_listing(store, make):
    keys = [KEYS[5], KEYS[0], KEYS[5]]
    with CachedS3MapDataset.from_objects(make(uris(keys)), store=store, transform=key_of) as dataset:
        assert len(dataset) == 3
        assert (store.calls, store.gets) == ({}, {})
        assert list(dataset) == keys
    assert (store.calls, store.gets.total()) == ({}, 2)


def test_objects_may_be_one_uri(store):
    with CachedS3MapDataset.from_objects(uris()[3], store=store, transform=key_of) as dataset:
        assert list(dataset) == [KEYS[3]]


def test_objects_of_several_buckets_are_told_apart(store):
    store.objects["other", KEYS[0]] = b"of the other bucket"
    names = [f"s3://mnist/{KEYS[0]}", f"s3://other/{KEYS[0]}"]
    with CachedS3MapDataset.from_objects(names, store=store, transform=S3Reader.read) as dataset:
        assert list(dataset) == [body(KEYS[0]), b"of the other bucket"]


def test_objects_keep_the_version_that_was_seen_first_until_refreshed(bucket):
    def read(**options) -> bytes:
        with CachedS3MapDataset.from_objects(uris()[:1], transform=S3Reader.read, **options) as dataset:
            return dataset[0]

    assert read() == body(KEYS[0])
    bucket.put("mnist", KEYS[0], b"another version")
    assert read() == body(KEYS[0])
    assert bucket.stats.requests == {"GET": 1}
    assert read(refresh=True) == b"another version"
    assert read() == b"another version"
    assert bucket.stats.requests == {"GET": 2}


def test_object_that_changed_and_is_not_cached_says_how_to_refresh(bucket):
    options = {"cache_size": "1B", "transform": S3Reader.read}  # remembers the version, and has no room for the bytes
    with CachedS3MapDataset.from_objects(uris()[:1], **options) as dataset:
        assert dataset[0] == body(KEYS[0])
        bucket.put("mnist", KEYS[0], b"another version")
        with pytest.raises(ObjectChanged, match=rf"s3://mnist/{KEYS[0]}.*refresh=True"):
            dataset[0]
    with CachedS3MapDataset.from_objects(uris()[:1], refresh=True, **options) as dataset:
        assert dataset[0] == b"another version"


# from_manifest, from_csv


def test_manifest_gives_the_same_dataset_without_listing(store, tmp_path):
    with CachedS3MapDataset.from_prefix(PREFIX, store=store, label="parent") as dataset:
        path = dataset.manifest.save(tmp_path / "train.manifest")
        digest = dataset.manifest.digest
    for manifest in (path, str(path), Manifest.open(path)):
        with CachedS3MapDataset.from_manifest(manifest, store=store, transform=key_of) as dataset:
            assert list(dataset) == [(key, number // 4) for number, key in enumerate(KEYS)]
            assert (dataset.classes, dataset.manifest.digest) == (["cat", "dog", "owl"], digest)
    assert (store.calls["list"], store.gets.total()) == (1, len(KEYS))


def table(path: Path, *rows: tuple[object, ...]) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.mark.parametrize(
    ("rows", "options", "labels", "classes"),
    [
        ([("key", "label"), *zip(uris(), itertools.count())], {}, [0, 1], [str(n) for n in range(12)]),
        ([("key", "label"), *zip(KEYS, "abcabcabcabc", strict=True)], {"root": "s3://mnist/"}, [0, 1], ["a", "b", "c"]),
        ([("key", "label"), *zip(KEYS, "abcabcabcabc", strict=True)], {"root": "s3://mnist"}, [0, 1], ["a", "b", "c"]),
        ([*zip("abcabcabcabc", uris(), strict=True)], {"key": 1, "label": 0}, [0, 1], ["a", "b", "c"]),
        ([("x", "y"), *zip(uris(), np.arange(12) / 2, strict=True)], {"key": "x", "label": "y"}, [0.0, 0.5], None),
        ([("label", "key"), *zip("abcabcabcabc", uris(), strict=True)], {"label": None}, None, None),
    ],
)
def test_csv_names_objects_and_labels(store, tmp_path, rows, options, labels, classes):
    path = table(tmp_path / "table.csv", *rows)
    with CachedS3MapDataset.from_csv(path, store=store, transform=key_of, **options) as dataset:
        assert len(dataset) == len(KEYS)
        assert dataset.__getitems__([0, 1]) == (KEYS[:2] if labels is None else [*zip(KEYS[:2], labels, strict=True)])
        if classes is not None:
            assert sorted(dataset.classes) == sorted(classes)


def test_reader_constructor_of_the_s3_connector_changes_nothing(store):
    with CachedS3MapDataset.from_prefix(PREFIX, store=store, transform=key_of, reader_constructor=object()) as dataset:
        assert list(dataset) == KEYS


def test_csv_may_begin_with_a_byte_order_mark_and_hold_commas(s3, tmp_path):
    s3.put("mnist", "a, b", b"bytes")
    path = tmp_path / "table.csv"
    path.write_bytes('\ufeffkey,label\r\n"s3://mnist/a, b",x\r\n\r\n'.encode())
    with CachedS3MapDataset.from_csv(path, transform=S3Reader.read) as dataset:
        assert list(dataset) == [(b"bytes", 0)]


def test_csv_can_be_refreshed(store, tmp_path):
    path = table(tmp_path / "table.csv", ("key",), (uris()[0],))
    for content, refresh in ((body(KEYS[0]), False), (body(KEYS[0]), False), (b"another version", True)):
        with CachedS3MapDataset.from_csv(
            path, store=store, label=None, refresh=refresh, transform=S3Reader.read
        ) as dataset:
            assert dataset[0] == content
        store.objects["mnist", KEYS[0]] = b"another version"


# labels


def test_label_parent_is_what_image_folder_gives(store, tmp_path):
    from torchvision.datasets import DatasetFolder

    for key in KEYS:
        path = tmp_path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body(key))
    folder = DatasetFolder(str(tmp_path / "train"), loader=lambda path: Path(path).read_bytes(), extensions=(".bin",))
    with CachedS3MapDataset.from_prefix(PREFIX, store=store, label="parent", transform=S3Reader.read) as dataset:
        assert list(dataset) == [folder[number] for number in range(len(folder))]
        assert dataset.targets == folder.targets
        assert dataset.classes == folder.classes
        assert dataset.class_to_idx == folder.class_to_idx


@pytest.mark.parametrize(
    ("label", "targets", "classes"),
    [
        (lambda key: key.split("/")[1].upper(), [0] * 4 + [1] * 4 + [2] * 4, {"CAT": 0, "DOG": 1, "OWL": 2}),
        (lambda key: 7 - int(key[-5]), [7, 6, 5, 4] * 3, {"4": 4, "5": 5, "6": 6, "7": 7}),
        (lambda key: int(key[-5]) / 2, [0.0, 0.5, 1.0, 1.5] * 3, {"0.0": 0.0, "0.5": 0.5, "1.0": 1.0, "1.5": 1.5}),
    ],
)
def test_label_may_be_a_callable_of_the_key(store, label, targets, classes):
    with CachedS3MapDataset.from_prefix(PREFIX, store=store, label=label, transform=key_of) as dataset:
        assert list(dataset) == [*zip(KEYS, targets, strict=True)]
        assert dataset.targets == targets
        assert {type(target) for target in dataset.targets} == {type(targets[0])}
        assert dataset.class_to_idx == classes
        assert dataset.classes == [*classes]


@pytest.mark.parametrize(
    "labels", [list("ab" * 6), [*range(12)], [n / 4 for n in range(12)], np.arange(12), np.array(list("ab" * 6))]
)
def test_labels_go_with_their_objects(store, labels):
    with CachedS3MapDataset.from_objects(uris(), store=store, labels=labels, transform=key_of) as dataset:
        names = dict(zip(dataset.class_to_idx.values(), dataset.class_to_idx, strict=True))
        assert [(key, names[target]) for key, target in dataset] == [*zip(KEYS, map(str, labels), strict=True)]


def test_target_transform_sees_the_label_and_targets_do_not_change(store):
    options = {"label": "parent", "transform": key_of, "target_transform": lambda label: label * 10}
    with CachedS3MapDataset.from_prefix(PREFIX, store=store, **options) as dataset:
        assert [label for _, label in dataset] == [0] * 4 + [10] * 4 + [20] * 4
        assert dataset.targets == [0] * 4 + [1] * 4 + [2] * 4


def test_dataset_without_labels_says_how_to_give_them(dataset):
    for name in ("targets", "classes", "class_to_idx"):
        with pytest.raises(AttributeError, match="label="):
            getattr(dataset, name)


# datasets made of datasets


def test_subset_of_a_subset_counts_from_its_own_start(dataset):
    outer = dataset.subset([9, 8, 7, 6])
    inner = outer.subset([-1, 0, 0])
    assert (list(outer), list(inner)) == ([KEYS[n] for n in (9, 8, 7, 6)], [KEYS[6], KEYS[9], KEYS[9]])
    assert (len(inner), inner[-3]) == (3, KEYS[6])
    with pytest.raises(IndexError, match="3 of a dataset of 3"):
        inner[3]
    with pytest.raises(IndexError, match="4 of a dataset of 4"):
        outer.subset([4])


@pytest.mark.parametrize("indices", [range(2, 5), np.array([2, 3, 4]), torch.tensor([2, 3, 4])])
def test_subset_takes_any_sequence_of_indices(dataset, indices):
    assert list(dataset.subset(indices)) == KEYS[2:5]


def test_targets_of_a_subset_are_its_own_and_classes_are_those_of_all(store):
    with CachedS3MapDataset.from_prefix(PREFIX, store=store, label="parent") as dataset:
        part = dataset.subset([11, 0])
        assert (part.targets, part.classes) == ([2, 0], ["cat", "dog", "owl"])


@pytest.mark.parametrize("lengths", [[7, 5], [0.5, 0.5], [0.7, 0.2, 0.1], [12, 0]])
def test_split_is_that_of_torch_with_the_same_generator(dataset, lengths):
    ours = dataset.split(lengths, torch.Generator().manual_seed(3))
    theirs = random_split(range(len(KEYS)), lengths, torch.Generator().manual_seed(3))
    assert [list(part) for part in ours] == [[KEYS[n] for n in part] for part in theirs]
    torch.manual_seed(3)
    ours = dataset.split(lengths)
    assert [len(part) for part in ours] == [len(part) for part in theirs]
    assert sorted(itertools.chain(*ours)) == KEYS


def test_with_transform_gives_the_same_samples_transformed_anew(store):
    first = CachedS3MapDataset.from_prefix(PREFIX, store=store, label="parent", transform=key_of, target_transform=str)
    with first:
        second = first.subset([5]).with_transform(S3Reader.read)
        third = second.with_transform(lambda object: object.size, lambda label: -label)
        assert (first[5], second[0], third[0]) == ((KEYS[5], "1"), (body(KEYS[5]), "1"), (20, -1))
        assert store.gets.total() == 1


def test_sum_holds_the_samples_of_both_and_each_is_transformed_its_own_way(store):
    store.objects |= {("mnist", "test/x"): b"x", ("mnist", "test/y"): b"y"}
    with (
        CachedS3MapDataset.from_prefix(PREFIX, store=store, transform=key_of) as first,
        CachedS3MapDataset.from_prefix("s3://mnist/test/", store=store, transform=S3Reader.read) as second,
    ):
        both = first.subset([3, 1]) + second
        assert list(both) == [KEYS[3], KEYS[1], b"x", b"y"]
        assert (len(both), both[-1]) == (4, b"y")
        assert list(both.subset([3, 0])) == [b"y", KEYS[3]]
        assert list(second + both + second) == [b"x", b"y", KEYS[3], KEYS[1], b"x", b"y", b"x", b"y"]
    assert (store.calls["list"], store.gets.total()) == (2, 4)


def test_sum_of_a_dataset_with_itself_downloads_once(dataset, store):
    twice = dataset + dataset.with_transform(lambda object: object.size)
    assert twice.__getitems__([0, 12, 1, 13, 0]) == [KEYS[0], 20, KEYS[1], 20, KEYS[0]]
    assert list(dataset + dataset) == KEYS * 2
    assert store.gets.total() == len(KEYS)


def test_transforms_of_a_batch_run_in_its_order_also_in_a_sum(bucket):
    seen = []
    bucket.put_many("mnist", {f"test/{number}": bytes([number]) for number in range(4)})
    # Whatever comes first, comes late: the order of transforms is that of the batch, not that of arrival.
    bucket.script("mnist", KEYS[7], [Fault.delay(LATENCY_S)])
    with (
        CachedS3MapDataset.from_prefix(PREFIX, transform=lambda object: seen.append(object.key)) as first,
        CachedS3MapDataset.from_prefix("s3://mnist/test/", transform=lambda object: seen.append(object.key)) as second,
    ):
        (first + second).__getitems__([7, 12, 3, 14, 13, 0, 7])
    assert seen == [KEYS[7], "test/0", KEYS[3], "test/2", "test/1", KEYS[0], KEYS[7]]


def test_targets_of_a_sum_are_those_of_its_parts(store):
    with CachedS3MapDataset.from_prefix(PREFIX, store=store, label="parent") as dataset:
        both = dataset.subset([11, 0]) + dataset
        assert both.targets == [2, 0, *dataset.targets]
        assert both.classes == ["cat", "dog", "owl"]
        assert both.class_to_idx == dataset.class_to_idx


def test_sum_of_different_classes_is_refused(store):
    with CachedS3MapDataset.from_prefix(PREFIX, store=store, label="parent") as all_classes:
        fewer = CachedS3MapDataset.from_prefix(PREFIX, store=store, label="parent", match="*/dog/*")
        with fewer, pytest.raises(ConfigurationError, match="classes"):
            all_classes + fewer


def test_sum_with_another_kind_of_dataset_is_torchs(dataset):
    with pytest.raises(ConfigurationError, match="list cannot be added"):
        operator.add(dataset, ["x"])
    both = dataset + TensorDataset(torch.zeros(2))
    assert isinstance(both, ConcatDataset)
    assert (len(both), both[0]) == (len(KEYS) + 2, KEYS[0])


def test_sum_of_labelled_and_unlabelled_samples_is_refused(dataset, store):
    labelled = CachedS3MapDataset.from_objects(["s3://mnist/a"], [1], store=store)
    with labelled, pytest.raises(ConfigurationError, match="only one of the two"):
        operator.add(dataset, labelled)


# the batch path


@pytest.mark.parametrize(
    "wrap",
    [
        lambda dataset: dataset,
        lambda dataset: Subset(dataset, range(len(dataset))),
        lambda dataset: Subset(Subset(dataset, range(len(dataset))), range(len(dataset))),
        lambda dataset: random_split(dataset, [1.0])[0],
        lambda dataset: dataset.subset(range(len(dataset))),
        lambda dataset: dataset.split([1.0])[0],
        lambda dataset: dataset + dataset,
    ],
)
def test_batch_is_requested_together(bucket, wrap):
    bucket.latency = LATENCY_S
    with CachedS3MapDataset.from_prefix(PREFIX, transform=key_of) as dataset:
        (batch,) = DataLoader(wrap(dataset), batch_size=len(KEYS) * 2)
    assert set(batch) == set(KEYS)
    # The first request of a bucket goes ahead of the others, until it is prepared.
    assert bucket.stats.max_in_flight >= len(KEYS) - 1
    assert bucket.stats.requests == {"LIST": 1, "GET": len(KEYS)}


@pytest.mark.parametrize("concurrency", [7, 64, 400])
def test_batch_of_200_is_in_flight_up_to_the_concurrency(s3_process, concurrency):
    s3_process.put_many("mnist", {f"{number:03}": bytes(100) for number in range(200)})
    s3_process.latency = LATENCY_S if concurrency > 7 else LATENCY_S / 10
    with CachedS3MapDataset.from_prefix("s3://mnist/", concurrency=concurrency, transform=key_of) as dataset:
        assert dataset.__getitems__(range(200)) == [f"{number:03}" for number in range(200)]
    stats = s3_process.stats
    assert stats.requests == {"LIST": 1, "GET": 200}
    assert stats.max_in_flight <= concurrency
    assert stats.max_in_flight >= min(concurrency, 199)


def test_sum_of_two_prefixes_keeps_within_the_concurrency_of_one(bucket):
    bucket.put_many("mnist", {f"test/{number:02}": b"" for number in range(12)})
    bucket.latency = LATENCY_S / 4
    with (
        CachedS3MapDataset.from_prefix(PREFIX, concurrency=4, transform=key_of) as first,
        CachedS3MapDataset.from_prefix("s3://mnist/test/", concurrency=4, transform=key_of) as second,
    ):
        assert (first + second).__getitems__(range(24))[::12] == [KEYS[0], "test/00"]
    assert bucket.stats.max_in_flight <= 4


def test_duplicates_in_a_batch_are_fetched_once_and_transformed_each(store):
    drawn = itertools.count()
    with CachedS3MapDataset.from_prefix(
        PREFIX, store=store, transform=lambda object: (object.key, next(drawn))
    ) as dataset:
        assert dataset.__getitems__([2, 2, 0, 2]) == [(KEYS[2], 0), (KEYS[2], 1), (KEYS[0], 2), (KEYS[2], 3)]
        assert dataset.stats()["samples"] == 4
    assert store.gets == {KEYS[2]: 1, KEYS[0]: 1}


def test_readers_of_a_duplicate_do_not_share_a_position(store):
    with CachedS3MapDataset.from_prefix(PREFIX, store=store, transform=S3Reader.read) as dataset:
        assert dataset.__getitems__([1, 1]) == [body(KEYS[1])] * 2
        assert dataset.__getitems__([1, 1]) == [body(KEYS[1])] * 2


def test_samples_are_transformed_while_later_ones_are_under_way(bucket):
    arrived = threading.Event()

    def transform(object: S3Reader) -> str:
        if object.key == KEYS[0]:
            bucket.clear_scripts()
            arrived.set()
        return object.key

    bucket.script("mnist", KEYS[1], [Fault.status(503, "SlowDown")], forever=True)
    with CachedS3MapDataset.from_prefix(PREFIX, transform=transform) as dataset:
        assert dataset.__getitems__([0, 1]) == KEYS[:2], "the second comes only once the first is transformed"
    assert arrived.is_set()


def test_transient_errors_are_retried_and_counted(bucket):
    bucket.script("mnist", None, [Fault.status(503, "SlowDown"), Fault.status(500, "InternalError")])
    with CachedS3MapDataset.from_prefix(PREFIX, transform=S3Reader.read) as dataset:
        assert dataset.__getitems__(range(12)) == [body(key) for key in KEYS]
        stats = dataset.stats()
    assert (stats["retries"], stats["gets"], stats["failures"]) == (24, 12, 0)


@pytest.mark.parametrize("fault", [Fault.reset(7), Fault.close(7), Fault.truncated(7), Fault.reset(None)])
def test_broken_transfer_is_repeated_and_never_seen(bucket, fault):
    bucket.script("mnist", None, [fault])
    with CachedS3MapDataset.from_prefix(PREFIX, transform=S3Reader.read) as dataset:
        assert dataset.__getitems__(range(12)) == [body(key) for key in KEYS]
    assert bucket.stats.requests["GET"] == 2 * len(KEYS), "each fault costs one more: of ours, or of aiohttp's"


def test_failed_object_is_asked_for_again_by_the_next_batch(bucket):
    bucket.script("mnist", KEYS[1], [Fault.status(403, "AccessDenied")] * 2)
    with CachedS3MapDataset.from_prefix(PREFIX, transform=key_of) as dataset:
        with pytest.raises(AccessDenied, match=KEYS[1]):
            dataset.__getitems__([0, 1, 2])
        bucket.clear_scripts()
        assert dataset.__getitems__([0, 1, 2]) == KEYS[:3]
        assert dataset.stats()["failures"] == 1


# with torch's loader and samplers


def test_loader_without_batches_gives_single_samples(dataset, store):
    assert list(DataLoader(dataset, batch_size=None)) == KEYS
    assert (store.calls["list"], store.gets.total()) == (1, len(KEYS))


def test_distributed_samplers_share_the_dataset_out(dataset):
    parts = []
    for rank in range(3):
        sampler = DistributedSampler(dataset, num_replicas=3, rank=rank, shuffle=True, seed=5)
        parts.append([key for batch in DataLoader(dataset, batch_size=2, sampler=sampler) for key in batch])
    assert [len(part) for part in parts] == [4, 4, 4]
    assert sorted(itertools.chain(*parts)) == KEYS


def test_weighted_sampler_repeats_samples_and_requests_none_twice(dataset, store):
    sampler = WeightedRandomSampler([1.0, 5.0] + [0.0] * 10, 60, generator=torch.Generator().manual_seed(1))
    batches = list(DataLoader(dataset, batch_size=8, sampler=sampler))
    assert Counter(itertools.chain(*batches)).keys() == set(KEYS[:2])
    assert store.gets.total() == 2


def test_labels_and_arrays_go_through_the_default_collation(store):
    options = {"label": "parent", "transform": lambda object: torch.tensor([*object.read()])}
    with CachedS3MapDataset.from_prefix(PREFIX, store=store, **options) as dataset:
        (batch,) = DataLoader(dataset, batch_size=12)
        images, labels = batch
    assert torch.equal(images, default_collate([torch.tensor([*body(key)]) for key in KEYS]))
    assert torch.equal(labels, torch.tensor([0] * 4 + [1] * 4 + [2] * 4))


def test_two_iterations_at_once_do_not_disturb_each_other(dataset, store):
    assert list(zip(dataset, DataLoader(dataset, batch_size=None), strict=True)) == [*zip(KEYS, KEYS, strict=True)]
    assert store.gets.total() == len(KEYS)


def test_threads_that_want_the_same_batch_download_it_once(bucket):
    bucket.latency = 0.05
    start = threading.Barrier(4)

    def read(_: int) -> list[str]:
        start.wait()
        return dataset.__getitems__(range(12))

    with CachedS3MapDataset.from_prefix(PREFIX, transform=key_of) as dataset, ThreadPoolExecutor(4) as pool:
        len(dataset)
        assert [*pool.map(read, range(4))] == [KEYS] * 4
    assert bucket.stats.requests["GET"] == len(KEYS)


def test_random_transforms_draw_as_they_would_without_asyncds(bucket):
    def noisy(object: S3Reader) -> tuple[bytes, float, float]:
        return object.read(), random.random(), torch.rand(1).item()

    def seed() -> None:
        random.seed(11)
        torch.manual_seed(11)

    bucket.script("mnist", KEYS[3], [Fault.status(503, "SlowDown")] * 2)
    order = torch.randperm(12).tolist()
    seed()
    expected = [noisy(S3Reader("mnist", KEYS[n], body(KEYS[n]))) for n in order]
    with CachedS3MapDataset.from_prefix(PREFIX, transform=noisy) as dataset:
        len(dataset)
        for _ in ("cold", "warm"):
            seed()
            assert dataset.__getitems__(order) == expected


# close


def test_closed_dataset_raises_and_says_so(store):
    dataset = CachedS3MapDataset.from_prefix(PREFIX, store=store)
    part, whole = dataset.subset([0]), dataset + dataset
    dataset[0]
    dataset.close()
    dataset.close()
    for closed in (dataset, part, whole):
        with pytest.raises(DatasetClosed, match="closed"):
            closed[0]
    with pytest.raises(DatasetClosed, match="closed"):
        dataset.warm(progress=False)
    assert dataset.stats()["samples"] == 1, "what was counted stays"
    assert "12 samples" in repr(dataset)


def test_dataset_closed_before_it_was_listed_raises_and_asks_nothing(store):
    with CachedS3MapDataset.from_prefix(PREFIX, store=store) as dataset:
        pass
    for use in (len, lambda dataset: dataset[0], list):
        with pytest.raises(DatasetClosed, match="closed"):
            use(dataset)
    assert "not listed" in repr(dataset)
    assert (store.calls, store.gets) == ({}, {})


def test_closing_ends_a_listing_that_is_under_way(bucket):
    bucket.script("mnist", None, [Fault.stall()], operation="LIST", forever=True)
    dataset = CachedS3MapDataset.from_prefix(PREFIX)
    with ThreadPoolExecutor() as pool:
        length = pool.submit(len, dataset)
        while bucket.stats.in_flight < 1:  # for as long as the test has time
            pass
        dataset.close()
        with pytest.raises(DatasetClosed):
            length.result(5)


def test_with_closes_also_when_the_block_raises(store):
    with pytest.raises(ZeroDivisionError), CachedS3MapDataset.from_prefix(PREFIX, store=store) as dataset:
        dataset[1 // 0]
    with pytest.raises(DatasetClosed):
        dataset[0]


def test_closing_one_dataset_leaves_another_of_the_same_prefix_open(store):
    with CachedS3MapDataset.from_prefix(PREFIX, store=store, transform=key_of) as first:
        with CachedS3MapDataset.from_prefix(PREFIX, store=store, transform=key_of) as second:
            assert (first[0], second[1]) == (KEYS[0], KEYS[1])
        assert first.__getitems__([1, 2]) == KEYS[1:3]


def test_run_leaves_only_the_cache_and_the_listing_behind(store):
    with CachedS3MapDataset.from_prefix(PREFIX, store=store) as dataset:
        dataset[0]
    folder = Settings().cache_dir / "asyncds"
    assert [*folder.glob("stats/*"), *folder.glob("manifests/run-*")] == []


# repr


def test_repr_is_short_and_tells_where_and_how_far_at_each_stage(bucket):
    dataset = CachedS3MapDataset.from_prefix(PREFIX, label="parent")
    with dataset:
        texts = [repr(dataset)]
        assert bucket.stats.total == 0
        dataset[0], dataset[0]
        texts += [repr(dataset), repr(dataset.subset([1, 2])), repr(dataset + dataset)]
    texts.append(repr(dataset))
    unlisted, read, part, total, closed = texts
    assert "not listed yet" in unlisted
    assert "12 samples" in read
    assert "1 hits, 1 GETs" in read
    assert "2 samples" in part
    assert "24 samples" in total
    assert "12 samples" in closed
    for text in texts:
        assert PREFIX in text
        assert bucket.endpoint in text
        assert len(text) < 200
        assert "\n" not in text


def test_repr_of_a_manifest_knows_its_length_without_listing(store):
    builder = ManifestBuilder()
    for key in KEYS:
        builder.add(ObjectInfo("mnist", key))
    manifest = builder.build(endpoint="", source="a table of mine")
    with CachedS3MapDataset.from_manifest(manifest, store=store) as dataset:
        assert "a table of mine" in repr(dataset)
        assert "12 samples" in repr(dataset)
    assert not store.calls
    assert not store.gets


# where the objects are


def test_region_and_endpoint_are_what_is_used(bucket, monkeypatch):
    with CachedS3MapDataset.from_prefix(PREFIX) as dataset:
        assert (dataset.region, dataset.endpoint) == ("us-east-1", bucket.endpoint)
    with CachedS3MapDataset.from_prefix(PREFIX, region="eu-west-3", endpoint="http://127.0.0.1:9/") as dataset:
        assert (dataset.region, dataset.endpoint) == ("eu-west-3", "http://127.0.0.1:9")
    for name in ("AWS_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    with CachedS3MapDataset.from_prefix(PREFIX) as dataset:
        assert (dataset.region, dataset.endpoint) == (None, None)


@dataclass
class ClientConfig:
    """As `s3torchconnector.S3ClientConfig` is, with its defaults."""

    throughput_target_gbps: float = 10.0
    part_size: int = 8 * 1024 * 1024
    unsigned: bool = False
    force_path_style: bool = False
    max_attempts: int = 10
    profile: str | None = None


def test_client_config_with_its_defaults_changes_nothing(bucket):
    with (
        CachedS3MapDataset.from_prefix(PREFIX, s3client_config=ClientConfig(), transform=key_of) as configured,
        CachedS3MapDataset.from_prefix(PREFIX) as plain,
    ):
        assert recipe(configured) == recipe(plain)
        assert list(configured) == KEYS


def recipe(dataset: CachedS3MapDataset):
    return dataset._parts[0].source.recipe


@pytest.mark.parametrize("how", [{"s3client_config": ClientConfig(unsigned=True)}, {"unsigned": True}])
def test_unsigned_requests_send_no_credentials(how):
    with S3Server(credentials=("the key", "the secret")) as server:
        server.put("mnist", "x", b"x")
        options = {"endpoint": server.endpoint, **how}
        with (
            CachedS3MapDataset.from_prefix("s3://mnist/", **options) as dataset,
            pytest.raises(AccessDenied),
        ):
            len(dataset)
    with S3Server() as server:
        server.put("mnist", "x", b"x")
        with CachedS3MapDataset.from_prefix("s3://mnist/", **options | {"endpoint": server.endpoint}) as dataset:
            assert dataset[0].read() == b"x"


def test_path_style_is_forced_where_it_is_asked_for(monkeypatch):
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    config = ClientConfig(force_path_style=True)
    with CachedS3MapDataset.from_prefix(PREFIX, s3client_config=config) as dataset:
        assert recipe(dataset).connection().path_style is True
    with CachedS3MapDataset.from_prefix(PREFIX, s3client_config=ClientConfig()) as dataset:
        assert recipe(dataset).connection().path_style is None


@pytest.mark.parametrize(
    ("variable", "argument", "gbps", "concurrency"),
    [
        (None, None, 10.0, "auto"),
        (None, None, 25.0, 640),
        (None, None, 1e9, 4096),
        ("32", None, 100.0, 32),
        ("32", 8, 100.0, 8),
        ("auto", None, 100.0, "auto"),
    ],
)
def test_throughput_target_scales_a_concurrency_that_nobody_has_set(monkeypatch, variable, argument, gbps, concurrency):
    if variable is not None:
        monkeypatch.setenv("ASYNCDS_CONCURRENCY", variable)
    options = {} if argument is None else {"concurrency": argument}
    config = ClientConfig(throughput_target_gbps=gbps)
    with CachedS3MapDataset.from_prefix(PREFIX, s3client_config=config, **options) as dataset:
        assert recipe(dataset).settings.concurrency == concurrency


@pytest.mark.parametrize(("variable", "attempts"), [(None, 3), ("1", 2)])
def test_attempts_are_those_of_the_config_unless_the_environment_says_otherwise(
    bucket, monkeypatch, variable, attempts
):
    if variable is not None:
        monkeypatch.setenv("ASYNCDS_RETRIES", variable)
    bucket.script("mnist", KEYS[0], [Fault.status(503, "SlowDown")], forever=True)
    with (
        CachedS3MapDataset.from_prefix(PREFIX, s3client_config=ClientConfig(max_attempts=3)) as dataset,
        pytest.raises(TransferFailed, match=f"after {attempts} attempts"),
    ):
        dataset[0]
    assert bucket.stats.gets["mnist", KEYS[0]] == attempts


@pytest.mark.parametrize("how", ["config", "argument"])
def test_profile_names_the_credentials(monkeypatch, tmp_path, how):
    credentials = tmp_path / "credentials"
    credentials.write_text("[lab]\naws_access_key_id = PROFILEKEY\naws_secret_access_key = secret\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "NOTTHISONE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    options = {"profile": "lab"} if how == "argument" else {"s3client_config": ClientConfig(profile="lab")}
    with S3Server(credentials=("PROFILEKEY", "secret")) as server:
        server.put_many("mnist", {"x": b"x", "y": b"y"})
        with CachedS3MapDataset.from_prefix("s3://mnist/", endpoint=server.endpoint, **options) as dataset:
            assert [object.read() for object in dataset] == [b"x", b"y"]


def test_anything_with_some_of_its_attributes_is_a_client_config(bucket):
    with CachedS3MapDataset.from_prefix(PREFIX, s3client_config=SimpleNamespace(max_attempts=2)) as dataset:
        assert recipe(dataset).settings.retries == 1


def session():
    from aiobotocore.session import AioSession

    made = AioSession()
    made.set_credentials("SESSIONKEY", "secret")
    return made


def test_session_factory_brings_the_credentials(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "NOTTHISONE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with S3Server(credentials=("SESSIONKEY", "secret")) as server:
        server.put_many("mnist", {"x": b"x", "y": b"y"})
        options = {"endpoint": server.endpoint, "session_factory": session}
        with CachedS3MapDataset.from_prefix("s3://mnist/", **options) as dataset:
            assert [object.read() for object in dataset] == [b"x", b"y"]


def test_session_factory_may_return_a_session_of_aioboto3():
    aioboto3 = pytest.importorskip("aioboto3")
    with S3Server(credentials=("SESSIONKEY", "secret")) as server:
        server.put_many("mnist", {"x": b"x", "y": b"y"})

        def make():
            return aioboto3.Session("SESSIONKEY", "secret")

        with CachedS3MapDataset.from_prefix("s3://mnist/", endpoint=server.endpoint, session_factory=make) as dataset:
            assert [object.read() for object in dataset] == [b"x", b"y"]


@pytest.mark.parametrize("workers", [0, 2])
def test_store_of_ones_own_is_read_from(workers):
    store = FakeStore({("shelf", f"book/{number}"): bytes([number]) * 9 for number in range(20)})
    assert isinstance(store, ObjectStore)
    with CachedS3MapDataset.from_prefix("s3://shelf/book/", store=store, transform=S3Reader.read) as dataset:
        context = "fork" if workers else None
        loader = DataLoader(dataset, batch_size=4, num_workers=workers, multiprocessing_context=context)
        assert sorted(itertools.chain(*loader)) == [bytes([number]) * 9 for number in range(20)]
        assert dataset.endpoint is None
        assert store.endpoint in repr(dataset)
        dataset[0]
        assert dataset.stats()["gets"] == 20


# versions, and a cache that is full


def test_overwritten_object_is_served_fresh_after_the_next_listing(bucket):
    def read() -> tuple[bytes, str]:
        with CachedS3MapDataset.from_prefix(PREFIX) as dataset:
            return dataset[4].read(), dataset[4].etag

    assert read()[0] == body(KEYS[4])
    bucket.put("mnist", KEYS[4], b"of the same size    ")
    assert read() == (b"of the same size    ", hashlib.md5(b"of the same size    ").hexdigest())
    assert bucket.stats.requests == {"LIST": 2, "GET": 2}


def test_object_overwritten_after_the_listing_is_an_error_that_says_to_list_again(bucket):
    with CachedS3MapDataset.from_prefix(PREFIX) as dataset:
        len(dataset)
        bucket.put("mnist", KEYS[4], b"of the same size    ")
        with pytest.raises(ObjectChanged, match=rf"s3://mnist/{KEYS[4]}.*again"):
            dataset[4]


def test_objects_that_do_not_fit_into_the_cache_are_served_and_counted(store):
    with CachedS3MapDataset.from_prefix(PREFIX, store=store, cache_size="1B", transform=S3Reader.read) as dataset:
        for _ in range(2):
            assert dataset.__getitems__(range(12)) == [body(key) for key in KEYS]
        stats = dataset.stats()
    assert (stats["uncached"], stats["gets"], stats["hits"]) == (24, 24, 0)
    assert store.gets.total() == 24


def test_cache_that_is_full_keeps_what_it_has(s3):
    big = {f"{number:02}": random.Random(number).randbytes(100_000) for number in range(20)}
    s3.put_many("mnist", big)
    with CachedS3MapDataset.from_prefix("s3://mnist/", cache_size="1MB", transform=S3Reader.read) as dataset:
        for _ in range(2):
            assert dataset.__getitems__(range(20)) == [*big.values()]
        stats = dataset.stats()
    kept = 40 - stats["gets"]
    assert 5 <= kept <= 9, "about a megabyte of objects of 100 kB, less the index"
    assert stats["hits"] == kept
    assert stats["uncached"] == 40 - 2 * kept


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("moment", ["reading", "storing", "warming"])
@pytest.mark.filterwarnings("ignore:the cache in .* cannot be:UserWarning")
def test_cache_that_fails_is_an_error_only_where_that_is_asked_for(bucket, monkeypatch, strict, moment):
    def failing(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with CachedS3MapDataset.from_prefix(PREFIX, strict=strict, transform=S3Reader.read) as dataset:
        assert dataset[0] == body(KEYS[0])
        place = "asyncds.folder.Folder.query" if moment == "reading" else "asyncds.folder.os.statvfs"
        monkeypatch.setattr(place, failing)
        expected = pytest.raises(CacheError, match=r"cannot be \w+ \(Input/output error\): free the disk, or set")
        with expected if strict else contextlib.nullcontext():
            if moment == "warming":
                assert dataset.warm(progress=False).uncached == 11
            else:
                assert dataset.__getitems__(range(12)) == [body(key) for key in KEYS]


# memory


@pytest.mark.parametrize("lane", ["lean", "full"])
@pytest.mark.parametrize("listed", [True, False])
def test_bytes_on_their_way_are_bounded_for_all_datasets_together(s3_process, monkeypatch, lane, listed):
    if lane == "full":
        monkeypatch.setattr("asyncds.store.s3._lean_lane", lambda *_: None)
    count, size = 40, 2_000_000
    s3_process.put_many("mnist", {f"{name}/{n:02}": bytes(size) for name in "ab" for n in range(count)})
    datasets = [
        CachedS3MapDataset.from_prefix(f"s3://mnist/{name}/", concurrency=32)
        if listed
        else CachedS3MapDataset.from_objects([f"s3://mnist/{name}/{n:02}" for n in range(count)], concurrency=32)
        for name in "ab"
    ]
    with ThreadPoolExecutor() as pool:
        for dataset in datasets:
            dataset[0]
        tracemalloc.start()
        try:
            reports = [*pool.map(lambda dataset: dataset.warm(progress=False), datasets)]
            buffers = 30_000_000 if lane == "full" else 0  # of aiohttp
            assert tracemalloc.get_traced_memory()[1] - buffers < 75_000_000 < count * size
        finally:
            tracemalloc.stop()
    assert [(report.fetched, report.failures) for report in reports] == [(count - 1, ())] * 2
    for dataset in datasets:
        dataset.close()


# warm


def test_warm_brings_everything_and_reports(dataset, store):
    dataset.__getitems__([0, 1])
    report = dataset.subset([5]).warm(progress=False)
    assert (report.objects, report.resident, report.fetched, report.bytes) == (12, 2, 10, 200)
    assert (report.uncached, report.failures) == (0, ())
    assert report.seconds > 0
    assert "12 objects: 2 were cached, 10 fetched" in str(report)
    assert list(dataset) == KEYS
    assert (store.calls["list"], store.gets.total()) == (1, 12)
    again = dataset.warm(progress=False)
    assert (again.resident, again.fetched) == (12, 0)


def test_warm_names_what_failed_and_brings_the_rest(dataset, store):
    len(dataset)
    lost = store.objects.pop(("mnist", KEYS[3]))
    store.failures[KEYS[7]] = [AccessDenied(f"s3://mnist/{KEYS[7]}: forbidden")]
    report = dataset.warm(progress=False)
    assert (report.fetched, len(report.failures)) == (10, 2)
    for key in (KEYS[3], KEYS[7]):
        assert sum(f"s3://mnist/{key}" in failure for failure in report.failures) == 1
    assert "2 failed" in str(report)
    store.objects["mnist", KEYS[3]] = lost
    assert list(dataset) == KEYS


def test_interrupted_warm_keeps_what_arrived_and_goes_on_from_there(bucket):
    bucket.script("mnist", KEYS[11], [Fault.stall()], forever=True)

    def interrupt() -> None:
        while dataset.stats()["gets"] < 11:  # for as long as the test has time
            pass
        dataset.__getitems__(range(11))  # returns once the cache has them
        os.kill(os.getpid(), signal.SIGINT)

    with CachedS3MapDataset.from_prefix(PREFIX, timeout=0.5) as dataset:
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            dataset.warm(progress=False)
        thread.join()
        bucket.clear_scripts()
        report = dataset.warm(progress=False)
    assert (report.resident, report.fetched, report.failures) == (11, 1, ())


def test_closing_ends_a_warm_up_with_an_error(store):
    store.gates = {key: asyncio.Event() for key in KEYS}
    dataset = CachedS3MapDataset.from_prefix(PREFIX, store=store, concurrency=2)
    with ThreadPoolExecutor() as pool:
        warming = pool.submit(dataset.warm, progress=False)
        while store.in_flight < 2:  # for as long as the test has time
            pass
        dataset.close()
        with pytest.raises(DatasetClosed):
            warming.result(5)


def test_warm_into_a_cache_that_is_too_small_counts_what_did_not_fit(store):
    with CachedS3MapDataset.from_prefix(PREFIX, store=store, cache_size="1B") as dataset:
        report = dataset.warm(progress=False)
    assert (report.fetched, report.uncached) == (0, 12)
    assert "12 did not fit" in str(report)
    assert store.gets.total() == 0, "what cannot be kept is not downloaded"


def test_warm_into_a_cache_that_fills_up_stops_to_download(s3):
    s3.put_many("mnist", {f"{number:04}": random.Random(number).randbytes(20_000) for number in range(1000)})
    with CachedS3MapDataset.from_prefix("s3://mnist/", cache_size="2MB") as dataset:
        report = dataset.warm(progress=False)
        assert 50 <= report.fetched <= 600, "the first few hundred are on their way when it is full"
        assert 50 <= 1000 - report.uncached <= 100
        assert s3.stats.requests["GET"] == report.fetched


def test_warm_of_a_sum_counts_each_source_once(store):
    store.objects["mnist", "test/x"] = b"x"
    with (
        CachedS3MapDataset.from_prefix(PREFIX, store=store) as first,
        CachedS3MapDataset.from_prefix("s3://mnist/test/", store=store) as second,
    ):
        report = (first + second + first).warm(progress=False)
        assert (report.objects, report.fetched) == (13, 13)
        assert (first + second).stats()["gets"] == 13


def test_warm_is_silent_where_nobody_looks(dataset, capfd):
    dataset.warm()
    assert capfd.readouterr() == ("", "")


def test_warm_works_inside_a_running_event_loop(dataset):
    async def main() -> int:
        return dataset.warm(progress=False).fetched

    assert asyncio.run(main()) == 12


# odd keys


ODD_KEYS = [
    "../../etc/passwd",
    "/abs",
    "a//b",
    "a/b",
    "a/./b",
    "a/../b",
    ".",
    "..",
    "k" * 1024,
    "\U0001f600" * 256,
    "cr\r\nlf",
    "tab\there",
    "\x01",
    "%2e",
    "%2E",
    "a%2Fb",
    unicodedata.normalize("NFC", "é"),
    unicodedata.normalize("NFD", "é"),
    "\U0001f600",
    "Case",
    "case",
    "a b",
    "a+b",
    " leading and trailing ",
    "a?b#c&d=e",
    "~",
    "\\",
    "'\"<>",
]


def test_odd_keys_are_distinct_objects(s3, tmp_path):
    s3.put_many("mnist", {key: f"of {key!a}".encode() for key in ODD_KEYS})
    expected = {key: f"of {key!a}".encode() for key in ODD_KEYS}
    for gets in (len(ODD_KEYS), 0):
        s3.reset_counts()
        with CachedS3MapDataset.from_prefix("s3://mnist/", transform=lambda o: (o.key, o.read())) as dataset:
            assert dict(dataset.__getitems__(range(len(ODD_KEYS)))) == expected
            assert [*dict(dataset)] == sorted(ODD_KEYS, key=str.encode)
        assert s3.stats.requests == Counter({"LIST": 1, "GET": gets})
    named = CachedS3MapDataset.from_objects(uris(ODD_KEYS), transform=lambda o: (o.key, o.read()))
    with named:
        assert dict(named) == expected
    assert not os.path.lexists(Settings().cache_dir.parent / "etc")


def test_error_about_an_odd_key_is_one_printable_line(s3):
    name = "s3://mnist/cr\r\nlf\x1b[31m"
    with CachedS3MapDataset.from_objects(name) as dataset, pytest.raises(ObjectNotFound) as caught:
        dataset[0]
    assert str(caught.value).isprintable()


def test_dataset_of_nothing_but_markers_says_so(s3):
    s3.put("mnist", "train/", b"")
    with CachedS3MapDataset.from_prefix(PREFIX) as dataset, pytest.raises(EmptyDataset, match="folder markers"):
        len(dataset)
