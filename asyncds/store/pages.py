"""Pages of a listing, read once and without what nobody asks for: botocore takes about five times the CPU."""

import re
from typing import Any

from botocore import handlers
from botocore.parsers import ResponseParserError

__all__ = ["read_pages_first"]

_EVENT = "before-parse.s3.*"
_HEAD = 1000
_ROOTS = b"ListBucketResult", b"<Error"
# No tree is built: its elements would have the garbage collector go through all that the process has, page by page.
_CONTENTS = re.compile(rb"<Contents>(.*?)</Contents>", re.DOTALL)
_FIELD = re.compile(rb"<(Key|Size|ETag)>([^<]*)</")


def read_pages_first(events: Any) -> None:
    """Let a client's listings be read here, before botocore reads a page twice: for hidden errors, and for itself."""
    check = getattr(handlers, "_handle_200_error", None)
    if check is not None:  # its place is the first, and only those behind it are free
        events.unregister(_EVENT, check)
    events.register_first(_EVENT, _read_contents)
    if check is not None:
        events.register(_EVENT, check)


def _read_contents(
    operation_model: Any, response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any
) -> None:
    """Take the objects out of a page before botocore reads it: keys, sizes and ETags, no dates.

    All else in the page, and whatever is a page and none that is understood, is left for botocore to read and to
    complain of. Raises `ResponseParserError` for what is neither a page nor an error.
    """
    if response_dict["status_code"] != 200 or operation_model.name != "ListObjectsV2":
        return
    body = response_dict["body"]
    if not any(name in body[:_HEAD] for name in _ROOTS):  # botocore takes many a page of HTML for an error of a server
        raise ResponseParserError("this is no listing")
    found = _CONTENTS.findall(body)
    if len(found) != body.count(b"<Contents") or b"<ListBucketResult" not in body[:_HEAD]:
        return
    try:
        contents = [_entry(dict(_FIELD.findall(text))) for text in found]
    except (KeyError, ValueError):
        return
    response_dict["body"] = _CONTENTS.sub(b"", body)
    customized_response_dict["Contents"] = contents


def _entry(fields: dict[bytes, bytes]) -> dict[str, Any]:
    """Raises `KeyError` or `ValueError` where a parser has to look at it."""
    key = fields[b"Key"]
    if b"&" in key or b"\r" in key:  # keys are asked for in URL encoding, which has neither
        raise ValueError
    etag = fields.get(b"ETag", b"").replace(b"&quot;", b'"').replace(b"&#34;", b'"')
    if b"&" in etag:
        raise ValueError
    return {"Key": key.decode(), "Size": int(fields[b"Size"]), "ETag": etag.decode()}
