"""Layers of multi-token prediction behind the decoder's: left out, whatever the config calls or counts them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from icsearch.cli import app
from icsearch.core.errors import ModelError
from icsearch.core.pattern import Pattern
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.config import MTP_KEYS, read_backbone
from icsearch.model.loading import load
from icsearch.runs.record import load_run
from icsearch.sweep.branches import cut_batches
from icsearch.sweep.sweep import naive_nll

LAYERS = 6
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def one_more(glm_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint with tensors of one more layer than its config has decoder layers."""
    model = shutil.copytree(glm_checkpoint, tmp_path / "model")
    add(model, {})
    return model


def add(model: Path, more: dict[str, torch.Tensor]) -> None:
    tensors = load_file(model / "model.safetensors")
    last = f"layers.{LAYERS - 1}."
    again = {name.replace(last, f"layers.{LAYERS}."): part.clone() for name, part in tensors.items() if last in name}
    save_file({**tensors, **again, **more}, model / "model.safetensors", metadata={"format": "pt"})


def predicting(model: Path) -> None:
    width = json.loads((model / "config.json").read_text())["hidden_size"]
    norms = {f"model.layers.{LAYERS}.{name}.weight": torch.ones(width) for name in ("enorm", "hnorm")}
    add(model, {**norms, f"model.layers.{LAYERS}.eh_proj.weight": torch.ones(width, 2 * width)})


def count(model: Path, **counts: object) -> None:
    config = json.loads((model / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in MTP_KEYS}
    (model / "config.json").write_text(json.dumps({**config, **counts}))


def loss(model: Path) -> list[float]:
    ids = torch.randint(0, tiny.VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(3))
    batches = cut_batches(ids, torch.ones_like(ids, dtype=torch.bool), 1)
    return naive_nll(load(open_checkpoint(str(model))), Pattern("F" * LAYERS), batches)


@pytest.mark.parametrize("counts", [{}, *({key: told} for key in MTP_KEYS for told in (0, 1))])
def test_by_their_own_tensors(glm_checkpoint: Path, one_more: Path, counts: dict[str, int]) -> None:
    predicting(one_more)
    count(one_more, **counts)
    assert loss(one_more) == loss(glm_checkpoint)


def test_a_run_notes_what_it_left_out(one_more: Path, tokens: Path, tmp_path: Path, capsys: Capture) -> None:
    predicting(one_more)
    count(one_more)
    fixed = ["--calibration", str(tokens), "--num-shared", "1", "--batch-size", "2", "--out", str(tmp_path / "run")]
    assert app._run(["greedy", str(one_more), *fixed], debug=False) == 0
    note = f"layer {LAYERS} of the checkpoint, for multi-token prediction, left out"
    assert capsys.readouterr().err.splitlines().count(note) == 1
    assert load_run(tmp_path / "run").notes.count(note) == 1


@pytest.mark.parametrize("key", MTP_KEYS)
def test_by_what_the_config_counts(glm_checkpoint: Path, one_more: Path, key: str) -> None:
    """Also where they have no tensors that decoder layers do not have."""
    count(one_more, **{key: 1})
    assert loss(one_more) == loss(glm_checkpoint)
    assert read_backbone(json.loads((one_more / "config.json").read_text()), "M").mtp_layers == 1


def test_other_tensors_behind_the_last_layer_are_refused(one_more: Path) -> None:
    count(one_more)
    with pytest.raises(ModelError, match="have no place in the model that config.json describes"):
        load(open_checkpoint(str(one_more)))
