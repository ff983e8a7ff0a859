"""Small random checkpoints of the DSA families, made with save_pretrained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as torch_save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, DeepseekV32Config, GlmMoeDsaConfig, PreTrainedTokenizerFast

VOCABULARY = 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "first_k_dense_replace": 3,
    "max_position_embeddings": 512,
    # Wide enough that layers differ: with the default, random indexers hardly change the loss.
    "initializer_range": 0.3,
}
FAMILIES = {"glm_moe_dsa": GlmMoeDsaConfig, "deepseek_v32": DeepseekV32Config}


def save_checkpoint(
    directory: Path, family: str = "glm_moe_dsa", seed: int = 0, shard_size: str | None = None, **changes: Any
) -> Path:
    """A random checkpoint with a tokenizer, as a directory that transformers loads."""
    torch.manual_seed(seed)
    config = FAMILIES[family](**{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config)
    small = "40KB" if changes.get("num_hidden_layers", 0) > 6 else "5GB"
    model.save_pretrained(directory, max_shard_size=shard_size or small)
    save_tokenizer(directory)
    return directory


def save_tokenizer(directory: Path) -> None:
    """A byte-level BPE with an end-of-text token and no merges worth speaking of."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog sat on the log " * 20], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(directory)


def save_tokens(directory: Path, sequences: int = 5, length: int = 40, seed: int = 1) -> Path:
    """A calibration directory with random tokens alone: bring your own tokens."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (sequences, length), dtype=np.int64)
    save_file({"input_ids": ids}, directory / "calibration.safetensors")
    return directory


def overflow_in(directory: Path, layer: int) -> None:
    """Make this decoder layer's states infinite: its weights are finite, as they must be, and far too large."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors[f"model.layers.{layer}.self_attn.o_proj.weight"].fill_(3e38)
    torch_save(tensors, path, {"format": "pt"})
