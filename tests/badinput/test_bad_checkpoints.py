"""Checkpoints, configs and tokenizers that cannot be used: one line each, whatever the command, and nothing written."""

from __future__ import annotations

import codecs
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bad_input import Place, Row

READERS = ("calibrate", "greedy", "dp-baseline", "eval")  # each row is given to one of them in turn, for time

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


def renamed(name: str) -> Callable[[Place], Path]:
    """A checkpoint whose weights are called otherwise."""

    def rename(place: Place) -> Path:
        model = place.checkpoint()
        (model / WEIGHTS).rename(model / name)
        return model

    return rename


def marked(place: Place) -> Path:
    """A checkpoint whose config.json an editor has put a byte order mark in front of."""
    config = place.checkpoint() / "config.json"
    config.write_bytes(codecs.BOM_UTF8 + config.read_bytes())
    return config.parent


def indexed(weight_map: Any) -> Callable[[Place], Path]:
    """A checkpoint whose safetensors index says this."""

    def make(place: Place) -> Path:
        model = place.checkpoint()
        place.json(f"model/{INDEX}", {"metadata": {}, "weight_map": weight_map})
        return model

    return make


def with_weights(edit: Callable[[bytes], bytes]) -> Callable[[Place], Path]:
    """A checkpoint whose shard has other bytes."""

    def make(place: Place) -> Path:
        model = place.checkpoint()
        place.changed(model / WEIGHTS, edit)
        return model

    return make


def linked_shard(place: Place) -> Path:
    model = place.checkpoint(without=WEIGHTS)
    (model / WEIGHTS).symlink_to("blobs/gone")
    return model


def shard_directory(place: Place) -> Path:
    model = place.checkpoint(without=WEIGHTS)
    (model / WEIGHTS).mkdir()
    return model


def config_directory(place: Place) -> Path:
    model = place.checkpoint(without="config.json")
    (model / "config.json").mkdir()
    return model


def pickled(place: Place) -> Path:
    model = place.checkpoint(without=WEIGHTS)
    place.file("model/pytorch_model.bin", b"PK\x03\x04")
    return model


AGAIN = "download it again"
FILES: dict[str, tuple[Callable[[Place], object], str, str]] = {
    "a file": (lambda p: p.file("model.gguf", b"GGUF"), "model.gguf is a file", "expected a checkpoint directory"),
    "an empty directory": (lambda p: p.file("empty/x").parent, "no config.json", "is this a checkpoint directory"),
    "nothing": (lambda p: p.root / "nowhere", "no checkpoint at", "a hub id such as"),
    "no name": (lambda p: "", "MODEL is empty", "a hub id such as"),
    "a name with a line break": (lambda p: "no\nwhere", "no checkpoint at", "a hub id such as"),
    "a name with a terminal's escape": (lambda p: "no\x1b[2Jwhere", "no checkpoint at", "a hub id such as"),
    "a long name": (lambda p: "x" * 5000, "File name too long", "give another one"),
    "a user who is not there": (lambda p: "~nobody-of-this-name/model", "nobody-of-this-name", "give another one"),
    "a hub id, offline": (lambda p: "zai-org/GLM-5", "the hub did not deliver", "give a local directory"),
    "no config": (lambda p: p.checkpoint(without="config.json"), "no config.json", "is this a checkpoint directory"),
    "config is a directory": (config_directory, "Is a directory", AGAIN),
    "config is cut": (lambda p: p.checkpoint(config_json='{"model_type": "glm'), "is not JSON", AGAIN),
    "config is empty": (lambda p: p.checkpoint(config_json=""), "is not JSON", AGAIN),
    "config is a list": (lambda p: p.checkpoint(config_json="[1, 2]"), "holds a list", AGAIN),
    "config is text": (lambda p: p.checkpoint(config_json='"glm"'), "holds 'glm'", AGAIN),
    "config is UTF-16": (lambda p: p.checkpoint(config_json="{}".encode("utf-16")), "is not JSON", AGAIN),
    "config has a byte order mark": (marked, "begins with a byte order mark", "save it without one"),
    "config is Latin-1": (lambda p: p.checkpoint(config_json=b'{"a": "\xe4"}'), "is not JSON", AGAIN),
    "config is deep": (lambda p: p.checkpoint(config_json="[" * 100_000), "nested too deeply", AGAIN),
    "config says a thing twice": (
        lambda p: p.checkpoint(config_json='{"index_topk": 8, "index_topk": 4}'),
        "'index_topk' twice",
        AGAIN,
    ),
    "config has a number of 5000 digits": (
        lambda p: p.checkpoint(config_json='{"index_topk": ' + "1" * 5000 + "}"),
        "is not JSON",
        AGAIN,
    ),
    "no weights": (lambda p: p.checkpoint(without=WEIGHTS), "found no weights", "convert the checkpoint"),
    "a pickle alone": (pickled, "found only pytorch_model.bin", "convert the checkpoint to safetensors"),
    "a cut shard": (with_weights(lambda b: b[: len(b) // 2]), "model.safetensors is truncated or damaged", AGAIN),
    "a cut header": (with_weights(lambda b: b[:100]), "is truncated or damaged", AGAIN),
    "an empty shard": (with_weights(lambda b: b""), "in a file of 0", AGAIN),
    "a shard of zeros": (with_weights(lambda b: bytes(len(b))), "is truncated or damaged", AGAIN),
    "a page in place of a shard": (with_weights(lambda b: b"<!DOCTYPE html>" * 9), "is truncated or damaged", AGAIN),
    "a header of exabytes": (with_weights(lambda b: struct.pack("<Q", 2**60) + b[8:]), "is truncated", AGAIN),
    "a shard is a directory": (shard_directory, "model.safetensors", AGAIN),
    "shards without an index": (
        renamed("model-00001-of-00002.safetensors"),
        "found model-00001-of-00002.safetensors, without the index that lists them",
        "download model.safetensors.index.json too",
    ),
    "weights under another name": (
        renamed("consolidated.safetensors"),
        "found only consolidated.safetensors",
        "rename it to model.safetensors if it holds the whole model",
    ),
    "an index under another name": (
        renamed("quant_model_weights.safetensors.index.json"),
        "found quant_model_weights.safetensors.index.json",
        "rename it to model.safetensors.index.json if it lists the shards",
    ),
    "a shard is a link to nothing": (linked_shard, "found no weights", "expected model.safetensors"),
    "index without a map": (lambda p: indexed(None)(p), "has no weight_map", AGAIN),
    "index with a list": (indexed(["a"]), "has no weight_map", AGAIN),
    "index of nothing": (indexed({}), "has no weight_map", AGAIN),
    "index leads up": (indexed({"a": "../model/model.safetensors"}), "names '../model/", AGAIN),
    "index leads to a root": (indexed({"a": "/etc/passwd"}), "names '/etc/passwd'", AGAIN),
    "index names the parent": (indexed({"a": ".."}), "names '..'", AGAIN),
    "index names no text": (indexed({"a": ["x"]}), "has a list for 'a'", AGAIN),
    "index names the config": (indexed({"a": "config.json"}), "config.json is truncated or damaged", AGAIN),
    "index names what is missing": (indexed({"a": "model-9.safetensors"}), "model-9.safetensors is missing", AGAIN),
    "index promises more": (indexed({"a.weight": WEIGHTS}), "lacks a.weight", AGAIN),
    "index is cut": (lambda p: p.checkpoint(**{f"{INDEX[:-5]}_json": '{"weight'}), "is not JSON", AGAIN),
}


@pytest.mark.parametrize("case", FILES)
def test_checkpoints(place: Place, capfd: pytest.CaptureFixture[str], case: str) -> None:
    make, found, todo = FILES[case]
    command = READERS[list(FILES).index(case) % len(READERS)]
    place.refuses(Row(lambda p: p.on(command, make(p)), found, todo), capfd)


@pytest.mark.parametrize("command", READERS)
def test_every_command_opens_a_checkpoint_in_one_way(
    place: Place, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    model = with_weights(lambda b: b[:-1])(place)
    place.refuses(Row(lambda p: p.on(command, model), "model.safetensors is truncated or damaged", AGAIN), capfd)


# --- weights that are whole, and not those of the model ---


def other_tensors(edit: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Place], Path]:
    def make(place: Place) -> Path:
        model = place.checkpoint()
        save_file(edit(load_file(model / WEIGHTS)), model / WEIGHTS, metadata={"format": "pt"})
        return model

    return make


def last_halved(tensors: dict[str, Any]) -> dict[str, Any]:
    return {**tensors, "lm_head.weight": np.ascontiguousarray(tensors["lm_head.weight"][:, ::2])}


def with_value(value: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The tensors with one number of the LM head replaced."""

    def edit(tensors: dict[str, Any]) -> dict[str, Any]:
        head = tensors["lm_head.weight"].copy()
        head[3, 5] = value
        return {**tensors, "lm_head.weight": head}

    return edit


WEIGHT_ROWS: dict[str, tuple[Callable[[Place], object], str, str]] = {
    "of another model": (other_tensors(lambda t: {f"other.{name}": t[name] for name in t}), "missing", "weights"),
    "one is missing": (other_tensors(lambda t: {n: t[n] for n in t if "norm" not in n}), "norm", "weights"),
    "another shape": (other_tensors(last_halved), "lm_head.weight", "config"),
    "integers": (other_tensors(lambda t: {n: t[n].astype(np.int32) for n in t}), "is I32", "convert the checkpoint"),
    "a number that is none": (other_tensors(with_value(np.nan)), "NaN or infinite", "download or convert"),
    "an infinite number": (other_tensors(with_value(np.inf)), "NaN or infinite", "download or convert"),
}


@pytest.mark.parametrize("case", WEIGHT_ROWS)
def test_foreign_weights(place: Place, capfd: pytest.CaptureFixture[str], case: str) -> None:
    make, found, todo = WEIGHT_ROWS[case]
    place.refuses(Row(lambda p: p.greedy(model=make(p)), found, todo), capfd)


# --- configs ---

TYPE_AND_VALUES = "check model_type and its values"
CONFIGS: dict[str, tuple[Callable[[Place], object], str, str]] = {
    "no model_type": (lambda p: p.config("model_type"), "model_type", TYPE_AND_VALUES),
    "unknown model_type": (lambda p: p.config(model_type="glm_moe_dsb"), "glm_moe_dsb", TYPE_AND_VALUES),
    "model_type is a number": (lambda p: p.config(model_type=5), "config.json", ""),
    "no indexers": (lambda p: p.config(model_type="llama"), "is a llama model and has no indexers", "expected a Deep"),
    "code of its own": (
        lambda p: p.config(model_type="own", auto_map={"AutoConfig": "own.Config"}),
        "config.json",
        "--trust-remote-code",
    ),
    "index_topk 0": (lambda p: p.config(index_topk=0), "index_topk 0", "expected positive numbers"),
    "index_topk -1": (lambda p: p.config(index_topk=-1), "index_topk -1", "expected positive numbers"),
    "index_topk is text": (lambda p: p.config(index_topk="8"), "index_topk", ""),
    "index_topk is null": (lambda p: p.config(index_topk=None), "index_topk", ""),
    "index_topk is huge": (lambda p: p.config(index_topk=10**30), "index_topk", ""),
    "no layers": (lambda p: p.config(num_hidden_layers=0), "num_hidden_layers", ""),
    "fewer than no layers": (lambda p: p.config(num_hidden_layers=-3), "num_hidden_layers", ""),
    "a million layers": (lambda p: p.config(num_hidden_layers=10**6), "num_hidden_layers", ""),
    "layers are text": (lambda p: p.config(num_hidden_layers="6"), "num_hidden_layers", ""),
    "layers and a half": (lambda p: p.config(num_hidden_layers=6.5), "num_hidden_layers", ""),
    "hidden_size is huge": (lambda p: p.config(hidden_size=10**18), "config.json", ""),
    "hidden_size is null": (lambda p: p.config(hidden_size=None), "config.json", ""),
    "positions are null": (lambda p: p.config(max_position_embeddings=None), "config.json", ""),
    "positions are text": (lambda p: p.config(max_position_embeddings="512"), "config.json", ""),
    "vocabulary is text": (lambda p: p.config(vocab_size="300"), "config.json", ""),
    "vocabulary of none": (lambda p: p.config(vocab_size=0), "vocab", ""),
    "negative experts": (lambda p: p.config(n_routed_experts=-4), "config.json", ""),
    "dtype of nobody": (lambda p: p.config(dtype="float33"), "float33", ""),
    "dtype is an integer's": (lambda p: p.config(dtype="int8"), "int8", ""),
    "quantised otherwise": (
        lambda p: p.config(quantization_config={"quant_method": "gptq"}), "quantised by 'gptq'", "convert it"
    ),
    "quantised by a word": (lambda p: p.config(quantization_config="fp8"), "quanti", ""),
    "blocks of nothing": (
        lambda p: p.config(quantization_config={"quant_method": "fp8", "weight_block_size": [0, 128]}),
        "weight_block_size",
        "expected two sizes",
    ),
    "indexer_types too short": (lambda p: p.config(indexer_types=["full"] * 3), "indexer_types", ""),
    "indexer_types of letters": (lambda p: p.config(indexer_types=["F"] * 6), "indexer_types", ""),
    "indexer_types of lists": (lambda p: p.config(indexer_types=[["full"]] * 6), "indexer_types", ""),
    "first layer S": (lambda p: p.config(indexer_types=["shared"] + ["full"] * 5), "S", ""),
    "all layers S": (lambda p: p.config(indexer_types=["shared"] * 6), "indexers", ""),
    "rope is a number": (lambda p: p.config(rope_parameters=3), "config.json", ""),
    "NaN": (lambda p: p.checkpoint(config_json='{"model_type": "glm_moe_dsa", "index_topk": NaN}'), "index_topk", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(place: Place, capfd: pytest.CaptureFixture[str], case: str) -> None:
    make, found, todo = CONFIGS[case]
    command = READERS[list(CONFIGS).index(case) % len(READERS)]
    place.refuses(Row(lambda p: p.on(command, make(p)), found, todo), capfd)


GLM = {
    "model_type": "glm_moe_dsa",
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "intermediate_size": 64,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}
PLANNED: dict[str, tuple[dict[str, Any], str]] = {
    "no sizes": ({"hidden_size": None}, "hidden_size None"),
    "a size is text": ({"kv_lora_rank": "16"}, "kv_lora_rank is '16'"),
    "a size is below 1": ({"index_topk": 0}, "index_topk 0"),
    "a size is true": ({"vocab_size": True}, "vocab_size is True"),
    "a size is huge": ({"vocab_size": 10**400}, "vocab_size"),
    "a billion layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "freq is text": ({"index_topk_freq": "4"}, "index_topk_freq is '4'"),
    "offset is a list": ({"index_topk_freq": 4, "index_skip_topk_offset": [2]}, "index_skip_topk_offset"),
    "types are of lists": ({"indexer_types": [["full"]] * 6}, "indexer_types"),
    "types are too few": ({"indexer_types": ["full"]}, "indexer_types"),
    "first type is shared": ({"indexer_types": ["shared"] + ["full"] * 5}, "full first"),
    "pattern of other letters": ({"index_topk_pattern": "FXFSFF"}, "'X' at position 1"),
    "pattern is too long": ({"index_topk_pattern": "FFFFFFF"}, "pattern has 7 letters"),
    "pattern is a number": ({"index_topk_pattern": 4}, "index_topk_pattern"),
    "positions are text": ({"max_position_embeddings": "many"}, "max_position_embeddings is 'many'"),
    "positions are a list": ({"max_position_embeddings": [512]}, "max_position_embeddings"),
    "dtype of nobody": ({"dtype": "float33"}, "dtype 'float33'"),
    "quantised by a word": ({"quantization_config": "fp8"}, "quantization_config"),
    "blocks of nothing": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 0]}}, "weight_block_size"
    ),
    "block is a number": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": 128}}, "weight_block_size"
    ),
    "experts by text": ({"n_routed_experts": 4, "first_k_dense_replace": "3"}, "first_k_dense_replace"),
    "a frequency of experts by text": ({"n_routed_experts": 4, "moe_layer_freq": "1"}, "moe_layer_freq"),
    "kinds of layers by number": ({"mlp_layer_types": 6}, "mlp_layer_types"),
    "layer_types by number": ({"layer_types": 6}, "layer_types"),
    "text_config is a list": ({"text_config": [GLM]}, "text_config"),
}  # fmt: skip


@pytest.mark.parametrize("case", PLANNED)
def test_configs_to_plan_for(place: Place, capfd: pytest.CaptureFixture[str], case: str) -> None:
    changes, found = PLANNED[case]
    place.refuses(Row(lambda p: ("plan", p.json("config.json", {**GLM, **changes})), found, ""), capfd)


def test_the_config_to_plan_for_is_fine_without_changes(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    from icsearch.cli import app

    assert app._run(["plan", str(place.json("config.json", GLM))], debug=False) == 0


# --- tokenizers ---

READY = "give ready tokens"


def tokenizer(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Place], Path]:
    def make(place: Place) -> Path:
        model = place.checkpoint()
        document = json.loads((model / "tokenizer.json").read_text())
        edited = edit(document)
        (model / "tokenizer.json").write_text(json.dumps(document if edited is None else edited))
        return model

    return make


def without_tokenizer(place: Place) -> Path:
    model = place.checkpoint(without="tokenizer.json")
    (model / "tokenizer_config.json").unlink()
    return model


def far_ids(document: dict[str, Any]) -> None:
    """A vocabulary larger than the model's: every id is moved up."""
    document["model"]["vocab"] = {word: number + 250 for word, number in document["model"]["vocab"].items()}
    for token in document["added_tokens"]:
        token["id"] += 250


TOKENIZERS: dict[str, tuple[Callable[[Place], object], str, str]] = {
    "none": (without_tokenizer, "has no tokenizer", "ready tokens"),
    "cut": (lambda p: p.checkpoint(tokenizer_json='{"version'), "the tokenizer in", READY),
    "empty": (lambda p: p.checkpoint(tokenizer_json=""), "the tokenizer in", READY),
    "a list": (lambda p: p.checkpoint(tokenizer_json="[]"), "the tokenizer in", READY),
    "not UTF-8": (lambda p: p.checkpoint(tokenizer_json=b"\xff\xfe{}"), "the tokenizer in", READY),
    "deep": (lambda p: p.checkpoint(tokenizer_json="[" * 100_000), "the tokenizer in", READY),
    "no model": (tokenizer(lambda d: {"version": "1.0"}), "the tokenizer in", READY),
    "a model of nobody": (tokenizer(lambda d: {**d, "model": {"type": "Nobody"}}), "the tokenizer in", READY),
    "its config is cut": (lambda p: p.checkpoint(tokenizer_config_json="{"), "the tokenizer in", READY),
    "its config is a list": (lambda p: p.checkpoint(tokenizer_config_json="[]"), "the tokenizer in", READY),
    "a class of nobody": (
        lambda p: p.checkpoint(tokenizer_config_json='{"tokenizer_class": "Nobody", "auto_map": {"AutoTokenizer": '
                               '["own.Own", null]}}'),
        "the tokenizer in",
        READY,
    ),
    "its ids are those of a larger model": (tokenizer(far_ids), "outside the model's vocabulary of 300", "tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers(place: Place, capfd: pytest.CaptureFixture[str], case: str) -> None:
    make, found, todo = TOKENIZERS[case]
    place.refuses(Row(lambda p: p.calibrate("demo", model=make(p)), found, todo), capfd)
