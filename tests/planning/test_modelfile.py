"""A model from its config.json: parameters and bytes against the facts and against transformers, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
import tiny_families
from icsearch.core.errors import IcsearchError
from icsearch.model import layout
from icsearch.model.checkpoint import open_checkpoint
from icsearch.planning.modelfile import open_model_file

CONFIGS = Path(__file__).parent.parent / "data" / "configs"
PARAMETERS = {"deepseek-v3.2": 671e9, "glm-5": 744e9}  # as published; without the MTP layer


def written(directory: Path, **changes: Any) -> str:
    """A config.json of the small test model with these changes, in a directory without weights."""
    config = tiny.FAMILIES["glm_moe_dsa"](**tiny.SIZES).to_dict() | changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return str(directory)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_large_models_have_the_parameters_that_are_known(name: str) -> None:
    found = open_model_file(str(CONFIGS / f"{name}.json"))
    assert found.num_parameters == pytest.approx(PARAMETERS[name], rel=0.005)
    assert found.stored_model_bytes == pytest.approx(PARAMETERS[name], rel=0.01)  # a byte each
    assert found.dtype == "bfloat16" and found.quantisation and found.checkpoint == "MODEL"


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_the_configs_here_are_transformers_defaults(name: str) -> None:
    """But for type and quantisation: these families' defaults are the sizes of the released models."""
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    default = AutoConfig.for_model(config["model_type"]).to_dict()
    own = ("dtype", "quantization_config")
    assert {k: v for k, v in config.items() if k not in own} == {k: default[k] for k in config if k not in own}


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_parameters_and_layout_are_those_of_the_skeleton(family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny.save_checkpoint(tmp_path, family)))
    expected, found = layout.inspect(checkpoint), open_model_file(str(tmp_path))
    assert found.num_parameters == expected.num_parameters
    assert found.shape == expected.sizes
    assert found.start == expected.start_pattern
    assert found.stored_model_bytes == pytest.approx(checkpoint.num_bytes, rel=0.1)  # small: headers count
    assert (found.dtype, found.model_type, found.max_positions) == (expected.dtype, family, expected.max_positions)


@pytest.mark.parametrize("family", sorted(tiny_families.CONFIGS))
def test_the_families_that_can_be_planned_for(family: str, tmp_path: Path) -> None:
    """As docs/families.md and docs/any-size.md say: four of the ten, by transformers' own default sizes."""
    (tmp_path / "config.json").write_text(json.dumps(AutoConfig.for_model(family).to_dict()))
    if family in ("axk2", "deepseek_v32", "glm_moe_dsa", "mistral_large4"):
        assert open_model_file(str(tmp_path)).num_parameters > 10**10
        return
    with pytest.raises(IcsearchError) as caught:
        open_model_file(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_text_only_config_whose_layers_have_sizes_of_their_own_is_refused(tmp_path: Path) -> None:
    """As save_pretrained writes it: transformers itself cannot say what num_attention_heads is."""
    AutoConfig.for_model("dots3_note_text").save_pretrained(tmp_path)
    assert "per_layer_config" in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(IcsearchError, match="a dots3_note_text model, cannot be planned for: its layers have sizes"):
        open_model_file(str(tmp_path))


def test_demo_without_torch_agrees_with_its_weights() -> None:
    found = open_model_file("demo")
    expected = layout.inspect(open_checkpoint("demo"))
    assert found.num_parameters == pytest.approx(expected.num_parameters, rel=0.005)  # but for its biases
    assert found.start == expected.start_pattern and found.checkpoint == "demo"


@pytest.mark.parametrize(
    ("changes", "letters"),
    [
        ({"indexer_types": ["full", "shared", "full", "full", "shared", "shared"]}, "FSFFSS"),
        ({"indexer_types": None, "index_topk_pattern": "FFSFSF"}, "FFSFSF"),
        ({"indexer_types": None, "index_topk_freq": 4}, "FFSSSF"),
        ({"indexer_types": None}, "FFFFFF"),
    ],
)
def test_native_s_layers_as_transformers_reads_them(changes: dict[str, Any], letters: str, tmp_path: Path) -> None:
    found = open_model_file(written(tmp_path, **changes))
    assert found.start.letters == letters
    types = AutoConfig.from_pretrained(tmp_path).indexer_types
    assert "".join({"full": "F", "shared": "S"}[kind] for kind in types) == letters
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert found.num_parameters == sum(parameter.numel() for parameter in whole.parameters())


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_keys_that_transformers_does_not_read_are_none(family: str, tmp_path: Path) -> None:
    """An exported deepseek_v32 has them for engines: transformers, and so a search, runs all its indexers."""
    tiny.save_checkpoint(tmp_path, family)
    path = tmp_path / "config.json"
    keys = {"indexer_types": ["full", "shared"] * 3, "index_topk_pattern": "FSFSFS", "index_topk_freq": 2}
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    expected = layout.inspect(open_checkpoint(str(tmp_path)))
    found = open_model_file(str(tmp_path))
    assert (found.start, found.num_parameters) == (expected.start_pattern, expected.num_parameters)
    assert found.start.letters == {"deepseek_v32": "FFFFFF", "glm_moe_dsa": "FSFSFS"}[family]


def test_a_tied_head_counts_once(tmp_path: Path) -> None:
    untied = open_model_file(written(tmp_path)).num_parameters
    tied = open_model_file(written(tmp_path, tie_word_embeddings=True)).num_parameters
    assert untied - tied == tiny.SIZES["vocab_size"] * tiny.SIZES["hidden_size"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float8"}, "dtype 'float8': expected float32, bfloat16, float16"),
        ({"indexer_types": ["full"]}, "indexer_types has 1 letters for 6 layers: expected one a layer"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantised by 'gptq': expected 'fp8'"),
        ({"kv_lora_rank": 0}, "kv_lora_rank 0"),
        ({"layer_types": ["linear_attention", "indexed_attention"] * 3}, "3 DSA layers among 6"),
        ({"per_layer_config": {"02": {"kv_lora_rank": 16}}}, "layers have sizes of their own"),
    ],
)
def test_configs_that_cannot_be_planned_for(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(IcsearchError, match=message):
        open_model_file(written(tmp_path, **changes))


def test_a_model_without_indexers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    with pytest.raises(IcsearchError, match="is a llama model and has no indexers"):
        open_model_file(str(tmp_path))


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IcsearchError, match=r"no config\.json in"):
        open_model_file(str(tmp_path))
    with pytest.raises(IcsearchError, match="nothing at"):
        open_model_file(str(tmp_path / "missing"))
    with pytest.raises(IcsearchError, match="the hub did not deliver its config.json"):
        open_model_file("nobody/nothing")
