"""What sharing buys in serving: bytes counted by hand, tokens that fit, and the command that shows them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import in_process
from icsearch.core.pattern import Pattern
from icsearch.planning.devices import parse_devices
from icsearch.planning.modelfile import open_model_file
from icsearch.planning.serving import Saved, footprint, plan_serving

GLM5 = Path(__file__).parents[1] / "data" / "configs" / "glm-5.json"
NATIVE = Pattern("FFF" + "SSSF" * 18 + "SSS")  # GLM-5.2's: 21 of 78


def test_bytes_of_glm_5_by_hand() -> None:
    """512 + 64 latents in 16 bits, 128 numbers of an index key in FP8 and a scale; an indexer has 9.4M weights."""
    shape = open_model_file(str(GLM5)).shape
    whole, shared = (footprint(shape, pattern, 2) for pattern in (Pattern.full(78), NATIVE))
    assert whole.latents == shared.latents == 78 * (512 + 64) * 2
    assert (whole.index_keys, shared.index_keys) == (78 * 132, 21 * 132)
    indexer = 2048 * 32 * 128 + 6144 * (128 + 32) + 2 * 128
    saved = Saved.between(whole, shared)
    assert saved.index_weights == 57 * indexer * 2 == pytest.approx(1.07e9, rel=0.01)  # SGLang #30531: 0.98 GB a rank
    assert saved.index_keys == 57 * 132 and saved.index_keys / saved.per_token == 57 * 132 / (78 * (1152 + 132))
    assert saved.per_token / (saved.per_token - saved.index_keys) == pytest.approx(1284 * 78 / (1152 * 78 + 132 * 21))


def test_tokens_are_what_memory_leaves() -> None:
    model, devices = open_model_file(str(GLM5)), parse_devices("8xH200")
    serving = plan_serving(model, devices)
    first = serving.rows[0]
    assert [row.full for row in serving.rows] == [78, 39, 26, 20, 10] and first.saved.index_keys == 0
    per_token = 78 * (1152 + 132)
    indexers = footprint(model.shape, model.start, model.other_bytes).index_weights
    others = (model.stored_model_bytes - indexers) / 8
    assert first.tokens == int((0.9 * devices.device.memory - others - indexers) // per_token)
    tokens = [row.tokens for row in serving.rows]
    assert tokens == sorted(tokens) and all(cost.decode_speedup_estimate > 1 for cost in serving.rows[1].costs)
    assert plan_serving(model, parse_devices("1xH200")).rows[0].tokens == 0  # the weights alone do not fit


def test_a_checkpoint_that_shares_already_starts_there() -> None:
    serving = plan_serving(replace(open_model_file(str(GLM5)), start=NATIVE), parse_devices("8xH200"))
    assert [row.full for row in serving.rows] == [21, 20, 10]


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("plan", GLM5, "--serve", "--devices", "8xH200")
    status, out, err = in_process.run(capsys, *words)
    assert (status, err) == (0, "") and max(map(len, out.splitlines())) <= 80
    assert "at 200K" in out and "SGLang from #30531 on" in out
    status, out, _ = in_process.run(capsys, *words, "--json")
    document = json.loads(out)
    assert status == 0 and document["format"] == "icsearch.serving/1"
    assert [row["full"] for row in document["rows"]] == [78, 39, 26, 20, 10]
    status, out, err = in_process.run(capsys, "plan", GLM5, "--serve", "--devices", "1xH200")
    assert status == 0 and out.count("none fit") == 5


def test_what_cannot_be_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "num_hidden_layers": 2}))
    status, out, err = in_process.run(capsys, "plan", tmp_path, "--serve")
    assert (status, out, err.count("\n")) == (2, "", 1)
