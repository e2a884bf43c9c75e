"""Fixtures for the tests of those who use asyncds: pytest finds them wherever asyncds is installed."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # pytest loads this in every project of an environment: what it needs comes with the first fixture
    from asyncds.testing import S3Server

_ACCESS_KEY, _SECRET_KEY = "AKIAEXAMPLE", "secret-of-the-tests"
_FAMILIES = ("AWS_", "MINIO_", "ASYNCDS_")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


@pytest.fixture
def asyncds_environment(tmp_path: "pytest.TempPathFactory", monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without the developer's `AWS_*`, `MINIO_*`, `ASYNCDS_*` and proxies, and a cache of its own.

    `ASYNCDS_CACHE_DIR` is `tmp_path / "asyncds-cache"`. A `.env` file still counts, in the folder that pytest runs in.
    """
    import os

    for name in list(os.environ):
        if name.startswith(_FAMILIES) or name.lower() in _PROXIES:
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("ASYNCDS_CACHE_DIR", f"{tmp_path}/asyncds-cache")
