"""Who may ask the server: keys, tokens and regions, and signatures if that is wanted."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from asyncds.errors import ConfigurationError
from asyncds.testing.s3 import S3Error
from asyncds.testing.signing import Signed, read, verify
from asyncds.testing.wire import Request

Keys = tuple[str, str] | tuple[str, str, str]
"""Access key, secret key and, where they are temporary, session token."""


@dataclass(slots=True)
class Access:
    """What is checked: `region` and `credentials` only if they are set, signatures and times only if asked for."""

    region: str | None = None
    credentials: Keys | None = None
    signatures: bool = False
    clock: Callable[[], float] = time.time
    expired: set[str] = field(default_factory=set)
    """Session tokens that were right once."""

    def __post_init__(self) -> None:
        if self.signatures and self.credentials is None:
            raise ConfigurationError("check_signatures=True needs to know the secret: give credentials as well")

    def replace(self, credentials: Keys) -> None:
        """Take others from now on; the session token of those before has expired then."""
        if self.credentials is not None:
            self.expired.update(self.credentials[2:])
        self.expired.difference_update(credentials[2:])
        self.credentials = credentials

    def check(self, request: Request) -> None:
        """Raise the S3Error with which AWS would refuse the request."""
        if self.region is None and self.credentials is None:
            return
        signed = read(request)
        if signed is None:
            if self.credentials is not None:
                raise S3Error("AccessDenied")
            return
        if self.credentials is not None:
            self._check_keys(self.credentials, request, signed)
        if self.region is not None and signed.region != self.region:
            raise _wrong_region(signed.region, self.region)
        if self.signatures and self.credentials is not None:
            verify(request, signed, self.credentials[1], self.clock())

    def _check_keys(self, credentials: Keys, request: Request, signed: Signed) -> None:
        header = request.headers.get(b"x-amz-security-token", b"").decode("utf-8", "replace")
        given = request.query.get("X-Amz-Security-Token") or header
        if given in self.expired:
            raise S3Error("ExpiredToken", details={"Token-0": given})
        if signed.access_key != credentials[0]:
            raise S3Error("InvalidAccessKeyId", details={"AWSAccessKeyId": signed.access_key})
        if len(credentials) == 3 and given != credentials[2]:
            raise S3Error("InvalidToken", details={"Token-0": given})


def _wrong_region(given: str, expected: str) -> S3Error:
    message = f"The authorization header is malformed; the region '{given}' is wrong; expecting '{expected}'"
    return S3Error(
        "AuthorizationHeaderMalformed",
        message,
        details={"Region": expected},
        headers={"x-amz-bucket-region": expected},
    )
