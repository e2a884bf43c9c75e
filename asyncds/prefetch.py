"""What will be asked for: objects that wait for their turn to be downloaded, and those that no cache took."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Place", "Prefetch"]

WINDOW = 64 << 20
Place = tuple[str, str]  # bucket and key
Wanted = TypeVar("Wanted")
Kept = TypeVar("Kept")


class Prefetch(Generic[Wanted, Kept]):
    """Two tables by object: what to bring in advance, in the order in which it was named, and what arrived and is held
    in memory, at most `window` bytes of it. Each entry belongs to a group, which can be forgotten as a whole.

    Lives on one event loop.
    """

    def __init__(self, window: int = WINDOW) -> None:
        self._window = window
        self._wanted = OrderedDict[Place, tuple[Wanted, int]]()  # whose first is found at once, also after many pops
        self._kept: dict[Place, tuple[Kept, int, int]] = {}
        self._bytes = 0

    def want(self, place: Place, wanted: Wanted, group: int) -> None:
        """Put it at the end, unless it is there already, or was kept."""
        if place not in self._kept:
            self._wanted.setdefault(place, (wanted, group))

    def next(self) -> tuple[Place, Wanted, int] | None:
        """What comes next, which stays where it is."""
        for place, (wanted, group) in self._wanted.items():
            return place, wanted, group
        return None

    def take(self, place: Place) -> Kept | None:
        """It is on its way, or needed now: take it out, and return it if it was kept."""
        self._wanted.pop(place, None)
        kept = self._kept.pop(place, None)
        if kept is None:
            return None
        self.release(kept[1])
        return kept[0]

    def reserve(self, size: int) -> bool:
        """Keep room for so many bytes, if there is any; tell whether there was. A giant gets it alone."""
        if self._bytes and self._bytes + size > self._window:
            return False
        self._bytes += size
        return True

    def release(self, size: int) -> None:
        """Give room back."""
        self._bytes -= size

    def keep(self, place: Place, kept: Kept, size: int, group: int) -> None:
        """Hold what has arrived, if there is room for it."""
        if place not in self._kept and self.reserve(size):
            self._kept[place] = kept, size, group

    def forget(self, gone: Callable[[int], bool]) -> None:
        """Drop the groups that are gone."""
        for place in [place for place, (_, group) in self._wanted.items() if gone(group)]:
            del self._wanted[place]
        for place in [place for place, (_, _, group) in self._kept.items() if gone(group)]:
            self.take(place)
