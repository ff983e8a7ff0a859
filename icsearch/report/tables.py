"""Tables and tiles of the page, ready for its templates."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from icsearch.core.statistics import Difference
from icsearch.report import numbers


@dataclass(frozen=True)
class Tile:
    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Cell:
    """A place in a table. `note` stands below, `title` shows on hovering; `bar` and `whisker` are drawn, in %."""

    text: str
    note: str = ""
    css: str = ""
    title: str = ""
    badges: tuple[str, ...] = ()
    bar: float | None = None
    whisker: tuple[float, float] | None = None


Row = Sequence[Cell | str]


@dataclass(frozen=True)
class Table:
    """Rows under headings, in groups that may have a title. Columns whose heading is in `texts` are no numbers."""

    heads: tuple[str, ...]
    groups: tuple[tuple[str, tuple[tuple[Cell, ...], ...]], ...]
    texts: tuple[str, ...]
    css: str


def make_table(
    heads: Sequence[str], groups: Mapping[str, Iterable[Row]], texts: Sequence[str] = ("pattern",), css: str = ""
) -> Table:
    """A table of cells and plain texts."""
    filled = {
        title: tuple(tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in row) for row in rows)
        for title, rows in groups.items()
    }
    return Table(tuple(heads), tuple(filled.items()), tuple(texts), css)


def minus(text: str) -> str:
    """Numbers with a true minus sign: ``-0.1`` becomes ``−0.1``, ``all-F`` stays."""
    return re.sub(r"(?<![\w.])-(?=[\d.])", "−", text)


def with_note(difference: Difference, sign: bool = True) -> Cell:
    """A number with its error below it."""
    if difference == Difference(0.0, 0.0):
        return Cell("0")
    text, _, error = numbers.with_error(difference.delta, difference.std_err, sign).partition(" ± ")
    return Cell(text, f"± {error}" if error else "")


def difference_tile(label: str, text: str) -> Tile:
    """A number and its error."""
    value, _, error = text.partition(" ± ")
    return Tile(label, value, f"± {error}" if error else "no error: one sequence")
