"""Whether a request is signed as AWS wants it: Signature Version 4, recomputed from what arrived.

Written from AWS's description ("Signature Version 4 signing process") and from nothing of asyncds, so that its own
signer is checked by something else. Chunks of an upload that are signed one by one are not looked at.
"""

import calendar
import hashlib
import hmac
import re
import time
from dataclasses import dataclass
from urllib.parse import quote, unquote, unquote_to_bytes

from asyncds.testing.s3 import S3Error
from asyncds.testing.wire import Request

_ALGORITHM = "AWS4-HMAC-SHA256"
_FIELD = re.compile(r"(Credential|SignedHeaders|Signature)=([^,\s]+)")
_MAX_SKEW_S = 15 * 60
_MAX_LIFE_S = 7 * 24 * 3600
_STAMP = "%Y%m%dT%H%M%SZ"
_UNSIGNED = "UNSIGNED-PAYLOAD"


@dataclass(frozen=True, slots=True)
class Signed:
    """What a request says of its signature."""

    access_key: str
    scope: tuple[str, str, str, str]
    stamp: str
    headers: tuple[str, ...]
    signature: str
    expires: int | None = None
    """Seconds for which a presigned URL holds."""

    @property
    def region(self) -> str:
        return self.scope[1]


def read(request: Request) -> Signed | None:
    """Return what is said of the signature, None where the request has none. Raises `S3Error` for half of one."""
    authorization = _header(request, "authorization")
    if request.query.get("X-Amz-Algorithm") == _ALGORITHM:
        query = request.query
        stamp, life = query.get("X-Amz-Date", ""), query.get("X-Amz-Expires", "")
        if not (re.fullmatch("[0-9]{1,6}", life) and 0 < int(life) <= _MAX_LIFE_S):
            raise S3Error("AuthorizationQueryParametersError", "X-Amz-Expires is between 1 and 604800 seconds")
        names, signature = query.get("X-Amz-SignedHeaders", ""), query.get("X-Amz-Signature", "")
        return _signed(query.get("X-Amz-Credential", ""), names, signature, stamp, int(life))
    if not authorization:
        return None
    if not authorization.startswith(_ALGORITHM):
        raise S3Error("InvalidRequest", f"The authorization mechanism is not supported: use {_ALGORITHM}")
    said = dict(_FIELD.findall(authorization))
    names, signature = said.get("SignedHeaders", ""), said.get("Signature", "")
    return _signed(said.get("Credential", ""), names, signature, _header(request, "x-amz-date"), None)


def _signed(credential: str, names: str, signature: str, stamp: str, expires: int | None) -> Signed:
    malformed = "AuthorizationHeaderMalformed" if expires is None else "AuthorizationQueryParametersError"
    if not _is_text(credential + names + signature):
        raise S3Error(malformed, "What is said of the signature is no UTF-8")
    access_key, *scope = credential.rsplit("/", 4)
    if len(scope) != 4 or scope[2:] != ["s3", "aws4_request"]:
        raise S3Error(malformed, "The credential is not KEY/DATE/REGION/s3/aws4_request")
    day, region, service, end = scope
    return Signed(access_key, (day, region, service, end), stamp, tuple(names.split(";")), signature, expires)


def _is_text(header: str) -> bool:
    """Whether it came as UTF-8: what did not is kept as surrogates, which nobody can send back."""
    return not any("\ud800" <= letter <= "\udfff" for letter in header)


def verify(request: Request, signed: Signed, secret_key: str, now: float) -> None:
    """Raise the `S3Error` with which AWS would refuse the request at the time `now`."""
    _check_time(signed, now)
    _check_headers(request, signed)
    canonical = _canonical(request, signed)
    hashed = hashlib.sha256(canonical.encode("utf-8", "surrogateescape")).hexdigest()
    to_sign = "\n".join((_ALGORITHM, signed.stamp, "/".join(signed.scope), hashed))
    key = f"AWS4{secret_key}".encode()
    for part in signed.scope:
        key = hmac.digest(key, part.encode(), "sha256")
    if hmac.digest(key, to_sign.encode(), "sha256").hex() != signed.signature:
        details = {"AWSAccessKeyId": signed.access_key, "SignatureProvided": signed.signature}
        details |= {"StringToSign": to_sign, "CanonicalRequest": canonical.encode("utf-8", "replace").decode()}
        raise S3Error("SignatureDoesNotMatch", details=details)
    claimed = _payload_hash(request, signed)
    if re.fullmatch("[0-9a-f]{64}", claimed) and claimed != hashlib.sha256(request.body).hexdigest():
        raise S3Error("XAmzContentSHA256Mismatch")


def _check_time(signed: Signed, now: float) -> None:
    try:
        made = calendar.timegm(time.strptime(signed.stamp, _STAMP))
    except ValueError:
        raise S3Error("AccessDenied", "AWS authentication requires a valid Date or x-amz-date header") from None
    if signed.scope[0] != signed.stamp[:8]:
        raise S3Error("SignatureDoesNotMatch", "The date of the credential is not that of the request")
    server_time = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
    if signed.expires is None and abs(made - now) > _MAX_SKEW_S:
        details = {"RequestTime": signed.stamp, "ServerTime": server_time}
        details["MaxAllowedSkewMilliseconds"] = str(_MAX_SKEW_S * 1000)
        raise S3Error("RequestTimeTooSkewed", details=details)
    if signed.expires is not None and made - now > _MAX_SKEW_S:
        raise S3Error("AccessDenied", "Request is not valid yet", details={"ServerTime": server_time})
    if signed.expires is not None and now > made + signed.expires:
        details = {"X-Amz-Expires": str(signed.expires), "ServerTime": server_time}
        raise S3Error("AccessDenied", "Request has expired", details=details)


def _check_headers(request: Request, signed: Signed) -> None:
    if signed.expires is None and b"x-amz-content-sha256" not in request.headers:
        raise S3Error("MissingSecurityHeader", details={"MissingHeaderName": "x-amz-content-sha256"})
    names = (name.decode("latin-1") for name in request.headers)
    unsigned = [name for name in names if (name == "host" or name.startswith("x-amz-")) and name not in signed.headers]
    if unsigned:
        message = "There were headers present in the request which were not signed"
        raise S3Error("AccessDenied", message, details={"HeadersNotSigned": ", ".join(unsigned)})


def _canonical(request: Request, signed: Signed) -> str:
    path, _, query = request.target.partition("?")
    pairs = (pair.partition("=") for pair in query.split("&") if pair)
    encoded = sorted((_encoded(name), _encoded(value)) for name, _, value in pairs)
    parts = [f"{name}={value}" for name, value in encoded if name != "X-Amz-Signature"]
    lines = [f"{name}:{' '.join(_header(request, name).split())}\n" for name in signed.headers]
    names = ";".join(signed.headers)
    path = quote(unquote_to_bytes(path), safe="/~")
    payload = _payload_hash(request, signed)
    return "\n".join((request.method, path, "&".join(parts), "".join(lines), names, payload))


def _payload_hash(request: Request, signed: Signed) -> str:
    return _header(request, "x-amz-content-sha256") or (_UNSIGNED if signed.expires is not None else "")


def _encoded(text: str) -> str:
    return quote(unquote(text, errors="surrogateescape"), safe="~", errors="surrogateescape")


def _header(request: Request, name: str) -> str:
    return request.headers.get(name.encode(), b"").decode("utf-8", "surrogateescape")
