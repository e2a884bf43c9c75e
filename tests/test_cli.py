"""The command line, as a user runs it: its output, its exit code, and a process where it has to be one."""

import io
import json
import logging
import os
import pickle
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest

from asyncds import S3Reader
from asyncds.cache import Cache
from asyncds.cli import main
from asyncds.dataset import CachedS3MapDataset
from asyncds.entry import NewEntry
from asyncds.lookup import resident
from asyncds.manifest import Manifest
from asyncds.settings import Settings
from asyncds.testing import Fault, S3Server

KEYS = [f"train/{number % 3}/{number:02}.bin" for number in range(30)]


def filled(server: S3Server) -> S3Server:
    server.put_many("mnist", {key: key.encode() * 9 for key in KEYS})
    server.put("mnist", "train/", b"")
    return server


@pytest.fixture
def bucket(s3: S3Server) -> S3Server:
    return filled(s3)


def start(*arguments: str, **options) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-m", "asyncds", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL} | options
    return subprocess.Popen(command, text=True, **pipes)


def run(*arguments: str) -> tuple[int, str, str]:
    with start(*arguments) as process:
        output, errors = process.communicate(timeout=50)
    return process.returncode, output, errors


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def call(*arguments: str, errors: io.StringIO | None = None) -> tuple[int, str, str]:
    """As `run`, in this process: an interpreter takes longer to start than most commands. Not for what is about locks,
    which are those of a process.

    What is logged is among the errors here, too: a process without handlers for it writes it there.
    """
    output, errors, root, code = io.StringIO(), errors or io.StringIO(), logging.getLogger(), 0
    with (
        warnings.catch_warnings(),
        patch.multiple(sys, argv=["asyncds", *arguments], stdin=io.StringIO()),
        redirect_stdout(output),
        redirect_stderr(errors),
    ):
        root.addHandler(logging.lastResort)
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        finally:
            root.removeHandler(logging.lastResort)
    return code, output.getvalue(), errors.getvalue()


def until(reached: Callable[[], bool]) -> None:
    """Wait for what a process does, for as long as the test has time, and leave the processor to it."""
    while not reached():
        time.sleep(0.01)


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
    code, output, _ = call("warm", "s3://mnist/train", "--match", "*/1/*", "--limit", "4")
    assert (code, "4 objects" in output) == (0, True)
    assert sorted(key for _, key in bucket.stats.gets) == [key for key in sorted(KEYS) if "/1/" in key][:4]


def test_quiet_warm_prints_nothing(bucket):
    assert call("warm", "s3://mnist/train", "--quiet") == (0, "", "")


def drawn_by(*arguments: str) -> bytes:
    """What a command that ends well draws in a terminal."""
    reader, writer = os.openpty()
    with start(*arguments, stderr=writer) as process:
        os.close(writer)
        drawn = b""
        try:
            while chunk := os.read(reader, 4096):
                drawn += chunk
        except OSError:  # how Linux says that nobody writes to the terminal any more
            pass
        os.close(reader)
    assert process.returncode == 0
    return drawn


def test_warm_draws_a_bar_in_a_terminal(bucket):
    drawn = drawn_by("warm", "s3://mnist/train/")
    expected = [b"listing s3://mnist/train", b"warming s3://mnist/train", b"30/30", b" MB/s, 0 failed, "]
    assert [text in drawn for text in expected] == [True] * 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["listing s3://mnist/train", "warming s3://mnist/train"]),
        (["--dry-run"], ["listing s3://mnist/train", "looking for s3://mnist/train", "30/30"]),
        (["--partition", "1/2"], []),
        (["--quiet"], []),
    ],
)
def test_warm_draws_what_it_does_unless_another_process_does_or_it_is_quiet(bucket, arguments, expected):
    code, _, drawn = call("warm", "s3://mnist/train/", *arguments, errors=Terminal())
    assert (code, [text in drawn for text in expected]) == (0, [True] * len(expected))
    assert bool(drawn) == bool(expected)


def test_warm_names_what_failed_and_exits_with_one(bucket):
    for key in KEYS[:7]:
        bucket.script("mnist", key, [Fault.status(403, "AccessDenied")], forever=True)
    code, output, errors = call("warm", "s3://mnist/train")
    assert (code, "7 failed" in output) == (1, True)
    lines = errors.splitlines()
    assert len(lines) == 6
    assert all(line.startswith("error: s3://mnist/train/") and "403" in line for line in lines[:5])
    assert lines[5] == "error: … and 2 more"


def test_warm_that_does_not_fit_says_so_and_exits_with_one(bucket):
    code, output, errors = call("warm", "s3://mnist/train", "--cache-size", "1B")
    assert (code, "30 did not fit" in output) == (1, True)
    remedy = "raise ASYNCDS_CACHE_SIZE, free the disk, or choose a folder that can be written"
    assert errors == f"error: 30 objects could not be kept: {remedy}\n"


def test_interrupted_warm_keeps_what_arrived_and_goes_on(bucket):
    bucket.script("mnist", KEYS[0], [Fault.stall()], forever=True)
    with start("warm", "s3://mnist/train", start_new_session=True) as process:
        until(lambda: bucket.stats.requests["GET"] >= 30 and bucket.stats.in_flight == 1)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=10)
    assert (process.returncode, output) == (130, "")
    assert errors == "interrupted: what arrived is kept; the same command goes on from there\n"
    bucket.clear_scripts()
    code, output, _ = call("warm", "s3://mnist/train")
    assert (code, "29 were cached, 1 fetched" in output) == (0, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_warm_that_is_ended_at_any_moment_fetches_nothing_twice_that_was_committed(bucket, number):
    keys = [f"many/{place:04}" for place in range(600)]
    bucket.put_many("mnist", {key: key.encode() * 50 for key in keys})
    bucket.latency = 0.005
    bucket.script("mnist", keys[-1], [Fault.stall()], forever=True)  # no run comes to its end before it is ended
    infos, committed = CachedS3MapDataset.from_prefix("s3://mnist/many/").manifest[:], 0
    for seen in (50, 350):
        with start("warm", "s3://mnist/many/", "--concurrency", "8", "--quiet", start_new_session=True) as process:
            until(lambda seen=seen: bucket.stats.requests["GET"] >= seen)
            process.send_signal(number)
            process.communicate(timeout=10)
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
        cache = Cache(Settings().cache_dir)
        there = resident(cache, bucket.endpoint, infos)
        cache.close()
        assert committed <= sum(there) < 600
        committed = sum(there)
    bucket.clear_scripts()
    bucket.reset_counts()
    assert call("warm", "s3://mnist/many/", "--quiet") == (0, "", "")
    missing = {("mnist", info.key): 1 for info, was in zip(infos, there, strict=True) if not was}
    assert bucket.stats.gets == missing
    assert call("verify", "--fix")[0] == 0


def test_training_shares_the_downloads_of_a_warm_up_that_is_going_on(bucket):
    bucket.latency = 0.01
    with start("warm", "s3://mnist/train/", "--concurrency", "2") as process:
        until(lambda: bucket.stats.requests["GET"] >= 3)
        with CachedS3MapDataset.from_prefix("s3://mnist/train/", transform=lambda file: file.read()) as dataset:
            assert dataset.__getitems__(range(30)) == [key.encode() * 9 for key in sorted(KEYS)]
        assert process.communicate(timeout=50)[1] == ""
    assert process.returncode == 0
    assert (len(bucket.stats.gets), set(bucket.stats.gets.values())) == (30, {1})


def test_processes_of_a_node_share_the_work(bucket, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    started = []
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        started.append(start("warm", "s3://mnist/train", "--partition", "auto", "--json"))
    documents = []
    for process in started:
        output, errors = process.communicate(timeout=50)
        assert (process.returncode, errors) == (0, "")
        documents += json.loads(output)["datasets"]
    assert sum(row["objects"] for row in documents) == 30
    assert sum(row["fetched"] for row in documents) == 30
    assert (len(bucket.stats.gets), set(bucket.stats.gets.values())) == (30, {1})


def test_warm_takes_several_uris_and_goes_on_after_one_that_fails(bucket):
    bucket.put("mnist", "test/0", b"x")
    code, output, errors = call("warm", "s3://no-such-bucket/x", "s3://mnist/train", "s3://mnist/test", "--json")
    assert (code, len(errors.splitlines()), "the bucket does not exist" in errors) == (1, 1, True)
    failed, train, test = json.loads(output)["datasets"]
    assert (failed["uri"], "the bucket does not exist" in failed["error"]) == ("s3://no-such-bucket/x", True)
    assert (train["fetched"], test["fetched"]) == (30, 1)
    keys = ["uri", "objects", "resident", "fetched", "shared", "bytes", "uncached", "failures", "seconds"]
    assert list(train) == keys


@pytest.mark.parametrize(("limit", "count"), [("10%", 3), ("1000B", 7), ("30", 30)])
def test_warm_is_limited_by_share_bytes_or_number(bucket, limit, count):
    code, output, _ = call("warm", "s3://mnist/train", "--limit", limit, "--order", "smallest")
    assert (code, f" {count} objects: 0 were cached, {count} fetched" in output) == (0, True)
    assert bucket.stats.requests == {"LIST": 1, "GET": count}


def test_warm_excludes_and_matches_repeatedly(bucket):
    code, output, _ = call("warm", "s3://mnist/train", "--match", "*/1/*", "--match", "*/2/*", "--exclude", "*9.bin")
    expected = [key for key in KEYS if "/0/" not in key and not key.endswith("9.bin")]
    assert (code, f" {len(expected)} fetched" in output) == (0, True)
    assert sorted(key for _, key in bucket.stats.gets) == sorted(expected)


def test_dry_run_says_what_it_would_take_and_gets_nothing(bucket):
    assert call("warm", "s3://mnist/train", "--match", "*/1/*")[0] == 0
    bucket.reset_counts()
    code, output, errors = call("warm", "s3://mnist/train", "--dry-run")
    assert (code, errors) == (0, "")
    assert "30 objects: 10 are cached; LIST 1, GET 20 would bring 0.0 MB in " in output
    assert bucket.stats.requests["GET"] == 0
    document = json.loads(call("warm", "s3://mnist/train", "--dry-run", "--json")[1])
    (plan,) = document["datasets"]
    assert document["dry_run"]
    assert list(plan) == ["uri", "objects", "resident", "lists", "gets", "bytes", "room", "seconds"]
    assert plan["lists"] == 1
    assert plan["bytes"] == sum(9 * len(key) for key in KEYS if "/1/" not in key)
    assert bucket.stats.requests["GET"] == 0


def test_dry_run_counts_the_requests_that_listing_took(bucket):
    bucket.put_many("mnist", {f"many/{place % 9}/{place:05}": b"x" for place in range(4000)})
    (plan,) = json_of("warm", "s3://mnist/many/", "--dry-run")["datasets"]
    assert (plan["objects"], plan["lists"]) == (4000, bucket.stats.requests["LIST"])
    assert plan["lists"] > 4, "folders were asked for, too"


def test_bucket_that_forbids_listing_is_warmed_by_a_manifest(bucket, tmp_path):
    with CachedS3MapDataset.from_prefix("s3://mnist/train/") as dataset:
        dataset.manifest.save(tmp_path / "train.manifest")
    bucket.script("mnist", None, [Fault.status(403, "AccessDenied")], operation="LIST", forever=True)
    code, output, errors = call("warm", "s3://mnist/train/")
    assert (code, output, len(errors.splitlines())) == (1, "", 1)
    assert errors.endswith("forbids listing, but not GET, is warmed by --from-manifest\n")
    bucket.reset_counts()
    code, output, errors = call("warm", "--from-manifest", str(tmp_path / "train.manifest"))
    assert (code, errors, "30 fetched" in output) == (0, "", True)
    assert bucket.stats.requests == {"GET": 30}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda data: data[:-40], "cut short"),
        (lambda data: data[:5], "no manifest, or a damaged one"),
        (lambda data: b"some text\n" * 99, "no manifest, or a damaged one (it does not begin as one): list the prefix"),
        (lambda data: data.replace(b'"version": 1', b'"version": 9'), "a manifest of format 9; this asyncds reads"),
    ],
)
def test_manifest_that_cannot_be_read_is_a_wrong_call(bucket, tmp_path, change, sentence):
    file = tmp_path / "train.manifest"
    with CachedS3MapDataset.from_prefix("s3://mnist/train/") as dataset:
        dataset.manifest.save(file)
    file.write_bytes(change(file.read_bytes()))
    code, output, errors = call("warm", "--from-manifest", str(file))
    assert (code, output, len(errors.splitlines())) == (2, "", 1)
    assert errors.startswith(f"error: {file}: ")
    assert sentence in errors


@pytest.mark.skipif(shutil.which("tmux") is None, reason="there is no tmux")
def test_warm_in_a_terminal_of_80_columns(bucket, tmp_path):
    bucket.script("mnist", KEYS[0], [Fault.stall()], forever=True)
    tmux = ["tmux", "-S", str(tmp_path / "socket"), "-f", os.devnull]
    command = f"{sys.executable} -m asyncds warm s3://mnist/train/; echo exit code $?; cat"
    subprocess.run([*tmux, "new-session", "-d", "-x", "80", "-y", "24", command], check=True, timeout=10)

    def screen(text: str) -> list[str]:
        shown = ""
        while text not in shown:  # for as long as the test has time
            time.sleep(0.05)
            capture = [*tmux, "capture-pane", "-p"]
            shown = subprocess.run(capture, check=True, capture_output=True, text=True, timeout=10).stdout
        return [line for line in shown.splitlines() if line.strip()]

    try:
        bar, note = screen("29/30")
        assert re.fullmatch(r"warming s3://mnist/train/ \S+ 29/30 objects \S+", bar.strip())
        assert re.fullmatch(r"  \S+ MB, \S+/s, \S+ MB/s, 0 failed, 1 in flight", note.rstrip())
        subprocess.run([*tmux, "send-keys", "C-c"], check=True, timeout=10)
        shown = screen("exit code 130")
        assert shown[-2].startswith("interrupted: what arrived is kept")
    finally:
        subprocess.run([*tmux, "kill-server"], check=True, timeout=10)


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
        (["s3://mnist", "--cache-size", "5 apples"], 2, "error: cache_size='5 apples': must be bytes with a unit"),
        (["s3://mnist/train", "--match", "*.jpeg"], 1, "none of 30 keys fits the patterns"),
        (["s3://mnist/train", "--match", "*.jpeg", "--limit", "3"], 1, "none of 30 keys fits the filter"),
        (["s3://mnist", "--limit", "120%"], 2, "error: limit='120%': must be a number of objects"),
        (["s3://mnist", "--partition", "3/3"], 2, "error: partition='3/3': of 3 parts, i goes from 0 to 2"),
        (["s3://mnist", "--order", "largest"], 2, "error: Invalid value for '--order'"),
        (["s3://mnist/train", "nonsense"], 2, "error: 'nonsense' is no S3 URI"),
        (["--from-manifest", "nowhere"], 2, "error: nowhere: there is no such manifest"),
        ([], 2, "error: say what to warm: s3://bucket/prefix, several of these, or --from-manifest FILE"),
        (["s3://mnist", "--endpoint", "localhost:9"], 2, "write http://localhost:9"),
        (
            ["s3://mnist", "--limit", "0"],
            2,
            "error: limit='0': must be a number of objects, a share of them such as 10%",
        ),
    ],
)
def test_wrong_call_gets_one_sentence_and_its_exit_code(bucket, arguments, code, sentence):
    found, output, errors = call("warm", *arguments)
    assert (found, output, len(errors.splitlines())) == (code, "", 1)
    assert sentence in errors
    assert not bucket.stats.requests["GET"]


def test_letters_that_the_terminal_lacks_are_no_reason_to_fail(bucket, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    bucket.put("mnist", "日本/1", b"x")
    code, output, errors = run("warm", "s3://mnist/日本/")
    assert (code, errors) == (0, "")
    assert output.startswith(r"s3://mnist/\u65e5\u672c/: 1 objects")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full: it is Linux's")
def test_output_that_cannot_be_written_is_one_line(bucket):
    with open("/dev/full", "w") as full, start("config", stdout=full) as process:
        errors = process.communicate(timeout=50)[1]
    assert (process.returncode, len(errors.splitlines())) == (1, 1)


@pytest.mark.parametrize("uri", ["s3://my bucket/x", "s3://Mn_ist!!/x", "s3://mn\nist/x"])
def test_name_that_no_bucket_has(bucket, uri):
    code, output, errors = call("warm", uri)
    assert (code, output, len(errors.splitlines())) == (2, "", 1)
    assert errors.endswith("cannot be a bucket's name: that has 3 to 63 small letters, digits, dots and hyphens\n")
    assert "regex" not in errors


def test_keys_of_many_lines_are_shown_in_one(bucket):
    uri = "s3://mnist/a\nb/"
    code, _, errors = call("warm", uri)
    assert (code, len(errors.splitlines())) == (1, 1)
    assert errors.startswith(r"error: s3://mnist/a\nb/ at ")
    bucket.put("mnist", "a\nb/c", b"x")
    assert call("warm", uri)[1].startswith(r"s3://mnist/a\nb/: 1 objects")
    assert call("ls")[1].splitlines()[1].startswith(r"s3://mnist/a\nb/ at ")
    with CachedS3MapDataset.from_prefix(uri) as dataset:
        assert len(dataset) == 1
        assert run("clear", uri, "--yes")[2].startswith(r"error: s3://mnist/a\nb/ at ")
    assert call("non\nsense")[2] == "error: No such command 'non\\nsense'.\n"


def test_who_has_no_credentials_is_told_of_nothing_else(bucket, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    code, output, errors = call("warm", "s3://mnist/train/")
    assert (code, output, len(errors.splitlines())) == (1, "", 1)
    assert "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; or" in errors
    assert errors.endswith("MINIO_URL and its keys, in the environment or in the .env file of this folder\n")


def test_folder_that_cannot_be_written_is_shown_without_a_change(bucket, monkeypatch):
    assert call("warm", "s3://mnist/train")[0] == 0
    place = Settings().cache_dir / "asyncds"
    database = place / "objects" / "cache.db"
    real = sqlite3.connect

    def connect(path, *arguments, **options):
        if "cache.db" in str(path) and "immutable=1" not in path:
            raise sqlite3.OperationalError("attempt to write a readonly database")
        return real(path, *arguments, **options)

    monkeypatch.setattr("sqlite3.connect", connect)
    monkeypatch.setattr("os.access", lambda path, *_: not str(path).startswith(str(place)))
    before = database.read_bytes()
    for command in (["ls"], ["stats"], ["verify"]):
        code, output, errors = call(*command)
        assert (code, bool(output), "Traceback" in errors) == (0, True, False), errors
    assert database.read_bytes() == before


def test_verify_finds_and_mends(bucket, tmp_path):
    assert call("warm", "s3://mnist/train")[0] == 0
    code, output, errors = call("verify")
    assert (code, errors) == (0, "")
    assert "30 entries" in output
    folder = Settings().cache_dir / "asyncds" / "objects" / "ab"
    folder.mkdir(0o700, exist_ok=True)
    (folder / f"{0:030x}.tmp").touch(0o600)
    foreign = [Settings().cache_dir / "asyncds" / name for name in ("mine", "stats/mine", "locks/mine")]
    for path in foreign:
        path.touch()
        path.chmod(0o644)
    (Settings().cache_dir / "asyncds" / "stats").chmod(0o755)
    code, output, errors = call("verify")
    found = [line.partition(" (")[0] for line in errors.splitlines() if not line.startswith(" ")]
    assert (code, found) == (1, ["temporary: 1", "permissions: 1"])
    drawn = drawn_by("verify", "--fix")
    assert [text in drawn for text in (b"verifying", b"verifying again", b"30/30")] == [True] * 3
    code, output, errors = call("verify", "--fix")
    assert (code, errors, "mended" in output) == (0, "", False)
    assert [path.stat().st_mode & 0o777 for path in foreign] == [0o644] * 3


def test_permissions_of_all_that_asyncds_makes_are_verified(bucket, monkeypatch):
    bucket.put("mnist", "train/large", bytes(50_000))
    monkeypatch.setenv("ASYNCDS_MANIFEST_MAX_AGE", "60")
    with CachedS3MapDataset.from_prefix("s3://mnist/train/", transform=S3Reader.read) as dataset:
        dataset.__getitems__(range(31))
        pickle.dumps(dataset)
        folder = dataset._parts[0].source.cache.directory
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert {path.parent.name for path in files} >= {"locks", "datasets", "manifests", "stats", "objects", "asyncds"}
        for path in files:
            path.chmod(0o644)
        problems = dataset._parts[0].source.cache.check()
    assert {text.rpartition(":")[0] for text in problems["permissions"]} == set(map(str, files))


@pytest.mark.parametrize("name", ["file", "misspelt"])
def test_verify_of_what_is_no_cache(tmp_path, name):
    (tmp_path / "file").touch()
    code, _, errors = call("verify", "--cache-dir", str(tmp_path / name))
    assert (code, len(errors.splitlines())) == (1, 1)
    assert f"{name}: there is no cache here" in errors
    assert not (tmp_path / "misspelt").exists()


def test_verify_of_a_damaged_index_touches_it_only_with_fix(tmp_path):
    cache = Cache(tmp_path)
    assert cache.put_many([NewEntry(bytes(16), "v1", b"x")]) == 1
    cache.close()
    database = cache.directory / "objects" / "cache.db"
    database.write_bytes(b"garbage")
    code, _, errors = call("verify", "--cache-dir", str(tmp_path))
    assert (code, "cache.db: the index is damaged; `asyncds verify --fix`" in errors, database.read_bytes()) == (
        1,
        True,
        b"garbage",
    )
    command = [sys.executable, "-m", "asyncds", "verify", "--fix", "--cache-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert (done.returncode, "0 entries" in done.stdout) == (0, True)
    assert "was damaged: it was moved to" in done.stderr


# what is there


def json_of(*arguments: str):
    code, output, errors = call(*arguments, "--json")
    assert (code, errors) == (0, "")
    return json.loads(output)


def name_of(bucket: S3Server, prefix: str) -> str:
    return f"s3://mnist/{prefix} at {bucket.endpoint}"


def test_ls_shows_how_completely_what_is_cached(bucket):
    bucket.put("mnist", "test/0", b"x" * 50_000)
    assert call("warm", "s3://mnist/train/", "--limit", "50%", "--quiet")[0] == 0
    assert call("warm", "s3://mnist/test/", "--limit", "1", "--quiet")[0] == 0
    code, output, errors = call("ls")
    assert (code, errors) == (0, "")
    head, test, train = output.splitlines()
    assert head.split() == ["dataset", "objects", "of", "cached", "on", "disk", "used"]
    assert re.fullmatch(rf"{name_of(bucket, 'train/')} +15 +30 +50 % +\S+ kB +\d+ s ago", train)
    assert re.fullmatch(rf"{name_of(bucket, 'test/')} +1 +\? +\? +\S+ kB +\d+ s ago", test)
    document = json_of("ls", "s3://mnist/train/")
    (row,) = document["datasets"]
    assert list(document) == ["cache", "datasets"]
    assert list(row) == ["dataset", "objects", "listed", "percent", "bytes", "used", "in_use"]
    assert (row["objects"], row["listed"], row["percent"], row["in_use"]) == (15, 30, 50, False)


def test_ls_counts_what_another_dataset_brought(bucket):
    assert call("warm", "s3://mnist/train/", "--quiet")[0] == 0
    assert call("warm", "s3://mnist/train/1/", "--quiet")[0] == 0
    (row,) = json_of("ls", "s3://mnist/train/1/")["datasets"]
    assert (row["objects"], row["listed"]) == (10, 10)


def test_ls_changes_compares_with_the_saved_listing(bucket):
    assert call("warm", "s3://mnist/train/", "--quiet")[0] == 0
    bucket.put("mnist", "train/0/new\n.bin", b"new")
    bucket.put("mnist", KEYS[4], b"changed")
    bucket.delete("mnist", KEYS[7])
    for _ in range(2):
        found = json_of("ls", "--changes", "s3://mnist/train/")
        assert found == {
            "dataset": name_of(bucket, "train/"),
            "added": ["train/0/new\n.bin"],
            "changed": [KEYS[4]],
            "removed": [KEYS[7]],
        }
    code, output, errors = call("ls", "--changes", "s3://mnist/train/")
    assert (code, errors) == (0, "")
    assert output.splitlines()[0] == r"added 'train/0/new\n.bin'"
    assert output.splitlines()[-1].endswith(": 1 added, 1 changed, 1 removed")
    bucket.reset_counts()
    assert "28 were cached, 2 fetched" in call("warm", "s3://mnist/train/")[1]
    assert bucket.stats.requests == {"LIST": 1, "GET": 2}


def test_stats_show_size_and_the_counters_of_runs_that_go_on(bucket):
    assert call("warm", "s3://mnist/train/", "--quiet")[0] == 0
    found = json_of("stats")
    assert list(found) == ["cache", "datasets", "entries", "bytes", "limit", "room", "runs", "counters"]
    assert (found["datasets"], found["entries"], found["limit"], found["runs"]) == (1, 30, None, 0)
    with CachedS3MapDataset.from_prefix("s3://mnist/train/", transform=lambda file: file.read()) as dataset:
        dataset.__getitems__(range(20))
        found = json.loads(run("stats", "--json")[1])
        assert (found["runs"], found["counters"]["hits"], found["counters"]["gets"]) == (1, 20, 0)
        code, output, errors = run("stats")
    assert (code, errors) == (0, "")
    assert "contents  30 entries of 1 datasets" in output
    assert "hits      20 of 20 samples (100.0 %)" in output
    assert call("stats")[1].splitlines()[-1].startswith("contents")


# removal


@pytest.fixture
def two(bucket) -> S3Server:
    bucket.put("mnist", "test/0", b"x" * 50_000)
    assert call("warm", "s3://mnist/train/", "s3://mnist/test/", "--quiet") == (0, "", "")
    return bucket


def cached() -> list[str]:
    return [row["dataset"].partition(" at ")[0] for row in json_of("ls")["datasets"]]


def test_clear_asks_nobody_in_a_pipe(two):
    for arguments in (["s3://mnist/train/"], ["--all"], ["--older-than", "0s"]):
        code, output, errors = call("clear", *arguments)
        assert (code, output, errors) == (2, "", "error: nobody can be asked here: give --yes to clear\n")
    assert cached() == ["s3://mnist/test/", "s3://mnist/train/"]


def test_clear_asks_in_a_terminal(two):
    for answer, left in ((b"n\n", 2), (b"y\n", 1)):
        controller, terminal = os.openpty()
        os.write(controller, answer)
        with start("clear", "s3://mnist/test/", stdin=terminal) as process:
            output, _ = process.communicate(timeout=50)
        os.close(controller)
        os.close(terminal)
        assert "Remove? [y/N]" in output
        assert (process.returncode, len(cached())) == (0 if left == 1 else 1, left)


def test_clear_removes_one_dataset_and_its_listing(two):
    found = json_of("clear", "s3://mnist/test/", "--yes")
    assert list(found) == ["cache", "cleared", "kept"]
    (row,) = found["cleared"]
    assert (row["dataset"], row["objects"], row["bytes"] >= 50_000) == (name_of(two, "test/"), 1, True)
    assert cached() == ["s3://mnist/train/"]
    folder = Settings().cache_dir / "asyncds"
    assert len(list(folder.glob("manifests/*.manifest"))) == 1
    assert call("verify")[0] == 0


def test_clear_by_age(two):
    for note in (Settings().cache_dir / "asyncds" / "datasets").glob("*.json"):
        if "/test/" in note.read_text():
            os.utime(note, (time.time() - 8 * 86400,) * 2)
    assert [row["dataset"] for row in json_of("clear", "--older-than", "7d", "--yes")["cleared"]] == [
        name_of(two, "test/")
    ]
    assert cached() == ["s3://mnist/train/"]


def test_clear_by_age_passes_over_what_is_in_use(two):
    with CachedS3MapDataset.from_prefix("s3://mnist/train/", transform=lambda file: file.read()) as dataset:
        len(dataset)
        for note in (Settings().cache_dir / "asyncds" / "datasets").glob("*.json"):
            os.utime(note, (time.time() - 8 * 86400,) * 2)
        code, output, errors = run("clear", "--older-than", "7d", "--yes")
        assert (code, "1 of 2 datasets removed" in output) == (0, True)
        assert errors == f"note: {name_of(two, 'train/')} is in use: it stays\n"
        code, output, _ = call("clear", "--older-than", "7d", "--yes", "--json")
        assert (code, json.loads(output)["kept"]) == (0, [name_of(two, "train/")])
        assert cached() == ["s3://mnist/train/"]
        assert run("clear", "--older-than", "7d", "--yes", "--force")[::2] == (0, "")
    assert [json_of("stats")[name] for name in ("entries", "datasets")] == [0, 0]


def test_clear_leaves_what_is_not_ours(two):
    folder = Settings().cache_dir / "asyncds"
    foreign = [folder / "objects" / "notes.txt", folder / "mine", Settings().cache_dir / "other"]
    for path in foreign:
        path.write_text("mine")
        path.chmod(0o600)
    code, output, errors = call("clear", "--all", "--yes")
    assert (code, errors, "2 of 2 datasets removed" in output) == (0, "", True)
    assert (cached(), [path.read_text() for path in foreign]) == ([], ["mine"] * 3)
    assert json_of("stats")["entries"] == 0


@pytest.mark.parametrize("kind", ["of two prefixes", "of objects"])
def test_clear_spares_what_another_kind_of_dataset_may_be_reading(two, kind):
    options = {"transform": lambda file: file.read()}
    if kind == "of objects":
        dataset = CachedS3MapDataset.from_objects([f"s3://mnist/{KEYS[0]}"], **options)
    else:
        tables = [Manifest.from_prefix(f"s3://mnist/{name}/") for name in ("train", "test")]
        dataset = CachedS3MapDataset.from_manifest(sum(tables), **options)
    with dataset:
        assert dataset[0]
        code, _, errors = run("clear", "s3://mnist/test/", "--yes")
    assert code == 1
    assert f"{name_of(two, 'test/')} is in use" in errors
    assert "s3://mnist/test/" in cached()


def test_clear_spares_what_a_living_process_holds_unless_forced(two):
    with CachedS3MapDataset.from_prefix("s3://mnist/train/", transform=lambda file: file.read()) as dataset:
        len(dataset)
        code, output, errors = run("clear", "--all", "--yes")
        assert (code, "1 of 2 datasets removed" in output) == (1, True)
        assert errors == f"error: {name_of(two, 'train/')} is in use: it stays; end its processes, or give --force\n"
        two.reset_counts()
        assert dataset[0] == sorted(KEYS)[0].encode() * 9
        assert two.stats.requests == {}
        assert run("clear", "--all", "--yes", "--force")[0] == 0
        assert dataset.__getitems__(range(30)) == [key.encode() * 9 for key in sorted(KEYS)]
        assert two.stats.requests == {"GET": 30}
    assert call("verify")[0] == 0


def test_clear_spares_what_a_living_process_uses_as_part_of_another_dataset(two):
    with CachedS3MapDataset.from_prefix("s3://mnist/train/1/", transform=lambda file: file.read()) as dataset:
        assert len(dataset) == 10
        code, _, errors = run("clear", "s3://mnist/train/", "--yes")
        assert (code, errors.startswith(f"error: {name_of(two, 'train/')} is in use: it stays")) == (1, True)
    assert call("clear", "s3://mnist/train/", "--yes")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["clear"], 2, "say what to clear: URIs, --older-than AGE, or --all"),
        (["clear", "s3://mnist", "--all"], 2, "say what to clear"),
        (["clear", "--older-than", "7 parsecs"], 2, "older_than='7 parsecs': must be an age with a unit"),
        (["clear", "s3://mnist/nothing", "--yes"], 1, "s3://mnist/nothing: nothing of it is cached"),
        (["clear", "s3://", "--yes"], 2, "'s3://' is no S3 URI"),
        (["ls", "s3://mnist/nothing"], 1, "s3://mnist/nothing: nothing of it is cached; `asyncds ls` shows what is"),
        (["ls", "s3://mnist/train"], 1, "s3://mnist/train: nothing of it is cached; s3://mnist/train/ is\n"),
        (["warm", "s3://mnist/train/", "--from-manifest", "f"], 2, "by URIs or by --from-manifest FILE, not by both"),
        (["ls", "--changes"], 2, "--changes needs the URI"),
        (["ls", "--changes", "s3://mnist/nothing"], 1, "no listing of it is saved"),
        (["ls", "--cache-dir", "nowhere"], 1, "nowhere: there is no cache here"),
        (["stats", "--cache-dir", "nowhere"], 1, "nowhere: there is no cache here"),
        (["clear", "--all", "--yes", "--cache-dir", "nowhere"], 1, "nowhere: there is no cache here"),
        (["config", "--cache-size", "lots"], 2, "cache_size='lots': must be bytes with a unit"),
        (["nonsense"], 2, "No such command 'nonsense'"),
    ],
)
def test_wrong_call_of_another_command(bucket, arguments, code, sentence):
    assert call("warm", "s3://mnist/train/", "--quiet")[0] == 0
    found, output, errors = call(*arguments)
    assert (found, output, len(errors.splitlines())) == (code, "", 1)
    assert errors.startswith("error: ")
    assert sentence in errors
    assert cached() == ["s3://mnist/train/"]


# settings


def test_config_says_where_each_value_comes_from(monkeypatch):
    monkeypatch.setenv("ASYNCDS_RETRIES", "7")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.setenv("ASYNCDS_CACHE_SIZE", "9GB")
    Path(".env").write_text("ASYNCDS_RETRIES=8\nASYNCDS_TIMEOUT=3\n")
    rows = {row["name"]: row for row in json_of("config", "--cache-size", "1GB")["settings"]}
    assert rows.keys() == Settings.model_fields.keys()
    assert list(rows["retries"]) == ["name", "variables", "value", "origin", "description"]
    found = {
        name: (rows[name]["value"], rows[name]["origin"]) for name in ("retries", "cache_size", "timeout", "region")
    }
    assert found == {
        "retries": (7, "environment: ASYNCDS_RETRIES"),
        "cache_size": (10**9, "argument"),
        "timeout": (3, f"{Path('.env').absolute()}: ASYNCDS_TIMEOUT"),
        "region": ("eu-west-1", "environment: AWS_DEFAULT_REGION"),
    }
    assert (rows["deadline"]["value"], rows["deadline"]["origin"]) == (60, "default")
    output = call("config")[1]
    assert re.search(r"^ASYNCDS_RETRIES +7 +environment: ASYNCDS_RETRIES$", output, re.MULTILINE)


SERVERS = {
    "AWS": ({}, "AWS, credentials: what botocore finds: a profile, a role, SSO"),
    "keys": ({"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}, "AWS, credentials: AWS_ACCESS_KEY_ID"),
    "profile": ({"AWS_PROFILE": "lab"}, "AWS, credentials: profile lab"),
    "keys and profile": (
        {"AWS_PROFILE": "lab", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"},
        "AWS, credentials: AWS_ACCESS_KEY_ID",
    ),
    "MinIO": (
        {"MINIO_URL": "host:9000", "MINIO_SECURE": "false", "MINIO_ACCESS_KEY": "a", "MINIO_SECRET_KEY": "b"},
        "http://host:9000, credentials: MINIO_ACCESS_KEY",
    ),
    "MinIO without keys": (
        {"MINIO_URL": "host:9000", "MINIO_SECURE": "true"},
        "https://host:9000, credentials: anonymous",
    ),
    "half a pair of keys": (
        {"MINIO_URL": "host:9000", "MINIO_ACCESS_KEY": "a"},
        "none: MINIO_SECRET_KEY is missing where MINIO_ACCESS_KEY is set: "
        "both have to be in the environment, or both in the .env file",
    ),
}


@pytest.mark.parametrize("case", SERVERS)
def test_config_says_which_server_follows(monkeypatch, case):
    variables, expected = SERVERS[case]
    for name in [name for name in os.environ if name.startswith(("AWS_", "MINIO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, output, _ = call("config")
    assert (code, output.splitlines()[-1]) == (0, f"server: {expected}")
    server = json_of("config")["server"]
    assert list(server) == ["endpoint", "region", "credentials", "error"]
    assert (server["error"] is None) == (not expected.startswith("none"))


def test_config_shows_no_secret(monkeypatch):
    secrets = [name for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation)]
    assert len(secrets) == 5
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MINIO_ACCESS_KEY", "MINIO_SECRET_KEY"):
        monkeypatch.setenv(name, "canary")
    Path(".env").write_text("AWS_SESSION_TOKEN=canary\n")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:canary@host:9000/path")
    monkeypatch.setenv("MINIO_URL", "canary:canary/@host:9000")
    for arguments in (["config"], ["config", "--json"]):
        code, output, errors = call(*arguments)
        assert (code, "canary" in output + errors) == (0, False)
    assert "http://***@host:9000/path" in output


def printed_by(script: str) -> list[str]:
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_commands_need_no_torch(bucket):
    assert call("warm", "s3://mnist/train/", "--quiet")[0] == 0
    script = """
import sys
from asyncds.cli import main
for command in ["config", "ls", "stats", "verify", "warm s3://mnist/train/", "clear --all --yes"]:
    sys.argv = ["asyncds", *command.split()]
    main()
    print(f"{command}:", "torch" in sys.modules)
"""
    told = [line.partition(": ") for line in printed_by(script) if line.endswith((": True", ": False"))]
    assert {command.split()[0]: found for command, _, found in told} == dict.fromkeys(
        ("config", "ls", "stats", "verify", "warm", "clear"), "False"
    )


def test_help_is_light():
    commands = ["", "warm", "tune", "ls", "stats", "verify", "clear", "config", "demo"]
    script = f"""
import sys
from asyncds.cli import main
for command in {commands}:
    sys.argv = ["asyncds", *command.split(), "--help"]
    main()
    print("imports of", command, {{"torch", "botocore", "pydantic", "numpy"}} & set(sys.modules))
"""
    lines = printed_by(script)
    assert [line for line in lines if line.startswith("imports of")] == [
        f"imports of {name} set()" for name in commands
    ]
    usages = [line for line in lines if line.startswith("Usage: ")]
    assert [" ".join(line.split()[1:3]) for line in usages] == [
        "asyncds [OPTIONS]",
        *(f"asyncds {name}" for name in commands[1:]),
    ]
    assert any(line.split()[:1] == ["warm"] for line in lines), "the commands are listed"


# tune


@pytest.fixture
def distant(s3_process: S3Server) -> S3Server:
    """A bucket whose server takes none of the time that this process measures, but for its latency."""
    s3_process.latency = 0.02
    return filled(s3_process)


def test_tune_prints_what_came_and_the_line_to_export(distant, tmp_path):
    plot = tmp_path / "tune.png"
    code, output, errors = call("tune", "s3://mnist/train/", "--highest", "8", "--plot", str(plot))
    assert (code, errors) == (0, "")
    table, summary, exports = output.split("\n\n")
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["1", "2", "4", "8"]
    assert all(len(line) <= 80 for line in table.splitlines())
    assert "Best: 8 in flight" in summary
    assert "a cold epoch over 30 objects" in summary.lower()
    assert exports == "export ASYNCDS_CONCURRENCY=8\n"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert set(distant.stats.requests) == {"GET", "LIST"}


def test_tune_tells_machines_the_same(distant):
    code, output, errors = call("tune", "s3://mnist/train/", "--highest", "2", "--json")
    found = json.loads(output)
    assert (code, errors) == (0, "")
    assert (found["objects"], found["complete"], found["best"]) == (30, True, 2)
    assert found["export"] == {"ASYNCDS_CONCURRENCY": "2"}
    assert [step["concurrency"] for step in found["steps"]] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["mnist/train"], 2, "is no S3 URI"),
        (["s3://mnist/none/"], 1, "there is nothing to measure"),
        (["s3://mnist/train/", "--plot", "tune.gif"], 2, "ends in .png, .svg or .pdf"),
        (["s3://mnist/train/", "--plot", "no/folder/tune.png"], 2, "there is no folder"),
        (["s3://mnist/train/", "--seconds", "0"], 2, "--seconds"),
        (["s3://mnist/train/", "--highest", "0"], 2, "--highest"),
    ],
)
def test_tune_refuses_in_one_line(bucket, arguments, code, message):
    got, output, errors = call("tune", *arguments)
    assert (got, output, errors.count("\n")) == (code, "", 1)
    assert message in errors


@pytest.mark.parametrize("command", [["warm", "s3://mnist/"], ["tune", "s3://mnist/"], ["ls"], ["clear", "--all"]])
def test_empty_folder_is_not_the_current_one(bucket, command):
    code, output, errors = call(*command, "--cache-dir", "")
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert "--cache-dir" in errors
    assert list(Path.cwd().iterdir()) == []


def test_cache_that_cannot_be_mended_now_says_so(bucket, monkeypatch):
    monkeypatch.setattr("asyncds.index._PATIENCE_MS", 200)
    assert call("warm", "s3://mnist/train/", "--quiet")[0] == 0
    objects = Settings().cache_dir / "asyncds" / "objects"
    with sqlite3.connect(objects / "cache.db") as index:
        index.execute("UPDATE Settings SET value = 1 WHERE key = 'count'")
    holder = sqlite3.connect(objects / "cache.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    code, _, errors = call("verify", "--fix")
    holder.rollback()
    holder.close()
    assert code == 1
    assert errors.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in errors
