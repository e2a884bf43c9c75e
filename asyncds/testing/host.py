"""Where a service runs: on a loop in a thread of this process, or in a process of its own."""

import asyncio
import concurrent.futures
import contextlib
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, Self

import uvloop

from asyncds.errors import ConfigurationError

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 20.0
_ORPHAN_CHECK_S = 0.5
_CHILD = "import sys; from asyncds.testing.host import run_child; run_child(int(sys.argv[1]), int(sys.argv[2]))"


class Service(Protocol):
    """Something that listens; its other methods are called by name, on its loop, one at a time."""

    async def start(self) -> str:
        """Listen, and return the endpoint."""

    async def stop(self) -> None:
        """Close the listener and every connection."""


Factory = Callable[[], Service]


class Host(Protocol):
    """Runs one service."""

    def start(self) -> str:
        """Return the service's endpoint, or raise what its start raised."""

    def call(self, method: str, *args: Any) -> Any: ...

    def stop(self) -> None:
        """Return once the service has stopped and its thread or process has ended."""


class Hosted:
    """Base of the public context managers: runs one service while the context is open."""

    def __init__(self, *, process: bool) -> None:
        self._process = process
        self._host: Host | None = None
        self._pid = 0
        self._endpoint = ""

    def _factory(self) -> Factory:
        """Return what makes the service; it crosses to the child process by pickle."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        if self._host is not None:
            raise ConfigurationError(f"this {type(self).__name__} is running already")
        host: Host = ProcessHost(self._factory()) if self._process else ThreadHost(self._factory())
        self._endpoint = host.start()
        self._host = host
        self._pid = os.getpid()
        return self

    def __exit__(self, *exc_info: object) -> None:
        host, self._host = self._host, None
        # A forked child inherits the object, not the thread or the right to end the server.
        if host is not None and self._pid == os.getpid():
            host.stop()

    def __repr__(self) -> str:
        state = self._endpoint if self._host is not None else "not running"
        return f"<{type(self).__name__} {state}, in a {'process' if self._process else 'thread'}>"

    @property
    def endpoint(self) -> str:
        """Where clients connect to: `http://127.0.0.1:PORT`, or `https` where it speaks TLS."""
        self._running()
        return self._endpoint

    def _call(self, method: str, *args: object) -> Any:
        return self._running().call(method, *args)

    def _running(self) -> Host:
        name = type(self).__name__
        if self._host is None:
            raise ConfigurationError(f"this {name} is not running: use it as a context manager")
        if self._pid != os.getpid():
            raise ConfigurationError(f"this {name} belongs to process {self._pid}; pass its endpoint instead")
        return self._host


class ThreadHost:
    """A service on an event loop of its own, in a thread of this process."""

    def __init__(self, factory: Factory) -> None:
        self._factory = factory
        self._service: Service
        self._loop: asyncio.AbstractEventLoop
        self._stopping: asyncio.Event
        self._thread = threading.Thread(target=self._run, name="asyncds-testing", daemon=True)
        self._started: concurrent.futures.Future[str] = concurrent.futures.Future()

    def start(self) -> str:
        self._thread.start()
        try:
            return self._started.result(_START_TIMEOUT_S)
        except BaseException:
            self._thread.join(_STOP_TIMEOUT_S)
            raise

    def call(self, method: str, *args: Any) -> Any:
        return _call_on(self._loop, self._service, method, args)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._main())

    async def _main(self) -> None:
        try:
            self._loop = asyncio.get_running_loop()
            self._stopping = asyncio.Event()
            self._service = self._factory()
            endpoint = await self._service.start()
        except BaseException as exc:
            self._started.set_exception(exc)
            return
        self._started.set_result(endpoint)
        await self._stopping.wait()
        await self._service.stop()


class ProcessHost:
    """A service in a child process, spoken to over a private socket pair.

    The child ends when that socket does, and when its parent does: forked children of the parent may hold the socket
    open after it was killed.
    """

    def __init__(self, factory: Factory) -> None:
        self._factory = factory
        self._process: subprocess.Popen[bytes]
        self._control: Connection
        self._lock = threading.Lock()

    def start(self) -> str:
        ours, theirs = socket.socketpair()
        with theirs:
            self._control = Connection(ours.detach())
            self._process = _spawn(theirs.fileno())
        try:
            self._send(self._factory)
            if not self._control.poll(_START_TIMEOUT_S):
                raise TimeoutError(f"the server process did not start within {_START_TIMEOUT_S:g} s")
            return str(self._receive())
        except BaseException:
            self.stop()
            raise

    def call(self, method: str, *args: Any) -> Any:
        with self._lock:
            self._send((method, args))
            return self._receive()

    def stop(self) -> None:
        self._control.close()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, message: object) -> None:
        # A child that has ended is reported by _receive, with its exit code.
        with contextlib.suppress(ConnectionError):
            self._control.send(message)

    def _receive(self) -> Any:
        try:
            succeeded, value = self._control.recv()
        except (EOFError, ConnectionError) as exc:
            code = self._process.wait(_STOP_TIMEOUT_S)
            raise RuntimeError(f"the server process ended with exit code {code}") from exc
        if succeeded:
            return value
        raise value


def _spawn(control: int) -> subprocess.Popen[bytes]:
    """Start a child that imports what this process can import, without running its main module."""
    # First this very package: the working directory may have changed since it was imported.
    paths = [str(Path(__file__).resolve().parents[2]), *map(os.path.abspath, sys.path)]
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _CHILD, str(control), str(os.getpid())],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=(control,),
        process_group=0,  # Ctrl-C in a terminal is for the parent, which decides when this process ends
    )


def run_child(control: int, parent: int) -> None:
    """Run the service that arrives on the control socket, until that socket or the parent ends."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with Connection(control) as connection, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve_child(connection, parent))


async def _serve_child(control: Connection, parent: int) -> None:
    try:
        service: Service = control.recv()()
        control.send((True, await service.start()))
    except Exception as exc:
        control.send((False, _portable(exc)))
        return
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    # A thread, because uvloop makes what it watches non-blocking, and messages are read in one go.
    arguments = control, service, loop, stopping
    threading.Thread(target=_answer_calls, args=arguments, name="asyncds-control", daemon=True).start()
    while not stopping.is_set() and os.getppid() == parent:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), _ORPHAN_CHECK_S)
    await service.stop()


def _answer_calls(
    control: Connection, service: Service, loop: asyncio.AbstractEventLoop, stopping: asyncio.Event
) -> None:
    # EOFError and OSError: the parent has closed its end. RuntimeError: the loop has closed.
    with contextlib.suppress(EOFError, OSError, RuntimeError):
        while True:
            method, args = control.recv()
            try:
                reply = True, _call_on(loop, service, method, args)
            except Exception as exc:
                reply = False, _portable(exc)
            control.send(reply)
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(stopping.set)


def _call_on(loop: asyncio.AbstractEventLoop, service: Service, method: str, args: tuple[Any, ...]) -> Any:
    """Call a service's method on its loop from another thread, and wait for the result."""
    result: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            result.set_result(getattr(service, method)(*args))
        except BaseException as exc:
            result.set_exception(exc)

    loop.call_soon_threadsafe(run)
    return result.result()


def _portable(exc: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(exc))
    except Exception:
        return RuntimeError(f"{type(exc).__name__}: {exc}")
    return exc
