"""What is different between two listings: new objects, other versions, and what is gone."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from asyncds.columns import Columns, hashes, same

if TYPE_CHECKING:
    from asyncds.manifest import Manifest

__all__ = ["Changes", "places"]

_Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Changes:
    """What a table has that an older one had not: three tables, each in the order of the one its rows come from.

    `added` and `changed` (another ETag or size) are rows of the newer table, `removed` of the older one. Their lengths
    are the counts, and iterating over one gives its objects. False where nothing is different.
    """

    added: "Manifest"
    changed: "Manifest"
    removed: "Manifest"

    def __bool__(self) -> bool:
        return bool(len(self.added) or len(self.changed) or len(self.removed))

    def __str__(self) -> str:
        return f"{len(self.added):,} added, {len(self.changed):,} changed, {len(self.removed):,} removed"


def places(new: Columns, buckets: list[str], old: Columns, old_buckets: list[str]) -> tuple[_Rows, _Rows, _Rows]:
    """For each row of `new` the first of the same bucket and key, there and in `old`, -1 where `old` has none; and for
    each row of `old` the first of the same there."""
    seed = 0
    while (found := _places(new, buckets, old, old_buckets, seed)) is None:
        seed += 1  # two keys had one hash
    return found


def _places(
    new: Columns, buckets: list[str], old: Columns, old_buckets: list[str], seed: int
) -> tuple[_Rows, _Rows, _Rows] | None:
    ours, first, own = _firsts(hashes(new, buckets, seed))
    theirs, their_first, their_own = _firsts(hashes(old, old_buckets, seed))
    for table, firsts in ((new, own), (old, their_own)):
        again = np.flatnonzero(firsts != np.arange(len(firsts)))
        if not same(table, again, table, firsts[again]):
            return None
    place = np.searchsorted(theirs, ours)
    common = np.flatnonzero(np.append(theirs, theirs[-1:])[place] == ours) if len(theirs) else place[:0]
    there = np.full(len(own), -1)
    there[first[common]] = their_first[place[common]]
    there = there[own]
    shared = np.flatnonzero(there >= 0)  # in the order of the tables: neighbours are read together
    return (own, there, their_own) if same(new, shared, old, there[shared]) else None


def _firsts(found: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], _Rows, _Rows]:
    """Hashes in their order, each once, and its first row; and for each row the first one with its hash."""
    order = np.argsort(found)
    ordered = found[order]
    begins = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(found)])
    if len(begins) == len(found):
        return ordered, order, np.arange(len(found))
    first, own = np.minimum.reduceat(order, begins), np.empty(len(found), np.int64)
    own[order] = np.repeat(first, np.diff(np.append(begins, len(found))))
    return ordered[begins], first, own
