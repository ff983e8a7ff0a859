"""A place for bad input in every test, and good input to make it from: one tiny checkpoint, searched once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from bad_input import Good, Place
from icsearch.cli import app

PATIENCE = 60.0  # seconds of one process's work; the slowest refusal takes one


@pytest.fixture(scope="session")
def good(glm_checkpoint: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Good:
    """The checkpoint, its tokens, and a finished run of each command."""
    folder = tmp_path_factory.mktemp("good")
    fixed = ("--calibration", str(tokens), "--batch-size", "2", "--threads", "1", "--quiet")
    commands = {
        "greedy": ("--num-shared", "3"),
        "dp-baseline": ("--num-shared", "3"),
        "eval": ("--pattern", "uniform:1/2"),
    }
    for command, more in commands.items():
        out = ("--out", str(folder / command))
        assert app._run([command, str(glm_checkpoint), *fixed, *out, *more], debug=True) == 0
    return Good(glm_checkpoint, tokens, *(folder / command for command in commands))


@pytest.fixture
def place(tmp_path: Path, good: Good, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An empty directory, which is also the current one: what a command writes by default would lie there."""
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, good)


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """A refusal that hangs fails, where it hangs."""
    with within(PATIENCE):
        yield


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Within the block, what takes longer is interrupted; seconds of work, so that a busy machine changes nothing."""

    def give_up(number: int, frame: FrameType | None) -> None:
        raise TookTooLong(f"more than {seconds} seconds of work")

    before = signal.signal(signal.SIGVTALRM, give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


class TookTooLong(BaseException):
    """Nothing that the code under test could take for an error of its own."""
