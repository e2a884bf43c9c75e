"""`asyncds ls`, `stats` and `clear`: what the cache holds."""

import re
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from asyncds.cli.opening import as_json, cache_dir, opened, print_json, print_table, store_options
from asyncds.errors import CacheError, ConfigurationError
from asyncds.progress import one_line

if TYPE_CHECKING:
    from asyncds.cache import Cache
    from asyncds.clearing import Held

__all__ = ["clear", "ls", "stats"]

_SHOWN = 20
_STAYS = {
    True: "error: {} is in use: it stays; end its processes, or give --force",
    False: "note: {} is in use: it stays",
}
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


# ls


@click.command()
@click.argument("uri", required=False)
@click.option("--changes", is_flag=True, help="List URI anew, and compare with its saved listing, which stays.")
@store_options
@cache_dir
@as_json
def ls(uri: str | None, changes: bool, cache_dir: Path | None, as_json: bool, **store: Any) -> None:
    """Show which datasets are cached, and how completely.

    With a URI, this one. Complete is what the last listing of the whole prefix names: without one nothing is known
    of that. With --changes, what has become of a prefix since then.
    """
    if changes:
        _changes(_required(uri), cache_dir, as_json, store)
        return
    with opened(cache_dir) as cache:
        held = _named(cache, uri) if uri else cache.datasets()
        rows = [_described(cache, each) for each in held]
        rows = [row for row in rows if row["objects"] or row["listed"] or row["in_use"]]
    if as_json:
        print_json({"cache": str(cache.directory), "datasets": rows})
    elif rows:
        _print(rows)
    else:
        click.echo(f"{cache.directory}: no dataset is cached")


def _described(cache: "Cache", held: "Held") -> dict[str, Any]:
    from asyncds.contents import completeness

    cached, listed = completeness(cache, held.name) or (held.objects, None)
    share = None if listed is None else 100 * cached / max(1, listed)
    counts = {"objects": cached, "listed": listed, "percent": share, "bytes": held.bytes}
    return {"dataset": held.name} | counts | {"used": held.used, "in_use": held.in_use}


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.filesize import decimal

    cells = []
    for row in rows:
        listed = "?" if row["listed"] is None else f"{row['listed']:,}"
        share = "?" if row["percent"] is None else f"{int(row['percent'])} %"  # 100 is all, not almost all
        used = "now" if row["in_use"] else _ago(row["used"])
        cells.append([one_line(row["dataset"]), f"{row['objects']:,}", listed, share, decimal(row["bytes"]), used])
    print_table(["dataset", "objects", "of", "cached", "on disk", "used"], cells, right=True)


def _ago(moment: float | None) -> str:
    seconds = None if moment is None else time.time() - moment
    if seconds is None:
        return "?"
    unit = next((unit for unit in ("d", "h", "m") if seconds >= _UNITS[unit]), "s")
    return f"{max(0, seconds) // _UNITS[unit]:.0f} {unit} ago"


def _changes(uri: str, place: Path | None, as_json: bool, store: dict[str, Any]) -> None:
    from asyncds.contents import saved_listing
    from asyncds.manifest import parse_uri
    from asyncds.recipe import StoreRecipe
    from asyncds.source import Source

    name = "s3://{}/{}".format(*parse_uri(uri))
    with opened(place) as cache:
        recipe = StoreRecipe.of(**store, cache_dir=cache.directory.parent)
        saved = saved_listing(cache, f"{name} at {recipe.identity}")
    if saved is None:
        raise CacheError(f"{name} at {recipe.identity}: no listing of it is saved; `asyncds warm` saves one")
    with closing(Source(recipe, name)) as source:
        found = source.list_anew().changes(saved)
    tables = {"added": found.added, "changed": found.changed, "removed": found.removed}
    if as_json:
        print_json({"dataset": source.tag} | {kind: [info.key for info in rows] for kind, rows in tables.items()})
        return
    for kind, rows in tables.items():
        for info in rows[:_SHOWN]:
            click.echo(f"{kind} {info.key!r}")
        if len(rows) > _SHOWN:
            click.echo(f"{kind} … and {len(rows) - _SHOWN:,} more")
    click.echo(f"{one_line(source.tag)}: {found}")


def _required(uri: str | None) -> str:
    if uri is None:
        raise ConfigurationError("--changes needs the URI of the prefix to list: s3://bucket/prefix")
    return uri


# stats


@click.command()
@cache_dir
@as_json
def stats(cache_dir: Path | None, as_json: bool) -> None:
    """Show how large the cache is, and how often runs hit it.

    Hits, GETs with their lanes, and latencies are those of runs that go on, or were killed within the last week: a run
    keeps its counters for its own processes, and takes them away when it ends.
    """
    from asyncds.contents import counted

    with opened(cache_dir) as cache:
        datasets = [held for held in cache.datasets() if held.objects or held.in_use]
        runs, sums = counted(cache)
        size = {"entries": len(cache), "bytes": cache.volume(), "limit": cache.capacity, "room": max(0, cache.room())}
    document = {"cache": str(cache.directory), "datasets": len(datasets)} | size | {"runs": runs, "counters": sums}
    if as_json:
        print_json(document)
        return
    _print_size(document)
    if runs:
        _print_counters(runs, sums)


def _print_size(document: dict[str, Any]) -> None:
    from rich.filesize import decimal

    limit = "95 % of the disk" if document["limit"] is None else decimal(document["limit"])
    click.echo(f"cache     {document['cache']}")
    click.echo(f"size      {decimal(document['bytes'])} of {limit}, room for {decimal(document['room'])}")
    click.echo(f"contents  {document['entries']:,} entries of {document['datasets']:,} datasets")


def _print_counters(runs: int, sums: dict[str, float]) -> None:
    found, samples = sums["hits"], sums["hits"] + sums["misses"]
    full = sum(count for name, count in sums.items() if name.startswith("gets_full_"))
    latencies = " / ".join(f"{1e3 * sums[f'latency_p{percent}_s']:.1f}" for percent in (50, 90, 99))
    share = f" ({100 * found / samples:.1f} %)" if samples else ""
    click.echo(f"runs      {runs:,}, going on, or killed within a week")
    click.echo(f"hits      {found:,} of {samples:,} samples{share}, {sums['prefetch_hits']:,} brought in advance")
    click.echo(
        f"GETs      {sums['gets']:,} objects, {sums['bytes'] / 1e6:,.1f} MB; {sums['gets_lean']:,} lean, {full:,} full"
    )
    trouble = {"retries": "retries", "hedges": "hedges", "failures": "failures", "uncached": "not cached"}
    click.echo(f"trouble   {', '.join(f'{sums[name]:,} {text}' for name, text in trouble.items())}")
    click.echo(f"latency   {latencies} ms (median, 90th, 99th percentile)")


# clear


@click.command()
@click.argument("uris", metavar="[URI]...", nargs=-1)
@click.option("--older-than", metavar="AGE", help="What was not used for so long, such as 12h or 7d.")
@click.option("--all", "everything", is_flag=True, help="Every dataset.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--force", is_flag=True, help="Also what a running process uses: it will fetch it again.")
@cache_dir
@as_json
def clear(
    uris: tuple[str, ...],
    older_than: str | None,
    everything: bool,
    yes: bool,
    force: bool,
    cache_dir: Path | None,
    as_json: bool,
) -> None:
    """Remove datasets from the cache, by URI, by age, or all.

    A name, as `ls` shows it, will do in the place of a URI. What a running process uses stays, also where it begins to
    meanwhile: that makes the exit code 1, but for --older-than. What asyncds did not put there is never touched.
    """
    if (bool(uris), older_than is not None, everything).count(True) != 1:
        raise ConfigurationError("say what to clear: URIs, --older-than AGE, or --all")
    age = None if older_than is None else _seconds(older_than)
    with opened(cache_dir) as cache:
        chosen, kept = _chosen(cache, uris, age, force)
        if chosen and not yes:
            _confirm(chosen)
        cleared, in_use = _cleared(cache, chosen, force)
    kept += in_use
    if as_json:
        print_json({"cache": str(cache.directory), "cleared": cleared, "kept": kept})
    else:
        _summarise(cache, cleared, kept)
    for name in kept:
        click.echo(_STAYS[age is None].format(one_line(name)), err=True)
    if kept and age is None:
        raise SystemExit(1)


def _summarise(cache: "Cache", cleared: list[dict[str, Any]], kept: list[str]) -> None:
    from rich.filesize import decimal

    freed, count = decimal(sum(row["bytes"] for row in cleared)), len(cleared) + len(kept)
    click.echo(f"{cache.directory}: {len(cleared):,} of {count:,} datasets removed, {freed} freed")


def _chosen(cache: "Cache", uris: tuple[str, ...], age: float | None, force: bool) -> "tuple[list[Held], list[str]]":
    """What is to go; and what stays though it is old enough: a run that takes long has opened it long ago."""
    if age is None:
        named = {held.name: held for uri in uris for held in _named(cache, uri)}
        return [*named.values()] if uris else cache.datasets(), []
    old = [held for held in cache.datasets() if held.used is not None and held.used < time.time() - age]
    spared = [held for held in old if held.in_use and not force]
    return [held for held in old if held not in spared], [held.name for held in spared]


def _confirm(chosen: "list[Held]") -> None:
    from rich.filesize import decimal

    if not sys.stdin.isatty():
        raise ConfigurationError("nobody can be asked here: give --yes to clear")
    full = [held for held in chosen if held.objects]  # an endpoint that is mistyped leaves one without any
    for held in full[:_SHOWN]:
        click.echo(f"{one_line(held.name)}: {held.objects:,} objects, {decimal(held.bytes)}")
    for count, kind in ((len(full) - _SHOWN, "more"), (len(chosen) - len(full), "without objects")):
        if count > 0:
            click.echo(f"… and {count:,} {kind}")
    if not click.confirm("Remove?"):
        raise SystemExit(1)


def _cleared(cache: "Cache", chosen: "list[Held]", force: bool) -> tuple[list[dict[str, Any]], list[str]]:
    from asyncds.contents import forget_listing

    cleared, kept = [], []
    for held in chosen:
        done = cache.clear(held.name, force=force, spare=partial(_is_shared, cache, held.name))
        if done.whole:
            forget_listing(cache, held.name)
            cleared.append({"dataset": held.name, "objects": held.objects, "bytes": done.bytes})
        else:
            kept.append(held.name)
    return cleared, kept


def _is_shared(cache: "Cache", name: str) -> bool:
    """Whether a dataset that is in use may have objects in common with this one: one prefix lies below the other, or it
    is of several prefixes, or of none."""
    uri, _, endpoint = name.rpartition(" at ")

    def overlaps(other: str) -> bool:
        theirs, _, place = other.rpartition(" at ")
        return endpoint == place and (not _is_prefix(theirs) or uri.startswith(theirs) or theirs.startswith(uri))

    return bool(cache.in_use(overlaps))


def _is_prefix(name: str) -> bool:
    return name.startswith("s3://") and " + " not in name


def _named(cache: "Cache", name: str) -> "list[Held]":
    """The datasets of a URI, at whatever endpoint, or the one of this name."""
    from asyncds.manifest import parse_uri

    uri = "s3://{}/{}".format(*parse_uri(name)) if name.startswith("s3://") and " at " not in name else name
    there = [(held, held.name.rpartition(" at ")[0]) for held in cache.datasets()]
    found = [held for held, theirs in there if held.name == name or theirs == uri]
    if not found:
        near = next((theirs for _, theirs in there if theirs.rstrip("/") == uri.rstrip("/")), None)
        raise CacheError(f"{name}: nothing of it is cached; {near or '`asyncds ls` shows what'} is")
    return found


def _seconds(age: str) -> float:
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]+)?)([smhdw])", age.strip())
    if found is None:
        raise ConfigurationError(f"older_than={age!r}: must be an age with a unit, such as 30m, 12h, 7d or 2w")
    return float(found[1]) * _UNITS[found[2]]
