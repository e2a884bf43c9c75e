"""Fixtures for the tests of those who use asyncds: pytest finds them wherever asyncds is installed.

Every run of pytest in such an environment loads this module, so what it needs is imported by the fixtures.
"""

import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import pytest

if TYPE_CHECKING:
    from asyncds.testing.server import S3Server

__all__ = ["asyncds_bucket", "asyncds_environment", "asyncds_s3", "asyncds_s3_process"]

_KEYS = "AKIAEXAMPLE", "secret-of-the-tests"
_FAMILIES = ("AWS_", "MINIO_", "ASYNCDS_")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
_numbers: "WeakKeyDictionary[S3Server, count[int]]" = WeakKeyDictionary()  # of the next bucket


@pytest.fixture
def asyncds_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No `AWS_*`, `MINIO_*` or `ASYNCDS_*` of the developer, no `.env` file, profile or proxy; and a cache of its own.

    That is `tmp_path / "asyncds-cache"`. A test that wants a `.env` file names it: `env_file=`.
    """
    from asyncds.settings import Settings

    monkeypatch.setitem(Settings.__init__.__kwdefaults__, "env_file", None)  # type: ignore[arg-type]
    for name in list(os.environ):
        if name.startswith(_FAMILIES) or name.lower() in _PROXIES:
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("ASYNCDS_CACHE_DIR", str(tmp_path / "asyncds-cache"))


@pytest.fixture
def asyncds_s3(asyncds_environment: None, monkeypatch: pytest.MonkeyPatch) -> Iterator["S3Server"]:
    """A running `asyncds.testing.S3Server` without buckets, to which the variables of the environment point.

    It knows one pair of keys, which the environment has, checks signatures, and ends with the test.
    """
    yield from _served(monkeypatch, process=False)


@pytest.fixture
def asyncds_s3_process(asyncds_environment: None, monkeypatch: pytest.MonkeyPatch) -> Iterator["S3Server"]:
    """As `asyncds_s3`, in a process of its own: for tests that fork (workers of a loader), or that compare times."""
    yield from _served(monkeypatch, process=True)


@pytest.fixture
def asyncds_bucket(
    asyncds_environment: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Make a bucket of the test's server, to which the variables of the environment then point, and return its URI.

    `asyncds_bucket()` makes an empty one, each call another; `asyncds_bucket({"a.txt": b"a"})` one with these objects.
    The server is that of `asyncds_s3_process` where the test asks for that one, else that of `asyncds_s3`, which may be
    a fixture of yours, of any scope: only buckets of one server have different names.
    """
    asked = {"asyncds_s3", "asyncds_s3_process"}.intersection(request.fixturenames)
    chosen = "asyncds_s3_process" if asked == {"asyncds_s3_process"} else "asyncds_s3"
    server: S3Server = request.getfixturevalue(chosen)
    if os.environ.get("AWS_ENDPOINT_URL") != server.endpoint:
        _point_to(server, monkeypatch)
    numbers = _numbers.setdefault(server, count(1))

    def make(objects: dict[str, bytes] | None = None) -> str:
        name = f"bucket-{next(numbers)}"
        server.put_many(name, objects or {})
        return f"s3://{name}/"

    return make


def _served(monkeypatch: pytest.MonkeyPatch, *, process: bool) -> Iterator["S3Server"]:
    from asyncds.testing.server import S3Server

    with S3Server(credentials=_KEYS, check_signatures=True, process=process) as server:
        _point_to(server, monkeypatch)
        yield server


def _point_to(server: "S3Server", monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
