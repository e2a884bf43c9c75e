"""`asyncds verify`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from asyncds.cli.opening import as_json, cache_dir, opened, print_json
from asyncds.progress import one_line

if TYPE_CHECKING:
    from asyncds.cache import Cache

__all__ = ["verify"]

_SHOWN = 5


@click.command()
@cache_dir
@click.option("--fix", is_flag=True, help="Remove what is damaged or litter, correct accounting and permissions.")
@as_json
def verify(cache_dir: Path | None, fix: bool, as_json: bool) -> None:
    """Compare all that the cache claims with its folder, value by value.

    Exits with 0 when all is well, or was mended, and with 1 otherwise. What asyncds did not put there is never touched.
    """
    with opened(cache_dir, mend=fix) as cache:
        problems = _checked(cache, "verifying", fix=fix)
        left = _checked(cache, "verifying again") if fix and problems else problems
        entries, size = len(cache), cache.volume()
    if as_json:
        document = {"cache": str(cache.directory), "entries": entries, "bytes": size, "problems": problems}
        print_json(document | {"left": left})
    else:
        from rich.filesize import decimal

        _report(problems)
        state = "" if left else "mended, " if problems else "nothing wrong, "
        click.echo(f"{cache.directory}: {state}{entries:,} entries, {decimal(size)}")
    if left:
        raise SystemExit(1)


def _checked(cache: "Cache", title: str, *, fix: bool = False) -> dict[str, list[str]]:
    from asyncds.index import FAULTS
    from asyncds.progress import progress_bar

    try:
        total = len(cache)
    except FAULTS:  # which the check will name
        total = None
    with progress_bar(title, total, unit="entries") as advance:
        return cache.check(fix=fix, advance=advance)


def _report(problems: dict[str, list[str]]) -> None:
    from asyncds.audit import PROBLEMS

    for kind, found in problems.items():
        click.echo(f"{kind}: {len(found):,} ({PROBLEMS[kind]})", err=True)
        for text in found[:_SHOWN]:
            click.echo(f"  {one_line(text)}", err=True)
        if len(found) > _SHOWN:
            click.echo(f"  … and {len(found) - _SHOWN:,} more", err=True)
