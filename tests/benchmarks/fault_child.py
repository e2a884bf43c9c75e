"""The processes of one contender: each does what it is told, a line of JSON at a time.

All are forked from one that has imported what takes seconds to import, and has used none of it; see fault_process.py.
"""

import atexit
import contextlib
import ctypes
import gc
import hashlib
import importlib
import json
import os
import resource
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from typing import Any

from fault_contenders import CONTENDERS

BATCH = 4
WORKERS = 2


class Child:
    def __init__(self, name: str, bucket: str) -> None:
        self.replies = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # whatever else is printed
        self.name, self.bucket = name, bucket
        self.contenders: list[Any] = [None]  # the last is in use; those before it were rehearsals
        self.failure = ""

    def say(self, **reply: Any) -> None:
        print(json.dumps(reply), file=self.replies)

    def obey(self) -> None:
        """Do what comes, until there is no more, and then leave; or until told to end as any process does."""
        self.say(ready=True)
        for line in sys.stdin:
            command = json.loads(line)
            reply: dict[str, Any] = {"digests": {}, "errors": {}}
            if (do := command.pop("do")) == "end":
                return
            try:
                getattr(self, do)(reply, **command)
            except Exception as error:
                traceback.print_exc()
                self.failure = type(error).__name__
                reply["errors"] = {do: self.failure}
            self.say(**reply)
        leave()

    def open(self, _: dict[str, Any], folder: str) -> None:
        self.contenders.append(None)
        self.contenders[-1] = CONTENDERS[self.name].make(folder, self.bucket)

    def read(self, reply: dict[str, Any], first: int | None = None) -> None:
        """Read everything together, or, if that fails, one by one too, as a program would that goes on."""
        contender = self.contenders[-1]
        if contender is None:
            reply["errors"] = {"open": self.failure}
            return
        keys = list(dict.fromkeys(contender.keys))[:first]
        size = 1 if CONTENDERS[self.name].serial else len(keys)
        samples: dict[str, Any] = {}
        try:
            for start in range(0, len(keys), size):
                batch = keys[start : start + size]
                samples |= dict(zip(batch, contender.read(batch), strict=True))
                self.say(progress=start)
        except Exception as error:
            traceback.print_exc()
            reply["errors"]["batch"] = type(error).__name__
            samples |= self.one_by_one(contender, keys, reply)
        reply["partial"] = first is not None
        reply |= {"keys": contender.keys[:first], "digests": {key: digest(body) for key, body in samples.items()}}

    def one_by_one(self, contender: Any, keys: Sequence[str], reply: dict[str, Any]) -> dict[str, Any]:
        samples = {}
        for key in keys:
            try:
                samples[key] = contender.read([key])[0]
            except Exception as error:
                reply["errors"][key] = type(error).__name__
            self.say(progress=key)
        return samples

    def load(self, reply: dict[str, Any], method: str = "fork", batches: int | None = None, kill: bool = False) -> None:
        """Read through a DataLoader with workers, to the end or so many batches; `kill` the second worker meanwhile."""
        from torch.utils.data import DataLoader

        contender = self.contenders[-1]
        if contender is None:
            reply["errors"] = {"open": self.failure}
            return
        loader = DataLoader(
            contender.samples, BATCH, num_workers=WORKERS, collate_fn=list, multiprocessing_context=method
        )
        samples, iterator = [], iter(loader)
        for number, batch in enumerate(iterator, 1):
            samples += [digest(body) for body in batch]
            self.say(progress=number)
            if kill and number == 1:
                os.kill(iterator._workers[1].pid, signal.SIGKILL)
            if number == batches:
                break
        keys = contender.keys[: len(samples)]
        reply |= {"keys": keys, "digests": dict(zip(keys, samples, strict=True)), "partial": batches is not None}

    def pickle(self, reply: dict[str, Any]) -> None:
        """What the dataset says of itself, and what workers by spawn are sent."""
        import pickle

        reply["text"] = repr(self.contenders[-1].samples) + pickle.dumps(self.contenders[-1].samples).decode("latin-1")

    def limit(self, _: dict[str, Any], **command: Any) -> None:
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


def digest(sample: object) -> str:
    return hashlib.sha256(sample).hexdigest() if isinstance(sample, bytes) else repr(sample)[:100]


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


def serve(name: str, bucket: str, orders: socket.socket) -> None:
    """Fork a child for each order: its environment and folder, and the files that become 0, 1 and 2; tell its end."""
    for module in CONTENDERS[name].modules:
        with contextlib.suppress(ImportError):  # the child will say so
            importlib.import_module(module)
    gc.collect()
    gc.freeze()  # or each child takes seconds to look through all of torch as it ends
    orders.send(b"ready")
    while True:
        order, files, _, _ = socket.recv_fds(orders, 1 << 20, 3)
        if not order:
            return
        if not (child := os.fork()):
            orders.close()
            for number, file in enumerate(files):
                os.dup2(file, number)
            begin(json.loads(order))
            Child(name, bucket).obey()
            return  # and end as any process does
        for file in files:
            os.close(file)
        orders.send(b"%d" % child)
        orders.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def leave() -> None:
    """End without the seconds in which an interpreter takes torch apart."""
    threading._shutdown()
    atexit._run_exitfuncs()
    os._exit(0)


def begin(order: dict[str, Any]) -> None:
    """Take over the environment as if the process began here."""
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["home"])
    os.setpgid(0, 0)  # its workers end with it
    tempfile.tempdir = None
    sys.stdin = open(0)  # noqa: SIM115
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], socket.socket(fileno=int(sys.argv[3])))
