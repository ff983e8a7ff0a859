"""A checkpoint's layout: what a search needs to know of a model before any of its weights are read."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from icsearch.cost import ModelShape
from icsearch.errors import ModelError, first_line
from icsearch.model import DsaModel
from icsearch.pattern import FULL, SHARED, Pattern
from icsearch.weights.checkpoint import Checkpoint
from icsearch.weights.fp8 import make_quantizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Layout:
    """What a search needs to know of a model before its weights are read."""

    model_type: str
    num_layers: int  # decoder layers
    layer_indices: tuple[int, ...]  # the decoder layer of each DSA layer
    native_shared: tuple[int, ...]  # DSA layers that the checkpoint itself shares
    wrapper_config: bool  # the language model's config sits in text_config
    dtype: str
    hidden_size: int
    vocab_size: int
    max_positions: int
    attention_heads: int
    index_topk: int
    index_heads: int
    index_head_dim: int
    num_parameters: int
    layer_parameters: tuple[int, ...]  # of each decoder layer
    has_arithmetic: bool  # whether the block-wise arithmetic knows these layers
    sizes: ModelShape | None  # what the memory of a call follows from; None without the block-wise arithmetic

    @property
    def start_pattern(self) -> Pattern:
        """All F but for the native S layers: the unmodified model."""
        native = set(self.native_shared)
        return Pattern("".join(SHARED if p in native else FULL for p in range(len(self.layer_indices))))

    def count_layer_runs(self, patterns: Iterable[Pattern]) -> int:
        """Layer runs that one sweep of these patterns takes: the nodes of their tree of prefixes."""
        letters = {str(pattern) for pattern in patterns}
        runs = 0
        for index in range(self.num_layers):
            decided = bisect.bisect_right(self.layer_indices, index)
            runs += len({text[:decided] for text in letters})
        return runs


def inspect(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Layout:
    """Build the model without memory and read its layout; raises ModelError where it is none that can be searched."""
    make_quantizer(checkpoint)  # refuses a quantisation that cannot be read
    config = load_config(checkpoint, trust_remote_code)
    skeleton = DsaModel(_skeleton(checkpoint, config, trust_remote_code))
    indexer = next((slot.inner for slot in skeleton.slots if slot.inner is not None), None)
    if indexer is None:
        raise ModelError(
            f"{checkpoint.name} is a {config.model_type} model and has no indexers: "
            "expected a DeepSeek-Sparse-Attention checkpoint such as deepseek_v32 or glm_moe_dsa"
        )
    text_config = skeleton.config
    if min(indexer.index_topk, indexer.n_heads, indexer.head_dim) < 1:
        raise ModelError(
            f"config.json of {checkpoint.name} has index_topk {indexer.index_topk}, index_n_heads {indexer.n_heads}, "
            f"index_head_dim {indexer.head_dim}: expected positive numbers; use the config that belongs to the weights"
        )
    return Layout(
        model_type=config.model_type,
        num_layers=len(skeleton.layers),
        layer_indices=tuple(skeleton.layer_indices),
        native_shared=tuple(skeleton.native_shared),
        wrapper_config=text_config is not config,
        dtype=str(config.dtype or torch.float32).removeprefix("torch."),
        hidden_size=text_config.hidden_size,
        vocab_size=text_config.vocab_size,
        max_positions=text_config.max_position_embeddings,
        attention_heads=text_config.num_attention_heads,
        index_topk=int(indexer.index_topk),
        index_heads=int(indexer.n_heads),
        index_head_dim=int(indexer.head_dim),
        num_parameters=_num_parameters(skeleton.model),
        layer_parameters=tuple(_num_parameters(layer) for layer in skeleton.layers),
        has_arithmetic=skeleton.has_arithmetic,
        sizes=ModelShape.from_config(text_config.to_dict()) if skeleton.has_arithmetic else None,
    )


def _skeleton(checkpoint: Checkpoint, config: Any, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config whose numbers do not fit together fails in any way torch knows
        raise cannot_build(checkpoint, error) from error


def cannot_build(checkpoint: Checkpoint, error: Exception) -> ModelError:
    """The error for a config that transformers makes no model of."""
    return ModelError(
        f"transformers cannot build {checkpoint.name} from its config.json ({first_line(error)}): "
        "check the config against the model that it belongs to"
    )


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def load_config(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """The checkpoint's config, as transformers reads it; raises ModelError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            checkpoint.directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # unknown model_type, remote code refused, a value of the wrong type
        raise ModelError(
            f"transformers cannot use {checkpoint.directory / 'config.json'} ({first_line(error)}): "
            "check model_type and its values, or pass --trust-remote-code if the checkpoint brings its own code"
        ) from error
