"""Counters: exact sums over processes, also those that were killed."""

import mmap
import os
import pickle
import signal
import threading

import pytest

from asyncds.stats import _MARK, COUNTERS, Counters, mark_of, percentiles

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture
def counters(tmp_path):
    return Counters(tmp_path / "counters")


def count(counters, times, killed=False):
    for _ in range(times):
        counters.add(gets=1, bytes=10, blocked_s=0.5)
    if killed:
        os.kill(os.getpid(), signal.SIGKILL)


def totals(counters):
    total = counters.total()
    return total["gets"], total["bytes"], total["blocked_s"]


def test_all_counters_start_at_nothing(counters):
    assert counters.total() == dict.fromkeys(COUNTERS, 0)
    assert not counters.path.exists(), "reading makes no file"


def test_amounts_add_up_and_only_seconds_are_fractions(counters):
    counters.add(samples=1, blocked_s=0.25)
    counters.add(samples=2, transform_s=1.5)
    total = counters.total()
    assert (total["samples"], total["blocked_s"], total["transform_s"]) == (3, 0.25, 1.5)
    assert {name: type(value) for name, value in total.items()} == {
        name: float if name.endswith("_s") else int for name in COUNTERS
    }


def test_unknown_counter_is_an_error(counters):
    with pytest.raises(KeyError):
        counters.add(typo=1)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes_of_every_start_method_are_summed(counters, child, method):
    count(counters, 3)
    processes = [child(method, count, counters, times, wait=False) for times in (5, 7)]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert totals(counters) == (15, 150, 7.5)
    count(counters, 1)
    assert totals(counters) == (16, 160, 8.0)


def test_what_a_killed_process_counted_is_kept(counters, child):
    process = child("fork", count, counters, 1000, True, wait=False)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert totals(counters) == (1000, 10_000, 500.0)


def nested(counters, child_of):
    count(counters, 1)
    child_of("fork", count, counters, 2)
    count(counters, 4)


def test_child_of_a_child_is_summed_too(counters, child):
    count(counters, 8)
    child("fork", nested, counters, child)
    assert totals(counters)[0] == 15


def test_unpickled_twin_in_the_same_process_is_summed(counters):
    twin = pickle.loads(pickle.dumps(counters))
    count(counters, 2)
    count(twin, 3)
    assert totals(counters) == totals(twin) == (5, 50, 2.5)


def test_threads_lose_nothing(counters):
    threads = [threading.Thread(target=count, args=(counters, 2000)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert totals(counters)[0] == 8000


def test_fork_while_a_thread_counts_does_not_hang_the_child(counters, child):
    count(counters, 1)
    with counters._lock:
        child("fork", count, counters, 1)
    assert totals(counters)[0] == 2


@pytest.mark.parametrize("place", ["absent/counters", "file/counters", "link"])
def test_file_that_cannot_be_used_leaves_a_process_counting_for_itself(tmp_path, child, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    counters = Counters(tmp_path / place)
    count(counters, 2)
    child("fork", count, counters, 5)
    assert totals(counters) == (2, 20, 1.0)
    assert not (tmp_path / "target").exists()


def test_removed_file_does_not_stop_counting(counters):
    count(counters, 1)
    counters.path.unlink()
    count(counters, 1)
    assert counters.total()["gets"] in (0, 2)


def test_page_has_its_place_on_disk_before_it_is_mapped(counters, monkeypatch):
    """A write to a mapped page for which the disk has no room kills the process."""
    real, seen = mmap.mmap, []

    def mapped(descriptor, *arguments, **options):
        seen.append(os.fstat(descriptor))
        return real(descriptor, *arguments, **options)

    monkeypatch.setattr("asyncds.stats.mmap.mmap", mapped)
    count(counters, 1)
    assert [status.st_blocks * 512 >= status.st_size > 0 for status in seen] == [True]


def test_percentiles_of_latencies_are_right_to_within_a_tenth_over_processes(counters, child):
    seconds = [0.010] * 60 + [0.050] * 32 + [0.4] * 8
    for second in seconds[::2]:
        counters.observe(second)
    child("fork", lambda: [counters.observe(second) for second in seconds[1::2]])
    assert sum(counters.latencies()) == 100
    found = percentiles([counters.latencies()])
    for name, right in (("latency_p50_s", 0.010), ("latency_p90_s", 0.050), ("latency_p99_s", 0.4)):
        assert right / 1.1 <= found[name] <= right * 1.1
    twice = percentiles([counters.latencies(), counters.latencies()])
    assert twice == found
    assert set(percentiles([[0.0] * len(counters.latencies())]).values()) == {0.0}


def count_as_another_version(counters, change):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("asyncds.stats._MARK", change)
        count(counters, 5)


@pytest.mark.parametrize("mark", [0, 1, 2**64 - 1])
def test_pages_of_another_version_are_not_counted(counters, child, mark):
    child("fork", count_as_another_version, counters, mark)
    assert (counters.path.stat().st_size, totals(counters), counters.readable) == (mmap.PAGESIZE, (0, 0, 0.0), False)
    count(counters, 2)
    assert (totals(counters), counters.readable) == ((2, 20, 1.0), True)


def test_each_layout_has_its_own_mark():
    now = (COUNTERS, 64, 0.0005, 1.2)
    marks = {mark_of(*now), mark_of(COUNTERS[1:], *now[1:]), mark_of(*now[:2], 0.001, 1.2)}
    assert len(marks) == 3
    assert _MARK in marks


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 0.0005, 59.0, 1e6])
def test_no_latency_is_lost(counters, seconds):
    counters.observe(seconds)
    assert sum(counters.latencies()) == 1
