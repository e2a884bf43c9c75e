"""One event loop in one thread per process, for synchronous code that needs asynchronous work done."""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine, Hashable
from concurrent.futures import CancelledError, Future, wait
from typing import Any, TypeVar

import uvloop

from asyncds.errors import ConfigurationError, DatasetClosed
from asyncds.workers import SECONDS_BETWEEN_CHECKS, insist_on_a_loader

__all__ = ["Portal"]

T = TypeVar("T")
_PATIENCE_S = 5.0

_current: "Portal | None" = None
_guard = threading.Lock()


class Portal:
    """A running event loop, shared by everything in this process that needs one.

    `Portal.enter()` starts it or joins it, `leave()` stops it with the last user. A process that was forked has none
    until it enters its own: the loop it inherited would claim to run, and hang whoever waits for it.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._users = 0
        self._shared: dict[Hashable, Any] = {}
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="asyncds-portal", daemon=True)
        self._thread.start()

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
        """Give the portal back. With its last user the loop ends: tasks are cancelled and awaited, then the thread."""
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
        return self._thread.is_alive()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the loop, and return a future of its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

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
        ended = threading.Event()
        future = self.start(_telling(coroutine, ended))
        try:
            while not wait([future], SECONDS_BETWEEN_CHECKS).done:
                insist_on_a_loader()
            return future.result()
        except CancelledError:
            raise DatasetClosed("the dataset was closed while something was under way") from None
        except BaseException:
            future.cancel()
            ended.wait(_PATIENCE_S)
            raise

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()


async def _telling(coroutine: Coroutine[Any, Any, T], ended: threading.Event) -> T:
    try:
        return await coroutine
    finally:
        ended.set()


def _forget_in_child() -> None:
    global _guard
    _guard = threading.Lock()


os.register_at_fork(after_in_child=_forget_in_child)
