"""Valid files, a little broken: bytes that fell over, ends that are missing, JSON values that are others."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import resource
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from conftest import within
from icsearch.core.errors import IcsearchError

FEW, MANY = 60, 600
SECONDS = 20.0  # of work for one example, before it counts as one without end
MEMORY = 2**30  # bytes that a reader may ask for beyond what the process has

# Every run tries the same examples: a failure here is one everywhere.
_common: dict[str, Any] = {
    "derandomize": True,
    "database": None,
    "deadline": timedelta(seconds=2 * SECONDS),
    "suppress_health_check": list(HealthCheck),
}
few = settings(max_examples=FEW, **_common)
few_pages = settings(max_examples=FEW // 2, **_common)  # each with its figures
many = settings(max_examples=MANY, **_common)

ANYTHING: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e-300, 1e308, math.nan, math.inf),
    *("", "F", "FSFSFS", "SFFFFF", "full", "../up", "/etc/passwd", "\0", "\ud800", "\x1b[2J", "x" * 300, "9" * 5000),
    *([], [0], [[]], [None], ["F"], {}, {"": None}, {"format": 1}, [[[[]]]]),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value inside a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


@st.composite
def documents(draw: st.DrawFn, valid: Any) -> Any:
    """A JSON document with one to three values dropped, doubled, renamed, swapped for another kind or number."""
    found = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        known = list(places(found))
        if not known:
            break
        *path, key = draw(st.sampled_from(known))
        holder = found
        for step in path:
            holder = holder[step]
        _change(draw, holder, key)
    return found


def _change(draw: st.DrawFn, holder: Any, key: Any) -> None:
    way = draw(st.sampled_from(["drop", "double", "swap", "number", "letters"]))
    value = holder[key]
    if way == "drop":
        del holder[key]
    elif way == "double" and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(value))
    elif way == "double":
        holder[f"{key}_"] = holder.pop(key)
    elif way == "number" and isinstance(value, (int, float)) and abs(value) < 1e100:
        holder[key] = draw(st.sampled_from([value + 1, value - 1, -value, value * 1000, value * 1e12, float(value)]))
    elif way == "letters" and isinstance(value, str) and value:
        at = draw(st.integers(0, len(value) - 1))
        holder[key] = value[:at] + draw(st.sampled_from(["", "F", "S", "0", "é", "\n"])) + value[at + 1 :]
    else:
        holder[key] = copy.deepcopy(draw(st.sampled_from(ANYTHING)))


def texts(valid: Any) -> st.SearchStrategy[bytes]:
    """The bytes of a JSON file whose document is changed, or whose bytes are."""
    whole = json.dumps(valid).encode()
    return st.one_of(documents(valid).map(lambda one: json.dumps(one).encode()), damaged(whole))


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes with some flipped, cut out, put in or doubled, or with the end missing."""
    found = whole
    for _ in range(draw(st.integers(1, 3))):
        first = draw(st.integers(0, max(len(found) - 1, 0)))
        last = min(len(found), first + draw(st.integers(1, 40)))
        part = found[first:last]
        way = draw(st.sampled_from(["flip", "cut", "end", "put", "double"]))
        other = {
            "flip": bytes(byte ^ draw(st.integers(1, 255)) for byte in part[:2]) + part[2:],
            "cut": b"",
            "end": b"",
            "put": draw(st.binary(min_size=1, max_size=9)) + part,
            "double": part * 2,
        }[way]
        found = found[:first] + other + (b"" if way == "end" else found[last:])
    return found


def reads_or_refuses(read: Callable[[], object]) -> bool:
    """Whether a reader took its file. Its own errors are refusals; any other, more time or memory is a failure."""
    with within(SECONDS), _memory_bounded():
        try:
            read()
        except IcsearchError as error:
            assert str(error)
            return False
    return True


@contextlib.contextmanager
def _memory_bounded() -> Iterator[None]:
    """Within the block, what the process may map is what it has and a little more: beyond lies MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
