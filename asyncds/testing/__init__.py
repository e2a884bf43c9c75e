"""Servers to test against and to measure with: a scriptable S3 server, a latency proxy, real servers, a fake store.

Names are loaded when they are first used: the pytest plugin beside them is loaded by every run of pytest.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncds.testing.fake import FakeStore
    from asyncds.testing.faults import Fault
    from asyncds.testing.latency import LogNormal, Stragglers
    from asyncds.testing.local import LocalS3, local_s3
    from asyncds.testing.objects import body_of
    from asyncds.testing.proxy import LatencyProxy, ProxyStats
    from asyncds.testing.server import S3Server
    from asyncds.testing.service import ServerStats

_HOMES = {
    "FakeStore": "fake",
    "Fault": "faults",
    "LatencyProxy": "proxy",
    "LocalS3": "local",
    "LogNormal": "latency",
    "ProxyStats": "proxy",
    "S3Server": "server",
    "ServerStats": "service",
    "Stragglers": "latency",
    "body_of": "objects",
    "local_s3": "local",
}

__all__ = [
    "FakeStore",
    "Fault",
    "LatencyProxy",
    "LocalS3",
    "LogNormal",
    "ProxyStats",
    "S3Server",
    "ServerStats",
    "Stragglers",
    "body_of",
    "local_s3",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'asyncds.testing' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"asyncds.testing.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
