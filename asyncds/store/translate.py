"""Errors of botocore and aiohttp as errors of asyncds: the one place where they meet."""

import asyncio
import email.utils
import ssl
import time
from datetime import UTC
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from asyncds.errors import (
    AccessDenied,
    AsyncdsError,
    BucketNotFound,
    ConfigurationError,
    EndpointUnreachable,
    EndpointUntrusted,
    ObjectChanged,
    ObjectNotFound,
    StoreError,
    TransferFailed,
)
from asyncds.store.connection import NOT_USED
from asyncds.store.masking import said
from asyncds.store.wire import BrokenConnection, NoConnection

__all__ = ["has_expired", "status_error", "translate"]

_DENIED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "403", "401"}
_WRONG_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken"}  # whatever the policy says
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}
_UNREACHABLE = (
    boto.EndpointConnectionError,
    boto.ConnectTimeoutError,
    boto.ProxyConnectionError,
)
_BROKEN = (
    boto.HTTPClientError,
    boto.IncompleteReadError,
    boto.ResponseStreamingError,
    boto.FlexibleChecksumError,
    aiohttp.ClientError,
    asyncio.TimeoutError,
    OSError,
)
_SPEAKS_TLS = "if the server speaks TLS: write https:// in the endpoint, or MINIO_SECURE=true"
_NO_BUCKET = "this cannot be a bucket's name: that has 3 to 63 small letters, digits, dots and hyphens"
_SET_KEYS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; or, without AWS_ENDPOINT_URL, MINIO_URL and its "
    "keys, in the environment or in the .env file of this folder"
)
_NO_CREDENTIALS = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError)


def translate(error: Exception, what: str, hint: str = "", where: str = "this endpoint") -> AsyncdsError:
    """Return the error to raise; `what` names the object, listing or bucket, `hint` whose keys were sent, and `where`
    the endpoint. What an answer says is masked in `error`, too, which will be the cause of the other."""
    translated = _translated(error, what, hint, where)
    _mask(error)
    return translated


def _mask(error: BaseException | None) -> None:
    """Mask an error of botocore's, and those from which it comes, which may be in a circle."""
    seen = set[int]()
    while error is not None and not isinstance(error, AsyncdsError) and id(error) not in seen:
        seen.add(id(error))
        error.args = tuple(said(argument) if isinstance(argument, str) else argument for argument in error.args)
        if isinstance(message := getattr(error, "message", None), str):
            error.message = said(message)  # type: ignore[attr-defined]
        if isinstance(error, boto.ClientError):
            told = {name: said(value) for name, value in error.response.get("Error", {}).items()}
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            error.response = {"Error": told, "ResponseMetadata": {"HTTPStatusCode": status}}
        error = error.__cause__ or error.__context__


def _translated(error: Exception, what: str, hint: str, where: str) -> AsyncdsError:
    inner = getattr(error, "kwargs", {}).get("error")
    for known in (error, inner):
        if isinstance(known, AsyncdsError):
            return known if what in str(known) or type(known) is not StoreError else StoreError(f"{what}: {known}")
        if isinstance(known, BrokenConnection):
            return TransferFailed(f"{what}: the connection broke ({known})")
    if isinstance(error, boto.ClientError):
        return _of_response(error.response, what, hint, where)
    if any(sign in f"{error} {_reason(error)}" for sign in ("WRONG_VERSION_NUMBER", "RECORD_LAYER")):
        remedy = "write http:// in the endpoint, or MINIO_SECURE=false"
        return ConfigurationError(f"{what}: the server speaks plain http, not TLS; {remedy}")
    if _is_untrusted(error):
        return EndpointUntrusted(f"{what}: TLS is refused ({_reason(error)}); check the host name, or AWS_CA_BUNDLE")
    if isinstance(error, boto.SSLError):
        return StoreError(f"{what}: TLS is refused ({_reason(error)})")
    if isinstance(error, NoConnection):
        return _unreachable(f"{what}: no connection to {error} ({_reason(error)})", hint)
    if isinstance(error, _UNREACHABLE):
        return _unreachable(f"{what}: no connection to {_host(error)}", hint)
    if isinstance(error, ResponseParserError):
        return TransferFailed(f"{what}: the answer is not S3's").because("check that the endpoint is an S3 server")
    if isinstance(error, _BROKEN):
        failed = TransferFailed(f"{what}: the transfer broke ({type(error).__name__})")
        return failed.because(_SPEAKS_TLS) if _may_be_tls(error, what, where) else failed
    if isinstance(error, _NO_CREDENTIALS):
        return AccessDenied(f"{what}: no credentials; {_SET_KEYS}")
    if isinstance(error, boto.ParamValidationError) and "bucket name" in str(error):
        return ConfigurationError(f"{what}: {_NO_BUCKET}")
    if isinstance(error, boto.BotoCoreError):
        return ConfigurationError(f"{what}: {' '.join(str(error).split())}")
    return StoreError(f"{what}: {type(error).__name__}: {error}")


def _is_untrusted(error: Exception) -> bool:
    """Whether it is the certificate that is refused, on either lane."""
    inner = getattr(error, "kwargs", {}).get("error")
    refusals = (ssl.SSLCertVerificationError, aiohttp.ClientConnectorCertificateError)
    return isinstance(error.__cause__, refusals) or isinstance(inner, refusals)


def _unreachable(message: str, hint: str) -> AsyncdsError:
    error = EndpointUnreachable(message)
    return error.because(hint) if hint.startswith(NOT_USED) else error


def _of_response(response: Any, what: str, hint: str, where: str) -> AsyncdsError:
    error, status = response.get("Error", {}), response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if error.get("Code") == "RequestTimeTooSkewed":
        return _other_time(response, what, where)
    code, message = said(error.get("Code", status)), said(error.get("Message", ""))
    after = str(response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after", ""))
    return status_error(status, code, what, message, hint, where, after)


def has_expired(response: Any) -> bool:
    """Whether an answer, as botocore has read it, says that the session token was good once."""
    return response.get("Error", {}).get("Code") in _EXPIRED


def _other_time(response: Any, what: str, where: str) -> AsyncdsError:
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    theirs = said(response["Error"].get("ServerTime") or headers.get("date", "another time"))
    ours = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    told = f"{what}: 403 RequestTimeTooSkewed: it is {theirs} at {where}, and {ours} here"
    return AccessDenied(f"{told}; set the clock of whichever is wrong")


def status_error(
    status: int,
    code: str,
    what: str,
    message: str = "",
    hint: str = "",
    where: str = "this endpoint",
    retry_after: str = "",
) -> AsyncdsError:
    """Return the error that an HTTP status and S3's error code stand for; `retry_after` is the header of that name."""
    told = f"{what}: {status} {code}" if code not in ("", str(status)) else f"{what}: status {status}"
    if code == "NoSuchBucket":
        return BucketNotFound(f"{what}: the bucket does not exist at {where}; check its name and the endpoint")
    if code == "PreconditionFailed" or status == 412:
        return ObjectChanged(f"{what}: the object changed")
    if code == "NoSuchKey" or status == 404:
        return ObjectNotFound(f"{what}: the object does not exist")
    if status == 501:
        error = StoreError(f"{told}{f' ({message})' if message else ''} from {where}")
        return error.because("the server cannot do what is asked, perhaps because it is too old: update it")
    if status in (408, 429) or status >= 500 or code in ("RequestTimeout", "SlowDown", "InternalError"):
        failed = TransferFailed(told).because("lower ASYNCDS_CONCURRENCY, or try again later")
        failed.retry_after = _seconds(retry_after)
        return failed
    if code in _EXPIRED:
        remedy = "get new AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or a profile that renews them"
        return AccessDenied(f"{told} from {where}: the session token has expired; {remedy}")
    if code in _DENIED or status in (401, 403):
        detail = f" ({message.rstrip('.')})" if message else ""
        policy = "" if code in _WRONG_KEYS else " and the bucket's policy"
        return AccessDenied(f"{told}{detail} from {where}; {hint or 'check the credentials'}{policy}")
    if code == "InvalidBucketName":
        return ConfigurationError(f"{what}: {_NO_BUCKET}")
    error = StoreError(f"{told}{f' ({message})' if message else ''}")
    return error.because(_SPEAKS_TLS) if code == "400" and where.startswith("http://") else error


def _may_be_tls(error: Exception, what: str, where: str) -> bool:
    """Whether this is what plain HTTP to a server that expects TLS looks like: it closes the connection unasked."""
    return isinstance(error, boto.ConnectionClosedError) and what.startswith("listing") and where.startswith("http://")


def _seconds(retry_after: str) -> float:
    """A number of seconds, or those until a date (RFC 9110, 10.2.3); 0 for what is neither, or over."""
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after[:9])
    try:
        date = email.utils.parsedate_to_datetime(retry_after)
        return max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _host(error: Exception) -> str:
    """`host:port` of the endpoint that could not be reached."""
    parts = urlsplit(str(getattr(error, "kwargs", {}).get("endpoint_url", "")))
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return f"{parts.hostname}:{port}" if parts.hostname else "the endpoint"


def _reason(error: Exception) -> str:
    """What the operating system, or the TLS library, says about it."""
    inner = getattr(error, "kwargs", {}).get("error") or error.__cause__ or error
    return getattr(inner, "strerror", None) or " ".join(str(inner).split())[:200] or type(inner).__name__
