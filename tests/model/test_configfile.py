"""Whatever a config.json holds: a plan and a layout come out, or one line that says what is wrong. Never anything else.

Every key that is read, here or by transformers, with values of every kind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import native_fixtures
import tiny
from icsearch.commands.plan import plan as make_plan
from icsearch.core.errors import IcsearchError, ModelError
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.layout import inspect
from icsearch.model.loading import load, quiet_transformers
from icsearch.model.quantisation import dtype_name, quantisation
from icsearch.planning.modelfile import open_model_file
from plan_fixtures import plan_request

quiet_transformers()

KEYS = (
    *("text_config", "model_type", "architectures", "dtype", "torch_dtype", "tie_word_embeddings", "vocab_size"),
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_parameters"),
    *("index_n_heads", "index_head_dim", "index_topk", "index_kpool", "indexer_types", "index_topk_pattern"),
    *("intermediate_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "n_shared_experts"),
    *("num_experts", "num_local_experts", "n_group", "topk_group", "mlp_layer_types", "layer_types"),
    *("first_k_dense_replace", "moe_layer_freq", "num_nextn_predict_layers", "quantization_config"),
)
VALUES = (None, "x", "4", -1, 0, 10**400, True, 1e30, [], {}, [0, 0], [["full"]], {"a": {"b": 1}})
NESTED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "weight_block_size": lambda value: {"quantization_config": {"quant_method": "fp8", "weight_block_size": value}},
    "quant_method": lambda value: {"quantization_config": {"quant_method": value}},
    "activation_scheme": lambda value: {"quantization_config": {"quant_method": "fp8", "activation_scheme": value}},
    "index_topk_freq": lambda value: {"indexer_types": None, "index_topk_freq": value},
    "index_skip_topk_offset": lambda v: {"indexer_types": None, "index_topk_freq": 4, "index_skip_topk_offset": v},
    "index_topk_pattern alone": lambda value: {"indexer_types": None, "index_topk_pattern": value},
    "first_k_dense_replace alone": lambda value: {"mlp_layer_types": None, "first_k_dense_replace": value},
    "moe_layer_freq alone": lambda value: {"mlp_layer_types": None, "moe_layer_freq": value},
    "in a wrapper": lambda value: {"text_config": {"index_topk": 8, "num_hidden_layers": value}},
}


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    for value in VALUES:
        yield from ((f"{key} {str(value)[:20]}", {key: value}) for key in KEYS)
        yield from ((f"{key} {str(value)[:20]}", changes(value)) for key, changes in NESTED.items())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tiny.save_checkpoint(tmp_path)


def outcomes(directory: Path, read: Callable[[], object]) -> dict[str, BaseException]:
    """What is neither a result nor a refusal in one line, by case."""
    path, wrong = directory / "config.json", {}
    known = json.loads(path.read_text())
    for name, changes in cases():
        path.write_text(json.dumps(known | changes))
        try:
            read()
        except IcsearchError as error:
            if "\n" in str(error) or error.exit_status != 2:
                wrong[name] = error
        except Exception as error:  # what is looked for
            wrong[name] = error
    return wrong


def test_a_plan_of_whatever_config(directory: Path) -> None:
    assert outcomes(directory, lambda: make_plan(plan_request(str(directory), "1xcpu", 2, 40))) == {}


def test_the_layout_of_whatever_config(directory: Path) -> None:
    assert outcomes(directory, lambda: inspect(open_checkpoint(str(directory)))) == {}


@pytest.mark.parametrize("read", [open_checkpoint, open_model_file])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": [1]}, "has text_config a list: expected an object"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000: expected an integer from 1 to 4096"),
        ({"num_nextn_predict_layers": "one"}, "num_nextn_predict_layers is 'one': expected an integer from 0"),
    ],
)
def test_what_every_command_refuses(
    directory: Path, read: Callable[[str], object], changes: dict[str, Any], message: str
) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelError, match=message):
        read(str(directory))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("fp8", "has quantization_config 'fp8': expected an object with quant_method, such as 'fp8'"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size 128: expected two sizes"),
        ({"quant_method": "fp8", "weight_block_size": [0, 0]}, "weight_block_size a list: expected two sizes"),
        ({"quant_method": "gptq"}, "is quantised by 'gptq': expected 'fp8'"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_plan_and_a_run_refuse_the_same_quantisation(
    directory: Path, settings: Any, message: str, nested: bool
) -> None:
    """In the config itself, and in the language model's part of a wrapper."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    changed = (
        {"text_config": config | {"quantization_config": settings}} if nested else {"quantization_config": settings}
    )
    path.write_text(json.dumps(config | changed))
    for read in (open_model_file, lambda name: inspect(open_checkpoint(name))):
        with pytest.raises(ModelError, match=message):
            read(str(directory))


def test_a_type_that_was_rewritten_is_refused_by_a_plan_as_by_a_run(directory: Path) -> None:
    """deepseek_v3 in place of deepseek_v32, as some loaders want it: transformers' class has no indexers then."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "deepseek_v3"}))
    told = []
    for read in (open_model_file, lambda name: inspect(open_checkpoint(name))):
        with pytest.raises(ModelError, match="is a deepseek_v3 model and has no indexers") as caught:
            read(str(directory))
        told.append(str(caught.value))
    assert told[0] == told[1] and "such as deepseek_v32 or glm_moe_dsa" in told[0]
    assert re.search(r"; config.json has index_\w+: if the weights have indexers, such a model_type has them", told[0])


def stored(settings: dict[str, Any], **more: Any) -> tuple[str, tuple[int, int], float, float | None]:
    found = quantisation({"quantization_config": settings, **more}, "M")
    assert found and found == quantisation({"text_config": {"quantization_config": settings, **more}}, "M")
    return found.label, found.block, found.expert_bytes, found.other_bytes


def test_how_weights_are_stored() -> None:
    """The format, FP8's block, and bytes of a weight of an expert and of another, scales counted."""
    assert quantisation({}, "M") is None
    eight = 1 + 4 / 128**2
    assert stored({"quant_method": "fp8"}) == ("FP8", (128, 128), eight, eight)
    assert stored({"quant_method": "fp8", "weight_block_size": [64, 32]})[1] == (64, 32)
    mixed = ("FP8 with MXFP4 experts", (128, 128), 0.5 + 1 / 32, eight)
    assert stored({"quant_method": "fp8", "expert_dtype": "fp4"}) == mixed
    assert stored({"quant_method": "fp8"}, expert_dtype="fp4") == mixed
    assert stored({"quant_method": "modelopt", "quant_algo": "NVFP4"}) == ("NVFP4", (128, 128), 0.5 + 1 / 16, None)
    packed: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    assert stored(packed) == ("NVFP4", (128, 128), 0.5 + 1 / 16, None)
    weights = {"num_bits": 4, "group_size": 32, "symmetric": True}
    packed |= {"format": "mixed-precision", "config_groups": {"0": {"format": "pack-quantized", "weights": weights}}}
    assert stored(packed) == ("int4", (128, 128), 0.5 + 2 / 32, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq"}, "is quantised by 'gptq': expected 'fp8' .* 'modelopt' .* 'compressed-tensors' with"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "'modelopt' with quant_algo 'FP8': expected"),
        ({"quant_method": "compressed-tensors"}, "with format None: expected"),
        (
            {"quant_method": "compressed-tensors", "format": "float-quantized"},
            "format 'float-quantized': expected",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"0": {"format": "pack-quantized"}, "1": {"format": "dense"}},
            },
            "with format 'dense' and 'pack-quantized': expected",
        ),
        *(
            (
                {
                    "quant_method": "compressed-tensors",
                    "format": "pack-quantized",
                    "config_groups": {"0": {"weights": {"num_bits": 4, **odd}}},
                },
                f"pack-quantized and {next(iter(odd))} .*: expected",
            )
            for odd in ({"num_bits": 8}, {"symmetric": False}, {"actorder": "group"}, {"num_bits": None})
        ),
    ],
)
def test_a_format_that_is_not_known_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        quantisation({"quantization_config": settings}, "M")
    assert "\n" not in str(caught.value)


def test_a_null_text_config_is_none(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"text_config": None, "num_nextn_predict_layers": 1}))
    assert load(open_checkpoint(str(directory))).start_pattern.letters == "F" * 6


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16", "text_config": {"num_hidden_layers": 2}}, "float16"),
        ({"text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({"dtype": "float32", "text_config": {"dtype": "bfloat16"}}, "float32"),
        ({"quantization_config": {"quant_method": "fp8"}}, "bfloat16"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "bfloat16"),
        ({"dtype": "float16", "quantization_config": {"quant_method": "fp8"}}, "float16"),
    ],
)
def test_the_type_that_weights_are_in(config: dict[str, Any], expected: str) -> None:
    assert dtype_name(config, "M") == expected


def test_a_wrapped_checkpoint_whose_type_the_language_model_names(tmp_path: Path) -> None:
    """transformers gives the outer config a type of its own when a model is made of it."""
    directory = native_fixtures.save_native(tmp_path, "mistral_large4")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    del config["dtype"]
    config["text_config"]["dtype"] = "bfloat16"
    path.write_text(json.dumps(config))
    assert inspect(open_checkpoint(str(directory))).dtype == "bfloat16"
    assert load(open_checkpoint(str(directory))).model.dtype == torch.bfloat16
