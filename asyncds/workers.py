"""What a process knows of the DataLoader that it may be a worker of. No torch is imported for it."""

import gc
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import util
from multiprocessing.synchronize import Event
from typing import Any

from asyncds.errors import DatasetClosed

__all__ = ["SECONDS_BETWEEN_CHECKS", "insist_on_a_loader", "is_worker", "settle_in", "spare_the_collector", "workers"]

SECONDS_BETWEEN_CHECKS = 0.2
_BEFORE_QUEUES = 0  # multiprocessing waits for those at -5; at 90 and above datasets are closed
_settled = _parent = 0  # process, and the one that it had then


def workers() -> int:
    """How many processes of the DataLoader share what this rank may have in flight."""
    info = _info()
    return info.num_workers if info is not None else 1


def is_worker() -> bool:
    """Whether this process works for a DataLoader."""
    return _info() is not None


def spare_the_collector() -> None:
    """In a worker, let the garbage collector leave alone what is there by now; to be called when much has been made.

    It stays until the worker ends. Otherwise it is gone through again and again, because so much comes and goes: a
    tenth of an epoch of small objects; and once at least, which takes 0.3 s where torch is loaded.
    """
    if is_worker():
        gc.freeze()


def settle_in() -> None:
    """What a worker does before its first batch, which may be all there is to be done if everything is cached.

    One whose training process died before it began ends: torch takes whoever is its parent then for that process.
    """
    global _settled, _parent
    if _settled != os.getpid():
        _settled, _parent = os.getpid(), _first_parent()
        if is_worker():
            if _is_orphan():
                os._exit(1)
            util.Finalize(None, _leave_no_orphan, exitpriority=_BEFORE_QUEUES)
            _leave_interrupts_to_the_parent()
        spare_the_collector()


def _first_parent() -> int:
    """The process that started this one; of one from a fork server, that server."""
    parent = multiprocessing.parent_process()
    started = getattr(multiprocessing.current_process(), "_start_method", None)
    return parent.ident or 0 if parent is not None and started in ("fork", "spawn") else os.getppid()


def insist_on_a_loader() -> None:
    """Raise `DatasetClosed` in a worker whose loader was left, or whose parent has died; to be called while it waits.

    torch looks only between two batches, and gives a worker that waits within one five seconds before it kills it.
    """
    if not is_worker():
        return
    # What torch tells its workers by is an argument of their loop, and has no other way here.
    arguments = getattr(multiprocessing.current_process(), "_args", ())
    left = next((argument for argument in arguments if isinstance(argument, Event)), None)
    if (left is not None and left.is_set()) or _is_orphan():
        raise DatasetClosed("the loader that this worker reads for is gone")


def _is_orphan() -> bool:
    """Whether the training process has died: then a worker has another parent. A fork server is none; but what
    multiprocessing goes by is of no use among forked workers, each of which keeps the end of those before it open."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return False
    return (_settled == os.getpid() and _parent != os.getppid()) or not parent.is_alive()


def _leave_interrupts_to_the_parent() -> None:
    """Ctrl-C reaches workers, too. Amid torch's loop it leaves locks taken: that of the queue, which the worker then
    waits for as it ends, until it is killed; or that of the event which ends workers, which all of them wait for then,
    and the training process for ever. That one is interrupted as well, and tells its workers when it leaves its loop.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _pass)  # not SIG_IGN, which programs that a transform starts would inherit


def _pass(*_: object) -> None:
    pass


def _leave_no_orphan() -> None:
    """End a worker whose parent has died, instead of waiting until somebody takes its last batch: a pipe holds 64 KiB
    of it, and nobody will read that."""
    if _is_orphan():
        os._exit(1)


def _info() -> Any:
    data = sys.modules.get("torch.utils.data")
    return data.get_worker_info() if data is not None else None
