"""One attempt loop for all that is asked of a store: full jitter, a deadline, an error that tells the story."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from random import SystemRandom
from typing import TypeVar

from asyncds.errors import AsyncdsError, DeadlineExceeded, EndpointUnreachable

__all__ = ["Retry", "RetryBudget"]

T = TypeVar("T")

_log = logging.getLogger(__name__)
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.5
_SILENCE_S = 5.0  # in trouble; then somebody who waits is told
_SECONDS_BETWEEN_WARNINGS = 15.0
_SAVED, _PER_SECOND = 500.0, 10.0  # retries


_jitter = SystemRandom()  # never the global generator: it belongs to the user's transforms


def pause(attempt: int) -> float:
    """Seconds to wait after the `attempt`-th failure: full jitter, as in AWS's "Exponential Backoff And Jitter"."""
    return _jitter.uniform(0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(attempt, 16)))


class RetryBudget:
    """Retries that a process may make: one for each request that succeeded, ten a second, and 500 that it has saved.

    So a store that fails is asked twice for each success at most, in the long run, and next to nothing where there are
    none: as in Finagle's `RetryBudget`, and the token bucket of the AWS SDKs' standard mode. What it holds back
    waits, up to its deadline, and does not fail at once.
    """

    def __init__(self) -> None:
        self._saved, self._filled = _SAVED, time.monotonic()

    def earn(self) -> None:
        """A request has succeeded."""
        if self._saved < _SAVED:
            self._saved += 1

    def take(self) -> bool:
        """Take one retry, and tell whether there was one."""
        now = time.monotonic()
        self._saved = min(_SAVED, self._saved + (now - self._filled) * _PER_SECOND)
        self._filled = now
        if self._saved < 1:
            return False
        self._saved -= 1
        return True


_budget = RetryBudget()


@dataclass
class Retry:
    """Repeats what fails transiently, at most `retries` times and within `deadline` seconds.

    The clock runs during attempts and pauses, not while an attempt waits for its slot: a long queue is no fault of
    the object that stands in it. Each attempt is given the clock, and may give itself more time. A pause is at least as
    long as the store has asked for (`Retry-After`), up to a quarter of the deadline, and goes on while the
    `RetryBudget` of the process is used up. An endpoint that has never answered is given up after `first_contact`
    seconds. Used from one event loop at a time.
    """

    retries: int
    deadline: float
    first_contact: float
    reached: bool = False
    on_retry: Callable[[], object] | None = None
    _warned: float = field(default=-math.inf, init=False, repr=False, compare=False)

    async def __call__(
        self,
        attempt: Callable[[asyncio.Timeout], Awaitable[T]],
        what: str,
        slots: AbstractAsyncContextManager[object] = nullcontext(),  # noqa: B008 - stateless
        allowance: float = 0.0,
        spent: float = 0.0,
    ) -> T:
        """Return the first success of `attempt(clock)`, each made while holding `slots`.

        `allowance` is added to the deadline, in seconds: what is large takes longer; `spent` of them are over already.
        `clock` is the `asyncio.timeout` of what is left.

        Raises the last error with attempts, seconds and remedy in its message, or `DeadlineExceeded`. Cancelling the
        call cancels the attempt and waits for it.
        """
        now, tries, last, deadline = asyncio.get_running_loop().time, 0, "", self.deadline + allowance
        left = deadline - spent
        while True:
            tries += 1
            try:
                async with slots, asyncio.timeout(left) as clock:
                    try:
                        result = await attempt(clock)
                    finally:
                        left = (clock.when() or now()) - now()
                self.succeeded()
                return result
            except TimeoutError as error:
                if isinstance(error, AsyncdsError) or not clock.expired():
                    raise
                raise _too_late(what, deadline, tries, last) from None
            except AsyncdsError as error:
                failure = error
            if spent >= deadline and failure.transient:
                raise _too_late(what, deadline, tries, f", the last one: {failure}") from None
            self.reached = self.reached or not isinstance(failure, EndpointUnreachable)
            over = deadline - (deadline if self.reached else min(deadline, self.first_contact))  # what is left then
            if deadline - left > _SILENCE_S and left > over:
                self._warn(failure, left - over)
            left = await self._paused(failure, tries, deadline, left, over)
            last = f", the last one: {failure}"
            if self.on_retry is not None:
                self.on_retry()

    def succeeded(self) -> None:
        """Count a request that did, also one that was made without this."""
        self.reached = True
        _budget.earn()

    async def _paused(self, failure: AsyncdsError, tries: int, deadline: float, left: float, over: float) -> float:
        """Wait until the next attempt may be made, and return what is left of the deadline then.

        Raises the failure where there is to be none, because of it, or since less than `over` would be left.
        """
        delay, held_back = pause(tries) + min(failure.retry_after, self.deadline / 4), False
        while failure.transient and tries <= self.retries and left - delay >= over:
            await asyncio.sleep(delay)
            left -= delay
            if _budget.take():
                return left
            delay, held_back = pause(tries), True
        _log.debug("given up", exc_info=failure)
        # None: a page of frames of aiohttp and botocore helps nobody.
        raise _told(failure, tries, deadline - left, held_back) from None

    def _warn(self, failure: AsyncdsError, left: float) -> None:
        """Say that there is trouble: once in a while, however many objects are in it."""
        now = asyncio.get_running_loop().time()
        if now - self._warned > _SECONDS_BETWEEN_WARNINGS:
            self._warned = now
            _log.warning("%s; trying again, for %.0f s at most (ASYNCDS_DEADLINE)", failure, left)


def _too_late(what: str, deadline: float, tries: int, last: str) -> DeadlineExceeded:
    story = f"{what}: no complete answer within {deadline:.4g} s in {tries} attempts"
    return DeadlineExceeded(f"{story}{last}; raise ASYNCDS_DEADLINE if that is expected")


def _told(error: AsyncdsError, tries: int, spent: float, held_back: bool) -> AsyncdsError:
    story = f" after {tries} attempts in {spent:.1f} s" if tries > 1 or held_back else ""
    story += " (so many requests fail that the next one was held back)" if held_back else ""
    return type(error)(f"{error}{story}{'; ' if error.remedy else ''}{error.remedy}")
