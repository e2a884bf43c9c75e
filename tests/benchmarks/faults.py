"""A report card: what a fault of network, disk or process brings about, for asyncds and four other ways to read.

    python tests/benchmarks/faults.py [--only TEXT] [--contenders NAME,NAME] [--environments .venv-peers] [--jobs 3]

Every contender reads the same 24 objects, 12 of 1 kB and 12 of 100 kB, from an `asyncds.testing.S3Server` of its own,
in a process of its own. A fault is set, and each sample compared with the truth:

* right: every sample is what it should be. Where it matters, after it stands how many of the objects the last epoch
  asked the server for.
* error: an exception that a program can catch, or the end of the process.
* hang: no answer for 60 s, three times what the deadline of one object is set to.
* silently wrong: bytes that are not those of the object, a listing that is not complete, something written, sent or run
  that should not be, and no word of it.

The worst of all that a fault brings about counts; a dash means that a fault has nothing there to act on. An error in a
batch counts, even where the same objects can be read after it. Peers clash in what they pin, so each has an
environment, which is made where it is missing; one that cannot be made is left out. Prints Markdown tables. Linux only.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Semaphore

import environments
from fault_contenders import CONTENDERS
from fault_disk import DISK
from fault_keys import KEYS
from fault_network import NETWORK
from fault_process import Died, Hang
from fault_trials import NothingToDo, Outcome, Trial, unlock
from fault_workers import WORKERS

Fault = Callable[[Trial], Outcome]
SECTIONS: dict[str, dict[str, Fault]] = {
    "Network and server": NETWORK,
    "Disk": DISK,
    "Listings, keys and security": KEYS,
    "Workers": WORKERS,
}


def outcome(trial: Trial, fault: Fault) -> str:
    try:
        trial.reset()
        return str(fault(trial))
    except NothingToDo:
        return "—"
    except Hang:
        return "hang"
    except Died as error:
        return str(Outcome("error", str(error)))


def interpreter(name: str, folder: Path) -> str | None:
    """The Python of a contender, with an environment made for it if need be; None where that fails."""
    library = CONTENDERS[name].library
    if library is not None and environments.reason(library, folder):
        folder.mkdir(parents=True, exist_ok=True)
        environments.make(library, folder)
    if library is not None and (why := environments.reason(library, folder)):
        print(f"{name} is left out, because it cannot be installed: {why}\n")
        return None
    return environments.python_for(library or "", folder)


class Column:
    """The cells of one contender, which come one after the other, beside those of other contenders."""

    def __init__(self, trial: Trial, jobs: Semaphore) -> None:
        self.trial, self._jobs, self._thread = trial, jobs, ThreadPoolExecutor(1)

    def begin(self, fault: Fault) -> Future[str]:
        return self._thread.submit(self._cell, fault)

    def _cell(self, fault: Fault) -> str:
        with self._jobs:
            return outcome(self.trial, fault)


def tables(sections: dict[str, dict[str, Fault]], columns: list[Column]) -> None:
    """Begin all cells, and print each row when it is complete."""
    begun = {
        title: {name: [column.begin(fault) for column in columns] for name, fault in faults.items()}
        for title, faults in sections.items()
    }
    for title, rows in begun.items():
        names = " | ".join(column.trial.name for column in columns)
        print(f"\n## {title}\n\n| fault | {names} |\n|---|{'---|' * len(columns)}")
        for name, cells in rows.items():
            print(f"| {name} | {' | '.join(cell.result() for cell in cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, default=environments.FOLDER, help="where peers are installed")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="names, with commas between them")
    parser.add_argument("--only", default="", help="faults or sections whose name contains this text")
    parser.add_argument("--jobs", type=int, default=3, help="contenders that run at a time")
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="file for what the contenders print")
    options = parser.parse_args()
    if unknown := [name for name in options.contenders.split(",") if name not in CONTENDERS]:
        parser.error(f"no contender is called {unknown[0]!r}: there are {', '.join(CONTENDERS)}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o711)
        trials = []
        for name in options.contenders.split(","):
            if (python := interpreter(name, options.environments.absolute())) is not None:
                trial = Trial(name, python, folder / name.replace(" ", ""), options.log)
                stack.enter_context(trial.server)
                stack.enter_context(trial.origin)
                stack.callback(unlock, trial.home)
                trials += [trial] * trial.works()
        jobs = Semaphore(options.jobs)
        chosen = {
            title: {name: fault for name, fault in faults.items() if options.only in name or options.only in title}
            for title, faults in SECTIONS.items()
        }
        tables({title: faults for title, faults in chosen.items() if faults}, [Column(trial, jobs) for trial in trials])


if __name__ == "__main__":
    main()
