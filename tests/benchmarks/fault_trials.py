"""One fault for one contender: its process, its server, its folder, and the judgement of what it read."""

import os
import random
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fault_child import digest
from fault_contenders import CONTENDERS, ENVIRONMENT, PREFIX
from fault_process import Died, Hang, Origin, Run

from asyncds.testing import Fault, S3Server

SMALL, LARGE = 1_000, 100_000  # bytes
SEVERITY = ("right", "error", "hang", "silently wrong")
FIRST = {f"{PREFIX}{n:03}": random.Random(n).randbytes((SMALL, LARGE)[n % 2]) for n in range(24)}
LARGE_KEY = f"{PREFIX}007"
ACCESS = {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "canary-of-the-secret-key"}
CLEAN = ("AWS_", "ASYNCDS_", "MINIO_")


class Outcome(NamedTuple):
    """What a fault led to, and a word about it."""

    kind: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.note}" if self.note else self.kind


def worst(outcomes: Sequence[Outcome]) -> Outcome:
    """The last of the worst."""
    return max(reversed(outcomes), key=lambda outcome: SEVERITY.index(outcome.kind))


class NothingToDo(Exception):
    """A fault has nothing to act on."""


class Trial:
    """One fault for one contender: a folder, the objects in the bucket, and what they should be."""

    bucket = "faults"

    def __init__(self, name: str, python: str, base: Path, log: Path) -> None:
        self.name, self.recipe, self.home, self.log = name, CONTENDERS[name], base, log
        self.truth: dict[str, bytes] = {}
        self.folder, self.marker = base / "cache", base / "marker"
        self.origin = Origin([python, str(Path(__file__).with_name("fault_child.py")), name, self.bucket])
        self._template = base.parent / f"{base.name}-template"
        self._served: dict[str, bytes] = {}
        self.server = S3Server(process=True)

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

    def script(self, key: str | None, steps: Iterable[Fault], **how: Any) -> None:
        self.server.script(self.bucket, key, steps, **how)

    # runs

    def start(self, endpoint: str | None = None, **env: str | None) -> Run:
        """A process, with variables that are added, or with None taken away."""
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.lower().endswith("_proxy") and not key.startswith(CLEAN)
        }
        aws = {"AWS_ENDPOINT_URL": endpoint or self.server.endpoint, "AWS_EC2_METADATA_DISABLED": "true"}
        aws |= {"AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1"}
        changed = kept | ENVIRONMENT | ACCESS | aws | {"HOME": str(self.home), "TMPDIR": str(self.home)} | env
        return Run(
            self.origin, {name: value for name, value in changed.items() if value is not None}, self.home, self.log
        )

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
            run.end()  # or a database may not be in one file yet
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
        self.needs_cache()
        if not self._template.exists():
            self.fill()
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self._template, self.folder)

    def needs_cache(self) -> None:
        if not self.recipe.cache:
            raise NothingToDo

    def read(self, run: Run) -> Outcome:
        """Read everything in a run, and compare it with the truth."""
        return self.judged(run.ask("read"))

    def read_counted(self, run: Run) -> Outcome:
        """Read, and say how many objects the server was asked for."""
        self.server.reset_counts()
        outcome = self.read(run)
        if outcome.kind == "right" and self.recipe.cache:
            gets = self.server.stats.gets
            return Outcome("right", f"{sum(gets[self.bucket, key] > 0 for key in self.truth)} asked")
        return outcome

    def next_run(self) -> Outcome:
        """What a new process reads."""
        with self.start() as run:
            self.open(run)
            return self.read_counted(run)

    def then_next_run(self, first: Outcome) -> Outcome:
        """What came of a fault, and of what a new process finds in the cache after it."""
        self.server.clear_scripts()
        if not self.recipe.cache:
            return first
        with self.start() as run:
            self.open(run)
            return worst([first, self.read(run)])

    def judged(self, reply: dict[str, Any]) -> Outcome:
        """Compare what was read with the truth, as far as it was read."""
        digests, errors, keys = reply["digests"], reply["errors"], reply.get("keys")
        if self.marker.exists():
            return Outcome("silently wrong", "code was run")
        if keys is not None:
            if twice := [key for key, count in Counter(keys).items() if count > 1]:
                return Outcome("silently wrong", f"{len(twice)} listed twice")
            if not reply["partial"] and (missing := self.truth.keys() - set(keys)):
                return Outcome("silently wrong", f"{len(missing)} of {len(self.truth)} not listed")
            if bad := [key for key in keys if key not in errors and not self.is_right(key, digests.get(key))]:
                return Outcome("silently wrong", f"{len(bad)} of {len(self.truth)}")
        if errors:
            return Outcome("error", next(iter(errors.values())))
        return Outcome("right")

    def is_right(self, key: str, found: str | None) -> bool:
        return key in self.truth and found == digest(self.truth[key])


def unlock(folder: Path) -> None:
    """Make a folder ours, and deletable, again."""
    for path, _, _ in os.walk(folder):
        os.chmod(path, 0o700)
