"""Progress bars that a person reads at a glance, and that are silent where nobody looks."""

import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Protocol

__all__ = ["Advance", "progress_bar"]

_SECONDS_BETWEEN_UPDATES = 0.05


class Advance(Protocol):
    """Moves a bar on."""

    def __call__(self, count: int = 1, *, note: str = "") -> None:
        """Count more, and replace what is written below the bar unless `note` is empty."""
        ...


@contextmanager
def progress_bar(
    title: str, total: int | None = None, *, show: bool = True, unit: str = "objects"
) -> Iterator[Advance]:
    """Yield what advances the bar. Drawn on standard error if that is a terminal or a notebook, and else not at all."""
    in_notebook = "ipykernel" in sys.modules and find_spec("ipywidgets") is not None  # rich needs both
    if not show or not (sys.stderr.isatty() or in_notebook):
        yield lambda count=1, *, note="": None
        return
    with _same_random_numbers():
        from rich.console import Console, RenderableType
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.table import Column
        from rich.text import Text

    class Noted(Progress):
        """A bar with a line below it: on one line, a terminal of 80 columns would have no room for both."""

        def get_renderables(self) -> Iterator[RenderableType]:
            yield from super().get_renderables()
            yield from (Text(f"  {task.fields['note']}") for task in self.tasks if task.fields["note"])

    console = Console(stderr=True)
    name = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
    text = [name, BarColumn(bar_width=10), MofNCompleteColumn(), TextColumn(unit)]
    clock = TimeElapsedColumn() if total is None else TimeRemainingColumn()
    with Noted(*text, clock, console=console, transient=True) as progress:
        task, waiting, last, last_note = progress.add_task(title, total=total, note=""), 0, 0.0, ""

        def advance(count: int = 1, *, note: str = "") -> None:
            nonlocal waiting, last, last_note
            waiting += count
            if time.monotonic() - last > _SECONDS_BETWEEN_UPDATES:  # an update costs more than a small object
                last_note = note or last_note
                progress.update(task, advance=waiting, note=last_note)
                waiting, last = 0, time.monotonic()

        yield advance
        progress.update(task, advance=waiting)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Rich draws from the global generator when it is imported; the numbers that come next belong to the user."""
    state = random.getstate()
    yield
    random.setstate(state)
