"""The table of objects: what goes in comes out, on disk too, and a listing is whole or refused."""

import hashlib
import sys
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncds import changes, columns
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


@QUICK
@given(st.lists(st.lists(INFOS, max_size=5), max_size=4))
def test_rows_that_come_together_are_those_that_come_one_by_one(pages):
    builder = ManifestBuilder()
    for page in pages:
        builder.extend(page)
    twin = table([info for page in pages for info in page])
    assert builder.build(endpoint=twin.endpoint, source=twin.source).digest == twin.digest


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


# tables made of tables

LABELLED = st.sampled_from(["none", "texts", "ints"])


def labelled(infos, kind, base=0):
    manifest = table(infos)
    if kind == "none":
        return manifest
    return manifest.with_labels([f"c{(base + i) % 3}" if kind == "texts" else i for i in range(len(infos))])


def rows_of(manifest):
    """What a user sees of each row: texts, where labels stand for them."""
    labels = [None] * len(manifest) if manifest.labels is None else manifest.labels.tolist()
    names = manifest.classes
    return [*zip(manifest, labels if names is None else [names[label] for label in labels], strict=True)]


def canonical(manifest):
    """The table that the builder makes of these rows: whatever way led to them, the columns are the same."""
    twin = table(list(manifest))
    assert {name: column.tolist() for name, column in manifest._columns.items() if name != "labels"} == {
        name: column.tolist() for name, column in twin._columns.items()
    }
    assert manifest._buckets == twin._buckets
    return True


@QUICK
@given(st.lists(INFOS, max_size=20), LABELLED, st.data())
def test_rows_that_are_taken_are_those_of_the_table(infos, kind, data):
    manifest, rows = labelled(infos, kind), []
    whole = rows_of(manifest)
    if infos:
        rows = data.draw(st.lists(st.integers(0, len(infos) - 1), max_size=20))
    chosen = manifest._taken(np.array(rows, np.int64))
    assert rows_of(chosen) == [whole[row] for row in rows]
    assert not rows or canonical(chosen)
    assert chosen.classes == manifest.classes


@QUICK
@given(st.lists(st.lists(INFOS, max_size=6), min_size=1, max_size=4), LABELLED)
def test_sum_has_the_rows_of_all_in_order(tables, kind):
    manifests = [labelled(infos, kind, base) for base, infos in enumerate(tables)]
    whole = sum(manifests)
    assert rows_of(whole) == [row for manifest in manifests for row in rows_of(manifest)]
    assert Manifest.from_bytes(whole.to_bytes()).digest == whole.digest
    assert canonical(whole) or not len(whole)


def test_sum_of_other_classes_numbers_them_anew():
    one, two = table(objects("a", "b")).with_labels(["x", "z"]), table(objects("c")).with_labels(["y"])
    assert ((one + two).labels.tolist(), (one + two).classes) == ([0, 2, 1], ["x", "y", "z"])


def test_sum_is_of_one_store():
    builder = ManifestBuilder()
    builder.add(ObjectInfo("b", "c"))
    known, other = (builder.build(endpoint=name, source="s") for name in ("http://store", "http://other"))
    nowhere = builder.build(endpoint="", source="s")
    assert (known + nowhere).endpoint == (nowhere + known).endpoint == "http://store"
    with pytest.raises(ConfigurationError, match="http://store and http://other cannot be added"):
        _ = known + other


@pytest.mark.parametrize(
    ("labels", "message"), [(None, "only some of the tables have labels"), ([1], "numbers in others")]
)
def test_sum_of_labels_that_do_not_fit_is_refused(labels, message):
    one, two = table(objects("a")).with_labels(["x"]), table(objects("b"))
    with pytest.raises(ConfigurationError, match=message):
        _ = one + (two if labels is None else two.with_labels(labels))


def test_sum_with_something_else_is_a_type_error():
    with pytest.raises(TypeError):
        _ = table(objects("a")) + 1


TEXTS = st.one_of(st.binary(max_size=4), st.binary(min_size=3, max_size=3), st.binary(max_size=60))


@QUICK
@given(st.lists(TEXTS, min_size=1, max_size=80), st.data())
def test_texts_are_picked_in_any_order(texts, data):
    some = st.lists(st.integers(0, len(texts) - 1), max_size=99)
    rows = np.array(data.draw(st.one_of(some, some.map(sorted), st.just(range(len(texts))))), np.int64)
    flat, ends = np.frombuffer(b"".join(texts), np.uint8), np.cumsum([0, *map(len, texts)]).astype("<u8")
    picked, their_ends = columns.pick(flat, ends, rows)
    assert [picked[a:b].tobytes() for a, b in pairwise(their_ends.tolist())] == [texts[row] for row in rows]


GLOBS = st.text(st.sampled_from("ab*?[]!é"), max_size=5)
STARS = st.lists(st.sampled_from(["a", "b", "ab", "ba", "é", "*"]), max_size=7).map("".join)


@QUICK
@given(st.lists(st.text(st.sampled_from("abé"), max_size=12), max_size=20), STARS)
def test_filter_fits_any_number_of_stars(keys, match):
    found = [info.key for info in table(objects(*keys)).filter(match)]
    assert found == [key for key in keys if fnmatchcase(key, match)]


@QUICK
@given(st.lists(st.text(st.sampled_from("abé]\n"), max_size=6), max_size=20), GLOBS, st.none() | GLOBS)
def test_filter_fits_globs_as_fnmatch_does(keys, match, exclude):
    chosen = table(objects(*keys)).filter(match, exclude=exclude)
    fits = [key for key in keys if fnmatchcase(key, match)]
    assert [info.key for info in chosen] == [key for key in fits if exclude is None or not fnmatchcase(key, exclude)]
    assert chosen.left_out.get("filtered", 0) == len(keys) - len(chosen)


def test_filter_works_across_chunks(monkeypatch):
    monkeypatch.setattr("asyncds.columns._CHUNK", 4)
    manifest = table(objects(*(f"{i}.{'png' if i % 3 else 'txt'}" for i in range(40))))
    assert manifest.filter("*.png")[:] == [info for info in manifest if info.key.endswith("png")]
    limited = manifest.filter("*.png", 9)
    assert limited[:] == manifest.filter("*.png")[:9]
    assert limited.left_out == {"filtered": 5}
    shuffled = np.random.default_rng(0).permutation(40)
    assert manifest._taken(shuffled)[:] == manifest.rows(shuffled)
    assert manifest.changes(manifest._taken(shuffled[:30])).added[:] == manifest.rows(np.sort(shuffled[30:]))


@pytest.mark.parametrize("fractions", [[1], [0.5, 0.5], [0.9, 0.1], [1 / 3] * 3, [0.0, 1.0], [0.1] * 10])
@pytest.mark.parametrize("count", [0, 1, 10, 101])
def test_split_is_disjoint_complete_and_repeatable(fractions, count):
    manifest = labelled(objects(*(f"{i:03}" for i in range(count))), "texts")
    parts = manifest.split(fractions, seed=3)
    assert sorted(row for part in parts for row in rows_of(part)) == sorted(rows_of(manifest))
    assert all(list(part) == sorted(part) for part in parts)
    assert all(abs(len(part) - share * count) < 1 for part, share in zip(parts, fractions, strict=True))
    assert [part.digest for part in manifest.split(fractions, seed=3)] == [part.digest for part in parts]
    if count > 100 and len(parts) > 1 and 0 not in fractions:
        assert manifest.split(fractions, seed=4)[0].digest != parts[0].digest


@pytest.mark.parametrize("fractions", [[], [0.5], [0.6, 0.6], [1.5, -0.5], [float("nan")], [[1]], ["half"]])
def test_split_that_is_no_split_is_refused(fractions):
    with pytest.raises(ConfigurationError, match="shares from 0 to 1 that sum to 1"):
        table(objects("a", "b")).split(fractions)


def test_sample_is_of_different_rows_and_repeatable():
    manifest = labelled(objects(*(f"{i:03}" for i in range(100))), "ints")
    chosen = manifest.sample(10, seed=1)
    assert len({info.key for info in chosen}) == len(chosen) == 10
    assert set(rows_of(chosen)) < set(rows_of(manifest))
    assert list(chosen) == sorted(chosen)
    assert manifest.sample(10, seed=1).digest == chosen.digest != manifest.sample(10, seed=2).digest
    assert rows_of(manifest.sample(100)) == rows_of(manifest)


@pytest.mark.parametrize("n", [-1, 3, 0.5, "1", None])
def test_sample_of_more_than_there_is_is_refused(n):
    with pytest.raises(ConfigurationError, match="from 0 to 2"):
        table(objects("a", "b")).sample(n)


@pytest.mark.parametrize(("count", "n"), [(0, 1), (10, 1), (10, 3), (2, 5), (101, 4)])
def test_partitions_added_are_the_table(count, n):
    manifest = labelled(objects(*map(str, range(count))), "texts")
    parts = [manifest.partition(i, n) for i in range(n)]
    assert [row for part in parts for row in rows_of(part)] == rows_of(manifest)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert sum(parts).digest_of_rows == manifest.digest_of_rows


@pytest.mark.parametrize(("i", "n"), [(3, 3), (-1, 3), (0, 0), (0.0, 1), (1, None)])
def test_partition_outside_its_range_is_refused(i, n):
    with pytest.raises(ConfigurationError, match="counts from 0 and is below the second"):
        table(objects("a", "b")).partition(i, n)


# changes

UNIQUE = st.lists(INFOS, max_size=15, unique_by=lambda info: (info.bucket, info.key))


@QUICK
@given(UNIQUE, UNIQUE)
def test_changes_are_those_that_a_dict_finds(new, old):
    found = table(new).changes(table(old))
    before, after = ({(info.bucket, info.key): info for info in infos} for infos in (old, new))

    def differs(one, other):
        if None not in (one.etag, other.etag) and one.etag != other.etag:
            return True
        return None not in (one.size, other.size) and one.size != other.size

    common = after.keys() & before.keys()
    assert found.added[:] == [info for place, info in after.items() if place not in before]
    assert found.removed[:] == [info for place, info in before.items() if place not in after]
    assert found.changed[:] == [i for p, i in after.items() if p in common and differs(i, before[p])]
    assert bool(found) == bool(len(found.added) or len(found.changed) or len(found.removed))


def test_changes_between_equal_tables_are_none():
    manifest = table(objects("a", "b", "b"))
    found = manifest.changes(table(objects("b", "a")))
    assert not found
    assert str(found) == "0 added, 0 changed, 0 removed"


def test_key_that_is_twice_is_one_change():
    found = table(objects("a", "a")).changes(table(objects("b", "b")))
    assert (found.added[:], found.removed[:]) == (objects("a"), objects("b"))


def test_keys_of_one_hash_are_told_apart(monkeypatch):
    asked = []

    def weak(table, buckets, seed):
        asked.append(seed)
        return columns.hashes(table, buckets, seed) % (2 if seed < 3 else 2**63)

    monkeypatch.setattr(changes, "hashes", weak)
    new, old = objects(*map(str, range(50))), objects(*map(str, range(25, 75)))
    found = table(new).changes(table(old))
    assert (found.added[:], len(found.changed), found.removed[:]) == (new[:25], 0, old[25:])
    assert max(asked) == 3


@QUICK
@given(st.lists(st.text(st.sampled_from("ab\0"), max_size=20), min_size=2, max_size=2, unique=True))
def test_hashes_of_different_keys_differ(keys):
    manifest = table([ObjectInfo("b", key) for key in keys])
    one, other = columns.hashes(manifest._columns, ["b"], 0)
    assert one != other


# Parquet


@QUICK
@given(
    st.lists(
        INFOS.filter(lambda info: "\ud800" not in info.key and info.etag == normalise_etag(info.etag)), max_size=20
    ),
    st.sampled_from(["none", "texts", "ints", "floats"]),
)
def test_parquet_brings_back_what_it_was_given(tmp_path, infos, kind):
    manifest = (
        labelled(infos, kind) if kind != "floats" else table(infos).with_labels([i / 2 for i in range(len(infos))])
    )
    again = Manifest.from_parquet(manifest.to_parquet(tmp_path / "m.parquet"))
    assert rows_of(again) == rows_of(manifest)
    assert canonical(again) or not infos
    assert (again.endpoint, again.source) == (manifest.endpoint, manifest.source)
    assert [path.name for path in tmp_path.iterdir()] == ["m.parquet"]


def test_parquet_keeps_classes_that_no_row_has(tmp_path):
    manifest = table(objects("a", "b", "c")).with_labels(["x", "y", "z"]).filter("c")
    again = Manifest.from_parquet(manifest.to_parquet(tmp_path / "m.parquet"))
    assert (again.labels.tolist(), again.classes) == ([2], ["x", "y", "z"])


def test_parquet_is_written_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("asyncds.columns._CHUNK", 4)
    monkeypatch.setattr("asyncds.parquet._ROWS", 3)
    infos = [ObjectInfo("b", f"{i}", i, f"odd-{i}" if i % 2 else None) for i in range(11)]
    assert Manifest.from_parquet(table(infos).to_parquet(tmp_path / "m.parquet"))[:] == infos


def parquet(place, /, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), place)
    return place


def test_parquet_of_others_has_uris_or_keys_below_a_root(tmp_path):
    place = parquet(tmp_path / "m", path=["s3://b/a é", "c"], animal=["cat", "dog"])
    manifest = Manifest.from_parquet(place, root="s3://d/e/", key="path", label="animal")
    assert list(manifest) == [ObjectInfo("b", "a é"), ObjectInfo("d", "e/c")]
    assert (manifest.labels.tolist(), manifest.classes) == ([0, 1], ["cat", "dog"])
    with pytest.raises(ConfigurationError, match="'c' is no URI of an object: say root="):
        Manifest.from_parquet(place, key="path")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"name": ["s3://b/a"]}, "no column 'key'; it has name"),
        ({"key": ["s3://b/a", None]}, "a row has no key"),
        ({"key": ["s3://b/"]}, "is no URI of an object"),
        ({"key": ["s3://b/a"], "label": [None]}, "a row has no label"),
        ({"key": ["s3://b/a"], "label": [[1]]}, "labels are of type list"),
        ({"key": ["s3://b/a"], "size": ["big"]}, "cannot be read as Parquet"),
    ],
)
def test_parquet_that_cannot_be_meant_is_refused_in_one_line(tmp_path, columns, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        Manifest.from_parquet(parquet(tmp_path / "m", **columns))
    assert str(caught.value).startswith(str(tmp_path / "m"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_parquet_cut_short_is_refused(tmp_path, share):
    place = table(objects("a", "b")).to_parquet(tmp_path / "m.parquet")
    data = place.read_bytes()
    place.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ConfigurationError, match=r"m\.parquet: cannot be read as Parquet"):
        Manifest.from_parquet(place)
    with pytest.raises(ConfigurationError, match="absent: cannot be read as Parquet"):
        Manifest.from_parquet(tmp_path / "absent")


def test_key_that_is_no_text_is_not_written_as_parquet(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be written as Parquet"):
        table([ObjectInfo("b", "\ud800")]).to_parquet(tmp_path / "m.parquet")
    assert not list(tmp_path.iterdir())


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for call in (lambda: table(objects("a")).to_parquet(tmp_path / "m"), lambda: Manifest.from_parquet(tmp_path / "m")):
        with pytest.raises(ConfigurationError, match=r"pip install 'asyncds\[parquet\]'"):
            call()
