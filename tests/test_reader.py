"""The object as a file, as those who read files expect it."""

import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from asyncds.reader import S3Reader

BODY = b"first line\nsecond line\nrest"


@pytest.fixture
def reader():
    return S3Reader("bucket", "a/key", BODY, "etag")


def test_it_knows_where_it_came_from(reader):
    assert (reader.bucket, reader.key, reader.etag, reader.size) == ("bucket", "a/key", "etag", len(BODY))
    assert repr(reader) == "<S3Reader s3://bucket/a/key: 27 bytes>"
    assert "\n" not in repr(S3Reader("bucket", "odd\nkey", b""))


def test_it_is_a_read_only_file(reader):
    assert isinstance(reader, io.BufferedIOBase)
    assert (reader.readable(), reader.seekable(), reader.writable()) == (True, True, False)
    with pytest.raises(io.UnsupportedOperation):
        reader.write(b"x")
    with pytest.raises(io.UnsupportedOperation):
        reader.fileno()


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda file: file.read(), BODY),
        (lambda file: file.read(None), BODY),
        (lambda file: file.read(-1), BODY),
        (lambda file: file.read(5), b"first"),
        (lambda file: file.read(0), b""),
        (lambda file: file.read(1000), BODY),
        (lambda file: file.read1(5), b"first"),
        (lambda file: file.readline(), b"first line\n"),
        (lambda file: file.readline(3), b"fir"),
        (lambda file: file.readlines(), BODY.splitlines(keepends=True)),
        (lambda file: list(file), BODY.splitlines(keepends=True)),
    ],
)
def test_it_reads_like_a_file(reader, read, expected):
    assert read(reader) == read(io.BytesIO(BODY)) == expected


@pytest.mark.parametrize("method", ["readinto", "readinto1"])
def test_it_reads_into_a_buffer(reader, method):
    buffer = bytearray(8)
    assert getattr(reader, method)(buffer) == 8
    assert buffer == b"first li"
    reader.seek(-3, io.SEEK_END)
    assert getattr(reader, method)(buffer) == 3
    assert buffer[:3] == b"est"


@pytest.mark.parametrize(
    ("offset", "whence", "position"),
    [(3, 0, 3), (1000, 0, 27), (1, 1, 6), (100, 1, 27), (-2, 2, 25), (5, 2, 27), (0, 2, 27), (27, 0, 27)],
)
def test_seeking_beyond_the_end_stops_at_the_end(reader, offset, whence, position):
    reader.read(5)
    assert reader.seek(offset, whence) == reader.tell() == position
    assert reader.read(None) == BODY[position:]


def test_negative_position_is_an_error(reader):
    with pytest.raises(ValueError, match="negative"):
        reader.seek(-1)


def test_closed_file_reads_no_more(reader):
    with reader as same:
        assert same is reader
    assert reader.closed
    for use in (reader.read, reader.tell, reader.readline, lambda: reader.seek(0)):
        with pytest.raises(ValueError, match="closed"):
            use()
    reader.close()


def test_it_pickles_with_its_bytes(reader):
    twin = pickle.loads(pickle.dumps(reader))
    assert (twin.bucket, twin.key, twin.etag, twin.read()) == ("bucket", "a/key", "etag", BODY)


def test_pil_reads_it(png):
    with Image.open(S3Reader("b", "k", png(7, mode="RGB"))) as image:
        assert image.convert("RGB").getpixel((0, 0)) == (7, 7, 7)


def test_torch_loads_it():
    file, tensors = io.BytesIO(), {"weights": torch.arange(1000.0)}
    torch.save(tensors, file)
    assert torch.equal(torch.load(S3Reader("b", "k", file.getvalue()))["weights"], tensors["weights"])


@pytest.mark.parametrize("mode", ["", "gz"])
def test_tarfile_opens_it(mode):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=f"w:{mode}") as archive:
        member = tarfile.TarInfo("inside")
        member.size = len(BODY)
        archive.addfile(member, io.BytesIO(BODY))
    with tarfile.open(fileobj=S3Reader("b", "k", file.getvalue())) as archive:
        assert archive.extractfile("inside").read() == BODY


def test_numpy_loads_it():
    file, array = io.BytesIO(), np.arange(24).reshape(4, 6)
    np.savez(file, array=array)
    with np.load(S3Reader("b", "k", file.getvalue())) as archive:
        assert np.array_equal(archive["array"], array)
    assert np.array_equal(np.frombuffer(S3Reader("b", "k", array.tobytes()).read(), array.dtype), array.ravel())


def test_text_wrapper_reads_it():
    assert io.TextIOWrapper(S3Reader("b", "k", "é\nü".encode()), "utf-8").readlines() == ["é\n", "ü"]
