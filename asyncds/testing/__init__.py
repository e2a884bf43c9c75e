"""Servers to test against and to measure with: a scriptable S3 server, a latency proxy, real servers, a fake store."""

from asyncds.testing.fake import FakeStore
from asyncds.testing.faults import Fault
from asyncds.testing.latency import LogNormal, Stragglers
from asyncds.testing.local import LocalS3, local_s3
from asyncds.testing.objects import body_of
from asyncds.testing.proxy import LatencyProxy, ProxyStats
from asyncds.testing.server import S3Server, ServerStats

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
