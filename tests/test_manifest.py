"""The table of objects: what goes in comes out, on disk too, and a listing is whole or refused."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncds.errors import ConfigurationError
from asyncds.manifest import (
    Manifest,
    ManifestBuilder,
    ObjectInfo,
    normalise_etag,
    parse_uri,
    version_id,
)

KEYS = st.text(min_size=1, max_size=40) | st.sampled_from(
    ["a//b", "../../etc/passwd", "/abs", ".", "%2e", "new\nline\r", "é", "e\u0301", "😀", "\ud800", "\0", "k" * 1024]
)
ETAGS = (
    st.none()
    | st.text(st.characters(codec="utf-8"), min_size=1, max_size=50)
    | st.sampled_from(
        [
            "0" * 32,
            "F" * 32,
            "d41d8cd98f00b204e9800998ecf8427e",
            "d41d8cd98f00b204e9800998ecf8427e-12",
            "g" * 32,
            "a" * 31,
        ]
    )
)
INFOS = st.builds(
    ObjectInfo, st.sampled_from(["one", "two", "three"]), KEYS, st.none() | st.integers(0, 2**62), etag=ETAGS
)
LABELS = {
    "none": st.none(),
    "texts": st.text(st.characters(codec="utf-8"), max_size=8),
    "ints": st.integers(-(2**62), 2**62),
    "floats": st.floats(allow_nan=False) | st.integers(0, 9),
}
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def table(infos, source="s3://one/p", **left_out):
    builder = ManifestBuilder()
    for info in infos:
        builder.add(info)
    return builder.build(endpoint="http://store", source=source, left_out=left_out)


def objects(*keys, bucket="b"):
    return [ObjectInfo(bucket, key, len(key), hashlib.md5(key.encode()).hexdigest()) for key in keys]


# the table and its file


@QUICK
@given(st.lists(INFOS, max_size=20))
def test_rows_come_back_as_they_went_in(tmp_path, infos):
    manifest = table(infos, markers=3)
    opened = Manifest.open(manifest.save(tmp_path / "m"))
    for either in (manifest, opened):
        assert list(either) == infos
        assert either[:] == infos
        assert [either[i] for i in range(-len(infos), len(infos))] == infos + infos
        assert either.sizes.tolist() == [-1 if info.size is None else info.size for info in infos]
        assert (either.endpoint, either.source, either.left_out) == ("http://store", "s3://one/p", {"markers": 3})
    assert opened.digest == manifest.digest


def test_table_as_bytes_is_what_its_file_holds(tmp_path):
    manifest = table([*objects("a", "bb"), ObjectInfo("c", "d", None, "odd-1")]).with_labels(["x", "y", "x"])
    data = manifest.to_bytes()
    assert data == manifest.save(tmp_path / "m").read_bytes()
    twin = Manifest.from_bytes(data)
    assert (list(twin), twin.digest, twin.classes) == (list(manifest), manifest.digest, ["x", "y"])
    with pytest.raises(ValueError, match="digest differs"):
        Manifest.from_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@QUICK
@given(st.data(), st.sampled_from(sorted(LABELS)))
def test_labels_come_back_as_they_went_in(tmp_path, data, kind):
    labels = data.draw(st.lists(LABELS[kind], max_size=8))
    manifest = table(objects(*map(str, range(len(labels)))))
    if kind != "none":
        manifest = manifest.with_labels(labels)
    opened = Manifest.open(manifest.save(tmp_path / "m"))
    numbers, classes = opened.labels, opened.classes
    if kind == "none":
        assert numbers is None
        assert classes is None
    elif classes is not None:
        assert classes == sorted(set(labels))
        assert [classes[number] for number in numbers] == labels
    else:
        assert numbers.tolist() == labels
    assert list(opened) == list(manifest)


def test_row_costs_32_bytes_beside_its_key(tmp_path):
    infos = objects(*(f"train/{i:06}.png" for i in range(10_000)), bucket="one")
    size = table(infos).save(tmp_path / "m").stat().st_size
    assert size - sum(len(info.key) for info in infos) - 32 * len(infos) < 1024


def test_index_outside_ends_iteration():
    manifest = table(objects("a", "b"))
    for index in (2, -3):
        with pytest.raises(IndexError):
            manifest[index]
    assert manifest[1:5] == objects("b")
    assert manifest[::-1] == objects("b", "a")
    assert manifest.rows(np.array([1, 1, 0])) == objects("b", "b", "a")


def test_digest_is_of_rows_order_and_labels():
    one = table(objects("a", "b"))
    same = [table(objects("a", "b")).digest, one.with_labels([1, 2]).with_labels([0, 1]).digest]
    assert same == [one.digest, one.with_labels([0, 1]).digest]
    others = [table(objects("b", "a")), table(objects("a")), one.with_labels([0, 1]), one.with_labels(["0", "1"])]
    others += [table(objects("a", "b", bucket="c")), one.with_labels([0.0, 1.0])]
    assert len({manifest.digest for manifest in [one, *others]}) == 1 + len(others)


def test_digest_of_rows_is_the_same_wherever_they_come_from():
    one, options = (
        table(objects("a", "b")),
        {"endpoint": "http://other", "source": "a.csv", "left_out": {"filtered": 1}},
    )
    builder = ManifestBuilder()
    for info in one:
        builder.add(info)
    twin = builder.build(**options)
    assert twin.digest != one.digest
    assert twin.digest_of_rows == one.digest_of_rows
    others = [one.with_labels(["x", "y"]), one.with_labels(["x", "z"]), table(objects("a", "b", bucket="c"))]
    assert len({manifest.digest_of_rows for manifest in [one, *others]}) == 4


def test_every_truncation_is_refused(tmp_path):
    whole = table([*objects("a", "bb"), ObjectInfo("c", "d", None, "odd-1")]).save(tmp_path / "m").read_bytes()
    for length in range(0, len(whole), 3):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(ConfigurationError, match="cut"):
            Manifest.open(tmp_path / "cut")


def test_no_flipped_bit_changes_a_row(tmp_path):
    manifest = table([*objects("a", "bb"), ObjectInfo("c", "d", None, "odd-1")]).with_labels(["x", "y", "x"])
    whole, rows = bytearray(manifest.save(tmp_path / "m").read_bytes()), list(manifest)
    flipped, accepted = tmp_path / "flipped", set()
    for position in range(len(whole)):
        for bit in {1, position % 8}:
            whole[position] ^= 1 << bit
            flipped.write_bytes(whole)
            whole[position] ^= 1 << bit
            try:
                opened = Manifest.open(flipped)
            except ConfigurationError:
                continue
            accepted.add(position)
            assert (list(opened), opened.labels.tolist(), opened.classes) == (rows, [0, 1, 0], ["x", "y"])
    assert all(position > whole.rindex(b"}") and whole[position] == 0 for position in accepted), (
        "only padding may change"
    )


@pytest.mark.parametrize(
    "content", [b"", b"asyncdsM", b"PK\3\4" * 100, b"asyncdsM\x02\0\0\0{}", b"asyncdsM\x02\0\0\0[]"]
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(ConfigurationError, match="no manifest"):
        Manifest.open(tmp_path / "m")


def test_newer_and_missing_files_are_told_apart(tmp_path):
    place = table(objects("a")).save(tmp_path / "m")
    place.write_bytes(place.read_bytes().replace(b'"version": 1', b'"version": 2'))
    with pytest.raises(ConfigurationError, match="of format 2"):
        Manifest.open(place)
    with pytest.raises(ConfigurationError, match="no such manifest"):
        Manifest.open(tmp_path / "absent")


def test_failed_save_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    place = table(objects("old")).save(tmp_path / "m")

    def fail(*_):
        raise OSError("no")

    monkeypatch.setattr("asyncds.manifest.os.replace", fail)
    with pytest.raises(OSError, match="no"):
        table(objects("new")).save(place)
    assert [info.key for info in Manifest.open(place)] == ["old"]
    assert [path.name for path in Path(tmp_path).iterdir()] == ["m"]


# selecting and labelling


@pytest.mark.parametrize(
    ("match", "limit", "expected", "filtered"),
    [
        (None, None, "a/1.png a/2.jpg b/3.png", 0),
        (None, 2, "a/1.png a/2.jpg", 0),
        (None, 9, "a/1.png a/2.jpg b/3.png", 0),
        ("*.png", None, "a/1.png b/3.png", 1),
        ("*.PNG", None, "", 3),
        ("a*", 1, "a/1.png", 0),
        ("[!a]/*", None, "b/3.png", 2),
        (lambda key: "2" in key, None, "a/2.jpg", 2),
    ],
)
def test_filter_keeps_what_fits(match, limit, expected, filtered):
    manifest = table(objects("a/1.png", "a/2.jpg", "b/3.png"), markers=1, filtered=10)
    chosen = manifest.filter(match, limit)
    assert [info.key for info in chosen] == expected.split()
    assert chosen.left_out == {"markers": 1, "filtered": 10 + filtered}
    assert chosen[:] == [info for info in manifest if info.key in expected.split()]


def test_filter_keeps_the_labels_of_what_it_keeps():
    manifest = table(objects("a", "b", "c")).with_labels(["x", "y", "z"]).filter("[!a]")
    assert [manifest.classes[label] for label in manifest.labels] == ["y", "z"]


@pytest.mark.parametrize(
    ("labels", "numbers", "kind"),
    [([2, 0, 1], [2, 0, 1], "i"), ([True, False, True], [1, 0, 1], "i"), ([0.5, 1, 2], [0.5, 1.0, 2.0], "f")],
)
def test_numbers_stay_themselves(labels, numbers, kind):
    for given_labels in (labels, np.array(labels), iter(labels)):
        manifest = table(objects("a", "b", "c")).with_labels(given_labels)
        assert manifest.labels.tolist() == numbers
        assert manifest.labels.dtype.kind == kind
        assert manifest.classes is None


def test_texts_become_positions_in_their_sorted_set():
    manifest = table(objects("a", "b", "c")).with_labels(["dog", "cat", "dog"])
    assert (manifest.labels.tolist(), manifest.classes) == ([1, 0, 1], ["cat", "dog"])


@pytest.mark.parametrize(("labels", "message"), [([1], "1 labels for 2 objects"), ([1, None], "NoneType")])
def test_odd_labels_are_refused(labels, message):
    with pytest.raises(ConfigurationError, match=message):
        table(objects("a", "b")).with_labels(labels)


def test_mixture_of_labels_is_not_blamed_on_a_type_that_is_allowed():
    with pytest.raises(ConfigurationError) as caught:
        table(objects("a", "b")).with_labels(["a", 1])
    assert "is of type str: give str" not in str(caught.value)


def test_repr_tells_what_is_there():
    manifest = table(objects("a", "bb"), markers=1200, filtered=0).with_labels(["x", "y"])
    assert repr(manifest) == "<Manifest s3://one/p: 2 objects, 3 bytes, labelled (2), 1,200 markers left out>"


# URIs and ETags


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("s3://b", ("b", "")),
        ("s3://b/", ("b", "")),
        ("s3://b/a//b/../c", ("b", "a//b/../c")),
        ("s3://b//a", ("b", "/a")),
        ("s3://b/a%20b+c?d#e", ("b", "a%20b+c?d#e")),
        ("s3://b/s3://c", ("b", "s3://c")),
    ],
)
def test_uri_is_split_and_not_decoded(uri, parts):
    assert parse_uri(uri) == parts


@pytest.mark.parametrize("uri", ["", "b/k", "s3://", "s3:///k", "S3://b", "http://b/k", Path("b/k"), None, 7])
def test_what_is_no_uri_is_refused(uri):
    with pytest.raises(ConfigurationError, match="write s3://bucket/key"):
        parse_uri(uri)


def test_uri_of_an_odd_key_is_shown_through_repr():
    assert ObjectInfo("b", "a b/é").uri == "s3://b/a b/é"
    assert ObjectInfo("b", "a\nb").uri == "'s3://b/a\\nb'"


@pytest.mark.parametrize(
    ("etag", "normal"), [('"a"', "a"), ("a", "a"), ('W/"a"', "a"), ('"a-2"', "a-2"), (None, None), ("", None)]
)
def test_etag_loses_its_quotes(etag, normal):
    assert normalise_etag(etag) == normal


@QUICK
@given(st.lists(ETAGS, min_size=2, max_size=2, unique=True))
def test_different_etags_are_different_versions(etags):
    assert version_id(etags[0]) != version_id(etags[1])
    assert all(len(version_id(etag)) == 16 for etag in etags)
