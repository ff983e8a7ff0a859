"""`icsearch export --checkpoint`: what it prints, refuses and leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import refused, run

from icsearch.core.files import demo_checkpoint, published_patterns

DEMO = published_patterns() / "demo-greedy.json"


def test_the_demo_with_its_pattern(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, err = run(
        capsys, "export", DEMO, "--checkpoint", tmp_path / "out", "--retention", "1/2", "--drop-indexers"
    )
    assert status == 0, err
    assert "copying: 0 shards linked (0 B), 1 shard rewritten (8.0 MB), 4 files copied" in err
    assert "indexer_types, index_topk_pattern, use_index_cache written" in out
    assert "40 indexer tensors left out: 155.1 kB saved" in out
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {*(path.name for path in demo_checkpoint().iterdir() if path.is_file()), "pattern.json"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["index_topk_pattern"] == "FFSFSSFSFSSFFFSS"


def test_one_of_engine_and_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "needs one of --engine NAME and --checkpoint OUT" in refused(capsys, "export", DEMO)
    for option in (["--drop-indexers"], ["--model", "demo"], ["--other-weights"], ["--checkpoint", tmp_path / "out"]):
        line = refused(capsys, "export", DEMO, "--engine", "vllm", *option)
        assert f"--engine and {option[0]} both say what to export: give one of them" in line
    of_engines = [["--repair", "add"], ["--repair", "x"], ["--serve-pp", "2"], ["--gguf", "x"], ["--out", "x"]]
    for option in [*of_engines, ["--model-config", "x"]]:
        line = refused(capsys, "export", DEMO, "--checkpoint", tmp_path / "out", *option)
        assert f"{option[0]} and --checkpoint both say what to export: give one of them" in line
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_taken(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    assert "is not empty" in refused(capsys, "export", DEMO, "--checkpoint", tmp_path / "taken")
    assert "is a file" in refused(capsys, "export", DEMO, "--checkpoint", tmp_path / "taken" / "notes.txt")
    assert "lies inside of the checkpoint" in refused(capsys, "export", DEMO, "--checkpoint", demo_checkpoint() / "x")
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "notes.txt"]
    assert not (demo_checkpoint() / "x").exists()
