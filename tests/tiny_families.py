"""Small random checkpoints of all families with an indexer, as their own classes save them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from tiny import SIZES, VOCABULARY, save_tokenizer

MLA = {name: size for name, size in SIZES.items() if name != "first_k_dense_replace"}
MLA |= {"num_hidden_layers": 4, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
NO_SPECIAL = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": 0}
PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "patch_size": 4,
    "image_size": 8,
}
DOTS_LAYERS = ["indexed_attention", "sliding_attention", "indexed_attention", "indexed_attention"]
HYPER = {"hc_mult": 2, "hc_sinkhorn_iters": 3}
SHARED_HEADS = {"vocab_size": VOCABULARY, "hidden_size": 32, "head_dim": 16, "max_position_embeddings": 512}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}


def _deepseek_v4(**changes: Any) -> Any:
    sizes = {
        **SHARED_HEADS, **EXPERTS, **HYPER, **NO_SPECIAL,
        "num_hidden_layers": 5, "num_attention_heads": 4, "q_lora_rank": 24, "partial_rotary_factor": 0.5,
        "n_routed_experts": 4,
        "layer_types": [
            "heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention",
            "compressed_sparse_attention", "compressed_sparse_attention",
        ],
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "o_groups": 2, "o_lora_rank": 8, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 3,
        "sliding_window": 8, "initializer_range": 0.3,
    }  # fmt: skip
    return transformers.DeepseekV4Config(**{**sizes, **changes})


def _glm5_next(**changes: Any) -> Any:
    text = {
        **MLA, **NO_SPECIAL, **HYPER, "num_hidden_layers": 5, "qk_rope_head_dim": 0, "qk_nope_head_dim": 16,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse", "sparse"],
        "layer_types": ["indexed_attention", "linear_attention", "indexed_attention", "linear_attention",
                        "indexed_attention"],
        "index_kpool": 2, "linear_head_dim": 8, "linear_num_heads": 2,
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "num_heads": 1, "out_hidden_size": 32, "intermediate_size": 16,
        "image_size": 28, "projection_intermediate_size": 16,
    }  # fmt: skip
    return transformers.Glm5NextConfig(text_config={**text, **changes}, vision_config=vision)


def _minimax_m3_vl() -> Any:
    text = {
        **SHARED_HEADS, **NO_SPECIAL, "intermediate_size": 16, "dense_intermediate_size": 48,
        "shared_intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8, "index_n_heads": 2, "index_head_dim": 16,
        "index_block_size": 4, "index_topk_blocks": 3, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse", "minimax_m3_sparse"],
        "initializer_range": 0.3,
    }  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
              "image_size": 28}  # fmt: skip
    return transformers.MiniMaxM3VLConfig(text_config=text, vision_config=vision, projector_hidden_size=32)


def _qwen4_exp(**changes: Any) -> Any:
    text = {
        **SHARED_HEADS, **EXPERTS, **NO_SPECIAL, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "shared_expert_intermediate_size": 16, "num_experts": 4, "hc_count": 2,
        "hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "initializer_range": 0.3,
        "layer_types": ["linear_attention", "indexed_attention", "indexed_attention", "indexed_attention"],
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": 32,
              "num_position_embeddings": 16}  # fmt: skip
    return transformers.Qwen4ExpConfig(text_config={**text, **changes}, vision_config=vision)


def _mistral_large4(**changes: Any) -> Any:
    text = {**{name: value for name, value in MLA.items() if name != "q_lora_rank"}, **NO_SPECIAL, **changes}
    return transformers.MistralLarge4Config(text_config=text, vision_config=PIXTRAL)


def _dots3_note() -> Any:
    # Sliding layers have sizes of their own, as in the released model: a config with attributes for each layer.
    changes: dict[str, Any] = {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 24, "swa_kv_lora_rank": 24,
        "swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
    }  # fmt: skip
    changes |= {"head_dim": 16, "sliding_window": 8, "shared_experts_intermediate_size": 16, **NO_SPECIAL}
    text = transformers.Dots3NoteTextConfig(**{**MLA, "layer_types": DOTS_LAYERS, **changes})
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
              "adapter_in_dim": 16, "adapter_out_dim": 32, "mlp_layer_types": ["dense"]}  # fmt: skip
    audio = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
             "downsample_hidden_size": 8, "adapter_input_size": 16, "adapter_out_dim": 32}  # fmt: skip
    return transformers.Dots3NoteConfig(text_config=text, vision_config=vision, audio_config=audio)


def _axk2() -> Any:
    return transformers.AXK2Config(**MLA, **NO_SPECIAL, gated_norm_rank=4)


def _hy_v4(**changes: Any) -> Any:
    return transformers.HYV4Config(
        **{**MLA, **NO_SPECIAL, "hc_mult": 2, "indexer_types": ["full"] * 4, "n_group": 1, "topk_group": 1, **changes}
    )


def _hy_v4_vl(**changes: Any) -> Any:
    text = {**MLA, **NO_SPECIAL, "hc_mult": 2, "indexer_types": ["full"] * 4, "n_group": 1, "topk_group": 1, **changes}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
              "out_hidden_size": 32, "max_image_size": 64}  # fmt: skip
    return transformers.HYV4VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision)


# n-gram embeddings in the first layer, which take token ids; stored in two parts
NGRAMS = {
    "ple_layer_ids": [1],
    "ple_embed_dim": 16,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 2,
}
CONFIGS: dict[str, Callable[..., Any]] = {
    "deepseek_v32": lambda **changes: transformers.DeepseekV32Config(**{**MLA, **changes}),
    "glm_moe_dsa": lambda **changes: transformers.GlmMoeDsaConfig(**{**MLA, **changes}),
    "axk2": _axk2,
    "hy_v4": _hy_v4,
    "mistral_large4": _mistral_large4,
    "dots3_note": _dots3_note,
    "deepseek_v4": _deepseek_v4,
    "glm5_next": _glm5_next,
    "minimax_m3_vl": _minimax_m3_vl,
    "qwen4_exp": _qwen4_exp,
    **({"hy_v4_vl": _hy_v4_vl} if hasattr(transformers, "HYV4VLConfig") else {}),  # from transformers 5.24 on
}
CLASSES = {
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
    "axk2": "AXK2ForCausalLM",
    "hy_v4": "HYV4ForCausalLM",
    "mistral_large4": "MistralLarge4ForConditionalGeneration",
    "dots3_note": "Dots3NoteForConditionalGeneration",
    "deepseek_v4": "DeepseekV4ForCausalLM",
    "glm5_next": "Glm5NextForConditionalGeneration",
    "minimax_m3_vl": "MiniMaxM3SparseForConditionalGeneration",
    "qwen4_exp": "Qwen4ExpForConditionalGeneration",
    "hy_v4_vl": "HYV4VLForConditionalGeneration",
}


def save_checkpoint(directory: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """A random checkpoint of a family with a tokenizer; `changes` to its config, or to its language model's."""
    torch.manual_seed(seed)
    config = CONFIGS[family](**changes)
    model = getattr(transformers, CLASSES[family])._from_config(config)
    for module in model.modules():
        if hasattr(module, "tid2eid"):  # made without a choice: all tokens to expert 0
            module.tid2eid.random_(config.n_routed_experts)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory
