"""What a body is compared with, beside its length: the checksum that the server has stored, or the MD5 in its ETag."""

import base64
import hashlib
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

from botocore import httpchecksum

from asyncds.errors import TransferFailed

__all__ = ["HowVerified", "can_verify", "compare_md5", "matches_checksum"]

HowVerified = Literal["checksum", "etag_md5", "length_etag"]
"""The strongest comparison of a body: with a checksum of the whole object; with its ETag, which is its MD5; or of its
length and ETag with what is known of the object.
"""

_MD5 = re.compile("[0-9a-f]{32}")


def can_verify() -> bool:
    """Whether checksums can be computed at all, as botocore would."""
    return bool(_checksums())


def matches_checksum(headers: Mapping[bytes, bytes], body: bytes) -> bool | None:
    """Compare a body with the checksum that came along; None if there is none of a whole object that botocore, as it is
    installed, can compute."""
    for name, algorithm in _checksums().items():
        expected = headers.get(name)
        if expected is not None and b"-" not in expected:
            try:
                wanted = base64.b64decode(expected)
            except ValueError:  # that is no base64
                return False
            checksum = algorithm()
            checksum.update(body)
            return bool(checksum.digest() == wanted)
    return None


@cache
def _checksums() -> dict[bytes, Any]:
    """What computes which header: all that botocore knows, which with `awscrt` is also what Python lacks."""
    known = getattr(httpchecksum, "_CHECKSUM_CLS", {})
    return {f"x-amz-checksum-{name}".encode(): algorithm for name, algorithm in known.items()}


def compare_md5(uri: str, etag: str | None, encryption: str, customer_key: str, body: bytes) -> bool:
    """Compare the MD5 of a body with its ETag, if that is one, and tell whether it is.

    It is none of an object that was put in parts, or that is encrypted otherwise than by SSE-S3 ("Checking object
    integrity in Amazon S3"): `encryption` and `customer_key` are what the answer's headers
    `x-amz-server-side-encryption` and `x-amz-server-side-encryption-customer-algorithm` say, or nothing. Raises
    `TransferFailed`.
    """
    if etag is None or not _MD5.fullmatch(etag) or encryption not in ("", "AES256") or customer_key:
        return False
    found = hashlib.md5(body, usedforsecurity=False).hexdigest()
    if found != etag:
        raise TransferFailed(f"{uri}: the MD5 of what arrived is {found}, not its ETag {etag}").because(
            "if its ETag is no MD5, as where a store encrypts without saying so: leave verify_md5 off"
        )
    return True
