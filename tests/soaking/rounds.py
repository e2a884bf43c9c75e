"""What happens in a soak, round by round: a plan that follows from its seed."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

ROUND_S, LONG_ROUND_S = 6.0, 20.0
WORKER_KILLED = "torch: a worker was killed"
# Those of the server's menu of final faults; a redirect is a plain StoreError.
FINAL_ERRORS = {"AccessDenied", "ObjectNotFound", "ObjectChanged", "StoreError"}
_FAULTY = {"cheap": 0.6, "slow": 0.0004, "late": 0.02}  # a stall holds a batch, and those after it, for five seconds


@dataclass(frozen=True, kw_only=True)
class Round:
    """Some seconds with the same kinds of trouble; in each, two processes train on the same cache.

    `shares` is the share of requests that meet a fault of each part of the server's menu. `mangles` are the ways in
    which the cache's folder is damaged meanwhile. `options` are those of the dataset, `loading` those of its loader.
    """

    number: int
    kind: str
    seed: int
    seconds: float
    shares: Mapping[str, float]
    options: Mapping[str, Any]
    loading: Mapping[str, Any]
    mangles: tuple[str, ...] = ()
    kills: bool = False
    outage: bool = False
    file_size: int | None = None

    @property
    def keeps(self) -> bool:
        """Whether what the cache has taken stays there: then nothing is asked for twice without a reason."""
        limited = self.options.get("cache_read_only") or "cache_size" in self.options
        return not (self.mangles or self.file_size is not None or limited)

    @property
    def may_raise(self) -> set[str]:
        """What may come instead of samples: what the store says is final, the end of a worker, and where the folder is
        deleted, a cache that cannot be opened just then, or no table for spawned workers that start just then."""
        final = FINAL_ERRORS if self.shares.get("final") else set()
        killed = {WORKER_KILLED} if self.kills else set()
        return final | killed | ({"CacheError", "ConfigurationError"} if {*FOLDER} & {*self.mangles} else set())

    @property
    def must_read(self) -> bool:
        """Whether so much time is enough for samples, whatever befalls their readers."""
        return self.seconds >= ROUND_S / 2 and not self.kills


VALUES = ("cut a file", "empty a file", "flip a bit of a file", "delete a file", "flip a bit of a row")
INDEX = ("flip bits of the index", "cut the index", "garbage for an index", "delete the index")
FOLDER = ("delete the folder",)
_FINAL = _FAULTY | {"final": 0.002}

# What each kind of round has beside the usual, which is faults of the network that a retry mends.
KINDS: dict[str, dict[str, Any]] = {
    "network": {},
    "everything": {"kills": True, "outage": True, "mangles": VALUES + INDEX + FOLDER, "shares": _FINAL},
    "final errors": {"shares": _FINAL},
    "kills": {"kills": True},
    "values": {"mangles": VALUES},
    "outage": {"outage": True},
    "index": {"mangles": INDEX},
    "no cache": {"options": {"cache_size": "1B"}},
    "folder": {"mangles": FOLDER},
    "full disk": {"file_size": 100_000},
    "small cache": {"options": {"cache_size": "1MB"}},
    "read-only": {"options": {"cache_read_only": True}},
}


def plan(seed: int, seconds: float) -> Iterator[Round]:
    """Yield rounds of all kinds in turn, from one of them on, for so many seconds together: longer ones once there
    is time for each kind twice."""
    chance, names = random.Random(seed), list(KINDS)
    count = max(2, round(seconds / min(LONG_ROUND_S, max(ROUND_S, seconds / 2 / len(names)))))
    first = 0 if count < len(names) / 2 else chance.randrange(len(names))
    for number in range(count):
        kind = names[(first + number) % len(names)]
        yield drawn(chance, number, kind, seconds / count)


def drawn(chance: random.Random, number: int, kind: str, seconds: float) -> Round:
    """Draw what the kind leaves open."""
    own = dict(KINDS[kind])
    md5 = chance.random() < 0.5
    shares = dict(own.pop("shares", _FAULTY)) | ({"flipped": 0.05} if md5 else {})
    if seconds < ROUND_S / 2:
        del shares["slow"]  # a stall takes as long as a timeout
    options = {
        "lane": chance.choices(["auto", "full"], [9, 1])[0],
        "verify_md5": md5,
        "concurrency": chance.choices([16, 64, 256, "auto"], [1, 4, 4, 1])[0],
        "decode_threads": chance.choice([0, 0, 2]),
        "on_error": chance.choice(["raise", "raise", "replace", "skip"]) if "final" in shares else "raise",
    }
    workers = chance.choice([1, 2]) if own.get("kills") else chance.choice([0, 0, 1, 2])
    loading = {
        "batch_size": chance.choices([8, 32, 100, 250], [1, 2, 4, 3])[0],
        "num_workers": workers,
        "reads_ahead": chance.random() < 0.8,
    }
    if workers:
        # A spawned worker takes seconds to import torch, so that only long rounds are worth its while. One whose
        # training process is killed meanwhile is never ended by torch, which then takes its new parent for the first.
        spawns = seconds >= ROUND_S / 2 and not own.get("kills") and chance.random() < 0.15
        loading |= {
            "multiprocessing_context": "spawn" if spawns else "fork",
            "persistent_workers": chance.random() < 0.5,
        }
    return Round(
        number=number,
        kind=kind,
        seed=chance.getrandbits(32),
        seconds=seconds,
        shares=shares,
        options=options | own.pop("options", {}),
        loading=loading,
        **own,
    )
