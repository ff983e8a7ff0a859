"""Which layers a checkpoint shares by its config.json: transformers' skeleton is the judge of the rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AXK2Config

import native_fixtures
import tiny
from icsearch.core.errors import ModelError
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.config import start_pattern
from icsearch.model.layout import inspect
from icsearch.model.loading import quiet_transformers

quiet_transformers()
KINDS = ["full", "shared", "full", "full", "shared", "shared"]
READ: list[tuple[dict[str, Any], str]] = [
    ({}, "FFFFFF"),
    ({"indexer_types": KINDS}, "FSFFSS"),
    ({"indexer_types": KINDS, "index_topk_pattern": "FFFFFS", "index_topk_freq": None}, "FSFFSS"),
    ({"index_topk_pattern": "FFSFSF", "index_topk_freq": 2, "index_skip_topk_offset": None}, "FFSFSF"),
    ({"index_topk_pattern": KINDS}, "FSFFSS"),
    ({"index_topk_pattern": "FFSFSFS", "num_nextn_predict_layers": 1}, "FFSFSF"),
    ({"index_topk_freq": 4}, "FFSSSF"),
    ({"index_topk_freq": 4, "index_skip_topk_offset": 1}, "FSSSFS"),
    ({"index_skip_topk_offset": 5}, "FFFFFF"),
    ({"index_topk_freq": 0}, "FFFFFF"),
    ({"index_topk_freq": -3, "index_skip_topk_offset": -1}, "FFFFFF"),
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"index_topk_freq": None}, "index_topk_freq is None: expected a whole number, or no such key"),
    ({"index_topk_freq": 4, "index_skip_topk_offset": None}, "index_skip_topk_offset is None: expected"),
    ({"index_topk_freq": "4"}, "index_topk_freq is '4': expected"),
    ({"index_topk_freq": True}, "index_topk_freq is True: expected"),
    ({"index_topk_freq": 4, "index_skip_topk_offset": 0}, r"index_topk_freq makes layer 0 S \(shared\)"),
    ({"indexer_types": ["shared"] * 6}, "indexer_types makes layer 0 S"),
    ({"indexer_types": ["full"] * 5}, "indexer_types has 5 letters for 6 layers"),
    ({"indexer_types": []}, "indexer_types has 0 letters for 6 layers"),
    ({"index_topk_pattern": "FFSFSFS"}, "index_topk_pattern has 7 letters for 6 layers"),
    ({"index_topk_pattern": "ffsfsf"}, "index_topk_pattern has 'f' at position 0: expected F or S"),
    ({"index_topk_pattern": ["F", "S"] * 3}, "index_topk_pattern has 'F' at position 0: expected full or shared"),
    ({"index_topk_pattern": 4}, "index_topk_pattern is 4: expected letters, or a list"),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {family: tiny.save_checkpoint(tmp_path_factory.mktemp(family), family) for family in tiny.FAMILIES}
    made["mistral_large4"] = native_fixtures.save_native(tmp_path_factory.mktemp("mistral"), "mistral_large4")
    return made


def with_keys(directory: Path, keys: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's config without any sharing keys but these, also written into it."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    inner = config.get("text_config", config)
    for key in ("indexer_types", *{key for changes, _ in (*READ, *REFUSED) for key in changes}):
        inner.pop(key, None)
    inner.update(keys)
    path.write_text(json.dumps(config))
    return dict(config)


@pytest.mark.parametrize("family", ["glm_moe_dsa", "mistral_large4"])
@pytest.mark.parametrize(("keys", "letters"), READ)
def test_read_as_the_skeleton_is(checkpoints: dict[str, Path], family: str, keys: dict[str, Any], letters: str) -> None:
    directory = checkpoints[family]
    assert start_pattern(with_keys(directory, keys), "M").letters == letters
    assert inspect(open_checkpoint(str(directory))).start_pattern.letters == letters


@pytest.mark.parametrize("family", ["glm_moe_dsa", "mistral_large4"])
@pytest.mark.parametrize(("keys", "words"), REFUSED)
def test_a_plan_and_a_run_refuse_the_same(
    checkpoints: dict[str, Path], family: str, keys: dict[str, Any], words: str
) -> None:
    directory = checkpoints[family]
    config = with_keys(directory, keys)
    for read in (lambda: start_pattern(config, "M"), lambda: open_checkpoint(str(directory))):
        with pytest.raises(ModelError, match=words) as caught:
            read()
        assert "\n" not in str(caught.value)


def test_types_that_run_every_indexer(checkpoints: dict[str, Path]) -> None:
    """Their modules have no such thing: what an engine is to read of their config is nothing to transformers."""
    directory = checkpoints["deepseek_v32"]
    for keys in ({"index_topk_pattern": ["F", "S"] * 3}, {"index_topk_freq": 4, "index_skip_topk_offset": None}):
        assert start_pattern(with_keys(directory, keys), "M").letters == "FFFFFF"
        assert inspect(open_checkpoint(str(directory))).start_pattern.letters == "FFFFFF"
    config = {"model_type": AXK2Config.model_type, "num_hidden_layers": 3, "index_topk_freq": 2}
    assert start_pattern(config, "M").letters == "FFF"


def test_an_unknown_type_is_read_as_its_keys_say() -> None:
    assert start_pattern({"model_type": "own_dsa", "num_hidden_layers": 3, "index_topk_freq": 2}, "M").letters == "FFS"
