"""Where a model's decoder layers are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from icsearch.errors import ModelError


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


def check_one_each(indices: Sequence[int]) -> None:
    """Raise ModelError where a decoder layer has several indexers: a letter says what one of them does."""
    several = next((index for index in indices if indices.count(index) > 1), None)
    if several is not None:
        raise ModelError(
            f"decoder layer {several} has {indices.count(several)} modules `indexer`: expected one for each layer"
        )
