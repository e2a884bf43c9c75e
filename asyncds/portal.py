"""One event loop in one thread per process, for synchronous code that needs asynchronous work done."""

import asyncio
import contextlib
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

import uvloop

from asyncds.errors import ConfigurationError, DatasetClosed
from asyncds.folder import held_back  # its hook, registered first, runs after ours: it takes locks of the loop's
from asyncds.workers import SECONDS_BETWEEN_CHECKS, insist_on_a_loader

__all__ = ["Portal"]

T = TypeVar("T")
_PATIENCE_S = 5.0
_SECONDS_TO_STAND_STILL = 1.0
_ATTEMPTS = 5
_SECONDS_TO_LEAVE_A_HOOK = 0.05
_CLOSED = "the dataset was closed while something was under way"

_current: "Portal | None" = None
_running: set["Portal"] = set()  # also those that are about to end
_guard = threading.Lock()


class Portal:
    """A running event loop, shared by everything in this process that needs one.

    `Portal.enter()` starts it or joins it, `leave()` stops it with the last user. A process that was forked has none
    until it enters its own: the loop it inherited would claim to run, and hang whoever waits for it. While a process
    forks, the loop stands still.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._users = 0
        self._ended = False
        self._shared: dict[Hashable, Any] = {}
        # What closes something, and until when it is waited for.
        self._closing: weakref.WeakKeyDictionary[Coroutine[Any, Any, Any], float] = weakref.WeakKeyDictionary()
        self._loop = uvloop.new_event_loop()
        self._helpers = _Helpers()
        self._loop.set_default_executor(self._helpers)
        self._thread = threading.Thread(target=self._run, name="asyncds-portal", daemon=True)
        try:
            self._thread.start()
            _running.add(self)
        except BaseException:  # an interrupt, and it may run all the same
            self._loop.call_soon_threadsafe(self._loop.stop)
            raise

    @classmethod
    def enter(cls) -> "Portal":
        """Return this process's portal, and count the caller as a user of it."""
        global _current
        with _guard:
            if _current is None or _current.pid != os.getpid():
                _current = cls()
            _current._users += 1
            return _current

    def leave(self) -> None:
        """Give the portal back. With its last user the loop ends: what closes something is awaited, other tasks are
        cancelled and awaited, then the thread."""
        global _current
        with _guard:
            self._users -= 1
            if self._users > 0 or self.pid != os.getpid():
                return
            if _current is self:
                _current = None
        self._loop.call_soon_threadsafe(self._loop.stop)
        if not self.is_current:
            self._thread.join()

    def shared(self, name: Hashable, make: Callable[[], T]) -> T:
        """What all users of the loop have in common under this name; the first of them makes it."""
        with _guard:
            if name not in self._shared:
                self._shared[name] = make()
            return self._shared[name]  # type: ignore[no-any-return]

    @property
    def is_current(self) -> bool:
        """Whether the caller is on the loop's own thread, which must not wait for the loop."""
        return threading.current_thread() is self._thread

    @property
    def alive(self) -> bool:
        """Whether the loop runs, in this process. `Thread.is_alive`, if interrupted, may take a thread for ended."""
        return not self._ended and self.pid == os.getpid()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the loop, and return a future of its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self, coroutine: Coroutine[Any, Any, object]) -> None:
        """Run a coroutine that closes something, and wait for it, five seconds at most; its errors are nobody's.

        Where the caller is interrupted, the end of the loop still waits until those are over.
        """
        until = self._closing[coroutine] = time.monotonic() + _PATIENCE_S
        closing = _Call(coroutine)
        self.post(closing.begin)
        while self.alive and time.monotonic() < until:
            with contextlib.suppress(Empty):
                closing.ended.get(timeout=SECONDS_BETWEEN_CHECKS)
                return
        if not self.alive:
            closing.forget()

    def post(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call a function on the loop soon; nobody waits for it. Does nothing once the loop has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it.

        An interrupt of the caller cancels it, waits until it has ended, and goes on. Raises `DatasetClosed` where the
        loop ends first, and in a worker whose loader is gone.
        """
        if self.is_current:
            coroutine.close()
            raise ConfigurationError("a callback that runs during listing or fetching must not read a dataset itself")
        under_way = _Call(coroutine)
        try:
            self.post(under_way.begin)
            task = self._outcome(under_way.ended)
        except BaseException:
            self._abandon(under_way)
            raise
        try:
            return task.result()
        except asyncio.CancelledError:
            raise DatasetClosed(_CLOSED) from None

    def _outcome(self, ended: "SimpleQueue[asyncio.Task[T]]") -> "asyncio.Task[T]":
        while True:
            with contextlib.suppress(Empty):
                return ended.get(timeout=SECONDS_BETWEEN_CHECKS)
            if not self.alive and ended.empty():
                raise DatasetClosed(_CLOSED)
            insist_on_a_loader()

    def _abandon(self, under_way: "_Call[Any]") -> None:
        if not self.alive:
            under_way.forget()
            return
        self.post(under_way.cancel)
        with contextlib.suppress(Empty):
            under_way.ended.get(timeout=_PATIENCE_S)

    def stand_still(self, standing: "SimpleQueue[None]", until: "SimpleQueue[None]") -> None:
        """Return when the loop stands between two callbacks, which it says in `standing`, and its helpers have nothing
        to do, or after a second or two; it goes on when something is put into `until`, or after five seconds."""

        def stand() -> None:
            standing.put(None)
            with contextlib.suppress(Empty):
                until.put(until.get(timeout=_PATIENCE_S))  # there may be others

        self.post(stand)
        with contextlib.suppress(Empty):
            standing.get(timeout=_SECONDS_TO_STAND_STILL)
        self._helpers.finish(_SECONDS_TO_STAND_STILL)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._finish()

    def _finish(self) -> None:
        try:
            if closing := [task for task in asyncio.all_tasks(self._loop) if task.get_coro() in self._closing]:
                left = max(self._closing.values(), default=0.0) - time.monotonic()
                self._loop.run_until_complete(asyncio.wait(closing, timeout=max(0.0, left)))
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._helpers.shutdown(wait=self._helpers.finish(_SECONDS_TO_STAND_STILL))
            self._loop.close()
        finally:
            self._ended = True
            _running.discard(self)


class _Helpers(ThreadPoolExecutor):
    """Threads to which the loop gives calls that would hold it up: aiobotocore has certificates read there, say."""

    def __init__(self) -> None:
        super().__init__(thread_name_prefix="asyncds-helper")
        self._under_way: set[Future[Any]] = set()

    def submit(self, function: Callable[..., T], /, *arguments: Any, **options: Any) -> Future[T]:
        future = super().submit(function, *arguments, **options)
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        return future

    def finish(self, seconds: float) -> bool:
        """Wait for all that is under way, and tell whether it ended in time. Not with what futures offer for it: an
        interrupt may leave one locked, and the helper that is to set its result waits for ever."""
        until = time.monotonic() + seconds
        while self._under_way and threading.current_thread() not in self._threads and time.monotonic() < until:
            time.sleep(0.001)
        return not self._under_way


class _Call(Generic[T]):
    """A coroutine that a thread waits for; the methods are called on the loop, as long as it runs.

    The queue is all that both threads have in common. A future, a condition or an event is left locked by an interrupt
    that comes just after its lock was taken, or just before it is let go of: the loop would wait for it for ever.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self.ended: SimpleQueue[asyncio.Task[T]] = SimpleQueue()
        self._coroutine = coroutine
        self._task: asyncio.Task[T] | None = None

    def begin(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._coroutine)
        self._task.add_done_callback(self._tell)

    def cancel(self) -> None:
        if self._task is None:  # the interrupt came before
            self.begin()
        assert self._task is not None
        self._task.cancel()
        self._task.add_done_callback(self._tell)  # once more, for it may have been taken out already

    def forget(self) -> None:
        """The loop has ended, and will not begin it."""
        if self._task is None:
            self._coroutine.close()

    def _tell(self, task: "asyncio.Task[T]") -> None:
        if not task.cancelled():
            task.exception()  # or asyncio complains where nobody asks for it any more
        self.ended.put(task)


# A child has only the thread that forks: a lock that another one holds within OpenSSL, or while it imports a module, is
# taken for ever there. What hashes, or speaks TLS, would hang; so the loop and its helpers are nowhere in such code.


class _Forks(threading.local):
    """Those of this thread: one, or more where a signal's handler forks while it does so."""

    def __init__(self) -> None:
        self.over: list[SimpleQueue[None]] = []


_forks = _Forks()


def _before_fork() -> None:
    over = SimpleQueue[None]()
    _forks.over.append(over)
    for portal in _running.copy():
        standing = SimpleQueue[None]()
        for _ in range(_ATTEMPTS):
            try:
                if portal.alive and not portal.is_current:
                    portal.stand_still(standing, over)
                break
            except BaseException as error:  # of a signal's handler: Python would swallow it, and fork at once
                held_back.append(error)


def _after_fork() -> None:
    _forks.over.pop().put(None)
    for error, number in ((KeyboardInterrupt, signal.SIGINT), (SystemExit, signal.SIGTERM)):
        if any(isinstance(raised, error) for raised in held_back):
            again = threading.Timer(_SECONDS_TO_LEAVE_A_HOOK, _signal_again, (number,))
            again.daemon = True
            again.start()
    held_back.clear()  # others are nobody's: torch, say, looks again whether a worker has died


def _signal_again(number: int) -> None:
    if callable(signal.getsignal(number)):  # it was its handler that raised
        signal.pthread_kill(threading.main_thread().ident or 0, number)


def _forget_in_child() -> None:
    global _guard
    _guard = threading.Lock()
    _running.clear()
    _forks.over.clear()
    held_back.clear()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_forget_in_child)
