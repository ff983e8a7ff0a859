"""`icsearch fisher` through the command line, on tiny checkpoints: results, tables used again, resume, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import refused, same_result

import tiny
from icsearch.cli import app
from icsearch.runs.record import load_run
from in_process import run

FLIPS = ["--num-shared", 3]


def fisher(model: Path, tokens: Path, out: Path, *more: object) -> list[object]:
    fixed = ["--batch-size", 2, "--threads", 1, "--draws", 2, "--finalists", 4]
    return ["fisher", model, "--calibration", tokens, "--out", out, *fixed, *more]


@pytest.fixture(scope="module")
def finished(glm_checkpoint: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert app._run([str(part) for part in fisher(glm_checkpoint, tokens, out, *FLIPS)], debug=True) == 0
    return out


def document(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "pattern.json").read_text())
    return found


def test_a_run_writes_its_results(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"journal.jsonl", "pattern.json", "curve.csv", "curve.png", "report.html", "fisher.npz"} <= names
    found = document(finished)
    assert found["method"] == "fisher"
    assert found["pattern"].count("S") == 3
    assert [step["step"] for step in found["steps"]] == [1, 2, 3]
    best = {entry["pattern"]: entry for entry in found["frontier"]}[found["pattern"]]
    assert best["loss"] == found["loss"] <= found["steps"][-1]["loss"]
    arrays = np.load(finished / "fisher.npz")
    assert arrays["drawn"].shape == (5, 2, 6, 6)
    assert arrays["true"].shape == (5, 6, 6)


def test_the_pattern_is_the_best_that_was_measured(finished: Path) -> None:
    record = load_run(finished)
    measured = [letters for letters in record.nll if letters.count("S") == 3]
    assert len(measured) >= 4
    assert record.pattern.letters == min(measured, key=record.loss)


def test_another_budget_on_the_same_table(
    capsys: pytest.CaptureFixture[str], finished: Path, glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    """No pass for the table, and the result of a run that makes its own."""
    table = ["--table", finished / "fisher.npz"]
    more = ["--num-shared", 2, "--keep-full", "3", "--objective", "kl"]
    assert run(capsys, *fisher(glm_checkpoint, tokens, tmp_path / "again", *more, *table))[0] == 0
    assert run(capsys, *fisher(glm_checkpoint, tokens, tmp_path / "own", *more))[0] == 0
    assert same_result(tmp_path / "again", tmp_path / "own")
    spared = [document(tmp_path / name)["cost"] for name in ("own", "again")]
    assert spared[1]["table_layer_evaluations"] == 0
    flips = 4 * 6 / 2  # those of layers 1, 2, 4 and 5, at least; and the unmodified model
    assert (
        spared[0]["layer_evaluations"] - spared[1]["layer_evaluations"] > spared[0]["table_layer_evaluations"] + flips
    )
    assert document(tmp_path / "own")["cost"]["table_layer_evaluations"] > 0
    assert 3 in document(tmp_path / "own")["full_layers"]
    own, again = (np.load(tmp_path / name / "fisher.npz") for name in ("own", "again"))
    assert np.array_equal(own["drawn"], again["drawn"])
    (tmp_path / "alone").mkdir()
    for name in ("fisher.npz", "fisher.json"):  # without the journal, flips are measured again
        shutil.copy(finished / name, tmp_path / "alone")
    table = ["--table", tmp_path / "alone" / "fisher.npz"]
    assert run(capsys, *fisher(glm_checkpoint, tokens, tmp_path / "third", *more, *table))[0] == 0
    assert same_result(tmp_path / "third", tmp_path / "own")


def test_draws_follow_the_table(
    capsys: pytest.CaptureFixture[str], finished: Path, glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    arguments = ["fisher", glm_checkpoint, "--calibration", tokens, "--out", tmp_path / "run", "--threads", 1]
    options = ["--batch-size", 2, "--num-shared", 1, "--table", finished / "fisher.npz"]
    assert run(capsys, *arguments, *options)[0] == 0
    assert load_run(tmp_path / "run").start["options"]["draws"] == 2


@pytest.mark.parametrize("kept", [1, 2, 3, 5, 9])
def test_cut_anywhere_and_resumed(
    capsys: pytest.CaptureFixture[str], finished: Path, glm_checkpoint: Path, tokens: Path, tmp_path: Path, kept: int
) -> None:
    """The first event, then one for each batch of the table, then losses."""
    lines = (finished / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "journal.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
    assert run(capsys, *fisher(glm_checkpoint, tokens, tmp_path / "run", *FLIPS))[0] == 0
    assert same_result(finished, tmp_path / "run")


def test_a_finished_run_prints_its_result(
    capsys: pytest.CaptureFixture[str], finished: Path, glm_checkpoint: Path, tokens: Path
) -> None:
    before = (finished / "journal.jsonl").read_bytes()
    status, out, err = run(capsys, *fisher(glm_checkpoint, tokens, finished, *FLIPS))
    assert status == 0
    assert document(finished)["pattern"] in out.replace(" ", "")
    assert "finished" in err
    assert (finished / "journal.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--num-shared", 2], "num_shared 3, now 2"),
        ([*FLIPS, "--draws", 3], "draws 2, now 3"),
        ([*FLIPS, "--finalists", 5], "finalists 4, now 5"),
        ([*FLIPS, "--objective", "kl"], "objective lm-loss, now kl"),
        ([*FLIPS, "--seed", 3], "seed 0, now 3"),
    ],
)
def test_other_options_are_refused(
    capsys: pytest.CaptureFixture[str],
    finished: Path,
    glm_checkpoint: Path,
    tokens: Path,
    more: list[object],
    named: str,
) -> None:
    before = (finished / "journal.jsonl").read_bytes()
    line = refused(capsys, *fisher(glm_checkpoint, tokens, finished, *more))
    assert named in line
    assert "--fresh" in line
    assert (finished / "journal.jsonl").read_bytes() == before


def test_a_run_is_taken_up_by_other_commands(
    capsys: pytest.CaptureFixture[str], finished: Path, glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    status, out, _ = run(capsys, "export", finished, "--engine", "vllm")
    assert status == 0
    assert document(finished)["pattern"] in out
    status, out, _ = run(capsys, "export", finished, "--engine", "vllm", "--retention", "5/6")
    assert status == 0
    frontier = {entry["pattern"].count("F"): entry["pattern"] for entry in document(finished)["frontier"]}
    assert frontier[5] in out
    assert frontier[5] == min(
        (letters for letters in load_run(finished).nll if letters.count("S") == 1), key=load_run(finished).loss
    )
    line = refused(capsys, "export", finished, "--engine", "vllm", "--retention", "1/3")  # uniform alone was measured
    assert "it holds 3 to 6 of 6" in line
    other = tiny.save_tokens(tmp_path / "other", seed=9)
    spec = ["--pattern", finished, "--pattern", f"{finished}@5/6"]
    options = ["--calibration", other, "--threads", 1, "--out", tmp_path / "eval"]
    assert run(capsys, "eval", glm_checkpoint, *spec, *options)[0] == 0
    assert run(capsys, "report", finished, "--out", tmp_path / "page.html")[0] == 0


def test_held_out_sequences(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    heldout = tiny.save_tokens(tmp_path / "heldout", seed=2)
    out = tmp_path / "confirmed"
    assert run(capsys, *fisher(glm_checkpoint, tokens, out, *FLIPS, "--confirm-on", heldout))[0] == 0
    record = load_run(out)
    assert record.heldout is not None
    measured = [letters for letters in record.heldout.nll if letters != record.start_pattern.letters]
    assert record.pattern.letters == min(measured, key=record.heldout.nll.loss)
    refining = ["--refine", "swaps", "--refine-on", heldout]
    assert run(capsys, *fisher(glm_checkpoint, tokens, tmp_path / "swaps", *FLIPS, *refining))[0] == 0
    assert load_run(tmp_path / "swaps").refinement is not None
    both = ["--refine", "swaps", "--refine-on", heldout, "--confirm-on", heldout]
    assert "give one of them" in refused(capsys, *fisher(glm_checkpoint, tokens, tmp_path / "both", *FLIPS, *both))
    same = ["--confirm-on", tokens]
    assert "calibration" in refused(capsys, *fisher(glm_checkpoint, tokens, tmp_path / "same", *FLIPS, *same))


def test_stages(capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tokens: Path, tmp_path: Path) -> None:
    assert run(capsys, *fisher(glm_checkpoint, tokens, tmp_path / "run", *FLIPS, "--stages", 2))[0] == 0
    record = load_run(tmp_path / "run")
    assert len(record.proposals) > 1
    assert all(letters[3] == "F" for some in record.proposals for letters in some)
    assert record.pattern.is_full(3)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--draws", 0], "'--draws': Input should be"),
        (["--finalists", 0], "'--finalists': Input should be"),
        (["--rounds", 0], "'--rounds': Input should be"),
        (["--num-shared", 6], "give --num-shared 5 or less"),
        (["--num-shared", 3, "--keep-full", "1,2,3"], "give --num-shared 2 or less"),
        (["--num-shared", 2, "--table", "nowhere/fisher.npz"], "nowhere/fisher.json"),
        (["--objective", "accuracy"], "give lm-loss or kl"),
    ],
)
def test_bad_requests(
    capsys: pytest.CaptureFixture[str],
    glm_checkpoint: Path,
    tokens: Path,
    tmp_path: Path,
    more: list[object],
    words: str,
) -> None:
    assert words in refused(capsys, *fisher(glm_checkpoint, tokens, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def changed(path: Path, **fields: object) -> None:
    manifest = json.loads((path / "fisher.json").read_text())
    (path / "fisher.json").write_text(json.dumps({**manifest, **fields}))


def rewritten(path: Path, **arrays: Any) -> None:
    with np.load(path / "fisher.npz") as there:
        found = {**{name: there[name] for name in there.files}, **arrays}
    np.savez_compressed(path / "fisher.npz", **{name: array for name, array in found.items() if array is not None})


DAMAGES: dict[str, tuple[Any, str]] = {
    "another model": (lambda p: changed(p, model="0" * 64), "another model"),
    "another calibration": (lambda p: changed(p, calibration="0" * 64), "another calibration"),
    "other draws": (lambda p: changed(p, draws=3), "draws 3, now 2"),
    "another seed": (lambda p: changed(p, seed=5), "seed 5, now 0"),
    "other numerics": (lambda p: changed(p, numerics={"dtype": "bfloat16"}), "dtype bfloat16, now float32"),
    "another version": (lambda p: changed(p, format="icsearch.fisher/9"), "icsearch.fisher/9"),
    "no numerics": (lambda p: changed(p, numerics=None), "numerics"),
    "text for JSON": (lambda p: (p / "fisher.json").write_text("nothing"), "is not JSON"),
    "a cut archive": (lambda p: (p / "fisher.npz").write_bytes((p / "fisher.npz").read_bytes()[:300]), "cannot use"),
    "no archive": (lambda p: (p / "fisher.npz").unlink(), "cannot use"),
    "another size": (lambda p: rewritten(p, drawn=np.zeros((5, 2, 4, 4))), "drawn of"),
    "far too large": (lambda p: rewritten(p, true=np.zeros((5, 600, 600))), "of"),
    "not finite": (lambda p: rewritten(p, true=np.full((5, 6, 6), np.nan)), "true of"),
    "in float32": (lambda p: rewritten(p, true=np.zeros((5, 6, 6), np.float32)), "true of"),
    "without a part": (lambda p: rewritten(p, true=None), "cannot use"),
    "objects": (lambda p: rewritten(p, true=np.array([{}] * 3, dtype=object)), "cannot use"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_table_that_cannot_be_used_is_refused(
    capsys: pytest.CaptureFixture[str],
    finished: Path,
    glm_checkpoint: Path,
    tokens: Path,
    tmp_path: Path,
    damage: str,
) -> None:
    edit, words = DAMAGES[damage]
    (tmp_path / "table").mkdir()
    for name in ("fisher.npz", "fisher.json"):
        shutil.copy(finished / name, tmp_path / "table")
    edit(tmp_path / "table")
    table = ["--num-shared", 2, "--table", tmp_path / "table" / "fisher.npz"]
    line = refused(capsys, *fisher(glm_checkpoint, tokens, tmp_path / "run", *table))
    assert words in line
    assert "leave --table out" in line
    assert not (tmp_path / "run").exists()


def test_sequences_no_longer_than_a_selection(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tmp_path: Path
) -> None:
    short = tiny.save_tokens(tmp_path / "short", length=8)
    assert "index_topk" in refused(capsys, *fisher(glm_checkpoint, short, tmp_path / "run", *FLIPS))


def test_what_is_not_finite_ends_the_run(capsys: pytest.CaptureFixture[str], tokens: Path, tmp_path: Path) -> None:
    model = tiny.save_checkpoint(tmp_path / "model")
    tiny.overflow_in(model, 3)
    status, _, err = run(capsys, *fisher(model, tokens, tmp_path / "run", *FLIPS))
    assert status != 0
    assert "layer" in err.splitlines()[-1]
    assert "sequence" in err.splitlines()[-1]
    assert not load_run(tmp_path / "run").fisher.true
