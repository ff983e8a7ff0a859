"""A copy of a checkpoint that is disturbed: under its name there is nothing, or all of it."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import pytest

from fault_harness import Commands, count_operations, kill_at_operation
from icsearch.core.files import published_patterns
from test_faults_disk import limit_file_size
from test_faults_moments import ENDS, end_after

pytestmark = pytest.mark.alone


def export(out: Path) -> list[object]:
    pattern = published_patterns() / "demo-greedy.json"
    return ["export", pattern, "--checkpoint", out, "--retention", "1/2", "--drop-indexers"]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_operations_on_files(commands: Commands, tmp_path: Path, every: int) -> None:
    place = tmp_path / "place"
    place.mkdir()
    assert commands.run(export(place / "whole"), count_operations(place, tmp_path / "count")).status == 0
    whole, count = contents(place / "whole"), int((tmp_path / "count").read_text())
    assert count > 10
    for number in range(1, count + 1, every):
        out = place / "out"
        ended = commands.run(export(out), kill_at_operation(number, place))
        assert ended.status == -signal.SIGKILL
        assert not out.exists() or contents(out) == whole
        if out.exists():  # killed behind the renaming
            out.rename(place / f"whole-{number}")
    assert commands.run(export(place / "out")).status == 0
    assert contents(place / "out") == whole
    assert not [path.name for path in place.iterdir() if path.name.startswith(".")]


def test_ended_by_a_signal(commands: Commands, tmp_path: Path) -> None:
    """Wherever it is then: it leaves nothing beside OUT, or is done."""
    place = tmp_path / "place"
    for number in (signal.SIGTERM, signal.SIGINT):
        for moment in (0.01, 0.04, 0.1):
            ended = commands.run(export(place / f"{number}-{moment}"), partial(end_after, moment, number))
            assert ended.status in (0, *ENDS[number]), ended.err
            assert "Traceback" not in ended.err
            assert "Exception ignored" not in ended.err
            if place.exists():
                assert not [path.name for path in place.iterdir() if path.name.startswith(".")]


def test_a_file_that_may_not_grow(commands: Commands, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    ended = commands.run(export(place / "out"), partial(limit_file_size, 10**6))
    assert ended.status == 1
    assert ended.last_line.startswith("icsearch: the disk is full (File too large")
    assert "model.safetensors" in ended.last_line
    assert list(place.iterdir()) == []
    assert commands.run(export(place / "out")).status == 0
