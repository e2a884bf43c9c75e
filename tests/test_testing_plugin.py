"""The fixtures that pytest finds where asyncds is installed, as its users' pytest runs them, and docs/testing.md."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "testing.md").read_text(), re.DOTALL)
PLUGIN = "asyncds.testing.plugin"
FIXTURES = {"asyncds_bucket", "asyncds_environment", "asyncds_s3", "asyncds_s3_process"}

pytest_plugins = ["pytester"]


@pytest.fixture
def user(pytester, monkeypatch):
    """Runs pytest as a user does: without what this repository configures."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, sys.path)]))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def run(*arguments):
        return pytester.runpytest_subprocess("-p", PLUGIN, "-W", "error", *arguments, timeout=50)

    return run


def test_plugin_is_announced_to_pytest():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"asyncds": PLUGIN}


@pytest.mark.parametrize("block", BLOCKS[2:], ids=range(2, len(BLOCKS)))
def test_other_examples_of_the_document_run(block):
    exec(block, {})


# Each starts an interpreter that loads torch, so they share one.
EACH = """
import os
import pytest
from asyncds import CachedS3MapDataset, S3Reader

seen = []
before = dict(os.environ)

@pytest.mark.parametrize("time", [1, 2])
def test_one(asyncds_s3, asyncds_bucket, tmp_path, time):
    assert not {"AWS_PROFILE", "MINIO_URL"} & os.environ.keys()
    assert os.environ["AWS_ENDPOINT_URL"] == asyncds_s3.endpoint
    empty, uri = asyncds_bucket(), asyncds_bucket({"a": b"a"})
    assert (empty, uri) == ("s3://bucket-1/", "s3://bucket-2/")
    with CachedS3MapDataset.from_prefix(uri, transform=S3Reader.read) as dataset:
        assert [*dataset] == [b"a"]
    assert asyncds_s3.stats.gets["bucket-2", "a"] == 1, "the cache of another test was used"
    assert any((tmp_path / "asyncds-cache").iterdir())
    seen.append(asyncds_s3)

def test_afterwards():
    assert {name: os.environ[name] for name in before if name != "PYTEST_CURRENT_TEST"} == {
        name: value for name, value in before.items() if name != "PYTEST_CURRENT_TEST"
    }
    assert len({id(server) for server in seen}) == 2
    assert all("not running" in repr(server) for server in seen)
"""

WORKERS = """
import pytest
from torch.utils.data import DataLoader
from asyncds import CachedS3MapDataset, S3Reader

@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_workers(asyncds_s3_process):
    asyncds_s3_process.put_many("b", {f"{n}": bytes([n]) for n in range(8)})
    with CachedS3MapDataset.from_prefix("s3://b/", transform=S3Reader.read) as dataset:
        batches = [*DataLoader(dataset, 4, collate_fn=list, num_workers=1)]
    assert batches == [[bytes([n]) for n in range(4)], [bytes([n]) for n in range(4, 8)]]
    assert asyncds_s3_process.stats.requests["GET"] == 8
"""

KEYS = """
import pytest
from asyncds import CachedS3MapDataset
from asyncds.errors import AccessDenied

@pytest.fixture
def wrong(asyncds_s3, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")

def test_keys_of_another_fixture_stay(wrong, asyncds_bucket):
    with CachedS3MapDataset.from_prefix(asyncds_bucket({"a": b"a"})) as dataset:
        with pytest.raises(AccessDenied, match="SignatureDoesNotMatch"):
            len(dataset)

def test_keys(asyncds_bucket, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with CachedS3MapDataset.from_prefix(asyncds_bucket({"a": b"a"})) as dataset:
        with pytest.raises(AccessDenied, match="SignatureDoesNotMatch"):
            len(dataset)
"""


PROCESS = """
import os

def test_buckets_are_those_of_the_server_that_the_test_asks_for(asyncds_s3_process, asyncds_bucket):
    assert "process" in repr(asyncds_s3_process)
    assert os.environ["AWS_ENDPOINT_URL"] == asyncds_s3_process.endpoint
    assert asyncds_bucket({"a": b"a"}) == "s3://bucket-1/"
    from asyncds import CachedS3MapDataset
    assert len(CachedS3MapDataset.from_prefix("s3://bucket-1/")) == 1
    assert asyncds_s3_process.stats.requests["LIST"] == 1

def test_of_two_the_usual_one_has_them(asyncds_s3, asyncds_s3_process, asyncds_bucket):
    assert asyncds_bucket() == "s3://bucket-1/"
    assert os.environ["AWS_ENDPOINT_URL"] == asyncds_s3.endpoint
"""

OVERRIDDEN = """
import os
import pytest
from asyncds import CachedS3MapDataset
from asyncds.testing import S3Server

seen = []

@pytest.fixture(scope="module")
def asyncds_s3():
    with S3Server(region="eu-west-3", credentials=("KEY", "secret", "token"), check_signatures=True) as server:
        yield server
    assert len(seen) == 2

@pytest.mark.parametrize("time", [1, 2])
def test_bucket_is_new_and_found(asyncds_s3, asyncds_bucket, time):
    uri = asyncds_bucket({f"{time}": b"x"})
    assert uri not in seen
    seen.append(uri)
    with CachedS3MapDataset.from_prefix(uri) as dataset:
        assert [info.key for info in dataset.manifest] == [f"{time}"]
    assert {name: os.environ[name] for name in asyncds_s3.environment} == asyncds_s3.environment

def test_variables_are_those_of_before():
    assert "AWS_ENDPOINT_URL" not in os.environ
"""


def test_users_tests_have_a_server_buckets_keys_and_a_cache_of_their_own_and_leave_nothing(pytester, user, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "of-the-developer")
    monkeypatch.setenv("MINIO_URL", "minio.example:9000")
    pytester.makepyfile(test_document=BLOCKS[0], test_each=EACH, test_workers=WORKERS, test_keys=KEYS)
    pytester.makepyfile(test_process=PROCESS, test_overridden=OVERRIDDEN, test_second_document=BLOCKS[1])
    user().assert_outcomes(passed=14)


def test_plugin_is_light():
    script = f"import sys, {PLUGIN}; print(*sorted(name for name in sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {name for name in loaded if name.startswith("asyncds")} == {"asyncds", "asyncds.testing", PLUGIN}
    assert not {"torch", "numpy", "aiohttp", "aiobotocore", "botocore", "uvloop", "ssl"} & loaded


def test_fixtures_are_listed_with_what_they_are_for(user):
    shown = user("--fixtures", "-v").stdout.str()
    for name in FIXTURES:
        assert re.search(rf"^{name} -- .*\n    \S", shown, re.MULTILINE), name


def test_no_fixture_of_these_tests_has_the_name_of_one_of_the_plugins():
    own = re.findall(r"^def (\w+)\(", (ROOT / "tests" / "conftest.py").read_text(), re.MULTILINE)
    assert not FIXTURES & set(own)
    assert all(name.startswith("asyncds_") for name in FIXTURES)


def test_names_for_users_load_and_are_told():
    from asyncds import testing

    assert all(getattr(testing, name).__name__ == name for name in testing.__all__)
    assert testing.__all__ == sorted(testing.__all__)
    assert set(testing.__all__) == set(testing._HOMES) <= set(dir(testing))
    with pytest.raises(AttributeError, match="no attribute 'NoSuchName'"):
        _ = testing.NoSuchName
