"""Processes that come together, or wait for some that never come: said at once, and ended by a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from icsearch.sweep.distributed import world
from icsearch.sweep.distributed.launch import Launch
from several import free_port

EVAL = ["eval", "demo", "--pattern", "uniform:1/4", "--calibration", "demo", "--num-sequences", "1"]


def variables(rank: int = 0) -> dict[str, str]:
    """What a launcher leaves behind, or sets before its other processes have come."""
    launcher = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "RANK": str(rank)}
    return {**os.environ, **launcher, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["export", "published:glm-5-1-4", "--engine", "vllm"], ["plan", "demo"], ["eval", "--help"]],
)
def test_what_needs_no_others_waits_for_none(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "icsearch", *arguments]
    done = subprocess.run(command, env=variables(), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0
    assert "waits for" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("rank", "words"), [(0, "rank 0 of 2 waits for rank 1;"), (1, "rank 1 of 2 waits for the store")]
)
def test_a_wait_is_told_and_ended_by_a_signal(tmp_path: Path, rank: int, words: str, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "icsearch", *EVAL, "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, env=variables(rank), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        said = process.stderr.readline()
        process.send_signal(number)
        rest = process.communicate(timeout=60)[1]  # not by the deadline of the wait, which is 300 seconds
    assert said.startswith(f"note: {words}") and "unset it to run alone" in said
    assert process.returncode == 128 + number
    assert rest.count("\n") <= 1


@pytest.mark.parametrize(("rank", "prints"), [(0, True), (1, False)])
def test_a_launcher_runs_what_needs_no_others_once(rank: int, prints: bool) -> None:
    environment = {**variables(rank), "TORCHELASTIC_RUN_ID": "x"}
    command = [sys.executable, "-m", "icsearch", "plan", "demo"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert bool(done.stdout) is prints


def test_who_is_waited_for_is_those_who_are_missing_when_it_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "QUIET", 0.0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    missing = ["1", "2"]
    waiting = world._Waiting(Launch(0, 3), lambda: f"rank {', '.join(missing)}")
    missing.remove("1")
    waiting.check()
    waiting.check()
    assert capsys.readouterr().err == "note: rank 0 of 3 waits for rank 2\n"  # and no word of running alone
