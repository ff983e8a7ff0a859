"""A checkpoint's layout: what a search needs to know of a model before any of its weights are read."""

from __future__ import annotations

import bisect
import codecs
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from icsearch.core.errors import ModelError
from icsearch.core.pattern import FULL, SHARED, Pattern
from icsearch.core.text import first_line
from icsearch.model.checkpoint import Checkpoint
from icsearch.model.config import TEXT_CONFIG, Backbone, no_indexers
from icsearch.model.families.calls import numbers_handed_on
from icsearch.model.families.decoder import auto_class, check_one_each, layer_configs
from icsearch.model.families.ending import streams
from icsearch.model.families.selection import SelectionForm, index_heads, read_form
from icsearch.model.kernels import scores_alike
from icsearch.model.machine import is_out_of_memory
from icsearch.model.model import DsaModel
from icsearch.model.quantisation import dtype_name, quantisation
from icsearch.model.shape import ModelShape

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
    attention: str  # transformers' name of the attention function that its modules run: sdpa, or eager
    streams: int  # of hidden states between layers; 1 without hyper-connections
    left_numbers: int  # that layers hand on for each token beside states and selection
    selection: SelectionForm
    index_heads: int
    index_head_dim: int
    num_parameters: int
    layer_parameters: tuple[int, ...]  # of each decoder layer
    has_arithmetic: bool  # whether the block-wise arithmetic knows these layers
    sizes: ModelShape | None  # what the memory of a call follows from; None without the block-wise arithmetic
    backbone: Backbone  # the decoder layers, and the config.json that an engine would read with a pattern

    @property
    def start_pattern(self) -> Pattern:
        """All F but for the native S layers: the unmodified model."""
        native = set(self.native_shared)
        return Pattern("".join(SHARED if p in native else FULL for p in range(len(self.layer_indices))))

    @property
    def reference_known(self) -> bool:
        """Whether the plan knows what a call of transformers' own modules takes in this family."""
        return self.selection.plain and self.streams == 1 and self.attention == "sdpa"

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
    quantisation(checkpoint.config, checkpoint.name)  # refuses one that cannot be read
    config = load_config(checkpoint, trust_remote_code)
    with building(checkpoint), torch.device("meta"):
        model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    skeleton = DsaModel(model)
    indexer = skeleton.telling_indexer
    if indexer is None:
        raise no_indexers(checkpoint.config, checkpoint.name)
    try:
        check_one_each(skeleton.layer_indices)
        selection, (heads, head_dim) = read_form(indexer), index_heads(indexer)
    except ModelError as error:
        raise ModelError(f"{checkpoint.name} cannot be searched: {error}") from None
    try:
        every = layer_configs(skeleton.config)
        distinct = {id(every[index]): every[index] for index in skeleton.layer_indices}.values()
        # Sizes first: they refuse numbers that are no counts, on which no indexer can be tried.
        sizes = [ModelShape.from_config(layer.to_dict()) for layer in distinct] if skeleton.has_arithmetic else []
        numbers = {
            "hidden_size": every[0].hidden_size,
            "vocab_size": every[0].vocab_size,
            "max_positions": min(layer.max_position_embeddings for layer in every),
            "attention_heads": max(layer.num_attention_heads for layer in every),
            "streams": streams(every[0]),
            "left_numbers": max(numbers_handed_on(layer) for layer in every),
        }
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{checkpoint.name} cannot be searched: its config does not say what a search needs to know of each layer "
            f"({first_line(error)}); check it against the model that it belongs to"
        ) from error
    largest = max(sizes, key=lambda shape: shape.projection_weights, default=None)
    known = largest is not None and scores_alike(indexer)
    return Layout(
        **numbers,
        model_type=config.model_type,
        num_layers=len(skeleton.layers),
        layer_indices=tuple(skeleton.layer_indices),
        native_shared=tuple(skeleton.native_shared),
        wrapper_config=bool(checkpoint.config.get(TEXT_CONFIG)),
        dtype=str(config_dtype(checkpoint)).removeprefix("torch."),
        attention=skeleton.config._attn_implementation,
        selection=selection,
        index_heads=heads,
        index_head_dim=head_dim,
        num_parameters=_num_parameters(skeleton.model),
        layer_parameters=tuple(_num_parameters(layer) for layer in skeleton.layers),
        has_arithmetic=known,
        sizes=largest if known else None,
        backbone=Backbone.of_model(len(skeleton.layers), skeleton.layer_indices, checkpoint.config),
    )


@contextlib.contextmanager
def building(checkpoint: Checkpoint) -> Iterator[None]:
    """Within the block, a config that transformers makes no model of is a ModelError."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # a config whose numbers do not fit together fails in any way torch knows
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"transformers cannot build {checkpoint.name} from its config.json ({first_line(error)}): "
            "check the config against the model that it belongs to"
        ) from error


def config_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The type that a checkpoint's config names for its weights; raises ModelError for what is none.

    Read from the file: transformers' own config has a type of its own once a model is made of it.
    """
    stated = dtype_name(checkpoint.config, checkpoint.name).removeprefix("torch.")
    found = getattr(torch, stated, None)
    if not isinstance(found, torch.dtype):
        raise ModelError(
            f"config.json of {checkpoint.name} has dtype {stated!r}: expected {', '.join(DTYPES)}; mend it"
        )
    return found


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def load_config(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """The checkpoint's config, as transformers reads it; raises ModelError."""
    from transformers import AutoConfig

    path = checkpoint.directory / "config.json"
    if path.read_bytes().startswith(codecs.BOM_UTF8):
        raise ModelError(f"{path} begins with a byte order mark, which transformers cannot read: save it without one")
    try:
        return AutoConfig.from_pretrained(
            checkpoint.directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # unknown model_type, remote code refused, a value of the wrong type
        raise ModelError(
            f"transformers cannot use {path} ({first_line(error)}): "
            "check model_type and its values, or pass --trust-remote-code if the checkpoint brings its own code"
        ) from error
