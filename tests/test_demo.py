"""The demo, as a user runs it and as what it leaves behind."""

import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import warnings

import pytest
import torch

from asyncds import demo
from asyncds.cli import main
from asyncds.demo import bucket, per_sample
from asyncds.errors import ConfigurationError, EndpointUnreachable, StoreError
from asyncds.testing import local_s3

TRAIN, TEST = 1437, 360
EPOCH = re.compile(
    r"^ +(?P<number>\d+) +(?P<loss>[\d.]+) +(?P<accuracy>[\d.]+)% +(?P<seconds>[\d.]+) +(?P<waiting>[\d.]+)"
    r" +(?P<gets>[\d,]+) +(?P<test_gets>[\d,]+) +(?P<hits>[\d,]+) +(?P<test_hits>[\d,]+)$",
    re.MULTILINE,
)


@pytest.fixture(scope="module")
def third() -> dict[str, bytes]:
    """Each third image, of training and test alike: what takes time is to upload, and to ask for each by itself."""
    return dict([*bucket.digits().items()][::3])


@pytest.fixture
def sizes(third, monkeypatch) -> tuple[int, int]:
    """How many images the demo has, of training and test: fewer than it has for users."""
    monkeypatch.setattr(demo, "digits", third.copy)
    train = sum(key.startswith("train/") for key in third)
    return train, len(third) - train


def check(printed: str, train: int, test: int, epochs: int) -> None:
    """Whether each image was asked for once, and the digits were learnt."""
    found = [
        {name: float(text.replace(",", "")) for name, text in row.groupdict().items()}
        for row in EPOCH.finditer(printed)
    ]
    warm = epochs - 1
    assert [(e["gets"], e["test_gets"]) for e in found] == [(train, test), *[(0, 0)] * warm]
    assert [(e["hits"], e["test_hits"]) for e in found] == [(0, 0), *[(train, test)] * warm]
    assert found[-1]["accuracy"] > 90
    assert found[0]["loss"] > found[-1]["loss"]
    assert re.search(rf"GETs at the server +│ +{train:,} │ +{train:,} │ +0 │", printed)
    assert not re.search("\x1b|\r|uploading|training,", printed), "a bar was drawn where nobody looks"
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.timeout(180)
def test_each_image_is_asked_for_once_and_the_digits_are_learnt(sizes, monkeypatch, capsys):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command line has one of its own
    monkeypatch.setattr(sys, "argv", ["asyncds", "demo", "--rtt", "2ms", "--epochs", "8"])
    main()
    printed = capsys.readouterr()
    assert printed.err == ""
    check(printed.out, *sizes, epochs=8)


@pytest.mark.thorough
@pytest.mark.timeout(180)
def test_the_command_does_so_with_all_images():
    command = [sys.executable, "-W", "error", "-m", "asyncds", "demo", "--rtt", "2ms"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=170)
    assert (done.returncode, done.stderr) == (0, "")
    check(done.stdout, TRAIN, TEST, epochs=3)


@pytest.mark.timeout(180)
def test_a_run_agrees_with_the_servers_own_count(s3_process, sizes, tmp_path, monkeypatch, capsys):
    train, test = sizes
    monkeypatch.setattr(demo, "_PER_SAMPLE_BUDGET_S", 0.5)
    monkeypatch.setattr(per_sample, "find_spec", lambda name: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # others use the common one at the same time
    before = what_is_there()
    result = demo.run(endpoint=s3_process.endpoint, rtt=0.001, epochs=2, workers=2)
    assert what_is_there() == before

    cold, warm = result.epochs
    assert (result.train, result.test) == (train, test)
    assert (cold.gets, cold.test_gets, warm.gets, warm.test_gets) == (train, test, 0, 0)
    assert (cold.hits, cold.test_hits, warm.hits, warm.test_hits) == (0, 0, train, test)
    assert result.per_sample.client == "botocore"
    assert result.per_sample.gets == result.per_sample.samples < train
    counted = s3_process.stats.requests
    assert counted["PUT"] == train + test
    assert counted["GET"] == cold.gets + cold.test_gets + result.per_sample.gets
    printed = capsys.readouterr().out
    assert f"measured on {result.per_sample.samples} images" in printed
    assert "The images stay in s3://mnist" in printed

    bucket.upload(bucket.Login(s3_process.endpoint), demo.digits())
    assert s3_process.stats.requests["PUT"] == counted["PUT"], "what is there already was uploaded again"


def what_is_there() -> list[object]:
    """What the demo leaves as it was; what torch and scikit-learn put there when they are first used is not its own."""
    foreign = "KMP_", "TORCHINDUCTOR_", "torchinductor_"
    names = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    files = sorted(path for path in os.listdir(tempfile.gettempdir()) if path.startswith("asyncds"))
    return [names, files, set(threading.enumerate()), torch.get_num_threads(), torch.get_rng_state().tolist()]


def test_images_of_the_user_are_not_mixed_with(s3):
    s3.put("mnist", "train/5/mine.png", b"precious")
    with pytest.raises(ConfigurationError, match=r"s3://mnist/train/5/mine\.png .* use another server"):
        demo.run(endpoint=s3.endpoint)
    assert s3.stats.requests["PUT"] == 0


@pytest.mark.timeout(30)
def test_an_upload_that_the_server_refuses_ends_with_its_reason():
    """And it does not wait for the server's leave to send a body, which a refusal never brings."""
    with local_s3("rclone") as server:
        login = bucket.Login(server.endpoint, (server.access_key, server.secret_key))
        with pytest.raises(StoreError, match=r"uploading to s3://mnist: 400 InvalidArgument .*train//1\.png"):
            bucket.upload(login, {"train/0.png": b"0", "train//1.png": b"1"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs=0: must be at least 1"),
        ({"workers": -1}, "workers=-1: must be at least 0"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"endpoint": "https://localhost:9000"}, "use http"),
        ({"endpoint": "localhost:9000"}, "write http://localhost:9000"),
    ],
)
def test_arguments_that_cannot_mean_anything_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        demo.run(**arguments)


def test_missing_extras_are_named_with_their_remedy(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r'pip install "asyncds\[demo\]"$'):
        demo.run()


def test_a_server_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(random, "random", lambda: 0.0)  # of which botocore makes its pauses between attempts
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with pytest.raises(EndpointUnreachable, match=r"no connection to 127\.0\.0\.1:1"):
        demo.run(endpoint="http://127.0.0.1:1")
