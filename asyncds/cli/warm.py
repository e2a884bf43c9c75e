"""`asyncds warm`."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from asyncds.cli.opening import Folder, as_json, print_json, store_options
from asyncds.errors import AccessDenied, AsyncdsError, ConfigurationError
from asyncds.progress import one_line

if TYPE_CHECKING:
    from asyncds.manifest import Manifest
    from asyncds.recipe import StoreRecipe
    from asyncds.selection import Selection
    from asyncds.source import Source
    from asyncds.warm import Plan, WarmReport

__all__ = ["warm"]

_FAILURES_SHOWN = 5
_SELECTING = ("match", "exclude", "limit", "order", "seed", "partition")


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a warm-up as Ctrl-C does."""


@click.command()
@click.argument("uris", metavar="[URI]...", nargs=-1)
@click.option("--match", metavar="GLOB", multiple=True, help="Only keys that fit, such as '*.png'; * also spans /.")
@click.option("--exclude", metavar="GLOB", multiple=True, help="Not those keys. Both may be given several times.")
@click.option("--limit", help="Only so much of it: 10000 objects, a share such as 10% of them, or bytes such as 5GB.")
@click.option("--order", type=click.Choice(["listing", "smallest", "shuffle"]), default="listing", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the order shuffle.")
@click.option("--partition", metavar="I/N", help="Part I, from 0, of N processes; auto: as torchrun, Slurm, MPI say.")
@click.option("--from-manifest", metavar="FILE", type=click.Path(path_type=Path), help="A saved table: lists nothing.")
@click.option("--dry-run", is_flag=True, help="Say what it would take. Lists, and gets nothing.")
@store_options
@click.option("--concurrency", help="Requests in flight; else ASYNCDS_CONCURRENCY.")
@click.option("--cache-dir", type=Folder(path_type=Path), help="Where to keep it; else ASYNCDS_CACHE_DIR.")
@click.option("--cache-size", help="Limit such as 50GB or 30%; else ASYNCDS_CACHE_SIZE.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
@as_json
def warm(
    uris: tuple[str, ...], from_manifest: Path | None, dry_run: bool, quiet: bool, as_json: bool, **options: Any
) -> None:
    """Download what prefixes hold into the local cache, before training needs it.

    What is cached already is left alone, so an interrupted warm-up goes on where it was. Exits with 0 when everything
    is cached, 1 when something could not be had or kept, 2 for a wrong call, 130 or 143 when interrupted by Ctrl-C or
    SIGTERM.
    """
    from asyncds.recipe import StoreRecipe
    from asyncds.selection import Selection

    selection = Selection.of(**{name: options.pop(name) for name in _SELECTING})
    recipe = StoreRecipe.of(**{name: value for name, value in options.items() if value is not None})
    work = _planned if dry_run else _warmed
    outcomes, code = list[dict[str, Any]](), 0
    for uri, manifest in _tables(uris, from_manifest):
        try:
            with closing(_source(recipe, selection, uri, manifest, progress=not quiet)) as source, _interruptible():
                outcome, failed = work(source, selection, uri, quiet or as_json)
        except AsyncdsError as error:
            click.echo(f"error: {one_line(str(error))}", err=True)
            outcome, failed = {"error": str(error)}, error.exit_code
        outcomes.append({"uri": uri} | outcome)
        code = max(code, failed)
    if as_json:
        print_json({"dry_run": dry_run, "datasets": outcomes})
    if code:
        raise SystemExit(code)


def _tables(uris: Sequence[str], file: Path | None) -> "list[tuple[str, Manifest | None]]":
    """What to warm, all of it checked before anything is asked for."""
    from asyncds.manifest import Manifest, parse_uri

    if uris and file is not None:
        raise ConfigurationError("say what to warm by URIs or by --from-manifest FILE, not by both")
    if not uris and file is None:
        raise ConfigurationError("say what to warm: s3://bucket/prefix, several of these, or --from-manifest FILE")
    if file is not None:
        manifest = Manifest.open(file)
        return [(manifest.source, manifest)]
    return [("s3://{}/{}".format(*parse_uri(uri)), None) for uri in dict.fromkeys(uris)]


def _source(
    recipe: "StoreRecipe", selection: "Selection", uri: str, manifest: "Manifest | None", progress: bool
) -> "Source":
    from asyncds.source import Source

    if manifest is not None:
        source = Source(recipe, uri, manifest=manifest)
    elif selection.first is None:
        source = Source(recipe, uri)
    else:  # listing ends early
        source = Source(recipe, uri, match=selection.keeps, limit=selection.first)
    source.progress = progress and selection.part[0] == 0  # processes that share the work share a terminal, too
    return source


@contextmanager
def _interruptible() -> Iterator[None]:
    def terminate(*_: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt as error:
        click.echo("interrupted: what arrived is kept; the same command goes on from there", err=True)
        number = signal.SIGTERM if isinstance(error, _Terminated) else signal.SIGINT
        raise SystemExit(128 + number) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _listed(source: "Source", work: "Callable[[Selection], Plan | WarmReport]", selection: "Selection") -> Any:
    try:
        _ = source.manifest
    except AccessDenied as error:
        if "and the bucket's policy" not in str(error):
            raise
        raise AccessDenied(
            f"{error}; a bucket that forbids listing, but not GET, is warmed by --from-manifest"
        ) from None
    return work(selection)


def _planned(source: "Source", selection: "Selection", uri: str, quiet: bool) -> tuple[dict[str, Any], int]:
    plan: Plan = _listed(source, source.plan, selection)
    if not quiet:
        click.echo(f"{one_line(uri)}: {plan}")
    return plan._asdict(), 0


def _warmed(source: "Source", selection: "Selection", uri: str, quiet: bool) -> tuple[dict[str, Any], int]:
    import warnings

    warnings.filterwarnings("ignore", "the cache in .* is full")  # the report says how much did not fit
    report: WarmReport = _listed(source, partial(source.warm, progress=source.progress), selection)
    if not quiet:
        click.echo(f"{one_line(uri)}: {report}")
    for failure in report.failures[:_FAILURES_SHOWN]:
        click.echo(f"error: {one_line(failure)}", err=True)
    if len(report.failures) > _FAILURES_SHOWN:
        click.echo(f"error: … and {len(report.failures) - _FAILURES_SHOWN:,} more", err=True)
    if report.uncached:
        remedy = "raise ASYNCDS_CACHE_SIZE, free the disk, or choose a folder that can be written"
        click.echo(f"error: {report.uncached:,} objects could not be kept: {remedy}", err=True)
    return report._asdict(), int(bool(report.failures or report.uncached))
