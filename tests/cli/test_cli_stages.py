"""Stages of a checkpoint with native S layers: what a run says beforehand, and that doing so can be served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import greedy, refused, run

import tiny

Capture = pytest.CaptureFixture[str]
BLOCK = "block 2 of --stages 2 begins with layer 4, which the checkpoint itself shares"
FIXED = ("--num-shared", 2, "--stages", 2)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 layers, of which the fifth has no indexer: the second of two blocks begins there."""
    types = ["shared" if layer == 4 else "full" for layer in range(8)]
    return tiny.save_checkpoint(tmp_path_factory.mktemp("native"), num_hidden_layers=8, indexer_types=types)


def flat(text: str) -> str:
    return " ".join(text.split())


def journal_notes(run_directory: Path) -> list[str]:
    events = [json.loads(line) for line in (run_directory / "journal.jsonl").read_text().splitlines()]
    return [event["text"] for event in events if event["event"] == "note"]


def test_a_search_says_which_block_cannot_begin_on_f(
    native: Path, tokens: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "run"
    status, _, err = run(capsys, *greedy(native, tokens, out, *FIXED))
    assert status == 0, err
    assert BLOCK in flat(err)
    assert sum(BLOCK in note for note in journal_notes(out)) == 1
    assert BLOCK in flat((out / "report.html").read_text())
    told = refused(capsys, "export", out, "--engine", "vllm", "--serve-pp", 2)
    assert "the checkpoint shares layer 4 itself, which cannot be F" in told
    status, _, err = run(capsys, "export", out, "--engine", "vllm", "--serve-pp", "0,3")  # as the note says
    assert status == 0, err


def test_what_the_note_asks_for_needs_no_repair(native: Path, tokens: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "run"
    assert run(capsys, *greedy(native, tokens, out, *FIXED, "--keep-full", 3))[0] == 0
    assert 3 in json.loads((out / "pattern.json").read_text())["full_layers"]
    status, _, err = run(capsys, "export", out, "--engine", "vllm", "--serve-pp", "0,3")
    assert status == 0 and "would start on S" not in err


def test_the_baseline_and_a_plan_say_so_too(native: Path, tokens: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = ["--calibration", tokens, "--out", tmp_path / "run", "--batch-size", 2, "--threads", 1]
    status, _, err = run(capsys, "dp-baseline", native, *arguments, *FIXED)
    assert status == 0, err
    assert BLOCK in flat(err) and any(BLOCK in note for note in journal_notes(tmp_path / "run"))
    status, out, err = run(capsys, "plan", native, *FIXED)
    assert (status, err) == (0, "") and BLOCK in flat(out)


def test_without_native_s_layers_nothing_is_said(
    glm_checkpoint: Path, tokens: Path, tmp_path: Path, capsys: Capture
) -> None:
    status, _, err = run(capsys, *greedy(glm_checkpoint, tokens, tmp_path / "run", *FIXED))
    assert status == 0 and "begins with layer" not in flat(err)
    assert not any("begins with layer" in note for note in journal_notes(tmp_path / "run"))
