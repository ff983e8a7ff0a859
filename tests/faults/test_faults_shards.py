"""A shard that cannot be read any more in mid-run, while layers are streamed: one line, and the run goes on later."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from fault_harness import Commands, outcome, scored_twice, whole_lines

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 layers in several shards."""
    return tiny.save_checkpoint(tmp_path_factory.mktemp("sharded"), num_hidden_layers=7)


@pytest.fixture(scope="module")
def arguments(tokens: Path) -> list[object]:
    fixed = ["--batch-size", 2, "--threads", 1, "--num-shared", 2]
    return ["--calibration", tokens, *fixed]


@pytest.fixture(scope="module")
def resident(sharded: Path, arguments: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run with all weights in memory."""
    folder = tmp_path_factory.mktemp("resident")
    ended = Commands(folder / "output").run(
        ["greedy", sharded, *arguments, "--offload", "none", "--out", folder / "run"]
    )
    assert ended.status == 0, ended.err
    return folder / "run"


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace(path: Path) -> None:
    """Another file of the same length takes its name: its weights must not be taken for the run's."""
    other = path.with_suffix(".new")
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (cut, "it is not the file any more"),
    "gone": (Path.unlink, "No such file"),
    "replaced": (replace, "it is not the file any more"),
}


@pytest.mark.parametrize(
    "damage", ["cut", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gone", "replaced"))]
)
def test_a_shard_that_is_lost_in_mid_run(
    sharded: Path, arguments: list[object], resident: Path, commands: Commands, tmp_path: Path, damage: str
) -> None:
    """The run is stopped for as long as the damage takes."""
    copy, out = Path(shutil.copytree(sharded, tmp_path / "model")), tmp_path / "run"
    shard = sorted(copy.glob("*.safetensors"))[-2]
    whole, (harm, reason) = shard.read_bytes(), DAMAGE[damage]
    command = ["greedy", copy, *arguments, "--offload", "disk", "--out", out]
    running = commands.stopped(command, out, 3)
    harm(shard)
    ended = running.send(signal.SIGCONT).end()
    assert ended.status == 1, ended.err
    assert ended.last_line.startswith(f"icsearch: shard {shard.name} of {copy} cannot be read ({reason}")
    before = whole_lines(out)
    shard.write_bytes(whole)
    again = commands.run(command)
    assert again.status == 0, again.err
    assert whole_lines(out).startswith(before)
    assert same_but_for_names(outcome(out), outcome(resident))
    assert not scored_twice(out)


def same_but_for_names(first: dict[str, object], second: dict[str, object]) -> bool:
    """The checkpoint of one run is a copy of the other's."""
    for one in (first, second):
        del one["pattern.json"]["model"]["name_or_path"]  # type: ignore[index]
    return first == second
