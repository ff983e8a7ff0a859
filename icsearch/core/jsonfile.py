"""JSON documents from outside: read, checked and written in one place, so that what is wrong is always one line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from icsearch.core.errors import IcsearchError
from icsearch.core.files import read_text, write_atomically

MAX_NUMBER = 1e100  # far above any loss, far below where sums and squares of float64 overflow
MAX_COUNT = 2**53  # the integers that float64 holds exactly
MAX_LAYERS = 4096  # some fifty times the deepest model of today


def read_object(
    path: Path,
    *,
    expected: str,
    advice: str,
    error: type[IcsearchError],
    version: str | None = None,
    absent: str | None = None,
) -> dict[str, Any]:
    """The JSON object in a file; raises `error`, which names the file, for everything that is none.

    With `version`, the object's `format` must be that. `absent` is the advice where there is no file.
    """
    wrong = ""
    try:
        document = json.loads(read_text(path), object_pairs_hook=unambiguous)
        if not isinstance(document, dict):
            wrong = f"{path} holds {shown(document)}"
    except FileNotFoundError:
        wrong, advice = f"no file {path}", absent or advice
    except OSError as problem:
        wrong = f"cannot read {path} ({problem.strerror or problem})"
    except RecursionError:
        wrong = f"{path} is nested too deeply"
    except AmbiguityError as problem:
        wrong = f"{path} has {problem} twice"
    except ValueError as problem:  # not UTF-8, not JSON, a number of 5000 digits
        wrong = f"{path} is not JSON ({problem})"
    if not wrong and version not in (None, document.get("format")):
        wrong, expected = f"{path} has format {shown(document.get('format'))}", repr(version)
    if wrong:
        raise error(f"{wrong}: expected {expected}; {advice}")
    return dict(document)


class AmbiguityError(ValueError):
    """An object that says a thing twice, this one: readers differ in which value they take."""


def unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, for json's `object_pairs_hook`; raises AmbiguityError where a name comes twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise AmbiguityError(shown(next(name for name in names if names.count(name) > 1)))
    return found


def write_object(path: Path, document: Mapping[str, Any]) -> None:
    """Write strict JSON, whole or not at all: nan and infinity, which JSON has not, become null."""
    write_atomically(path, json.dumps(strict(document), indent=2, allow_nan=False) + "\n")


def strict(value: Any) -> Any:
    """The value with None where a float is nan or infinite, at any depth."""
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Kind:
    """What a value must be: its name in messages, and the test."""

    name: str
    fits: Callable[[Any], bool]


class FieldError(ValueError):
    """A field that is missing, or other than its kind."""


def check_fields(document: Mapping[str, Any], fields: Mapping[str, Kind]) -> None:
    """Raise FieldError for the first field that is not of its kind. A missing one counts as null."""
    for name, kind in fields.items():
        if not kind.fits(document.get(name)):
            found = shown(document[name]) if name in document else "missing"
            raise FieldError(f"{name} is {found}: expected {kind.name}")


def optional(kind: Kind) -> Kind:
    """The kind, or null."""
    return Kind(f"{kind.name} or null", lambda value: value is None or kind.fits(value))


def list_of(kind: Kind, length: int | None = None) -> Kind:
    """A list of values of one kind, of `length` where it is given."""
    many = "" if length is None else f"{length} x "
    return Kind(
        f"a list of {many}{kind.name}",
        lambda value: isinstance(value, list) and length in (None, len(value)) and all(map(kind.fits, value)),
    )


def whole(least: int, most: int = MAX_COUNT) -> Kind:
    """An integer from `least` to `most`; true and false are none."""
    name = f"an integer from {least}" + (f" to {most}" if most != MAX_COUNT else " up")
    return Kind(name, lambda value: _is(value, int) and least <= value <= most)


def letters(length: int | None = None) -> Kind:
    """F and S, F first."""
    count, fewest, most = ("", 1, MAX_LAYERS) if length is None else (f"{length} ", length, length)
    return Kind(
        f"{count}letters F and S, F first",
        lambda value: isinstance(value, str) and fewest <= len(value) <= most and bool(re.fullmatch("F[FS]*", value)),
    )


def layers(most: int = MAX_LAYERS, length: int | None = None) -> Kind:
    """Layer numbers below `most`, each larger than the one before; `length` of them where it is given."""
    numbers = list_of(whole(0, most - 1), length)
    count = "" if length is None else f"{length} "
    return Kind(
        f"{count}ascending layer numbers below {most}",
        lambda value: numbers.fits(value) and all(a < b for a, b in pairwise(value)),
    )


def one_of(*values: str) -> Kind:
    """One of these texts."""
    return Kind(" or ".join(values), lambda value: isinstance(value, str) and value in values)


def between(low: float, high: float) -> Kind:
    """A number above `low` and below `high`."""
    name = f"a number above {low:g}" + (f" and below {high:g}" if high < MAX_NUMBER else "")
    return Kind(name, lambda value: NUMBER.fits(value) and low < value < high)


def shown(value: Any) -> str:
    """A value for a message: short ones as they are, the rest by their type."""
    if isinstance(value, (list, dict)):
        return f"a {'list' if isinstance(value, list) else 'JSON object'}"
    if isinstance(value, int) and abs(value) > MAX_COUNT:
        return "a huge integer"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]}..."


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


TEXT = Kind("text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("a JSON object", lambda value: isinstance(value, dict))
NUMBER = Kind("a finite number", lambda value: _is(value, (int, float)) and abs(value) <= MAX_NUMBER)
DURATION = Kind("a number of seconds", lambda value: NUMBER.fits(value) and value >= 0)
