"""The command line: `asyncds warm`, `asyncds verify` and `asyncds demo`. Torch is imported by the demo only."""

import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import click

from asyncds import __version__
from asyncds.errors import AsyncdsError

__all__ = ["main"]

_MILLISECONDS = 1e-3
_FAILURES_SHOWN = 5
_INTERRUPTED = 128 + signal.SIGINT


class _Seconds(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """`10ms`, `0.5s` or a number of seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        text = str(value).strip()
        factor = _MILLISECONDS if text.endswith("ms") else 1.0
        try:
            seconds = float(text.removesuffix("s").removesuffix("m") if text.endswith("ms") else text.removesuffix("s"))
        except ValueError:
            seconds = -1.0
        if not 0 <= seconds * factor <= 60:
            self.fail(f"{value!r} is no duration up to 60 s: write 10ms or 0.5s", param, ctx)
        return seconds * factor


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="asyncds")
def _commands() -> None:
    """Async, cached datasets for PyTorch, from S3 and MinIO."""


@_commands.command()
@click.argument("uri")
@click.option("--match", metavar="GLOB", help="Only keys that fit, such as '*.png'; * also spans /.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many objects.")
@click.option("--endpoint", metavar="URL", help="Endpoint of the store; else AWS_ENDPOINT_URL or MINIO_URL.")
@click.option("--region", help="Region of the bucket; else AWS_REGION.")
@click.option("--profile", help="Profile of the AWS configuration; else AWS_PROFILE.")
@click.option("--concurrency", help="Requests in flight; else ASYNCDS_CONCURRENCY.")
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Where to keep it; else ASYNCDS_CACHE_DIR.")
@click.option("--cache-size", help="Limit such as 50GB or 30%; else ASYNCDS_CACHE_SIZE.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
def warm(uri: str, match: str | None, limit: int | None, quiet: bool, **options: Any) -> None:
    """Download what a prefix holds into the local cache, before training needs it.

    What is cached already is left alone, so an interrupted warm-up goes on where it was. Exits with 0 when everything
    is cached, 1 when something could not be had or kept, 2 for a wrong call, 130 when interrupted.
    """
    from asyncds.recipe import StoreRecipe
    from asyncds.source import Source

    recipe = StoreRecipe.of(**{name: value for name, value in options.items() if value is not None})
    source = Source(recipe, uri, match=match, limit=limit)
    warnings.filterwarnings("ignore", "the cache in .* is full")  # the report says how much did not fit
    try:
        report = source.warm(progress=not quiet)
    except KeyboardInterrupt:
        click.echo("interrupted: what arrived is kept; the same command goes on from there", err=True)
        raise SystemExit(_INTERRUPTED) from None
    finally:
        source.close()
    if not quiet:
        click.echo(f"{uri}: {report}")
    for failure in report.failures[:_FAILURES_SHOWN]:
        click.echo(f"error: {failure}", err=True)
    if len(report.failures) > _FAILURES_SHOWN:
        click.echo(f"error: … and {len(report.failures) - _FAILURES_SHOWN:,} more", err=True)
    if report.uncached:
        click.echo(
            f"error: {report.uncached:,} objects do not fit: raise ASYNCDS_CACHE_SIZE or free the disk", err=True
        )
    if report.failures or report.uncached:
        raise SystemExit(1)


@_commands.command()
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Which cache; else ASYNCDS_CACHE_DIR.")
@click.option("--fix", is_flag=True, help="Remove what is damaged or litter, correct accounting and permissions.")
def verify(cache_dir: Path | None, fix: bool) -> None:
    """Compare all that the cache claims with its folder, value by value.

    Exits with 0 when all is well, or was mended, and with 1 otherwise. What asyncds did not put there is never touched.
    """
    from asyncds.audit import PROBLEMS
    from asyncds.cache import Cache
    from asyncds.errors import CacheError
    from asyncds.index import DATABASE, is_trustworthy
    from asyncds.settings import Settings

    settings = Settings()
    place = settings.cache_dir if cache_dir is None else cache_dir
    if not (place / "asyncds").is_dir():
        raise CacheError(f"{place}: there is no cache here, which would be in its folder asyncds")
    database = place / "asyncds" / "objects" / DATABASE
    if not fix and database.exists() and not is_trustworthy(database, read_only=settings.cache_read_only):
        raise CacheError(f"{database}: the index is damaged; --fix sets it aside, and the cache begins anew")
    cache = Cache(place, read_only=settings.cache_read_only, sweeping=False)
    problems = cache.check(fix=fix)
    for kind, found in problems.items():
        click.echo(f"{kind}: {len(found):,} ({PROBLEMS[kind]})", err=True)
        for text in found[:_FAILURES_SHOWN]:
            click.echo(f"  {text}", err=True)
        if len(found) > _FAILURES_SHOWN:
            click.echo(f"  … and {len(found) - _FAILURES_SHOWN:,} more", err=True)
    left = cache.check() if fix and problems else problems
    mended = "mended, " if problems and not left else ""
    click.echo(f"{cache.directory}: {mended}{len(cache):,} entries, {cache.volume() / 1e6:,.1f} MB")
    cache.close()
    if left:
        raise SystemExit(1)


@_commands.command()
@click.option(
    "--endpoint", metavar="URL", help="Use this server, such as a MinIO, instead of one that is started here."
)
@click.option("--rtt", type=_Seconds(), default="10ms", show_default=True, help="Round trip put before the server.")
@click.option("--epochs", type=click.IntRange(1, 100), default=3, show_default=True)
@click.option("--workers", type=click.IntRange(0, 64), default=0, show_default=True, help="DataLoader workers.")
def demo(endpoint: str | None, rtt: float, epochs: int, workers: int) -> None:
    """Train on handwritten digits from a bucket, and see where the time goes."""
    from asyncds.demo import run

    run(endpoint=endpoint, rtt=rtt, epochs=epochs, workers=workers)


def _show(message: Warning | str, *_: object) -> None:
    click.echo(f"warning: {message}", err=True)


def main() -> None:
    """Run a command. Errors and warnings of asyncds become one line each on standard error, and an exit code."""
    warnings.showwarning = _show  # type: ignore[assignment]
    try:
        _commands.main(prog_name="asyncds", standalone_mode=False)
    except AsyncdsError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(_INTERRUPTED)
