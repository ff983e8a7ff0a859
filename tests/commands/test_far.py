"""`icsearch calibrate --count far`: which tokens are far, against the slow twin; and eval on them beside all tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import icsearch
from icsearch.calibration import cache
from icsearch.calibration.far import far_gains, short_pieces, short_sequences
from icsearch.cli import app
from icsearch.commands import calibrate
from icsearch.core.errors import CalibrationError, NonFiniteLossError
from icsearch.core.pattern import Pattern
from icsearch.model import loading
from icsearch.model.checkpoint import open_checkpoint
from icsearch.report.write import model_card
from icsearch.sweep.branches import device_batches
from icsearch.sweep.sweep import naive_nll
from tiny import save_checkpoint, save_tokens

NEAR, LENGTH = 8, 40  # the tiny checkpoint's index_topk
NUMERICS = {"dtype": "float32", "batch_size": 2, "threads": 1, "kernels": "reference"}


@given(st.integers(1, 20), st.integers(1, 200))
def test_every_far_position_is_judged_once(near: int, more: int) -> None:
    seq_len = 2 * near + more
    pieces = short_pieces(seq_len, near)
    judged = [position for _, first in pieces for position in range(first, min(first + near, seq_len))]
    assert judged == list(range(2 * near, seq_len))
    for start, first in pieces:
        last = min(first + near, seq_len) - 1
        assert start >= 0 and last < start + 2 * near <= seq_len
        assert near <= first - start < 2 * near


def naive_far(checkpoint: Path, tokens: np.ndarray, gain: float) -> np.ndarray:
    """Token by token: one whole forward each, of the sequence and of the piece that judges it."""
    dsa = loading.load(open_checkpoint(str(checkpoint)))

    @torch.inference_mode()
    def losses(ids: np.ndarray) -> torch.Tensor:
        batch = torch.from_numpy(ids)[None]
        logits = dsa.lm_head(dsa.final_hidden_states(batch, dsa.start_pattern)).float()[0, :-1]
        return torch.nn.functional.cross_entropy(logits, batch[0, 1:], reduction="none")

    far = np.zeros(tokens.shape, dtype=bool)
    for row, ids in enumerate(tokens):
        whole = losses(ids)
        for position in range(2 * NEAR, len(ids)):
            start = min(position // NEAR * NEAR - NEAR, len(ids) - 2 * NEAR)
            alone = losses(ids[start : start + 2 * NEAR])
            far[row, position] = alone[position - start - 1] - whole[position - 1] > gain
    return far


def test_far_tokens_are_those_of_the_slow_twin(glm_checkpoint: Path, tmp_path: Path) -> None:
    tokens = save_tokens(tmp_path / "tokens", sequences=4, length=LENGTH)
    made = icsearch.calibrate(glm_checkpoint, tokens, tmp_path / "far", count="far", far_gain=0.5, **NUMERICS)
    expected = naive_far(glm_checkpoint, made.input_ids, 0.5)
    assert 0 < expected.sum() < expected.size / 2
    assert (made.loss_mask == expected).all()
    assert (cache.load(tmp_path / "far").loss_mask == expected).all()
    assert (made.input_ids == cache.load(tokens).input_ids).all()


def test_a_gain_of_the_nearest_tokens_alone_is_none() -> None:
    ids = np.arange(2 * LENGTH).reshape(2, LENGTH)
    short = short_sequences(ids, NEAR).astype(float)[:, 1:]
    gains = far_gains(ids[:, 1:].astype(float), short, NEAR)
    assert (gains[:, 2 * NEAR :] == 0.0).all() and (gains[:, : 2 * NEAR] == -np.inf).all()
    assert (far_gains(ids[:, 1:] - 1.0, short, NEAR)[:, 2 * NEAR :] == 1.0).all()


def test_a_cache_of_far_tokens_is_found_again_and_not_taken_for_another(glm_checkpoint: Path, tmp_path: Path) -> None:
    asked = {"seq_len": LENGTH, "num_sequences": 3, **NUMERICS}
    far = {"count": "far", "far_gain": 0.2}
    first = icsearch.calibrate(glm_checkpoint, "demo", tmp_path / "c", **asked, **far)
    stamp = (tmp_path / "c" / "calibration.safetensors").stat().st_mtime_ns
    again = icsearch.calibrate(glm_checkpoint, "demo", tmp_path / "c", **asked, **far)
    assert again.fingerprint == first.fingerprint
    assert (tmp_path / "c" / "calibration.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(CalibrationError, match="another count \\(there far, asked for all\\)"):
        icsearch.calibrate(glm_checkpoint, "demo", tmp_path / "c", seq_len=LENGTH, num_sequences=3)
    with pytest.raises(CalibrationError, match="another far_gain"):
        icsearch.calibrate(glm_checkpoint, "demo", tmp_path / "c", **asked, count="far", far_gain=0.3)
    with pytest.raises(CalibrationError, match="counted_dtype \\(there float32, asked for bfloat16"):
        icsearch.calibrate(glm_checkpoint, "demo", tmp_path / "c", **{**asked, "dtype": "bfloat16"}, **far)
    icsearch.calibrate(glm_checkpoint, "demo", tmp_path / "all", seq_len=LENGTH, num_sequences=3)
    with pytest.raises(CalibrationError, match="another count"):
        icsearch.calibrate(glm_checkpoint, "demo", tmp_path / "all", **asked, **far)


@pytest.mark.parametrize(
    ("options", "found", "todo"),
    [
        (["--far-gain", 1], "--far-gain belongs to --count far", "give both"),
        (["--dtype", "float32"], "--dtype belongs to --count far", "leave it out"),
        (["--count", "far", "--far-gain", -1], "--far-gain -1 is out of range", "0 or more"),
        (["--count", "near"], "'near' is unknown", "give all or far"),
        (["--count", "far", "--seq-len", 16], "sequences of 16 tokens have no more", "--seq-len 32"),
        (["--count", "far", "--seq-len", LENGTH, "--far-gain", 99], "sequence 0 has no token", "give --far-gain"),
    ],
)
def test_bad_input_is_one_line(
    glm_checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    options: list[object],
    found: str,
    todo: str,
) -> None:
    out = tmp_path / "c"
    arguments = ["calibrate", glm_checkpoint, "demo", "--num-sequences", 2, "--out", out, *options]
    assert app._run([str(word) for word in arguments], debug=False) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert found in last and todo in last
    assert not out.exists()


def test_the_gain_that_is_advised_is_possible(glm_checkpoint: Path, tmp_path: Path) -> None:
    asked = {"seq_len": LENGTH, "num_sequences": 2, "count": "far", **NUMERICS}
    with pytest.raises(CalibrationError, match="give --far-gain") as refused:
        icsearch.calibrate(glm_checkpoint, "demo", tmp_path / "c", far_gain=99, **asked)
    possible = float(str(refused.value).partition("--far-gain ")[2].split()[0])
    assert possible > 0.1
    icsearch.calibrate(glm_checkpoint, "demo", tmp_path / "c", far_gain=possible, **asked)


def test_where_batches_cannot_go(glm_checkpoint: Path, tmp_path: Path) -> None:
    tokens = save_tokens(tmp_path / "tokens", sequences=2, length=LENGTH)
    with pytest.raises(CalibrationError, match="is the SOURCE itself"):
        icsearch.calibrate(glm_checkpoint, tokens, tokens, count="far")
    (tmp_path / "file").write_text("")
    with pytest.raises(CalibrationError, match="cannot write the calibration to"):
        icsearch.calibrate(glm_checkpoint, tokens, tmp_path / "file", count="far", far_gain=0.2)


def test_far_tokens_are_of_those_that_counted(glm_checkpoint: Path, tmp_path: Path) -> None:
    tokens = save_tokens(tmp_path / "tokens", sequences=3, length=LENGTH)
    ids = cache.load(tokens).input_ids
    far = icsearch.calibrate(glm_checkpoint, tokens, tmp_path / "far", count="far", far_gain=0.2, **NUMERICS)
    own = np.random.default_rng(0).random(ids.shape) < 0.7
    save_file({"input_ids": ids, "loss_mask": own}, tokens / "calibration.safetensors")
    both = icsearch.calibrate(glm_checkpoint, tokens, tmp_path / "both", count="far", far_gain=0.2, **NUMERICS)
    assert (both.loss_mask == (far.loss_mask & own)).all() and (both.loss_mask != far.loss_mask).any()
    with pytest.raises(CalibrationError, match="counts far tokens alone already"):
        icsearch.calibrate(glm_checkpoint, tmp_path / "far", tmp_path / "again", count="far")


@pytest.mark.parametrize("changes", [{}, {"indexer_types": ["full", "full", "shared", "full", "shared", "full"]}])
def test_streamed_weights_give_the_same_mask(tmp_path: Path, changes: dict[str, Any]) -> None:
    checkpoint = save_checkpoint(tmp_path / "model", **changes)
    tokens = save_tokens(tmp_path / "tokens", sequences=3, length=LENGTH)
    asked = {"count": "far", "far_gain": 0.2, **NUMERICS}
    masks = [
        icsearch.calibrate(checkpoint, tokens, tmp_path / place, offload=place, **asked).loss_mask
        for place in ("none", "disk")
    ]
    assert (masks[0] == masks[1]).all() and masks[0].any()


def test_a_short_context_that_is_not_finite_is_named(
    glm_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequence 1 of 3, the second of its three short contexts: number 4 of all."""
    tokens = save_tokens(tmp_path / "tokens", sequences=3, length=LENGTH)
    whole = calibrate.token_losses

    def spoilt(dsa: Any, waves: Any, on_layer: Any) -> torch.Tensor:
        losses = whole(dsa, waves, on_layer)
        if losses.shape[1] < LENGTH - 1:
            raise NonFiniteLossError("nan", 4, "FFFFFF", "decoder layer 2")
        return losses

    monkeypatch.setattr(calibrate, "token_losses", spoilt)
    with pytest.raises(NonFiniteLossError, match="loss of sequence 1 .*a short context of it, 2 of 3"):
        icsearch.calibrate(glm_checkpoint, tokens, tmp_path / "far", count="far", **NUMERICS)


def test_interrupted_it_says_that_nothing_was_kept(
    glm_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "token_losses", interrupted)
    arguments = ["calibrate", glm_checkpoint, "demo", "--seq-len", LENGTH, "--count", "far", "--out", tmp_path / "c"]
    assert app._run([str(word) for word in arguments], debug=False) == 130
    assert "interrupted; nothing was kept: the same command begins again" in capfd.readouterr().err


def test_a_search_on_far_tokens_says_so(glm_checkpoint: Path, tmp_path: Path) -> None:
    tokens = save_tokens(tmp_path / "tokens", sequences=4, length=LENGTH)
    far = icsearch.calibrate(glm_checkpoint, tokens, tmp_path / "far", count="far", far_gain=0.2, **NUMERICS)
    icsearch.find_pattern(glm_checkpoint, tmp_path / "far", tmp_path / "run", num_shared=1, **NUMERICS)
    counted = f"{sum(far.counted_tokens())} of {4 * (LENGTH - 1)}"
    assert f"Losses are over far tokens alone, {counted}." in (tmp_path / "run" / "report.html").read_text()
    card = model_card([tmp_path / "run"])
    assert "of which far tokens count" in card and "far tokens)" in card
    assert json.loads((tmp_path / "run" / "pattern.json").read_text())["calibration"]["count"] == "far"


def test_an_evaluation_of_before_masks_were_recorded_goes_on(glm_checkpoint: Path, tmp_path: Path) -> None:
    tokens, out = save_tokens(tmp_path / "tokens", sequences=4, length=LENGTH), tmp_path / "eval"
    whole = icsearch.evaluate_patterns(glm_checkpoint, ["uniform:1/2"], tokens, out, **NUMERICS)
    start, *later = (out / "journal.jsonl").read_text().splitlines()
    before = {name: value for name, value in json.loads(start).items() if name != "masked"}
    (out / "journal.jsonl").write_text("\n".join([json.dumps(before), *later[:1]]) + "\n")
    again = icsearch.evaluate_patterns(glm_checkpoint, ["uniform:1/2"], tokens, out, **NUMERICS)
    assert [row.loss for row in again.rows] == [row.loss for row in whole.rows]
    assert again.counted_name == ""


def test_eval_shows_counted_and_all_tokens(
    glm_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokens = save_tokens(tmp_path / "tokens", sequences=4, length=LENGTH)
    icsearch.calibrate(glm_checkpoint, tokens, tmp_path / "far", count="far", far_gain=0.2, **NUMERICS)
    arguments = ["eval", glm_checkpoint, "--calibration", tmp_path / "far", "--pattern", "uniform:1/2"]
    arguments += ["--pattern", "FFSSSS"]
    arguments += ["--threads", 1, "--kernels", "reference"]
    assert app._run([str(word) for word in [*arguments, "--out", tmp_path / "eval"]], debug=True) == 0
    assert "far tokens" in capfd.readouterr().out
    document = json.loads((tmp_path / "eval" / "eval.json").read_text())
    far = cache.load(tmp_path / "far")
    dsa = loading.load(open_checkpoint(str(glm_checkpoint)))
    batch_size = document["options"]["batch_size"]
    for row in document["rows"]:
        for calibration, found in ((far, row["loss"]), (cache.load(tokens), row["all_tokens"]["loss"])):
            nll = naive_nll(dsa, Pattern(row["pattern"]), device_batches(calibration, batch_size, dsa.device))
            assert found == pytest.approx(sum(nll) / sum(calibration.counted_tokens()), rel=1e-6)
    assert document["rows"][0]["all_tokens"]["delta"] == 0 and document["rows"][1]["all_tokens"]["kl"] > 0
    page = (tmp_path / "eval" / "report.html").read_text()
    assert "Far tokens, and all tokens" in page and "That is over far tokens alone; over all tokens it is" in page
    header = (tmp_path / "eval" / "eval.csv").read_text().splitlines()[0]
    assert "all_tokens_delta" in header
