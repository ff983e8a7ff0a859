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
    able = [one for one in known if type(config) in one._model_mapping or one.__name__ in _remote(config)]
    named = [one for one in able if set(_classes(one, config)) & set(config.architectures or ())]
    if not able:
        raise ModelError(
            f"transformers has no class with an LM head for model_type {config.model_type}: expected a checkpoint of a "
            "whole language model"
        )
    return (named + able)[0]


def _remote(config: Any) -> dict[str, str]:
    """Auto classes for which the checkpoint brings code of its own."""
    return getattr(config, "auto_map", None) or {}


def _classes(auto: Any, config: Any) -> list[str]:
    """Names of the classes that an auto class has for this config."""
    if type(config) not in auto._model_mapping:
        return []
    found = auto._model_mapping[type(config)]
    return [one.__name__ for one in (found if isinstance(found, (list, tuple)) else [found])]
