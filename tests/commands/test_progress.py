"""What a run shows: plain lines off a terminal, a live bar on one."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from test_search import START, MadeUp, exact

from icsearch.commands.progress import Live, Plain, Quiet, RunClock, make_listener
from icsearch.runs.journal import Journal
from icsearch.runs.record import RunRecord
from icsearch.search.loop import Scoring, Search


def shown(path: Path, kind: type[Plain], terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, highlight=False)
    listener = kind(console)
    journal = Journal(path)
    journal.append(START)
    record = RunRecord.replay(journal.events())
    Search(Scoring(journal, record, MadeUp(), listener), exact()).run()
    listener.close()
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def test_plain_lines(tmp_path: Path) -> None:
    lines = shown(tmp_path / "j", Plain, terminal=False)
    assert "\x1b" not in lines
    assert "baseline: scoring 2 patterns" in lines
    assert "step 1: scoring 5 patterns" in lines
    for step in (1, 2, 3):
        assert f"step {step}/3: layer" in lines


def test_live_bar_leaves_one_line_for_each_commit(tmp_path: Path) -> None:
    output = shown(tmp_path / "j", Live, terminal=True)
    assert "best so far layer" in output
    assert sum(f"step {step}/3: layer" in output for step in (1, 2, 3)) == 3


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    listener = make_listener(quiet=True)
    assert type(listener) is Quiet
    journal = Journal(tmp_path / "j")
    journal.append(START)
    record = RunRecord.replay(journal.events())
    Search(Scoring(journal, record, MadeUp(), listener), exact()).run()
    assert capsys.readouterr() == ("", "")


def test_remaining_time_is_unknown_until_something_was_measured() -> None:
    clock = RunClock()
    clock.total = 10
    assert clock.remaining() == "time left unknown"
    clock.start_step(1, 10)
    clock.advance(5)
    assert clock.remaining() == "less than 1 s left"


def test_a_run_that_has_done_more_than_was_planned_never_has_nothing_left() -> None:
    """An interrupted sweep is done again, and states that were kept for it are gone."""
    clock = RunClock()
    clock.total, clock.done = 10, 12
    clock.start_step(1, 10)
    clock.advance(4)
    assert clock.remaining() == "less than 1 s left"
    clock.advance(6)
    assert clock.remaining() == "time left unknown"
