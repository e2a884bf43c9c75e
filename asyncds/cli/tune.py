"""`asyncds tune`."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from asyncds.cli.opening import Folder, as_json, print_json, store_options
from asyncds.errors import ConfigurationError

if TYPE_CHECKING:
    from asyncds.tune import Step, Tuning

__all__ = ["tune"]

_LIMITS = {
    "store": "the store, which refuses more",
    "cache": "the disk of the cache",
    "cpu": "the CPU of one process: DataLoader workers share the work, while there are cores",
    "memory": "the 32 MiB that may be between socket and disk: more requests in flight wait for room",
    "network": "the network, the store, or what else runs here: more requests in flight bring no more",
    "concurrency": "the round trip: more requests in flight than were tried may bring more (--highest)",
}
_BAR = 20


@click.command()
@click.argument("uri")
@click.option("--highest", type=click.IntRange(1, 4096), default=512, show_default=True, help="Requests in flight.")
@click.option("--objects", type=click.IntRange(min=2), default=50_000, show_default=True, help="To get, at most.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=30.0, show_default=True, help="At most.")
@store_options
@click.option("--cache-dir", type=Folder(path_type=Path), help="Whose disk to measure; else ASYNCDS_CACHE_DIR.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw it: a .png, .svg or .pdf file.")
@as_json
def tune(
    uri: str, highest: int, objects: int, seconds: float, plot: Path | None, as_json: bool, **options: Any
) -> None:
    """Measure what a bucket gives to this machine: how many requests in flight pay, and what then is the limit.

    Lists and gets; writes nothing to the bucket. What others do meanwhile, on this machine and on the network, counts.
    Ends with the lines to export.
    """
    import uvloop
    from rich.console import Console

    from asyncds.manifest import parse_uri
    from asyncds.recipe import StoreRecipe
    from asyncds.tune import tune as measure

    if math.isnan(seconds):
        raise ConfigurationError("--seconds nan: write a number of seconds")
    bucket, prefix = parse_uri(uri)
    if plot is not None:
        _check_plot(plot)
    recipe = StoreRecipe.of(**{name: value for name, value in options.items() if value is not None})
    console = Console(stderr=True)
    with console.status("measuring: lists", spinner="line") as status:

        def tell(step: "Step") -> None:
            status.update(f"measuring: {step.concurrency} in flight bring {step.rate:,.0f} objects/s")

        found = uvloop.run(
            measure(recipe, bucket, prefix, highest=highest, objects=objects, seconds=seconds, tell=tell)
        )
    if plot is not None:
        _draw(found, uri, plot)
    if as_json:
        print_json({"uri": uri} | _document(found))
    else:
        _print(found)


def _document(found: "Tuning") -> dict[str, Any]:
    steps = [step._asdict() | {"rate": step.rate, "time_of_one_s": step.time_of_one} for step in found.steps]
    summary = {"best": found.best.concurrency, "limit": found.limit, "rate": found.rate, "epoch_s": found.epoch_s}
    cold = found.cold._asdict() | {"rate": found.cold.rate}
    return found._asdict() | {"steps": steps, "cold": cold} | summary | {"export": _exports(found)}


def _exports(found: "Tuning") -> dict[str, str]:
    return {"ASYNCDS_CONCURRENCY": str(found.best.concurrency)}


def _print(found: "Tuning") -> None:
    import sys

    from rich.bar import Bar
    from rich.console import Console
    from rich.table import Table

    table, most = Table(box=None, pad_edge=False, header_style="bold"), max(step.rate for step in found.steps)
    for name in ("in flight", "objects/s", "MB/s", "time of one", "CPU of one"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for step in found.steps:
        one = f"{1e3 * step.time_of_one:,.1f} ms", f"{1e6 * step.cpu / max(1, step.objects):,.0f} µs"
        cells = f"{step.concurrency}", f"{step.rate:,.0f}", f"{step.bytes / step.seconds / 1e6:,.1f}", *one
        bar = Bar(most or 1, 0, step.rate, width=_BAR)
        table.add_row(*cells, bar, style="bold" if step is found.best else None)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 80)
    with console.capture() as printed:
        console.print(table)
    for line in [*(row.rstrip() for row in printed.get().splitlines()), *_summary(found)]:
        click.echo(line)


def _summary(found: "Tuning") -> list[str]:
    best, size = found.best, found.mean_size * found.objects
    more = ", without decoding" if found.complete else ", without decoding; there are more, which take in proportion"
    writes = (
        f"Fetched and written at once: {found.cold.rate:,.0f} objects/s; the cache alone takes {found.written:,.0f}."
    )
    if not found.written:
        writes = "The cache took none of these objects: `asyncds stats` shows its room."
    cut = ["The budget ended it before more stopped to pay: raise --objects or --seconds."] if found.cut else []
    return [
        "",
        *cut,
        f"Best: {best.concurrency} in flight, {best.rate:,.0f} objects/s.",
        f"The limit is {_LIMITS[found.limit]}.",
        writes,
        f"A cold epoch over {found.objects:,} objects ({size / 1e6:,.1f} MB) takes {found.epoch_s:,.1f} s{more}.",
        "`auto`, the default, finds such a number by itself, and goes with what changes. To fix it:",
        "",
        *(f"export {name}={value}" for name, value in _exports(found).items()),
    ]


def _check_plot(path: Path) -> None:
    """Refuse what could not be drawn before anything is measured."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigurationError(f"--plot {path}: the name ends in .png, .svg or .pdf")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigurationError(f"--plot {path}: there is no folder {folder}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigurationError(f"--plot {path}: nothing can be written there")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigurationError("--plot takes matplotlib: pip install 'asyncds[plot]'") from None


def _draw(found: "Tuning", uri: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    rates = figure.subplots()
    times = rates.twinx()
    tried = [step.concurrency for step in found.steps]
    rates.plot(tried, [step.rate for step in found.steps], "o-", color="tab:blue", label="objects/s")
    times.plot(tried, [1e3 * step.time_of_one for step in found.steps], "s--", color="tab:gray", label="time of one")
    rates.axvline(found.best.concurrency, color="tab:green", linewidth=1)
    rates.annotate(f" {found.best.concurrency}", (found.best.concurrency, 0), color="tab:green", va="bottom")
    rates.set_xscale("log", base=2)
    rates.set_xticks(tried, [str(number) for number in tried])
    rates.set(xlabel="requests in flight", ylabel="objects/s", ylim=(0, None), title=f"{uri}\nlimit: {found.limit}")
    times.set(ylabel="time of one GET, ms", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)
