"""Small random checkpoints of the families that share layers natively, and pattern files that belong to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GlmMoeDsaConfig, HYV4Config
from transformers.models.mistral_large4.configuration_mistral_large4 import MistralLarge4Config

import tiny
import tiny_families
from icsearch.core.pattern import Pattern
from icsearch.core.pattern_file import PatternFile, Step
from icsearch.model.checkpoint import fingerprint, open_checkpoint

LETTERS = "FFSFSS"
LAYERS = len(LETTERS)
VISION: dict[str, Any] = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
NATIVE = ("glm_moe_dsa", "hy_v4", "mistral_large4", *(["hy_v4_vl"] if "hy_v4_vl" in tiny_families.CONFIGS else []))


def make_config(family: str, **changes: Any) -> Any:
    """A config whose layers are all full, unless `indexer_types` says otherwise."""
    sizes = {**tiny.SIZES, "indexer_types": ["full"] * LAYERS, "pad_token_id": None, **changes}
    if family == "glm_moe_dsa":
        return GlmMoeDsaConfig(**sizes)
    if family == "hy_v4":
        return HYV4Config(**sizes, bos_token_id=None, eos_token_id=0)
    if family == "hy_v4_vl":
        return tiny_families.CONFIGS[family](
            **{**tiny.SIZES, "mlp_layer_types": ["sparse"] * LAYERS, "indexer_types": ["full"] * LAYERS, **changes}
        )
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = {name: value for name, value in sizes.items() if name != "q_lora_rank"}
    return MistralLarge4Config(text_config={**text, "rope_parameters": rope}, vision_config=VISION)


def auto_class(family: str) -> Any:
    """What loads a checkpoint of the family."""
    return AutoModelForImageTextToText if family in ("mistral_large4", "hy_v4_vl") else AutoModelForCausalLM


def save_native(directory: Path, family: str, shard_size: str = "5GB", **changes: Any) -> Path:
    """A random checkpoint with a tokenizer, as `save_pretrained` writes it."""
    torch.manual_seed(0)
    auto_class(family).from_config(make_config(family, **changes)).save_pretrained(directory, max_shard_size=shard_size)
    tiny.save_tokenizer(directory)
    return directory


def save_pattern(path: Path, checkpoint: Path, letters: str = LETTERS, **model: Any) -> Path:
    """A pattern.json as a search on this checkpoint writes it, with the flips in the order of their layers."""
    config = json.loads((checkpoint / "config.json").read_text())
    known: dict[str, Any] = {
        "name_or_path": str(checkpoint),
        "model_type": config["model_type"],
        "fingerprint": fingerprint(open_checkpoint(str(checkpoint))),
        "native_shared": [],
        "wrapper_config": "text_config" in config,
        "num_hidden_layers": len(letters),
    }
    steps, pattern = [], Pattern.full(len(letters))
    for number, layer in enumerate(Pattern(letters).shared_layers, start=1):
        pattern = pattern.flip(layer)
        steps.append(Step(number, layer, 2.0 + number / 8, number / 8, 0.01, str(pattern)))
    PatternFile(
        pattern=Pattern(letters),
        layer_indices=tuple(range(len(letters))),
        method="greedy",
        baseline_loss=2.0,
        loss=steps[-1].loss if steps else 2.0,
        steps=tuple(steps),
        model={**known, **model},
    ).save(path)
    return path
