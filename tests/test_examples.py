"""The examples, as their readers run them: in a directory with a `.env` file, against a real server."""

import ast
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import console
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from urllib3 import Retry

from asyncds.demo import bucket
from asyncds.stats import COUNTERS
from asyncds.testing import LocalS3, S3Server, local_s3

EXAMPLES = Path(__file__).parent.parent / "examples"
TRAIN, PER_SAMPLE = EXAMPLES / "train_minio.py", EXAMPLES / "per_sample_dataset.py"
LOG = EXAMPLES / "log_statistics.py"
NOBODY = "127.0.0.1:1"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
PRELOADED = ["torchvision.models", "torchvision.transforms.v2", "sklearn.datasets", "minio", "asyncds.dataset"]
# What an example needs beyond the tests' own environment, and how to get it.
EXTRAS = {
    "train_lightning.py": ("lightning", "pip install -e '.[frameworks]'"),
    "aioboto3_session.py": ("aioboto3", "pip install -e '.[aioboto3]'"),
}
LONG = ("train_lightning.py", "torchrun")  # tens of seconds, most of it imports
BY_THEMSELVES = ("train_minio.py", "per_sample_dataset.py", "log_statistics.py")  # have tests of their own here

pytestmark = pytest.mark.timeout(180)


def third(images: dict[str, bytes]) -> dict[str, bytes]:
    """Each third one, of training and test alike: what takes time is to put, get and decode them."""
    return dict([*images.items()][::3])


@pytest.fixture(scope="module")
def server() -> Iterator[LocalS3]:
    """A server that holds a third of the demo's images: 479 for training."""
    with local_s3() as server:
        login = bucket.Login(server.endpoint, (server.access_key, server.secret_key))
        bucket.upload(login, third(bucket.digits()))
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


class Ended(NamedTuple):
    code: int
    output: str
    errors: str


def play(script: str, arguments: list[str], folder: Path, variables: dict[str, str]) -> None:
    """Be `python -W error script`, in a process that has imported torch already; Lightning is allowed its warnings."""
    for stream, name in ((1, "output"), (2, "errors")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv[:], sys.path[:0] = [script, *arguments], [str(EXAMPLES)]
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # workers start as in any process, and not as this one did
    warnings.simplefilter("default" if "lightning" in script else "error")
    runpy.run_path(script, run_name="__main__")


@pytest.fixture
def start(fork_server, child, tmp_path) -> Callable[..., Ended]:
    """Run a command of the page, and wait for its end."""

    def run(command: str, variables: dict[str, str]) -> Ended:
        python, script, *arguments = shlex.split(command)
        if python != "python":
            done = console.run(command, tmp_path, variables)
            return Ended(done.returncode, done.stdout, "" if python == "torchrun" else done.stderr)
        process = child("forkserver", play, script, arguments, tmp_path, variables, wait=False)
        process.join(120)
        assert process.exitcode is not None, f"{command} goes on"
        return Ended(process.exitcode, (tmp_path / "output").read_text(), (tmp_path / "errors").read_text())

    return run


@pytest.fixture
def sentence_of(monkeypatch, tmp_path, capsys) -> Callable[..., str]:
    """Run a script that is to end with a sentence and nothing else, in this process, and soon."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Retry, "sleep", lambda *_: None)  # of MinIO's SDK, six seconds in all

    def run(script: Path, variables: Mapping[str, str]) -> str:
        monkeypatch.setattr(sys, "argv", [str(script)])
        impatient = {**variables, "ASYNCDS_FIRST_CONTACT": "0.5"}
        with patch.dict(os.environ, impatient, clear=True), pytest.raises(SystemExit) as left:
            runpy.run_path(str(script), run_name="__main__")
        assert "\n" not in left.value.code
        assert capsys.readouterr() == ("", "")
        return left.value.code

    return run


@pytest.fixture
def run(start, tmp_path) -> Callable[..., Ended]:
    """Run a script in a folder with this `.env`."""

    def run(script: Path, dotenv: str, *arguments: str) -> Ended:
        (tmp_path / ".env").write_text(dotenv)
        own = {"ASYNCDS_CACHE_DIR": str(tmp_path / "cache")}
        return start(f"python {shlex.join([str(script), *arguments])}", os.environ | own)

    return run


def test_train_minio_learns(dotenv, run):
    done = run(TRAIN, dotenv, "--epochs", "3")
    assert (done.code, done.errors) == (0, "")
    lines = [
        re.fullmatch(r"epoch (\d): loss [\d.]+, test accuracy ([\d.]+)%, [\d.]+ s", line)
        for line in done.output.splitlines()
    ]
    assert [line and line[1] for line in lines] == ["1", "2", "3"]
    assert float(lines[-1][2]) > 30, "guessing gives 10"


def test_train_minio_differs_from_the_s3_connectors_script_by_its_import(dotenv, tmp_path, run):
    pytest.importorskip("s3torchconnector")
    text = TRAIN.read_text()
    ours = "from asyncds import AsyncdsError, CachedS3MapDataset as S3MapDataset, S3Reader"
    theirs = "from s3torchconnector import S3MapDataset, S3Reader"
    assert ours in text
    script = tmp_path / "with_the_s3_connector.py"
    script.write_text(text.replace(f"# {theirs}", theirs).replace(ours, "AsyncdsError = ()"))
    done = run(script, dotenv, "--epochs", "1")
    assert done.code == 0, done.errors
    assert done.output.startswith("epoch 1: loss ")


def test_per_sample_dataset_reads_a_few_in_workers(dotenv, run):
    arguments = "--smoke-test-size", "60", "--workers", "2"
    done = run(PER_SAMPLE, dotenv, *arguments)
    assert (done.code, done.errors) == (0, "")
    assert done.output.startswith("epoch 1: 60 samples, ")


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
def test_a_wrong_value_is_answered_in_one_sentence(script, name, value, sentence, dotenv, tmp_path, sentence_of):
    changed = re.sub(f"^{name}=.*$", f"{name}={value}", dotenv, flags=re.MULTILINE)
    (tmp_path / ".env").write_text(changed)
    found = sentence_of(script, os.environ)
    assert re.match(sentence, found), found


def test_statistics_are_logged_for_each_epoch(dotenv, tmp_path, run):
    done = run(LOG, dotenv, "--folder", str(tmp_path / "runs"))
    assert (done.code, done.errors) == (0, "")
    lines = done.output.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["epoch 1", "epoch 2"]
    assert "479 samples" in lines[1]
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    logged = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert (logged["asyncds/gets"], logged["asyncds/samples"]) == ([479, 0], [479, 479])
    assert logged["asyncds/hits"][1] == 479
    assert 0 < logged["asyncds/prefetch_hits"][0] <= 479
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


# the page of examples, and what it shows


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


BLOCKS = console.blocks(console.PAGE.read_text())
ALONE = [
    pytest.param(
        block,
        id=str(block),
        marks=pytest.mark.thorough if any(name in block.text for name in (*LONG, *BY_THEMSELVES)) else (),
    )
    for block in BLOCKS
]


@contextmanager
def holding(digits: dict[str, bytes], pictures: dict[str, bytes]) -> Iterator[console.Server]:
    keys = "AKIAEXAMPLE", "a-secret-of-the-tests"
    with S3Server(process=True, credentials=keys) as server:
        for name, objects in (("mnist", digits), ("imagenet", pictures)):
            server.create_bucket(name)
            server.put_many(name, objects)
        yield console.Server(server.endpoint, *keys)


@pytest.fixture(scope="module")
def stand_in() -> Iterator[console.Server]:
    """A server with what the page's has."""
    with holding(bucket.digits(), console.pictures()) as server:
        yield server


@pytest.fixture(scope="module")
def smaller() -> Iterator[console.Server]:
    """A server with some of it, where only numbers depend on how much there is."""
    with holding(third(bucket.digits()), dict([*console.pictures().items()][:80])) as server:
        yield server


def skip_without(needs: str) -> None:
    for name, (module, remedy) in EXTRAS.items():
        if name in needs and find_spec(module) is None:
            pytest.skip(f"{name} needs {module}: {remedy}")


def check_block(block: console.Block, server: console.Server, folder: Path, run: Callable[..., Ended]) -> None:
    """Compare what each command prints with what the page shows, but for numbers."""
    variables = console.prepared(folder, server)
    for command, shown in block.commands:
        done = run(command, variables)
        killed = shown.endswith("Killed\n")
        assert done.code in ((-9, 137) if killed else (0,)), done.errors
        assert console.shape(console.as_shown(done.output, server)) == console.shape(shown.removesuffix("Killed\n"))
        assert done.errors == "" or "lightning" in command or killed


@pytest.mark.parametrize("block", ALONE)
def test_the_page_shows_what_examples_print(block, request, tmp_path, start):
    skip_without(block.text)
    if block.uploads:
        with S3Server(process=True) as empty:
            check_block(block, console.Server(empty.endpoint, "any", "keys"), tmp_path, start)
    else:
        whole = any(name in block.text for name in ("resume.py", *LONG, *BY_THEMSELVES))
        check_block(block, request.getfixturevalue("stand_in" if whole else "smaller"), tmp_path, start)


@pytest.fixture(scope="module")
def minio() -> Iterator[console.Server]:
    if shutil.which("minio") is None:
        pytest.skip("MinIO is not there: `make servers` builds it, which takes Go")
    with console.started("minio") as server:
        console.fill(server)
        yield server


@pytest.mark.thorough
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_the_page_shows_what_examples_print_with_minio(block, minio, tmp_path):
    """As their readers run them, in processes of their own."""

    def run(command: str, variables: dict[str, str]) -> Ended:
        done = console.run(command, tmp_path, variables)
        return Ended(done.returncode, done.stdout, "" if command.startswith("torchrun") else done.stderr)

    skip_without(block.text)
    if block.uploads:
        with console.started("minio") as empty:
            check_block(block, empty, tmp_path, run)
    else:
        check_block(block, minio, tmp_path, run)


def test_a_resumed_run_ends_with_the_weights_of_an_undisturbed_one():
    """What the page shows, which the test above repeats but for numbers."""
    (block,) = (block for block in BLOCKS if "resume.py" in block.text)
    (_, killed), (_, resumed), (_, undisturbed) = block.commands
    assert resumed.splitlines()[0].startswith("goes on in epoch 1, after batch 10 of ")
    assert killed.splitlines()[:-1] + resumed.splitlines()[1:] == undisturbed.splitlines()


def test_a_run_that_is_killed_anywhere_ends_with_the_same_weights(stand_in, tmp_path, start):
    variables = console.prepared(tmp_path, stand_in)
    last = start("python examples/resume.py --epochs 2 --checkpoint other.pt", variables).output.splitlines()[-1]
    for batches in (17, 30):  # in the second epoch, and with its last batch, which is a checkpoint, too
        assert start(f"python examples/resume.py --epochs 2 --lose-after {batches}", variables).code == -9
    assert start("python examples/resume.py --epochs 2", variables).output.splitlines()[-1] == last


def test_ranks_share_an_epoch_out(stand_in, tmp_path, child, fork_server):
    """As torchrun starts them, without its imports."""
    port, ranks = free_port(), []
    for rank in range(2):
        (folder := tmp_path / str(rank)).mkdir()
        job = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        own = {"MASTER_ADDR": "127.0.0.1", "ASYNCDS_CACHE_DIR": str(tmp_path / "cache")}
        variables = console.prepared(folder, stand_in) | {name: str(value) for name, value in job.items()} | own
        ranks.append(child("forkserver", play, "examples/train_ddp.py", [], folder, variables, wait=False))
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0], [(tmp_path / r / "errors").read_text() for r in "01"]
    lines = (tmp_path / "0" / "output").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines[:3]] == [f"epoch {number}: 1" for number in (1, 2, 3)]
    assert lines[3] == "2 ranks took 1,437 GETs for 1,437 pictures"
    assert (tmp_path / "1" / "output").read_text() == ""


def test_the_page_names_every_example():
    named = set(re.findall(r"\]\(\.\./examples/([\w.]+)\)", console.PAGE.read_text()))
    assert named == {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert {path.name for path in SCRIPTS} == {name for name in named if any(name in block.text for block in BLOCKS)}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_what_it_is_for(script):
    text = script.read_text()
    assert len(text.splitlines()) < 80
    assert ast.get_docstring(ast.parse(text))


# bad input

NOBODY_ANSWERS = rf"(error: .*no connection to|no server answers at) {NOBODY}.*(check that|start) "
STARTING = ("aioboto3_session.py", "train_ddp.py", "train_lightning.py")  # workers or threads, before they ask a server
FOUND = [pytest.param(name, marks=pytest.mark.thorough if name in LONG else ()) for name in STARTING]


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.name not in STARTING], ids=lambda path: path.stem)
def test_an_example_without_a_server_ends_with_a_sentence(script, tmp_path, sentence_of):
    skip_without(script.name)
    variables = console.prepared(tmp_path, console.Server(f"http://{NOBODY}", "key", "secret"))
    assert re.match(NOBODY_ANSWERS, sentence_of(script, variables))


@pytest.mark.parametrize("script", FOUND)
def test_an_example_that_starts_something_without_a_server_does_so_too(script, tmp_path, start):
    skip_without(script)
    variables = console.prepared(tmp_path, console.Server(f"http://{NOBODY}", "key", "secret"))
    variables |= {"ASYNCDS_FIRST_CONTACT": "0.5"}
    if script == "train_ddp.py":
        variables |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ended = start(f"python examples/{script}", variables)
    assert (ended.code, ended.output) == (1, "")
    *before, sentence = ended.errors.splitlines()
    assert before == [] or ("lightning" in script and "Traceback" not in ended.errors)
    assert re.match(NOBODY_ANSWERS, sentence)


def test_servers_that_differ_are_told(tmp_path, sentence_of):
    variables = console.prepared(tmp_path, console.Server(f"http://{NOBODY}", "key", "secret"))
    found = sentence_of(EXAMPLES / "tutorial.py", variables | {"MINIO_URL": "localhost:9000"})
    assert found == f"error: MINIO_URL is localhost:9000, but AWS_* variables mean {NOBODY}: keep one"


@pytest.mark.parametrize("script", ["tutorial.py", "warm_then_train.py", "async_fetch.py", "imagenet.py"])
def test_half_a_pair_of_keys_is_told(script, tmp_path, sentence_of):
    variables = console.prepared(tmp_path, console.Server(f"http://{NOBODY}", "key", ""))
    sentence = sentence_of(EXAMPLES / script, variables)
    assert sentence.startswith("error: AWS_SECRET_ACCESS_KEY is missing where AWS_ACCESS_KEY_ID is set: ")


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        (
            "imagenet.py",
            "IMAGENET_BUCKET_NAME not set: write IMAGENET_BUCKET_NAME=... into the file .env",
        ),
        ("train_ddp.py", "start this with torchrun --nproc-per-node 2, which tells each process its rank"),
    ],
)
def test_what_is_missing_is_told(script, sentence, sentence_of):
    variables = {name: value for name, value in os.environ.items() if name != "RANK"}
    assert sentence_of(EXAMPLES / script, variables) == sentence


# the notebook


@pytest.mark.thorough
def test_the_notebook_shows_what_its_cells_print(stand_in, tmp_path):
    for module in ("nbclient", "ipykernel"):
        if find_spec(module) is None:
            pytest.skip(f"the notebook needs {module}: pip install -e '.[frameworks]'")
    script = "import console, os, pathlib; print(console.execute(console.NOTEBOOK, pathlib.Path(), dict(os.environ)))"
    variables = console.prepared(tmp_path, stand_in) | {"PYTHONPATH": f"{Path(__file__).parent}:{console.ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    shown = console.printed(console.NOTEBOOK.read_text())
    assert [console.shape(text) for text in console.printed(done.stdout)] == [console.shape(text) for text in shown]
    assert len(shown) > 3


def test_the_page_shows_a_sample_as_the_notebook_does():
    (shown,) = re.findall(r"^```text\n(.*?)^```$", console.PAGE.read_text(), re.MULTILINE | re.DOTALL)
    printed = console.printed(console.NOTEBOOK.read_text())
    assert shown.splitlines() in [[line.rstrip() for line in text.rstrip().splitlines()] for text in printed]


# what is not installed


@pytest.mark.parametrize(
    ("script", "module", "remedy"),
    [
        ("aioboto3_session.py", "aioboto3", "pip install 'asyncds[vision,aioboto3]'"),
        ("augment_albumentations.py", "albumentations", "pip install albumentations"),
        ("log_statistics.py", "torch.utils.tensorboard", "pip install tensorboard"),
        ("train_lightning.py", "lightning.pytorch", "pip install lightning"),
    ],
)
def test_an_example_without_its_library_says_how_to_get_it(script, module, remedy, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not there
    with patch.dict(os.environ), pytest.raises(SystemExit) as left:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert re.fullmatch(f".*{module}.*: {re.escape(remedy)}", str(left.value.code))
