"""Faults of a DataLoader's workers. Each reads batches of 4 with 2 workers, from a dataset that was used before."""

from collections.abc import Callable

from fault_process import Hang
from fault_trials import FIRST, LARGE_KEY, Outcome, Trial

from asyncds.testing import Fault

IMPORTS_S = 600.0  # workers by spawn import torch each, which is no fault of anyone's


def used_before(method: str) -> Callable[[Trial], Outcome]:
    """Half is read in the parent, whose connections stay open, and then everything by workers."""

    def fault(trial: Trial) -> Outcome:
        with trial.start() as run:
            trial.open(run)
            run.ask("read", first=len(FIRST) // 2)
            return trial.judged(run.ask("load", within=IMPORTS_S, method=method))

    return fault


def killed(trial: Trial) -> Outcome:
    """The worker waits for an object that does not come; an error of the loader is what there should be."""
    with trial.start() as run:
        trial.open(run)
        trial.script(LARGE_KEY, [Fault.stall()], forever=True)
        first = trial.judged(run.ask("load", kill=True))
    return trial.then_next_run(first)


def left_early(trial: Trial) -> Outcome:
    """A loop ends after its first batch; the process has to end in time."""
    with trial.start() as run:
        trial.open(run)
        outcome = trial.judged(run.ask("load", batches=1))
        try:
            run.end()
        except Hang:
            return Outcome("hang", "at the end of the process")
        return outcome


def error_in_worker(trial: Trial) -> Outcome:
    with trial.start() as run:
        trial.open(run)
        trial.script(LARGE_KEY, [Fault.status(404)], forever=True)
        return trial.judged(run.ask("load"))


WORKERS: dict[str, Callable[[Trial], Outcome]] = {
    "workers by fork, after use in the parent": used_before("fork"),
    "workers by spawn, after use in the parent": used_before("spawn"),
    "a worker killed mid-batch": killed,
    "a loop left after its first batch": left_early,
    "404 in a worker": error_in_worker,
}
