"""Small pieces that every section of a page is made of: tiles, labelled numbers, where something comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from icsearch.core.statistics import Difference
from icsearch.report import numbers

# (title, its (key, value) pairs as text) for each group
Provenance = tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


@dataclass(frozen=True)
class Tile:
    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Fact:
    """A number with what kind of number it is: counted, measured, or calculated by a formula."""

    label: str
    value: str
    kind: str


@dataclass(frozen=True)
class LegendEntry:
    """A colour class and what it stands for."""

    css: str
    label: str


def value_and_error(difference: Difference) -> tuple[str, str]:
    """A tile's value and note."""
    value, _, error = numbers.difference(difference).partition(" ± ")
    return value, f"± {error}" if error else "no error: one sequence"


def provenance(groups: Sequence[tuple[str, Mapping[str, Any]]]) -> Provenance:
    """Every group that says something, as text."""
    return tuple(
        (title, tuple((key.replace("_", " "), plain(value)) for key, value in group.items()))
        for title, group in groups
        if group
    )


LONGEST_LIST = 160  # characters of a list of texts; the digests of all sequences would fill a page


def plain(value: Any) -> str:
    """A value of a JSON document as a reader expects it."""
    if value is None or value == [] or value == {}:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        items = [str(item) for item in value]
        if len(items) > 2 and len(", ".join(items)) > LONGEST_LIST and isinstance(value[0], str):
            items = [*items[:2], f"… ({len(items)} in all)"]
        return ", ".join(items)
    return json.dumps(value) if isinstance(value, Mapping) else str(value)
