"""What a run reads of its own that is cut off: it is made again where that can be, else refused in one line."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fault_harness import Case, Commands, outcome, whole_lines

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def begun(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A greedy run that was killed behind its first losses."""
    folder = tmp_path_factory.mktemp("begun")
    running = Commands(folder / "output").stopped(cases["greedy"].into(folder / "run"), folder / "run", 3)
    assert running.send(signal.SIGKILL).end().status == -signal.SIGKILL
    return folder / "run"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_journal(path: Path) -> None:
    """In the middle of its last event."""
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"\n", 0, -1) + 40])


def zero_tail(path: Path) -> None:
    """Zeros in place of a part of the last event, as some file systems leave them after a power cut."""
    data = path.read_bytes()
    start = data.rindex(b"\n", 0, -1) + 40
    path.write_bytes(data[:start] + bytes(len(data) - start - 5) + data[-5:])


@pytest.mark.parametrize(
    ("name", "harm_journal"), [("calibration.safetensors", cut_journal), ("calibration.json", zero_tail)]
)
def test_cut_files_of_a_run_are_made_again(
    begun: Path,
    cases: dict[str, Case],
    commands: Commands,
    tmp_path: Path,
    name: str,
    harm_journal: Callable[[Path], None],
) -> None:
    """A part of its calibration, and the end of its journal: one event is lost."""
    case, out = cases["greedy"], tmp_path / "run"
    shutil.copytree(begun, out)
    (out / "journal.jsonl").write_bytes(whole_lines(begun))
    cut(out / "calibration" / name)
    harm_journal(out / "journal.jsonl")
    ended = commands.run(case.into(out))
    assert ended.status == 0, ended.err
    assert f"continuing {out}" in ended.err
    assert whole_lines(out).startswith(b"".join(whole_lines(begun).splitlines(keepends=True)[:-1]))
    assert outcome(out) == case.outcome
    for file in ("calibration.safetensors", "calibration.json"):
        assert (out / "calibration" / file).read_bytes() == (case.finished / "calibration" / file).read_bytes()


def test_own_tokens_that_are_cut_are_brought_again(
    begun: Path, cases: dict[str, Case], commands: Commands, tmp_path: Path, glm_checkpoint: Path
) -> None:
    """The same tokens as ready ones: nobody but the user can make them again; until then the run stays as it is."""
    case, own, out = cases["greedy"], tmp_path / "own", tmp_path / "run"
    own.mkdir(), out.mkdir()
    tokens, before = own / "calibration.safetensors", whole_lines(begun)
    (out / "journal.jsonl").write_bytes(before)
    shutil.copy(case.finished / "calibration" / "calibration.safetensors", tokens)
    data = tokens.read_bytes()
    cut(tokens)
    fixed = ["--batch-size", 4, "--threads", 1, "--num-shared", 3]
    command = ["greedy", glm_checkpoint, "--calibration", own, *fixed, "--out", out]
    refused = commands.run(command)
    assert refused.status == 2
    assert refused.last_line.startswith(f"icsearch: {tokens} is damaged or cannot be read")
    assert whole_lines(out) == before
    tokens.write_bytes(data)
    assert commands.run(command).status == 0
    assert whole_lines(out).startswith(before)
    assert outcome(out) == case.outcome


def test_a_cut_similarity_is_refused_and_written_again(
    cases: dict[str, Case], commands: Commands, tmp_path: Path
) -> None:
    case, out = cases["dp-baseline"], tmp_path / "run"
    shutil.copytree(case.finished, out)
    for name in ("similarity.npz", "pattern.json", "report.html"):
        cut(out / name)
    refused = commands.run([*case.into(tmp_path / "other"), "--similarity", out / "similarity.npz"])
    assert refused.status == 2
    assert refused.last_line.startswith(f"icsearch: cannot use {out / 'similarity.npz'}")
    ended = commands.run(case.into(out))
    assert ended.status == 0, ended.err
    with np.load(out / "similarity.npz") as now, np.load(case.finished / "similarity.npz") as then:
        assert all(np.array_equal(now[name], then[name]) for name in ("cosine", "overlap"))
    assert outcome(out) == case.outcome
