"""Killed at any moment, again and again: the end is that of an undisturbed run, to the last bit."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fault_harness import Case, Commands, count_operations, kill_at_operation, outcome, scored_twice, whole_lines

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def disturbed(case: Case, commands: Commands, out: Path, seed: int, seconds: float) -> int:
    """Signals at random moments, each time a little later on average, until a run ends; returns how many it took."""
    chance, signals = random.Random(seed), 0
    while True:
        known = whole_lines(out)
        running = commands.start(case.into(out))
        ends = time.monotonic() + chance.uniform(0, seconds) * (1 + signals / 4)
        running.until(lambda ends=ends: time.monotonic() >= ends)  # type: ignore[misc]
        if not running.alive:
            break
        running.send(chance.choice(SIGNALS))
        running.end()
        signals += 1
        assert whole_lines(out).startswith(known)
    assert running.end().status == 0
    return signals


def seconds_of(case: Case, commands: Commands, out: Path) -> float:
    started = time.monotonic()
    assert commands.run(case.into(out)).status == 0
    return time.monotonic() - started


def test_signals_at_random_moments(cases: dict[str, Case], commands: Commands, tmp_path: Path) -> None:
    case = cases["greedy"]
    seconds = seconds_of(case, commands, tmp_path / "whole")
    assert disturbed(case, commands, tmp_path / "run", seed=7, seconds=seconds / 2) >= 1
    assert outcome(tmp_path / "run") == case.outcome
    assert not scored_twice(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["greedy", "dp-baseline", "eval"])
def test_signals_at_many_random_moments(cases: dict[str, Case], commands: Commands, tmp_path: Path, name: str) -> None:
    case = cases[name]
    seconds, total = seconds_of(case, commands, tmp_path / "whole"), 0
    for seed in range(6):
        total += disturbed(case, commands, tmp_path / f"run{seed}", seed, seconds / 4)
        assert outcome(tmp_path / f"run{seed}") == case.outcome
    assert total >= 12


# --- before each operation on a file ----------------------------------------------------------------------------------


def operations(case: Case, commands: Commands, tmp_path: Path) -> int:
    """How many operations on files in its RUN a command does in all."""
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
    """Three of them: while the calibration is written, between events, while the results are written."""
    total = operations(cases["greedy"], commands, tmp_path)
    assert total > 30
    moments = [random.Random(3).randrange(third * total // 3, (third + 1) * total // 3) + 1 for third in range(3)]
    killed_at(cases["greedy"], commands, tmp_path / "run", iter(moments))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["greedy", "dp-baseline", "eval"])
def test_killed_before_every_file_operation(
    cases: dict[str, Case], commands: Commands, tmp_path: Path, name: str
) -> None:
    total = operations(cases[name], commands, tmp_path)
    killed_at(cases[name], commands, tmp_path / "run", iter(range(1, total + 1)))
