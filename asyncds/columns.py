"""The arithmetic of tables: rows taken, tables joined, keys compared, all on whole columns and never row by row.

Texts of many lengths lie in one array, one after the other, and `ends` says where: text i is
`data[ends[i]:ends[i + 1]]`.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

__all__ = ["Columns", "hashes", "in_chunks", "joined", "made_of", "same", "taken"]

Columns = dict[str, NDArray[Any]]
_CHUNK = 1 << 16
_RUN = 16  # rows that follow each other, from which on it pays to copy them at once
_VERSION_BYTES = 16
_ODD = np.uint64(0x9E3779B97F4A7C15)


def in_chunks(count: int) -> Iterator[slice]:
    """Slices that cover so many rows, small enough that what is made of each takes little memory."""
    for start in range(0, count, _CHUNK):
        yield slice(start, min(start + _CHUNK, count))


def pick(
    data: NDArray[np.uint8], ends: NDArray[Any], rows: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
    """The texts of these rows, in their order, and their ends."""
    picked = np.concatenate([[0], np.cumsum(ends[rows + 1] - ends[rows])]).astype("<u8")
    out = np.empty(int(picked[-1]), np.uint8)
    for chunk in in_chunks(len(rows)):
        some, begin, stop = rows[chunk], int(picked[chunk.start]), int(picked[chunk.stop])
        gaps = np.flatnonzero(np.diff(some) != 1) + 1
        if len(gaps) > len(some) // _RUN:
            out[begin:stop] = _gathered(data, ends[some].astype(np.int64), ends[some + 1].astype(np.int64))
            continue
        for first, after in pairwise([0, *gaps.tolist(), len(some)]):
            text = data[int(ends[some[first]]) : int(ends[some[after - 1] + 1])]
            out[begin : begin + len(text)] = text
            begin += len(text)
    return out, picked


def _gathered(data: NDArray[np.uint8], starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Texts from anywhere, one after the other: all as long as the longest, and cut then, unless that is much more."""
    lengths = stops - starts
    longest, size = int(lengths.max()), int(lengths.sum())
    if size and longest * len(lengths) <= 2 * size and int(starts.max()) + longest <= len(data):
        texts = np.ndarray((len(data) - longest + 1,), f"V{longest}", data.data, strides=(1,))[starts]
        table = texts.view(np.uint8).reshape(-1, longest)
        return table.reshape(-1) if longest * len(lengths) == size else table[np.arange(longest) < lengths[:, None]]
    before = np.cumsum(lengths) - lengths
    return data[np.repeat(starts - before, lengths) + np.arange(size)]


def taken(columns: Columns, rows: NDArray[np.int64]) -> Columns:
    """The columns of these rows, in their order."""
    keys, ends = pick(columns["keys"], columns["ends"], rows)
    versions = columns["versions"].reshape(-1, _VERSION_BYTES)[rows].reshape(-1)
    out: Columns = {"keys": keys, "ends": ends, "sizes": columns["sizes"][rows], "versions": versions}
    out |= _taken_others(columns, rows)
    return out | {name: columns[name][rows] for name in ("bucket_ids", "labels") if name in columns}


def _taken_others(columns: Columns, rows: NDArray[np.int64]) -> Columns:
    """The ETags that are no MD5, of those of these rows that have one."""
    other_rows = columns["other_rows"]
    if not len(other_rows):
        return {name: columns[name] for name in ("other_rows", "others", "other_ends")}
    places = np.minimum(np.searchsorted(other_rows, rows), len(other_rows) - 1)
    found = np.flatnonzero(other_rows[places] == rows.astype("<u8"))
    others, other_ends = pick(columns["others"], columns["other_ends"], places[found].astype(np.int64))
    return {"other_rows": found.astype("<u8"), "others": others, "other_ends": other_ends}


def joined(tables: Sequence[Columns]) -> Columns:
    """The rows of all tables, one after the other; of labels and buckets, only those that all of them have."""
    counts = np.cumsum([0, *(len(table["sizes"]) for table in tables)])
    out = {name: np.concatenate([table[name] for table in tables]) for name in ("keys", "sizes", "versions", "others")}
    for name, data in (("ends", "keys"), ("other_ends", "others")):
        shifts = np.cumsum([0, *(len(table[data]) for table in tables)]).astype("<u8")
        ends = [table[name][1:] + shift for table, shift in zip(tables, shifts, strict=False)]
        out[name] = np.concatenate([np.zeros(1, "<u8"), *ends])
    rows = [table["other_rows"] + np.uint64(count) for table, count in zip(tables, counts, strict=False)]
    out["other_rows"] = np.concatenate(rows)
    shared = [name for name in ("bucket_ids", "labels") if all(name in table for table in tables)]
    return out | {name: np.concatenate([table[name] for table in tables]) for name in shared}


# keys


def made_of(columns: Columns, rows: slice, pieces: Sequence[bytes]) -> NDArray[np.bool_]:
    """Which of these rows have a key that is these pieces, in this order, with anything in between."""
    ends = columns["ends"][rows.start : rows.stop + 1].astype(np.int64)
    data, ends = columns["keys"][ends[0] : ends[-1]], ends - ends[0]
    start, *between, end = pieces if len(pieces) > 1 else (*pieces, b"")
    lengths, least = np.diff(ends), len(start) + len(end)
    fits: NDArray[np.bool_] = lengths >= least if len(pieces) > 1 else lengths == least
    for text, places in ((start, ends[:-1]), (end, ends[1:] - len(end))):
        for offset, byte in enumerate(text):
            left = np.flatnonzero(fits)
            fits[left] = data[places[left] + offset] == byte
    after, until = ends[:-1] + len(start), ends[1:] - len(end)
    for text in filter(None, between):  # each as early as it can be: then there is most room for those that follow
        found = np.append(_occurrences(data, text), len(data))
        after = found[np.minimum(np.searchsorted(found, after), len(found) - 1)] + len(text)
        fits &= after <= until
    return fits


def _occurrences(data: NDArray[np.uint8], text: bytes) -> NDArray[np.int64]:
    """Where this text begins."""
    found = np.flatnonzero(data[: max(0, len(data) - len(text) + 1)] == text[0])
    for offset, byte in enumerate(text[1:], 1):
        found = found[data[found + offset] == byte]
    return found


def same(one: Columns, rows: NDArray[np.int64], other: Columns, their_rows: NDArray[np.int64]) -> bool:
    """Whether the keys of these rows are those of the other table's rows, one by one."""
    for chunk in in_chunks(len(rows)):
        ours = pick(one["keys"], one["ends"], rows[chunk])
        theirs = pick(other["keys"], other["ends"], their_rows[chunk])
        if not (np.array_equal(ours[1], theirs[1]) and np.array_equal(ours[0], theirs[0])):
            return False
    return True


def hashes(columns: Columns, buckets: Sequence[str], seed: int) -> NDArray[np.uint64]:
    """64 bits of each bucket and key together, equal where those are equal, whatever table they are in."""
    starts = np.array([xxhash.xxh3_64_intdigest(name.encode(), seed) for name in buckets] or [seed], np.uint64)
    out = np.empty(len(columns["sizes"]), np.uint64)
    for chunk in in_chunks(len(out)):
        ends = columns["ends"][chunk.start : chunk.stop + 1].astype(np.int64)
        ids = columns["bucket_ids"][chunk] if "bucket_ids" in columns else np.zeros(len(ends) - 1, np.uint16)
        out[chunk] = _hashed(columns["keys"][ends[0] : ends[-1]], ends - ends[0], starts[ids])
    return out


def _hashed(data: NDArray[np.uint8], ends: NDArray[np.int64], state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix texts into a state each, eight bytes of all of them at a time."""
    padded = np.concatenate([data, np.zeros(8, np.uint8)])
    words = np.ndarray((len(data) + 1,), "<u8", padded.data, strides=(1,))
    lengths, offset = np.diff(ends), 0
    state = _mixed(state ^ lengths.astype(np.uint64))
    left = np.flatnonzero(lengths)
    while len(left):
        word, missing = words[ends[left] + offset], np.maximum(0, offset + 8 - lengths[left]).astype(np.uint64) * 8
        state[left] = _mixed(state[left] ^ ((word << missing) >> missing))
        offset += 8
        left = left[lengths[left] > offset]
    return state


def _mixed(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = state * _ODD
    state = (state ^ (state >> np.uint64(29))) * _ODD
    return state ^ (state >> np.uint64(32))
