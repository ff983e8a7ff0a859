"""A RUN directory's lock; what becomes of it when its process dies, `tests/faults` does to real ones."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest

from icsearch.errors import JournalError
from icsearch.runs.rundir import RunDirectory


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
