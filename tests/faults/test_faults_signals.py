"""Ended from outside in mid-run, and one process a RUN: the same command continues, to the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fault_harness import Case, Commands, outcome, scored_twice, whole_lines
from icsearch.core.errors import JournalError

pytestmark = pytest.mark.alone

ENDS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGHUP: -signal.SIGHUP, signal.SIGTERM: 143, signal.SIGINT: 130}
SAID = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}


def ended_often(case: Case, commands: Commands, out: Path, numbers: tuple[signal.Signals, ...]) -> None:
    """A run that is ended by each of these."""
    for number in numbers:
        before = whole_lines(out)
        further = max(2, before.count(b"\n")) + 1
        ended = commands.stopped(case.into(out), out, further).send(number, signal.SIGCONT).end()
        assert ended.status == ENDS[number], ended.err
        if number in SAID:
            assert ended.last_line == f"{SAID[number]}; the same command continues {out}"
        assert whole_lines(out).startswith(before)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("greedy", (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)),
        ("dp-baseline", (signal.SIGKILL,)),
        ("eval", (signal.SIGKILL, signal.SIGTERM)),
    ],
)
def test_ended_in_the_middle_and_continued(
    cases: dict[str, Case], commands: Commands, tmp_path: Path, name: str, numbers: tuple[signal.Signals, ...]
) -> None:
    """One run, ended a little later each time."""
    case, out = cases[name], tmp_path / "run"
    ended_often(case, commands, out, numbers)
    before = whole_lines(out)
    assert not (out / "report.html").exists()
    again = commands.run(case.into(out))
    assert again.status == 0, again.err
    assert f"continuing {out}" in again.err
    assert whole_lines(out).startswith(before)
    assert outcome(out) == case.outcome
    assert not scored_twice(out)


def test_what_continues_a_run_that_was_started_over(cases: dict[str, Case], commands: Commands, tmp_path: Path) -> None:
    """--fresh would start over again. It is said however quiet the run is."""
    out = tmp_path / "run"
    command = [*cases["greedy"].into(out), "--fresh", "--quiet"]
    ended = commands.stopped(command, out, 2).send(signal.SIGTERM, signal.SIGCONT).end()
    assert ended.err.count("\n") == 1
    assert ended.last_line == f"terminated; the same command without --fresh continues {out}"


# --- one process a RUN ------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_while_the_first_lives(
    cases: dict[str, Case], commands: Commands, tmp_path: Path
) -> None:
    """The first is stopped, so that it lives for sure; then killed, and its lock file is left over."""
    case, out = cases["greedy"], tmp_path / "run"
    first = commands.stopped(case.into(out), out, 3)
    before = whole_lines(out)
    second = commands.run(case.into(out))
    assert first.alive
    assert second.status == 2
    assert second.last_line.startswith(f"icsearch: another icsearch is running in {out}: wait for it")
    assert whole_lines(out) == before
    assert first.send(signal.SIGKILL).end().status == -signal.SIGKILL
    assert (out / ".lock").exists()
    third = commands.run(case.into(out))
    assert third.status == 0, third.err
    assert outcome(out) == case.outcome


HOLD_AND_FORK = """
import os, sys, time
from pathlib import Path
from icsearch.runs.directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).locked():
    if not os.fork():
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def test_a_fork_does_not_keep_the_lock_of_its_dead_parent(tmp_path: Path) -> None:
    from icsearch.runs.directory import RunDirectory

    parent = subprocess.Popen(
        [sys.executable, "-c", HOLD_AND_FORK, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    fork = int(parent.stdout.readline())
    try:
        parent.kill()
        parent.wait()
        os.kill(fork, 0)  # it lives
        with RunDirectory(tmp_path / "run").locked():
            pass
    finally:
        os.kill(fork, signal.SIGKILL)


def test_a_lock_file_that_goes_away_while_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that never began removes its directory: who opened the file in it just before must not hold a ghost."""
    from icsearch.runs import directory

    run, acquire, removed = directory.RunDirectory(tmp_path / "run"), directory._acquire, []

    def acquire_late(file: object) -> bool:
        if not removed:
            removed.append(True)
            (tmp_path / "run" / ".lock").unlink()
            (tmp_path / "run").rmdir()
        return acquire(file)  # type: ignore[arg-type]

    monkeypatch.setattr(directory, "_acquire", acquire_late)
    with run.locked():
        assert (tmp_path / "run" / ".lock").exists()
        second = directory.RunDirectory(tmp_path / "run")
        with pytest.raises(JournalError, match="another icsearch"), second.locked():
            pass
