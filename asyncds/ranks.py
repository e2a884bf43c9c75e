"""One table for all ranks of a job: who lists, and how the others come by what was listed.

Where torch.distributed is initialised, ranks meet in its key-value store: the first to come claims the listing, and
leaves the table there. No collective is used, for these wait until every rank takes part, and a job may well make a
dataset in one rank only. Before that, the ranks that torchrun or Slurm has started on one node meet in the cache
directory. Anybody else lists for itself. What ranks share never depends on a callable: each applies its own.
"""

import contextlib
import itertools
import json
import os
import sys
import threading
import time
import warnings
import weakref
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from asyncds import errors
from asyncds.errors import AsyncdsError, ConfigurationError, RankLost
from asyncds.locks import Locks, waiting
from asyncds.manifest import Manifest

__all__ = ["PATIENCE_S", "Meeting", "Way", "first_word", "world_size"]

PATIENCE_S = 120.0
"""For how long a rank that lists may give no sign of life."""
_BEATS = 20  # signs of life in that time
_LONGEST_PAUSE_S = 0.5
_CHUNK = 4 * 2**20  # torch's store refuses values above 8 MiB

Make = Callable[[], Manifest]
Way = Callable[[Make], Manifest]

_numbers: defaultdict[str, "itertools.count[int]"] = defaultdict(itertools.count)


class Meeting:
    """Where the ranks of a job meet for one dataset: the n-th of its description in each of them."""

    def __init__(self, folder: Path, subject: str, *description: object) -> None:
        self._folder = folder
        self._subject = subject
        description = (subject, *description)
        self._name = f"{description!r} {next(_numbers[repr(description)])}"
        self._attempts = itertools.count()

    def way(self) -> Way | None:
        """How to come by a table: called with a function that lists, it calls this, or returns what another rank has
        listed; in each rank once. None where there is nobody to share with.

        A listing that fails does so in all ranks; the next way is another attempt, in which again one of them lists.
        Raises `RankLost` if the rank that lists dies, or the store while this one waits. A store that has ended before
        is a warning: each rank that comes then lists for itself.
        """
        name = f"{self._name} {next(self._attempts)}"
        store = _Store.of_job()
        if store is not None:
            return partial(_by_store, store, self._subject, name)
        job = _launched()
        return None if job is None else partial(self._by_folder, _hash(f"{job} {name}"))

    def _by_folder(self, name: str, make: Make) -> Manifest:
        """The first of those on this node who live saves the table for the others; the last to leave deletes it."""
        locks, place = Locks.at(self._folder / "ranks.lock"), self._folder / f"job-{name}.manifest"
        with waiting(place.with_suffix(".lock")):
            if _unused(locks, name):  # what is there was left by those who were killed
                with contextlib.suppress(OSError):
                    place.unlink(missing_ok=True)
            locks.share(name.encode())
            weakref.finalize(self, _leave, locks, name, place)
            with contextlib.suppress(ConfigurationError):
                return Manifest.open(place, verify=False)
            manifest = make()
            with contextlib.suppress(OSError):
                manifest.save(place)
        return manifest


def first_word(subject: str, text: str) -> str:
    """What the first rank to come has said about this; one's own text where ranks cannot speak with one another."""
    store, key, said = _Store.of_job(), _hash(subject), text
    if store is not None:
        with contextlib.suppress(RankLost):
            said = store.say(key, text)
            store.leave(key, [key])
    return said


def world_size() -> int:
    """Ranks of this job, as far as torch knows of them."""
    distributed = sys.modules.get("torch.distributed")
    known = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if known and distributed is not None else 1


# the store of torch.distributed


class _Store:
    """The job's key-value store. What fails raises `RankLost`: it fails when the process that serves it has ended."""

    def __init__(self, store: Any, ranks: int) -> None:
        self._store = store
        self._ranks = ranks

    @classmethod
    def of_job(cls) -> "_Store | None":
        """That of this process's job; None where it has none, or where it was inherited through a fork."""
        ranks = world_size()
        store = _default_store() if ranks > 1 else None
        return None if store is None or store is _inherited else cls(store, ranks)

    def add(self, key: str, amount: int) -> int:
        with _answering():
            return int(self._store.add(self._full(key), amount))

    def set(self, key: str, value: bytes) -> None:
        with _answering():
            self._store.set(self._full(key), value)

    def get(self, key: str) -> bytes:
        """What is there; to be called when something is, for it would block."""
        with _answering():
            return bytes(self._store.get(self._full(key)))

    def has(self, key: str) -> bool:
        with _answering():
            return bool(self._store.check([self._full(key)]))

    def say(self, key: str, text: str) -> str:
        """Set what nobody has set, and return what is there then."""
        with _answering():
            return bytes(self._store.compare_set(self._full(key), "", text)).decode()

    def leave(self, key: str, keys: list[str]) -> None:
        """Say that this rank needs these keys no more. The last rank to say so deletes them."""
        taken = f"{key}/taken"
        if self.add(taken, 1) == self._ranks:
            for name in [*keys, taken]:
                with contextlib.suppress(RuntimeError):  # not every store can
                    self._store.delete_key(self._full(name))

    def _full(self, key: str) -> str:
        return f"asyncds/{self._ranks}/{key}"


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        text = f"{error}".partition("\n")[0]
        raise RankLost(
            f"the store by which the ranks of this job find each other fails ({text}): the process that serves it, "
            "rank 0 or the launcher, has ended; look at its output first"
        ) from None


def _default_store() -> Any:
    """What torch has, though not in public; where it has none, or keeps it elsewhere, each rank lists for itself."""
    module = sys.modules.get("torch.distributed.distributed_c10d")
    try:
        return module._get_default_store() if module is not None else None
    except (AttributeError, KeyError, RuntimeError, ValueError):
        return None


_inherited: Any = None


def _note_inherited() -> None:
    """A forked child must not write into the connection of its parent."""
    global _inherited
    _inherited = _default_store()


os.register_at_fork(after_in_child=_note_inherited)


def _by_store(store: _Store, subject: str, name: str, make: Make) -> Manifest:
    key, outcome = _hash(name), dict[str, Any]()
    try:
        first = store.add(f"{key}/claims", 1) == 1
    except RankLost as error:  # as it does when rank 0 is through before this one begins
        warnings.warn(f"{subject}: listed by this rank alone: {error}", stacklevel=2)
        return make()
    try:
        if first:
            return _given(store, key, outcome, make)
        outcome |= _awaited(store, key, subject)
        if "error" in outcome:
            raise _failure(subject, **outcome)
        return _received(store, key, outcome["chunks"])
    finally:
        chunks = [f"{key}/{number}" for number in range(outcome.get("chunks", 0))]
        with contextlib.suppress(RankLost):
            store.leave(key, [f"{key}/{part}" for part in ("claims", "beats", "outcome")] + chunks)


def _given(store: _Store, key: str, outcome: dict[str, Any], make: Make) -> Manifest:
    """List, and leave the table for the others, or what went wrong."""
    with _beating(store, key):
        try:
            manifest = make()
            data = memoryview(manifest.to_bytes())
            for start in range(0, len(data), _CHUNK):
                store.set(f"{key}/{start // _CHUNK}", zlib.compress(data[start : start + _CHUNK], 1))
            outcome["chunks"] = -(-len(data) // _CHUNK)
        except BaseException as error:
            with contextlib.suppress(RankLost):
                store.say(f"{key}/outcome", json.dumps({"error": type(error).__name__, "text": f"{error}"}))
            raise
        store.say(f"{key}/outcome", json.dumps(outcome))
    return manifest


def _received(store: _Store, key: str, chunks: int) -> Manifest:
    return Manifest.from_bytes(b"".join(zlib.decompress(store.get(f"{key}/{number}")) for number in range(chunks)))


def _awaited(store: _Store, key: str, subject: str) -> dict[str, Any]:
    """What has become of the listing. Who waits too long for a sign of life says for all that there will be none.

    Polls, for then no thread of the process has to wait for the store, and Ctrl-C is heard.
    """
    beats, heard, pause = -1, time.monotonic(), 0.01
    while not store.has(f"{key}/outcome"):
        latest = store.add(f"{key}/beats", 0)
        if latest != beats:
            beats, heard = latest, time.monotonic()
        elif time.monotonic() - heard > PATIENCE_S:
            text = (
                f"{subject}: the rank that lists for all has given no sign of life for {PATIENCE_S:g} s: it was "
                "killed, or stands still; look at its output, and start the job again"
            )
            return dict(json.loads(store.say(f"{key}/outcome", json.dumps({"error": "RankLost", "text": text}))))
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE_S)
    return dict(json.loads(store.get(f"{key}/outcome")))


def _failure(subject: str, error: str, text: str) -> AsyncdsError:
    """The error of another rank: of the same class with the same text, if it is one of asyncds."""
    if error in errors.__all__:
        return getattr(errors, error)(text)  # type: ignore[no-any-return]
    return RankLost(f"{subject}: the rank that lists for all failed ({error}: {text}); look at its output")


@contextlib.contextmanager
def _beating(store: _Store, key: str) -> Iterator[None]:
    """Give signs of life meanwhile."""
    over = threading.Event()

    def beat() -> None:
        with contextlib.suppress(RankLost):  # listing goes on; what is left in the store afterwards will tell
            while not over.wait(PATIENCE_S / _BEATS):
                store.add(f"{key}/beats", 1)

    thread = threading.Thread(target=beat, name="asyncds-ranks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# the cache directory of a node


def _launched() -> str | None:
    """What tells the job whose rank this process is from all others; None if no launcher has started it as one.

    A process that a rank has started has the rank's environment, and is none. So the parent must be the launcher.
    """
    names = os.environ
    if "TORCHELASTIC_RUN_ID" in names and names.get("WORLD_SIZE", "1") != "1":
        launcher = Path("/proc", f"{os.getppid()}")
        with contextlib.suppress(OSError):  # not Linux, or it is another user's
            if b"TORCHELASTIC_RUN_ID=" not in Path(launcher, "environ").read_bytes():
                began = Path(launcher, "stat").read_text().rpartition(")")[2].split()[19]
                attempt = names.get("TORCHELASTIC_RESTART_COUNT")
                return f"torchrun {names['TORCHELASTIC_RUN_ID']} {launcher} {began} {attempt}"
    if names.get("SLURM_TASK_PID") == f"{os.getpid()}" and names.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return "slurm " + " ".join(f"{names.get(f'SLURM_{part}')}" for part in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    return None


def _unused(locks: Locks, name: str) -> bool:
    """Whether no living process has come for this table."""
    free = locks.take(name.encode())
    if free:
        locks.release(name.encode())
    return free


def _leave(locks: Locks, name: str, place: Path) -> None:
    locks.release(name.encode())
    if locks.take(name.encode()):
        for path in (place, place.with_suffix(".lock")):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        locks.release(name.encode())


def _hash(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
