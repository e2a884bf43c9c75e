"""What becomes of samples that cannot be had: an error, another sample, or none."""

import random
import warnings

import pytest
import torch
from torch.utils.data import DataLoader

from asyncds import CachedS3MapDataset, S3Reader
from asyncds.errors import ConfigurationError, ObjectNotFound, StoreError

KEYS = [f"x/{n:03}" for n in range(60)]
GONE = (3, 17, 40)


def body(key):
    return random.Random(key).randbytes(50)


class Decoder:
    """Refuses one object, as a decoder refuses a corrupt image."""

    def __call__(self, file: S3Reader) -> torch.Tensor:
        if file.key == KEYS[25]:
            raise ValueError("not an image")
        return torch.tensor(list(file.read()), dtype=torch.uint8)


@pytest.fixture
def bucket(s3_process):
    s3_process.put_many("mnist", {key: body(key) for key in KEYS})
    return s3_process


def broken(bucket, **options):
    """A dataset three of whose objects are gone since they were listed, and one of which cannot be decoded."""
    dataset = CachedS3MapDataset.from_prefix("s3://mnist/x/", transform=Decoder(), **options)
    len(dataset)
    for n in GONE:
        bucket.delete("mnist", KEYS[n])
    return dataset


def tensor(n):
    return torch.tensor(list(body(KEYS[n])), dtype=torch.uint8)


@pytest.mark.parametrize("threads", [0, 3])
def test_a_failure_is_raised_by_default_with_its_type_and_the_object(bucket, threads):
    with broken(bucket, decode_threads=threads) as dataset:
        with pytest.raises(ObjectNotFound, match=KEYS[3]):
            dataset.__getitems__([1, 3])
        with pytest.raises(ValueError, match="not an image") as raised:
            dataset.__getitems__([1, 25])
        assert raised.value.__notes__ == [f"while transforming s3://mnist/{KEYS[25]}"]
        assert dataset.failures() == []


@pytest.mark.filterwarnings("ignore:a sample was left out")
@pytest.mark.parametrize(("workers", "threads"), [(0, 0), (2, 0), (0, 3)])
@pytest.mark.parametrize("on_error", ["replace", "skip"])
def test_bad_samples_do_not_end_an_epoch_and_are_counted_and_named(bucket, on_error, workers, threads):
    with broken(bucket, on_error=on_error, decode_threads=threads) as dataset:
        epochs = [torch.cat(list(DataLoader(dataset, 10, num_workers=workers))) for _ in range(2)]
        stats, failures = dataset.stats(), dataset.failures()
    bad = {*GONE, 25}
    kept = [n for n in range(60) if n not in bad]
    assert torch.equal(*epochs), "another substitute in the second epoch"
    if on_error == "skip":
        assert torch.equal(epochs[0], torch.stack([tensor(n) for n in kept]))
    else:
        assert all(torch.equal(epochs[0][n], tensor(n)) for n in kept)
        assert all(any(torch.equal(epochs[0][n], tensor(other)) for other in kept) for n in bad)
    counted = {"replace": "replaced", "skip": "skipped"}[on_error]
    assert (stats[counted], stats["replaced"] + stats["skipped"]) == (8, 8)
    assert {KEYS[n] for n in bad} == {key for key in KEYS if any(key in line for line in failures)}
    assert len(failures) == len(bad), "each object once, in however many epochs it failed"
    assert any(line.startswith("ValueError: not an image; while transforming s3://mnist/") for line in failures)


@pytest.mark.parametrize("on_error", ["replace", "skip"])
def test_the_first_failure_of_a_run_is_told_once(bucket, on_error):
    with broken(bucket, on_error=on_error) as dataset:
        with pytest.warns(UserWarning, match=f"a sample was left out or replaced, as on_error says .*{KEYS[3]}"):
            dataset.__getitems__(range(10))
        with warnings.catch_warnings(action="error"):
            dataset.__getitems__(range(60))


@pytest.mark.filterwarnings("ignore:a sample was left out")
@pytest.mark.parametrize("on_error", ["replace", "skip"])
def test_objects_count_once_in_however_many_epochs_they_fail(bucket, on_error):
    with broken(bucket, on_error=on_error, max_failures=4) as dataset:
        for _ in range(5):
            dataset.__getitems__(range(60))
        assert len(dataset.failures()) == 4


@pytest.mark.filterwarnings("ignore:a sample was left out")
def test_sample_is_not_its_own_substitute(bucket):
    with broken(bucket, on_error="replace") as dataset:
        few = dataset.subset([3, 0])
        for _ in range(20):
            assert torch.equal(torch.stack(few.__getitems__([0, 1])), torch.stack([tensor(0), tensor(0)]))
        assert dataset.stats()["replaced"] == 20


@pytest.mark.filterwarnings("ignore:a sample was left out")
@pytest.mark.parametrize(
    ("most", "passes"), [(4, True), (3, False), (0.07, True), (0.05, False), ("5%", False), (0, False)]
)
def test_more_failures_than_allowed_end_the_run(bucket, most, passes):
    with broken(bucket, on_error="skip", max_failures=most) as dataset:
        if passes:
            assert len(dataset.__getitems__(range(60))) == 56
        else:
            with pytest.raises((StoreError, ValueError)) as raised:
                dataset.__getitems__(range(60))
            assert "max_failures" in raised.value.__notes__[-1]


@pytest.mark.filterwarnings("ignore:a sample was left out")
@pytest.mark.parametrize("on_error", ["replace", "skip"])
def test_a_single_sample_that_cannot_be_had_is_an_error(bucket, on_error):
    with broken(bucket, on_error=on_error) as dataset:
        with pytest.raises(ObjectNotFound, match=KEYS[3]):
            dataset[3]
        if on_error == "skip":
            with pytest.raises(StoreError, match="none of the samples"):
                dataset.__getitems__([3, 17])


@pytest.mark.parametrize(
    "options", [{"on_error": "ignore"}, {"max_failures": -1}, {"max_failures": 1.5}, {"max_failures": "many"}]
)
def test_what_means_nothing_is_refused(options):
    with pytest.raises(ConfigurationError, match=r"on_error|max_failures"):
        CachedS3MapDataset.from_prefix("s3://mnist/x/", **options)


def test_skipping_is_refused_in_a_job_of_several_ranks(bucket, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with broken(bucket, on_error="skip") as dataset, pytest.raises(ConfigurationError, match='use "replace"'):
        dataset.loader(10)
