"""What a client of aiobotocore may not do: follow redirects, trust any host's name, read answers without end."""

import asyncio
import inspect
import ssl
from functools import partial
from typing import Any

import aiohttp
from botocore.httpsession import get_cert_path

from asyncds.errors import StoreError
from asyncds.store.masking import said
from asyncds.store.wire import BrokenConnection, Pace

__all__ = ["guard"]

_LONGEST_DOCUMENT = 16 << 20  # that is no object: a page of a listing has up to 1,000 keys, of 1 KiB
_UNGUARDED = "this version of aiobotocore cannot be guarded: install one from 2.25.1 on, below 4"


def guard(client: Any, *, follow_regions: bool) -> None:
    """Never send a signed request, and a session token with it, to anybody but the endpoint.

    aiohttp follows a `Location` to wherever it points, and aiobotocore has no switch for that, up to 3.10 at least; so
    every session of the client gets a trace that raises when it is about to. With `follow_regions`, where an answer
    names the bucket's region, the `Location` is forgotten instead: botocore then goes to the endpoint that AWS has
    there. aiohttp reads headers as UTF-8 only, and loses the connection of an answer that has others; so these are made
    so before. aiobotocore before 3.9 does not compare the host's name with its certificate, and behind a proxy verifies
    nothing; so it is given TLS contexts that do. Raises `StoreError` where there is nothing to attach that to, here or
    when the first request is to be sent.
    """
    http_session: Any = getattr(getattr(client, "_endpoint", None), "http_session", None)
    get_session = getattr(http_session, "_get_session", None)
    code = getattr(inspect.unwrap(getattr(type(http_session), "send", guard)), "__code__", None)
    if get_session is None or "_get_session" not in getattr(code, "co_names", ()):  # whose sessions are used by `send`
        raise StoreError(_UNGUARDED)
    verify = getattr(http_session, "_verify", True)
    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(partial(_refuse_redirect, follow_regions))
    timeout: float = client.meta.config.read_timeout
    trace.on_request_end.append(partial(_make_readable, timeout))
    trace.freeze()

    async def guarded(proxy: str | None) -> aiohttp.ClientSession:
        session: aiohttp.ClientSession = await get_session(proxy)
        if trace not in session.trace_configs:
            session.trace_configs.append(trace)
        connector: Any = session.connector
        context = getattr(connector, "_ssl", None)
        if verify and proxy and context is False and not getattr(http_session, "_cert_file", None):
            context = connector._ssl = ssl.create_default_context(cafile=get_cert_path(verify))
        if verify and isinstance(context, ssl.SSLContext):
            context.check_hostname = True
        elif verify:
            raise StoreError(_UNGUARDED)
        if trace not in session.trace_configs:  # it was a copy
            raise StoreError(_UNGUARDED)
        return session

    http_session._get_session = guarded


async def _refuse_redirect(
    follow_regions: bool, session: object, context: object, request: aiohttp.TraceRequestRedirectParams
) -> None:
    response: Any = request.response
    if follow_regions and response.headers.get("x-amz-bucket-region") and _forgotten(response, "Location", "URI"):
        return
    place = response.headers.get("Location", "")
    raise StoreError(f"{request.url.host} redirects to {said(place)!r}: refused; check the endpoint")


def _forgotten(response: Any, *names: str) -> bool:
    """Take these headers, which aiohttp follows, from an answer; tells whether it has none of them any more."""
    headers = response.headers.copy()
    for name in names:
        headers.popall(name, None)
    response._headers = type(response.headers)(headers)
    getattr(response, "_cache", {}).pop("headers", None)  # the property without the underscore keeps what it once gave
    return not any(name in response.headers for name in names)


async def _make_readable(timeout: float, session: object, context: object, end: aiohttp.TraceRequestEndParams) -> None:
    """Rewrite headers that are no UTF-8, as ISO 8859-1 (RFC 9110, 5.5), and bound what is read as a whole."""
    response: Any = end.response
    response.read = partial(_read_document, response, timeout)
    headers = getattr(response, "_raw_headers", None)  # the property without the underscore keeps what it once gave
    if headers is None:
        response.close()
        raise StoreError("this version of aiohttp cannot be guarded: install one from 3.11 on")
    try:
        b"".join(value for _, value in headers).decode()
    except UnicodeDecodeError:
        response._raw_headers = tuple((name, value.decode("latin-1").encode()) for name, value in headers)


async def _read_document(response: Any, timeout: float) -> bytes:
    """Read an answer that is no object, in place of aiohttp, which reads whatever comes, however slowly."""
    if response._body is None:
        pieces, pace, now = bytearray(), Pace(timeout), asyncio.get_running_loop().time
        pace.begin(now())
        try:
            async for piece in response.content.iter_any():
                pieces += piece
                pace.came(len(piece), now())
                if fault := pace.fault(now()):
                    raise BrokenConnection(fault)
                if len(pieces) > _LONGEST_DOCUMENT:
                    limit = f"{_LONGEST_DOCUMENT >> 20} MiB"
                    raise StoreError(f"{response.host} answers with more than {limit}; check that it is an S3 server")
        except BaseException:
            response.close()
            raise
        response._body = bytes(pieces)
    body: bytes = response._body
    return body
