"""Where labels come from: the folder of an object, a callable of its key, or a column of a CSV file."""

import csv
import os

from asyncds.errors import ConfigurationError
from asyncds.listing import Labeller
from asyncds.manifest import Label

__all__ = ["labeller", "read_csv"]


def labeller(label: str | Labeller | None) -> Labeller | None:
    if label == "parent":
        return _parent
    if label is None or callable(label):
        return label
    raise ConfigurationError(f"label={label!r}: must be 'parent' or a callable of the key")


def _parent(key: str) -> str:
    folder, _, _ = key.rpartition("/")
    name = folder.rpartition("/")[2]
    if not name:
        raise ConfigurationError(f"{key!r} lies in no folder, so that label='parent' means nothing: give a callable")
    return name


def read_csv(
    path: str | os.PathLike[str], key: str | int, label: str | int | None
) -> tuple[list[str], list[Label] | None]:
    """The columns of a CSV file that hold keys and labels."""
    name = os.fspath(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigurationError(f"{name}: cannot be read as CSV in UTF-8 ({error})") from None
    header = rows.pop(0) if rows and (isinstance(key, str) or isinstance(label, str)) else []
    columns = {column: place for place, column in enumerate(header)}
    asked = [column for column in (key, label) if column is not None]
    missing = [column for column in asked if (column not in columns if isinstance(column, str) else column < 0)]
    if missing:
        raise ConfigurationError(f"{name}: there is no column {missing[0]!r}; its first row is {', '.join(header)!r}")
    places = [columns[column] if isinstance(column, str) else column for column in asked]
    short = next((row for row in rows if len(row) <= max(places)), None)
    if short is not None:
        raise ConfigurationError(f"{name}: a row has {len(short)} columns, {max(places) + 1} are needed: {short!r}")
    texts = [[row[place] for row in rows] for place in places]
    return texts[0], _numbers(texts[1]) if label is not None else None


def _numbers(texts: list[str]) -> list[Label]:
    for kind in (int, float):
        try:
            return [kind(text) for text in texts]
        except ValueError:
            continue
    return list(texts)
