"""TOML, sizes and names in words, what was probably meant, and the first line of another library's error."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from icsearch.core.errors import IcsearchError
from icsearch.core.jsonfile import MAX_COUNT, shown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_toml(text: str) -> dict[str, Any]:
    """The document of a TOML text; raises ValueError, and RecursionError for what is nested too deeply."""
    return tomllib.loads(text)


def parse_bytes(text: str) -> int:
    """A size as typed, such as 8GB, 500MB or 2GiB, in bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    size = float(match[1]) * _UNITS.get(match[2], 0) if match else 0.0
    if not 0 < size <= MAX_COUNT:
        raise IcsearchError(f"memory {shown(text)} is not a size: give a number with a unit, such as 8GB or 500MB")
    return int(size)


def format_bytes(size: int) -> str:
    """A size for people, in decimal units."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def shrunk_note(failed: int, left: int) -> str:
    """What a run says when memory ran out over `failed` patterns at once and it goes on with `left`."""
    return (
        f"memory ran out in a sweep of {failed} patterns; from there on at most {left} at once: the losses are the "
        "same, the run takes longer"
    )


MAX_SAID = 200  # characters of another library's error within a message of ours


def did_you_mean(name: str, names: Iterable[str], prefix: str = "") -> str:
    """A question that names what was probably meant, and a space behind it; empty where none of the names is near.

    A `prefix` that all of them have is not compared: it would make them all alike.
    """
    ends = sorted(known.removeprefix(prefix) for known in names)
    close = get_close_matches(name.removeprefix(prefix), ends, n=1)
    return f"did you mean {prefix}{close[0]}? " if close else ""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line: its first, or its name where it says nothing.

    A first line that ends with a colon says nothing alone: then the next one comes with it. Long ones are cut, behind
    a word where one ends near the cut.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    if len(said) <= MAX_SAID:
        return said
    space = said.rfind(" ", MAX_SAID - 60, MAX_SAID - 2)
    return f"{said[: MAX_SAID - 3 if space < 0 else space]}..."
