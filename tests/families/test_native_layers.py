"""Layers that the checkpoint itself shares, in the families that have such."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from family_batches import Made, random_batches, random_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_bits import all_patterns, stock

from icsearch.core.pattern import Pattern
from icsearch.model import loading
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.model import DsaModel
from icsearch.sweep.sweep import Sweeper, naive_nll
from native_fixtures import NATIVE

TYPES = {"F": "full", "S": "shared"}


def natively(checkpoint: Path, copy: Path, letters: str, layers: tuple[int, ...]) -> Path:
    """A copy of an all-F checkpoint whose config makes these DSA layers share, their indexers left out."""
    shutil.copytree(checkpoint, copy)
    config = json.loads((copy / "config.json").read_text())
    text = config.get("text_config", config)
    text["indexer_types"] = ["full"] * text["num_hidden_layers"]
    for layer, letter in zip(layers, letters, strict=True):
        text["indexer_types"][layer] = TYPES[letter]
    (copy / "config.json").write_text(json.dumps(config))
    tensors = load_file(copy / "model.safetensors")
    dropped = tuple(f"layers.{layer}." for layer, letter in zip(layers, letters, strict=True) if letter == "S")
    kept = {name: one for name, one in tensors.items() if ".indexer." not in name or not _of(name, dropped)}
    assert len(kept) < len(tensors)
    with safe_open(copy / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file(kept, copy / "model.safetensors", metadata)
    return copy


def _of(name: str, layers: tuple[str, ...]) -> bool:
    return any(layer in name for layer in layers)


def load(directory: Path) -> DsaModel:
    return loading.load(open_checkpoint(str(directory)))


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("letters", ["FFSS", "FSFS"])
@torch.inference_mode()
def test_native_sharing_is_ours_bit_for_bit(made: Made, tmp_path: Path, family: str, letters: str) -> None:
    """transformers' own result, ours through the slots, and ours of the all-F checkpoint under the pattern."""
    whole, ids = made(family), random_ids()
    native = natively(whole, tmp_path / "native", letters, (0, 1, 2, 3))
    expected = stock(native, family)(input_ids=ids, use_cache=False).logits
    shared, full = load(native), load(whole)
    assert shared.start_pattern == Pattern(letters)
    assert torch.equal(shared.lm_head(shared.final_hidden_states(ids, shared.start_pattern)), expected)
    assert torch.equal(full.lm_head(full.final_hidden_states(ids, Pattern(letters))), expected)
    assert not torch.equal(full.lm_head(full.final_hidden_states(ids, full.start_pattern)), expected)
    batches = random_batches(2)
    patterns = [one for one in all_patterns(shared) if set(one.full_layers) <= set(shared.start_pattern.full_layers)]
    swept = Sweeper(shared).sweep(patterns, batches).nll
    for pattern in patterns:
        assert swept[pattern.letters] == naive_nll(full, pattern, batches), pattern


def test_hy_v4_shares_by_default(made: Made) -> None:
    """Nothing in config.json: layers 0, 1, 5, ... run their indexers."""
    assert load(made("hy_v4", indexer_types=None)).start_pattern == Pattern("FFSS")


@torch.inference_mode()
def test_glm5_next_shares_through_the_slots_alone(made: Made, tmp_path: Path) -> None:
    """In transformers 5.24 its own sharing raises: linear layers in between do not hand the selection on. Slots do."""
    whole, ids, batches = made("glm5_next"), random_ids(), random_batches(2)
    native = natively(whole, tmp_path / "native", "FSS", (0, 2, 4))
    with pytest.raises(ValueError, match="Shared DSA layers require top-k indices"):
        stock(native, "glm5_next")(input_ids=ids, use_cache=False)
    shared, full = load(native), load(whole)
    assert shared.start_pattern == Pattern("FSS")
    assert naive_nll(shared, Pattern("FSS"), batches) == naive_nll(full, Pattern("FSS"), batches)
    swept: dict[str, Any] = Sweeper(shared).sweep([Pattern("FSS")], batches).nll
    assert swept["FSS"] == naive_nll(full, Pattern("FSS"), batches)
