"""The command line, as a user runs it: a process, its output, its exit code."""

import os
import re
import signal
import subprocess
import sys

import pytest

from asyncds.cache import Cache
from asyncds.entry import NewEntry
from asyncds.settings import Settings
from asyncds.testing import Fault, S3Server

KEYS = [f"train/{number % 3}/{number:02}.bin" for number in range(30)]


@pytest.fixture
def bucket(s3_process: S3Server) -> S3Server:
    s3_process.put_many("mnist", {key: key.encode() * 9 for key in KEYS})
    s3_process.put("mnist", "train/", b"")
    return s3_process


def start(*arguments: str, **options) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-m", "asyncds", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL} | options
    return subprocess.Popen(command, text=True, **pipes)


def run(*arguments: str) -> tuple[int, str, str]:
    with start(*arguments) as process:
        output, errors = process.communicate(timeout=50)
    return process.returncode, output, errors


def test_warm_fetches_each_object_once_and_says_what_it_did(bucket):
    code, output, errors = run("warm", "s3://mnist/train")
    assert (code, errors) == (0, "")
    assert re.fullmatch(r"s3://mnist/train: 30 objects: 0 were cached, 30 fetched \(\S+ MB in \S+ s\)\n", output)
    assert set(bucket.stats.gets.values()) == {1}
    bucket.reset_counts()
    code, output, errors = run("warm", "s3://mnist/train")
    assert (code, errors) == (0, "")
    assert "30 were cached, 0 fetched" in output
    assert bucket.stats.requests == {"LIST": 1}


def test_warm_takes_what_matches_up_to_the_limit(bucket):
    code, output, _ = run("warm", "s3://mnist/train", "--match", "*/1/*", "--limit", "4")
    assert (code, "4 objects" in output) == (0, True)
    assert sorted(key for _, key in bucket.stats.gets) == [key for key in sorted(KEYS) if "/1/" in key][:4]


def test_quiet_warm_prints_nothing(bucket):
    assert run("warm", "s3://mnist/train", "--quiet") == (0, "", "")


def test_warm_draws_a_bar_in_a_terminal(bucket):
    reader, writer = os.openpty()
    with start("warm", "s3://mnist/train", stderr=writer) as process:
        os.close(writer)
        drawn = b""
        try:
            while chunk := os.read(reader, 4096):
                drawn += chunk
        except OSError:  # how Linux says that nobody writes to the terminal any more
            pass
        os.close(reader)
    assert process.returncode == 0
    assert b"warming s3://mnist/train" in drawn
    assert b"30/30" in drawn


def test_warm_names_what_failed_and_exits_with_one(bucket):
    for key in KEYS[:7]:
        bucket.script("mnist", key, [Fault.status(403, "AccessDenied")], forever=True)
    code, output, errors = run("warm", "s3://mnist/train")
    assert (code, "7 failed" in output) == (1, True)
    lines = errors.splitlines()
    assert len(lines) == 6
    assert all(line.startswith("error: s3://mnist/train/") and "403" in line for line in lines[:5])
    assert lines[5] == "error: … and 2 more"


def test_warm_that_does_not_fit_says_so_and_exits_with_one(bucket):
    code, output, errors = run("warm", "s3://mnist/train", "--cache-size", "1B")
    assert (code, "30 did not fit" in output) == (1, True)
    assert errors == "error: 30 objects do not fit: raise ASYNCDS_CACHE_SIZE or free the disk\n"


def test_interrupted_warm_keeps_what_arrived_and_goes_on(bucket):
    bucket.script("mnist", KEYS[0], [Fault.stall()], forever=True)
    with start("warm", "s3://mnist/train", start_new_session=True) as process:
        while bucket.stats.requests["GET"] < 30 or bucket.stats.in_flight != 1:  # for as long as the test has time
            pass
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=10)
    assert (process.returncode, output) == (130, "")
    assert errors == "interrupted: what arrived is kept; the same command goes on from there\n"
    bucket.clear_scripts()
    code, output, _ = run("warm", "s3://mnist/train")
    assert (code, "29 were cached, 1 fetched" in output) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["mnist"], 2, "error: 'mnist' is no S3 URI: write s3://bucket/key"),
        (["s3://mnist/nothing"], 1, "there is nothing under this prefix"),
        (["s3://no-such-bucket/x"], 1, "the bucket does not exist"),
        (["s3://mnist", "--cache-size", "lots"], 2, "error: cache_size='lots': must be bytes with a unit"),
        (
            ["s3://mnist", "--concurrency", "0"],
            2,
            "error: concurrency='0': must be auto, or a whole number from 1 to 4096",
        ),
        (["s3://mnist", "--endpoint", "localhost:9"], 2, "write http://localhost:9"),
        (["s3://mnist", "--limit", "0"], 2, "Error: Invalid value for '--limit'"),
    ],
)
def test_wrong_call_gets_one_sentence_and_its_exit_code(bucket, arguments, code, sentence):
    found, output, errors = run("warm", *arguments)
    assert (found, output) == (code, "")
    assert sentence in errors
    assert "Traceback" not in errors


def test_help_needs_neither_torch_nor_botocore():
    script = (
        "import sys\nfrom asyncds.cli import main\nsys.argv = ['asyncds', '--help']\n"
        "try:\n    main()\nfinally:\n    print({'torch', 'botocore', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (0, "")
    assert "warm" in done.stdout
    assert done.stdout.endswith("set()\n")


def test_verify_finds_and_mends(bucket, tmp_path):
    assert run("warm", "s3://mnist/train")[0] == 0
    code, output, errors = run("verify")
    assert (code, errors) == (0, "")
    assert "30 entries" in output
    folder = Settings().cache_dir / "asyncds" / "objects" / "ab"
    folder.mkdir(0o700, exist_ok=True)
    (folder / f"{0:030x}.tmp").touch(0o600)
    code, output, errors = run("verify")
    assert (code, errors.splitlines()[0].partition(" (")[0]) == (1, "temporary: 1")
    code, output, errors = run("verify", "--fix")
    assert (code, "mended" in output) == (0, True)
    assert run("verify")[0] == 0


@pytest.mark.parametrize("name", ["file", "misspelt"])
def test_verify_of_what_is_no_cache(tmp_path, name):
    (tmp_path / "file").touch()
    code, _, errors = run("verify", "--cache-dir", str(tmp_path / name))
    assert (code, len(errors.splitlines())) == (1, 1)
    assert f"{name}: there is no cache here" in errors
    assert not (tmp_path / "misspelt").exists()


def test_verify_of_a_damaged_index_touches_it_only_with_fix(tmp_path):
    cache = Cache(tmp_path)
    assert cache.put_many([NewEntry(bytes(16), "v1", b"x")]) == 1
    cache.close()
    database = cache.directory / "objects" / "cache.db"
    database.write_bytes(b"garbage")
    code, _, errors = run("verify", "--cache-dir", str(tmp_path))
    assert (code, "cache.db: the index is damaged; --fix" in errors, database.read_bytes()) == (1, True, b"garbage")
    command = [sys.executable, "-m", "asyncds", "verify", "--fix", "--cache-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert (done.returncode, "0 entries" in done.stdout) == (0, True)
    assert "was damaged: it was moved to" in done.stderr
