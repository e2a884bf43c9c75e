"""The demo, as a user runs it and as what it leaves behind."""

import os
import re
import subprocess
import sys
import tempfile
import threading

import pytest
import torch

from asyncds import demo
from asyncds.demo import bucket, per_sample
from asyncds.errors import ConfigurationError, EndpointUnreachable, StoreError
from asyncds.testing import local_s3

TRAIN, TEST = 1437, 360
EPOCH = re.compile(
    r"^ +(?P<number>\d+) +(?P<loss>[\d.]+) +(?P<accuracy>[\d.]+)% +(?P<seconds>[\d.]+) +(?P<waiting>[\d.]+)"
    r" +(?P<gets>[\d,]+) +(?P<test_gets>[\d,]+) +(?P<hits>[\d,]+) +(?P<test_hits>[\d,]+)$",
    re.MULTILINE,
)


@pytest.mark.timeout(180)
def test_each_image_is_asked_for_once_and_the_digits_are_learnt():
    command = [sys.executable, "-W", "error", "-m", "asyncds", "demo", "--rtt", "2ms"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=170)
    assert (done.returncode, done.stderr) == (0, "")
    epochs = [
        {name: float(text.replace(",", "")) for name, text in row.groupdict().items()}
        for row in EPOCH.finditer(done.stdout)
    ]
    assert [(e["gets"], e["test_gets"]) for e in epochs] == [(TRAIN, TEST), (0, 0), (0, 0)]
    assert [(e["hits"], e["test_hits"]) for e in epochs] == [(0, 0), (TRAIN, TEST), (TRAIN, TEST)]
    assert epochs[-1]["accuracy"] > 90
    assert epochs[0]["loss"] > epochs[-1]["loss"]
    assert re.search(r"GETs at the server +│ +1,437 │ +1,437 │ +0 │", done.stdout)
    assert not re.search("\x1b|\r|uploading|training,", done.stdout), "a bar was drawn where nobody looks"
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.timeout(180)
def test_a_run_agrees_with_the_servers_own_count(s3_process, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "_PER_SAMPLE_BUDGET_S", 0.5)
    monkeypatch.setattr(per_sample, "find_spec", lambda name: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # others use the common one at the same time
    before = what_is_there()
    result = demo.run(endpoint=s3_process.endpoint, rtt=0.001, epochs=2, workers=2)
    assert what_is_there() == before

    cold, warm = result.epochs
    assert (result.train, result.test) == (TRAIN, TEST)
    assert (cold.gets, cold.test_gets, warm.gets, warm.test_gets) == (TRAIN, TEST, 0, 0)
    assert (cold.hits, cold.test_hits, warm.hits, warm.test_hits) == (0, 0, TRAIN, TEST)
    assert result.per_sample.client == "botocore"
    assert result.per_sample.gets == result.per_sample.samples < TRAIN
    counted = s3_process.stats.requests
    assert counted["PUT"] == TRAIN + TEST
    assert counted["GET"] == cold.gets + cold.test_gets + result.per_sample.gets
    printed = capsys.readouterr().out
    assert f"measured on {result.per_sample.samples} images" in printed
    assert "The images stay in s3://mnist" in printed

    bucket.upload(bucket.Login(s3_process.endpoint), bucket.digits())
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
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with pytest.raises(EndpointUnreachable, match=r"no connection to 127\.0\.0\.1:1"):
        demo.run(endpoint="http://127.0.0.1:1")
