"""Checkpoints and tokens that the benchmarks run on: random ones, and given ones made fit for longer sequences."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The model of the goals: 12 layers, half of them with experts, index_topk 32.
SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 96,
    "intermediate_size": 160,
    "moe_intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "index_topk": 32,
    "index_head_dim": 32,
    "index_n_heads": 4,
    "max_position_embeddings": 32768,
    # Wide enough that layers differ, and no wider: from 0.1 on float32 rounding alone moves the loss by more than ties
    # do, since a selection that turns over turns others over behind it (see LOG.md).
    "initializer_range": 0.05,
}


def label(name: str) -> str:
    """What results call a checkpoint: a directory by its last part, so that no machine's paths are in them."""
    return Path(name).name if Path(name).is_dir() else name


def check_labels(names: Sequence[str]) -> None:
    """Refuse two checkpoints that results could not tell apart."""
    found: dict[str, str] = {}
    for name in names:
        other = found.setdefault(label(name), name)
        if other != name:
            raise SystemExit(f"{other} and {name} would both be called {label(name)}: rename one")


def random_checkpoint(directory: Path, layers: int, seed: int = 0, **changes: Any) -> Path:
    """A random glm_moe_dsa checkpoint, seeded; the one that lies there, if there is one."""
    if (directory / "config.json").exists():
        return directory
    import torch
    from transformers import AutoModelForCausalLM, GlmMoeDsaConfig

    sizes = {**SIZES, "num_hidden_layers": layers, "first_k_dense_replace": layers // 2, **changes}
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(GlmMoeDsaConfig(**sizes)).save_pretrained(directory)
    return directory


def random_tokens(directory: Path, sequences: int, length: int, vocabulary: int, seed: int = 1) -> Path:
    """Ready tokens, each as likely as any other, seeded. What lies there is written again."""
    import numpy as np
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    ids = np.random.default_rng(seed).integers(0, vocabulary, (sequences, length), dtype=np.int64)
    save_file({"input_ids": ids}, directory / "calibration.safetensors")
    return directory


def stretched(source: Path, length: int, work: Path) -> Path:
    """The checkpoint itself where it takes sequences of this length, else a copy that only says it does.

    Nothing else changes; its losses beyond the length that it was trained on mean little, its speed does not care.
    """
    config = json.loads((source / "config.json").read_text())
    if config["max_position_embeddings"] >= length:
        return source
    copy = work / f"{source.name}-{length}"
    shutil.copytree(source, copy, dirs_exist_ok=True)
    (copy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": length}, indent=2))
    return copy


def with_tokens(name: str, length: int, sequences: int, work: Path, seed: int = 0) -> tuple[Path, Path]:
    """(checkpoint, tokens) of `demo` or a path: the built-in corpus by the checkpoint's own tokenizer."""
    from icsearch.commands.requests import CalibrationRequest
    from icsearch.commands.setup import calibrate
    from icsearch.model.checkpoint import open_checkpoint

    source = open_checkpoint(name).directory
    model = stretched(source, length, work)
    tokens = work / f"tokens-{source.name}-{length}-{sequences}-{seed}"
    calibrate(CalibrationRequest(str(model), "demo", length, sequences, seed), tokens, fresh=False)
    return model, tokens


def prepare(name: str, length: int, sequences: int, work: Path, seed: int = 0) -> tuple[Path, Path]:
    """(checkpoint, tokens) of `random:LAYERS` or `random:LAYERS/SEED`, which gets random tokens, `demo`, or a path."""
    if not name.startswith("random:"):
        return with_tokens(name, length, sequences, work, seed)
    layers, _, weights = name.removeprefix("random:").partition("/")
    model = random_checkpoint(work / f"random-{layers}-{weights or 0}", int(layers), int(weights or 0))
    tokens = work / f"tokens-random-{length}-{sequences}-{seed}"
    return model, random_tokens(tokens, sequences, length, SIZES["vocab_size"], seed + 1)
