"""What a run shows: plain lines off a terminal, a live bar on one."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from test_search import START, MadeUp, ManySequences, exact, long_run

from icsearch.commands.progress import Live, Plain, Quiet, RunClock, best_so_far, make_listener
from icsearch.runs.journal import Journal
from icsearch.runs.record import RunRecord
from icsearch.search.loop import Scoring, run_search


def shown(path: Path, kind: type[Plain], terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, highlight=False)
    listener = kind(console)
    journal = Journal(path)
    journal.append(START)
    record = RunRecord.replay(journal.events())
    run_search(Scoring(journal, record, MadeUp(), listener), exact())
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
    run_search(Scoring(journal, record, MadeUp(), listener), exact())
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


def test_a_step_says_once_that_it_scores(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200, highlight=False)
    record = long_run(tmp_path / "j", ManySequences(), listener=Plain(console))
    output = console.file
    assert isinstance(output, io.StringIO)
    lines = output.getvalue().splitlines()
    assert sum("scoring" in line for line in lines) == 1 + len(record.commits)


def test_the_leader_is_named_on_what_all_know(tmp_path: Path) -> None:
    """After each loss, the leader is named on as many sequences as anyone has."""
    seen: list[str] = []

    class Listener(Quiet):
        def losses_known(self, record: RunRecord, step: int | str) -> None:
            seen.append(best_so_far(record, step))

    long_run(tmp_path / "j", ManySequences(), listener=Listener())
    assert any("on 24 of 24 sequences" in text for text in seen)
    assert all("best so far layer" in text or "of 24 sequences" in text for text in seen)
