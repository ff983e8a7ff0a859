"""What a run shows: plain lines off a terminal, a live bar on one."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from rich.console import Console
from test_search import START, MadeUp, ManySequences, exact, long_run

from fisher_fixtures import fisher_record
from icsearch.commands import progress
from icsearch.commands.progress import Live, Plain, Quiet, RunClock, best_so_far, make_listener
from icsearch.runs.journal import Journal
from icsearch.runs.record import RunRecord
from icsearch.runs.refinement import HELDOUT_SET
from icsearch.search.loop import Scoring, run_search
from run_fixtures import MadeUpRun


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


def plain() -> tuple[Plain, io.StringIO]:
    out = io.StringIO()
    return Plain(Console(file=out, width=200, highlight=False)), out


def test_the_parts_of_a_search_on_the_table_have_their_names() -> None:
    listener, out = plain()
    for name, patterns in (("table", 0), (0, 4), ("single flips", 15), ("nested path", 12), ("round 1", 8)):
        listener.step_started(name, patterns, 100)
    assert out.getvalue().splitlines() == [
        "table: every layer, forth and back",
        "baseline: scoring 4 patterns",
        "single flips: scoring 15 patterns",
        "nested path: scoring 12 patterns",
        "round 1: scoring 8 patterns",
    ]


def test_a_table_says_how_far_it_is_before_any_loss_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    listener, out = plain()
    listener.step_started("table", 0, 100)
    for _ in range(4):
        now += progress.SECONDS_BETWEEN_LINES / 2
        listener.layer_done(10)
    assert out.getvalue().splitlines()[1:] == ["table: 10%, about 45 s left", "table: 30%, about 35 s left"]
    listener.step_started("single flips", 15, 100)
    before = out.getvalue()
    now += 100
    listener.layer_done(10)  # its losses will say it
    assert out.getvalue() == before


def test_time_left_of_a_part_goes_by_its_own_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = RunClock()
    clock.start_step("table", 10)
    now += 100
    clock.advance(10)
    clock.start_step("single flips", 100)
    assert clock.remaining() == "time left unknown"
    now += 10
    clock.advance(50)
    assert clock.remaining() == "about 10 s left"
    clock.start_step("single flips", 50)  # again, with a smaller plan: the pace is known
    assert clock.remaining() == "about 10 s left"


def test_steps_of_a_nested_path_have_no_time_left() -> None:
    record = fisher_record(MadeUpRun(num_shared=4))
    listener, out = plain()
    record.commits = record.commits[:2]
    listener.committed(record)
    assert out.getvalue().startswith("step 2/4: layer ")
    assert " shares, KL " in out.getvalue() and "left" not in out.getvalue()


def test_held_out_sequences_are_counted_by_themselves() -> None:
    record = fisher_record(MadeUpRun(), heldout=True)
    assert best_so_far(record, HELDOUT_SET) == "3 of 3 sequences"
    assert best_so_far(record, "round 1") == "12 of 12 sequences"
