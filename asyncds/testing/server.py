"""A fast S3 server that fails on purpose and counts what it is asked."""

import os
import ssl
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from asyncds.errors import ConfigurationError
from asyncds.testing.access import Access, Keys
from asyncds.testing.faults import Fault
from asyncds.testing.host import Factory, Hosted
from asyncds.testing.latency import Latency, checked
from asyncds.testing.service import S3Service, ServerStats

_BATCH_BYTES = 16 * 1024 * 1024
_ANY_KEYS = "AKIAEXAMPLE", "any-secret-will-do"


class S3Server(Hosted):
    """Serve S3 from memory on a free loopback port, while the context is open.

    `with S3Server(latency=0.01) as server: server.endpoint` is `http://127.0.0.1:PORT`, path style. Any credentials do,
    unless `credentials=(access key, secret key)`, or with a session token behind them, or `region` are given: then
    requests that name others are refused as AWS refuses them. With `check_signatures=True` so are those whose
    signature (Version 4, in headers or in the URL) is wrong, or whose time differs by more than a quarter of an hour
    from that of the server, whose clock is `clock_skew` seconds ahead. Every answer waits `latency` seconds, or as many
    as `LogNormal` or `Stragglers` say, to within about a millisecond, and does not hold up others. Of more than
    `rate_limit` requests per second the rest are answered by 503 SlowDown, as S3 does, and are counted as well.
    Connections on which nothing was asked for `idle_timeout` seconds are closed. With a `port` of its own, rather than
    a free one, another server can take its place.

    With `tls=(certificate, key)`, the paths of two PEM files, it speaks TLS, and the endpoint begins with `https`.
    Clients trust it where `AWS_CA_BUNDLE` names the file of the authority that signed the certificate.

    The server runs on a thread of this process, or with `process=True` in a child, which leaves this process's GIL
    alone and ends with it however it ends; prefer that where a test forks. Methods may be called from any thread of
    the process that opened the context; they return when the change is in force.
    """

    def __init__(
        self,
        *,
        latency: Latency = 0.0,
        region: str | None = None,
        credentials: Keys | None = None,
        check_signatures: bool = False,
        clock_skew: float = 0.0,
        idle_timeout: float | None = None,
        tls: tuple[str | os.PathLike[str], str | os.PathLike[str]] | None = None,
        process: bool = False,
        rate_limit: float | None = None,
        port: int = 0,
    ) -> None:
        super().__init__(process=process)
        if rate_limit is not None and not 0 < rate_limit < float("inf"):
            raise ConfigurationError(f"rate_limit is a number of requests per second, above 0, not {rate_limit!r}")
        self._rate_limit = rate_limit
        if idle_timeout is not None and not 0 < idle_timeout < float("inf"):
            raise ConfigurationError(f"idle_timeout is a number of seconds, above 0, not {idle_timeout!r}")
        self._latency = checked(latency)
        self._access = Access(region, credentials, check_signatures)
        self._keys: Sequence[str] = credentials or _ANY_KEYS
        self._tls = None if tls is None else _checked_tls(*tls)
        self._idle_timeout, self._clock_skew, self._port = idle_timeout, clock_skew, port

    def _factory(self) -> Factory:
        options = self._rate_limit, self._idle_timeout, self._clock_skew, self._port
        return partial(S3Service, self._latency, replace(self._access), self._tls, *options)

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which asyncds, and the AWS tools, find the server, and keys that it takes."""
        names = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"
        place = {"AWS_ENDPOINT_URL": self.endpoint, "AWS_REGION": self._access.region or "us-east-1"}
        return place | dict(zip(names, self._keys, strict=False))

    @property
    def latency(self) -> Latency:
        """Seconds before each answer; an assignment holds for the requests that arrive after it."""
        return self._latency

    @latency.setter
    def latency(self, seconds: Latency) -> None:
        self._call("set_latency", checked(seconds))
        self._latency = seconds

    @property
    def clock_skew(self) -> float:
        """Seconds by which the server's clock is ahead, or behind if negative; an assignment holds from then on."""
        return self._clock_skew

    @clock_skew.setter
    def clock_skew(self, seconds: float) -> None:
        self._call("set_clock_skew", seconds)
        self._clock_skew = seconds

    def change_certificate(self, certificate: str | os.PathLike[str], key: str | os.PathLike[str]) -> None:
        """Show another certificate from now on, to those who connect."""
        self._call("set_certificate", *_checked_tls(certificate, key))

    def change_credentials(self, *credentials: str) -> None:
        """Accept this access key and secret key (and session token) from now on, and none that were before.

        Requests with the session token of those before are answered by `ExpiredToken`.
        """
        if len(credentials) not in (2, 3):
            raise ConfigurationError("credentials are an access key, a secret key and perhaps a session token")
        self._call("set_credentials", credentials)
        self._keys = credentials

    @property
    def stats(self) -> ServerStats:
        """Return the counts as they are now."""
        stats: ServerStats = self._call("snapshot")
        return stats

    def reset_counts(self) -> None:
        """Set every count to zero, and `max_in_flight` to what is in flight now."""
        self._call("reset_counts")

    def create_bucket(self, name: str) -> None:
        """Create a bucket; one that exists stays as it is."""
        self._call("create_bucket", name)

    def put(self, bucket: str, key: str, body: bytes) -> str:
        """Store one object without HTTP, creating its bucket where needed; return its ETag, quoted."""
        return self.put_many(bucket, {key: body})[0]

    def put_many(self, bucket: str, objects: Mapping[str, bytes]) -> list[str]:
        """Store many objects without HTTP; return their ETags in the mapping's order."""
        self.create_bucket(bucket)
        etags: list[str] = []
        for batch in _batches(objects):
            etags += self._call("put_many", bucket, batch)
        return etags

    def derive(self, bucket: str, count: int, size: int, *, prefix: str = "") -> None:
        """Make a bucket of `count` objects of `size` bytes that take no memory, since they follow from their keys.

        Their keys are the prefix and a number from 0 on, with zeros in front, as `f"{prefix}{number:06}"` for a
        million. Each body is `body_of(key, size)`. What the bucket had is gone, and it takes nothing else.
        """
        if count < 1 or size < 0:
            raise ConfigurationError(f"a bucket of {count} objects of {size} bytes cannot be")
        self._call("derive", bucket, count, size, prefix)

    def delete(self, bucket: str, key: str) -> None:
        """Delete one object without HTTP; one that is not there is no error."""
        self._call("delete", bucket, key)

    def script(
        self,
        bucket: str,
        key: str | None,
        steps: Iterable[Fault],
        *,
        operation: str = "GET",
        shared: bool = False,
        forever: bool = False,
    ) -> None:
        """Let the n-th request from now meet the n-th step, and succeed once the steps are used up.

        With `key=None` that holds for every key of the bucket without a script of its own: each key goes through the
        steps by itself, or with `shared=True` the requests share them in order of arrival. With `forever=True` the last
        step repeats. `operation` is one of those that `ServerStats.requests` counts; for those on buckets (LIST and
        others) `key` is None. `Fault()` is a step that succeeds. A new script replaces the old one.
        """
        steps = tuple(steps)
        if forever and not steps:
            raise ConfigurationError("a script that repeats its last step needs at least one")
        self._call("script", operation, bucket, key, steps, shared, forever)

    def clear_scripts(self) -> None:
        """Forget every script."""
        self._call("clear_scripts")


def _checked_tls(certificate: str | os.PathLike[str], key: str | os.PathLike[str]) -> tuple[str, str]:
    paths = os.path.abspath(certificate), os.path.abspath(key)
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(*paths, password="")  # ask nobody
    except OSError as error:  # an SSLError is one
        raise ConfigurationError(f"tls: {paths[0]} and {paths[1]} are no certificate and its key: {error}") from error
    return paths


def _batches(objects: Mapping[str, bytes]) -> Iterable[dict[str, bytes]]:
    """Split objects so that one message to the server stays far below the memory of a machine."""
    batch: dict[str, bytes] = {}
    size = 0
    for key, body in objects.items():
        batch[key] = body
        size += len(body) + len(key)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = {}, 0
    yield batch
