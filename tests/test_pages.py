"""Pages of a listing that are read without botocore's parser: what is not plain is left to it; both read the same."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from botocore.parsers import ResponseParserError
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncds.errors import TransferFailed
from asyncds.manifest import ObjectInfo
from asyncds.recipe import StoreRecipe
from asyncds.retry import Retry
from asyncds.store import pages
from asyncds.testing.s3 import _escape, _url_encode

MD5 = "0123456789abcdef" * 2
DATE = "<LastModified>2026-01-01T00:00:00Z</LastModified>"
PLAIN = f"<Contents><Key>a</Key>{DATE}<ETag>&quot;{MD5}&quot;</ETag><Size>7</Size></Contents>"
FOUND = [ObjectInfo("b", "a", 7, MD5)]


def page_of(contents, head='<?xml version="1.0" encoding="UTF-8"?>', name="ListBucketResult", more=""):
    text = f"{head}<{name} xmlns='http://s3.amazonaws.com/doc/2006-03-01/'><EncodingType>url</EncodingType>{contents}{more}"
    return f"{text}</{name}>".encode()


class Model:
    name = "ListObjectsV2"


def read_at_once(body, status=200, model=Model):
    """What is read here, and what is left of the page for botocore; None if it is to read all of it."""
    response, found = {"status_code": status, "body": body}, {}
    pages._read_contents(model, response, found)
    return None if response["body"] == body else (found["Contents"], response["body"])


@asynccontextmanager
async def serving(body):
    """A server that answers everything with this page, and a store that asks it."""

    async def handle(reader, writer):
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                head = f"HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
                writer.write(head.encode() + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    store = StoreRecipe.of(endpoint=endpoint, region="us-east-1", unsigned=True).make(2, Retry(0, 5, 5))
    try:
        yield store
    finally:
        await store.aclose()
        server.close()


async def listed(body):
    async with asyncio.timeout(20), serving(body) as store:
        return await store.page("b", "")


async def listed_by_botocore(body, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pages, "_CONTENTS", pages.re.compile(b"(?!)"))  # nothing is found, as on a page that is odd
        return await listed(body)


AT_ONCE = {
    "plain": (PLAIN, FOUND),
    "ETag in entities of numbers": (PLAIN.replace("&quot;", "&#34;"), FOUND),
    "ETag in quotes": (PLAIN.replace("&quot;", '"'), FOUND),
    "no ETag": ("<Contents><Key>a</Key><Size>7</Size></Contents>", [ObjectInfo("b", "a", 7, None)]),
    "key in URL encoding": (PLAIN.replace("<Key>a", "<Key>%26%0D%0A%C3%A9+%2B"), [ObjectInfo("b", "&\r\né +", 7, MD5)]),
    "key that is no ASCII": (PLAIN.replace("<Key>a", "<Key>é"), [ObjectInfo("b", "é", 7, MD5)]),
    "line ends between": (PLAIN.replace("><", ">\n  <"), FOUND),
    "owner": (PLAIN.replace("</Size>", "</Size><Owner><ID>x</ID><DisplayName>Key</DisplayName></Owner>"), FOUND),
    "two": (PLAIN + PLAIN.replace("<Key>a", "<Key>b"), [*FOUND, ObjectInfo("b", "b", 7, MD5)]),
}
LEFT = {
    "entity in a key": (PLAIN.replace("<Key>a", "<Key>a&amp;b"), [ObjectInfo("b", "a&b", 7, MD5)]),
    "reference in a key": (PLAIN.replace("<Key>a", "<Key>a&#233;"), [ObjectInfo("b", "aé", 7, MD5)]),
    "line end of Windows in a key": (PLAIN.replace("<Key>a", "<Key>a\r\nb"), [ObjectInfo("b", "a\nb", 7, MD5)]),
    "other entity in an ETag": (PLAIN.replace(MD5, "x&amp;y"), [ObjectInfo("b", "a", 7, "x&y")]),
    "section of characters": (PLAIN.replace("<Key>a", "<Key><![CDATA[a<b]]>"), [ObjectInfo("b", "a<b", 7, MD5)]),
    "comment in a key": (PLAIN.replace("<Key>a", "<Key><!-- x -->a"), FOUND),
    "attribute": (PLAIN.replace("<Contents>", "<Contents id='1'>"), FOUND),
    "attribute of a key": (PLAIN.replace("<Key>", "<Key id='1'>"), FOUND),
    "only one of two is plain": (PLAIN + PLAIN.replace("<Key>a", "<Key>&lt;"), [*FOUND, ObjectInfo("b", "<", 7, MD5)]),
}


@pytest.mark.parametrize("case", [*AT_ONCE, *LEFT])
async def test_page_is_read_as_botocore_reads_it(case, monkeypatch):
    contents, expected = (AT_ONCE | LEFT)[case]
    more = "<IsTruncated>true</IsTruncated><NextContinuationToken>t&amp;1</NextContinuationToken>"
    body = page_of(contents, more=more)
    assert (read_at_once(body) is not None) == (case in AT_ONCE)
    found = await listed(body)
    assert (found.objects, found.token) == (expected, "t&1")
    assert found == await listed_by_botocore(body, monkeypatch)


@pytest.mark.parametrize(
    ("body", "status", "operation"),
    [
        (page_of("<Contents><Size>7</Size></Contents>"), 200, "ListObjectsV2"),
        (page_of("<Contents><Key>a</Key></Contents>"), 200, "ListObjectsV2"),
        (page_of(PLAIN.replace(">7<", ">many<")), 200, "ListObjectsV2"),
        (page_of(PLAIN.replace(">7<", "><")), 200, "ListObjectsV2"),
        (page_of(PLAIN)[:-60], 200, "ListObjectsV2"),
        (page_of(PLAIN, name="Error"), 200, "ListObjectsV2"),
        (page_of(PLAIN), 503, "ListObjectsV2"),
        (page_of(PLAIN), 200, "ListObjects"),
        (page_of(PLAIN).replace(b"<Key>a", b"<Key>\xff"), 200, "ListObjectsV2"),
        (page_of(""), 200, "ListObjectsV2"),
    ],
)
def test_what_is_no_plain_page_is_left_as_it_is(body, status, operation):
    class Other:
        name = operation

    assert read_at_once(body, status, Other) is None


@pytest.mark.parametrize("encoding", ["utf-8", "ISO-8859-1", "unknown"])
async def test_page_is_read_as_utf8_whatever_it_says_as_botocore_does(encoding, monkeypatch):
    head = f"<?xml version='1.0' encoding='{encoding}'?>"
    page = page_of(PLAIN.replace("<Key>a", "<Key>é"), head=head, more="<IsTruncated>false</IsTruncated>")
    assert read_at_once(page) is not None
    assert [info.key for info in (await listed(page)).objects] == ["é"]
    assert await listed(page) == await listed_by_botocore(page, monkeypatch)
    with pytest.raises(TransferFailed):
        await listed(page.decode().encode("latin-1"))


OTHER_BYTES = [page_of(PLAIN).decode().encode(encoding) for encoding in ("utf-16", "utf-16-be", "utf-32", "cp037")]


@pytest.mark.parametrize("body", [b"", b"<html>no</html>", *OTHER_BYTES])
async def test_what_is_neither_a_page_nor_an_error_is_not_taken_for_an_empty_bucket(body):
    with pytest.raises(ResponseParserError, match="no listing"):
        read_at_once(body)
    with pytest.raises(TransferFailed, match="listing s3://b/: "):
        await listed(body)


@pytest.mark.parametrize("body", [page_of(PLAIN)[:-9], page_of(PLAIN.replace("</Key>", "")), b"<html>no</html"])
async def test_page_that_is_cut_short_or_broken_is_an_error(body):
    with pytest.raises(TransferFailed, match="listing s3://b/: "):
        await listed(body)


def test_what_else_is_on_a_page_is_left_for_botocore():
    body = page_of(PLAIN, more="<KeyCount>1</KeyCount><CommonPrefixes><Prefix>x/</Prefix></CommonPrefixes>")
    entries, left = read_at_once(body)
    assert entries == [{"Key": "a", "Size": 7, "ETag": f'"{MD5}"'}]
    assert left == body.replace(PLAIN.encode(), b"")


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1, max_size=9), st.integers(0, 2**40), st.text("0-9a\"'&<é", max_size=9))))
def test_any_key_and_etag_comes_back_where_it_is_read_at_once(rows):
    texts = [
        f"<Contents><Key>{_escape(_url_encode(key))}</Key><ETag>{_escape(etag)}</ETag><Size>{size}</Size></Contents>"
        for key, size, etag in rows
        if key.isprintable()
    ]
    found = read_at_once(page_of("".join(texts)))
    if found is not None:
        expected = [(_url_encode(key), size, etag) for key, size, etag in rows if key.isprintable()]
        assert [(entry["Key"], entry["Size"], entry["ETag"]) for entry in found[0]] == expected
