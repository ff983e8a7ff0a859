"""Killed at any moment, again and again: the end is that of an undisturbed run, to the last bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from fault_harness import (
    Case,
    Commands,
    command,
    count_operations,
    kill_at_operation,
    outcome,
    scored_twice,
    whole_lines,
)

pytestmark = pytest.mark.alone

# Behind the command's end, a signal ends what is left of the process: a shell shows both statuses as the same.
ENDS = {
    signal.SIGKILL: (-signal.SIGPROF,),
    signal.SIGTERM: (143, -signal.SIGTERM),
    signal.SIGINT: (130, -signal.SIGINT),
}


def end_after(seconds: float, number: int) -> None:
    """End this process once it has worked so long: wherever it is, or with a signal that it catches."""
    if number != signal.SIGKILL:
        signal.signal(signal.SIGPROF, lambda *_: os.kill(os.getpid(), number))
    signal.setitimer(signal.ITIMER_PROF, seconds)


def timed(arguments: Sequence[str], into: Path) -> None:
    """The command in this process; then the seconds that it worked go into a file."""
    try:
        command(arguments)
    finally:
        into.write_text(str(time.process_time()))


def seconds_of(case: Case, commands: Commands, tmp_path: Path) -> float:
    """How long a command works from nothing to its end."""
    arguments = [*map(str, case.into(tmp_path / "timed"))]
    assert commands.call(partial(timed, arguments, tmp_path / "seconds")).end().status == 0
    return float((tmp_path / "seconds").read_text())


def disturbed(case: Case, commands: Commands, out: Path, chance: random.Random, longest: float) -> int:
    """The command, ended again and again after a random time up to `longest`; how often, before it came to its end.

    Each time may be longer than the one before by a quarter, or else it might never get there.
    """
    for ended in range(100):
        known, number = whole_lines(out), chance.choice([*ENDS])
        moment = chance.uniform(0.01, longest * 1.25**ended)
        end = commands.run(case.into(out), partial(end_after, moment, number))
        assert whole_lines(out).startswith(known)
        assert "Traceback" not in end.err
        assert "Exception ignored" not in end.err
        if end.status == 0:
            return ended
        assert end.status in ENDS[number], end.err
    raise AssertionError("it never came to its end")


def test_ended_at_random_moments(cases: dict[str, Case], commands: Commands, tmp_path: Path) -> None:
    case, chance = cases["greedy"], random.Random(7)
    seconds = seconds_of(case, commands, tmp_path)
    assert disturbed(case, commands, tmp_path / "run", chance, longest=seconds / 2) >= 1
    assert outcome(tmp_path / "run") == case.outcome
    assert not scored_twice(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["greedy", "fisher", "dp-baseline", "eval"])
def test_ended_at_many_random_moments(cases: dict[str, Case], commands: Commands, tmp_path: Path, name: str) -> None:
    case, total = cases[name], 0
    seconds = seconds_of(case, commands, tmp_path)
    for seed in range(8):
        out = tmp_path / f"run{seed}"
        total += disturbed(case, commands, out, random.Random(seed), longest=seconds / 2)
        assert outcome(out) == case.outcome
    assert total >= 16


# --- before each operation on a file ----------------------------------------------------------------------------------


def operations(case: Case, commands: Commands, tmp_path: Path) -> int:
    """How many operations on files in its RUN a command does in all."""
    tmp_path.mkdir(exist_ok=True)
    counted = count_operations(tmp_path / "counted", tmp_path / "number")
    assert commands.run(case.into(tmp_path / "counted"), counted).status == 0
    return int((tmp_path / "number").read_text())


def killed_at(case: Case, commands: Commands, out: Path, moments: Iterator[int]) -> None:
    """For each moment: a run from nothing that is killed there, and continued to its end."""
    for moment in moments:
        shutil.rmtree(out, ignore_errors=True)
        assert commands.run(case.into(out), kill_at_operation(moment, out)).status == -signal.SIGKILL
        ended = commands.run(case.into(out))
        assert ended.status == 0, (moment, ended.err)
        assert outcome(out) == case.outcome, moment
        assert not list(out.rglob("*.tmp")), moment


def test_killed_before_a_file_operation(cases: dict[str, Case], commands: Commands, tmp_path: Path) -> None:
    """Two of each: between events, and while the results are written."""
    for name in ("greedy", "fisher"):
        total = operations(cases[name], commands, tmp_path / name)
        assert total > 30
        moments = [random.Random(3).randrange(part * total // 3, (part + 1) * total // 3) + 1 for part in (1, 2)]
        killed_at(cases[name], commands, tmp_path / name / "run", iter(moments))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["greedy", "fisher", "dp-baseline", "eval"])
def test_killed_before_every_file_operation(
    cases: dict[str, Case], commands: Commands, tmp_path: Path, name: str
) -> None:
    total = operations(cases[name], commands, tmp_path)
    killed_at(cases[name], commands, tmp_path / "run", iter(range(1, total + 1)))
