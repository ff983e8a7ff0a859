"""dp-baseline and eval through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_cli import refused, run

import tiny
from icsearch.core.pattern import Pattern
from icsearch.core.pattern_file import PatternFile
from icsearch.search.dynamic_program import solve


def baseline(model: Path, tokens: Path, out: Path, *more: object) -> list[object]:
    fixed = ["--batch-size", 2, "--threads", 1, "--quiet"]
    return ["dp-baseline", model, "--calibration", tokens, "--out", out, *fixed, *more]


def evaluation(model: Path, tokens: Path, out: Path, *specs: object) -> list[object]:
    patterns = [word for spec in specs for word in ("--pattern", spec)]
    fixed = ["--batch-size", 2, "--threads", 1, "--quiet"]
    return ["eval", model, "--calibration", tokens, "--out", out, *fixed, *patterns]


@pytest.fixture(scope="module")
def searched(glm_checkpoint: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished dp-baseline with 3 of 6 layers F, and a finished greedy beside it."""
    from icsearch.cli import app

    folder = tmp_path_factory.mktemp("searched")
    fixed = ["--num-shared", "3", "--batch-size", "2", "--threads", "1", "--quiet"]
    for command in ("dp-baseline", "greedy"):
        arguments = [command, str(glm_checkpoint), "--calibration", str(tokens), "--out", str(folder / command)]
        assert app._run([*arguments, *fixed], debug=True) == 0
    return folder


def test_dp_baseline_writes_the_contract(searched: Path) -> None:
    out = searched / "dp-baseline"
    assert {"journal.jsonl", "pattern.json", "report.html", "similarity.npz"} <= {p.name for p in out.iterdir()}
    document = json.loads((out / "pattern.json").read_text())
    assert (document["method"], document["steps"]) == ("dp-baseline", [])
    assert document["pattern"].count("F") == 3
    with np.load(out / "similarity.npz") as arrays:
        cosine, overlap = arrays["cosine"], arrays["overlap"]
    assert document["pattern"] == solve(cosine.tolist()).pattern(3).letters
    assert ((overlap >= 0) & (overlap <= 1)).all()
    assert document["loss"] > 0


def test_similarity_is_used_again(
    capsys: pytest.CaptureFixture[str], searched: Path, glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    stored = searched / "dp-baseline" / "similarity.npz"
    arguments = baseline(glm_checkpoint, tokens, tmp_path / "again", "--num-shared", 3, "--similarity", stored)
    assert run(capsys, *arguments)[0] == 0
    first, second = (
        json.loads((out / "pattern.json").read_text()) for out in (searched / "dp-baseline", tmp_path / "again")
    )
    assert first["pattern"] == second["pattern"]
    assert second["cost"]["layer_evaluations"] < first["cost"]["layer_evaluations"]


def test_a_similarity_keeps_the_numerics_that_it_was_measured_with(
    capsys: pytest.CaptureFixture[str], searched: Path, glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    stored = searched / "dp-baseline" / "similarity.npz"
    measured = json.loads(stored.with_suffix(".json").read_text())["numerics"]
    assert (measured["kernels"], measured["block_elements"]) == ("blockwise", 2**19)
    for kernels in ("reference", "blockwise"):
        out = tmp_path / kernels
        more = ["--num-shared", 3, "--similarity", stored, "--kernels", kernels]
        assert run(capsys, *baseline(glm_checkpoint, tokens, out, *more))[0] == 0
        assert json.loads((out / "similarity.json").read_text())["numerics"] == measured
        said = (
            "kernels blockwise, here reference; block_elements 524288, here None" in (out / "report.html").read_text()
        )
        assert said == (kernels == "reference")


def test_similarity_of_another_model_is_refused(
    capsys: pytest.CaptureFixture[str], searched: Path, tokens: Path, tmp_path: Path
) -> None:
    other = tiny.save_checkpoint(tmp_path / "other", seed=9)
    stored = searched / "dp-baseline" / "similarity.npz"
    line = refused(capsys, *baseline(other, tokens, tmp_path / "run", "--similarity", stored))
    assert "belongs to another model" in line
    assert not (tmp_path / "run").exists()
    broken = tmp_path / "similarity.npz"
    shutil.copy(stored, broken)
    assert "similarity.json" in refused(capsys, *baseline(other, tokens, tmp_path / "run", "--similarity", broken))


def test_dp_baseline_keeps_what_must_be_full(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    arguments = baseline(glm_checkpoint, tokens, tmp_path / "run", "--num-shared", 3, "--stages", 2, "--keep-full", 5)
    assert run(capsys, *arguments)[0] == 0
    assert json.loads((tmp_path / "run" / "pattern.json").read_text())["full_layers"] == [0, 3, 5]


def test_dp_baseline_on_native_shared_layers(capsys: pytest.CaptureFixture[str], tokens: Path, tmp_path: Path) -> None:
    types = ["full" if letter == "F" else "shared" for letter in "FFSFFS"]
    native = tiny.save_checkpoint(tmp_path / "native", indexer_types=types)
    assert run(capsys, *baseline(native, tokens, tmp_path / "run", "--num-shared", 1))[0] == 0
    pattern = json.loads((tmp_path / "run" / "pattern.json").read_text())["pattern"]
    assert pattern[2] == pattern[5] == "S"
    assert pattern.count("F") == 3


def test_eval_writes_the_contract(
    capsys: pytest.CaptureFixture[str], searched: Path, glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    specs = ["uniform:1/2", searched / "greedy", searched / "dp-baseline", f"{searched / 'greedy'}@5/6", "FSSSSS"]
    arguments = evaluation(glm_checkpoint, tokens, tmp_path / "eval", *specs)
    status, out, err = run(capsys, *arguments, "--tasks", 1, "--task-length", 420)
    assert status == 0, err
    assert {"eval.json", "eval.csv", "report.html"} <= {path.name for path in (tmp_path / "eval").iterdir()}
    document = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert document["format"] == "icsearch.eval/1"
    rows = {row["name"]: row for row in document["rows"]}
    assert set(rows) == {
        "full",
        "uniform 1/2",
        "greedy",
        "dp-baseline",
        "greedy @5/6",
        "FSSSSS",
    }
    searched_loss = json.loads((searched / "greedy" / "pattern.json").read_text())["loss"]
    assert rows["greedy"]["loss"] == searched_loss  # the same batches: the same bits
    assert rows["greedy"]["in_sample"]
    assert not rows["uniform 1/2"]["in_sample"]
    assert {task["kind"] for task in rows["full"]["tasks"]} == {"recall", "chains", "needles"}
    assert "in-sample" in out


def test_eval_continues_and_refuses_other_options(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    out = tmp_path / "eval"
    assert run(capsys, *evaluation(glm_checkpoint, tokens, out, "uniform:1/2"))[0] == 0
    whole = json.loads((out / "eval.json").read_text())
    lines = (out / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (out / "journal.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:50])  # killed in the middle of the second batch
    assert run(capsys, *evaluation(glm_checkpoint, tokens, out, "uniform:1/2"))[0] == 0
    again = json.loads((out / "eval.json").read_text())
    assert again["rows"] == whole["rows"]
    assert "patterns" in refused(capsys, *evaluation(glm_checkpoint, tokens, out, "uniform:1/4"))


BAD_SPECS = {
    "wrong length": ("FSS", "3 letters, the model has 6"),
    "other letters": ("FSXFSF", "'X' at position 2"),
    "first layer S": ("SFFFFF", "starts with S"),
    "unknown spec": ("sideways", "unknown pattern"),
    "published of another model": ("published:glm-5-1-4", "belongs to another model"),
    "unknown published": ("published:nobody", "known are"),
    "retention not reached": ("@1/6", "holds 3 to 6 of 6"),
    "no such file": ("nowhere/pattern.json", "unknown pattern"),
}


@pytest.mark.parametrize("case", BAD_SPECS)
def test_bad_specs(
    capsys: pytest.CaptureFixture[str], searched: Path, glm_checkpoint: Path, tokens: Path, tmp_path: Path, case: str
) -> None:
    spec, expected = BAD_SPECS[case]
    spec = f"{searched / 'greedy'}{spec}" if spec.startswith("@") else spec
    assert expected in refused(capsys, *evaluation(glm_checkpoint, tokens, tmp_path / "eval", spec))
    assert not (tmp_path / "eval").exists()


def test_pattern_of_another_model_type(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    foreign = PatternFile(Pattern("FSFSFS"), tuple(range(6)), "greedy", model={"model_type": "deepseek_v32"})
    foreign.save(tmp_path / "foreign.json")
    arguments = evaluation(glm_checkpoint, tokens, tmp_path / "eval", tmp_path / "foreign.json")
    assert "use --force" in refused(capsys, *arguments)
    assert run(capsys, *arguments, "--force")[0] == 0
    rows = json.loads((tmp_path / "eval" / "eval.json").read_text())["rows"]
    assert [row["foreign"] for row in rows] == [False, True]


def test_full_of_a_native_shared_layer(capsys: pytest.CaptureFixture[str], tokens: Path, tmp_path: Path) -> None:
    native = tiny.save_checkpoint(tmp_path / "native", indexer_types=["full", "full", "shared"] * 2)
    line = refused(capsys, *evaluation(native, tokens, tmp_path / "eval", "FSFSFS"))
    assert "asks F of layer 2" in line


def test_report_of_all_kinds_of_runs(
    capsys: pytest.CaptureFixture[str], searched: Path, glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    assert run(capsys, *evaluation(glm_checkpoint, tokens, tmp_path / "eval", "uniform:1/2"))[0] == 0
    page = tmp_path / "page.html"
    runs = [tmp_path / "eval", searched / "greedy", searched / "dp-baseline"]
    assert run(capsys, "report", *runs, "--out", page)[0] == 0
    assert "uniform 1/2" in page.read_text()


def test_measure_and_contexts(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    arguments = evaluation(glm_checkpoint, tokens, tmp_path / "eval", "FSSSSS")
    assert run(capsys, *arguments, "--context", 4000, "--measure", 16)[0] == 0
    document = json.loads((tmp_path / "eval" / "eval.json").read_text())
    (costs,) = document["cost_rows"]
    assert [row["context"] for row in costs["rows"]] == [4000]
    assert costs["rows"][0]["removed_share"] == pytest.approx(5 / 6)
    assert {timing["length"] for timing in document["measured"]} == {16}


def test_tasks_that_do_not_fit_are_refused_before_anything_runs(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    arguments = evaluation(glm_checkpoint, tokens, tmp_path / "eval", "FSSSSS")
    assert "--task-length" in refused(capsys, *arguments, "--tasks", 1)
    assert not (tmp_path / "eval").exists()


def test_report_on_an_unfinished_evaluation(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    out = tmp_path / "eval"
    assert run(capsys, *evaluation(glm_checkpoint, tokens, out, "FSSSSS"))[0] == 0
    (out / "eval.json").unlink()
    line = refused(capsys, "report", out, "--out", tmp_path / "page.html")
    assert "an evaluation that is not finished" in line
    assert str(out) in line


def test_one_sequence_can_be_reported(capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tmp_path: Path) -> None:
    tokens = tiny.save_tokens(tmp_path / "one", sequences=1)
    out = tmp_path / "eval"
    assert run(capsys, *evaluation(glm_checkpoint, tokens, out, "FSSSSS"))[0] == 0
    assert json.loads((out / "eval.json").read_text())["rows"][1]["std_err"] is None
    assert run(capsys, "report", out, "--out", tmp_path / "page.html")[0] == 0


def test_what_would_fail_late_is_refused_early(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    arguments = evaluation(glm_checkpoint, tokens, tmp_path / "eval", "FSSSSS")
    assert "smaller --measure" in refused(capsys, *arguments, "--measure", 100_000)
    assert "smaller --measure or --task-length" in refused(capsys, *arguments, "--tasks", 1, "--task-length", 510)
    assert not (tmp_path / "eval").exists()
