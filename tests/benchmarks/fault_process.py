"""The processes in which a contender is run, and what can be asked of them."""

import contextlib
import json
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

LIMIT_S = 60.0  # three times what one object may take
START_S = 120.0  # importing is no fault
MEMORY = 1_500_000_000  # bytes that a process may grow by: the objects are 1.2 MB in all


class Hang(Exception):
    pass


class Died(Exception):
    pass


class Origin:
    """The process from which those of a contender are forked, one at a time."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._forked = False  # and not known to have ended

    def __enter__(self) -> Self:
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [*self._command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # a thread of its own would not outlive a fork
            )
        self._answer(START_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._orders.close()
        self._process.wait(START_S)

    def fork(self, env: dict[str, str], home: Path, files: Sequence[int]) -> int:
        """Start a process with these files as its input, output and errors; return its id."""
        if self._forked:
            raise RuntimeError("the process before this one has not ended: there is one at a time")
        self._forked = True
        socket.send_fds(self._orders, [json.dumps({"env": env, "home": str(home)}).encode()], files)
        return int(self._answer(START_S))

    def status(self, seconds: float) -> int | None:
        """How the process ended, or None where it has not in time."""
        with contextlib.suppress(TimeoutError):
            code = int(self._answer(seconds))
            self._forked = False
            return code
        return None

    def _answer(self, seconds: float) -> bytes:
        self._orders.settimeout(seconds)
        return self._orders.recv(100)


class Run:
    """A process of a contender, while the context is open."""

    def __init__(self, origin: Origin, env: dict[str, str], home: Path, log: Path) -> None:
        self._origin, self._code = origin, None
        theirs_in, ours_in = os.pipe()
        ours_out, theirs_out = os.pipe()
        self._in, self._out = open(ours_in, "w"), open(ours_out, "rb")  # noqa: SIM115
        self._said = b""  # and not asked for yet
        with log.open("ab") as errors:
            self._pid = origin.fork(env, home, [theirs_in, theirs_out, errors.fileno()])
        os.close(theirs_in)
        os.close(theirs_out)
        self._grown_from = 0

    def __enter__(self) -> Self:
        self._reply(START_S)
        self._grown_from = self._memory()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Hang):
            self._end(LIMIT_S / 2)

    def end(self) -> None:
        """Let it end as any process does; a Hang if it does not in time."""
        if not self._in.closed:
            self.tell("end")
        self._end(LIMIT_S)

    def _end(self, seconds: float) -> None:
        with contextlib.suppress(OSError):
            self._in.close()
        try:
            if self._wait(seconds) is None:
                self.kill()
                raise Hang
        finally:
            self._out.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)  # workers that it has left behind

    def kill(self) -> None:
        if self._code is None:
            os.kill(self._pid, signal.SIGKILL)
            self._wait(LIMIT_S)

    def tell(self, do: str, **command: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._in.write(json.dumps({"do": do, **command}) + "\n")
            self._in.flush()

    def ask(self, do: str, *, within: float = LIMIT_S, **command: Any) -> dict[str, Any]:
        """Tell it to do something, and return what came of it; a Hang if it is silent for too long."""
        self.tell(do, **command)
        while "progress" in (reply := self._reply(within)):
            pass
        return reply

    def _wait(self, seconds: float) -> int | None:
        if self._code is None:
            self._code = self._origin.status(seconds)
        return self._code

    def _reply(self, seconds: float) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while b"\n" not in self._said:
            if multiprocessing.connection.wait([self._out], 0.1):
                self._hear()
            elif time.monotonic() > until:
                self.kill()
                raise Hang
            self._check_memory()
        line, _, self._said = self._said.partition(b"\n")
        return json.loads(line)

    def _hear(self) -> None:
        if not (said := self._out.read1()):
            code = self._wait(LIMIT_S)
            raise Died(f"ended by signal {-code}" if code is not None and code < 0 else f"exit code {code}")
        self._said += said

    def _memory(self) -> int:
        with contextlib.suppress(OSError, IndexError):
            return int(Path(f"/proc/{self._pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return 0

    def _check_memory(self) -> None:
        if self._grown_from and self._memory() > self._grown_from + MEMORY:
            self.kill()
            raise Died(f"over {MEMORY / 1e9:g} GB of memory")
