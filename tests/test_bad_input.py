"""What users get wrong: a typed error, in one sentence that names the thing and the remedy, also in a worker."""

import gc
import re
import socket
import time
import warnings

import pytest
from torch.utils.data import DataLoader

from asyncds import CachedS3MapDataset, Fetcher, ImageTransform
from asyncds.errors import (
    AccessDenied,
    AsyncdsError,
    BucketNotFound,
    CacheError,
    ConfigurationError,
    EmptyDataset,
    EndpointUnreachable,
    ObjectNotFound,
)
from asyncds.testing import FakeStore, Fault, S3Server, local_s3

# Python 3.12 warns of every fork beside a thread, and the dataset's loop is one.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")

WORKERS = pytest.mark.parametrize("workers", [0, 1])


def first_batch(dataset: CachedS3MapDataset, workers: int) -> list[object]:
    context = "fork" if workers else None
    loader = DataLoader(dataset, batch_size=2, collate_fn=list, num_workers=workers, multiprocessing_context=context)
    return next(iter(loader))


def failure(dataset: CachedS3MapDataset, workers: int = 0) -> AsyncdsError:
    """The error of a first batch; the dataset is closed."""
    with dataset:
        try:
            first_batch(dataset, workers)
        except AsyncdsError as error:
            error.__cause__ = error.__context__ = None  # their frames would keep the worker
            return error.with_traceback(None)
        finally:
            gc.collect()
    raise AssertionError("the batch came")


def sentence(error: BaseException) -> str:
    """What the error says: one printable line. Of a worker's it is the last of a traceback, behind the class."""
    *before, line = str(error).rstrip().splitlines()
    if before:
        assert before[0].startswith("Caught"), before
        line = line.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")
    assert line
    assert line.isprintable()
    return line


def assert_says(error: AsyncdsError, kind: type[AsyncdsError], *parts: str) -> None:
    assert type(error) is kind
    text = sentence(error)
    for part in parts:
        assert part in text


@pytest.fixture
def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture
def refusing(monkeypatch, unused_port) -> str:
    """An endpoint that refuses connections."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return f"127.0.0.1:{unused_port}"


# the bucket and its objects


@WORKERS
def test_prefix_without_objects(s3, workers):
    error = failure(CachedS3MapDataset.from_prefix("s3://mnist/trian"), workers)
    assert_says(error, EmptyDataset, "s3://mnist/trian", "check bucket, prefix and endpoint")


def test_filter_that_fits_nothing(s3):
    s3.put("mnist", "train/1.png", b"")
    error = failure(CachedS3MapDataset.from_prefix("s3://mnist/train", match="*.jpg"))
    assert_says(error, EmptyDataset, "s3://mnist/train", "1 keys", "match")


@WORKERS
def test_bucket_that_does_not_exist(s3, workers):
    error = failure(CachedS3MapDataset.from_prefix("s3://imagenet/train"), workers)
    assert_says(error, BucketNotFound, "s3://imagenet/train", "check its name and the endpoint")
    assert isinstance(error, FileNotFoundError)


@WORKERS
def test_object_of_a_bucket_that_does_not_exist(s3, workers):
    error = failure(CachedS3MapDataset.from_objects("s3://imagenet/1.png"), workers)
    assert_says(error, BucketNotFound, "s3://imagenet/1.png", "check its name and the endpoint")


@pytest.mark.parametrize("bucket", ["a", "with space", "under_score!", "x" * 64])
def test_name_that_no_bucket_can_have(s3, bucket):
    error = failure(CachedS3MapDataset.from_prefix(f"s3://{bucket}/train"))
    assert isinstance(error, ConfigurationError | BucketNotFound)
    assert bucket in sentence(error)


@WORKERS
def test_object_that_vanished_after_the_listing(s3, workers):
    s3.put("mnist", "train/1.png", b"1")
    dataset = CachedS3MapDataset.from_prefix("s3://mnist/train")
    len(dataset)
    s3.delete("mnist", "train/1.png")
    error = failure(dataset, workers)
    assert_says(error, ObjectNotFound, "s3://mnist/train/1.png", "list the prefix again")
    assert isinstance(error, FileNotFoundError)
    assert s3.stats.gets["mnist", "train/1.png"] <= 2, "not retried: once on each lane"


@WORKERS
def test_object_that_never_was(s3, workers):
    error = failure(CachedS3MapDataset.from_objects(["s3://mnist/1.png", "s3://mnist/2.png"]), workers)
    assert_says(error, ObjectNotFound, "s3://mnist/1.png", "the URI is wrong")


# credentials, region, endpoint


@WORKERS
def test_unknown_access_key(monkeypatch, workers):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIASOMEONEELSE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret-of-someone")
    with S3Server(credentials=("AKIAEXAMPLE", "secret")) as server:
        server.put("mnist", "train/1.png", b"1")
        for make in (CachedS3MapDataset.from_prefix, CachedS3MapDataset.from_objects):
            error = failure(make("s3://mnist/train/1.png", endpoint=server.endpoint), workers)
            assert_says(error, AccessDenied, "s3://mnist/train", "InvalidAccessKeyId", "check AWS_ACCESS_KEY_ID")
            assert isinstance(error, PermissionError)
            assert "the-secret-of-someone" not in str(error)
        assert server.stats.total <= 4, "not retried"


def test_wrong_secret_on_a_real_server(monkeypatch):
    with local_s3(kind="rclone") as server:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.access_key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
        error = failure(CachedS3MapDataset.from_prefix("s3://mnist/train", endpoint=server.endpoint))
    assert_says(error, AccessDenied, "s3://mnist/train", "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")


@WORKERS
def test_no_credentials_at_all(s3, monkeypatch, workers):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    error = failure(CachedS3MapDataset.from_prefix("s3://mnist/train"), workers)
    assert_says(error, AccessDenied, "s3://mnist/train", "no credentials", "set AWS_ACCESS_KEY_ID")


def test_labels_given_in_two_ways():
    with pytest.raises(ConfigurationError, match="both labels= and label="):
        CachedS3MapDataset.from_objects(["s3://mnist/a/1.png"], ["a"], label="parent")


def test_argument_of_another_constructor():
    with pytest.raises(ConfigurationError, match="limit= is an argument of another constructor"):
        CachedS3MapDataset.from_objects(["s3://mnist/1.png"], limit=10)


def test_misspelt_argument_is_recognised():
    with pytest.raises(ConfigurationError, match="no argument or setting is called 'lable': did you mean 'label'"):
        CachedS3MapDataset.from_prefix("s3://mnist/", lable="parent")


def test_error_in_a_callable_for_labels_names_the_key():
    with pytest.raises(IndexError) as caught:
        CachedS3MapDataset.from_objects(["s3://mnist/1.png"], label=lambda key: key.split("/")[1])
    assert caught.value.__notes__ == ["while labelling s3://mnist/1.png"]


def test_half_of_the_credentials(s3, monkeypatch):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ConfigurationError, match="AWS_SECRET_ACCESS_KEY is missing") as caught:
        CachedS3MapDataset.from_prefix("s3://mnist/train")
    sentence(caught.value)


def test_profile_that_does_not_exist(s3):
    error = failure(CachedS3MapDataset.from_prefix("s3://mnist/train", profile="nobody"))
    assert_says(error, ConfigurationError, "nobody")


@WORKERS
def test_wrong_region_names_the_right_one(monkeypatch, workers):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with S3Server(region="eu-west-3") as server:
        server.put("mnist", "train/1.png", b"1")
        for make in (CachedS3MapDataset.from_prefix, CachedS3MapDataset.from_objects):
            error = failure(make("s3://mnist/train/1.png", endpoint=server.endpoint, region="us-east-1"), workers)
            assert_says(error, ConfigurationError, "us-east-1", "AWS_REGION=eu-west-3")


@WORKERS
@pytest.mark.parametrize("make", [CachedS3MapDataset.from_prefix, CachedS3MapDataset.from_objects])
def test_endpoint_that_refuses_connections(refusing, workers, make):
    error = failure(make("s3://mnist/train", first_contact=0.3), workers)
    assert_says(error, EndpointUnreachable, "s3://mnist/train", refusing, "check that the server runs")
    assert isinstance(error, ConnectionError)


def test_endpoint_that_refuses_connections_is_given_up_after_about_five_seconds(refusing):
    started = time.monotonic()
    error = failure(CachedS3MapDataset.from_prefix("s3://mnist/train"))
    assert_says(error, EndpointUnreachable, refusing)
    assert 2 < time.monotonic() - started < 20


@WORKERS
def test_host_that_does_not_exist(refusing, monkeypatch, workers):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://no-such-host.invalid:9000")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of plain http, which is not the matter
        error = failure(CachedS3MapDataset.from_prefix("s3://mnist/train", first_contact=0.3), workers)
    assert_says(error, EndpointUnreachable, "s3://mnist/train", "no-such-host.invalid:9000", "AWS_ENDPOINT_URL")


@WORKERS
def test_endpoint_that_is_no_s3_server(s3, workers):
    s3.script("mnist", None, [Fault.status(200, body=b"<html>welcome</html>")], operation="LIST", forever=True)
    error = failure(CachedS3MapDataset.from_prefix("s3://mnist/train", retries=1), workers)
    assert isinstance(error, AsyncdsError)
    assert "s3://mnist/train" in sentence(error)


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("AWS_ENDPOINT_URL", "localhost:9000", "http://localhost:9000"),
        ("AWS_ENDPOINT_URL", "s3.example.com", "https://s3.example.com"),
        ("AWS_ENDPOINT_URL", "ftp://s3.example.com", "https://s3.example.com"),
        ("MINIO_URL", "http://localhost:9000", "MINIO_URL=localhost:9000 and MINIO_SECURE=false"),
    ],
)
def test_endpoint_with_a_scheme_too_few_or_too_many(monkeypatch, variable, value, remedy):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=re.escape(f"{variable}={value!r}")) as caught:
        CachedS3MapDataset.from_prefix("s3://mnist/train")
    assert remedy in sentence(caught.value)


# the cache directory


def test_cache_directory_that_is_a_file(tmp_path, monkeypatch):
    place = tmp_path / "file"
    place.write_text("in the way")
    for name in (place, place / "below"):
        monkeypatch.setenv("ASYNCDS_CACHE_DIR", str(name))
        with pytest.raises(CacheError, match=re.escape(str(name))) as caught:
            CachedS3MapDataset.from_prefix("s3://mnist/train")
        assert "set ASYNCDS_CACHE_DIR" in sentence(caught.value)
        assert isinstance(caught.value, OSError)


def test_folder_of_the_cache_that_is_a_file(tmp_path):
    (tmp_path / "asyncds").write_text("in the way")
    with pytest.raises(CacheError, match="set ASYNCDS_CACHE_DIR") as caught:
        CachedS3MapDataset.from_prefix("s3://mnist/train", cache_dir=tmp_path)
    assert str(tmp_path) in sentence(caught.value)


# arguments


def make_of(method: str, *positional: object, **options: object):
    """Make a dataset, and use it: an argument may be looked at late."""
    with getattr(CachedS3MapDataset, method)(*positional, **options) as dataset:
        return first_batch(dataset, 0)


@pytest.mark.parametrize("method", ["from_prefix", "from_objects"])
@pytest.mark.parametrize("uri", ["mnist/train", "/data/train", "https://host/mnist", "S3://mnist/x", "s3:/mnist/x", ""])
def test_uri_that_is_not_of_s3(method, uri):
    with pytest.raises(ConfigurationError, match=re.escape(repr(uri))) as caught:
        make_of(method, uri)
    assert "s3://bucket/key" in sentence(caught.value)


@pytest.mark.parametrize("method", ["from_prefix", "from_objects"])
@pytest.mark.parametrize("uri", ["s3://", "s3:///train"])
def test_uri_without_a_bucket(method, uri):
    with pytest.raises(ConfigurationError, match="s3://bucket/key"):
        make_of(method, uri)


@pytest.mark.parametrize("uri", [None, 7, b"s3://mnist/train", ["s3://mnist/train"]])
def test_prefix_that_is_no_text(uri):
    with pytest.raises(ConfigurationError, match="s3://bucket/key"):
        make_of("from_prefix", uri)


def test_object_without_a_key(s3):
    with pytest.raises(ConfigurationError, match="names a bucket, not an object: use from_prefix"):
        make_of("from_objects", ["s3://mnist"])


@pytest.mark.parametrize(
    ("arguments", "named", "remedy"),
    [
        ({"limit": 0}, "limit=0", "at least 1"),
        ({"limit": -3}, "limit=-3", "at least 1"),
        ({"limit": "10"}, "limit='10'", "at least 1"),
        ({"limit": 2.5}, "limit=2.5", "at least 1"),
        ({"label": "folder"}, "label='folder'", "'parent' or a callable"),
        ({"label": 1}, "label=1", "'parent' or a callable"),
        ({"match": 3}, "match=3", "glob"),
        ({"concurency": 3}, "'concurency'", "concurrency"),
        ({"tranform": str}, "'tranform'", "transform"),
        ({"concurrency": 0}, "concurrency=0", "from 1 to 4096"),
        ({"concurrency": "many"}, "concurrency='many'", "a whole number"),
        ({"cache_size": "lots"}, "cache_size='lots'", "50GB"),
        ({"timeout": -1}, "timeout=-1", "above 0"),
        ({"endpoint": "localhost:9000"}, "endpoint='localhost:9000'", "http://localhost:9000"),
        ({"endpoint": "http://user:pass@localhost:9000"}, "endpoint", "no user name or password"),
    ],
)
def test_argument_that_cannot_mean_anything(s3, arguments, named, remedy):
    s3.put_many("mnist", {f"train/{number}/x.png": b"" for number in range(5)})
    with pytest.raises(ConfigurationError, match=re.escape(named)) as caught:
        make_of("from_prefix", "s3://mnist/train", **arguments)
    assert remedy in sentence(caught.value)
    assert isinstance(caught.value, ValueError)


def test_variable_that_cannot_mean_anything(monkeypatch):
    monkeypatch.setenv("ASYNCDS_CONCURRENCY", "many")
    with pytest.raises(ConfigurationError, match="ASYNCDS_CONCURRENCY='many': must be auto, or a whole number"):
        make_of("from_prefix", "s3://mnist/train")


@pytest.mark.parametrize("labels", [["a"], ["a", "b", "c"], []])
def test_unequal_numbers_of_objects_and_labels(labels):
    with pytest.raises(ConfigurationError, match=f"{len(labels)} labels for 2 objects: give one label for each"):
        make_of("from_objects", ["s3://mnist/1", "s3://mnist/2"], labels=labels)


@pytest.mark.parametrize("labels", [[None, None], [b"a", b"b"], [(1,), (2,)], ["a", 1], [2**70, 1]])
def test_labels_that_are_no_labels(labels):
    with pytest.raises(ConfigurationError, match="label") as caught:
        make_of("from_objects", ["s3://mnist/1", "s3://mnist/2"], labels=labels)
    sentence(caught.value)


def test_label_of_the_parent_for_a_key_without_one(s3):
    s3.put("mnist", "1.png", b"")
    with pytest.raises(ConfigurationError, match=r"'1\.png' lies in no folder.*give a callable"):
        make_of("from_prefix", "s3://mnist/", label="parent")


def test_label_of_no_kind_that_can_be_one(s3):
    s3.put("mnist", "1.png", b"")
    with pytest.raises(ConfigurationError, match="of type NoneType: give"):
        make_of("from_prefix", "s3://mnist/", label=lambda key: None)


@pytest.mark.parametrize("as_", ["PIL", "torch", None])
def test_kind_of_picture_that_there_is_not(as_):
    with pytest.raises(ConfigurationError, match=re.escape(f"as_={as_!r}: must be 'pil' or 'numpy'")):
        ImageTransform(as_=as_)


# files


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        (b"", {}, "there is no column 'key'"),
        (b"uri,label\ns3://mnist/1,a\n", {}, "there is no column 'key'; its first row is 'uri, label'"),
        (b"key,class\ns3://mnist/1,a\n", {}, "there is no column 'label'"),
        (b"key,label\ns3://mnist/1\n", {}, "a row has 1 columns, 2 are needed"),
        (b"s3://mnist/1,a\n", {"key": 0, "label": 2}, "a row has 2 columns, 3 are needed"),
        (b"s3://mnist/1,a\n", {"key": -1, "label": None}, "there is no column -1"),
        (b"s3://mnist/1,a\n", {"key": 0, "label": -1}, "there is no column -1"),
        (b"key,label\ntrain/1.png,a\n", {}, "'train/1.png' is no S3 URI: say root="),
        (b"key,label\n1.png,a\n", {"root": "mnist"}, "'mnist/1.png' is no S3 URI"),
        (b"key,label\n\xff\xfe,a\n", {}, "cannot be read as CSV in UTF-8"),
        (b"key,label\n\0,a\n", {}, "table.csv"),
    ],
)
def test_csv_that_does_not_say_what_is_wanted(tmp_path, content, options, says):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=re.escape(says)) as caught:
        make_of("from_csv", path, **options)
    assert sentence(caught.value)
    if "root" not in options:
        assert str(path) in str(caught.value)


def test_csv_that_is_not_there(tmp_path):
    with pytest.raises(ConfigurationError, match=r"missing.csv: cannot be read .*No such file"):
        make_of("from_csv", tmp_path / "missing.csv")


@pytest.mark.parametrize("content", [None, b"", b"not a manifest", b"asyncdsM" + bytes(100)])
def test_manifest_that_is_none(tmp_path, content):
    path = tmp_path / "train.manifest"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"train\.manifest") as caught:
        make_of("from_manifest", path)
    sentence(caught.value)


def test_sum_with_what_is_no_dataset():
    with CachedS3MapDataset.from_prefix("s3://mnist/train") as dataset, pytest.raises(ConfigurationError, match="int"):
        dataset + 1


def test_constructor_that_is_called_with_a_uri_names_the_ones_that_take_it():
    with pytest.raises(ConfigurationError, match=r"use CachedS3MapDataset\.from_prefix"):
        CachedS3MapDataset("s3://mnist/train/")


async def test_uri_is_no_object_for_a_fetcher(tmp_path):
    async with Fetcher.open(store=FakeStore(), cache_dir=tmp_path) as fetcher:
        with pytest.raises(ConfigurationError, match=r"write ObjectInfo\(bucket, key\)"):
            await fetcher.get("s3://mnist/train/1")
