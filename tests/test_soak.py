"""A short soak, and that it finds what it looks for: each kind of broken promise, and only that."""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from soaking.objects import body, size_of
from soaking.report import MORE_DESCRIPTORS, MORE_RSS, MORE_THREADS, Outcome, Report
from soaking.rounds import KINDS, Round, drawn, plan
from soaking.server import MENU
from soaking.trainer import class_of

from asyncds.errors import TransferFailed
from asyncds.testing import Fault

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, and processes that take on orphans")
SOAK = Path(__file__).with_name("soak.py")
PREFIX = "round-0/0/"


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(2, marks=pytest.mark.timeout(120)),
        pytest.param(60, marks=[pytest.mark.thorough, pytest.mark.timeout(600)]),
    ],
)
def test_soak_breaks_no_promise(seconds):
    command = [sys.executable, str(SOAK), "--seconds", str(seconds), "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(SOAK.parents[1])}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["violations"], found["wrong_samples"], found["leftovers"]) == ([], 0, [])
    assert min(found["reads"], found["faulted_reads"], sum(found["faults"].values())) > 0
    assert found["requests"] > found["objects"]


# what it takes for right


def test_bytes_of_an_object_follow_from_its_key():
    keys = [f"a/{number}" for number in range(500)]
    assert all(len(body(key)) == size_of(key) for key in keys)
    assert body("a/1") == hashlib.shake_128(b"a/1").digest(size_of("a/1")) != body("a/2")
    sizes = sorted(map(size_of, keys))
    assert sizes[0] >= 100
    assert sizes[0] < 150 < 10_000 < sizes[-50]
    assert sizes[-1] == 40_000  # which the cache keeps in a file


def test_error_is_counted_by_its_class_and_one_of_nobody_is_told_apart():
    assert class_of(TransferFailed("x")) == "TransferFailed"
    assert class_of(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")).startswith("torch")
    assert class_of(RuntimeError("x")) is class_of(ValueError("x")) is None


@pytest.mark.parametrize("part", MENU)
def test_each_fault_of_the_menu_can_be_drawn_for_each_size(part):
    chance = random.Random(0)
    for draw in MENU[part].values():
        faults = [draw(chance, size) for size in (1, 2, 100, 40_000) for _ in range(20)]
        assert all(fault != Fault() for fault in faults)


# the plan


def test_plan_follows_from_its_seed_and_has_all_kinds_in_turn():
    rounds = list(plan(7, 80))
    assert rounds == list(plan(7, 80)) != list(plan(8, 80))
    assert sum(each.seconds for each in rounds) == pytest.approx(80)
    assert {each.kind for each in rounds} == set(KINDS)
    assert [each.kind for each in plan(7, 3)] == list(KINDS)[:2]


# what it takes for wrong


def outcome(kind: str = "network", **found) -> Outcome:
    plain = drawn(random.Random(0), 0, kind, 5)
    options = dict(plain.options) | {"on_error": "raise"}
    return Outcome(replace(plain, options=options), **{"begun": Counter({PREFIX: 4}), "reads": 9} | found)


VIOLATIONS = {
    "samples had wrong bytes": outcome(wrong=1),
    "k: wrong bytes": outcome(mistakes=["k: wrong bytes"]),
    "none of asyncds": outcome(errors=Counter(ValueError=1), untyped=["ValueError: x"]),
    "1 TransferFailed (because)": outcome(errors=Counter(TransferFailed=1), examples={"TransferFailed": "because"}),
    "1 AccessDenied": outcome("kills", errors=Counter({"AccessDenied": 1, "torch: a worker was killed": 1})),
    "1 EndpointUnreachable": outcome("final errors", errors=Counter(EndpointUnreachable=1, ObjectChanged=1)),
    "nothing was read": outcome(reads=0),
    "asked for 2 times": outcome(beyond=[(PREFIX, 1, 9), (PREFIX, 2, 1)]),
    "asked for 3 times": outcome("kills", kills=Counter(workers=1), beyond=[(PREFIX, 2, 9), (PREFIX, 3, 1)]),
    "asked for 5 times": outcome("no cache", beyond=[(PREFIX, 4, 9), (PREFIX, 5, 1)]),
    "the cache, damaged": outcome(problems={"damaged": ["row 1"]}),
}


@pytest.mark.parametrize("text", VIOLATIONS)
def test_broken_promise_of_a_round_is_named_with_the_round(text):
    (line,) = VIOLATIONS[text].violations()
    assert text in line
    assert line.startswith(f"round 0 ({VIOLATIONS[text].round.kind}): ")


def test_what_faults_explain_is_no_violation():
    fine = [
        outcome("final errors", errors=Counter(AccessDenied=3)),
        outcome("kills", errors=Counter({"torch: a worker was killed": 1}), kills=Counter(workers=1)),
        outcome("kills", kills=Counter(workers=1), beyond=[(PREFIX, 2, 1)]),
        outcome("outage", outages=1, beyond=[(PREFIX, 2, 1)]),
        outcome(left=Counter({PREFIX: 1}), beyond=[(PREFIX, 2, 1)]),
        outcome("values", mangled=Counter({"cut a file": 3}), beyond=[(PREFIX, 4, 1)]),
    ]
    assert [line for each in fine for line in each.violations()] == []


FLAT = {"rss": 400 << 20, "threads": 5, "ours": 0, "descriptors": 17}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rss", FLAT["rss"] + MORE_RSS + 1),
        ("threads", 5 + MORE_THREADS + 1),
        ("ours", 1),
        ("descriptors", 17 + MORE_DESCRIPTORS + 1),
    ],
)
def test_process_that_holds_more_and_more_is_named(name, value):
    report = Report(seed=1, outcomes=[outcome()], processes={"one": [FLAT, FLAT], "two": [FLAT, FLAT | {name: value}]})
    (line,) = report.violations()
    assert line.startswith("two: ")
    assert ("threads are left" if name == "ours" else f"{name} grew") in line


def test_report_sums_up_and_can_be_read_by_people_and_programs():
    report = Report(seed=5, seconds=36, leftovers=["process 7 is left"], verified="2 entries")
    report.outcomes = [outcome(reads=10, faulted_reads=3, faults=Counter(reset=2)), outcome(reads=5, faulted_reads=7)]
    found = json.loads(json.dumps(report.document()))
    assert (found["reads"], found["faulted_reads"], found["faults"]) == (15, 10, {"reset": 2})
    assert found["violations"] == ["process 7 is left"]
    assert found["hours_per_million_faulted_reads"] == 1000
    lines = report.table().splitlines()
    assert any(line.startswith("reads ") and line.endswith(" 15") for line in lines)
    assert any("reset" in line for line in lines)


def test_round_that_keeps_its_cache_is_told_from_one_that_does_not():
    keeps = {kind for kind in KINDS if drawn(random.Random(1), 0, kind, 5).keeps}
    assert keeps == {"network", "final errors", "kills", "outage"}
    assert isinstance(drawn(random.Random(1), 0, "kills", 5), Round)
