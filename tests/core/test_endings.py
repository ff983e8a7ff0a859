"""How commands end: one line on stderr and an exit status."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from icsearch.cli import app
from icsearch.core import endings
from icsearch.core.errors import JournalError, OutOfMemoryError
from icsearch.core.signals import Terminated


def raising(error: BaseException) -> Callable[[], object]:
    def command() -> object:
        raise error

    return command


FULL = OSError(errno.ENOSPC, "No space left on device", "run/journal.jsonl")
GOES_ON = "and repeat the command; without --fresh, it continues where it stopped"
ENDS: dict[str, tuple[BaseException, int, str]] = {
    "bad input": (JournalError("no journal: give one"), 2, "no journal: give one"),
    "failure": (OutOfMemoryError("lower --memory"), 1, "lower --memory"),
    "full disk": (
        FULL,
        1,
        f"the disk is full (No space left on device, run/journal.jsonl): free some space {GOES_ON}",
    ),
    "a library's memory": (MemoryError(), 1, f"out of memory (MemoryError): free some {GOES_ON}"),
    "a place that is locked": (
        PermissionError(errno.EACCES, "Permission denied", "locked/run"),
        2,
        "cannot use locked/run (Permission denied): check its permissions, or give another path",
    ),
    "a name that is too long": (
        OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300),
        2,
        f"cannot use {'x' * 196}... (File name too long): check its permissions, or give another path",
    ),
    "a file that went away": (
        FileNotFoundError(errno.ENOENT, "No such file or directory", "run/x"),
        1,
        "FileNotFoundError: [Errno 2] No such file or directory: 'run/x' (--debug shows where)",
    ),
    "commands for a terminal": (
        JournalError("no \x1b[2J\u202efile\udcff\x00"),
        2,
        "no \\x1b[2J\\u202efile\\udcff\\x00",
    ),
    "anything else": (KeyError("two\nlines"), 1, "KeyError: 'two\\nlines' (--debug shows where)"),
}


@pytest.mark.parametrize("case", ENDS)
def test_one_line_and_a_status(capsys: pytest.CaptureFixture[str], case: str) -> None:
    error, status, line = ENDS[case]
    assert endings.run_to_its_end(raising(error), debug=False) == status
    assert capsys.readouterr().err == f"icsearch: {line}\n"


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (Terminated(), 143), (BrokenPipeError(), 1)])
def test_ended_from_outside_says_nothing_more(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int
) -> None:
    assert endings.run_to_its_end(raising(error), debug=False) == status
    assert capsys.readouterr().err == ""


def test_a_status_is_passed_on() -> None:
    assert [endings.run_to_its_end(lambda value=value: value, False) for value in (None, 3)] == [0, 3]  # type: ignore[misc]


def test_an_end_of_file_is_not_taken_for_the_end_of_typing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("icsearch.commands.export.export", raising_any(EOFError("cut file")))
    monkeypatch.setattr("icsearch.commands.export.load_pattern_file", lambda path: None)
    (tmp_path / "x.json").touch()
    assert app._run(["export", str(tmp_path / "x.json"), "--engine", "vllm"], debug=False) == 1
    assert capsys.readouterr().err == "\nicsearch: EOFError: cut file (--debug shows where)\n"


def raising_any(error: BaseException) -> Callable[..., object]:
    def call(*arguments: object) -> object:
        raise error

    return call
