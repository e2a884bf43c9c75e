"""Tables from elsewhere: a bucket, URIs, a CSV file, an S3 Inventory."""

import csv
import gzip
import hashlib
import io
import json
from urllib.parse import quote_plus

import pyarrow
import pyarrow.parquet
import pytest

from asyncds import CachedS3MapDataset, Manifest
from asyncds.errors import BucketNotFound, ConfigurationError, EmptyDataset
from asyncds.manifest import ObjectInfo
from asyncds.testing import FakeStore

# listing and URIs


def test_prefix_becomes_a_table_that_a_dataset_reads(s3):
    s3.put_many("mnist", {"train/a/1.png": b"one", "train/b/2.png": b"two", "train/": b"", "other": b"x"})
    manifest = Manifest.from_prefix("s3://mnist/train/", label="parent", region="us-east-1")
    assert [info.key for info in manifest] == ["train/a/1.png", "train/b/2.png"]
    assert (manifest.classes, manifest.left_out) == (["a", "b"], {"markers": 1, "filtered": 0})
    assert manifest.endpoint == s3.endpoint
    with CachedS3MapDataset.from_manifest(manifest, transform=lambda file: file.read()) as dataset:
        assert [dataset[i] for i in range(2)] == [(b"one", 0), (b"two", 1)]
    assert s3.stats.requests["LIST"] == 1


def test_prefix_is_listed_in_a_store_of_the_users():
    store = FakeStore({("b", "x/1"): b"1", ("b", "x/2"): b"2"}, page_size=1)
    assert [info.key for info in Manifest.from_prefix("s3://b/x/", match="*2", store=store)] == ["x/2"]
    assert [info.key for info in Manifest.from_prefix("s3://b/x/", limit=1, store=store)] == ["x/1"]
    assert not store.closed


@pytest.mark.parametrize(
    ("uri", "options", "error", "message"),
    [
        ("mnist", {}, ConfigurationError, "write s3://bucket/key"),
        ("s3://mnist/", {}, EmptyDataset, "nothing under this prefix"),
        ("s3://absent/", {}, BucketNotFound, "absent"),
        ("s3://mnist/", {"limit": 0}, ConfigurationError, "limit=0"),
        ("s3://mnist/", {"match": 7}, ConfigurationError, "match=7"),
        ("s3://mnist/", {"label": "child"}, ConfigurationError, "label='child'"),
        ("s3://mnist/", {"concurency": 7}, ConfigurationError, "concurency"),
    ],
)
def test_prefix_that_cannot_be_listed_is_told_in_one_line(s3, uri, options, error, message):
    with pytest.raises(error, match=message) as caught:
        Manifest.from_prefix(uri, **options)
    assert "\n" not in str(caught.value)


def test_uris_become_a_table_in_their_order():
    manifest = Manifest.from_uris(iter(["s3://b/2", "s3://c/1"]), labels=["x", "y"])
    assert list(manifest) == [ObjectInfo("b", "2"), ObjectInfo("c", "1")]
    assert manifest.classes == ["x", "y"]
    with pytest.raises(ConfigurationError, match="names a bucket, not an object"):
        Manifest.from_uris(["s3://b"])


def test_csv_becomes_a_table(tmp_path):
    place = tmp_path / "m.csv"
    place.write_text("key,label\ns3://b/1,cat\n2,dog\n")
    manifest = Manifest.from_csv(place, root="s3://c/d")
    assert list(manifest) == [ObjectInfo("b", "1"), ObjectInfo("c", "d/2")]
    with pytest.raises(ConfigurationError, match="no column 'name'"):
        Manifest.from_csv(place, key="name")


# S3 Inventory

OBJECTS = [
    ObjectInfo("photos", "a b+c/é.png", 3, "d41d8cd98f00b204e9800998ecf8427e"),
    ObjectInfo("photos", "large", 10**10, "d41d8cd98f00b204e9800998ecf8427e-12"),
    ObjectInfo("photos", "unknown", None, None),
]
SCHEMA = "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size, ETag"


def in_csv(infos):
    out = io.StringIO()
    rows = [[i.bucket, quote_plus(i.key, safe="/"), "", "true", "false", i.size, i.etag] for i in infos]
    rows.append(["photos", "folder/", "", "true", "false", 0, ""])
    rows.append(["photos", "old", "v1", "false", "false", 1, "x"])
    rows.append(["photos", "deleted", "v2", "true", "true", "", ""])
    csv.writer(out, quoting=csv.QUOTE_ALL).writerows(rows)
    return gzip.compress(out.getvalue().encode())


def in_parquet(infos):
    rows = [*infos, ObjectInfo("photos", "folder/", 0), ObjectInfo("photos", "old", 1), ObjectInfo("photos", "deleted")]
    columns = {
        "bucket": [info.bucket for info in rows],
        "key": [info.key for info in rows],
        "is_latest": [info.key != "old" for info in rows],
        "is_delete_marker": [info.key == "deleted" for info in rows],
        "size": [info.size for info in rows],
        "e_tag": [info.etag for info in rows],
    }
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


FORMATS = {"CSV": (in_csv, "csv.gz"), "Parquet": (in_parquet, "parquet")}


def inventory(kind, pieces, **about):
    """The files of an inventory by their keys; `manifest.json` comes first."""
    pack, ending = FORMATS[kind]
    files = {f"inv/photos/all/data/{number}.{ending}": pack(piece) for number, piece in enumerate(pieces)}
    listed = [{"key": k, "size": len(b), "MD5checksum": hashlib.md5(b).hexdigest()} for k, b in files.items()]
    document = {"sourceBucket": "photos", "destinationBucket": "arn:aws:s3:::mnist", "fileFormat": kind}
    document |= {"fileSchema": SCHEMA, "files": listed} | about
    return {"inv/photos/all/2026-01-01T00-00Z/manifest.json": json.dumps(document).encode()} | files


def on_disk(folder, files):
    for key, body in files.items():
        place = folder / key
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(body)
    return folder / next(iter(files))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("flat", [False, True])
def test_inventory_on_disk_becomes_a_table(tmp_path, kind, flat):
    files = inventory(kind, [OBJECTS[:1], OBJECTS[1:]])
    place = on_disk(tmp_path, {key.rpartition("/")[2]: body for key, body in files.items()} if flat else files)
    manifest = Manifest.from_inventory(place)
    assert list(manifest) == OBJECTS
    assert (manifest.source, manifest.left_out) == (str(place), {"markers": 2, "filtered": 0})


@pytest.mark.parametrize("kind", FORMATS)
def test_inventory_in_a_bucket_becomes_a_table(s3, kind):
    files = inventory(kind, [OBJECTS])
    s3.put_many("mnist", files)
    manifest = Manifest.from_inventory(f"s3://mnist/{next(iter(files))}", label=lambda key: key[0])
    assert list(manifest) == OBJECTS
    assert manifest.classes == ["a", "l", "u"]
    assert (s3.stats.requests["GET"], s3.stats.requests["LIST"]) == (2, 0)


def test_inventory_of_nothing_is_an_empty_table(tmp_path):
    assert len(Manifest.from_inventory(on_disk(tmp_path, inventory("CSV", [])))) == 0


@pytest.mark.parametrize("kind", FORMATS)
def test_file_of_an_inventory_that_is_cut_short_is_refused(tmp_path, kind):
    files = inventory(kind, [OBJECTS])
    place = on_disk(tmp_path, files)
    data = tmp_path / [*files][1]
    data.write_bytes(data.read_bytes()[:-9])
    with pytest.raises(ConfigurationError, match="cut short, or of another inventory"):
        Manifest.from_inventory(place)
    data.unlink()
    with pytest.raises(ConfigurationError, match="copy it there"):
        Manifest.from_inventory(place)


@pytest.mark.parametrize("kind", FORMATS)
def test_file_without_checksum_that_is_cut_short_is_refused(tmp_path, kind):
    files = inventory(kind, [OBJECTS])
    document = json.loads(next(iter(files.values())))
    document["files"] = [{"key": document["files"][0]["key"]}]
    files[next(iter(files))] = json.dumps(document).encode()
    place = on_disk(tmp_path, files)
    data = tmp_path / [*files][1]
    data.write_bytes(data.read_bytes()[:-9])
    with pytest.raises(ConfigurationError, match=r"cut short|cannot be read as Parquet"):
        Manifest.from_inventory(place)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"fileFormat": "ORC"}, "as ORC: configure it as CSV or Parquet"),
        ({"fileSchema": "Bucket, Size"}, "no column 'Key'"),
        ({"files": 7}, r"no manifest\.json of an S3 Inventory"),
        ({"files": [{"key": "../.."}]}, r"names a file '\.\./\.\.'"),
    ],
)
def test_inventory_that_is_none_is_refused_in_one_line(tmp_path, about, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        Manifest.from_inventory(on_disk(tmp_path, inventory("CSV", [OBJECTS], **about)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"version": 1}'])
def test_document_that_is_no_inventory_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"no manifest\.json of an S3 Inventory"):
        Manifest.from_inventory(tmp_path / "manifest.json")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Manifest.from_inventory(tmp_path / "absent.json")


# what has changed is fetched, and nothing else


def test_next_run_fetches_the_difference_only(s3):
    s3.put_many("mnist", {f"{i:02}": b"old" for i in range(10)})

    def read():
        with CachedS3MapDataset.from_prefix("s3://mnist/", transform=lambda file: file.read()) as dataset:
            return [dataset[i] for i in range(len(dataset))], dataset.manifest

    _, before = read()
    s3.put_many("mnist", {"03": b"new", "99": b"added"})
    s3.delete("mnist", "07")
    s3.reset_counts()
    bodies, after = read()
    assert bodies == [b"old"] * 3 + [b"new"] + [b"old"] * 5 + [b"added"]
    assert {key for _, key in s3.stats.gets} == {"03", "99"}
    changes = after.changes(before)
    parts = (changes.added, changes.changed, changes.removed)
    assert [[info.key for info in part] for part in parts] == [["99"], ["03"], ["07"]]
