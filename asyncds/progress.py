"""Progress bars that a person reads at a glance, and that are silent where nobody looks."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Protocol

__all__ = ["Advance", "one_line", "progress_bar"]


def one_line(text: str) -> str:
    """A text for people, who see in one line what keys and names may hold: line ends and the like are spelt out."""
    return text if text.isprintable() else "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


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
        """A bar with a line below it: on one line, a terminal of 80 columns would have no room for both.

        It asks how far things are whenever it is drawn: an update costs more than a small object.
        """

        def get_renderables(self) -> Iterator[RenderableType]:
            for task in self.tasks:
                self.update(task.id, completed=done)
            yield from super().get_renderables()
            if last_note:
                yield Text(f"  {last_note}")

    console, done, last_note = Console(stderr=True), 0, ""
    name = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
    text = [name, BarColumn(bar_width=10), MofNCompleteColumn(), TextColumn(unit)]
    clock = TimeElapsedColumn() if total is None else TimeRemainingColumn()
    with Noted(*text, clock, console=console, transient=True) as progress:
        progress.add_task(one_line(title), total=total)

        def advance(count: int = 1, *, note: str = "") -> None:
            nonlocal done, last_note
            done, last_note = done + count, note or last_note

        yield advance


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Rich draws from the global generator when it is imported; the numbers that come next belong to the user."""
    state = random.getstate()
    yield
    random.setstate(state)
