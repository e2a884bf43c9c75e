"""Errors of botocore and aiohttp as errors of asyncds: the one place where they meet."""

import asyncio
import ssl
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
    ObjectChanged,
    ObjectNotFound,
    StoreError,
    TransferFailed,
)
from asyncds.store.connection import NOT_USED
from asyncds.store.wire import BrokenConnection, NoConnection

__all__ = ["status_error", "translate"]

_DENIED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "403", "401"}
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
_NO_BUCKET = "this cannot be a bucket's name: that has 3 to 63 small letters, digits, dots and hyphens"
_NO_CREDENTIALS = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError)


def translate(error: Exception, what: str, hint: str = "", where: str = "this endpoint") -> AsyncdsError:
    """Return the error to raise; `what` names the object, listing or bucket, `hint` whose keys were sent, and `where`
    the endpoint."""
    inner = getattr(error, "kwargs", {}).get("error")
    for known in (error, inner):
        if isinstance(known, AsyncdsError):
            return known
    if isinstance(error, boto.ClientError):
        return _of_response(error.response, what, hint, where)
    if any(sign in f"{error} {_reason(error)}" for sign in ("WRONG_VERSION_NUMBER", "RECORD_LAYER")):
        remedy = "write http:// in the endpoint, or MINIO_SECURE=false"
        return ConfigurationError(f"{what}: the server speaks plain http, not TLS; {remedy}")
    if isinstance(error, boto.SSLError) or isinstance(error.__cause__, ssl.SSLCertVerificationError):
        return StoreError(f"{what}: TLS is refused ({_reason(error)}); check the host name, or AWS_CA_BUNDLE")
    if isinstance(error, NoConnection):
        return _unreachable(f"{what}: no connection to {error} ({_reason(error)})", hint)
    if isinstance(error, _UNREACHABLE):
        return _unreachable(f"{what}: no connection to {_host(error)}", hint)
    if isinstance(error, ResponseParserError):
        return TransferFailed(f"{what}: the answer is not S3's").because("check that the endpoint is an S3 server")
    if isinstance(error, BrokenConnection):
        return TransferFailed(f"{what}: the connection broke ({error})")
    if isinstance(error, _BROKEN):
        return TransferFailed(f"{what}: the transfer broke ({type(error).__name__})")
    if isinstance(error, _NO_CREDENTIALS):
        return AccessDenied(f"{what}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")
    if isinstance(error, boto.ParamValidationError) and "bucket name" in str(error):
        return ConfigurationError(f"{what}: {_NO_BUCKET}")
    if isinstance(error, boto.BotoCoreError):
        return ConfigurationError(f"{what}: {' '.join(str(error).split())}")
    return StoreError(f"{what}: {type(error).__name__}: {error}")


def _unreachable(message: str, hint: str) -> AsyncdsError:
    error = EndpointUnreachable(message)
    return error.because(hint) if hint.startswith(NOT_USED) else error


def _of_response(response: Any, what: str, hint: str, where: str) -> AsyncdsError:
    error, status = response.get("Error", {}), response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status_error(status, str(error.get("Code", status)), what, str(error.get("Message", "")), hint, where)


def status_error(
    status: int, code: str, what: str, message: str = "", hint: str = "", where: str = "this endpoint"
) -> AsyncdsError:
    """Return the error that an HTTP status and S3's error code stand for."""
    said = f"{what}: {status} {code}" if code not in ("", str(status)) else f"{what}: status {status}"
    if code == "NoSuchBucket":
        return BucketNotFound(f"{what}: the bucket does not exist at {where}; check its name and the endpoint")
    if code == "PreconditionFailed" or status == 412:
        return ObjectChanged(f"{what}: the object changed")
    if code == "NoSuchKey" or status == 404:
        return ObjectNotFound(f"{what}: the object does not exist")
    if status in (408, 429) or status >= 500 or code in ("RequestTimeout", "SlowDown", "InternalError"):
        return TransferFailed(said).because("lower ASYNCDS_CONCURRENCY, or try again later")
    if code in _DENIED or status in (401, 403):
        detail = f" ({message.rstrip('.')})" if message else ""
        return AccessDenied(f"{said}{detail} from {where}; {hint or 'check the credentials'} and the bucket's policy")
    if code == "InvalidBucketName":
        return ConfigurationError(f"{what}: {_NO_BUCKET}")
    return StoreError(f"{said}{f' ({message})' if message else ''}")


def _host(error: Exception) -> str:
    """`host:port` of the endpoint that could not be reached."""
    parts = urlsplit(str(getattr(error, "kwargs", {}).get("endpoint_url", "")))
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return f"{parts.hostname}:{port}" if parts.hostname else "the endpoint"


def _reason(error: Exception) -> str:
    """What the operating system, or the TLS library, says about it."""
    inner = getattr(error, "kwargs", {}).get("error") or error.__cause__ or error
    return getattr(inner, "strerror", None) or " ".join(str(inner).split())[:200] or type(inner).__name__
