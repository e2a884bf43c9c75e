"""What a body is compared with, beside its length: the checksum that the server has stored, or the MD5 in its ETag."""

import base64
import hashlib
import re
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Literal

from asyncds.errors import TransferFailed

__all__ = ["HowVerified", "compare_md5", "matches_checksum"]

HowVerified = Literal["checksum", "etag_md5", "length_etag"]
"""The strongest comparison of a body: with a checksum of the whole object; with its ETag, which is its MD5; or of its
length and ETag with what is known of the object.
"""

_HEADER = b"x-amz-checksum-"
_MD5 = re.compile("[0-9a-f]{32}")


def matches_checksum(headers: Mapping[bytes, bytes], body: bytes) -> bool | None:
    """Compare a body with the checksum that came along; None if there is none of a whole object that can be computed
    here."""
    for name, compute in _checksums().items():
        expected = headers.get(name)
        if expected is not None and b"-" not in expected:
            try:
                return compute(body) == base64.b64decode(expected)
            except ValueError:  # that is no base64
                return False
    return None


@cache
def _checksums() -> dict[bytes, Callable[[bytes], bytes]]:
    """What computes which header, the fastest first. Those that Python lacks come from `awscrt`, where that is there,
    as they do for botocore."""
    known: dict[bytes, Callable[[bytes], bytes]] = {}
    try:
        from awscrt import checksums
    except ImportError:
        pass
    else:
        if hasattr(checksums, "crc64nvme"):  # the younger one
            known[_HEADER + b"crc64nvme"] = lambda body: checksums.crc64nvme(body).to_bytes(8, "big")
        known[_HEADER + b"crc32c"] = lambda body: checksums.crc32c(body).to_bytes(4, "big")
    known[_HEADER + b"crc32"] = lambda body: zlib.crc32(body).to_bytes(4, "big")
    known[_HEADER + b"sha1"] = lambda body: hashlib.sha1(body, usedforsecurity=False).digest()
    known[_HEADER + b"sha256"] = lambda body: hashlib.sha256(body).digest()
    return known


def compare_md5(uri: str, etag: str | None, header: Callable[[str], str], body: bytes) -> bool:
    """Compare the MD5 of a body with its ETag, if that is one, and tell whether it is.

    It is none of an object that was put in parts, or that is encrypted by SSE-KMS or SSE-C ("Checking object integrity
    in Amazon S3"). `header` gives the value of a header of the answer, or nothing. Raises `TransferFailed`.
    """
    if etag is None or not _MD5.fullmatch(etag) or header("x-amz-server-side-encryption").startswith("aws:kms"):
        return False
    if header("x-amz-server-side-encryption-customer-algorithm"):
        return False
    found = hashlib.md5(body, usedforsecurity=False).hexdigest()
    if found != etag:
        raise TransferFailed(f"{uri}: the MD5 of what arrived is {found}, not its ETag {etag}").because(
            "if its ETag is no MD5, as where a store encrypts without saying so: leave verify_md5 off"
        )
    return True
