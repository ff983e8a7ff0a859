"""Where a model's decoder layers are, and which of transformers' classes makes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from icsearch.core.errors import ModelError


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers of a transformers model's language model, in order; none where it has no list of them."""
    found = layer_list(model)
    return [] if found is None else list(found)


def layer_list(model: Any) -> nn.ModuleList | None:
    """The list of decoder layers: the decoder's `layers`, or its only list of modules by another name."""
    decoder = model.get_decoder()
    named = getattr(decoder, "layers", None)
    if isinstance(named, nn.ModuleList):
        return named
    others = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    return others[0] if len(others) == 1 else None


def layer_configs(config: Any) -> list[Any]:
    """The config of each decoder layer by a language model's config; where layers are alike, that one for all."""
    if getattr(config, "is_heterogeneous", False):
        return list(config.per_layer_config)
    return [config] * config.num_hidden_layers


def check_one_each(indices: Sequence[int]) -> None:
    """Raise ModelError where a decoder layer has several indexers: a letter says what one of them does."""
    several = next((index for index in indices if indices.count(index) > 1), None)
    if several is not None:
        raise ModelError(
            f"decoder layer {several} has {indices.count(several)} modules `indexer`: expected one for each layer"
        )


def auto_class(config: Any) -> Any:
    """The auto class under which transformers makes a language model of this config.

    The class that the checkpoint names as its architecture comes first, then text before images. Raises ModelError
    where transformers has none.
    """
    import transformers

    known = (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForMultimodalLM,
    )
    remote = getattr(config, "auto_map", None) or {}  # auto classes for which the checkpoint brings code of its own
    able, named = [], []
    for auto in known:
        mapping: Any = auto._model_mapping
        classes = mapping.get(type(config), ())
        names = {made.__name__ for made in (classes if isinstance(classes, (list, tuple)) else [classes])}
        if names or auto.__name__ in remote:
            able.append(auto)
        if names & set(config.architectures or ()):
            named.append(auto)
    if not able:
        raise ModelError(
            f"transformers has no class with an LM head for model_type {config.model_type}: expected a checkpoint of a "
            "whole language model"
        )
    return [*named, *able][0]
