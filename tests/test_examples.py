"""The examples, as their readers run them: in a directory with a `.env` file, against a real server."""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from asyncds.demo import bucket
from asyncds.stats import COUNTERS
from asyncds.testing import LocalS3, local_s3

EXAMPLES = Path(__file__).parent.parent / "examples"
TRAIN, PER_SAMPLE = EXAMPLES / "train_minio.py", EXAMPLES / "per_sample_dataset.py"
LOG = EXAMPLES / "log_statistics.py"
NOBODY = "127.0.0.1:1"

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def server() -> Iterator[LocalS3]:
    """A server that holds the demo's images."""
    with local_s3() as server:
        bucket.upload(bucket.Login(server.endpoint, (server.access_key, server.secret_key)), bucket.digits())
        yield server


@pytest.fixture
def dotenv(server) -> str:
    names = {
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_REGION": server.region,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
        "MINIO_URL": server.endpoint.removeprefix("http://"),
        "MINIO_ACCESS_KEY": server.access_key,
        "MINIO_SECRET_KEY": server.secret_key,
        "MINIO_SECURE": "false",
        "MNIST_BUCKET_NAME": "mnist",
    }
    return "".join(f"{name}={value}\n" for name, value in names.items())


def run(script: Path, dotenv: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / ".env").write_text(dotenv)
    command = [sys.executable, "-W", "error", str(script), *arguments]
    settings = {"ASYNCDS_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}  # others need the cores, too
    return subprocess.run(command, cwd=folder, env=os.environ | settings, capture_output=True, text=True, timeout=120)


def test_train_minio_learns(dotenv, tmp_path):
    done = run(TRAIN, dotenv, tmp_path, "--epochs", "1")
    assert (done.returncode, done.stderr) == (0, "")
    accuracy = re.fullmatch(r"epoch 1: loss [\d.]+, test accuracy ([\d.]+)%, [\d.]+ s\n", done.stdout)
    assert accuracy is not None
    assert float(accuracy[1]) > 30, "guessing gives 10"


def test_train_minio_differs_from_the_s3_connectors_script_by_its_import(dotenv, tmp_path):
    pytest.importorskip("s3torchconnector")
    text = TRAIN.read_text()
    ours = "from asyncds import AsyncdsError, CachedS3MapDataset as S3MapDataset, S3Reader"
    theirs = "from s3torchconnector import S3MapDataset, S3Reader"
    assert ours in text
    script = tmp_path / "with_the_s3_connector.py"
    script.write_text(text.replace(f"# {theirs}", theirs).replace(ours, "AsyncdsError = ()"))
    done = run(script, dotenv, tmp_path, "--epochs", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("epoch 1: loss ")


def test_per_sample_dataset_reads_a_few_in_workers(dotenv, tmp_path):
    arguments = "--smoke-test-size", "300", "--workers", "2"
    done = run(PER_SAMPLE, dotenv, tmp_path, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("epoch 1: 300 samples, ")


@pytest.mark.parametrize(
    ("script", "name", "value", "sentence"),
    [
        (TRAIN, "MNIST_BUCKET_NAME", "", r"MNIST_BUCKET_NAME not set: write NAME=value into the file \.env"),
        (TRAIN, "AWS_SECRET_ACCESS_KEY", "wrong", ".*check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        (TRAIN, "AWS_ENDPOINT_URL", f"http://{NOBODY}", f".* no connection to {NOBODY} .*check that the server runs"),
        (TRAIN, "MNIST_BUCKET_NAME", "another", ".*the bucket does not exist"),
        (PER_SAMPLE, "MINIO_URL", "", r"MINIO_URL not set: write NAME=value into the file \.env"),
        (PER_SAMPLE, "MINIO_SECRET_KEY", "wrong", "the server refuses: correct MINIO_ACCESS_KEY, MINIO_SECRET_KEY"),
        (PER_SAMPLE, "MINIO_URL", NOBODY, f"no server answers at {NOBODY}: start MinIO"),
        (PER_SAMPLE, "MINIO_URL", f"http://{NOBODY}", ".*MINIO_URL is host:port without http://"),
    ],
)
def test_a_wrong_value_is_answered_in_one_sentence(
    script, name, value, sentence, dotenv, tmp_path, monkeypatch, capsys
):
    changed = re.sub(f"^{name}=.*$", f"{name}={value}", dotenv, flags=re.MULTILINE)
    (tmp_path / ".env").write_text(changed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setenv("ASYNCDS_FIRST_CONTACT", "0.5")
    with patch.dict(os.environ), pytest.raises(SystemExit) as left:
        runpy.run_path(str(script), run_name="__main__")
    assert re.match(sentence, left.value.code), left.value.code
    assert "\n" not in left.value.code
    assert capsys.readouterr() == ("", "")


def test_statistics_are_logged_for_each_epoch(dotenv, tmp_path):
    done = run(LOG, dotenv, tmp_path, "--folder", str(tmp_path / "runs"))
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["epoch 1", "epoch 2"]
    assert "1,437 samples" in lines[1]
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    logged = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert (logged["asyncds/gets"], logged["asyncds/samples"]) == ([1437, 0], [1437, 1437])
    assert logged["asyncds/hits"][1] == 1437
    assert 0 < logged["asyncds/prefetch_hits"][0] <= 1437
    assert logged.keys() >= {f"asyncds/{name}" for name in (*COUNTERS, "latency_p99_s")}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than some machines have cores
def test_code_of_the_readme_feeds_a_loader(monkeypatch, s3, png):
    s3.create_bucket("imagenet")
    for name, ending in (("mnist", "png"), ("imagenet", "JPEG")):
        s3.put_many(name, {f"train/{number % 2}/{number:02}.{ending}": png(number) for number in range(20)})
    blocks = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    for block in blocks[:2]:
        exec(block, names)
    images, labels = next(iter(names["loader"]))
    assert (images.shape, sorted(set(labels.tolist()))) == ((20, 3, 28, 28), [0, 1])
    exec(blocks[2], names)
    assert (names["state"]["batches"], len([*names["again"]])) == (0, 1), "that batch was the whole epoch"
    for dataset, size in ((names["train"], 18), (names["held_out"], 2)):
        images, _ = next(iter(DataLoader(dataset, 20)))
        assert images.shape == (size, 3, 224, 224)


def test_asynchronous_code_of_the_readme_gets_all_bytes(s3, capsys):
    s3.create_bucket("mnist")
    objects = {f"train/{number:02}.bin": bytes(number) for number in range(30)}
    s3.put_many("mnist", objects)
    block = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "README.md").read_text(), re.DOTALL)[3]
    gets = []
    for _ in range(2):
        exec(block, {})
        gets.append(s3.stats.requests["GET"])
        lines = capsys.readouterr().out.splitlines()
        assert sorted(lines[:-1]) == sorted(f"{key} {len(body)}" for key, body in objects.items())
        assert lines[-1] == "7 bytes"
    # The object that is asked for by its name alone is of a version that nobody has told: one more GET, once.
    assert gets == [31, 31], "the second time is not served from the cache"
