"""Faults of the folder in which a cache lies: damaged, deleted, read-only, full, and writers that are killed.

Each is given a trial with an empty folder, and returns what came of it.
"""

import contextlib
import os
import pickle
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fault_process import LIMIT_S, Died, Run
from fault_trials import LARGE, LARGE_KEY, PREFIX, SMALL, NothingToDo, Outcome, Trial, worst

from asyncds.testing import Fault

NOBODY = 65534
SPARE_DESCRIPTORS = 1
KILLS = 5


# a cache at rest


class Place(NamedTuple):
    """Where the bytes of an object lie in a cache."""

    path: Path
    offset: int
    key: str


def files(trial: Trial) -> list[Path]:
    return sorted(path for path in trial.folder.rglob("*") if path.is_file())


def places(trial: Trial, size: int | None = LARGE) -> list[Place]:
    """Where objects of this size lie."""
    bodies = [(key, body) for key, body in trial.truth.items() if size in (len(body), None)]
    found = []
    for path in files(trial):
        content = path.read_bytes()
        found += [Place(path, offset, key) for key, body in bodies if (offset := content.find(body)) >= 0]
    if not found:
        raise NothingToDo
    return found


def index_of(trial: Trial) -> Path:
    found = list(trial.folder.glob(trial.recipe.index)) if trial.recipe.index else []
    if not found:
        raise NothingToDo
    return found[0]


def other_files(trial: Trial) -> list[Path]:
    """What holds no values, and is not the index."""
    index = index_of(trial)
    values = {place.path for place in places(trial, None)}
    found = [path for path in files(trial) if path not in values and not path.name.startswith(index.name)]
    if not found:
        raise NothingToDo
    return [path.relative_to(trial.folder) for path in found]


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


# the faults


def truncated_value(trial: Trial) -> Outcome:
    trial.warm()
    for place in places(trial)[:3]:
        os.truncate(place.path, place.path.stat().st_size // 2)
    return trial.next_run()


def empty_value(trial: Trial) -> Outcome:
    trial.warm()
    for place in places(trial)[:3]:
        os.truncate(place.path, 0)
    return trial.next_run()


def linked_value(trial: Trial) -> Outcome:
    """A symbolic link to a file of someone else in the place of each."""
    trial.warm()
    foreign, content = trial.home / "foreign", b"not of the cache" * (LARGE // 16)
    foreign.write_bytes(content)
    for place in places(trial)[:3]:
        place.path.unlink()
        place.path.symlink_to(foreign)
    outcome = trial.next_run()
    kept = foreign.exists() and foreign.read_bytes() == content
    return outcome if kept else Outcome("silently wrong", "a file outside was changed")


def piped_value(trial: Trial) -> Outcome:
    """A named pipe in the place of each: whoever opens it waits for a writer."""
    trial.warm()
    for place in places(trial)[:3]:
        place.path.unlink()
        os.mkfifo(place.path)
    return trial.next_run()


def zeroed_value(trial: Trial) -> Outcome:
    trial.warm()
    for place in places(trial)[:3]:
        place.path.write_bytes(bytes(place.path.stat().st_size))
    return trial.next_run()


def flipped_bit(trial: Trial) -> Outcome:
    trial.warm()
    for place in places(trial)[:3]:
        flip(place.path, place.offset + LARGE // 2)
    return trial.next_run()


def flipped_bit_in_small_value(trial: Trial) -> Outcome:
    trial.warm()
    for place in places(trial, SMALL):
        flip(place.path, place.offset + SMALL // 2)
    return trial.next_run()


def swapped_values(trial: Trial) -> Outcome:
    trial.warm()
    first, second, *_ = (place.path for place in places(trial))
    aside = first.with_suffix(".aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)
    return trial.next_run()


def pickle_as_value(trial: Trial) -> Outcome:
    trial.warm()
    for place in places(trial):
        place.path.write_bytes(pickle.dumps(Planted(trial.marker)))
    if trial.recipe.database:
        with contextlib.closing(sqlite3.connect(index_of(trial))) as connection, connection:
            connection.execute("UPDATE Cache SET mode = 4")  # diskcache's word for a pickle
    return trial.next_run()


def pickle_as_index(trial: Trial) -> Outcome:
    trial.warm()
    index_of(trial).write_bytes(pickle.dumps(Planted(trial.marker)))
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
    index = index_of(trial)
    index.write_bytes(os.urandom(index.stat().st_size))
    return trial.next_run()


def halved_index(trial: Trial) -> Outcome:
    trial.warm()
    index = index_of(trial)
    os.truncate(index, index.stat().st_size // 2)
    return trial.next_run()


def garbage_elsewhere(trial: Trial) -> Outcome:
    trial.warm()
    outcomes = []
    for name in other_files(trial):
        trial.warm()
        (trial.folder / name).write_bytes(os.urandom(100))
        outcome = trial.next_run()
        outcomes.append(outcome if outcome.kind == "right" else outcome._replace(note=f"{outcome.note}, {name.name}"))
    return worst(outcomes)


def index_gone(trial: Trial) -> Outcome:
    trial.warm()
    index_of(trial).unlink()
    return trial.next_run()


def values_gone(trial: Trial) -> Outcome:
    trial.warm()
    for place in places(trial)[:3]:
        place.path.unlink()
    return trial.next_run()


def folder_deleted(trial: Trial) -> Outcome:
    trial.warm()
    with trial.start() as run:
        trial.open(run)
        trial.read_counted(run)
        shutil.rmtree(trial.folder)
        first = trial.read_counted(run)
        return worst([first, trial.read_counted(run)])


def garbage_index_while_open(trial: Trial) -> Outcome:
    trial.warm()
    index = index_of(trial)
    with trial.start() as run:
        trial.open(run)
        trial.read_counted(run)
        index.write_bytes(os.urandom(index.stat().st_size))
        outcomes = [trial.read_counted(run), trial.read_counted(run)]
    return worst([*outcomes, trial.next_run()])


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
        return trial.read_counted(run)


def read_only_while_open(trial: Trial) -> Outcome:
    """Half of what is to be read is not in the cache yet."""
    trial.warm()
    with as_nobody(trial) as run:
        trial.put({f"{PREFIX}new-{number}": os.urandom((SMALL, LARGE)[number % 2]) for number in range(24)})
        trial.open(run)
        make_read_only(trial.folder)
        return worst([trial.read_counted(run), trial.read_counted(run)])


def full_disk_at_opening(trial: Trial) -> Outcome:
    return with_limit(trial, before=True, file_size=20_000)


def full_disk_while_open(trial: Trial) -> Outcome:
    return with_limit(trial, before=False, file_size=LARGE // 2)


def few_descriptors(trial: Trial) -> Outcome:
    return with_limit(trial, before=False, spare=SPARE_DESCRIPTORS)


def with_limit(trial: Trial, *, before: bool, **limit: Any) -> Outcome:
    """Two epochs of a run from which something was taken away, and then one of a run that has all."""
    if "file_size" in limit:
        trial.needs_cache()
    try:
        with trial.start() as run:
            trial.rehearse(run)
            if before:
                run.ask("limit", **limit)
            trial.open(run)
            if not before:
                run.ask("limit", **limit)
            outcomes = [trial.read_counted(run), trial.read_counted(run)]
    except Died as error:
        outcomes = [Outcome("error", str(error))]
    return worst([*outcomes, trial.next_run()]) if trial.recipe.cache else worst(outcomes)


def killed_within_a_write(trial: Trial) -> Outcome:
    """The kernel ends the process where a file reaches half of an object: the same point every time."""
    trial.needs_cache()
    with contextlib.suppress(Died), trial.start() as run:
        trial.rehearse(run)
        trial.open(run)
        run.ask("limit", file_size=LARGE // 2, fatal=True)
        run.ask("read")
    return trial.next_run()


def killed_at_any_time(trial: Trial) -> Outcome:
    trial.needs_cache()
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
    trial.needs_cache()
    with trial.start() as run:
        trial.rehearse(run)
        trial.open(run)
        trial.script(LARGE_KEY, [Fault.stall(after=LARGE // 2)], forever=True)
        run.tell("read")
        deadline = time.monotonic() + LIMIT_S
        while not trial.server.stats.in_flight and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)
        run.kill()
    trial.server.clear_scripts()
    return trial.next_run()


DISK: dict[str, Callable[[Trial], Outcome]] = {
    "3 value files truncated": truncated_value,
    "3 value files empty": empty_value,
    "3 value files zero-filled": zeroed_value,
    "3 value files gone": values_gone,
    "a symbolic link instead of 3 value files": linked_value,
    "a named pipe instead of 3 value files": piped_value,
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
}
