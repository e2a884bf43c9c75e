"""Listing in many places at once: the same table as one page after the other, for a few more requests at most."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncds import Connection, S3Store, Settings
from asyncds.errors import AccessDenied, TransferFailed
from asyncds.fanout import list_store, midway
from asyncds.listing import list_prefix
from asyncds.manifest import ObjectInfo
from asyncds.recipe import StoreRecipe
from asyncds.retry import Retry
from asyncds.store.base import Page
from asyncds.testing import Fault, local_s3
from asyncds.testing.objects import Bucket, StoredObject


class PagedStore:
    """A store in memory whose listings begin where they are told to; it counts what it is asked."""

    def __init__(self, keys, page_size=3):
        self.endpoint, self.page_size, self.calls = "paged://", page_size, Counter()
        self.bucket = Bucket()
        for key in keys:
            self.bucket.put(key.encode(), StoredObject(key.encode()))
        self.in_flight = self.most_in_flight = 0

    def info(self, key):
        return ObjectInfo("b", key.decode(), len(key), self.bucket.objects[key].etag.strip('"'))

    async def page(self, bucket, prefix, *, after="", token=None):
        self.calls["page"] += 1
        start = (after.encode() + b"\0" if after else b"") if token is None else bytes.fromhex(token)
        return await self._answer(prefix, b"", start)

    async def folders(self, bucket, prefix):
        self.calls["folders"] += 1
        _, found = await self._answer(prefix, b"/", b"", folders=True)
        return found

    async def list(self, bucket, prefix):
        self.calls["list"] += 1
        token = None
        while True:
            page = await self.page(bucket, prefix, token=token)
            yield page.objects
            if (token := page.token) is None:
                return

    async def _answer(self, prefix, delimiter, start, folders=False):
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(0)
            page = self.bucket.page(prefix.encode(), delimiter, start, self.page_size)
            found = [self.info(key) for key in page.keys]
            if folders:
                return found, [prefix.decode() for prefix in page.prefixes]
            return Page(found, None if page.resume is None else page.resume.hex())
        finally:
            self.in_flight -= 1


async def both(store, prefix="", **options):
    """The table that a listing in many places makes, once it is the one that a listing in sequence makes."""
    store.calls.clear()
    found = await list_store(store, "b", prefix, **options)
    asked = +store.calls
    sequence = await list_prefix(store.list("b", prefix), endpoint=store.endpoint, bucket="b", prefix=prefix)
    if not options.get("match"):
        assert found.digest == sequence.digest
    return found, asked


def most(count, page_size, at_once):
    """The bound on requests that is documented."""
    pages = max(1, -(-count // page_size))
    return pages if pages == 1 else pages * 5 / 4 + at_once + 5


ODD = st.text(st.sampled_from("ab/é😀\uffff0 +%\n"), min_size=1, max_size=8)
SHAPES = st.one_of(
    st.sets(ODD, max_size=60),
    st.integers(0, 90).map(lambda count: {f"img_{i:06}.png" for i in range(count)}),
    st.integers(0, 90).map(lambda count: {f"train/n{i % 7:04}/{i:06}" for i in range(count)}),
    st.integers(0, 90).map(lambda count: {f"{i * 2654435761 % 2**32:08x}" for i in range(count)}),
    st.integers(0, 90).map(lambda count: {f"a/b/c/d/e/{i}/x" for i in range(count)}),
)


@settings(max_examples=200, deadline=None)
@given(SHAPES, st.integers(1, 7), st.integers(2, 9), st.sampled_from(["", "a", "train/", "train/n0003/", "img", "é"]))
def test_table_is_that_of_a_listing_in_sequence_within_the_bound(keys, page_size, at_once, prefix):
    store = PagedStore(keys, page_size)
    found, asked = asyncio.run(both(store, prefix, at_once=at_once))
    assert asked.total() <= most(len(found) + sum(found.left_out.values()), page_size, at_once)
    assert "list" not in asked
    assert store.most_in_flight <= at_once
    assert store.in_flight == 0


@pytest.mark.parametrize(
    "keys",
    [
        [f"train/n{i % 40:04}/{i:06}" for i in range(900)],
        [f"{i * 2654435761 % 2**32:08x}" for i in range(900)],
        [f"{i:06}/a" for i in range(900)],
    ],
)
async def test_many_requests_are_in_flight_at_once(keys):
    store = PagedStore(keys)
    await both(store, at_once=8)
    assert store.most_in_flight == 8


class PagedBy16(PagedStore):
    """It lists in the order of UTF-16, where what lies above U+FFFF comes before U+E000."""

    def __init__(self, keys, page_size):
        super().__init__([], page_size)
        for key in keys:
            self.bucket.put(key.encode("utf-16-be"), StoredObject(key.encode()))

    def info(self, key):
        return ObjectInfo("b", key.decode("utf-16-be"), len(key), self.bucket.objects[key].etag.strip('"'))

    async def page(self, bucket, prefix, *, after="", token=None):
        self.calls["page"] += 1
        start = (after.encode("utf-16-be") + b"\0" if after else b"") if token is None else bytes.fromhex(token)
        return await self._page(prefix, "", start)

    async def folders(self, bucket, prefix):
        self.calls["folders"] += 1
        return (await self._page(prefix, "/", b"")).objects

    async def _page(self, prefix, delimiter, start):
        await asyncio.sleep(0)
        page = self.bucket.page(prefix.encode("utf-16-be"), delimiter.encode("utf-16-be"), start, self.page_size)
        if delimiter:
            return Page([name.decode("utf-16-be") for name in page.prefixes], None)
        return Page([self.info(key) for key in page.keys], None if page.resume is None else page.resume.hex())


@settings(max_examples=200, deadline=None)
@given(st.sets(st.text(st.sampled_from("ab/😀\ue000\uffff"), min_size=1, max_size=4), max_size=60), st.integers(1, 7))
def test_no_key_is_lost_of_a_store_that_lists_in_the_order_of_utf16(keys, page_size):
    counts = []
    found, _ = asyncio.run(both(PagedBy16(keys, page_size), at_once=9, progress=counts.append))
    assert [info.key for info in found] == sorted(key for key in keys if not key.endswith("/"))
    assert sum(counts) == len(keys)


async def test_key_that_goes_while_many_are_listed_does_not_make_it_begin_anew():
    class Losing(PagedStore):
        async def page(self, bucket, prefix, *, after="", token=None):
            page = await super().page(bucket, prefix, after=after, token=token)
            for info in page.objects[: after != ""]:  # is there no more when the range before comes to it
                self.bucket.delete(info.key.encode())
            return page

    store = Losing([f"n{i % 40:04}/{i:06}" for i in range(900)])
    await list_store(store, "b", "", at_once=8)
    assert store.calls["list"] == 0


async def test_one_page_takes_one_request():
    _, asked = await both(PagedStore([f"{i}/x" for i in range(7)], page_size=8))
    assert asked == {"page": 1}


async def test_markers_and_filtered_keys_are_counted_and_progress_adds_up():
    keys, counts = [f"d{i}/{name}" for i in range(30) for name in ("", "a.png", "b.txt")], []
    found, _ = await both(PagedStore(keys), match="*.png", progress=counts.append)
    assert [info.key for info in found] == sorted(key for key in keys if key.endswith("png"))
    assert found.left_out == {"markers": 30, "filtered": 30}
    assert sum(counts) == len(keys)


async def test_limit_and_directory_buckets_are_listed_in_sequence():
    store = PagedStore([f"{i}/x" for i in range(20)])
    assert len(await list_store(store, "b", "", limit=4)) == 4
    assert store.calls == {"list": 1, "page": 2}
    store.calls.clear()
    await list_store(store, "b--use1-az4--x-s3", "")
    assert store.calls["list"] == 1


class Deaf(PagedStore):
    """It begins at the beginning, whatever it is told."""

    async def page(self, bucket, prefix, *, after="", token=None):
        return await super().page(bucket, prefix, token=token)


class Backward(PagedStore):
    """Its pages are not in order."""

    async def page(self, bucket, prefix, *, after="", token=None):
        page = await super().page(bucket, prefix, after=after, token=token)
        return page._replace(objects=page.objects[::-1])


@pytest.mark.parametrize("kind", [Deaf, Backward])
async def test_store_that_is_in_no_order_is_listed_in_sequence(kind):
    counts = []
    found, asked = await both(kind([f"{i:02}/x" for i in range(40)]), progress=counts.append)
    assert [info.key for info in found] == [f"{i:02}/x" for i in range(40)]
    assert asked["list"] == 1
    assert sum(counts) == 40


class Failing(PagedStore):
    """One branch fails, when others are under way and hang."""

    error = AccessDenied("page 7")

    async def page(self, bucket, prefix, *, after="", token=None):
        page = await super().page(bucket, prefix, after=after, token=token)
        if self.calls["page"] < 7:
            return page
        self.in_flight += 1
        try:
            if self.calls["page"] == 9:
                raise self.error
            await asyncio.Event().wait()
        finally:
            self.in_flight -= 1


async def test_failing_page_is_the_error_and_ends_all_others():
    store = Failing([f"n{i % 40:04}/{i:06}" for i in range(900)])
    with pytest.raises(AccessDenied, match="page 7") as caught:
        await list_store(store, "b", "", at_once=8)
    assert caught.value is Failing.error
    assert store.in_flight == 0
    assert len(asyncio.all_tasks()) == 1


async def test_cancelled_listing_ends_all_requests():
    store = Failing([f"n{i % 40:04}/{i:06}" for i in range(900)])
    store.error = asyncio.CancelledError()
    listing = asyncio.create_task(list_store(store, "b", "", at_once=8))
    while store.calls["page"] < 8:
        await asyncio.sleep(0)
    listing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await listing
    assert store.in_flight == 0
    assert len(asyncio.all_tasks()) == 1


async def test_key_from_elsewhere_is_refused():
    class Elsewhere(PagedStore):
        async def page(self, bucket, prefix, *, after="", token=None):
            return await super().page(bucket, "", after=after, token=token)

    with pytest.raises(TransferFailed, match="'a', which is elsewhere"):
        await list_store(Elsewhere(["a", "b/c"]), "b", "b/")


async def test_store_that_leads_in_a_circle_is_refused():
    class Circle(PagedStore):
        async def page(self, bucket, prefix, *, after="", token=None):
            return Page([], "again")

    with pytest.raises(TransferFailed, match="in a circle"):
        await list_store(Circle([]), "b", "")


@given(ODD, st.none() | ODD, st.sets(st.sampled_from("ab/é😀0")))
def test_guess_lies_between(low, high, letters):
    guess = midway(low, high, 0, letters)
    assert guess is None or (low < guess and (high is None or guess < high))


# against S3's protocol

KEYS = {f"train/n{i % 60:05}/{i:06}.png": b"x" for i in range(4500)} | {
    f"odd {i}+é%2f\n/../{i}//": b"" for i in range(9)
}
FLAT = {f"flat-{i:07}": b"x" for i in range(3500)}


def a_store():
    return StoreRecipe.of().make(16, Retry(3, 60, 5))


@pytest.mark.parametrize("prefix", ["", "train/", "flat-", "odd", "absent", "train/n00001/"])
async def test_listing_over_http_is_the_one_in_sequence(s3, prefix):
    s3.put_many("mnist", KEYS | FLAT)
    store = a_store()
    found = await list_store(store, "mnist", prefix)
    asked = s3.stats.requests["LIST"]
    sequence = await list_prefix(store.list("mnist", prefix), endpoint=store.endpoint, bucket="mnist", prefix=prefix)
    await store.aclose()
    assert found.digest == sequence.digest
    assert asked <= most(len(found) + found.left_out["markers"], 1000, 8)


async def test_page_that_fails_for_a_moment_is_asked_for_again(s3):
    s3.put_many("mnist", KEYS)
    s3.script("mnist", None, [Fault(), Fault.status(503), Fault(), Fault.status(500)], operation="LIST", shared=True)
    store = a_store()
    assert len(await list_store(store, "mnist", "train/")) == 4500
    await store.aclose()


async def test_page_that_fails_for_good_is_the_error(s3):
    s3.put_many("mnist", KEYS)
    steps = [*[Fault()] * 4, Fault.status(403)]
    s3.script("mnist", None, steps, operation="LIST", shared=True, forever=True)
    store = a_store()
    with pytest.raises(AccessDenied, match="listing s3://mnist/train/"):
        await list_store(store, "mnist", "train/")
    await store.aclose()
    assert len(asyncio.all_tasks()) == 1


@pytest.mark.parametrize("kind", ["moto", "rclone"])
async def test_real_servers_are_listed_whole(kind, monkeypatch):
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "200")  # of a page, instead of 1000: moto is slow to fill
    keys = [f"d{i % 30:02}/{i:04}" for i in range(260 if kind == "moto" else 1100)]
    with local_s3(kind) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        store = a_store()
        await store._opened("set-up")
        client = store._client
        await client.create_bucket(Bucket="mnist")
        for start in range(0, len(keys), 50):
            puts = (client.put_object(Bucket="mnist", Key=key, Body=b"x") for key in keys[start : start + 50])
            await asyncio.gather(*puts)
        found = await list_store(store, "mnist", "")
        await store.aclose()
    assert [info.key for info in found] == sorted(keys)


class Leaves(S3Store):
    """A store whose user has a say in what is listed."""

    async def list(self, bucket, prefix):
        async for page in super().list(bucket, prefix):
            yield page[1:]


class Around:
    """Something around a store, which knows nothing of pages."""

    def __init__(self, store):
        self.store = store

    def __getattr__(self, name):
        return getattr(self.store, name)

    async def list(self, bucket, prefix):
        async for page in self.store.list(bucket, prefix):
            yield page[1:]


@pytest.mark.parametrize("wrapped", [False, True])
async def test_list_that_was_changed_is_the_one_that_lists(s3, wrapped):
    s3.put_many("mnist", dict.fromkeys("abc", b"x"))
    options = {"concurrency": 2, "timeout": 5, "retry": Retry(0, 5, 5)}
    connection = Connection.resolve(Settings())
    store = Around(S3Store(connection, **options)) if wrapped else Leaves(connection, **options)
    manifest = await list_store(store, "mnist", "")
    await store.aclose()
    assert [info.key for info in manifest] == ["b", "c"]
