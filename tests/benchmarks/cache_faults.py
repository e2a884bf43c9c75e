"""What comes out of a cache after a fault: asyncds beside stock diskcache and three libraries, one without a cache.

    python tests/benchmarks/cache_faults.py [--environments FOLDER] [--only TEXT] [--contenders NAME,NAME]

Every contender reads the same 24 objects from `asyncds.testing.S3Server` in a process of its own, a fault is set, and
the next run, or the same one where the table says so, reads them again. Each sample is compared with the truth:

* right: every sample is what it should be. After it stands how many objects the last epoch asked the server for.
* error: an exception that a program can catch, or the end of the process.
* hang: nothing for 30 s.
* silently wrong: bytes that are not those of the object, or code of the cache's files was run, and no word of it.

The worst of all that a fault brings about counts; a dash means that a fault has nothing there to act on. Peers clash in
what they pin, so each gets an environment, made with venv and pip and used again by the next run; one that cannot be
installed is left out. Takes a quarter of an hour. Prints a Markdown table. Linux only.
"""

import argparse
import base64
import contextlib
import ctypes
import hashlib
import json
import multiprocessing.connection
import os
import pickle
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

LIMIT_S = 30.0
START_S = 90.0  # importing is no fault
PREFIX = "data/"
SMALL, LARGE = 1_000, 100_000  # bytes
NOBODY = 65534
SPARE_DESCRIPTORS = 1
KILLS = 5
SEVERITY = ("right", "error", "hang", "silently wrong")
FIRST = {f"{PREFIX}{n:03}": random.Random(n).randbytes((SMALL, LARGE)[n % 2]) for n in range(24)}
LARGE_KEY = f"{PREFIX}007"


class Outcome(NamedTuple):
    """What a fault led to, and a word about it."""

    kind: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.note}" if self.note else self.kind


def worst(outcomes: Sequence[Outcome]) -> Outcome:
    """The last of the worst."""
    return max(reversed(outcomes), key=lambda outcome: SEVERITY.index(outcome.kind))


# the contenders: each in a child process, with an interpreter of its own; only the standard library is imported above


class Asyncds:
    def __init__(self, folder: str, bucket: str) -> None:
        from asyncds import CachedS3MapDataset

        self.dataset = CachedS3MapDataset.from_prefix(f"s3://{bucket}/{PREFIX}", transform=_read, cache_dir=folder)
        self.rows = {info.key: row for row, info in enumerate(self.dataset.manifest)}

    def read(self, keys: Sequence[str]) -> list[bytes]:
        return self.dataset.__getitems__([self.rows[key] for key in keys])


class StockDiskcache:
    """The few lines that everybody writes: objects under their names."""

    def __init__(self, folder: str, bucket: str) -> None:
        from urllib.request import urlopen
        from xml.etree import ElementTree

        import diskcache

        self.urlopen, self.cache = urlopen, diskcache.Cache(folder)
        self.bucket = f"{os.environ['AWS_ENDPOINT_URL']}/{bucket}"
        with urlopen(f"{self.bucket}?list-type=2&prefix={PREFIX}") as answer:
            self.rows = [element.text for element in ElementTree.parse(answer).iter() if element.tag.endswith("}Key")]

    def read(self, keys: Sequence[str]) -> list[bytes]:
        return [self.one(key) for key in keys]

    def one(self, key: str) -> bytes:
        body = self.cache.get(key)
        if body is None:
            with self.urlopen(f"{self.bucket}/{key}") as answer:
                body = answer.read()
            self.cache.set(key, body)
        return body


class FilecacheOverS3fs:
    """With `check_files`, which asks for each file's ETag; without, it serves what was overwritten for a week."""

    def __init__(self, folder: str, bucket: str) -> None:
        import fsspec

        options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
        self.bucket = bucket
        self.files = fsspec.filesystem(
            "filecache", target_protocol="s3", target_options=options, cache_storage=folder, check_files=True
        )
        self.rows = [path.removeprefix(f"{bucket}/") for path in self.files.fs.find(f"{bucket}/{PREFIX}")]

    def read(self, keys: Sequence[str]) -> list[bytes]:
        return [self.one(key) for key in keys]

    def one(self, key: str) -> bytes:
        with self.files.open(f"{self.bucket}/{key}") as file:
            return file.read()


class LitDataRaw:
    def __init__(self, folder: str, bucket: str) -> None:
        import litdata
        from litdata.streaming import downloader

        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # there is no option for it
        self.dataset = litdata.StreamingRawDataset(
            f"s3://{bucket}/{PREFIX.rstrip('/')}",
            cache_dir=folder,
            cache_files=True,
            recompute_index=True,  # list anew, as the others do
            storage_options={"endpoint_url": os.environ["AWS_ENDPOINT_URL"]},
        )
        prefix = f"s3://{bucket}/"
        self.rows = {file.path.removeprefix(prefix): row for row, file in enumerate(self.dataset.files)}

    def read(self, keys: Sequence[str]) -> list[bytes]:
        samples = self.dataset.__getitems__([self.rows[key] for key in keys])
        time.sleep(0.3)  # it writes its cache in the background
        return samples


class S3TorchConnector:
    def __init__(self, folder: str, bucket: str) -> None:
        from s3torchconnector import S3ClientConfig, S3MapDataset

        self.dataset = S3MapDataset.from_prefix(
            f"s3://{bucket}/{PREFIX}",
            region=os.environ["AWS_REGION"],
            endpoint=os.environ["AWS_ENDPOINT_URL"],
            s3client_config=S3ClientConfig(force_path_style=True),
            transform=_read,
        )
        self.rows = {pair.key: row for row, pair in enumerate(self.dataset._dataset_bucket_key_pairs)}

    def read(self, keys: Sequence[str]) -> list[bytes]:
        return [self.dataset[self.rows[key]] for key in keys]


def _read(file: Any) -> bytes:
    return file.read()


class Recipe(NamedTuple):
    """How a contender is run, and what its cache is made of."""

    make: Callable[[str, str], Any]
    packages: tuple[str, ...] = ()  # to be installed; none: it runs with this interpreter
    with_torch: bool = False
    index: str | None = None  # the file that says what the cache holds
    database: bool = False  # that is diskcache's
    cache: bool = True


CONTENDERS = {
    "asyncds": Recipe(Asyncds, index="asyncds/objects/cache.db", database=True),
    "stock diskcache": Recipe(StockDiskcache, index="cache.db", database=True),
    "fsspec filecache": Recipe(FilecacheOverS3fs, ("s3fs",), index="cache"),
    "litData raw": Recipe(LitDataRaw, ("litdata", "zstd", "s3fs"), with_torch=True, index="*/index.json.zstd"),
    "s3torchconnector": Recipe(S3TorchConnector, ("s3torchconnector",), with_torch=True, cache=False),
}


# the child: does what it is told, a line of JSON at a time


def child(name: str, bucket: str) -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed
    contenders: list[Any] = [None]  # the last is in use; those before it were rehearsals
    failure = ""
    print(json.dumps({"ready": True}), file=replies)
    for line in sys.stdin:
        command = json.loads(line)
        reply: dict[str, Any] = {"digests": {}, "errors": {}}
        try:
            match command["do"]:
                case "open":
                    contenders.append(None)
                    contenders[-1] = CONTENDERS[name].make(command["folder"], bucket)
                case "read" if contenders[-1] is None:
                    reply["errors"] = {"open": failure}
                case "read":
                    read(contenders[-1], reply)
                case "limit":
                    limit(command)
        except Exception as error:
            traceback.print_exc()
            failure = type(error).__name__
            reply["errors"] = {command["do"]: failure}
        print(json.dumps(reply), file=replies)


def read(contender: Any, reply: dict[str, Any]) -> None:
    """Read everything together, or, if that fails, one by one."""
    keys = list(contender.rows)
    try:
        samples = dict(zip(keys, contender.read(keys), strict=True))
    except Exception:
        traceback.print_exc()
        samples = {}
        for key in keys:
            try:
                samples[key] = contender.read([key])[0]
            except Exception as error:
                reply["errors"][key] = type(error).__name__
    reply["digests"] = {key: digest(sample) for key, sample in samples.items()}


def digest(sample: object) -> str:
    return hashlib.sha256(sample).hexdigest() if isinstance(sample, bytes) else repr(sample)[:100]


def limit(command: dict[str, Any]) -> None:
    """Take something away from this process, for good."""
    if "uid" in command:
        become(command["uid"])
    if "file_size" in command:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the log is a file, too
        os.dup2(1, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        lower(resource.RLIMIT_FSIZE, command["file_size"])
        if command.get("fatal"):
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    if "spare" in command:
        highest = max(int(number) for number in os.listdir("/proc/self/fd"))
        lower(resource.RLIMIT_NOFILE, highest + command["spare"])  # listing had one open itself


def lower(what: int, most: int) -> None:
    resource.setrlimit(what, (most, resource.getrlimit(what)[1]))


def become(uid: int) -> None:
    """Go on as another user, who may write nothing of root's, but read, or Python would not find what it imports."""
    keep_capabilities, version, read_search = 8, 0x20080522, 1 << 2  # see prctl(2), capabilities(7)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(keep_capabilities, 1, 0, 0, 0)
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    header, data = (ctypes.c_uint32 * 2)(version, 0), (ctypes.c_uint32 * 6)(read_search, read_search)
    if libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


# the parent


class Hang(Exception):
    pass


class Died(Exception):
    pass


class Run:
    """A child process of a contender."""

    def __init__(self, python: Path, name: str, bucket: str, home: Path, log: Path) -> None:
        command = [str(python), __file__, f"--child={name}", f"--bucket={bucket}"]
        kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=kept | {"HOME": str(home), "TMPDIR": str(home)},
                cwd=home,
            )
        try:
            self._reply(START_S)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let it end in order, within the time limit."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def tell(self, do: str, **command: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **command}) + "\n")
            self.process.stdin.flush()

    def ask(self, do: str, **command: Any) -> dict[str, Any]:
        self.tell(do, **command)
        return self._reply(LIMIT_S)

    def _reply(self, seconds: float) -> dict[str, Any]:
        if not multiprocessing.connection.wait([self.process.stdout], seconds):
            self.kill()
            raise Hang
        line = self.process.stdout.readline()
        if not line:
            raise Died(f"ended by signal {-code}" if (code := self.process.wait()) < 0 else f"exit code {code}")
        return json.loads(line)


class NothingToDo(Exception):
    """A fault has nothing to act on."""


class Place(NamedTuple):
    """Where the bytes of an object lie in a cache."""

    path: Path
    offset: int
    key: str


class Trial:
    """One fault for one contender: a folder, the objects in the bucket, and what they should be."""

    def __init__(self, name: str, python: Path, server: Any, base: Path, log: Path) -> None:
        self.name, self.recipe, self.server = name, CONTENDERS[name], server
        self.bucket = "faults-" + name.lower().replace(" ", "-")
        self.truth: dict[str, bytes] = {}
        self.home = base
        self.folder = base / "cache"
        self.marker = base / "marker"
        self._python, self._log, self._template = python, log, base.parent / f"{base.name}-template"
        self._served: dict[str, bytes] = {}

    # the bucket

    def reset(self) -> None:
        """Objects as they were at first, no faults, an empty folder."""
        self.server.clear_scripts()
        for key in self._served.keys() - FIRST.keys():
            self.server.delete(self.bucket, key)
            del self._served[key]
        if changed := {key: body for key, body in FIRST.items() if self._served.get(key) != body}:
            self.serve(changed)  # the same bytes under another date: a new filled cache is needed
            shutil.rmtree(self._template, ignore_errors=True)
        self.truth = dict(FIRST)
        self.home.mkdir(exist_ok=True)
        unlock(self.home)
        shutil.rmtree(self.home)
        self.folder.mkdir(parents=True)

    def serve(self, objects: dict[str, bytes]) -> None:
        """Let these be in the bucket."""
        self.server.put_many(self.bucket, objects)
        self._served |= objects

    def put(self, objects: dict[str, bytes]) -> None:
        """Let these be in the bucket, and be what is right."""
        self.serve(objects)
        self.truth |= objects

    # runs

    def start(self) -> Run:
        return Run(self._python, self.name, self.bucket, self.home, self._log)

    def open(self, run: Run) -> None:
        run.ask("open", folder=str(self.folder))

    def rehearse(self, run: Run) -> None:
        """Read once with another cache, so that everything is imported before something is taken away."""
        run.ask("open", folder=str(self.home / "rehearsal"))
        run.ask("read")

    def fill(self) -> Outcome:
        """Fill a cache without any fault, as a first run does, and keep it for `warm`."""
        with self.start() as run:
            self.open(run)
            outcome = self.judged(run.ask("read"))
        self.folder.rename(self._template)
        return outcome

    def works(self) -> bool:
        try:
            self.reset()
            outcome = self.fill()
        except (Hang, Died) as error:
            outcome = Outcome("error", repr(error))
        if outcome.kind != "right":
            print(f"{self.name} is left out, because it does not work here without any fault: {outcome}\n")
        return outcome.kind == "right"

    def warm(self) -> None:
        """Put a filled cache into the folder."""
        if not self.recipe.cache:
            raise NothingToDo
        if not self._template.exists():
            self.fill()
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self._template, self.folder)

    def read(self, run: Run) -> Outcome:
        """Read everything in a run, and compare it with the truth."""
        self.server.reset_counts()
        outcome = self.judged(run.ask("read"))
        if outcome.kind == "right" and self.recipe.cache:
            gets = self.server.stats.gets
            return Outcome("right", f"{sum(gets[self.bucket, key] > 0 for key in self.truth)} asked")
        return outcome

    def next_run(self) -> Outcome:
        """What a new process reads."""
        with self.start() as run:
            self.open(run)
            return self.read(run)

    def judged(self, reply: dict[str, Any]) -> Outcome:
        digests, errors = reply["digests"], reply["errors"]
        if self.marker.exists():
            return Outcome("silently wrong", "code was run")
        if "open" not in errors:
            bad = [key for key, body in self.truth.items() if key not in errors and digests.get(key) != digest(body)]
            if bad:
                return Outcome("silently wrong", f"{len(bad)} of {len(self.truth)}")
        if errors:
            return Outcome("error", next(iter(errors.values())))
        return Outcome("right")

    # the cache at rest

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def places(self, size: int | None = LARGE) -> list[Place]:
        """Where objects of this size lie."""
        bodies = [(key, body) for key, body in self.truth.items() if size in (len(body), None)]
        found = []
        for path in self.files():
            content = path.read_bytes()
            found += [Place(path, offset, key) for key, body in bodies if (offset := content.find(body)) >= 0]
        if not found:
            raise NothingToDo
        return found

    def index(self) -> Path:
        found = list(self.folder.glob(self.recipe.index)) if self.recipe.index else []
        if not found:
            raise NothingToDo
        return found[0]

    def other_files(self) -> list[Path]:
        """What holds no values, and is not the index."""
        index = self.index()
        values = {place.path for place in self.places(None)}
        found = [path for path in self.files() if path not in values and not path.name.startswith(index.name)]
        if not found:
            raise NothingToDo
        return [path.relative_to(self.folder) for path in found]


def unlock(folder: Path) -> None:
    """Make a folder ours, and deletable, again."""
    for path, _, _ in os.walk(folder):
        os.chmod(path, 0o700)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


class Planted:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


# the faults; each is given a trial with an empty folder, and returns what came of it


def truncated_value(trial: Trial) -> Outcome:
    trial.warm()
    for place in trial.places()[:3]:
        os.truncate(place.path, place.path.stat().st_size // 2)
    return trial.next_run()


def empty_value(trial: Trial) -> Outcome:
    trial.warm()
    for place in trial.places()[:3]:
        os.truncate(place.path, 0)
    return trial.next_run()


def zeroed_value(trial: Trial) -> Outcome:
    trial.warm()
    for place in trial.places()[:3]:
        place.path.write_bytes(bytes(place.path.stat().st_size))
    return trial.next_run()


def flipped_bit(trial: Trial) -> Outcome:
    trial.warm()
    for place in trial.places()[:3]:
        flip(place.path, place.offset + LARGE // 2)
    return trial.next_run()


def flipped_bit_in_small_value(trial: Trial) -> Outcome:
    trial.warm()
    for place in trial.places(SMALL):
        flip(place.path, place.offset + SMALL // 2)
    return trial.next_run()


def swapped_values(trial: Trial) -> Outcome:
    trial.warm()
    first, second, *_ = (place.path for place in trial.places())
    aside = first.with_suffix(".aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)
    return trial.next_run()


def pickle_as_value(trial: Trial) -> Outcome:
    trial.warm()
    for place in trial.places():
        place.path.write_bytes(pickle.dumps(Planted(trial.marker)))
    if trial.recipe.database:
        with contextlib.closing(sqlite3.connect(trial.index())) as connection, connection:
            connection.execute("UPDATE Cache SET mode = 4")  # diskcache's word for a pickle
    return trial.next_run()


def pickle_as_index(trial: Trial) -> Outcome:
    trial.warm()
    trial.index().write_bytes(pickle.dumps(Planted(trial.marker)))
    return trial.next_run()


def overwritten_same_size(trial: Trial) -> Outcome:
    trial.warm()
    trial.put({key: os.urandom(len(trial.truth[key])) for key in list(trial.truth)[:4]})
    return trial.next_run()


def overwritten_other_size(trial: Trial) -> Outcome:
    trial.warm()
    trial.put({key: os.urandom(len(trial.truth[key]) + 7) for key in list(trial.truth)[:4]})
    return trial.next_run()


def garbage_index(trial: Trial) -> Outcome:
    trial.warm()
    index = trial.index()
    index.write_bytes(os.urandom(index.stat().st_size))
    return trial.next_run()


def halved_index(trial: Trial) -> Outcome:
    trial.warm()
    index = trial.index()
    os.truncate(index, index.stat().st_size // 2)
    return trial.next_run()


def garbage_elsewhere(trial: Trial) -> Outcome:
    trial.warm()
    outcomes = []
    for name in trial.other_files():
        trial.warm()
        (trial.folder / name).write_bytes(os.urandom(100))
        outcome = trial.next_run()
        outcomes.append(outcome if outcome.kind == "right" else outcome._replace(note=f"{outcome.note}, {name.name}"))
    return worst(outcomes)


def index_gone(trial: Trial) -> Outcome:
    trial.warm()
    trial.index().unlink()
    return trial.next_run()


def values_gone(trial: Trial) -> Outcome:
    trial.warm()
    for place in trial.places()[:3]:
        place.path.unlink()
    return trial.next_run()


def folder_deleted(trial: Trial) -> Outcome:
    trial.warm()
    with trial.start() as run:
        trial.open(run)
        trial.read(run)
        shutil.rmtree(trial.folder)
        first = trial.read(run)
        return worst([first, trial.read(run)])


def garbage_index_while_open(trial: Trial) -> Outcome:
    trial.warm()
    index = trial.index()
    with trial.start() as run:
        trial.open(run)
        trial.read(run)
        index.write_bytes(os.urandom(index.stat().st_size))
        return worst([trial.read(run), trial.read(run), trial.next_run()])


@contextlib.contextmanager
def as_nobody(trial: Trial) -> Iterator[Run]:
    """A run for which permissions hold: if this is root, that of another user, who owns the folder."""
    root = os.geteuid() == 0
    if root:
        for path in (trial.home, *trial.home.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
    with trial.start() as run:
        if root:
            run.ask("limit", uid=NOBODY)
        yield run


def make_read_only(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o500 if path.is_dir() else 0o400)


def read_only_at_opening(trial: Trial) -> Outcome:
    trial.warm()
    make_read_only(trial.folder)
    with as_nobody(trial) as run:
        trial.open(run)
        return trial.read(run)


def read_only_while_open(trial: Trial) -> Outcome:
    """Half of what is to be read is not in the cache yet."""
    trial.warm()
    with as_nobody(trial) as run:
        trial.put({f"{PREFIX}new-{number}": os.urandom((SMALL, LARGE)[number % 2]) for number in range(24)})
        trial.open(run)
        make_read_only(trial.folder)
        return worst([trial.read(run), trial.read(run)])


def full_disk_at_opening(trial: Trial) -> Outcome:
    return with_limit(trial, before=True, file_size=20_000)


def full_disk_while_open(trial: Trial) -> Outcome:
    return with_limit(trial, before=False, file_size=LARGE // 2)


def few_descriptors(trial: Trial) -> Outcome:
    return with_limit(trial, before=False, spare=SPARE_DESCRIPTORS)


def with_limit(trial: Trial, *, before: bool, **limit: Any) -> Outcome:
    """Two epochs of a run from which something was taken away, and then one of a run that has all."""
    if "file_size" in limit and not trial.recipe.cache:
        raise NothingToDo
    try:
        with trial.start() as run:
            trial.rehearse(run)
            if before:
                run.ask("limit", **limit)
            trial.open(run)
            if not before:
                run.ask("limit", **limit)
            outcomes = [trial.read(run), trial.read(run)]
    except Died as error:
        outcomes = [Outcome("error", str(error))]
    return worst([*outcomes, trial.next_run()]) if trial.recipe.cache else worst(outcomes)


def killed_within_a_write(trial: Trial) -> Outcome:
    """The kernel ends the process where a file reaches half of an object: the same point every time."""
    if not trial.recipe.cache:
        raise NothingToDo
    with contextlib.suppress(Died), trial.start() as run:
        trial.rehearse(run)
        trial.open(run)
        run.ask("limit", file_size=LARGE // 2, fatal=True)
        run.ask("read")
    return trial.next_run()


def killed_at_any_time(trial: Trial) -> Outcome:
    if not trial.recipe.cache:
        raise NothingToDo
    trial.put({f"{PREFIX}more-{number}": os.urandom(5 * LARGE) for number in range(40)})
    with trial.start() as run:
        trial.rehearse(run)
        trial.open(run)
        started = time.monotonic()
        run.ask("read")
        duration = time.monotonic() - started
    outcomes = []
    for turn in range(KILLS):
        shutil.rmtree(trial.folder)
        with trial.start() as run:
            trial.rehearse(run)
            trial.open(run)
            run.tell("read")
            time.sleep(duration * (turn + 0.5) / KILLS)
            run.kill()
        outcomes.append(trial.next_run())
    return worst(outcomes)


def killed_amid_a_download(trial: Trial) -> Outcome:
    """Half of one object has come when the process is killed."""
    if not trial.recipe.cache:
        raise NothingToDo
    from asyncds.testing import Fault

    with trial.start() as run:
        trial.rehearse(run)
        trial.open(run)
        trial.server.script(trial.bucket, LARGE_KEY, [Fault.stall(after=LARGE // 2)], forever=True)
        run.tell("read")
        deadline = time.monotonic() + LIMIT_S
        while not trial.server.stats.in_flight and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)
        run.kill()
    trial.server.clear_scripts()
    return trial.next_run()


def overwritten_after_listing(trial: Trial) -> Outcome:
    with trial.start() as run:
        trial.open(run)
        keys = list(trial.truth)[:4]
        trial.serve({key: os.urandom(len(trial.truth[key]) + 7) for key in keys})
        return trial.read(run)


def shortened_answer(trial: Trial) -> Outcome:
    from asyncds.testing import Fault

    return with_answers(trial, Fault.truncated(SMALL // 2))


def flipped_answer(trial: Trial) -> Outcome:
    return with_flipped_answer(trial)


def flipped_answer_with_checksum(trial: Trial) -> Outcome:
    crc = zlib.crc32(FIRST[LARGE_KEY]).to_bytes(4, "big")
    return with_flipped_answer(trial, extra_headers=(("x-amz-checksum-crc32", base64.b64encode(crc).decode()),))


def with_flipped_answer(trial: Trial, **fields: Any) -> Outcome:
    from asyncds.testing import Fault

    body = bytearray(FIRST[LARGE_KEY])
    body[LARGE // 2] ^= 1
    return with_answers(trial, replace(Fault.body(bytes(body)), **fields), LARGE_KEY)


def broken_answer(trial: Trial) -> Outcome:
    from asyncds.testing import Fault

    return with_answers(trial, Fault.reset(after=SMALL // 2))


def with_answers(trial: Trial, fault: Any, key: str | None = None) -> Outcome:
    """The first answer for each object, or for this one, is ill; and what of it is kept for the next run."""
    with trial.start() as run:
        trial.open(run)
        trial.server.script(trial.bucket, key, [fault])
        first = trial.read(run)
    trial.server.clear_scripts()
    return worst([first, trial.next_run()]) if trial.recipe.cache else first


FAULTS: dict[str, Callable[[Trial], Outcome]] = {
    "3 value files truncated": truncated_value,
    "3 value files empty": empty_value,
    "3 value files zero-filled": zeroed_value,
    "3 value files gone": values_gone,
    "one bit flipped in 3 value files": flipped_bit,
    "one bit flipped in each small value": flipped_bit_in_small_value,
    "two value files swapped": swapped_values,
    "a pickle instead of each value": pickle_as_value,
    "a pickle instead of the index": pickle_as_index,
    "4 objects overwritten, same size, listed anew": overwritten_same_size,
    "4 objects overwritten, other size, listed anew": overwritten_other_size,
    "index garbage": garbage_index,
    "index cut in half": halved_index,
    "index gone": index_gone,
    "index garbage, while open": garbage_index_while_open,
    "any other file garbage": garbage_elsewhere,
    "folder deleted between epochs of a run": folder_deleted,
    "folder read-only": read_only_at_opening,
    "folder read-only, while open": read_only_while_open,
    "disk full": full_disk_at_opening,
    "disk full, while open": full_disk_while_open,
    f"{SPARE_DESCRIPTORS} file descriptor left": few_descriptors,
    "killed within a write": killed_within_a_write,
    f"killed at {KILLS} moments of an epoch": killed_at_any_time,
    "killed amid a download": killed_amid_a_download,
    "4 objects overwritten after the listing": overwritten_after_listing,
    "each first answer cut short, its length consistent": shortened_answer,
    "one bit flipped in an answer": flipped_answer,
    "one bit flipped in an answer that names its CRC32": flipped_answer_with_checksum,
    "each first answer ends in a reset": broken_answer,
}
NOTES = """
Objects are 12 of 1 kB and 12 of 100 kB; *asked* counts those that the last epoch asked the server for. Where an object
was overwritten after the listing, the listed bytes or an error are right. *While open*: in a run that has listed, and
goes on. A disk is full where RLIMIT_FSIZE ends files. Stock diskcache keeps objects under their names. fsspec compares
ETags (`check_files=True`), which costs a HEAD per sample; where a download fails, it raises, but serves what is left of
the file to whoever asks again. litData lists anew (`recompute_index=True`). s3torchconnector has no cache."""


def environment(name: str, recipe: Recipe, folder: Path) -> Path | None:
    """The interpreter of a contender, installed if need be; None where that fails."""
    if not recipe.packages:
        return Path(sys.executable)
    place = folder / name.replace(" ", "-")
    python = place / "bin" / "python"
    done = place / "installed"
    if done.exists():
        return python
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True, capture_output=True)
        if recipe.with_torch:  # torch is large: the one at hand is found where the environment has none
            own, ours = (
                subprocess.run(
                    [each, "-c", "import site; print(site.getsitepackages()[0])"], check=True, capture_output=True
                )
                for each in (python, sys.executable)
            )
            Path(own.stdout.decode().strip(), "torch.pth").write_bytes(ours.stdout)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *recipe.packages]
        subprocess.run(pip, check=True, capture_output=True, timeout=900)
    except (subprocess.SubprocessError, OSError) as error:
        reason = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().rpartition("\n")[2] or error
        print(f"{name} is left out, because it cannot be installed: {reason}\n")
        return None
    done.touch()
    return python


def outcome(trial: Trial, fault: Callable[[Trial], Outcome]) -> str:
    try:
        trial.reset()
        return str(fault(trial))
    except NothingToDo:
        return "—"
    except Hang:
        return "hang"
    except Died as error:
        return str(Outcome("error", str(error)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(tempfile.gettempdir(), "asyncds-benchmark-environments")
    parser.add_argument("--environments", type=Path, default=default, help="where peers are installed")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="names, with commas between them")
    parser.add_argument("--only", default="", help="faults whose name contains this text")
    parser.add_argument("--log", type=Path, help="file for what the contenders print")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--bucket", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.bucket)
        return
    from asyncds.testing import S3Server

    pythons = {
        name: environment(name, CONTENDERS[name], options.environments) for name in options.contenders.split(",")
    }
    with tempfile.TemporaryDirectory() as folder, S3Server(process=True) as server:
        Path(folder).chmod(0o711)
        os.environ |= {
            "AWS_ENDPOINT_URL": server.endpoint,
            "AWS_ACCESS_KEY_ID": "benchmark",
            "AWS_SECRET_ACCESS_KEY": "benchmark",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        trials = [
            Trial(name, python, server, Path(folder, name.replace(" ", "-")), options.log or Path(os.devnull))
            for name, python in pythons.items()
            if python is not None
        ]
        trials = [trial for trial in trials if trial.works()]
        print(f"| fault | {' | '.join(trial.name for trial in trials)} |")
        print(f"|---|{'---|' * len(trials)}")
        for name, fault in FAULTS.items():
            if options.only in name:
                print(f"| {name} |", end="", flush=True)
                for trial in trials:
                    print(f" {outcome(trial, fault)} |", end="", flush=True)
                print()
        for trial in trials:
            unlock(trial.home)
    print(NOTES)


if __name__ == "__main__":
    main()
