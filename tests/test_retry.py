"""Retry: what is tried again, when it is given up, and what the error then says."""

import asyncio
import random
import time
import traceback

import pytest

from asyncds import retry as module
from asyncds.errors import (
    AccessDenied,
    DeadlineExceeded,
    EndpointUnreachable,
    ObjectChanged,
    ObjectNotFound,
    TransferFailed,
)
from asyncds.retry import Retry, RetryBudget, pause


class Attempts:
    """An attempt that raises one error after the other and then returns "done"; `now` is what it thinks the time is."""

    def __init__(self, *errors, seconds=0.0, monkeypatch=None):
        self.errors, self.seconds, self.calls, self.now = list(errors), seconds, 0, 1000.0
        self.pauses = []
        if monkeypatch is not None:
            monkeypatch.setattr(time, "monotonic", lambda: self.now)
            monkeypatch.setattr(module.asyncio, "sleep", self.sleep)
            monkeypatch.setattr(module, "_budget", RetryBudget())

    async def __call__(self, clock=None):
        self.calls += 1
        self.now += self.seconds
        if self.errors:
            raise self.errors.pop(0)
        return "done"

    async def sleep(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def one_second_pauses(monkeypatch):
    monkeypatch.setattr(module, "pause", lambda attempt: 1.0)


def failed(number=1):
    return [TransferFailed(f"it: 503 SlowDown ({n})").because("wait") for n in range(1, number + 1)]


def refused(number=1):
    return [EndpointUnreachable("it: no connection") for _ in range(number)]


async def test_transient_failures_are_repeated_until_one_succeeds(monkeypatch):
    attempts, told = Attempts(*failed(3), monkeypatch=monkeypatch), []
    retry = Retry(retries=3, deadline=60, first_contact=5, on_retry=lambda: told.append(attempts.calls))
    assert await retry(attempts, "it") == "done"
    assert (attempts.calls, told) == (4, [1, 2, 3])


async def test_error_after_the_last_attempt_tells_the_story(monkeypatch):
    attempts = Attempts(*failed(9), seconds=2.0, monkeypatch=monkeypatch)
    monkeypatch.setattr(module, "pause", lambda attempt: 0.5)
    with pytest.raises(TransferFailed) as caught:
        await Retry(retries=2, deadline=60, first_contact=5)(attempts, "it")
    assert str(caught.value) == "it: 503 SlowDown (3) after 3 attempts in 7.0 s; wait"
    assert attempts.calls == 3


@pytest.mark.parametrize("error", [AccessDenied("it: no"), ObjectNotFound("it: gone"), ObjectChanged("it: new")])
async def test_lasting_failure_is_raised_at_once_with_its_remedy(error):
    attempts = Attempts(error)
    with pytest.raises(type(error)) as caught:
        await Retry(retries=9, deadline=60, first_contact=5)(attempts, "it")
    assert attempts.calls == 1
    assert str(caught.value) == str(error) + (f"; {error.remedy}" if error.remedy else "")


async def test_other_exceptions_pass_through_untouched():
    error = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError) as caught:
        await Retry(retries=9, deadline=60, first_contact=5)(Attempts(error), "it")
    assert caught.value is error


@pytest.mark.usefixtures("one_second_pauses")
@pytest.mark.parametrize(
    ("errors", "seconds", "calls"),
    [
        (refused(99), 0.0, 4),  # never reached: first_contact counts, and pauses count
        (refused(99), 1.0, 2),
        ([*failed(), *refused(99)], 0.0, 11),  # it did answer once
        (failed(99), 0.0, 11),
    ],
)
async def test_endpoint_that_never_answered_is_given_up_early(monkeypatch, errors, seconds, calls):
    attempts = Attempts(*errors, seconds=seconds, monkeypatch=monkeypatch)
    with pytest.raises(type(errors[-1])):
        await Retry(retries=99, deadline=10, first_contact=3)(attempts, "it")
    assert attempts.calls == calls


@pytest.mark.usefixtures("one_second_pauses")
async def test_endpoint_that_answered_another_object_gets_the_whole_deadline(monkeypatch):
    retry = Retry(retries=99, deadline=10, first_contact=3)
    assert await retry(Attempts(), "first") == "done"
    attempts = Attempts(*refused(9), monkeypatch=monkeypatch)
    assert await retry(attempts, "second") == "done"


@pytest.mark.usefixtures("one_second_pauses")
async def test_waiting_for_a_slot_does_not_count(monkeypatch):
    attempts = Attempts(*failed(5), monkeypatch=monkeypatch)

    class SlowSlots:
        async def __aenter__(self):
            attempts.now += 100

        async def __aexit__(self, *_):
            attempts.now += 100

    assert await Retry(retries=9, deadline=6, first_contact=5)(attempts, "it", SlowSlots()) == "done"


async def test_lasting_trouble_is_told_once_in_a_while_and_not_at_once(monkeypatch, caplog, one_second_pauses):
    attempts = Attempts(*failed(40), monkeypatch=monkeypatch)
    assert await Retry(retries=50, deadline=60, first_contact=5)(attempts, "it") == "done"
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    assert "503 SlowDown (7); trying again, for 54 s at most (ASYNCDS_DEADLINE)" in caplog.messages[0]


async def test_short_trouble_is_not_told(monkeypatch, caplog, one_second_pauses):
    attempts = Attempts(*failed(4), monkeypatch=monkeypatch)
    assert await Retry(retries=50, deadline=60, first_contact=5)(attempts, "it") == "done"
    assert not caplog.records


async def test_traceback_of_an_error_is_short_and_the_whole_story_is_in_the_log(caplog):
    async def attempt(clock):
        try:
            raise OSError("deep down")
        except OSError as error:
            raise AccessDenied("it: 403") from error

    caplog.set_level("DEBUG", "asyncds")
    with pytest.raises(AccessDenied) as caught:
        await Retry(retries=9, deadline=60, first_contact=5)(attempt, "it")
    assert "deep down" not in "".join(traceback.format_exception(caught.value))
    assert "deep down" in caplog.text


async def test_pause_holds_no_slot(monkeypatch):
    slots, seen = asyncio.Semaphore(1), []

    async def sleep(seconds):
        seen.append(slots.locked())

    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    assert await Retry(retries=9, deadline=60, first_contact=5)(Attempts(*failed(2)), "it", slots) == "done"
    assert seen == [False, False]


async def test_attempt_that_outlives_the_deadline_is_cancelled_before_the_error_is_raised():
    events = []

    async def never(clock):
        events.append("asked")
        if len(events) == 1:
            raise failed()[0]
        try:
            await asyncio.Event().wait()
        finally:
            events.append("cancelled")

    with pytest.raises(DeadlineExceeded) as caught:
        await Retry(retries=9, deadline=0.2, first_contact=5)(never, "s3://b/k")
    assert events == ["asked", "asked", "cancelled"]
    assert str(caught.value).startswith(
        "s3://b/k: no complete answer within 0.2 s in 2 attempts, the last one: it: 503"
    )
    assert "ASYNCDS_DEADLINE" in str(caught.value)


async def test_timeout_that_is_the_stores_own_is_not_taken_for_the_deadline():
    error = TimeoutError("mine")
    with pytest.raises(TimeoutError) as caught:
        await Retry(retries=9, deadline=60, first_contact=5)(Attempts(error), "it")
    assert caught.value is error


async def test_cancelling_the_call_cancels_the_attempt_and_waits_for_it():
    started, events = asyncio.Event(), []

    async def attempt(clock):
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            events.append("cleaned up")

    slots = asyncio.Semaphore(1)
    call = asyncio.create_task(Retry(retries=9, deadline=60, first_contact=5)(attempt, "it", slots))
    await started.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert events == ["cleaned up"]
    assert not slots.locked()


def test_pauses_are_full_jitter_up_to_a_cap():
    for attempt, longest in [(1, 0.1), (2, 0.2), (4, 0.8), (5, 1.5), (1000, 1.5)]:
        pauses = [pause(attempt) for _ in range(300)]
        assert 0 <= min(pauses) < longest / 4
        assert longest * 3 / 4 < max(pauses) <= longest


def test_jitter_leaves_the_global_generator_alone():
    random.seed(1)
    state = random.getstate()
    pause(3)
    assert random.getstate() == state


@pytest.mark.parametrize(("asked_for", "waited"), [(7.0, 7.0), (3600.0, 15.0)])
async def test_store_that_says_when_to_ask_again_is_waited_for_up_to_a_quarter_of_the_deadline(
    monkeypatch, asked_for, waited
):
    error = TransferFailed("it: 503")
    error.retry_after = asked_for
    attempts = Attempts(error, monkeypatch=monkeypatch)
    assert await Retry(retries=9, deadline=60, first_contact=5)(attempts, "it") == "done"
    assert waited <= attempts.pauses[0] <= waited + 0.1


async def test_process_that_has_used_up_its_retries_waits_for_ten_a_second(monkeypatch, one_second_pauses):
    attempts = Attempts(*failed(1), monkeypatch=monkeypatch)
    budget = module._budget
    while budget.take():
        pass
    budget._filled = attempts.now + 2.5  # so that a whole one is there after three pauses
    assert await Retry(retries=9, deadline=60, first_contact=5)(attempts, "it") == "done"
    assert attempts.calls == 2
    assert len(attempts.pauses) == 3


async def test_retry_that_the_budget_holds_back_for_too_long_ends_with_the_failure(monkeypatch, one_second_pauses):
    attempts = Attempts(*failed(1), monkeypatch=monkeypatch)
    while module._budget.take():
        pass
    module._budget._filled = attempts.now + 1000
    with pytest.raises(TransferFailed, match=r"503 SlowDown \(1\) after 1 attempts in .* the next one was held back"):
        await Retry(retries=9, deadline=4, first_contact=4)(attempts, "it")
    assert attempts.calls == 1
    assert len(attempts.pauses) == 4


async def test_storm_is_not_amplified_beyond_one_retry_for_each_success(monkeypatch):
    attempts = Attempts(monkeypatch=monkeypatch)
    budget = module._budget
    assert sum(budget.take() for _ in range(2000)) == 500
    retry = Retry(retries=9, deadline=60, first_contact=5)
    for _ in range(300):
        assert await retry(attempts, "it") == "done"
    assert sum(budget.take() for _ in range(2000)) == 300
    attempts.now += 3.0
    assert sum(budget.take() for _ in range(2000)) == 30
