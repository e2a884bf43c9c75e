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
    ours, first, inverse = np.unique(hashes(new, buckets, seed), return_index=True, return_inverse=True)
    theirs, their_first, their_inverse = np.unique(
        hashes(old, old_buckets, seed), return_index=True, return_inverse=True
    )
    for table, one, other in ((new, first, inverse), (old, their_first, their_inverse)):
        again = np.flatnonzero(one[other] != np.arange(len(other)))
        if not same(table, again, table, one[other][again]):
            return None
    there = np.full(len(ours), -1)
    _, here, place = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)
    there[here] = their_first[place]
    if not same(new, first[here], old, there[here]):
        return None
    return first[inverse], there[inverse], their_first[their_inverse]
