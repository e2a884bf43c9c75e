"""The portal: one loop per process, started with its first user, gone with its last, never carried across a fork."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from queue import SimpleQueue

import pytest

from asyncds import portal as module
from asyncds.portal import Portal

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def nobody_uses_a_loop():
    """Datasets that other tests have dropped give their loop back when they are collected."""
    gc.collect()
    if module._current is not None:
        module._current._thread.join(10)
    assert module._current is None


@pytest.fixture
def portal():
    portal = Portal.enter()
    yield portal
    portal.leave()


async def ident():
    return threading.get_ident()


def test_users_share_one_loop_which_ends_with_the_last(portal):
    second = Portal.enter()
    assert second is portal
    assert portal.call(ident()) == portal.call(ident()) != threading.get_ident()
    second.leave()
    assert portal.alive
    assert portal.call(ident())


def test_loop_ends_with_its_last_user_and_another_can_be_started():
    first = Portal.enter()
    first.leave()
    assert not first.alive
    second = Portal.enter()
    assert second is not first
    assert second.call(ident())
    second.leave()
    assert not any(thread.name == "asyncds-portal" for thread in threading.enumerate())


def test_threads_that_enter_at_once_share_one_loop(portal):
    barrier, entered = threading.Barrier(8), []

    def enter():
        barrier.wait()
        entered.append(Portal.enter())

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for user in entered:
        user.leave()
    assert entered == [portal] * 8
    assert portal.alive


def test_errors_come_back_as_they_are(portal):
    async def fail():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        portal.call(fail())
    assert isinstance(portal.start(fail()).exception(10), KeyError)


def test_started_work_runs_while_the_caller_goes_on(portal):
    gate = threading.Event()

    async def wait():
        return await asyncio.to_thread(gate.wait, 10)

    future = portal.start(wait())
    assert portal.call(ident())
    assert not future.done()
    gate.set()
    assert future.result(10) is True


def test_only_the_loops_own_thread_is_current(portal):
    async def here():
        return portal.is_current

    assert portal.call(here())
    assert not portal.is_current


def test_interrupt_of_the_caller_cancels_the_work(portal):
    ended = threading.Event()

    async def interrupt_the_caller():
        try:
            while True:  # Python does not notice a signal that comes just before it blocks
                await asyncio.sleep(0.1)
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(1)
        finally:
            ended.set()

    with pytest.raises(KeyboardInterrupt):
        portal.call(interrupt_the_caller())
    assert ended.wait(10)


def test_leaving_cancels_what_runs_and_waits_for_it():
    portal, events = Portal.enter(), []
    started = threading.Event()

    async def work():
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            events.append("cleaned up")

    future = portal.start(work())
    assert started.wait(10)
    portal.leave()
    assert events == ["cleaned up"]
    assert future.cancelled()


def use_inherited_and_own(inherited):
    assert not inherited.alive
    own = Portal.enter()
    assert own is not inherited
    assert own.call(ident())
    own.leave()
    inherited.leave()
    assert not own.alive


def test_forked_child_has_a_loop_of_its_own_and_the_parent_keeps_its(portal, child):
    for _ in range(5):
        child("fork", use_inherited_and_own, portal)
    assert portal.alive
    assert portal.call(ident())


def test_fork_while_a_thread_enters_does_not_hang_the_child(portal, child):
    with module._guard:
        child("fork", use_inherited_and_own, portal)


def hold(lock, began):
    """As OpenSSL and imports do: in no thread but this one, and for a while."""
    with lock:
        began.put(None)
        for _ in range(20):
            sum(range(200_000))


def expect_it_to_be_free(lock):
    assert lock.acquire(blocking=False)


@pytest.mark.parametrize("where", ["loop", "helper"])
def test_locks_that_the_loop_and_its_helpers_take_for_a_while_are_free_in_a_child(portal, child, where, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_TO_STAND_STILL", 20)
    lock, began = threading.Lock(), SimpleQueue()
    for _ in range(5):
        if where == "loop":
            portal.post(hold, lock, began)
        else:
            portal.start(asyncio.to_thread(hold, lock, began))
        began.get()
        child("fork", expect_it_to_be_free, lock)
        assert portal.call(ident()) == portal._thread.ident, "it goes on"


def test_fork_waits_a_moment_only_for_a_loop_that_is_held_up(portal, child):
    free, began, ended = threading.Event(), SimpleQueue(), SimpleQueue()
    portal.post(lambda: (began.put(None), free.wait(50), ended.put(None)))
    began.get()
    child("fork", os.getpid)
    assert ended.empty()
    free.set()
    assert portal.call(ident()) == portal._thread.ident


def fork_and_wait() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    try:
        os.waitpid(pid, 0)
    except KeyboardInterrupt:
        os.waitpid(pid, 0)
        raise


def test_forks_of_several_threads_leave_the_loop_running(portal):
    def fork() -> None:
        for _ in range(10):
            fork_and_wait()

    threads = [threading.Thread(target=fork) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert portal.call(ident()) == portal._thread.ident


def test_fork_from_a_helper_or_the_loop_does_not_wait_for_itself(portal, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_TO_STAND_STILL", 50)
    portal.call(asyncio.to_thread(fork_and_wait))

    async def fork() -> None:
        fork_and_wait()

    portal.call(fork())


def test_interrupt_that_comes_before_a_fork_comes_after_it(portal, capfd, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_TO_STAND_STILL", 20)
    free, began = threading.Event(), SimpleQueue()
    portal.post(lambda: (began.put(None), free.wait(50)))
    began.get()
    threading.Thread(target=signal_when_it_forks, args=(threading.main_thread().ident, signal.SIGINT, free)).start()
    with pytest.raises(KeyboardInterrupt):
        fork_and_go_on(portal)
    assert capfd.readouterr().err == "", "Python tells what a hook raises, and swallows it"


def fork_and_go_on(portal):
    fork_and_wait()
    while True:
        portal.call(ident())


def raise_lookup_error(*_):
    raise LookupError


def test_error_of_a_handler_of_signals_does_not_make_a_fork_go_on_at_once(portal, capfd, monkeypatch):
    """torch's raises one when a worker has died, and finds that out again."""
    monkeypatch.setattr(module, "_SECONDS_TO_STAND_STILL", 20)
    before = signal.signal(signal.SIGUSR2, raise_lookup_error)
    free, began, ended = threading.Event(), SimpleQueue(), SimpleQueue()
    portal.post(lambda: (began.put(None), free.wait(50), ended.put(None)))
    began.get()
    threading.Thread(target=signal_when_it_forks, args=(threading.main_thread().ident, signal.SIGUSR2, free)).start()
    try:
        fork_and_wait()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert not ended.empty(), "it has waited for the loop"
    assert capfd.readouterr().err == ""


def signal_when_it_forks(thread, number, free):
    while "stand_still" not in str(sys._current_frames()[thread]):
        pass
    os.kill(os.getpid(), number)
    free.set()


def test_pending_work_does_not_keep_the_interpreter_alive():
    script = """
        import asyncio
        from asyncds.portal import Portal
        Portal.enter().start(asyncio.sleep(60))
        print("leaving", flush=True)
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"leaving\n"
        left = time.monotonic()
        _, errors = process.communicate(timeout=20)
    assert time.monotonic() - left < 15
    assert (process.returncode, errors) == (0, b"")
