"""The keys of a config: each alone gives the pattern to transformers, and nothing old stays beside them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GlmMoeDsaConfig, HYV4Config

from icsearch.core.errors import IcsearchError
from icsearch.engines.native import declared_shared, edit_config, indexers_by_layer, native_keys
from icsearch.model.config import num_hidden_layers

letters = st.text("FS", max_size=20).map(lambda tail: "F" + tail)


def read_by_transformers(keys: dict[str, Any], layers: int) -> str:
    config = GlmMoeDsaConfig(num_hidden_layers=layers, **keys)
    return "".join("F" if kind == "full" else "S" for kind in config.indexer_types)


@given(letters)
def test_each_key_alone_gives_the_pattern(pattern: str) -> None:
    keys = native_keys(pattern)
    assert None not in keys.values()
    assert read_by_transformers(keys, len(pattern)) == pattern
    for name in ("indexer_types", "index_topk_pattern"):
        assert read_by_transformers({name: keys[name]}, len(pattern)) == pattern
    numbers = {name: value for name, value in keys.items() if name in ("index_topk_freq", "index_skip_topk_offset")}
    reproducible = {
        "".join("F" if max(i - offset + 1, 0) % freq == 0 else "S" for i in range(len(pattern)))
        for freq in range(1, len(pattern) + 2)
        for offset in range(1, len(pattern) + 1)
    }
    assert (pattern in reproducible) == bool(numbers)
    if numbers:
        assert read_by_transformers(numbers, len(pattern)) == pattern


@given(letters, st.booleans())
def test_what_is_written_is_read_back(pattern: str, nested: bool) -> None:
    inner = {"num_hidden_layers": len(pattern), "index_topk_freq": 4, "index_skip_topk_offset": None, "hidden_size": 8}
    config = {"model_type": "x", "text_config": inner} if nested else inner
    edited = edit_config(config, "x", pattern)
    assert edited.nested is nested
    assert declared_shared(edited.document, "x") == {i for i, letter in enumerate(pattern) if letter == "S"}
    written = edited.document["text_config"] if nested else edited.document
    assert None not in written.values() and written["hidden_size"] == 8
    assert set(edited.removed) == {"index_topk_freq", "index_skip_topk_offset"} - set(edited.written)


def test_keys_outside_of_a_wrapped_config_go() -> None:
    config = {"index_topk_pattern": "FFFF", "text_config": {"num_hidden_layers": 2, "use_index_cache": True}}
    edited = edit_config(config, "x", "FF")
    assert edited.document == {"text_config": {"num_hidden_layers": 2, **native_keys("FF")}}
    assert edited.removed == ("use_index_cache", "index_topk_pattern")
    assert config["index_topk_pattern"] == "FFFF"


DECLARED = {
    "types first": ({"indexer_types": ["full", "shared"], "index_topk_pattern": "FF"}, {1}),
    "then letters": ({"index_topk_pattern": "FS", "index_topk_freq": 1}, {1}),
    "letters as a list of types": ({"index_topk_pattern": ["full", "shared"]}, {1}),
    "then freq": ({"index_topk_freq": 2, "index_skip_topk_offset": 1}, {1}),
    "nulls": ({"indexer_types": None, "index_topk_pattern": None}, set()),
    "nothing": ({}, set()),
}


@pytest.mark.parametrize("case", DECLARED)
def test_what_a_config_declares(case: str) -> None:
    keys, shared = DECLARED[case]
    assert declared_shared({"num_hidden_layers": 2, **keys}, "x") == shared


@pytest.mark.parametrize(
    "keys",
    [
        {"indexer_types": ["full"]},
        {"indexer_types": ["F", "S"]},
        {"indexer_types": "FS"},
        {"indexer_types": [["full"], 1]},
        {"index_topk_pattern": "fs"},
        {"index_topk_pattern": "FSS"},
        {"index_topk_pattern": 7},
        {"index_topk_freq": None},  # transformers fails on it
    ],
)
def test_a_config_that_declares_nonsense_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(IcsearchError, match="indexer_types|index_topk_pattern|index_topk_freq"):
        declared_shared({"num_hidden_layers": 2, **keys}, "x")


def test_a_family_that_shares_by_itself() -> None:
    """hy_v4 reads `indexer_types` alone, and without them shares three layers of four."""
    config = {"num_hidden_layers": 6, "model_type": "hy_v4"}
    types = HYV4Config(num_hidden_layers=6).indexer_types
    assert declared_shared(config, "x") == {layer for layer, kind in enumerate(types) if kind == "shared"} == {2, 3, 4}


@pytest.mark.parametrize("found", [None, 0, -1, "6", 2.0, True, 10**9])
def test_layers_must_be_a_number(found: object) -> None:
    with pytest.raises(IcsearchError, match="num_hidden_layers"):
        num_hidden_layers({"num_hidden_layers": found}, "x")


def test_indexers_by_their_names() -> None:
    names = [
        "model.layers.0.self_attn.indexer.wk.weight",
        "model.layers.1.self_attn.indexer.wk.weight",
        "model.layers.1.self_attn.indexer.wk.weight_scale_inv",
        "model.layers.1.self_attn.indexer_norm.weight",  # another module
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.2.self_attn.compressor.indexer.compressor.wkv.weight",
        "model.layers.3.self_attn.indexer.wk.weight",  # multi-token prediction
        "mtp.layers.0.self_attn.indexer.wk.weight",
        "model.mtp_layers.0.self_attn.indexer.wk.weight",
        "vision.layers.0.self_attn.k_proj.weight",
        "layers.indexer",
    ]
    assert indexers_by_layer(names, 3) == {0: names[:1], 1: names[1:3], 2: names[5:6]}
    assert indexers_by_layer(["layers.0.attention.indexer.wk.weight"], 1) == {
        0: ["layers.0.attention.indexer.wk.weight"]
    }
    assert indexers_by_layer(["lm_head.weight"], 3) == {}
