"""What commands have in common: a cache that is there already, and machine-readable output."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from asyncds.errors import CacheError

if TYPE_CHECKING:
    from asyncds.cache import Cache

__all__ = ["Folder", "as_json", "cache_dir", "opened", "print_json", "print_table", "store_options"]

_UNFOLDED = 10_000


class Folder(click.Path):
    """A path that says something: an empty one, as of a variable that is not set, would be the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty", param, ctx)
        return super().convert(value, param, ctx)


cache_dir = click.option("--cache-dir", type=Folder(path_type=Path), help="Which cache; else ASYNCDS_CACHE_DIR.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")


def store_options(command: Callable[..., None]) -> Callable[..., None]:
    """Where the objects are, and who asks."""
    for option in (
        click.option("--profile", help="Profile of the AWS configuration; else AWS_PROFILE."),
        click.option("--region", help="Region of the bucket; else AWS_REGION."),
        click.option("--endpoint", metavar="URL", help="Endpoint of the store; else AWS_ENDPOINT_URL or MINIO_URL."),
    ):
        command = option(command)
    return command


def print_json(document: Any) -> None:
    """Print a document whose keys later versions keep."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def print_table(names: Sequence[str], rows: Sequence[Sequence[str]], *, right: bool = False) -> None:
    """Print rows below names, folded to the width of a terminal, and never in a pipe.

    With `right`, all but the first column are set to the right, and not folded.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, name in enumerate(names):
        table.add_column(
            name, justify="right" if right and place else "left", no_wrap=right and place > 0, overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _UNFOLDED)
    with console.capture() as printed:
        console.print(table)
    for line in printed.get().splitlines():
        click.echo(line.rstrip())


@contextmanager
def opened(place: Path | None, *, mend: bool = False) -> "Iterator[Cache]":
    """Open the cache that is there; make none, and touch a damaged one only to `mend` it."""
    from asyncds.cache import Cache
    from asyncds.index import DATABASE, is_sealed, is_trustworthy
    from asyncds.settings import Settings

    settings = Settings()
    place = settings.cache_dir if place is None else place
    if not (place / "asyncds").is_dir():
        raise CacheError(
            f"{place}: there is no cache here, which would be in its folder asyncds: set ASYNCDS_CACHE_DIR, or give "
            "--cache-dir; the first run or `asyncds warm` makes one"
        )
    database = place / "asyncds" / "objects" / DATABASE
    read_only = settings.cache_read_only or is_sealed(database)
    if not mend and database.exists() and not is_trustworthy(database, read_only=read_only):
        raise CacheError(
            f"{database}: the index is damaged; `asyncds verify --fix` sets it aside, and the cache begins anew"
        )
    cache = Cache(place, limit=settings.cache_size, read_only=settings.cache_read_only, sweeping=False)
    try:
        yield cache
    finally:
        cache.close()
