"""The table of a run: listed once, by whoever is first, and seen by all."""

import hashlib
import os
import pickle
import shutil
import signal
import time

import pytest

from asyncds.errors import EmptyDataset, TransferFailed
from asyncds.listing import Table, list_prefix
from asyncds.manifest import ManifestBuilder, ObjectInfo

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

KEYS = ["cat/1.png", "cat/2.jpg", "dog/3.png"]


class Lister:
    """Makes manifests; each listing leaves a line in a file, so that those of all processes are counted."""

    def __init__(self, folder, keys=KEYS):
        self.log, self.keys = folder.parent / "listings", keys

    def __call__(self, limit, match):
        with open(self.log, "a") as log:
            log.write(f"{os.getpid()}\n")
        builder = ManifestBuilder("b")
        for key in self.keys:
            builder.add(ObjectInfo("b", key, 1, hashlib.md5(key.encode()).hexdigest()))
        whole = builder.build(endpoint="e", source="s3://b/", left_out={"markers": 0, "filtered": 0})
        return whole.filter(match, limit)

    @property
    def times(self):
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "manifests"
    folder.mkdir()
    return folder


@pytest.fixture
def lister(folder):
    return Lister(folder)


def keys(table):
    return [info.key for info in table.manifest()]


def saved(folder):
    return [path for path in folder.glob("*.manifest") if not path.name.startswith("run-")]


def test_first_use_lists_and_the_rest_of_the_run_does_not(folder, lister):
    table = Table(folder, "name", lister)
    assert not table.known
    assert keys(table) == keys(table) == KEYS
    assert table.known
    assert lister.times == 1


def test_given_manifest_needs_no_listing(folder, lister):
    table = Table(folder, "name", None, manifest=lister(None, None))
    assert table.known
    assert keys(pickle.loads(pickle.dumps(table))) == KEYS


def expect_keys(table, expected):
    assert keys(table) == expected


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_come_by_the_table_without_listing(folder, lister, child, method):
    table = Table(folder, "name", lister, label=str.upper)
    child(method, expect_keys, table, KEYS)
    assert keys(table) == KEYS
    assert lister.times == 1


class GatedLister(Lister):
    """Says that it has begun, and lists when it is told to."""

    def __init__(self, folder, keys=KEYS):
        super().__init__(folder, keys)
        self.begun, self.told = os.pipe(), os.pipe()

    def __call__(self, limit, match):
        os.write(self.begun[1], b"x")
        os.read(self.told[0], 1)
        return super().__call__(limit, match)


def test_two_processes_list_once(folder, child):
    lister = GatedLister(folder)
    table = Table(folder, "name", lister)
    processes = [child("fork", expect_keys, table, KEYS, wait=False) for _ in range(2)]
    os.read(lister.begun[0], 1)
    os.write(lister.told[1], b"xx")
    for process in processes:
        process.join(15)
    assert [process.exitcode for process in processes] == [0, 0]
    assert keys(table) == KEYS
    assert lister.times == 1


def test_killed_lister_releases_the_lock(folder, child):
    lister = GatedLister(folder)
    table = Table(folder, "name", lister)
    process = child("fork", expect_keys, table, KEYS, wait=False)
    os.read(lister.begun[0], 1)
    os.kill(process.pid, signal.SIGKILL)
    process.join(15)
    os.write(lister.told[1], b"x")
    assert keys(table) == KEYS


def test_failed_listing_releases_the_lock_and_is_not_remembered(folder, lister):
    failures = [TransferFailed("page 2")]

    def fail_once(limit, match):
        if failures:
            raise failures.pop()
        return lister(limit, match)

    table = Table(folder, "name", fail_once)
    with pytest.raises(TransferFailed):
        table.manifest()
    assert not saved(folder)
    assert keys(table) == KEYS


@pytest.mark.parametrize(
    ("max_age", "age", "listings"), [(0, 0, 1), (0, -60, 1), (100, 50, 0), (100, 150, 1), (1e9, 10**8, 0)]
)
def test_saved_listing_serves_later_runs_while_it_is_young(folder, max_age, age, listings):
    Table(folder, "name", Lister(folder, ["old"])).manifest()
    (place,) = saved(folder)
    os.utime(place, (time.time() - age,) * 2)
    lister = Lister(folder)
    lister.log.unlink()
    assert keys(Table(folder, "name", lister, max_age=max_age)) == (KEYS if listings else ["old"])
    assert lister.times == listings


def test_saved_listing_of_another_prefix_is_not_taken(folder, lister):
    Table(folder, "one", Lister(folder, ["other"])).manifest()
    assert keys(Table(folder, "two", lister, max_age=100)) == KEYS


@pytest.mark.parametrize("options", [{"limit": 2}, {"match": "*.png"}])
def test_part_of_a_listing_is_never_saved(folder, lister, options):
    Table(folder, "name", lister, **options).manifest()
    assert saved(folder) == []
    assert keys(Table(folder, "name", lister, max_age=100)) == KEYS
    assert lister.times == 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"match": "*.png"}, ["cat/1.png", "dog/3.png"]),
        ({"limit": 1}, ["cat/1.png"]),
        ({"match": "*.png", "limit": 1}, ["cat/1.png"]),
    ],
)
@pytest.mark.parametrize("max_age", [0, 100])
def test_filter_and_limit_hold_for_new_and_saved_listings(folder, lister, options, expected, max_age):
    Table(folder, "name", lister).manifest()
    assert keys(Table(folder, "name", lister, max_age=max_age, **options)) == expected
    assert lister.times == (1 if max_age else 2)


def test_labels_are_made_from_keys(folder, lister, child):
    table = Table(folder, "name", lister, label=lambda key: key.split("/")[0])
    assert (table.manifest().labels.tolist(), table.manifest().classes) == ([0, 0, 1], ["cat", "dog"])
    assert pickle.loads(pickle.dumps(table)).manifest().classes == ["cat", "dog"]
    assert Table(folder, "name", lister, max_age=100).manifest().labels is None


@pytest.mark.parametrize(
    ("listed", "match", "message"),
    [
        ([], None, r"s3://b/ at e: there is nothing under this prefix; check bucket, prefix and endpoint"),
        (KEYS, "*.gif", r"s3://b/: none of 3 keys fits the filter; correct match"),
    ],
)
def test_nothing_to_train_from_is_an_error(folder, listed, match, message):
    with pytest.raises(EmptyDataset) as caught:
        Table(folder, "name", Lister(folder, listed), match=match).manifest()
    assert str(caught.value) == message


def test_damaged_saved_listing_is_made_anew(folder, lister):
    Table(folder, "name", lister).manifest()
    (place,) = saved(folder)
    place.write_bytes(place.read_bytes()[:-1])
    assert keys(Table(folder, "name", lister, max_age=100)) == KEYS
    assert lister.times == 2


@pytest.mark.filterwarnings("ignore:.*cannot be")
def test_folder_that_vanished_does_not_stop_a_listing(folder, lister):
    table = Table(folder, "name", lister)
    shutil.rmtree(folder)
    assert keys(table) == KEYS


def test_files_of_killed_runs_are_deleted_after_a_week(folder, lister):
    for name, days in (("run-old.manifest", 8), ("run-young.manifest", 6), ("other", 100)):
        (folder / name).write_bytes(b"")
        os.utime(folder / name, (time.time() - days * 86400,) * 2)
    Table(folder, "name", lister).manifest()
    assert not (folder / "run-old.manifest").exists()
    assert (folder / "run-young.manifest").exists()
    assert (folder / "other").exists()


def test_file_of_a_long_run_is_not_old(folder, lister):
    table = Table(folder, "name", lister)
    table.publish()
    os.utime(table.path, (0, 0))
    pickle.loads(pickle.dumps(table)).manifest()
    Table(folder, "other", lister).manifest()
    assert table.path.exists()


# reading the pages


def objects(*keys):
    return [ObjectInfo("b", key, len(key), hashlib.md5(key.encode()).hexdigest()) for key in keys]


async def pages_of(*pages):
    for page in pages:
        yield page


async def listed(*pages, prefix="", **options):
    return await list_prefix(pages_of(*pages), endpoint="http://store", bucket="b", prefix=prefix, **options)


async def test_listing_is_in_the_order_of_utf8_bytes_however_pages_come():
    keys = ["B", "a", "z", "é", "\uffff", "😀"]
    assert [info.key for info in await listed(objects(*keys[3:]), objects(*keys[:3]))] == keys
    assert [info.key for info in await listed(objects(*keys))] == keys
    assert [info.key for info in await listed(*([info] for info in objects(*reversed(keys))))] == keys


async def test_repeated_page_counts_once():
    assert list(await listed(objects("a", "b"), objects("b", "c"), objects("a"))) == objects("a", "b", "c")


@pytest.mark.parametrize("twin", [ObjectInfo("b", "a", 1, "other"), ObjectInfo("b", "a", 2)])
async def test_listing_that_contradicts_itself_is_refused(twin):
    with pytest.raises(TransferFailed, match=r"s3://b/: 'a' is there twice"):
        await listed([ObjectInfo("b", "a", 1)], [twin])


async def test_key_from_elsewhere_is_refused():
    with pytest.raises(TransferFailed, match="'testing/x', which is elsewhere"):
        await listed(objects("train/x", "testing/x"), prefix="train/")


async def test_markers_and_filtered_keys_are_counted():
    manifest = await listed(objects("d/", "d/a.png", "d/b.txt", "e/"), match="*.png")
    assert [info.key for info in manifest] == ["d/a.png"]
    assert manifest.left_out == {"markers": 2, "filtered": 1}


async def test_limit_ends_listing_early_and_closes_it():
    asked, closed = [], []

    async def pages():
        try:
            for page in (objects("d/", "a"), objects("b", "c"), objects("x")):
                asked.append(page[0].key)
                yield page
        finally:
            closed.append(True)

    manifest = await list_prefix(pages(), endpoint="e", bucket="b", prefix="", limit=2)
    assert [info.key for info in manifest] == ["a", "b"]
    assert (asked, closed) == (["d/", "b"], [True])


async def test_limit_counts_a_repeated_key_once():
    assert [info.key for info in await listed(objects("a"), objects("a"), objects("b"), limit=2)] == ["a", "b"]


async def test_progress_counts_the_keys_of_each_page():
    counts = []
    await listed(objects("d/", "a"), objects("b"), [], progress=counts.append)
    assert counts == [2, 1, 0]


async def test_failing_page_leaves_no_manifest():
    async def pages():
        yield objects("a")
        raise TransferFailed("page 2")

    with pytest.raises(TransferFailed, match="page 2"):
        await list_prefix(pages(), endpoint="e", bucket="b", prefix="")
