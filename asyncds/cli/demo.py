"""`asyncds demo`."""

from typing import Any

import click

__all__ = ["demo"]

_MILLISECONDS = 1e-3


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


@click.command()
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
