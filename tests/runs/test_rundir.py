"""A RUN directory's lock; what becomes of it when its process dies, `tests/faults` does to real ones."""

from __future__ import annotations

import gc
import re
import weakref
from pathlib import Path
from typing import Any

import pytest

from icsearch.core.errors import JournalError
from icsearch.runs.directory import RunDirectory


def test_a_lock_that_was_given_back_is_forgotten(tmp_path: Path) -> None:
    """A process that runs many searches keeps nothing of them."""
    lock = RunDirectory(tmp_path / "run")._take_lock()
    reference = weakref.ref(lock)
    with pytest.raises(JournalError, match="another icsearch is running"):
        RunDirectory(tmp_path / "run")._take_lock()
    lock.close()
    del lock
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize(
    ("there", "now", "words"),
    [
        ([["full", "FFFF"], ["uniform 1/4", "FSSS"]], [["full", "FFFF"], ["uniform 1/2", "FSFS"]],
         "patterns uniform 1/4, now uniform 1/2"),
        ([["full", "FFFF"], ["uniform 1/4", "FSSS"]], [["full", "FFFF"]], "patterns uniform 1/4, now no more"),
        ([["full", "FFFFFF"], ["a", "FSFFFF"]], [["a", "FSFFFF"], ["full", "FFFFFF"]],
         "patterns in one order, now in another"),
        ([["full", "FFFFFF"], ["run", "FSFFFF"]], [["full", "FFFFFF"], ["run", "FFSFFF"]],
         "patterns run FSFFFF, now run FFSFFF"),
        ([0, 5], [], "patterns [0, 5], now []"),
    ],
)  # fmt: skip
def test_of_long_lists_it_is_said_what_differs(tmp_path: Path, there: list[Any], now: list[Any], words: str) -> None:
    start = {"event": "start", "options": {"method": "eval", "patterns": there}, "model": {}, "calibration": {}}
    wanted = {**start, "options": {"method": "eval", "patterns": now}}
    with pytest.raises(JournalError, match=re.escape(f"({words})")):
        RunDirectory(tmp_path).check_same([start], wanted)
