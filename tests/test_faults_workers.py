"""What comes out of workers and into logs: every class of error as itself, keys in one line, and no secret anywhere."""

import logging
import pickle
import traceback

import pytest
from torch.utils.data import DataLoader, Dataset

from asyncds import CachedS3MapDataset, S3Reader, errors
from asyncds.errors import AsyncdsError, ObjectNotFound
from asyncds.testing import Fault, S3Server

CLASSES = [getattr(errors, name) for name in errors.__all__]
CANARIES = "canary-of-the-secret-key", "canary-of-the-session-token"

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")


class Fails(Dataset):
    """Each sample raises another class of error."""

    def __len__(self):
        return len(CLASSES)

    def __getitem__(self, index):
        raise CLASSES[index](f"s3://mnist/train/{index}.png: told by a worker")


def test_every_class_of_error_keeps_its_type_and_the_key_out_of_a_worker():
    batches = iter(DataLoader(Fails(), 1, num_workers=1, multiprocessing_context="fork"))
    for index, kind in enumerate(CLASSES):
        with pytest.raises(AsyncdsError, match=f"s3://mnist/train/{index}.png: told by a worker") as caught:
            next(batches)
        assert type(caught.value) is kind
    del batches


@pytest.mark.parametrize("name", ["new\nline", "cr\r\nlf", "\x1b[31mred", "\u2028line", "\u202ereversed"])
def test_key_cannot_forge_a_line_of_a_log(s3, name):
    s3.put_many("mnist", {"a": b"a", name: b"x"})
    with CachedS3MapDataset.from_prefix("s3://mnist/", transform=S3Reader.read) as dataset:
        index = [info.key for info in dataset.manifest].index(name)
        s3.delete("mnist", name)
        with pytest.raises(ObjectNotFound) as caught:
            dataset[index]
    assert str(caught.value).isprintable()


def test_secrets_are_in_no_error_log_pickle_or_file_whatever_the_server_sends_back(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG, logger="asyncds")
    credentials = "AKIAEXAMPLE", *CANARIES
    for name, value in zip(("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"), credentials, strict=True):
        monkeypatch.setenv(f"AWS_{name}", value)
    said = []
    with S3Server(credentials=credentials, check_signatures=True) as server:
        server.put_many("mnist", {f"{number}": b"x" for number in range(9)})
        options = {"endpoint": server.endpoint, "cache_dir": tmp_path, "retries": 1, "transform": S3Reader.read}
        with CachedS3MapDataset.from_prefix("s3://mnist/", **options) as dataset:
            assert dataset[0] == b"x"
            said += [repr(dataset), pickle.dumps(dataset).decode("latin-1")]
            server.script("mnist", "1", [Fault.status(403, body="".join(CANARIES).encode())], forever=True)
            server.script("mnist", "2", [Fault.reset(0)], forever=True)
            server.script("mnist", "3", [Fault.redirect("http://elsewhere.example/")], forever=True)
            changes = {
                4: lambda: setattr(server, "clock_skew", 86_400),
                5: lambda: server.change_credentials("AKIAEXAMPLE", "another secret", CANARIES[1]),  # wrong signature
                6: lambda: server.change_credentials("AKIAEXAMPLE", CANARIES[0], "another token"),  # expired
            }
            for index in range(1, 7):
                changes.get(index, lambda: None)()
                with pytest.raises(AsyncdsError) as caught:
                    dataset[index]
                server.clock_skew = 0
                said += [repr(caught.value), *traceback.format_exception(caught.value)]
    assert "RequestTimeTooSkewed" in "".join(said)
    assert "SignatureDoesNotMatch" in "".join(said)
    assert "ExpiredToken" in "".join(said)
    said.append(caplog.text)
    said += [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    for canary in CANARIES:
        assert not [text for text in said if canary in text]
    assert "given up" in caplog.text
