"""Runs a soak: a server that fails, two processes that train on one cache, and what befalls all of them."""

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from asyncds import Cache
from soaking import trainer
from soaking.disk import mangle
from soaking.report import Outcome, Report
from soaking.rounds import Round, plan
from soaking.server import BUCKET, SoakServer

CACHE_SIZE = "4GB"  # so that nothing is dropped but where a round says so
_PATIENCE_S = trainer.DEADLINE_S + 15  # beyond the end of a round: for objects in their retries, and workers to end
_GONE_WITHIN_S = 30.0  # torch's workers look for their parent every five seconds, and the machine may be busy
_IDLE_AFTER_S = 12.0  # those that are there then, and have done nothing, never look
_OUTAGE_S = 0.7
_BE_SUBREAPER = 36  # see prctl(2)
_NAMES = ("AWS_", "ASYNCDS_", "MINIO_")
_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-soak",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "OMP_NUM_THREADS": "1",
    "ASYNCDS_CACHE_SIZE": CACHE_SIZE,
}

Say = Callable[[str], None]


class Training:
    """A process that trains, and what it said last."""

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=trainer.main, args=(theirs, number), name=name)
        self.process.start()
        theirs.close()
        self.said: dict[str, Any] = {}
        self._counted: dict[str, Any] = {}
        self.held: list[dict[str, int]] = []

    def tell(self, round_: Round, until: float) -> None:
        self.said["done"] = None
        self.pipe.send((round_, until))

    def hear(self) -> bool:
        """Take what it says; tell whether it is still there."""
        try:
            while self.pipe.poll():
                self.said = self.pipe.recv()
                if self.said.get("done") is not None:
                    self.held.append({n: self.said[n] for n in ("rss", "threads", "ours", "descriptors")})
        except (EOFError, ConnectionError):
            return False
        return True

    @property
    def is_done(self) -> bool:
        return self.said.get("done") is not None

    def count_into(self, outcome: Outcome) -> None:
        """Add what it has seen since this was last called."""
        before, now = self._counted, self.said
        self._counted = now
        outcome.reads += now.get("reads", 0) - before.get("reads", 0)
        outcome.wrong += now.get("wrong", 0) - before.get("wrong", 0)
        outcome.errors += Counter(now.get("errors", {})) - Counter(before.get("errors", {}))
        outcome.begun += Counter(now.get("begun", {}))
        outcome.left += Counter(now.get("left", {}))
        outcome.examples = now.get("examples", {}) | outcome.examples
        outcome.untyped += now.get("untyped", [])[len(before.get("untyped", ())) :]
        outcome.mistakes += now.get("mistakes", [])[len(before.get("mistakes", ())) :]

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(_PATIENCE_S)
        if self.process.is_alive():
            self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.hear()


class Soak:
    """`run` returns what was found. The process that runs it becomes the parent of all that loses its own."""

    def __init__(self, seed: int, seconds: float, folder: Path, say: Say) -> None:
        self._seed, self._seconds, self._folder, self._say = seed, seconds, folder, say
        self._chance = random.Random(seed)
        self._report = Report(seed)
        self._cache = folder / "asyncds"
        self._started = 0

    def run(self) -> Report:
        began = time.monotonic()
        faulthandler.register(signal.SIGUSR1, all_threads=True)  # also in those that it forks
        ctypes.CDLL(None).prctl(_BE_SUBREAPER, 1, 0, 0, 0)
        with SoakServer(self._seed) as server:
            server.create_bucket(BUCKET)
            for name in [name for name in os.environ if name.startswith(_NAMES)]:
                del os.environ[name]  # what the user has set for other purposes
            os.environ |= _ENVIRONMENT | {"AWS_ENDPOINT_URL": server.endpoint, "ASYNCDS_CACHE_DIR": str(self._folder)}
            self._server, self._known = server, set(_children())
            self._steady, self._doomed = self._start("steady process"), self._start("process that is killed")
            try:
                self._go_through_all()
            except BaseException:
                self._steady.kill()
                self._doomed.kill()
                raise
            for training in (self._steady, self._doomed):
                training.end()
                self._report.processes[training.name] = training.held
            self._look_for_leftovers()
        self._verify()
        self._report.seconds = time.monotonic() - began
        return self._report

    def _go_through_all(self) -> None:
        for round_ in plan(self._seed, self._seconds):
            began = time.monotonic()
            outcome = self._go_through(round_)
            self._report.outcomes.append(outcome)
            seconds = time.monotonic() - began
            self._say(f"round {round_.number}, {round_.kind}: {outcome.reads:,} reads in {seconds:.1f} s")

    def _start(self, name: str) -> Training:
        self._started += 1
        return Training(name, self._started)

    def _go_through(self, round_: Round) -> Outcome:
        outcome = Outcome(round_)
        self._server.begin_round(round_.shares)
        until = time.monotonic() + round_.seconds
        for training in (self._steady, self._doomed):
            training.tell(round_, until)
        events = sorted(self._events(round_), key=lambda event: event[0])
        while not self._both_are_done() and time.monotonic() < until + _PATIENCE_S:
            while events and time.monotonic() >= until - round_.seconds + events[0][0]:
                events.pop(0)[1](outcome, until)
            wait([self._steady.pipe, self._doomed.pipe], timeout=0.02)
        for training in (self._steady, self._doomed):
            training.count_into(outcome)
        self._end_of(outcome)
        return outcome

    def _both_are_done(self) -> bool:
        for training in (self._steady, self._doomed):
            training.hear()
        return all(training.is_done or not training.process.is_alive() for training in (self._steady, self._doomed))

    def _end_of(self, outcome: Outcome) -> None:
        if not (self._steady.is_done and self._doomed.is_done):
            self._replace_those_that_hang(outcome)
        for name, value in self._server.tally().items():
            current = getattr(outcome, name)
            setattr(outcome, name, Counter(value) if isinstance(current, Counter) else value)
        outcome.kills["orphans that torch had given nothing to do"] += self._end_orphans_of_torch(outcome)
        outcome.problems = self._audit(mends=not outcome.round.keeps)

    def _replace_those_that_hang(self, outcome: Outcome) -> None:
        for training in (self._steady, self._doomed):
            if not training.process.is_alive():
                outcome.mistakes.append(f"the {training.name} ended by itself, with {training.process.exitcode}")
            elif not training.is_done:
                outcome.mistakes.append(f"the {training.name} hung")
                _let_say_where_they_are(training.process.pid or 0)
            training.kill()
        self._steady, self._doomed = self._start(self._steady.name), self._start(self._doomed.name)

    # what befalls them

    def _events(self, round_: Round) -> Iterator[tuple[float, Callable[[Outcome, float], None]]]:
        """When, in seconds of the round, and what."""
        if round_.mangles:
            for _ in range(max(2, round(round_.seconds * 3))):
                yield self._chance.uniform(0.1, 1) * round_.seconds, self._mangle
        if round_.kills:
            for _ in range(max(1, round(round_.seconds / 1.5))):
                yield self._chance.uniform(0.2, 1) * round_.seconds, self._kill_a_worker
            for _ in range(round(round_.seconds / 3)):  # none in short rounds: its workers take five seconds to end
                yield self._chance.uniform(0.2, 0.9) * round_.seconds, self._kill_a_trainer
        if round_.outage:
            moment = self._chance.uniform(0.2, 0.6) * round_.seconds
            yield moment, self._go_down
            yield moment + _OUTAGE_S, lambda outcome, until: self._server.come_up()

    def _mangle(self, outcome: Outcome, until: float) -> None:
        way = self._chance.choice(outcome.round.mangles)
        outcome.mangled[way] += mangle(way, self._cache, self._chance)

    def _kill_a_worker(self, outcome: Outcome, until: float) -> None:
        training = self._chance.choice([self._steady, self._doomed])
        workers = [pid for pid in training.said.get("workers", ()) if _parent(pid) == training.process.pid]
        if workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._chance.choice(workers), signal.SIGKILL)
                outcome.kills["workers"] += 1

    def _kill_a_trainer(self, outcome: Outcome, until: float) -> None:
        if self._doomed.is_done:
            return
        self._doomed.kill()
        self._doomed.count_into(outcome)
        outcome.kills["training processes"] += 1
        outcome.kills["their workers, which end by themselves"] += len(self._doomed.said.get("workers", ()))
        self._doomed = self._start(self._doomed.name)
        self._doomed.tell(outcome.round, until)

    def _go_down(self, outcome: Outcome, until: float) -> None:
        self._server.go_down()
        outcome.outages += 1

    # what is left

    def _audit(self, *, mends: bool) -> dict[str, list[str]]:
        """What the cache finds wrong with itself, after a sweep; where it was damaged, after it was mended."""
        cache = Cache(self._folder, sweeping=False)
        try:
            cache.sweep()
            if mends:
                cache.check(fix=True)
            return cache.check()
        finally:
            cache.close()

    def _wait_for_orphans(self, seconds: float) -> list[int]:
        """Wait until the workers of processes that were killed have ended, and return those that have not."""
        ours = {self._steady.process.pid, self._doomed.process.pid} | self._known
        until = time.monotonic() + seconds
        while (orphans := [pid for pid in _children() if pid not in ours and not _reaped(pid)]) and (
            time.monotonic() < until
        ):
            time.sleep(0.05)
        return orphans

    def _end_orphans_of_torch(self, outcome: Outcome) -> int:
        """End workers that were forked as their training process was killed, and return how many there were: torch
        takes their next parent for the first, and none of our code has run in them, which would have left a thread."""
        idle = [pid for pid in self._wait_for_orphans(_IDLE_AFTER_S) if len(os.listdir(f"/proc/{pid}/task")) == 1]
        for pid in idle:
            if "futex" in Path(f"/proc/{pid}/wchan").read_text():
                outcome.mistakes.append(f"process {pid} waits for a lock that nobody has")
                _let_say_where_they_are(pid)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return len(idle)

    def _look_for_leftovers(self) -> None:
        left = self._report.leftovers
        left += [f"process {pid} is left: {_command(pid)}" for pid in self._wait_for_orphans(_GONE_WITHIN_S)]
        until = time.monotonic() + _GONE_WITHIN_S
        while (sockets := self._server.stats.connections_open) and time.monotonic() < until:
            time.sleep(0.05)
        if sockets:
            left.append(f"{sockets} connections to the server are left")

    def _verify(self) -> None:
        command = [sys.executable, "-m", "asyncds", "verify", "--cache-dir", str(self._folder)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self._folder)
        self._report.verified = (done.stdout + done.stderr).strip()
        if done.returncode:
            self._report.leftovers.append(f"asyncds verify: {self._report.verified}")


def _children(pid: int | None = None) -> list[int]:
    """Those of a process, by default of this one, also those that it has taken on."""
    tasks = Path(f"/proc/{pid or os.getpid()}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def _let_say_where_they_are(training: int) -> None:
    """Make a process and its workers, one after the other, write their stacks to stderr."""
    for pid in (training, *_children(training)):
        print(f"where {pid} is: {_command(pid)}", file=sys.stderr, flush=True)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)  # workers that were spawned know no such signal, and end
        time.sleep(0.5)


def _reaped(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    return True


def _parent(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return "it has ended meanwhile"
