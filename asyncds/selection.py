"""Which objects of a table, and in which order: patterns, a limit, and the part of this process."""

import fnmatch
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NotRequired, TypedDict, get_args

import numpy as np
from numpy.typing import NDArray

from asyncds.errors import ConfigurationError, EmptyDataset
from asyncds.manifest import KeyFilter, Manifest
from asyncds.settings import size

__all__ = ["Choice", "Selection", "local_partition"]

Order = Literal["listing", "smallest", "shuffle"]
_LAUNCHERS = (
    ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # torchrun
    ("SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),  # where srun started it; of all nodes, such as 4(x2),3
    ("SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),  # where the job asked for that
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
)


class Choice(TypedDict):
    """What warming takes by keyword; `Selection` says what each means."""

    match: NotRequired[str | Sequence[str]]
    exclude: NotRequired[str | Sequence[str]]
    limit: NotRequired[int | float | str | None]
    order: NotRequired[Order]
    seed: NotRequired[int]
    partition: NotRequired[str | None]


@dataclass(frozen=True)
class _Bytes:
    """A limit in bytes, which is not one in objects."""

    count: int


@dataclass(frozen=True)
class Selection:
    """Some rows of a table: those that fit, in an order, up to a limit, and of these one part.

    Keys fit that one of the globs `match` fits, or any if there are none, and none of `exclude`; `*` also spans `/`.
    `order` is that of the listing, by size (`smallest`, where unknown sizes come last), or drawn with `seed`
    (`shuffle`). `limit` is a number of objects, a share of them such as `"10%"` or 0.1, or bytes with a unit, such as
    `"5GB"`. `partition="i/n"` takes the part i, from 0, of n processes that share a cache directory, and `"auto"` that
    which torchrun, Slurm or Open MPI has given to this process among those of its node. A key belongs to a part by its
    hash: processes whose listings differ agree about each key that both have.
    """

    match: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    limit: int | Fraction | _Bytes | None = None
    order: Order = "listing"
    seed: int = 0
    part: tuple[int, int] = (0, 1)

    @classmethod
    def of(
        cls,
        *,
        match: str | Sequence[str] = (),
        exclude: str | Sequence[str] = (),
        limit: int | float | str | None = None,
        order: Order = "listing",
        seed: int = 0,
        partition: str | None = None,
    ) -> "Selection":
        """Check what was asked for. Raises `ConfigurationError`, before anything is listed."""
        if order not in get_args(Order):
            raise ConfigurationError(f"order={order!r}: must be {' or '.join(get_args(Order))}")
        if not isinstance(seed, int) or seed < 0:
            raise ConfigurationError(f"seed={seed!r}: must be a whole number, at least 0")
        return cls(_globs(match), _globs(exclude), _limit(limit), order, seed, _part(partition))

    @property
    def keeps(self) -> KeyFilter | None:
        """Whether a key fits; None where all do."""
        if not self.match and not self.exclude:
            return None
        wanted, unwanted = _any_of(self.match or ("*",)), _any_of(self.exclude)
        return lambda key: bool(wanted(key)) and not (self.exclude and unwanted(key))

    @property
    def first(self) -> int | None:
        """How many objects of a listing are enough; None where all of it has to be known."""
        return self.limit if self.order == "listing" and isinstance(self.limit, int) else None

    def rows(self, manifest: Manifest) -> NDArray[np.int64]:
        """The positions of what is selected, in order. Raises `EmptyDataset` if nothing fits."""
        rows = self._limited(self._ordered(self._fitting(manifest), manifest), manifest)
        part, parts = self.part
        return rows if parts == 1 else rows[manifest.shares(parts)[rows] == part]

    def _fitting(self, manifest: Manifest) -> NDArray[np.int64]:
        if not self.match and not self.exclude:
            return np.arange(len(manifest), dtype=np.int64)
        rows = manifest.fitting(self.match, self.exclude)
        if not len(rows):
            raise EmptyDataset(f"{manifest.source}: none of {len(manifest):,} keys fits the patterns; correct match")
        return rows

    def _ordered(self, rows: NDArray[np.int64], manifest: Manifest) -> NDArray[np.int64]:
        if self.order == "shuffle":
            return np.random.default_rng(self.seed).permutation(rows)
        if self.order == "smallest":
            return rows[np.argsort(manifest.sizes[rows].view(np.uint64), kind="stable")]  # of which -1 is the largest
        return rows

    def _limited(self, rows: NDArray[np.int64], manifest: Manifest) -> NDArray[np.int64]:
        if self.limit is None:
            return rows
        if not isinstance(self.limit, _Bytes):
            return rows[: self.limit if isinstance(self.limit, int) else math.ceil(self.limit * len(rows))]
        sizes = manifest.sizes[rows]
        if (sizes < 0).any():
            raise ConfigurationError(f"{manifest.source}: sizes are not known: limit a number of objects, or a share")
        chosen = rows[: np.searchsorted(np.cumsum(sizes), self.limit.count, side="right")]
        if len(rows) and not len(chosen):
            raise EmptyDataset(f"{manifest.source}: the first object alone has {sizes[0]:,} bytes; raise limit")
        return chosen


def local_partition(variables: Mapping[str, str]) -> tuple[int, int]:
    """Which of how many processes of its node this one is, as the launcher's local variables say; else the only one."""
    started = [(rank, ranks) for rank, ranks in _LAUNCHERS if rank in variables]
    for rank, ranks in started:
        if ranks in variables:
            here = _of_this_node(variables[ranks], variables.get("SLURM_NODEID"))
            return _fraction(f"{variables[rank]}/{here}", f"{rank}/{ranks}")
    for rank, ranks in started:
        raise ConfigurationError(f"{rank} is set, and {ranks} is not: write the partition as i/n")
    return 0, 1


def _of_this_node(tasks: str, node: str | None) -> str:
    """How many tasks this node has: of `4(x2),3`, that is 4, 4 and 3, by its number in the step."""
    runs = [re.fullmatch(r"([0-9]+)(?:\(x([0-9]{1,6})\))?", run) for run in tasks.split(",")]
    counts = [run[1] for run in runs if run is not None for _ in range(int(run[2] or 1))]
    if None in runs or len(set(counts)) == 1:
        return tasks if None in runs else counts[0]
    if node is None or not node.isdecimal() or int(node) >= len(counts):
        raise ConfigurationError(
            f"SLURM_STEP_TASKS_PER_NODE={tasks!r} names {len(counts)} nodes, and SLURM_NODEID={node!r} none of them: "
            "write the partition as i/n"
        )
    return counts[int(node)]


def _part(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    return local_partition(os.environ) if text == "auto" else _fraction(text, "partition")


def _fraction(text: str, name: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text.strip()) if isinstance(text, str) else None
    if found is None:
        raise ConfigurationError(f"{name}={text!r}: must be i/n, such as 0/4, or auto")
    part, parts = int(found[1]), int(found[2])
    if part >= parts:
        raise ConfigurationError(f"{name}={text!r}: of {parts} parts, i goes from 0 to {max(0, parts - 1)}")
    return part, parts


def _limit(value: int | float | str | None) -> int | Fraction | _Bytes | None:
    text = str(value).strip()
    try:
        if value is None or (text.isdecimal() and int(text) > 0):
            return value if value is None else int(text)
        amount = size(value)
    except ValueError:
        amount = None
    if isinstance(amount, float) and 0 < amount <= 1:  # which is not exactly what was written
        return Fraction(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not isinstance(amount, int) or amount <= 0 or not isinstance(value, str):
        kinds = "a number of objects, a share of them such as 10%, or bytes with a unit, such as 5GB"
        raise ConfigurationError(f"limit={value!r}: must be {kinds}")
    return _Bytes(amount)


def _globs(patterns: str | Sequence[str]) -> tuple[str, ...]:
    globs = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for glob in globs:
        if not isinstance(glob, str) or not glob:
            raise ConfigurationError(f"{glob!r} is no pattern of keys: write a glob, such as '*.png'")
    return globs


def _any_of(globs: Sequence[str]) -> Callable[[str], object]:
    return re.compile("|".join(map(fnmatch.translate, globs))).match
