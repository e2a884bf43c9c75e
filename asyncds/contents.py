"""What a cache holds, for people who look: how much of each dataset, and what runs that go on have counted."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from asyncds.cache import Cache
from asyncds.errors import ConfigurationError
from asyncds.listing import saved_at
from asyncds.lookup import resident
from asyncds.manifest import Manifest
from asyncds.progress import progress_bar
from asyncds.stats import Counters, percentiles

__all__ = ["completeness", "counted", "forget_listing", "saved_listing"]

_LOOKUP = 500
_SEPARATOR = " at "


def saved_listing(cache: Cache, name: str) -> Manifest | None:
    """The last complete listing of a dataset, if it was kept and is sound."""
    with contextlib.suppress(ConfigurationError):
        return Manifest.open(saved_at(cache.directory / "manifests", name))
    return None


def forget_listing(cache: Cache, name: str) -> None:
    """Delete the last complete listing of a dataset."""
    with contextlib.suppress(OSError):
        saved_at(cache.directory / "manifests", name).unlink(missing_ok=True)


def completeness(cache: Cache, name: str) -> tuple[int, int] | None:
    """How many objects of the last complete listing are cached, whoever brought them, and how many it has."""
    listing = saved_listing(cache, name)
    if listing is None:
        return None
    endpoint, cached = name.rpartition(_SEPARATOR)[2], 0
    with progress_bar(f"looking for {name}", len(listing)) as advance:
        for start in range(0, len(listing), _LOOKUP):
            infos = listing[start : start + _LOOKUP]
            cached += sum(resident(cache, endpoint, infos))
            advance(len(infos))
    return cached, len(listing)


def counted(cache: Cache) -> tuple[int, dict[str, float]]:
    """How many runs keep counters in this cache, and the sums of these.

    A run takes its own away when it ends. What was killed leaves them for a week. Those of another version of asyncds,
    which counts other things, are left out.
    """
    counters = [Counters(path) for path in _counter_files(cache.directory / "stats")]
    runs = [run for run in counters if run.readable]
    totals = [run.total() for run in runs]
    sums = {name: sum(total[name] for total in totals) for name in Counters(Path()).total()}
    return len(runs), sums | percentiles([run.latencies() for run in runs])


def _counter_files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.glob("*")) if not path.suffix and path.is_file() and not path.is_symlink())
