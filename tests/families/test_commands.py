"""The commands on every family: a search, the similarity baseline, an evaluation, batches, a plan, streamed weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from family_batches import Made
from test_bits import LAYERS

import tiny
import tiny_families
from icsearch.cli import app
from icsearch.core.pattern import Pattern
from icsearch.model import loading
from icsearch.model.checkpoint import open_checkpoint
from icsearch.sweep.branches import cut_batches
from icsearch.sweep.sweep import naive_nll
from in_process import run

KEPT = {"deepseek_v4": 15, "glm5_next": 9, "minimax_m3_vl": 12, "qwen4_exp": 9}  # others: index_topk, 8
BLOCKWISE = {"axk2", "deepseek_v32", "dots3_note", "glm_moe_dsa", "mistral_large4"}
PLANNED = BLOCKWISE - {"dots3_note"}  # all layers of one kind
QUICK = "hy_v4"  # states in several streams, and transformers' own arithmetic
one_quickly = pytest.mark.parametrize(
    "family",
    [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(tiny_families.CONFIGS)],
    indirect=True,
    scope="session",
)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a refusal, exit 2."""
    status, _, err = run(capsys, *arguments)
    assert status == 2, err
    (line,) = [line for line in err.splitlines() if line.startswith("icsearch: ")]
    return line


def fixed(model: Path, tokens: Path, out: Path, *more: object) -> list[object]:
    return [model, "--calibration", tokens, "--out", out, "--batch-size", 2, "--threads", 1, *more]


def pattern_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "pattern.json").read_text())


@pytest.fixture(scope="module")
def searched(checkpoint: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search that shares two layers."""
    out = tmp_path_factory.mktemp("searched") / "run"
    arguments = ["greedy", *fixed(checkpoint, tokens, out, "--num-shared", 2)]
    assert app._run([str(one) for one in arguments], debug=False) == 0
    return out


def test_greedy(checkpoint: Path, family: str, tokens: Path, searched: Path) -> None:
    """The pattern's loss is that of whole forwards, and layers are named as the model counts them."""
    document = pattern_of(searched)
    layers = LAYERS.get(family, (0, 1, 2, 3))
    assert document["num_layers"] == len(document["pattern"]) == len(layers)
    assert document["layer_indices"] == list(layers)
    assert document["model"]["model_type"] == family
    options = json.loads((searched / "journal.jsonl").read_text().splitlines()[0])["options"]
    assert options["kernels"] == ("blockwise" if family in BLOCKWISE else "reference")
    dsa = loading.load(open_checkpoint(str(checkpoint)), block_elements=options.get("block_elements"))
    ids = torch.from_numpy(_tokens(tokens))
    batches = cut_batches(ids, torch.ones_like(ids, dtype=torch.bool), 2)
    for loss, letters in ((document["baseline_loss"], "F" * len(layers)), (document["loss"], document["pattern"])):
        assert loss == sum(naive_nll(dsa, Pattern(letters), batches)) / (ids.numel() - len(ids))


def _tokens(directory: Path) -> Any:
    from safetensors.numpy import load_file

    return load_file(directory / "calibration.safetensors")["input_ids"]


@one_quickly
def test_streamed_weights_give_the_same_run(
    checkpoint: Path, family: str, tokens: Path, searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "streamed"
    arguments = fixed(checkpoint, tokens, out, "--num-shared", 2, "--offload", "disk")
    status, _, err = run(capsys, "greedy", *arguments)
    assert status == 0, err
    assert ("unknown for this family" in " ".join(err.split())) == (family not in BLOCKWISE)
    for document in (resident := pattern_of(searched), streamed := pattern_of(out)):
        document.pop("cost")
    assert streamed == resident


@pytest.mark.parametrize(("family", "known"), [("deepseek_v4", False), ("mistral_large4", True)])
def test_a_budget_that_is_too_small_says_whether_it_is_a_guess(
    made: Made, family: str, known: bool, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = fixed(made(family), tokens, tmp_path / "r", "--num-shared", 1, "--memory", "50kB", "--offload", "none")
    line = refused(capsys, "greedy", *arguments)
    assert "memory budget 50.0 kB is too small" in line
    assert ("unknown for this family" in line) == (not known)


@one_quickly
def test_dp_baseline(checkpoint: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "dp"
    status, _, err = run(capsys, "dp-baseline", *fixed(checkpoint, tokens, out, "--num-shared", 1))
    assert status == 0, err
    document = pattern_of(out)
    assert document["method"] == "dp-baseline"
    assert document["pattern"].count("S") == 1
    assert (out / "similarity.npz").exists()


def test_eval(
    checkpoint: Path, tokens: Path, searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "eval"
    specs = ["--pattern", searched, "--pattern", "uniform:1/2"]
    status, _, err = run(capsys, "eval", *fixed(checkpoint, tokens, out, *specs))
    assert status == 0, err
    document = json.loads((out / "eval.json").read_text())
    rows = {row["name"]: row for row in document["rows"]}
    found, searched_row = pattern_of(searched), next(row for name, row in rows.items() if "run" in name)
    assert searched_row["loss"] == found["loss"]
    assert searched_row["kl"] > 0
    assert (out / "report.html").exists()


def test_cost_is_counted_or_said_not_to_be(
    checkpoint: Path, family: str, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", *fixed(checkpoint, tokens, tmp_path / "e", "--pattern", "uniform:1/2", "--context", 1000)]
    if family in BLOCKWISE:
        assert run(capsys, *arguments)[0] == 0
    else:
        assert "is not counted here" in (line := refused(capsys, *arguments)) or "the cost is counted for" in line
        assert not (tmp_path / "e" / "journal.jsonl").exists()


def test_plan(checkpoint: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    """From the config alone: only where all layers are DSA layers with the block-wise arithmetic."""
    arguments = ["plan", checkpoint / "config.json", "--num-sequences", 4, "--seq-len", 64]
    if family in PLANNED:
        status, out, err = run(capsys, *arguments)
        assert status == 0, err
        assert family in out
    else:
        assert "planned for" in refused(capsys, *arguments)


def test_calibrate(checkpoint: Path, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sequences are longer than what a selection keeps, by default four times."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log\n" * 200)
    out, kept = tmp_path / "batches", KEPT.get(family, 8)
    assert run(capsys, "calibrate", checkpoint, text, "--out", out, "--num-sequences", 2)[0] == 0
    assert _tokens(out).shape == (2, 256)
    line = refused(capsys, "calibrate", checkpoint, text, "--out", tmp_path / "b", "--seq-len", kept)
    assert f"sequences of {kept} tokens are not longer" in line
    arguments = ["calibrate", checkpoint, text, "--out", tmp_path / "c", "--seq-len", kept + 1, "--num-sequences", 2]
    assert run(capsys, *arguments)[0] == 0


@pytest.mark.slow
def test_a_search_where_no_query_chooses_is_refused(
    checkpoint: Path, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = KEPT.get(family, 8)
    short = tiny.save_tokens(tmp_path / "short", sequences=2, length=kept)
    line = refused(capsys, "greedy", *fixed(checkpoint, short, tmp_path / "run", "--num-shared", 1))
    assert f"sequences of {kept} tokens are not longer" in line
    assert "blocks" in line or "entries" in line or "pools" in line or family not in KEPT
    shutil.rmtree(tmp_path / "short")
    enough = tiny.save_tokens(tmp_path / "enough", sequences=2, length=kept + 1)
    assert run(capsys, "greedy", *fixed(checkpoint, enough, tmp_path / "run", "--num-shared", 1))[0] == 0


@pytest.mark.slow
def test_blockwise_kernels_are_refused_where_they_are_not_the_models_own(
    checkpoint: Path, family: str, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["greedy", *fixed(checkpoint, tokens, tmp_path / "r", "--num-shared", 1, "--kernels", "blockwise")]
    if family in BLOCKWISE:
        assert run(capsys, *arguments)[0] == 0
    else:
        assert family in refused(capsys, *arguments)
